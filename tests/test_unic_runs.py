"""UNIC from the command line, from teachers that are files, on real processes."""

import logging
import shutil

import pytest
import torch

import main_pretrain
from models import build_backbone
from models.checkpoints import network_from_file
from tests.launch import assert_same_run, finish, load, make_images, run_here, start, wait_for_line
from utils import UsageError

NONE = dict.fromkeys(
    ("out_dim", "momentum_teacher", "global_crops_size", "local_crops_size", "local_crops_number"), None
)
UNIC = {
    **NONE,
    "method": "unic",
    "image_size": 16,
    "lp_args": "{'hidden_dim': 8, 'last_hidden_dim': 12}",
    "drop_path_rate": 0.3,
    "lr": 0.01,
}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """Two files, and the option that names them."""
    folder = tmp_path_factory.mktemp("teachers")
    for seed, name in enumerate(("first", "second")):
        torch.manual_seed(seed)
        network = build_backbone("vit_micro" if seed else "vit_tiny", patch_size=8)
        torch.save(network.state_dict(), folder / f"{name}.pth")
    return folder


def named(folder) -> str:
    return f"second={folder}/second.pth,first={folder}/first.pth"


@pytest.fixture(scope="module")
def uninterrupted(images, teachers, tmp_path_factory):
    """In two pieces: as each process does, a piece has the mean over its own kept pairs."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    patch = pytest.MonkeyPatch()
    run_here(patch, **UNIC, data_path=images, teachers=named(teachers), output_dir=folder, accum_iter=2)
    patch.undo()
    return folder


def test_a_run_moves_student_and_statistics_and_its_checkpoint_is_evaluated(uninterrupted, teachers):
    state = load(uninterrupted)
    assert state["model"]["module.encoder.blocks.0.3.attn.qkv.weight"].shape == (384, 128)
    assert torch.equal(state["model"]["module.encoder.norm.weight"], torch.ones(128).double())
    widths = {name: kinds["patch"]["std"].shape for name, kinds in state["teacher_ft_stats"].items()}
    assert widths == {"first": (1, 1, 192), "second": (1, 1, 128)}
    assert all((kinds["cls"]["mean"] != 0).all() for kinds in state["teacher_ft_stats"].values())
    assert set(state["tutelage"]["identity"]) == {"teacher first", "teacher second"}
    network = network_from_file(uninterrupted / "checkpoint.pth")
    assert network.arch == "vit_micro" and network.report.complete


def test_two_processes_equal_one_with_two_pieces(images, teachers, uninterrupted, tmp_path):
    options = {**UNIC, "data_path": images, "teachers": named(teachers), "batch_size_per_gpu": 4}
    finish(start(nproc=2, **options, output_dir=tmp_path))
    assert_same_run(uninterrupted, tmp_path, rtol=1e-6, atol=1e-9)


def test_the_start_says_who_teaches_and_what_a_batch_of_each_costs(images, teachers, tmp_path, monkeypatch, caplog):
    options = {**UNIC, "data_path": images, "teachers": named(teachers), "output_dir": tmp_path, "epochs": 1}
    caplog.set_level(logging.INFO)

    def lines(**more) -> list[str]:
        caplog.clear()
        run_here(monkeypatch, **options | more)
        return [line for line in caplog.text.splitlines() if " ms for " in line]

    shown = lines(accum_iter=2)
    said = caplog.text
    assert "teacher first: vit_tiny/8 from" in said and "M parameters, 192 wide, sees images of 16 pixels" in said
    assert "apart for class tokens and patches: first (192 dimensions), second (128 dimensions)" in said
    assert [line.split("teacher ")[1].split(":")[0] for line in shown] == ["first", "second"]
    assert all(" ms for 4 images, " in line for line in shown)
    assert lines(accum_iter=2) == []  # a run that goes on
    monkeypatch.setattr(main_pretrain, "measure_frozen", lambda run: None)
    lines(accum_iter=2, output_dir=tmp_path / "unmeasured")
    assert_same_run(tmp_path, tmp_path / "unmeasured")


def test_killed_and_continued_with_teachers_from_elsewhere_ends_with_the_same_bits(
    images, teachers, uninterrupted, tmp_path, monkeypatch
):
    options = {**UNIC, "data_path": images, "output_dir": tmp_path / "run", "accum_iter": 2}
    options["save_every_minutes"] = 1e-9
    process = start(**options, teachers=named(teachers))
    wait_for_line(process, "[1/2]  [1/5]")
    process.kill()
    process.wait()
    elsewhere = shutil.copytree(teachers, tmp_path / "elsewhere")
    shutil.copy(elsewhere / "second.pth", tmp_path / "kept.pth")
    torch.manual_seed(9)
    torch.save(build_backbone("vit_micro", patch_size=8).state_dict(), elsewhere / "second.pth")
    with pytest.raises(UsageError, match=r"belongs to another run \(teacher second: \w{16} there, \w{16} here\)"):
        run_here(monkeypatch, **options, teachers=named(elsewhere))
    shutil.copy(tmp_path / "kept.pth", elsewhere / "second.pth")
    run_here(monkeypatch, **options, teachers=named(elsewhere))
    assert_same_run(uninterrupted, tmp_path / "run")


def test_a_second_stage_begins_with_student_and_statistics_at_another_size(
    images, teachers, uninterrupted, tmp_path, monkeypatch
):
    options = {**UNIC, "image_size": 24, "epochs": 1, "lr": 0.0, "min_lr": 0.0, "data_path": images}
    options |= {"init_from": uninterrupted / "checkpoint.pth", "teachers": named(teachers)}
    run_here(monkeypatch, **options, output_dir=tmp_path)
    ours, theirs = load(tmp_path)["model"], load(uninterrupted)["model"]
    assert ours["module.encoder.pos_embed"].shape == (1, 1 + 9, 128)
    name = "module.lp.heads.first.patch.0.layers.0.weight"
    assert torch.equal(ours[name], theirs[name])
    others = options | {"teachers": f"first={teachers}/first.pth"}
    with pytest.raises(UsageError, match=r"--init_from .*: its ladder leads to first, second, --teachers are first;"):
        run_here(monkeypatch, **others, output_dir=tmp_path / "other")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"lp_args": "{'which_blocks': [4]}"}, "--lp_args: which_blocks has 4, and the student's blocks are 0 to 3"),
        ({"teachers": "first=/nowhere/first.pth"}, "/nowhere/first.pth"),
        ({"batch_size_per_gpu": 1}, "--batch_size_per_gpu 1"),
    ],
)
def test_what_only_shows_when_networks_are_built_is_refused_before_anything_is_written(
    images, teachers, tmp_path, monkeypatch, changed, said
):
    options = {**UNIC, "data_path": images, "teachers": named(teachers), "output_dir": tmp_path / "run"}
    with pytest.raises(UsageError) as error:
        run_here(monkeypatch, **options | changed)
    assert said in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()
