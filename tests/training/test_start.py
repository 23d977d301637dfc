"""Beginning from another run: what is taken, what is said to begin fresh, and that it is never taken for resuming."""

import os
import re

import pytest
import torch

import main_pretrain
from methods import METHODS
from methods.dino import DINO
from methods.heads import DINOHead
from tests.launch import argv, assert_same_run, flatten, load, make_images, run_here
from training.checkpointing import save_checkpoint
from training.options import check_options, parse_options
from training.start import begin
from utils import UsageError, World

ALONE = World(0, 1, 0, torch.device("cpu"))
SHARED = {"patch_out_dim": 48, "shared_head": "true", "warmup_teacher_temp_epochs": 0}
OTHERS = {
    "dino": {},
    "ibot": {"method": "ibot", **SHARED},
    "attmask": {"method": "attmask", "show_max": 0.25, **SHARED},
    "udi": {"method": "udi", "warmup_teacher_temp_epochs": 0, "local_sampling_window_size": 1},
}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images"), count=16)


@pytest.fixture(scope="module")
def other(images, tmp_path_factory):
    """A run of two epochs, with a checkpoint after each."""
    folder = tmp_path_factory.mktemp("other")
    patch = pytest.MonkeyPatch()
    run_here(patch, data_path=images, output_dir=folder, saveckp_freq=1)
    patch.undo()
    return folder


@pytest.fixture
def built(images, tmp_path):
    """The run that options describe, before its first step."""

    def build(**options):
        args = parse_options(argv(**{"data_path": images, "output_dir": tmp_path / "out", **options}))
        check_options(args, ALONE)
        return main_pretrain.build(args, ALONE)

    return build


def edited(path, tmp_path, change) -> str:
    """A copy of a checkpoint after ``change``."""
    file = torch.load(path, weights_only=True)
    change(file)
    torch.save(file, tmp_path / "edited.pth")
    return str(tmp_path / "edited.pth")


def parts(run) -> dict[str, torch.Tensor]:
    return flatten({key: part.state_dict() for key, part in run.method.checkpoint_parts().items()})


def unwrapped(file: dict) -> dict[str, torch.Tensor]:
    states = {key: file[key] for key in ("student", "teacher", "dino_loss")}
    return {name.replace("module.", ""): value for name, value in flatten(states).items()}


def moments_of(run) -> dict[str, dict]:
    names = {id(p): name for name, p in run.method.named_parameters()}
    return {names[id(p)]: state for p, state in run.optimizer.state.items()}


def test_with_its_progress_a_run_goes_on_to_the_bits_of_the_one_it_began_with(images, other, tmp_path, monkeypatch):
    options = {"data_path": images, "init_from": other / "checkpoint0000.pth", "init_progress": "true"}
    run_here(monkeypatch, output_dir=tmp_path, **options)
    assert_same_run(other, tmp_path, first_epoch=1)
    start = load(tmp_path)["tutelage"]["start"]
    assert start == {"file": str(other / "checkpoint0000.pth"), "progress": True, "epoch": 1, "step": 0}


def test_without_its_progress_only_networks_are_taken(built, other, caplog):
    caplog.set_level("INFO", "tutelage")
    options = {"epochs": 3, "local_crops_number": 1, "global_crops_size": 48, "seed": 1}
    run, untouched = (built(**options, init_from=other / "checkpoint.pth") for _ in range(2))
    assert begin(run) == (0, 0)
    found, theirs, own = parts(run), unwrapped(load(other)), parts(untouched)
    assert all(torch.equal(found[name], theirs[name]) for name in found if not name.startswith("/dino_loss"))
    assert torch.equal(found["/dino_loss/center"], own["/dino_loss/center"]) and not moments_of(run)
    assert "fresh: dino_loss, epoch, optimizer" in caplog.text
    assert run.start == {"file": str(other / "checkpoint.pth"), "progress": False, "epoch": 2, "step": 0}


@pytest.mark.parametrize("progress", ["true", "false"])
def test_prototypes_of_another_number_begin_fresh_and_alike_in_student_and_teacher(built, other, progress, caplog):
    caplog.set_level("INFO", "tutelage")
    run = built(out_dim=32, epochs=3, init_from=other / "checkpoint.pth", init_progress=progress)
    assert begin(run) == ((2, 0) if progress == "true" else (0, 0))
    assert "student.head.last_layer.* (2), teacher.head.last_layer.* (2), dino_loss" in caplog.text
    found, theirs = parts(run), unwrapped(load(other))
    assert torch.equal(found["/student/head.last_layer.weight_v"], found["/teacher/head.last_layer.weight_v"])
    assert torch.equal(found["/student/head.mlp.0.weight"], theirs["/student/head.mlp.0.weight"])
    assert ("moments of student.head.last_layer.weight_v" in caplog.text) == (progress == "true")
    assert "student.head.last_layer.weight_v" not in moments_of(run)
    assert len(moments_of(run)) == (len(load(other)["optimizer"]["state"]) - 1) * (progress == "true")


def test_moments_are_those_of_the_same_name_whatever_stands_before_it(built, other, tmp_path):
    """A run whose prototypes' norms are trained has a parameter more, in the middle of the others."""
    options = {"init_progress": "true", "epochs": 3, "norm_last_layer": "false"}
    run = built(**options, init_from=other / "checkpoint.pth")
    begin(run)
    file, moments = load(other), moments_of(run)
    names = [name for group in file["tutelage"]["parameters"] for name in group]
    assert len(names) == len(moments) == len(file["optimizer"]["state"])
    for number, name in enumerate(names):
        for kind, value in file["optimizer"]["state"][number].items():
            assert torch.equal(moments[name][kind], value), (name, kind)
    assert "student.head.last_layer.weight_g" not in moments
    nameless = edited(other / "checkpoint.pth", tmp_path, lambda file: file["tutelage"].pop("parameters"))
    with pytest.raises(UsageError, match=r"has 23 \+ 38 tensors where this run looks for 24 \+ 38, so whose"):
        begin(built(**options, init_from=nameless))


class WithRegions(DINO):
    """A second head that the other run had not, as EsViT's for regions."""

    @classmethod
    def build(cls, args):
        method = super().build(args)
        for network in (method.student, method.teacher):
            torch.manual_seed(5)
            network.head_dense = DINOHead(network.backbone.embed_dim, 8).requires_grad_(network is method.student)
        return method


def original(file: dict) -> None:
    """As the original writes it: no word of ours, and the teacher of a network with batch norm wrapped too."""
    del file["tutelage"]
    file["teacher"] = {f"module.{name}": value for name, value in file["teacher"].items()}


@pytest.mark.parametrize("change", [lambda file: None, original], ids=["ours", "the original's"])
def test_a_run_with_a_further_head_keeps_epoch_and_moments_of_the_rest(
    built, other, tmp_path, monkeypatch, change, caplog
):
    caplog.set_level("INFO", "tutelage")
    monkeypatch.setitem(METHODS, "dino", WithRegions)
    path = edited(other / "checkpoint0000.pth", tmp_path, change)
    run = built(init_from=path, init_progress="true", epochs=3)
    assert begin(run) == (1, 0)
    file, moments = torch.load(other / "checkpoint0000.pth", weights_only=True), moments_of(run)
    names = [name for group in file["tutelage"]["parameters"] for name in group]
    assert moments.keys() == {names[number] for number in file["optimizer"]["state"]}
    for number, state in file["optimizer"]["state"].items():
        assert all(torch.equal(moments[names[number]][kind], value) for kind, value in state.items())
    assert (
        "student.head_dense.mlp.0.* (2)" in caplog.text and "moments of student.head_dense.mlp.0.* (2)" in caplog.text
    )
    assert "backbone" not in caplog.text.split("fresh: ")[1].split("\n")[0]


@pytest.mark.parametrize("name", OTHERS)
def test_every_method_begins_with_a_run_of_its_own(built, tmp_path, name):
    first = built(**OTHERS[name], seed=1)
    with torch.no_grad():
        for parameter in first.method.parameters():
            parameter += 0.01
    (tmp_path / "out").mkdir()
    save_checkpoint(first, 1, 0)
    (tmp_path / "out" / "checkpoint.pth").rename(tmp_path / "first.pth")
    second = built(**OTHERS[name], init_from=tmp_path / "first.pth", init_progress="true")
    assert begin(second) == (1, 0)
    ours, theirs = parts(second), parts(first)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize(("epoch", "step", "position"), [(0, 1, (0, 1)), (0, 2, (1, 0)), (1, 0, (1, 0))])
def test_it_goes_on_at_the_step_where_the_other_run_stands(built, other, tmp_path, epoch, step, position):
    def stand(file: dict) -> None:
        file["epoch"], file["tutelage"]["step"] = epoch, step

    path = edited(other / "checkpoint0000.pth", tmp_path, stand)
    assert begin(built(pretrained_weights_ckpt=path, init_progress="true")) == position


# ---- what it refuses ------------------------------------------------------------------------------------------------


def of_another_epoch(file: dict) -> None:
    file["tutelage"] |= {"step": 3, "niter": 7}


REFUSED = [
    (
        {"arch": "vit_tiny"},
        None,
        r"vit_micro \(width 128, .* here it is a vit_tiny \(width 192, .*\(cls_token: \(1, 1, 128\)",
    ),
    ({"patch_size": 16}, None, r"vit_micro .*patch 8, .* here it is a vit_micro .*patch 16, "),
    (
        {"arch": "resnet18"},
        None,
        r"its student is a vit_micro .* here it is a resnet18 of 100 tensors \(conv1.weight: none",
    ),
    ({**OTHERS["ibot"]}, None, "belongs to a dino run, this is ibot"),
    ({**OTHERS["ibot"]}, original, "is not a checkpoint of a ibot run: no ibot_loss"),
    ({}, lambda file: [file.pop(key) for key in list(file) if key != "teacher"], "no student, dino_loss, epoch"),
    ({}, lambda file: file.update(student=3), "is not a checkpoint of a dino run: no student"),
    ({"init_progress": "true"}, lambda file: file.pop("optimizer"), "has no optimizer, and its progress was asked for"),
    ({"init_progress": "true", "optimizer": "sgd"}, None, "its optimiser is not --optimizer sgd"),
    ({"init_progress": "true", "epochs": 1}, None, "has 1 epochs behind it and --epochs is 1: nothing is left"),
    ({"init_progress": "true"}, of_another_epoch, "in the middle of an epoch of 7 steps, this run has 2"),
]


@pytest.mark.parametrize(("options", "change", "message"), REFUSED, ids=[str(number) for number in range(len(REFUSED))])
def test_a_file_it_cannot_begin_with_is_refused_in_one_line(built, other, tmp_path, options, change, message):
    path = edited(other / "checkpoint0000.pth", tmp_path, change or (lambda file: None))
    run = built(**options, init_from=path)
    before = {name: value.clone() for name, value in parts(run).items()}
    with pytest.raises(UsageError, match=f"^--init_from {re.escape(path)}.*{message}") as refusal:
        begin(run)
    assert "\n" not in str(refusal.value)
    changed = [name for name, value in parts(run).items() if not torch.equal(value, before[name])]
    assert not changed or "optimiser" in message


def test_a_file_that_is_not_there_is_refused_and_nothing_is_written(images, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match=r"checkpont.pth: no such file"):
        run_here(monkeypatch, data_path=images, output_dir=tmp_path / "out", init_from=tmp_path / "checkpont.pth")
    assert not (tmp_path / "out").exists()


def test_what_an_evaluation_wrote_is_no_run(built, tmp_path):
    (tmp_path / "out").mkdir()
    path = tmp_path / "out" / "checkpoint.pth"
    torch.save({"model": {}, "optimizer": {}, "epoch": 3, "tutelage": {"options": {}}}, path)
    with pytest.raises(UsageError, match=f"^{path} is not a checkpoint of a dino run: no "):
        begin(built())
    with pytest.raises(UsageError, match=f"^--init_from {path} is not a checkpoint of a dino run: no student, teacher"):
        begin(built(output_dir=tmp_path / "other", init_from=path))


# ---- never taken for resuming ---------------------------------------------------------------------------------------


def test_a_run_that_is_found_goes_on_and_no_other_start_is_read(images, built, other, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", "tutelage")
    start = tmp_path / "start.pth"
    start.write_bytes((other / "checkpoint.pth").read_bytes())
    options = {"output_dir": tmp_path / "run", "epochs": 1}
    run_here(monkeypatch, data_path=images, **options, init_from=start)
    assert "beginning with" in caplog.text
    start.unlink()  # no longer needed
    for given in (start, None):
        caplog.clear()
        assert begin(built(**options, init_from=given)) == (1, 0)
        assert ("start.pth: not read, since the run in" in caplog.text) == (given is not None)
        assert "beginning with" not in caplog.text
    for given in ({"init_from": other / "checkpoint.pth"}, {"init_from": start, "init_progress": "true"}):
        with pytest.raises(UsageError, match=r"--init_from: .*start.pth without progress there, .* here"):
            begin(built(**options, **given))
        assert begin(built(**options, **given, accept_changes=True)) == (1, 0)
    with pytest.raises(UsageError, match=r"--init_from: nothing there, .*checkpoint.pth without progress here"):
        begin(built(output_dir=other, init_from=tmp_path / "run" / "checkpoint.pth"))


def test_a_run_that_was_written_before_starts_were_goes_on_to_the_same_bits(images, other, tmp_path, monkeypatch):
    def as_it_was(file: dict) -> None:
        for name in ("parameters", "start", "image_size"):
            del file["tutelage"][name]
        for name in ("init_from", "init_progress"):
            del file["args"][name]

    path = edited(other / "checkpoint0000.pth", tmp_path, as_it_was)
    (tmp_path / "run").mkdir()
    os.rename(path, tmp_path / "run" / "checkpoint.pth")
    run_here(monkeypatch, data_path=images, output_dir=tmp_path / "run")
    assert_same_run(other, tmp_path / "run", first_epoch=1)


def test_a_start_is_remembered_by_every_run_that_goes_on(built, other, tmp_path):
    run = built(init_from=other / "checkpoint.pth")
    begin(run)
    (tmp_path / "out").mkdir()
    save_checkpoint(run, 0, 1)
    going_on = built()
    assert begin(going_on) == (0, 1)
    assert going_on.start == run.start == load(tmp_path / "out")["tutelage"]["start"]


def test_a_dry_run_says_whether_the_run_can_begin(images, other, tmp_path, monkeypatch):
    options = {"data_path": images, "output_dir": tmp_path, "dry_run": True, "init_from": other / "checkpoint.pth"}
    with pytest.raises(UsageError, match="here it is a vit_tiny"):
        run_here(monkeypatch, **options, arch="vit_tiny")
