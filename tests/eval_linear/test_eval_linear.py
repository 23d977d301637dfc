"""Linear probing as a script: it learns, continues exactly, shares its work, and refuses in one line."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.linear_views import StrongLinearViews
from data.preprocess import MEAN, STD
from eval_linear.eval_linear import main
from evaluation import linear, sets
from evaluation.features import Feature
from evaluation.linear_heads import heads_of
from lock import hold
from models import build_backbone
from models.layouts.names import plain_name
from models.reading import read_backbone
from tests.eval_knn.test_eval_knn import MendedInPlace, micro
from tests.launch import ROOT, SMALL, finish, flatten, make_images, start
from tests.sources import Stripes
from utils import World, run_cli


@pytest.fixture
def probe(monkeypatch, tmp_path, capsys):
    """Run the script in this process on stripes: (exit code, standard output, standard error)."""

    def run(*arguments: object, out: str = "out", stripes: bool = True) -> tuple[int, str, str]:
        if stripes:
            monkeypatch.setattr(
                sets,
                "open_source",
                lambda path, subset=None, split="train", start=0: Stripes(6, 7, int(split != "train")),
            )
        options = ["--device", "cpu", "--num_workers", 0, "--crop_size", 32, "--batch_size_per_gpu", 16]
        options += ["--output_dir", tmp_path / out, *arguments]
        monkeypatch.setattr(sys, "argv", ["eval_linear.py", *map(str, options)])
        with pytest.raises(SystemExit) as exit_:
            run_cli(main)
        return exit_.value.code, *capsys.readouterr()

    return run


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


def saved(folder: Path, name: str = "checkpoint.pth.tar") -> dict:
    return torch.load(folder / name, weights_only=True)


def assert_same(one: dict, other: dict) -> None:
    one, other = flatten(one), flatten(other)
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name], name


# ---- what it does ---------------------------------------------------------------------------------------------------


def test_on_the_photographs_the_heads_of_an_untrained_network_beat_chance(probe, tmp_path):
    heads = ("--n_last_blocks", 1, 4, "--avgpool_patchtokens", 0, 2, "--lr", 0.05, 0.5)
    options = ("--arch", "vit_micro", "--patch_size", 8, "--subset", 12, "--epochs", 2)
    code, said, error = probe(*options, *heads, stripes=False)
    assert code == 0, error
    assert "19 photographs" in said and "linear heads: 8, on" in said and "RANDOM WEIGHTS" in said
    result = json.loads((tmp_path / "out" / "eval_linear.json").read_text())
    numbers = result["numbers"]
    assert list(result) == ["evaluation", "checkpoint", "checkpoint_key", "arch", "data", "unreadable", "numbers"]
    assert numbers["top1"] > 3 * 100 / 19 and numbers["top5"] > numbers["top1"]
    assert numbers["top1"] == max(head["top1"] for head in numbers["heads"])
    assert [(h["n_last_blocks"], h["avgpool_patchtokens"], h["lr"]) for h in numbers["heads"][:4]] == [
        (1, "0", 0.05), (1, "0", 0.5), (1, "2", 0.05), (1, "2", 0.5)
    ]  # fmt: skip
    first, second = lines_of(tmp_path / "out")
    keys = ["train_loss", "train_lr", "epoch", "test_loss", "test_acc1", "test_acc5", "head", "heads"]
    assert list(first) == keys and len(first["heads"]) == 8
    assert first["train_lr"] == pytest.approx(first["heads"][first["head"]]["lr"] * 16 / 256)
    assert second["heads"][0]["train_lr"] == pytest.approx(0.05 * 16 / 256 / 2)
    assert second["heads"][1]["train_loss"] < first["heads"][1]["train_loss"]
    low, high = numbers["interval"]
    assert low < numbers["top1"] < high
    assert said.splitlines()[-1] == f"Top-1 test accuracy: {numbers['top1']:.1f} (95 %: {low:.2f} to {high:.2f})"
    table = said.split("in percent\n")[1].splitlines()[:8]
    assert float(table[-1].split()[-1]) == pytest.approx(numbers["top1"], abs=0.005)


def test_one_head_leaves_the_originals_files(probe, tmp_path):
    path = micro(tmp_path, args={"global_crops_size": 32})
    code, said, error = probe("--pretrained_weights", path, "--lr", 0.3, "--epochs", 3, "--val_freq", 2)
    assert code == 0, error
    assert "best of" not in said and "highest top-1" not in said
    lines = lines_of(tmp_path / "out")
    assert [list(line)[:3] for line in lines] == [["train_loss", "train_lr", "epoch"]] * 3
    assert ["test_acc1" in line for line in lines] == [True, False, True]
    file = saved(tmp_path / "out", "checkpoint_teacher_linear.pth")
    assert list(file)[:5] == ["epoch", "state_dict", "optimizer", "scheduler", "best_acc"]
    assert {name: tuple(t.shape) for name, t in file["state_dict"].items()} == {
        "module.linear.weight": (6, 4 * 128), "module.linear.bias": (6,)
    }  # fmt: skip
    best = max(line["test_acc1"] for line in lines if "test_acc1" in line)
    assert file["best_acc"] == best > 100 / 6 and file["scheduler"]["T_max"] == 3
    code, said, error = probe("--pretrained_weights", path, "--evaluate")
    assert code == 0, error
    assert f"Top-1 test accuracy: {best:.1f}" in said
    assert json.loads((tmp_path / "out" / "eval_linear.json").read_text())["numbers"]["top1"] == best


def test_of_several_heads_the_best_is_evaluated_on_its_own_feature(probe, tmp_path):
    options = ("--pretrained_weights", micro(tmp_path), "--n_last_blocks", 1, 2, "--lr", 0.02, 0.2, 0.5, "--epochs", 1)
    assert probe(*options)[0] == 0
    file = saved(tmp_path / "out", "checkpoint_teacher_linear.pth")
    assert {"optimizers", "schedulers", "best_acc_hidx", "best_acc_sweep_lr_only"} <= file.keys()
    assert list(file["state_dict"])[:2] == ["0.module.linear.weight", "0.module.linear.bias"]
    assert len(heads_of(file)) == 6
    (line,) = lines_of(tmp_path / "out")
    accuracies = [head["test_acc1"] for head in line["heads"]]
    assert file["best_acc"] == max(accuracies) and accuracies[file["best_acc_hidx"]] == max(accuracies)
    assert max(accuracies) not in accuracies[file["best_acc_hidx"] + 1 :]
    given = ("--evaluate", "--pretrained_linear", tmp_path / "out" / "checkpoint_teacher_linear.pth")
    code, said, error = probe("--pretrained_weights", micro(tmp_path), *given, out="other")
    assert code == 0 and f"Top-1 test accuracy: {file['best_acc']:.1f}" in said, error


def test_the_full_sweep_of_ibot_runs_and_fewer_than_five_classes_have_no_top_five(probe, monkeypatch, tmp_path):
    monkeypatch.setattr(
        sets,
        "open_source",
        lambda path, subset=None, split="train", start=0: Stripes(4, 4, int(split != "train")),
    )
    options = ("--sweep_lr_only", "false", "--epochs", 1, "--n_last_blocks", 1)
    code, _, error = probe("--pretrained_weights", micro(tmp_path), *options, stripes=False)
    assert code == 0, error
    (line,) = lines_of(tmp_path / "out")
    assert len(line["heads"]) == 180 and "test_acc5" not in line and "test_acc1" in line
    assert [line["heads"][i]["optimizer"] for i in range(4)] == ["sgd", "lars"] * 2
    file = saved(tmp_path / "out")
    plain = [head["test_acc1"] for head in line["heads"]][::4]
    assert file["best_acc_sweep_lr_only"] == max(plain)
    assert "mu" in file["optimizers"][1]["state"][0]


def test_a_network_without_blocks_gives_its_pooled_output(probe, tmp_path):
    code, said, error = probe("--arch", "resnet18", "--n_last_blocks", 1, "--epochs", 1, "--lr", 0.1)
    assert code == 0 and "its pooled output is taken" in said, error
    assert heads_of(saved(tmp_path / "out"))[0][0].shape == (6, 512)
    code, _, error = probe("--arch", "resnet18", out="other")
    assert code == 2 and "--n_last_blocks 1" in error and error.count("\n") == 1


def test_a_head_that_stands_beside_its_backbone_is_evaluated(probe, tmp_path):
    """As iBOT and AttMask combine them."""
    path = micro(tmp_path)
    assert probe("--pretrained_weights", path, "--epochs", 1, "--lr", 0.2)[0] == 0
    backbone = {plain_name(name): tensor for name, tensor in read_backbone(path)[0].items()}
    linear = {f"linear.{n[14:]}": t for n, t in saved(tmp_path / "out")["state_dict"].items()}
    torch.save({"epoch": 1, "state_dict": backbone | linear, "best_acc": 1.0}, tmp_path / "combined.pth")
    code, said, error = probe("--pretrained_weights", tmp_path / "combined.pth", "--evaluate", out="other")
    assert code == 0 and f"Top-1 test accuracy: {saved(tmp_path / 'out')['best_acc']:.1f}" in said, error
    code, _, error = probe("--pretrained_weights", tmp_path / "combined.pth", "--evaluate", "--n_last_blocks", 1)
    assert code == 2 and "width 512" in error and "--n_last_blocks" in error


# ---- continuing -----------------------------------------------------------------------------------------------------


def test_a_run_that_was_interrupted_ends_with_the_same_bits(probe, monkeypatch, tmp_path):
    options = ("--pretrained_weights", micro(tmp_path), "--n_last_blocks", 1, 2, "--lr", 0.1, 0.4, "--epochs", 4)
    assert probe(*options, out="whole")[0] == 0
    train_one_epoch = linear.train_one_epoch

    def stop_in_the_third(run, loader, pieces, epoch):
        if epoch == 2:
            raise KeyboardInterrupt
        return train_one_epoch(run, loader, pieces, epoch)

    monkeypatch.setattr(linear, "train_one_epoch", stop_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        probe(*options, out="parts")
    monkeypatch.setattr(linear, "train_one_epoch", train_one_epoch)
    assert saved(tmp_path / "parts")["epoch"] == 2
    code, said, _ = probe(*options, out="parts")
    assert code == 0 and "at epoch 2 of 4" in said
    for name in ("checkpoint.pth.tar", "checkpoint_teacher_linear.pth"):
        assert_same(saved(tmp_path / "whole", name), saved(tmp_path / "parts", name))
    assert (tmp_path / "whole" / "log.txt").read_text() == (tmp_path / "parts" / "log.txt").read_text()
    code, again, _ = probe(*options, out="parts")
    assert code == 0 and "Epoch: " not in again and again.splitlines()[-1] == said.splitlines()[-1]
    whole, parts = (dict(np.load(tmp_path / name / "eval_linear_right.npz")) for name in ("whole", "parts"))
    best = json.loads((tmp_path / "whole" / "eval_linear.json").read_text())["numbers"]["top1"]
    assert np.array_equal(whole["top-1"], parts["top-1"]) and 100 * whole["top-1"].mean() == pytest.approx(best)
    compare = ("--epochs", 1, "--compare", tmp_path / "whole" / "eval_linear_right.npz")
    code, said, error = probe(*options, *compare, out="other")
    assert code == 0 and "top-1, compared with" in said and " images only here, " in said, error
    compared = json.loads((tmp_path / "other" / "eval_linear.json").read_text())["numbers"]["compared"]
    other = np.load(tmp_path / "other" / "eval_linear_right.npz")["top-1"]
    difference = compared["results"]["top-1"]["difference"]
    assert difference == pytest.approx(100 * (other.mean() - whole["top-1"].mean()))
    np.savez(tmp_path / "others.npz", images="of others", **{"top-1": other})
    code, said, error = probe(*options, "--compare", tmp_path / "others.npz", out="new")
    assert code == 2 and "of other test images" in error and "Epoch: " not in said


def test_mugss_protocol_has_its_grid_its_floor_and_its_strong_chain(probe, tmp_path):
    options = ("--pretrained_weights", micro(tmp_path), "--epochs", 2, "--n_last_blocks", 1)
    mugs = ("--sweep_lr_only", "--sweep", "mugs", "--lr_min", 0.003, "--augment", "strong", "--color_aug", "false")
    code, said, error = probe(*options, *mugs)
    assert code == 0 and "linear heads: 36" in said, error
    first, second = (line["heads"] for line in lines_of(tmp_path / "out"))
    scale = first[0]["train_lr"] / 1e-4
    assert [head["lr"] for head in first] == pytest.approx([d * 10.0**e for e in range(-4, 0) for d in range(1, 10)])
    assert [head["train_lr"] for head in second] == pytest.approx([0.0015 + head["lr"] * scale / 2 for head in second])
    views = StrongLinearViews(16)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8))
    crops = [views(image, (0, 0, index))["crops"][0] for index in range(40)]
    assert torch.equal(crops[3], views(image, (0, 0, 3))["crops"][0]) and crops[0].shape == (3, 16, 16)
    low, high = (0 - torch.tensor(MEAN)) / torch.tensor(STD), (1 - torch.tensor(MEAN)) / torch.tensor(STD)
    beyond = [bool(((c < low[:, None, None] - 1e-3) | (c > high[:, None, None] + 1e-3)).any()) for c in crops]
    assert 2 < sum(beyond) < 20  # noise, in a quarter of them
    code, _, error = probe(*options, "--lr_min", -1)
    assert code == 2 and "must not be negative" in error


def test_another_run_in_the_same_folder_is_refused_with_every_difference(probe, tmp_path):
    options = ("--pretrained_weights", micro(tmp_path), "--epochs", 1)
    assert probe(*options, "--lr", 0.1)[0] == 0
    before = saved(tmp_path / "out")
    code, _, error = probe(*options, "--lr", 0.2, "--seed", 5)
    assert code == 2 and "--seed: 0 there, 5 here" in error and "other heads" in error and error.count("\n") == 1
    code, _, error = probe("--pretrained_weights", micro(tmp_path, seed=4), "--epochs", 1, "--lr", 0.1)
    assert code == 2 and "network: vit_micro/8" in error
    assert_same(before, saved(tmp_path / "out"))


def test_a_folder_that_a_living_run_writes_to_is_refused(probe, tmp_path):
    with hold(tmp_path / "out", World(0, 1, 0, torch.device("cpu"))):
        code, _, error = probe("--pretrained_weights", micro(tmp_path), "--epochs", 1)
    assert code == 2 and "a run is writing there" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_file_of_the_original_is_continued_with_load_from(probe, tmp_path):
    options = ("--pretrained_weights", micro(tmp_path), "--lr", 0.1, "--epochs", 3)
    assert probe(*options, out="whole")[0] == 0
    file = {name: value for name, value in saved(tmp_path / "whole").items() if name != "tutelage"}
    (tmp_path / "out").mkdir()
    torch.save(file | {"epoch": 2}, tmp_path / "out" / "theirs.pth")
    code, said, error = probe(*options, "--load_from", "theirs.pth")
    assert code == 0 and "not checked" in said and "at epoch 2 of 3" in said, error


# ---- several processes ----------------------------------------------------------------------------------------------


def test_two_processes_equal_one_with_twice_the_batch(tmp_path):
    """21 training images in batches of 2 x 8: of the last batch the second process has none. One of them and one test
    image cannot be read: both processes refuse the latter, and go on when it is to be skipped.
    """
    make_images(tmp_path / "data" / "train", 21, 3)
    make_images(tmp_path / "data" / "val", 9, 3)
    for name in ("train/class1/004.jpg", "val/class2/005.jpg"):
        (tmp_path / "data" / name).write_bytes(b"cut off")
    path = micro(tmp_path)
    for name, processes in (("one", 1), ("two", 2)):
        words = [
            "--n_last_blocks",
            "1",
            "2",
            "--lr",
            "0.1",
            "1",
            "--epochs",
            "2",
            "--crop_size",
            "32",
            "--num_workers",
            "0",
        ]
        words += ["--pretrained_weights", str(path), "--data_path", str(tmp_path / "data"), "--device", "cpu"]
        words += ["--batch_size_per_gpu", str(16 // processes), "--output_dir", str(tmp_path / name)]
        script = [str(ROOT / "eval_linear" / "eval_linear.py"), *words]
        refused = ""
        if processes == 2:
            refused = finish(start(processes, script, **dict.fromkeys(SMALL)), code=1)  # torchrun's own
            assert refused.count("error: ") == 1 and "val/class2/005.jpg" in refused and "exitcode  : 2" in refused
        said = finish(start(processes, [*script, "--skip_unreadable"], **dict.fromkeys(SMALL)))
        assert said.count("val/class2/005.jpg") == (refused + said).count("train/class1/004.jpg") == 1
        assert "(unreadable: 1 training image, 1 test image)" in said
    right = [np.load(tmp_path / name / "eval_linear_right.npz")["top-1"] for name in ("one", "two")]
    assert len(right[0]) == 8 and np.array_equal(*right)
    one, two = saved(tmp_path / "one"), saved(tmp_path / "two")
    for name, tensor in one["state_dict"].items():
        torch.testing.assert_close(two["state_dict"][name], tensor, rtol=1e-4, atol=1e-6)
    for ours, theirs in zip(lines_of(tmp_path / "two"), lines_of(tmp_path / "one"), strict=True):
        assert ours["head"] == theirs["head"]
        for head, other in zip(ours["heads"], theirs["heads"], strict=True):
            assert (numbers := [name for name in head if name.startswith(("train_", "test_"))])
            assert [head[n] for n in numbers] == pytest.approx([other[n] for n in numbers], rel=1e-4, abs=1e-6)


# ---- what it refuses ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--pretrained_weights", "no/where.pth"], ["no/where.pth", "no such file"]),
        (["--data_path", "no/where"], ["--data_path", "no/where", "does not exist"]),
        (["--num_labels", "18"], ["--num_labels 18", "19 classes"]),
        (["--lr", "0"], ["--lr 0"]),
        (["--lr", "0.1", "-1"], ["--lr -1"]),
        (["--lr", "nan"], ["--lr nan"]),
        (["--lr", "0.1", "--sweep_lr_only"], ["--sweep_lr_only", "--lr"]),
        (["--avgpool_patchtokens", "3"], ["--avgpool_patchtokens", "'3'", "interleaved"]),
        (["--avgpool_patchtokens", "true"], ["--n_last_blocks 4", "interleaved", "--n_last_blocks 1"]),
        (["--n_last_blocks", "0"], ["--n_last_blocks 0"]),
        (["--class_token", "cls", "both"], ["--class_token both: vit_micro/16 has no second class token"]),
        (["--epochs", "0"], ["--epochs 0"]),
        (["--val_freq", "0"], ["--val_freq 0"]),
        (["--crop_size", "8"], ["--crop_size 8"]),
        (["--pretrained_linear", "x.pth"], ["--evaluate"]),
        (["--evaluate"], ["--evaluate", "--pretrained_linear"]),
        (["--evaluate", "--pretrained_linear", "x.pth"], ["x.pth", "no such file"]),
        (["--load_from", "x.pth"], ["x.pth", "no such file"]),
        (["--epoch", "3"], ["--epoch", "did you mean --epochs"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_bad_options_end_in_one_line_and_exit_code_two(probe, tmp_path, arguments, words):
    code, said, error = probe("--arch", "vit_micro", *arguments, stripes=False)
    assert code == 2 and error.count("\n") == 1, (said, error)
    assert all(word in error for word in words), error
    assert not list(tmp_path.glob("out/*"))


def test_parts_of_an_image_are_the_patches_that_draw_most_or_least_attention(probe, tmp_path):
    torch.manual_seed(2)
    model = build_backbone("vit_micro", 8, img_size=32).eval()
    torch.save(model.state_dict(), tmp_path / "flat.pth")
    options = ("--pretrained_weights", tmp_path / "flat.pth", "--topk", 1, 5, 99)
    code, said, error = probe(*options, "--epochs", 1, "--lr", 0.1)
    assert code == 0 and "linear heads: 3, on mean of the 1 most attended" in said, error
    assert [head["avgpool_patchtokens"] for head in saved(tmp_path / "out")["tutelage"]["heads"]] == [
        "top1", "top5", "top99"
    ]  # fmt: skip
    code, said, error = probe(*options, "--evaluate")
    assert code == 0 and "a linear head on the mean of the" in said, error
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        tokens = model.get_intermediate_layers(images, 1, norm=False)[0][:, 1:]
        attention = model.get_last_selfattention(images)[:, :, 0, 1:].mean(dim=1)
        least, whole = (Feature(1, name)(model, images) for name in ("least3", "top99"))
    order = attention.argsort(dim=1)[:, :3]
    torch.testing.assert_close(least, torch.stack([t[o].mean(dim=0) for t, o in zip(tokens, order, strict=True)]))
    torch.testing.assert_close(whole, tokens.mean(dim=1))
    for words, message in (
        (("--topk", 0), "--topk 0"),
        (("--reverse_top", "true"), "--reverse_top"),
        (("--arch", "resnet18", "--topk", 3), "--topk: resnet18 has no class token"),
    ):
        code, _, error = probe("--arch", "vit_micro", *words)
        assert code == 2 and message in error and error.count("\n") == 1


def test_poolings_have_the_names_of_both_originals(probe, tmp_path):
    for n, words, width in ((1, "true", 256), (1, "interleaved", 256), (4, "False", 512), (4, "1", 128), (2, "2", 384)):
        options = ("--arch", "vit_micro", "--epochs", 1, "--n_last_blocks", n, "--avgpool_patchtokens", words)
        assert probe(*options, out=words)[0] == 0
        assert heads_of(saved(tmp_path / words))[0][0].shape == (6, width)


def test_of_two_class_tokens_each_and_both_are_probed(probe, tmp_path):
    torch.save(build_backbone("vit_micro", 8, img_size=32, num_class_tokens=2).state_dict(), tmp_path / "two.pth")
    options = ("--pretrained_weights", tmp_path / "two.pth", "--epochs", 1, "--n_last_blocks", 2, "--lr", 0.1)
    code, _, error = probe(*options, "--class_token", "cls", "cls+", "both")
    assert code == 0, error
    numbers = json.loads((tmp_path / "out" / "eval_linear.json").read_text())["numbers"]
    assert [head.get("class_token") for head in numbers["heads"]] == [None, "cls+", "both"]
    assert [weight.shape[1] for weight, _ in heads_of(saved(tmp_path / "out"))] == [256, 256, 512]
    code, said, error = probe(*options, "--class_token", "cls", "cls+", "both", "--evaluate")
    assert code == 0 and f"Top-1 test accuracy: {numbers['top1']:.1f}" in said, error


def test_a_published_head_of_dino_is_tested(probe, tmp_path):
    torch.save({"state_dict": {"module.linear.weight": torch.randn(10, 256), "module.linear.bias": torch.zeros(10)}},
               tmp_path / "published.pth")  # fmt: skip
    options = ("--arch", "vit_micro", "--evaluate", "--pretrained_linear", tmp_path / "published.pth")
    code, said, error = probe(*options, "--n_last_blocks", 1, "--avgpool_patchtokens", "true")
    assert code == 0 and "Top-1 test accuracy" in said, error
    assert probe(*options, "--n_last_blocks", 1, 2)[0] == 2
    code, _, error = probe(*options, "--n_last_blocks", 2, "--num_labels", 7)
    assert code == 2 and "10 classes" in error


def test_more_blocks_than_there_are_is_all_of_them_also_of_a_head_that_is_loaded(probe, tmp_path):
    options = ("--pretrained_weights", micro(tmp_path), "--lr", 0.2, "--epochs", 1)
    code, said, error = probe(*options, "--n_last_blocks", 4, 9, 7)
    assert code == 0, error
    assert "linear heads: 1, on class token of the last 4 blocks" in said
    assert said.count("--n_last_blocks 9: vit_micro/8 has 4 blocks, and all of them are taken") == 1
    file = saved(tmp_path / "out", "checkpoint_teacher_linear.pth")
    file["tutelage"]["heads"][0]["n_last_blocks"] = 12  # of a deeper network that was cut
    torch.save(file, tmp_path / "deep.pth")
    code, said, error = probe(*options[:2], "--evaluate", "--pretrained_linear", tmp_path / "deep.pth")
    assert code == 0 and f"Top-1 test accuracy: {file['best_acc']:.1f}" in said, error
    assert "--n_last_blocks 12: vit_micro/8 has 4 blocks" in said


# ---- images that cannot be read -------------------------------------------------------------------------------------


def breaking(monkeypatch, train: tuple[int, ...] = (), test: tuple[int, ...] = ()) -> None:
    """Images of these numbers cannot be read; the lists of images stay what they are."""

    def opened(path, subset=None, split="train", start=0):
        return MendedInPlace(6, 7, int(split != "train"), bad=train if split == "train" else test)

    monkeypatch.setattr(sets, "open_source", opened)


def test_an_unreadable_training_image_is_replaced_and_counted(probe, monkeypatch, tmp_path):
    breaking(monkeypatch, train=(3,))
    model = build_backbone("vit_micro", 8, img_size=32)
    torch.save(model.state_dict(), tmp_path / "flat.pth")
    code, said, error = probe("--pretrained_weights", tmp_path / "flat.pth", "--epochs", 2, stripes=False)
    assert code == 0 and said.count("stripes/3.png: cut off in the middle") == 1, error
    assert said.count("could not be read and another one took its place") == 2
    read = lambda: json.loads((tmp_path / "out" / "eval_linear.json").read_text())["unreadable"]  # noqa: E731
    assert read() == {"train": 1, "test": 0} and said.endswith(" (unreadable: 1 training image)\n")
    (tmp_path / "out" / "eval_linear.json").unlink()
    code, again, error = probe("--pretrained_weights", tmp_path / "flat.pth", "--epochs", 2, stripes=False)
    assert code == 0 and read() == {"train": 1, "test": 0} and again.endswith(said.splitlines()[-1] + "\n"), error


def test_unreadable_test_images_are_refused_before_anything_is_trained(probe, monkeypatch, tmp_path):
    breaking(monkeypatch, test=(5, 40))
    options = ("--pretrained_weights", micro(tmp_path), "--epochs", 1)
    code, said, error = probe(*options, stripes=False)
    assert code == 2 and "stripes/5.png: cut off in the middle; stripes/40.png" in error and "Epoch" not in said
    assert not list(tmp_path.glob("out/*"))
    code, said, error = probe(*options, "--skip_unreadable", stripes=False)
    assert code == 0 and said.count("stripes/40.png") == 1 and "(unreadable: 2 test images)" in said, error


@pytest.mark.parametrize("val_freq", [1, 3], ids=["first test", "last test"])
def test_test_images_are_refused_when_the_epoch_is_saved_and_skipping_them_goes_on(
    probe, monkeypatch, tmp_path, val_freq
):
    """As if they had been skipped, or mended, from the start. They break after the look that comes before training."""
    monkeypatch.setattr(linear, "see_test_images", lambda *_: None)
    heads = ("--lr", 0.1, 0.4, "--n_last_blocks", 1, "--epochs", 3 if val_freq == 1 else 1)
    options = ("--pretrained_weights", micro(tmp_path), *heads, "--val_freq", val_freq)
    for name, bad, more in (("skipped", (5, 40), ("--skip_unreadable",)), ("mended", (), ())):
        breaking(monkeypatch, test=(5, 40))
        code, said, error = probe(*options, out=name, stripes=False)
        assert code == 2 and error.count("\n") == 1, error
        assert "stripes/5.png: cut off in the middle; stripes/40.png" in error and "the epoch is saved" in error
        assert saved(tmp_path / name)["epoch"] == 1 and not lines_of(tmp_path / name)
        breaking(monkeypatch, test=bad)
        code, said, error = probe(*options, *more, out=name, stripes=False)
        assert code == 0 and "Epoch: [0]" not in said, error
        code, whole, error = probe(*options, *more, out=f"{name} at once", stripes=False)
        assert code == 0 and whole.splitlines()[-1] == said.splitlines()[-1], error
        one, other = tmp_path / name, tmp_path / f"{name} at once"
        for file in ("checkpoint.pth.tar", "checkpoint_teacher_linear.pth"):
            assert_same(saved(one, file), saved(other, file))
        for file in ("log.txt", "eval_linear.json"):
            assert (one / file).read_text() == (other / file).read_text()
        assert said.count("stripes/40.png") == len(bad) // 2
        assert f"on the {42 - len(bad)} test images" in said
        counts = json.loads((one / "eval_linear.json").read_text())["unreadable"]
        assert counts == {"train": 0, "test": len(bad)}
    accuracy = lines_of(tmp_path / "skipped")[-1]["test_acc1"]
    assert accuracy * 40 / 100 == pytest.approx(round(accuracy * 40 / 100))  # of those that were read
    code, _, error = probe(*options, "--evaluate", out="skipped", stripes=False)
    assert code == 0, error
    breaking(monkeypatch, test=(5, 40))
    code, _, error = probe(*options, "--evaluate", out="skipped", stripes=False)
    assert code == 2 and "stripes/40.png" in error and "the epoch" not in error
