"""Fine-tuning as a script: it learns, continues exactly, shares its work, and refuses in one line."""

import json
import sys

import pytest
import torch
from safetensors.torch import save_file

from eval_finetuning.eval_finetuning import main
from evaluation import finetune, sets
from evaluation.finetune_network import build_network
from evaluation.finetune_options import get_args_parser
from lock import hold
from models import build_backbone
from models.safe_load import CheckpointError
from tests.eval_knn.test_eval_knn import MendedInPlace, micro
from tests.eval_linear.test_eval_linear import assert_same, lines_of, saved
from tests.launch import ROOT, SMALL, finish, make_images, start
from tests.models.test_hugging_face import IN_FILES, hugging_face_names
from utils import World, run_cli

PLAIN = ("--disable_rel_pos_bias", "--abs_pos_emb", "--use_cls", "--layer_scale_init_value", 0)
FINAL = "checkpoint.pth"


@pytest.fixture
def tune(monkeypatch, tmp_path, capsys):
    """Run the script in this process on stripes: (exit code, standard output, standard error)."""

    def run(
        *arguments: object,
        out: str = "out",
        epochs: int = 2,
        bad: tuple[int, ...] = (),
        bad_tests: tuple[int, ...] = (),
    ) -> tuple[int, str, str]:
        monkeypatch.setattr(
            sets,
            "open_source",
            lambda path, subset=None, split="train", start=0: MendedInPlace(
                6, 6, int(split != "train"), bad=bad if split == "train" else bad_tests
            ),
        )
        options = ["--device", "cpu", "--precision", "fp32", "--num_workers", 0, "--input_size", 32, "--batch_size", 8]
        options += ["--epochs", epochs, "--warmup_epochs", 1, "--output_dir", tmp_path / out, *arguments]
        monkeypatch.setattr(sys, "argv", ["eval_finetuning.py", *map(str, options)])
        with pytest.raises(SystemExit) as exit_:
            run_cli(main)
        return exit_.value.code, *capsys.readouterr()

    return run


# ---- what it does ---------------------------------------------------------------------------------------------------


def test_it_learns_and_leaves_the_originals_files(tune, tmp_path):
    options = ("--aa", "none", "--color_jitter", 0, "--reprob", 0, "--lr", 2e-3, "--save_ckpt_freq", 34)
    code, said, error = tune("--finetune", micro(tmp_path), *PLAIN, *options, epochs=6)
    assert code == 0, error
    assert "matched 54 of 54" in said and "left as initialised: head.* (2)" in said and "FROM SCRATCH" not in said
    lines = lines_of(tmp_path / "out")
    assert [line["epoch"] for line in lines] == list(range(6))
    assert list(lines[0]) == [
        "train_lr", "train_min_lr", "train_loss", "train_class_acc", "train_weight_decay", "train_grad_norm",
        "test_loss", "test_acc1", "test_acc5", "epoch", "n_parameters",
    ]  # fmt: skip
    assert lines[-1]["train_loss"] < lines[0]["train_loss"]
    assert lines[0]["train_min_lr"] == pytest.approx(lines[0]["train_lr"] * 0.9**5)
    result = json.loads((tmp_path / "out" / "eval_finetuning.json").read_text())
    assert list(result) == ["evaluation", "checkpoint", "checkpoint_key", "arch", "data", "unreadable", "numbers"]
    best = max(line["test_acc1"] for line in lines)
    assert result["numbers"]["top1"] == best > 2 * 100 / 6 and result["arch"] == "vit_micro/8"
    numbered = {f"checkpoint-{epoch}.pth" for epoch in (1, 3, 5)}
    assert {path.name for path in (tmp_path / "out").glob("*.pth")} == numbered | {FINAL, "checkpoint-best.pth"}
    file = saved(tmp_path / "out", FINAL)
    assert {"model", "optimizer", "epoch", "args"} <= file.keys() and file["epoch"] == 5
    assert list((tmp_path / "out" / "tensorboard").iterdir())
    assert said.splitlines()[-1] == f"Max accuracy: {best:.2f}%"
    code, said, error = tune("--finetune", micro(tmp_path), *PLAIN, "--eval")
    assert code == 0 and f"{best:.1f}% of 36 test images" in said, error
    # the file is a backbone like any other
    code, said, error = tune("--finetune", tmp_path / "out" / FINAL, *PLAIN, out="again", epochs=1)
    assert code == 0 and "matched 56 of 56" in said and "left as" not in said, error


@pytest.mark.parametrize(
    "options",
    [
        (),  # the originals' defaults: relative positions, pooled patches, LayerScale
        ("--abs_pos_emb", "--use_cls", "--drop", 0.1, "--attn_drop_rate", 0.1, "--smoothing", 0),
        (*PLAIN, "--mixup", 0.8, "--cutmix", 1, "--update_freq", 2, "--clip_grad", 0.5, "--batch_size", 4),
        (*PLAIN, "--mixup", 0.8, "--mixup_mode", "elem", "--aa", "augmix-m3-w2", "--remode", "rand", "--recount", 2),
        (*PLAIN, "--model_ema", "--model_ema_decay", 0.9, "--precision", "bf16", "--weight_decay_end", 0.1),
    ],
    ids=lambda options: " ".join(map(str, options)),
)
def test_every_kind_of_network_and_mixture_trains_and_continues_exactly(tune, monkeypatch, tmp_path, options):
    options = ("--finetune", micro(tmp_path), *options)
    assert tune(*options, out="whole", epochs=3)[0] == 0
    train_one_epoch = finetune.train_one_epoch

    def stop_in_the_third(run, pieces, epoch):
        if epoch == 2:
            raise KeyboardInterrupt
        return train_one_epoch(run, pieces, epoch)

    monkeypatch.setattr(finetune, "train_one_epoch", stop_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        tune(*options, out="parts", epochs=3)
    monkeypatch.setattr(finetune, "train_one_epoch", train_one_epoch)
    assert saved(tmp_path / "parts", FINAL)["epoch"] == 1
    code, said, error = tune(*options, "--num_workers", 1, out="parts", epochs=3)
    assert code == 0 and "at epoch 2 of 3" in said, error
    whole, parts = (saved(tmp_path / name, FINAL) for name in ("whole", "parts"))
    for file in (whole, parts):
        del file["args"]
    assert_same(whole, parts)
    assert (tmp_path / "whole" / "log.txt").read_text() == (tmp_path / "parts" / "log.txt").read_text()
    assert ("model_ema" in whole) == ("--model_ema" in options)
    code, again, _ = tune(*options, out="parts", epochs=3)
    assert code == 0 and "Epoch: " not in again and again.splitlines()[-1] == said.splitlines()[-1]


def test_a_swin_is_fine_tuned(tune, tmp_path):
    torch.manual_seed(0)
    model = build_backbone("swin_tiny", window_size=7)
    torch.save({"teacher": model.state_dict()}, tmp_path / "swin.pth")
    code, said, error = tune("--finetune", tmp_path / "swin.pth", "--batch_size", 18, "--subset", 3, epochs=1)
    assert code == 0 and "left as initialised: head.* (2)" in said, error
    code, _, error = tune("--finetune", tmp_path / "swin.pth", "--drop", 0.1, out="other")
    assert code == 2 and "not for swin_tiny" in error


def test_another_run_in_the_same_folder_is_refused_with_every_difference(tune, tmp_path):
    options = ("--finetune", micro(tmp_path), *PLAIN)
    assert tune(*options, epochs=1)[0] == 0
    code, _, error = tune(*options, "--lr", 0.2, "--seed", 5, epochs=1)
    assert code == 2 and "--seed: 0 there, 5 here" in error and "--lr" in error and error.count("\n") == 1
    code, _, error = tune("--finetune", micro(tmp_path, seed=4), *PLAIN, epochs=1)
    assert code == 2 and "weights at the start" in error
    assert tune(*options, "--lr", 0.001, "--no_auto_resume", epochs=1)[0] == 0


def test_a_folder_that_a_living_run_writes_to_is_refused(tune, tmp_path):
    with hold(tmp_path / "out", World(0, 1, 0, torch.device("cpu"))):
        code, _, error = tune("--finetune", micro(tmp_path), *PLAIN, epochs=1)
    assert code == 2 and "a run is writing there" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_from_scratch_is_said_loudly_and_an_unreadable_image_is_replaced_and_counted(tune, tmp_path):
    code, said, error = tune("--model", "vit_micro", "--patch_size", 8, "--batch_size", 36, epochs=2, bad=(3,))
    assert code == 0 and "TRAINED FROM SCRATCH" in said, error
    assert said.count("stripes/3.png: cut off in the middle") == 1
    assert said.count("could not be read and another one took its place") == 2
    assert json.loads((tmp_path / "out" / "eval_finetuning.json").read_text())["unreadable"] == {"train": 1, "test": 0}
    assert said.endswith("% (unreadable: 1 training image)\n")


def test_unreadable_test_images_are_refused_before_anything_is_trained(tune, tmp_path):
    code, said, error = tune("--finetune", micro(tmp_path), *PLAIN, epochs=1, bad_tests=(5, 20))
    assert code == 2 and "stripes/5.png: cut off in the middle; stripes/20.png" in error and "Epoch" not in said
    assert not list(tmp_path.glob("out/*"))


def test_test_images_are_refused_when_the_epoch_is_saved_and_skipping_them_goes_on(tune, monkeypatch, tmp_path):
    """As if they had been skipped from the start. They break after the look that comes before training."""
    monkeypatch.setattr(finetune, "see_test_images", lambda *_: None)
    options = ("--finetune", micro(tmp_path), *PLAIN)
    for epochs, more in ((2, ()), (1, ("--disable_eval_during_finetuning",))):
        out, at_once = f"parts {epochs}", f"whole {epochs}"
        code, _, error = tune(*options, *more, out=out, epochs=epochs, bad_tests=(5, 20))
        assert code == 2 and error.count("\n") == 1, error
        assert "stripes/5.png: cut off in the middle; stripes/20.png" in error and "the epoch is saved" in error
        assert saved(tmp_path / out, FINAL)["epoch"] == 0
        more = (*more, "--skip_unreadable")
        code, said, error = tune(*options, *more, out=out, epochs=epochs, bad_tests=(5, 20))
        assert code == 0 and "Epoch: [0]" not in said and said.endswith("% (unreadable: 2 test images)\n"), error
        code, _, error = tune(*options, *more, out=at_once, epochs=epochs, bad_tests=(5, 20))
        assert code == 0, error
        files = [saved(tmp_path / name, FINAL) for name in (out, at_once)]
        for file in files:
            del file["args"]
        assert_same(*files)
        for name in ("log.txt", "eval_finetuning.json"):
            assert (tmp_path / out / name).read_text() == (tmp_path / at_once / name).read_text()
        accuracy = lines_of(tmp_path / out)[-1]["test_acc1"]
        assert accuracy * 34 / 100 == pytest.approx(round(accuracy * 34 / 100))
    code, _, error = tune(*options, "--eval", out="parts 2", bad_tests=(5, 20))
    assert code == 2 and "stripes/20.png" in error and "the epoch" not in error


def test_a_loss_that_is_no_number_ends_the_run_in_one_line(tune, tmp_path):
    path = micro(tmp_path)
    file = torch.load(path, weights_only=True)
    file["teacher"]["backbone.norm.weight"].fill_(float("nan"))
    torch.save(file, path)
    code, _, error = tune("--finetune", path, *PLAIN)
    assert code == 2 and "loss is nan" in error and error.count("\n") == 1
    assert not (tmp_path / "out" / FINAL).exists()


def test_left_to_itself_it_shows_images_as_large_as_the_file_was_trained_on(tmp_path):
    words = [*PLAIN, "--finetune", micro(tmp_path, tutelage={"image_size": 40})]
    args = get_args_parser().parse_args(list(map(str, words)))
    assert build_network(args)[1].crop_size == 40
    args.input_size = 48
    assert build_network(args)[1].crop_size == 48


# ---- several processes ----------------------------------------------------------------------------------------------


def test_two_processes_equal_one_with_twice_the_batch(tmp_path):
    """In double precision; 9 test images, so that the second process has fewer."""
    make_images(tmp_path / "data" / "train", 26, 3)
    make_images(tmp_path / "data" / "val", 9, 3)
    path = micro(tmp_path)
    for name, processes in (("one", 1), ("two", 2)):
        words = [*PLAIN, "--epochs", 2, "--warmup_epochs", 1, "--input_size", 32, "--num_workers", 0]
        words += ["--precision", "fp64", "--update_freq", 2, "--drop_path", 0.2, "--model_ema"]
        words += ["--finetune", path, "--data_path", tmp_path / "data", "--device", "cpu"]
        words += ["--batch_size", 6 // processes, "--output_dir", tmp_path / name]
        script = [str(ROOT / "eval_finetuning" / "eval_finetuning.py"), *map(str, words)]
        finish(start(processes, script, **dict.fromkeys(SMALL)))
    one, two = saved(tmp_path / "one", FINAL), saved(tmp_path / "two", FINAL)
    for kind in ("model", "model_ema"):
        for name, tensor in one[kind].items():
            torch.testing.assert_close(two[kind][name], tensor, rtol=1e-6, atol=1e-9)
    for ours, theirs in zip(lines_of(tmp_path / "two"), lines_of(tmp_path / "one"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)


# ---- what it refuses ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--finetune", "no/where.pth"], ["no/where.pth", "no such file"]),
        (["--data_path", "no/where", "--eval_data_path", "no/where"], ["no/where", "does not exist"]),
        (["--eval_data_path", "no/where"], ["--eval_data_path", "--data_path"]),
        (["--model", "resnet18"], ["--model resnet18", "vit_small", "swin_tiny"]),
        (["--model", "deit_small_patch16_224", "--patch_size", "8"], ["--patch_size 8"]),
        (["--model", "swin_tiny", "--patch_size", "8"], ["--patch_size 8", "4"]),
        (["--input_size", "30"], ["--input_size 30"]),
        (["--nb_classes", "5"], ["--nb_classes 5", "6 classes"]),
        (["--lr", "0"], ["--lr 0"]),
        (["--layer_decay", "1.5"], ["--layer_decay 1.5"]),
        (["--smoothing", "1"], ["--smoothing 1"]),
        (["--reprob", "2"], ["--reprob 2"]),
        (["--mixup", "-1"], ["--mixup -1"]),
        (["--mixup", "0.8", "--batch_size", "7"], ["--batch_size 7", "even"]),
        (["--batch_size", "99"], ["99", "36"]),
        (["--update_freq", "0"], ["--update_freq 0"]),
        (["--epochs", "3", "--warmup_epochs", "4"], ["--warmup_epochs 4", "--epochs 3"]),
        (["--warmup_steps", "400"], ["--warmup_steps 400"]),
        (["--aa", "nonsense"], ["--aa nonsense"]),
        (["--eval"], ["--eval", "--resume"]),
        (["--resume", "x.pth"], ["x.pth", "no such file"]),
        (["--data_set", "CIFAR"], ["--data_set", "CIFAR"]),
        (["--enable_deepspeed"], ["--enable_deepspeed"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_bad_options_end_in_one_line_and_exit_code_two(tune, tmp_path, arguments, words):
    code, said, error = tune(
        "--patch_size", 8, *([] if "--model" in arguments else ["--model", "vit_micro"]), *arguments
    )
    assert code == 2 and error.count("\n") == 1, (said, error)
    assert all(word in error for word in words), error
    assert not list(tmp_path.glob("out/*.pth"))


def test_weights_that_do_not_fit_are_refused_with_a_table(tune, tmp_path):
    path = micro(tmp_path)
    for arguments, words in (
        (("--model", "vit_tiny"), ["--arch vit_micro", "shape"]),
        (("--patch_size", 16), ["--patch_size 8", "patch_embed.proj.weight"]),
    ):
        code, _, error = tune("--finetune", path, *PLAIN, *arguments)
        assert code == 2 and all(word in error for word in words), error
    state = torch.load(path, weights_only=True)["teacher"]
    del state["backbone.blocks.3.mlp.fc2.bias"]
    torch.save({"teacher": state}, tmp_path / "part.pth")
    code, _, error = tune("--finetune", tmp_path / "part.pth", *PLAIN)
    assert code == 2 and "missing     blocks.3.mlp.fc2.bias" in error


def test_what_a_network_has_no_use_for_is_told(tune, tmp_path):
    code, said, error = tune("--finetune", micro(tmp_path), epochs=1)
    assert code == 0, error
    assert "pos_embed is left behind: --abs_pos_emb is off" in said and "norm.weight is left behind" in said
    assert "fc_norm.* (2)" in said.split("left as initialised")[1].splitlines()[0]


def test_other_keys_and_other_image_sizes(tune, tmp_path):
    model = build_backbone("vit_micro", 8, img_size=48)
    torch.save({"module": {f"module.{n}": t for n, t in model.state_dict().items()}}, tmp_path / "module.pth")
    code, said, error = tune("--finetune", tmp_path / "module.pth", *PLAIN, epochs=1)
    assert code == 0 and "matched 54 of 54" in said, error
    assert saved(tmp_path / "out", FINAL)["model"]["pos_embed"].shape == (1, 17, 128)


def test_the_key_chooses_among_networks_below_prefixes(tmp_path):
    names = ("student_backbone", "teacher_backbone")
    parts = [build_backbone("vit_micro", 8, img_size=32).state_dict() for _ in names]
    state = {f"{name}.{tensor}": t for name, part in zip(names, parts, strict=True) for tensor, t in part.items()}
    save_file(state, path := tmp_path / "model.safetensors")
    options = ["--finetune", str(path), "--input_size", "32", *map(str, PLAIN)]
    with pytest.raises(CheckpointError, match="2 networks: student_backbone, teacher_backbone; choose one"):
        build_network(get_args_parser().parse_args(options))
    for name, part in zip(names, parts, strict=True):
        network, _ = build_network(get_args_parser().parse_args([*options, "--checkpoint_key", name]))
        assert network.report.info.prefix == f"{name}."
        assert torch.equal(network.model.cls_token, part["cls_token"])


def test_a_file_of_hugging_face_keeps_its_norms(tmp_path):
    model = build_backbone("vit_micro", 8, img_size=32, norm_eps=1e-12)
    save_file(hugging_face_names(model.state_dict(), IN_FILES), path := tmp_path / "model.safetensors")
    args = get_args_parser().parse_args(["--finetune", str(path), "--input_size", "32", *map(str, PLAIN)])
    tuned = build_network(args)[0].model.double().eval()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(tuned.pooled(images), model.double().eval()(images), rtol=1e-12, atol=1e-12)


def test_the_class_count_and_both_folders_come_from_the_options(tmp_path, monkeypatch, capsys):
    train, val = make_images(tmp_path / "a", 12, 3), make_images(tmp_path / "b", 6, 3)
    words = ["--model", "vit_micro", "--patch_size", "8", "--input_size", "32", "--data_set", "image_folder"]
    words += ["--data_path", train, "--eval_data_path", val, "--nb_classes", "7", "--epochs", "1", "--batch_size", "4"]
    words += ["--warmup_epochs", "0", "--num_workers", "0", "--device", "cpu", "--output_dir", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", ["eval_finetuning.py", *map(str, words)])
    with pytest.raises(SystemExit) as exit_:
        run_cli(main)
    assert exit_.value.code == 0, capsys.readouterr().err
    assert saved(tmp_path / "out", FINAL)["model"]["head.weight"].shape == (7, 128)
