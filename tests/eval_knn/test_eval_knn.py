"""k-NN as a script: the originals' lines, one JSON, features that are kept, and refusals in one line."""

import json
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from data.datasets import Source, SubsetSource, open_source
from data.preprocess import eval_transform
from eval_knn.eval_knn import main
from evaluation import knn_run, sets
from evaluation.features import extract_features
from evaluation.knn import knn_classify
from models import build_backbone
from tests.data.helpers import encoded, photograph
from tests.sources import Stripes
from utils import World, run_cli

# ---- the script -----------------------------------------------------------------------------------------------------


@pytest.fixture
def evaluate(monkeypatch, tmp_path, capsys):
    """Run the script in this process on stripes: (exit code, standard output, standard error)."""
    monkeypatch.setattr(
        sets,
        "open_source",
        lambda path, subset=None, split="train", start=0: (
            SubsetSource(Stripes(), subset, start) if subset else Stripes(seed=int(split != "train"))
        ),
    )

    def run(*arguments: object) -> tuple[int, str, str]:
        options = ["--device", "cpu", "--num_workers", 0, "--output_dir", tmp_path / "out", *arguments]
        monkeypatch.setattr(sys, "argv", ["eval_knn.py", *map(str, options)])
        with pytest.raises(SystemExit) as exit_:
            run_cli(main)
        return exit_.value.code, *capsys.readouterr()

    return run


def micro(tmp_path: Path, seed: int = 3, **extra) -> Path:
    torch.manual_seed(seed)
    model = build_backbone("vit_micro", 8, img_size=32)
    path = tmp_path / f"checkpoint{seed}.pth"
    torch.save({"teacher": {f"backbone.{n}": t for n, t in model.state_dict().items()}, "epoch": 5, **extra}, path)
    return path


def test_it_prints_the_originals_lines_and_writes_one_json(evaluate, tmp_path):
    path = micro(tmp_path, args={"global_crops_size": 48}, tutelage={"image_size": 32})
    code, said, error = evaluate("--pretrained_weights", path, "--nb_knn", 1, 5)
    assert code == 0, error
    assert "crop 32 of 32 pixels" in said and "matched 54 of 54" in said and "RANDOM" not in said
    (text,) = (tmp_path / "out" / "eval_knn.json").read_text().splitlines()
    result = json.loads(text)
    assert list(result) == ["evaluation", "checkpoint", "checkpoint_key", "arch", "data", "unreadable", "numbers"]
    assert (result["checkpoint"], result["checkpoint_key"], result["arch"]) == (str(path), "teacher", "vit_micro/8")
    top1, top5 = result["numbers"]["5"].values()
    low, high = result["numbers"]["intervals"]["5"]
    assert f"5-NN classifier result: Top1: {top1}, Top5: {top5} (95 %: {low:.2f} to {high:.2f})\n" in said
    assert list(result["numbers"]["1"]) == ["top1"]  # the first of one neighbour is all there is
    assert f"1-NN classifier result: Top1: {result['numbers']['1']['top1']} (95 %: " in said
    assert result["numbers"]["1"]["top1"] > 40  # four classes that differ in colour


def test_a_cache_gives_the_same_numbers_and_another_network_is_compared_on_the_same_images(evaluate, tmp_path):
    options = ("--crop_size", 32, "--knn_k", 3, "--knn_temp", 0.1)
    ours, theirs, said = micro(tmp_path), micro(tmp_path, seed=4), {}
    for name, more in {"plain": (), "cache": ("--feature_cache", tmp_path / "kept")}.items():
        code, said[name], error = evaluate("--pretrained_weights", ours, *options, *more)
        assert code == 0, error
        said[name] = [line for line in said[name].splitlines() if "classifier result" in line]
    assert said["plain"] == said["cache"]
    (tmp_path / "out" / "eval_knn_right.npz").rename(tmp_path / "ours.npz")
    compare = ("--compare", tmp_path / "ours.npz")
    code, found, error = evaluate("--pretrained_weights", theirs, *options, *compare)
    assert code == 0 and "3-NN, compared with" in found, error
    code, found, error = evaluate("--pretrained_weights", theirs, "--crop_size", 32, "--nb_knn", 2, *compare)
    assert code == 2 and "holds 3-NN, and here are 2-NN" in error
    whole, (row, other) = (tmp_path / "ours.npz").read_bytes(), np.zeros((2, 3), bool)
    np.savez(tmp_path / "several.npz", images=np.array(["a", "b"]), one=row, two=other, three=row)
    np.save(tmp_path / "row.npy", row)
    several, array = ((tmp_path / name).read_bytes() for name in ("several.npz", "row.npy"))
    for content in (b"else", whole[: len(whole) // 2], whole[:60] + b"damaged" + whole[67:], several, array):
        (tmp_path / "ours.npz").write_bytes(content)
        code, found, error = evaluate("--pretrained_weights", theirs, *options, *compare)
        assert code == 2 and "not a file that these evaluations write" in error and error.count("\n") == 1, error


def test_several_starts_are_one_extraction_and_a_mean(evaluate, tmp_path):
    network = ("--pretrained_weights", micro(tmp_path), "--crop_size", 32, "--nb_knn", 1, 3, "--subset", 2)
    read = lambda: json.loads((tmp_path / "out" / "eval_knn.json").read_text())["numbers"]  # noqa: E731
    alone = {}
    for start in (1, 4, 3):
        code, _, error = evaluate(*network, "--subset_starts", start)
        assert code == 0, error
        alone[str(start)] = read()
    code, said, error = evaluate(*network, "--subset_starts", 1, 4, 3)
    assert code == 0, error
    numbers = read()
    assert numbers["starts"] == alone
    assert "5 per class from image 1 on (20 images): 20 of 20 images" in said
    for k in ("1", "3"):
        values = [run[k]["top1"] for run in alone.values()]
        assert numbers[k]["top1"] == pytest.approx(statistics.mean(values))
        assert numbers[k]["top1_std"] == pytest.approx(statistics.stdev(values))
        assert f"{k}-NN, mean of 3 subsets: Top1: {numbers[k]['top1']:.4f}, standard deviation" in said
    assert "from image 4 on: 3-NN classifier result" in said
    code, _, error = evaluate(*network, "--subset_starts", 5)
    assert code == 2 and "has only 6 images, 7 are needed to begin at 5" in error and error.count("\n") == 1


def test_four_rows_of_few_images_are_one_command_and_those_of_four(evaluate, tmp_path, monkeypatch):
    source = Stripes(classes=2, per_class=20, size=16)
    opened = lambda p, subset=None, split="train", start=0: SubsetSource(source, subset, start) if subset else source  # noqa: E731
    monkeypatch.setattr(sets, "open_source", opened)
    monkeypatch.setattr(knn_run, "LOW_SHOT", {1: (1, range(0, 6, 3)), 4: (3, range(0, 20, 16))})
    options = ("--pretrained_weights", micro(tmp_path), "--crop_size", 16)
    code, said, error = evaluate(*options, "--low_shot")
    assert code == 0 and said.count("features of") == 2, error
    read = lambda: json.loads((tmp_path / "out" / "eval_knn.json").read_text())["numbers"]  # noqa: E731
    found = read()["low_shot"]
    for images, k, starts in ((1, 1, (0, 3)), (4, 3, (0, 16))):
        assert evaluate(*options, "--subset", images, "--nb_knn", k, "--subset_starts", *starts)[0] == 0
        assert found[str(images)] == read()
    code, _, error = evaluate(*options, "--low_shot", "--subset", 3)
    assert code == 2 and "brings its own subsets" in error


def test_several_keys_give_a_line_each(evaluate, tmp_path):
    torch.manual_seed(1)
    student = build_backbone("vit_micro", 8, img_size=32).state_dict()
    path = micro(tmp_path, student={f"module.backbone.{name}": tensor for name, tensor in student.items()})
    options = ("--pretrained_weights", path, "--crop_size", 32, "--nb_knn", 3)
    results = []
    for key in ("student", "teacher", "student,teacher"):
        code, _, error = evaluate(*options, "--checkpoint_key", key)
        assert code == 0, error
        results.append([json.loads(line) for line in (tmp_path / "out" / "eval_knn.json").read_text().splitlines()])
    assert results[0] + results[1] == results[2]
    assert [result["checkpoint_key"] for result in results[2]] == ["student", "teacher"]
    code, _, error = evaluate(*options, "--checkpoint_key", "student,teacher", "--dump_features", tmp_path / "kept")
    assert code == 2 and "features are kept of one network" in error


def test_networks_below_prefixes_are_evaluated_by_name(evaluate, tmp_path):
    path, prefixed = micro(tmp_path), tmp_path / "lightning.ckpt"
    state = torch.load(path)["teacher"]
    networks = {f"{key}.{name}": tensor for key in ("ours", "theirs") for name, tensor in state.items()}
    torch.save({"state_dict": networks, "epoch": 3}, prefixed)
    options = ("--crop_size", 32, "--nb_knn", 3)
    code, _, error = evaluate("--pretrained_weights", prefixed, *options)
    assert code == 2 and "2 networks: ours, theirs; choose one" in error and not (tmp_path / "out").exists()
    code, said, error = evaluate("--pretrained_weights", prefixed, *options, "--checkpoint_key", "ours,theirs")
    assert code == 0 and "names begin with theirs." in said, error
    results = [json.loads(line) for line in (tmp_path / "out" / "eval_knn.json").read_text().splitlines()]
    assert [result["checkpoint_key"] for result in results] == ["ours", "theirs"]
    evaluate("--pretrained_weights", path, *options)
    (own,) = map(json.loads, (tmp_path / "out" / "eval_knn.json").read_text().splitlines())
    assert own["numbers"] == results[0]["numbers"] == results[1]["numbers"]


def test_more_blocks_than_there_are_is_all_of_them(evaluate, tmp_path):
    network = ("--pretrained_weights", micro(tmp_path), "--crop_size", 32, "--nb_knn", 3, "--n_last_blocks")
    results = []
    for blocks in (4, 9):
        code, said, error = evaluate(*network, blocks)
        assert code == 0, error
        assert ("--n_last_blocks 9: vit_micro/8 has 4 blocks, and all of them are taken" in said) == (blocks == 9)
        results.append(json.loads((tmp_path / "out" / "eval_knn.json").read_text()))
    assert results[0] == results[1]


def test_what_was_used_is_said_where_neighbours_are_missing(evaluate, tmp_path):
    """24 images in the bank, 6 of every class."""
    options = ("--pretrained_weights", micro(tmp_path), "--crop_size", 32, "--nb_knn", 5, 6, 24, 200)
    code, said, error = evaluate(*options)
    assert code == 0, error
    result = json.loads((tmp_path / "out" / "eval_knn.json").read_text())["numbers"]
    assert result["bank"] == {"images": 24, "classes": 4, "largest_class": 6}
    assert [result[k].get("neighbours") for k in ("5", "6", "24", "200")] == [None, None, None, 24]
    assert "5, 6, 24, 200 neighbours in a bank of 24 images, 4 classes, the largest of 6 images\n" in said
    assert said.count("k = 6: no class of the bank has more than 6 images") == 1
    assert said.count("k = 24, 200: all 24 images of the bank vote") == 1
    lines = [line.split("-NN classifier result: ") for line in said.splitlines() if "classifier result" in line]
    ends = [f"Top1: {result[k]['top1']}, Top5: {result[k]['top5']} (95 %: 100.00 to 100.00)" for k, _ in lines]
    assert [text for _, text in lines] == [*ends[:3], ends[3] + " (24 neighbours: all there are)"]


# ---- images that cannot be read -------------------------------------------------------------------------------------


@pytest.fixture
def broken(evaluate, monkeypatch):
    """``evaluate``, on stripes of which some cannot be read."""

    def run(*arguments: object, train: tuple[int, ...] = (), test: tuple[int, ...] = ()) -> tuple[int, str, str]:
        def opened(path, subset=None, split="train", start=0):
            source = MendedInPlace(seed=int(split != "train"), bad=train if split == "train" else test)
            return SubsetSource(source, subset, start) if subset else source

        monkeypatch.setattr(sets, "open_source", opened)
        return evaluate(*arguments)

    return run


class MendedInPlace(Stripes):
    """The list of images is the same whichever of them can be read."""

    fingerprint = Source.fingerprint


def by_hand(path: Path, train: tuple[int, ...], test: tuple[int, ...], k: int) -> tuple[float, float]:
    """The accuracies of the images but ``train`` and ``test``."""
    model, alone = build_backbone("vit_micro", 8, img_size=32), World(0, 1, 0, torch.device("cpu"))
    model.load_state_dict({n[9:]: t for n, t in torch.load(path)["teacher"].items()})
    tensors = []
    for seed, bad in enumerate((train, test)):
        options = {"world": alone, "device": alone.device, "num_workers": 0}
        features, _ = extract_features(model, Stripes(seed=seed), eval_transform(32, 37), **options)
        kept = [index for index in range(24) if index not in bad]
        tensors += [features[kept], torch.from_numpy(Stripes().labels[kept])]
    return knn_classify(*tensors, [k])[k]


def test_unreadable_images_of_the_bank_are_left_out_and_test_images_refused_unless_skipped(broken, tmp_path):
    path, bad = micro(tmp_path), {"train": (0, 1, 7), "test": (3, 22)}
    options = ("--pretrained_weights", path, "--crop_size", 32, "--nb_knn", 3)
    code, said, error = broken(*options, **bad)
    assert code == 2 and error.count("\n") == 1 and "features of stripes 0" not in said  # before the bank is looked at
    assert "2 of its 24 test images" in error and "stripes/3.png: cut off in the middle; stripes/22.png" in error
    assert "--skip_unreadable" in error and not (tmp_path / "out" / "eval_knn.json").exists()
    code, said, error = broken(*options, "--skip_unreadable", "--baselines", **bad)
    assert code == 0, error
    result = json.loads((tmp_path / "out" / "eval_knn.json").read_text())
    assert result["unreadable"] == {"train": 3, "test": 2} and result["numbers"]["bank"]["images"] == 21
    assert tuple(result["numbers"]["3"].values()) == pytest.approx(by_hand(path, *bad.values(), 3))
    assert said.count("stripes/7.png") == said.count("stripes/22.png") == 1  # although they were looked at twice
    (line,) = [line for line in said.splitlines() if "3-NN classifier result" in line]
    assert line.endswith(" (unreadable: 3 training images, 2 test images)")
    for part, words in (("train", "stripes 0 "), ("test", "stripes 1 ")):
        code, _, error = broken(*options, "--skip_unreadable", **{part: tuple(range(24))})
        assert code == 2 and f"{words}(24" in error and "none of its images" in error


def test_a_subset_is_what_of_it_can_be_read(broken, tmp_path):
    options = ("--pretrained_weights", micro(tmp_path), "--crop_size", 32, "--nb_knn", 1, "--subset", 2)
    code, _, error = broken(*options, "--subset_starts", 0, 2, train=(1, 5, 9))  # of class 1, images 0, 1 and 2
    assert code == 0, error
    starts = json.loads((tmp_path / "out" / "eval_knn.json").read_text())["numbers"]["starts"]
    assert [starts[start]["bank"] for start in ("0", "2")] == [
        {"images": 6, "classes": 3, "largest_class": 2}, {"images": 7, "classes": 4, "largest_class": 2}
    ]  # fmt: skip


def test_kept_features_do_not_claim_images_without_a_row(broken, tmp_path):
    options = ("--pretrained_weights", micro(tmp_path), "--crop_size", 32, "--nb_knn", 3)
    keep, load = ("--dump_features", tmp_path / "kept"), ("--load_features", tmp_path / "kept")
    bad = {"train": (0, 7), "test": (3,)}
    code, said, error = broken(*options, *keep, "--skip_unreadable", **bad)
    assert code == 0, error
    rows = [len(torch.load(tmp_path / "kept" / f"{name}.pth")) for name in ("trainfeat", "trainlabels", "testfeat")]
    assert rows == [22, 22, 23]
    key = json.loads((tmp_path / "kept" / "features.json").read_text())
    assert key["unreadable"] == {"train": [0, 7], "test": [3]}
    result = lambda said: [line for line in said.splitlines() if "classifier result" in line]  # noqa: E731
    code, again, error = broken(*options, *load, "--skip_unreadable", **bad)
    assert code == 0 and result(again) == result(said) and "images/s" not in again, error
    assert "stripes/7.png: cut off" in again
    code, _, error = broken(*options, *load, **bad)
    assert code == 2 and "stripes/3.png: cut off" in error
    code, _, error = broken(*options, *load, "--skip_unreadable", train=(7,), test=(3,))  # one was mended
    assert code == 2 and "unreadable is {'train': [0, 7], 'test': [3]} there" in error and error.count("\n") == 1
    code, said, error = broken(*options, *keep)
    assert code == 0 and "not used, unreadable is" in said and "(unreadable" not in said, error
    assert "unreadable" not in json.loads((tmp_path / "kept" / "features.json").read_text())


def test_without_weights_it_says_loudly_that_they_are_random(evaluate, tmp_path):
    code, said, _ = evaluate("--arch", "vit_micro", "--patch_size", 16, "--crop_size", 32)
    assert code == 0 and "RANDOM WEIGHTS" in said
    assert json.loads((tmp_path / "out" / "eval_knn.json").read_text())["checkpoint"] is None


def test_baselines_make_a_table_of_the_same_images(evaluate, tmp_path):
    code, said, error = evaluate(
        "--pretrained_weights", micro(tmp_path), "--crop_size", 32, "--baselines", "--nb_knn", 3
    )
    assert code == 0, error
    rows = [
        line for line in said.splitlines() if line.startswith(("raw pixels", "colour hist", "untrained", "vit_micro"))
    ]
    assert [row.split()[0] for row in rows] == ["raw", "colour", "untrained", "vit_micro/8,"]
    numbers = json.loads((tmp_path / "out" / "eval_knn.json").read_text())["numbers"]
    assert float(rows[1].split()[-1]) == pytest.approx(numbers["baselines"]["colour histogram"]["3"]["top1"], abs=0.01)
    assert numbers["baselines"]["colour histogram"]["3"]["top1"] > 60


def test_kept_features_are_used_again_and_never_for_another_checkpoint(evaluate, tmp_path):
    first, second = micro(tmp_path, 3), micro(tmp_path, 4)
    keep = ("--crop_size", 32, "--nb_knn", 5, "--dump_features", tmp_path / "kept")
    result = lambda said: [line for line in said.splitlines() if "classifier result" in line]  # noqa: E731
    _, said, _ = evaluate("--pretrained_weights", first, *keep)
    assert "no features there yet" in said and "features written to" in said
    _, again, _ = evaluate("--pretrained_weights", first, *keep)
    assert "used, same network and images" in again and "images/s" not in again and result(again) == result(said)
    load = ("--crop_size", 32, "--nb_knn", 5, "--load_features", tmp_path / "kept")
    assert result(evaluate("--pretrained_weights", first, *load)[1]) == result(said)
    code, _, error = evaluate("--pretrained_weights", second, *load)
    assert code == 2 and "weights is" in error and "--dump_features" in error and error.count("\n") == 1
    code, _, error = evaluate("--pretrained_weights", first, "--load_features", tmp_path / "kept", "--crop_size", 40)
    assert code == 2 and "preprocessing is" in error
    _, other, _ = evaluate("--pretrained_weights", second, *keep)
    assert "not used, weights is" in other and "features written to" in other


def test_other_features_are_kept_under_their_own_name(evaluate, tmp_path):
    options = ("--pretrained_weights", micro(tmp_path), "--crop_size", 32, "--nb_knn", 5)
    keep = ("--dump_features", tmp_path / "kept")
    code, said, error = evaluate(*options, *keep, "--n_last_blocks", 2, "--avgpool_patchtokens", 2, "--baselines")
    assert code == 0 and "untrained" in said, error
    assert torch.load(tmp_path / "kept" / "trainfeat.pth").shape[1] == 3 * 128
    key = json.loads((tmp_path / "kept" / "features.json").read_text())
    assert key["feature"] == "class token of the last 2 blocks and mean patch token of the last, L2-normalised"
    code, _, error = evaluate(*options, "--load_features", tmp_path / "kept")
    assert code == 2 and "feature is" in error
    assert evaluate("--arch", "resnet18", "--crop_size", 32, "--nb_knn", 5)[0] == 0


def test_photographs_that_are_turned_have_features_of_their_own(evaluate, tmp_path, monkeypatch):
    monkeypatch.setattr(sets, "open_source", open_source)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("train/a", "train/b", "val/a", "val/b"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "1.png").write_bytes(encoded(photograph(ord(name[-1])), exif=exif))
    options = ("--arch", "vit_micro", "--data_path", tmp_path, "--crop_size", 32, "--nb_knn", 1)
    options += ("--dump_features", tmp_path / "kept")
    features = []
    for turned in ("false", "true"):
        code, said, error = evaluate(*options, "--exif", turned)
        assert code == 0 and "features written to" in said, error
        features.append(torch.load(tmp_path / "kept" / "trainfeat.pth"))
        data = json.loads((tmp_path / "out" / "eval_knn.json").read_text())["data"]
        assert data.count(", turned by EXIF") == (2 if turned == "true" else 0)
    assert not torch.allclose(*features)


def test_of_two_class_tokens_any_may_be_asked(evaluate, tmp_path):
    torch.save(build_backbone("vit_micro", 8, img_size=32, num_class_tokens=2).state_dict(), tmp_path / "two.pth")
    options, kept = ("--pretrained_weights", tmp_path / "two.pth", "--crop_size", 32, "--nb_knn", 5), {}
    for token in ("cls", "cls+", "both"):
        code, _, error = evaluate(*options, "--class_token", token, "--dump_features", tmp_path / token)
        assert code == 0, error
        kept[token] = torch.load(tmp_path / token / "trainfeat.pth")
    parts = [F.normalize(part, dim=1) for part in kept["both"].split(128, dim=1)]
    torch.testing.assert_close(parts, [kept["cls"], kept["cls+"]])
    assert not torch.allclose(*parts)
    keys = [json.loads((tmp_path / token / "features.json").read_text())["feature"] for token in kept]
    assert keys[0] == "class token of the last block, L2-normalised" and len(set(keys)) == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--pretrained_weights", "no/where.pth"], ["no/where.pth", "no such file"]),
        (["--pretrained_weights", "README.md"], ["README.md"]),
        (["--data_path", "no/where"], ["--data_path", "no/where", "does not exist"]),
        (["--nb_knn", "0"], ["--nb_knn 0"]),
        (["--subset", "0"], ["--subset 0"]),
        (["--subset_starts", "5"], ["--subset_starts", "pass --subset too"]),
        (["--subset", "1", "--subset_starts", "0", "-1"], ["--subset_starts -1"]),
        (["--backend", "nccl"], ["--backend nccl"]),
        (["--temperature", "0"], ["--temperature 0"]),
        (["--crop_size", "8"], ["--crop_size 8", "patch"]),
        (["--crop_size", "64", "--resize_size", "32"], ["--resize_size 32"]),
        (["--max_image_pixels", "0"], ["--max_image_pixels: 0"]),
        (["--batch_size_per_gpu", "0"], ["--batch_size_per_gpu 0"]),
        (["--num_workers", "-1"], ["--num_workers -1"]),
        (["--patch_size", "15"], ["--patch_size 15"]),
        (["--arch", "vit_smal"], ["vit_smal", "did you mean vit_small"]),
        (["--class_token", "cls+"], ["--class_token cls+: vit_micro/16 has no second class token"]),
        (["--class_token", "both", "--avgpool_patchtokens", "1"], ["--class_token both"]),
        (["--arch", "resnet18", "--class_token", "both"], ["--class_token both: resnet18 has no"]),
        (["--class_token", "both", "--avgpool_patchtokens", "true"], ["--class_token both", "interleaved", "cls+"]),
        (["--class_token", "second"], ["--class_token", "'second'"]),
        (["--arch", "resnet18", "--n_last_blocks", "2"], ["resnet18", "--n_last_blocks 1"]),
        (["--load_features", "/no/features"], ["/no/features", "no features there"]),
        (["--nb_knm", "3"], ["--nb_knm", "did you mean --nb_knn"]),
        (["--device", "cuda"], ["cuda"]),
        (["--output_dir", "/proc/nothing"], ["/proc/nothing"]),
    ],
)
def test_bad_options_end_in_one_line_and_exit_code_two(evaluate, arguments, words):
    code, said, error = evaluate("--arch", "vit_micro", *arguments)
    assert code == 2 and error.count("\n") == 1, (said, error)
    assert all(word in error for word in words), error


def test_a_network_whose_features_are_not_numbers_is_refused(evaluate, tmp_path):
    path = micro(tmp_path)
    file = torch.load(path)
    file["teacher"]["backbone.norm.weight"][:] = 3e38  # weights are numbers, what they make is none
    torch.save(file, path)
    code, _, error = evaluate("--pretrained_weights", path, "--crop_size", 32)
    assert code == 2 and "not finite" in error
