"""Whole runs on real processes: what a run ends with does not depend on how it was carried out."""

import json
import math
import pickle
import re
import signal
from pathlib import Path

import pytest
import torch

import main_pretrain
from methods.dino import DINO
from tests.launch import assert_same_run, finish, load, make_images, run_here, start, tensorboard_of, wait_for_line
from training.consensus import Consensus
from utils import RunStopped, UsageError

SAVE_EVERY_STEP = {"save_every_minutes": 1e-9}
UDI = {"method": "udi", "warmup_teacher_temp_epochs": 0, "local_sampling_window_size": 1}
MASKED = {"method": "ibot", "patch_out_dim": 48, "shared_head": "true", "warmup_teacher_temp_epochs": 0}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def uninterrupted(images, tmp_path_factory):
    """The run that all others are compared with: one process, never stopped."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    patch = pytest.MonkeyPatch()
    run_here(patch, data_path=images, output_dir=folder)
    patch.undo()
    return folder


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    return [line["train_loss"] for line in log_of(folder)]


def assert_close_logs(one: Path, other: Path) -> None:
    """Of runs on different numbers of processes; each measures the effective rank of its own images."""
    for ours, theirs in zip(log_of(one), log_of(other), strict=True):
        del ours["train_effective_rank"], theirs["train_effective_rank"]
        assert ours == pytest.approx(theirs, rel=1e-6)


def test_training_moves_student_teacher_and_centre(uninterrupted):
    state = load(uninterrupted)
    assert state["epoch"] == 2
    assert state["dino_loss"]["center"].abs().sum() > 0
    assert not torch.equal(state["student"]["module.backbone.cls_token"], state["teacher"]["backbone.cls_token"])
    assert len(losses(uninterrupted)) == 2


@pytest.mark.parametrize("options", [{}, {"use_bn_in_head": "true"}], ids=["layer norm", "batch norm in the head"])
def test_two_processes_equal_one_with_twice_the_batch(images, uninterrupted, tmp_path, monkeypatch, options):
    reference = uninterrupted
    if options:
        reference = tmp_path / "one"
        run_here(monkeypatch, data_path=images, output_dir=reference, **options)
    folder = tmp_path / "two"
    finish(start(nproc=2, data_path=images, output_dir=folder, batch_size_per_gpu=4, **options))
    assert_same_run(reference, folder, rtol=1e-6, atol=1e-9)
    assert_close_logs(reference, folder)
    assert losses(folder) == pytest.approx(losses(reference), rel=1e-9)


@pytest.mark.parametrize("pieces", [2, 8])
def test_accumulated_pieces_equal_the_whole_batch(images, uninterrupted, tmp_path, monkeypatch, pieces):
    run_here(monkeypatch, data_path=images, output_dir=tmp_path, accum_iter=pieces)
    assert_same_run(uninterrupted, tmp_path, rtol=1e-6, atol=1e-9)
    assert losses(tmp_path) == pytest.approx(losses(uninterrupted), rel=1e-9)


def test_recomputed_activations_and_loading_processes_change_no_bit(images, uninterrupted, tmp_path, monkeypatch):
    run_here(monkeypatch, data_path=images, output_dir=tmp_path, grad_checkpointing=True, num_workers=2)
    assert_same_run(uninterrupted, tmp_path)


def test_killed_within_an_epoch_and_started_again_ends_with_the_same_bits(images, uninterrupted, tmp_path, monkeypatch):
    options = {"data_path": images, "output_dir": tmp_path, **SAVE_EVERY_STEP}
    for line in ("[0/2]  [3/5]", "[1/2]  [1/5]"):
        process = start(**options, num_workers=1)
        wait_for_line(process, line)
        process.kill()
        process.wait()
        assert load(tmp_path)["tutelage"]["step"] > 0
    run_here(monkeypatch, **options, num_workers=2)
    assert_same_run(uninterrupted, tmp_path)


def test_killed_while_a_checkpoint_is_written_keeps_the_one_before(images, uninterrupted, tmp_path, monkeypatch):
    dying = (
        "import os, signal, sys, torch, main_pretrain\n"
        "save, calls = torch.save, []\n"
        "def half(state, file):\n"
        "    save(state, file)\n"
        "    calls.append(1)\n"
        "    if len(calls) == 3:\n"
        "        file.flush(); file.truncate(file.tell() // 2); os.kill(os.getpid(), signal.SIGKILL)\n"
        "torch.save = half\n"
        "main_pretrain.main()\n"
    )
    options = {"data_path": images, "output_dir": tmp_path, **SAVE_EVERY_STEP}
    finish(start(script=["-c", dying], **options), code=-signal.SIGKILL)
    assert load(tmp_path)["tutelage"]["step"] == 2
    run_here(monkeypatch, **options)
    assert_same_run(uninterrupted, tmp_path)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_saves_after_the_step_and_the_exit_code_asks_for_a_restart(
    images, uninterrupted, tmp_path, monkeypatch, name
):
    options = {"data_path": images, "output_dir": tmp_path}
    process = start(**options)
    wait_for_line(process, "[0/2]  [1/5]")
    process.send_signal(getattr(signal, name))
    output = finish(process, code=main_pretrain.EXIT_REQUEUE)
    assert "stopped on request" in output and "Traceback" not in output
    assert load(tmp_path)["tutelage"]["step"] >= 2
    run_here(monkeypatch, **options)
    assert_same_run(uninterrupted, tmp_path)


def test_two_processes_stopped_by_a_signal_are_continued_by_one(images, uninterrupted, tmp_path, monkeypatch):
    options = {"data_path": images, "output_dir": tmp_path}
    process = start(nproc=2, **options, batch_size_per_gpu=4)
    wait_for_line(process, "[0/2]  [1/5]")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode != 0
    state = load(tmp_path)["tutelage"]
    assert (state["iteration"], state["global_batch"]) >= (2, 8)
    run_here(monkeypatch, **options)
    assert_same_run(uninterrupted, tmp_path, rtol=1e-6, atol=1e-9)
    assert_close_logs(uninterrupted, tmp_path)


def test_a_damaged_checkpoint_falls_back_to_the_one_before(images, uninterrupted, tmp_path, monkeypatch, caplog):
    options = {"data_path": images, "output_dir": tmp_path, **SAVE_EVERY_STEP}
    process = start(**options)
    wait_for_line(process, "[1/2]  [2/5]")
    process.kill()
    process.wait()
    latest = tmp_path / "checkpoint.pth"
    half = latest.read_bytes()[: latest.stat().st_size // 2]
    latest.unlink()  # killed while it saved, the run left one file under both names
    latest.write_bytes(half)
    run_here(monkeypatch, **options)
    assert_same_run(uninterrupted, tmp_path)


def poison(monkeypatch, iterations):
    """Let the loss of these iterations be NaN."""
    forward = DINO.forward

    def poisoned(self, batch, clock):
        losses = forward(self, batch, clock)
        return {**losses, "loss": losses["loss"] * (math.nan if clock.iteration in iterations else 1.0)}

    monkeypatch.setattr(DINO, "forward", poisoned)


def test_a_loss_that_is_not_finite_skips_the_step_and_is_written_down(images, tmp_path, monkeypatch, capsys):
    seen = {}
    after_step = DINO.after_step

    def watch(self, clock, gate):
        before = {name: value.clone() for name, value in self.state_dict().items()}
        after_step(self, clock, gate)
        seen[clock.iteration] = all(torch.equal(before[n], v) for n, v in self.state_dict().items() if n != "used")

    monkeypatch.setattr(DINO, "after_step", watch)
    poison(monkeypatch, {3, 4})
    assert run_here(monkeypatch, data_path=images, output_dir=tmp_path) == 0
    assert [iteration for iteration, unchanged in seen.items() if unchanged] == [3, 4]
    state = load(tmp_path)
    assert all(torch.isfinite(tensor).all() for tensor in state["teacher"].values())
    assert all(math.isfinite(loss) for loss in losses(tmp_path))
    assert [path.name for path in tmp_path.glob("nonfinite_*")] == ["nonfinite_0000003.pth"]
    box = torch.load(tmp_path / "nonfinite_0000003.pth", weights_only=True)
    assert len(box["indices"]) == 8 and box["nonfinite"]["iteration"] == 3

    monkeypatch.undo()
    options = {"replay": tmp_path / "nonfinite_0000003.pth", "output_dir": tmp_path}
    for data, warned in ((images, False), (make_images(tmp_path / "more", count=48), True)):
        capsys.readouterr()
        assert run_here(monkeypatch, data_path=data, **options) == 0
        assert ("gives other images than those of the run" in capsys.readouterr().out) == warned


def test_nan_on_one_process_skips_the_step_on_all(images, tmp_path):
    poisoned = (
        "import math, os, sys, main_pretrain\n"
        "from methods.dino import DINO\n"
        "forward = DINO.forward\n"
        "def poisoned(self, batch, clock):\n"
        "    losses = forward(self, batch, clock)\n"
        "    bad = clock.iteration == 3 and os.environ['RANK'] == '1'\n"
        "    return {**losses, 'loss': losses['loss'] * (math.nan if bad else 1.0)}\n"
        "DINO.forward = poisoned\n"
        "sys.exit(main_pretrain.main())\n"
    )
    script = tmp_path / "poisoned.py"
    script.write_text(poisoned)
    output = finish(start(nproc=2, script=[str(script)], data_path=images, output_dir=tmp_path, batch_size_per_gpu=4))
    assert "not finite at iteration 3" in output
    assert all(torch.isfinite(tensor).all() for tensor in load(tmp_path)["student"].values())


def test_too_many_skipped_steps_stop_the_run_with_an_explanation(images, tmp_path, monkeypatch):
    poison(monkeypatch, set(range(2, 100)))
    with pytest.raises(RunStopped, match="3 steps in a row were not finite"):
        run_here(monkeypatch, data_path=images, output_dir=tmp_path, max_skipped=3)
    assert load(tmp_path)["tutelage"]["step"] == 5
    assert all(torch.isfinite(tensor).all() for tensor in load(tmp_path)["student"].values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.01}, r"--lr: 0.05 there, 0.01 here"),
        ({"epochs": 3}, r"--epochs: 2 there, 3 here"),
        ({"arch": "vit_tiny"}, "holds vit_micro, this run trains vit_tiny"),
        ({"batch_size_per_gpu": 4}, "images per step: 8 there, 4 here"),
        ({"subset": 3, "batch_size_per_gpu": 8}, "images: 40 there, 12 here"),
    ],
)
def test_another_run_in_the_folder_is_refused(images, uninterrupted, monkeypatch, options, message):
    before = (uninterrupted / "checkpoint.pth").read_bytes()
    with pytest.raises(UsageError, match=message):
        run_here(monkeypatch, **{"data_path": images, "output_dir": uninterrupted, **options})
    assert (uninterrupted / "checkpoint.pth").read_bytes() == before


def test_a_run_may_go_back_to_an_older_checkpoint(images, uninterrupted, tmp_path, monkeypatch):
    options = {"data_path": images, "output_dir": tmp_path}
    run_here(monkeypatch, **options)
    (tmp_path / "checkpoint.pth").write_bytes(b"damaged")
    with pytest.raises(UsageError, match=r"--load_from nowhere\.pth: no such file"):
        run_here(monkeypatch, **options, load_from="nowhere.pth")
    with pytest.raises(UsageError, match=r"checkpoint\.pth"):
        run_here(monkeypatch, **options, load_from="checkpoint.pth")
    run_here(monkeypatch, **options, load_from="checkpoint0000.pth")
    assert_same_run(uninterrupted, tmp_path)
    assert losses(tmp_path) == losses(uninterrupted)


def test_changes_can_be_accepted(images, uninterrupted, tmp_path, monkeypatch):
    for name in ("checkpoint.pth", "log.txt"):
        (tmp_path / name).write_bytes((uninterrupted / name).read_bytes())
    run_here(monkeypatch, data_path=images, output_dir=tmp_path, epochs=3, accept_changes=True)
    assert load(tmp_path)["epoch"] == 3
    assert len(losses(tmp_path)) == 3


def test_a_checkpoint_of_another_method_is_refused(images, uninterrupted, tmp_path, monkeypatch):
    state = load(uninterrupted)
    state["tutelage"]["method"] = "mugs"
    torch.save(state, tmp_path / "checkpoint.pth")
    with pytest.raises(UsageError, match="belongs to a mugs run, this is dino"):
        run_here(monkeypatch, data_path=images, output_dir=tmp_path)


def test_a_full_disk_ends_in_one_line_and_the_old_checkpoint_survives(images, tmp_path):
    limited = (
        "import resource, signal, main_pretrain, utils\n"
        "import training.checkpointing as checkpointing\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "save, calls = checkpointing.save_torch, []\n"
        "def tight(state, path):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 3:\n"
        "        resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))\n"
        "    save(state, path)\n"
        "checkpointing.save_torch = tight\n"
        "utils.run_cli(main_pretrain.main)\n"
    )
    options = {"data_path": images, "output_dir": tmp_path, **SAVE_EVERY_STEP}
    output = finish(start(script=["-c", limited], **options), code=2)
    assert "error: cannot save" in output and "Traceback" not in output
    assert load(tmp_path)["tutelage"]["step"] == 2
    assert not list(tmp_path.glob("*.tmp*"))


def test_bf16_trains_and_resumes_bit_for_bit(images, tmp_path, monkeypatch):
    options = {"data_path": images, "precision": "bf16"}
    run_here(monkeypatch, output_dir=tmp_path / "whole", **options)
    poison(monkeypatch, set())
    save = main_pretrain.save_or_stop

    def stop_once(run, epoch, step, stop, due):
        save(run, epoch, step, stop=(epoch, step) == (1, 2), due=due)

    monkeypatch.setattr(main_pretrain, "save_or_stop", stop_once)
    with pytest.raises(RunStopped):
        run_here(monkeypatch, output_dir=tmp_path / "parts", **options)
    monkeypatch.setattr(main_pretrain, "save_or_stop", save)
    run_here(monkeypatch, output_dir=tmp_path / "parts", **options)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("arch", ["resnet18", "timm/xcit_nano_12_p16_224"])
def test_library_backbones_train_and_resume_bit_for_bit(images, tmp_path, monkeypatch, arch):
    options = {"data_path": images, "arch": arch, "precision": "fp32", "epochs": 1, "warmup_epochs": 0}
    run_here(monkeypatch, output_dir=tmp_path / "whole", **options)
    process = start(output_dir=tmp_path / "parts", **options, **SAVE_EVERY_STEP)
    wait_for_line(process, "[2/5]")
    process.kill()
    process.wait()
    run_here(monkeypatch, output_dir=tmp_path / "parts", **options)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_dry_run_trains_nothing_and_shows_what_would_be_seen(images, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", "tutelage")
    assert run_here(monkeypatch, data_path=images, output_dir=tmp_path, dry_run=True) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first_batch.png"]
    for text in ("parameters of the student", "simulated", "opened 40 of 40, 0 unreadable"):
        assert text in caplog.text


@pytest.mark.parametrize("optimizer", ["sgd", "lars"])
def test_other_optimisers_train_beyond_the_frozen_epochs_and_resume_bit_for_bit(
    images, tmp_path, monkeypatch, optimizer
):
    options = {"data_path": images, "optimizer": optimizer, "norm_last_layer": "false"}
    run_here(monkeypatch, output_dir=tmp_path / "whole", **options)
    process = start(output_dir=tmp_path / "parts", **options, **SAVE_EVERY_STEP)
    wait_for_line(process, "[1/2]  [1/5]")
    process.kill()
    process.wait()
    run_here(monkeypatch, output_dir=tmp_path / "parts", **options)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_run_that_diverges_is_stopped_and_its_replay_names_the_first_broken_layer(
    images, tmp_path, monkeypatch, caplog
):
    caplog.set_level("INFO", "tutelage")
    options = {"optimizer": "sgd", "lr": 1e150, "clip_grad": 0, "warmup_epochs": 0, "max_skipped": 3}
    with pytest.raises(RunStopped, match="3 steps in a row"):
        run_here(monkeypatch, data_path=images, output_dir=tmp_path, **options)
    (box,) = tmp_path.glob("nonfinite_*.pth")
    state = torch.load(box, weights_only=True)
    del state["args"]["exif"]  # as of a file that is older than the option
    torch.save(state, box)
    assert run_here(monkeypatch, replay=box, output_dir=tmp_path) == 0
    assert "first broken layer: teacher.backbone." in caplog.text


class Payload:
    """What a hostile checkpoint would run."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return (open, (str(self.target), "w"))


def spoil(kind: str, path: Path, good: bytes) -> None:
    if kind == "hostile":
        path.write_bytes(pickle.dumps({"student": Payload(path.with_name("payload"))}))
    else:
        path.write_bytes({"empty": b"", "truncated": good[: len(good) // 2], "foreign": b"\xff\xd8\xff\xe0" * 9}[kind])


@pytest.mark.parametrize("kind", ["empty", "truncated", "foreign", "hostile"])
def test_a_checkpoint_that_cannot_be_trusted_is_refused_and_left_alone(
    images, uninterrupted, tmp_path, monkeypatch, kind
):
    path = tmp_path / "checkpoint.pth"
    spoil(kind, path, (uninterrupted / "checkpoint.pth").read_bytes())
    before = path.read_bytes()
    with pytest.raises(UsageError, match=re.escape(str(path))):
        run_here(monkeypatch, data_path=images, output_dir=tmp_path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pth"]


@pytest.mark.parametrize(
    ("options", "norm"),
    [
        ({"use_bn_in_head": "true"}, r"student.head.mlp.1"),
        ({"arch": "resnet18", "patch_size": 16}, r"student.backbone.\S*bn1"),
        ({**UDI, "use_bn_in_head": "true"}, r"student.head.0.mlp.1"),
        ({**MASKED, "norm_in_head": "bn"}, r"student.head.mlp.1"),
    ],
)
def test_pieces_of_batch_norm_are_refused(images, tmp_path, monkeypatch, options, norm):
    pieces = {"data_path": images, "output_dir": tmp_path / "out", "accum_iter": 4}
    with pytest.raises(UsageError, match=rf"--accum_iter 4: {norm} is a batch norm, .* leave it 1"):
        run_here(monkeypatch, **pieces, **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("count", "message"),
    [(0, "no images in this folder"), (1, "larger than the data set"), (7, "larger than the data")],
)
def test_too_few_images_are_refused(tmp_path, monkeypatch, count, message):
    (tmp_path / "images").mkdir()
    make_images(tmp_path / "images", count)
    with pytest.raises(UsageError, match=message):
        run_here(monkeypatch, data_path=tmp_path / "images", output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("listed", [False, True])
def test_of_a_root_with_splits_the_training_images_are_used_and_the_log_says_so(tmp_path, monkeypatch, caplog, listed):
    root = tmp_path / "set"
    for part in ("train", "val"):
        make_images(root / "data" / part, count=16)
    (root / "data" / "train" / ".git").mkdir()
    path = root
    if listed:
        lines = [str(file.relative_to(root)) for file in sorted(root.rglob("*.jpg"))]
        path = root / "list.txt"
        path.write_text("\n".join(lines))
    assert run_here(monkeypatch, data_path=path, output_dir=tmp_path / "out", dry_run=True) == 0
    classes = "" if listed else ", 4 classes"
    assert f"training on train/ (16 images{classes}), val/ left alone" in caplog.text
    assert ("1 hidden or system files and folders passed over: .git" in caplog.text) == (not listed)


def test_a_list_that_cannot_be_read_leaves_nothing_behind(tmp_path, monkeypatch):
    make_images(tmp_path / "images", count=4)
    lines = [f"{file} {file.parent.name}" for file in sorted((tmp_path / "images").rglob("*.jpg"))]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    with pytest.raises(UsageError, match=r"line 1, '.*000\.jpg class0': a tab is expected between path and label"):
        run_here(monkeypatch, data_path=tmp_path / "list.txt", output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_one_image_is_enough_for_batches_of_one(tmp_path, monkeypatch):
    make_images(tmp_path / "images", 1)
    run_here(monkeypatch, data_path=tmp_path / "images", output_dir=tmp_path, batch_size_per_gpu=1)
    assert load(tmp_path)["epoch"] == 2


def test_unreadable_images_are_named_and_too_many_stop_the_run(tmp_path, monkeypatch, caplog):
    folder = make_images(tmp_path / "images", 40)
    broken = sorted(folder.glob("*/*.jpg"))[:2]
    for path in broken:
        path.write_bytes(path.read_bytes()[:200])
    options = {"data_path": folder, "epochs": 1}
    assert run_here(monkeypatch, output_dir=tmp_path / "tolerant", max_bad_images=0.1, **options) == 0
    assert all(str(path) in caplog.text for path in broken)
    assert log_of(tmp_path / "tolerant")[0]["train_unreadable"] == 2
    assert caplog.messages[-1].endswith("; 2 times an image was unreadable and another one took its place")
    with monkeypatch.context() as late:
        verdict = Consensus.verdict  # a GPU's arrives a step later
        late.setattr(
            Consensus, "verdict", lambda self, wait=False: verdict(self) if wait or self._waiting[1:] else None
        )
        run_here(late, output_dir=tmp_path / "late", max_bad_images=0.1, **options)
    assert_same_run(tmp_path / "tolerant", tmp_path / "late")
    with pytest.raises(RunStopped, match="of 40 images were unreadable"):
        run_here(monkeypatch, output_dir=tmp_path / "strict", **options)
    assert load(tmp_path / "strict")["tutelage"]["step"] > 0


def test_pictures_of_a_first_batch_with_unreadable_images_show_what_replaces_them(tmp_path, monkeypatch, caplog):
    folder = make_images(tmp_path / "images", 16)
    broken = sorted(folder.glob("*/*.jpg"))[::2]  # a batch of eight cannot be without one
    for path in broken:
        path.write_bytes(b"no image")
    assert run_here(monkeypatch, data_path=folder, output_dir=tmp_path / "dry", dry_run=True) == 0
    assert "unreadable image, replaced by another: " in caplog.text
    assert (tmp_path / "dry" / "first_batch.png").exists()
    options = {"data_path": folder, "epochs": 1, "max_bad_images": 1}
    assert run_here(monkeypatch, output_dir=tmp_path / "run", **options) == 0
    assert tensorboard_of(tmp_path / "run").Tags()["images"] == ["crops", "attention"]


def test_photographs_are_turned_if_asked_and_a_run_that_did_not_is_not_continued(tmp_path, monkeypatch):
    folder = make_images(tmp_path / "images", 8)
    options = {"data_path": folder, "output_dir": tmp_path / "run", "epochs": 1}
    run_here(monkeypatch, **options)
    with pytest.raises(UsageError, match=r"--exif: False there, True here.*-exif here"):
        run_here(monkeypatch, **options, exif="true")


def test_no_local_crops_leaves_two_views(images, tmp_path, monkeypatch):
    run_here(monkeypatch, data_path=images, output_dir=tmp_path, local_crops_number=0, epochs=1)
    assert load(tmp_path)["epoch"] == 1


def test_the_originals_pixels_train_too(images, tmp_path, monkeypatch):
    run_here(monkeypatch, data_path=images, output_dir=tmp_path, augment="pil", epochs=1)
    assert load(tmp_path)["epoch"] == 1


def test_online_knn_and_pictures_of_the_bundled_photographs(tmp_path, monkeypatch):
    options = {"epochs": 1, "warmup_epochs": 0, "batch_size_per_gpu": 16, "precision": "fp32", "knn_every": 1}
    run_here(monkeypatch, output_dir=tmp_path, subset=2, knn_per_class=2, **options)
    line = json.loads((tmp_path / "log.txt").read_text())
    assert line["k-NN"]["10"]["top5"] >= line["k-NN"]["10"]["top1"] > 0
    events = tensorboard_of(tmp_path)
    assert set(events.Tags()["images"]) == {"attention", "crops"}
    assert {"epoch/knn10_top1", "epoch/knn20_top5"} <= set(events.Tags()["scalars"])


WITH_PSEUDO_LABELS = """
import os, signal, sys
import main_pretrain
from methods.dino import DINO
from training.online_knn import OnlineKNN

targets, test, folder = DINO.teacher_targets, OnlineKNN.__call__, sys.argv.pop(1)

def watched(self, crops, clock):
    self.prototypes = (crops[0].mean(dim=(1, 2, 3)) > 0).long()  # bright or dark
    return targets(self, crops, clock)

def killed_once(self):
    marker = os.path.join(folder, "killed")
    if self.args.knn_every == 2 and not os.path.exists(marker):
        open(marker, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return test(self)

DINO.teacher_targets, DINO.pseudo_labels = watched, lambda self: self.prototypes
OnlineKNN.__call__ = killed_once
sys.exit(main_pretrain.main())
"""


def test_pseudo_labels_and_online_knn_survive_two_processes_and_a_kill_within_the_test(tmp_path):
    for part, count in (("train", 40), ("val", 8)):
        make_images(tmp_path / part, count)
    runs = {
        "one": {"knn_every": 1},
        "two": {"knn_every": 1, "nproc": 2, "batch_size_per_gpu": 4},
        "killed": {"knn_every": 2, "knn_data": tmp_path},
    }
    script = tmp_path / "script.py"
    script.write_text(WITH_PSEUDO_LABELS)
    lines = {}
    for name, options in runs.items():
        folder = tmp_path / name
        folder.mkdir()
        run = {"script": [str(script), str(folder)], "data_path": tmp_path, "output_dir": folder, **options}
        if name == "killed":
            finish(start(**run), code=-signal.SIGKILL)
            assert (load(folder)["epoch"], load(folder)["tutelage"]["step"]) == (0, 5)
            assert not (folder / "log.txt").exists()
        output = finish(start(**run))
        assert ("NMI: " in output) and output.count(", ACC: -1") == (1 if name == "killed" else 2)
        lines[name] = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    for one, two, killed in zip(*lines.values(), strict=True):
        names = ("train_nmi", "train_ari", "train_fscore", "train_adjacc")
        assert 0 < one["train_nmi"] < 1 and one["train_adjacc"] == -1
        assert [two[name] for name in names] == pytest.approx([one[name] for name in names], rel=1e-9)
        assert killed == one and two["k-NN"] == one["k-NN"]
    assert_same_run(tmp_path / "one", tmp_path / "killed")


def test_a_second_run_into_the_folder_of_a_living_one_is_refused(images, uninterrupted, tmp_path, monkeypatch):
    options = {"data_path": images, "output_dir": tmp_path}
    process = start(**options, num_workers=1)
    wait_for_line(process, "[0/2]  [0/5]")
    process.send_signal(signal.SIGSTOP)  # it lives, and does not end in the meantime
    try:
        with pytest.raises(UsageError, match=rf"a run is writing there \(process {process.pid} on "):
            run_here(monkeypatch, **options)
    finally:
        process.send_signal(signal.SIGCONT)
    finish(process)
    assert_same_run(uninterrupted, tmp_path)
    assert not (tmp_path / "run.lock").exists()


def test_every_command_ends_in_one_line_when_it_is_refused(images, tmp_path):
    output = finish(start(data_path=tmp_path / "nowhere", output_dir=tmp_path / "out"), code=2)
    assert output.startswith("error: ") and output.count("\n") == 1 and "nowhere" in output
    assert not (tmp_path / "out").exists()
