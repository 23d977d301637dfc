"""The k-NN classifier against its plain form, over processes, and as a script."""

import json
import os
import socket
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from data.datasets import SubsetSource
from eval_knn.eval_knn import (
    colour_histogram,
    knn_classify,
    main,
    nearest_neighbours,
    rank_of_class,
    raw_pixels,
    table,
)
from evaluation import network as evaluation
from models import build_backbone
from tests.sources import Stripes
from utils import run_cli

ROOT = Path(__file__).parents[2]

# ---- the classifier -------------------------------------------------------------------------------------------------


def plain_knn(train, train_labels, test, test_labels, k, temperature, classes) -> tuple[float, float]:
    """The definition, one test image at a time."""
    train, test = F.normalize(train, dim=1), F.normalize(test, dim=1)
    first = five = 0
    for query, label in zip(test, test_labels, strict=True):
        similarity = train @ query
        order = similarity.argsort(descending=True)[:k]
        votes = torch.zeros(classes, dtype=train.dtype)
        for neighbour in order:
            votes[train_labels[neighbour]] += (similarity[neighbour] / temperature).exp()
        ranked = votes.sort(descending=True, stable=True).indices[: min(5, k)].tolist()
        first, five = first + (ranked[0] == int(label)), five + (int(label) in ranked)
    return 100 * first / len(test), 100 * five / len(test)


def problem(train=60, test=23, dim=6, classes=9, dtype=torch.float64):
    generator = torch.Generator().manual_seed(train + test)
    centres = torch.randn(classes, dim, generator=generator, dtype=dtype)
    train_labels = torch.randint(classes, (train,), generator=generator)
    test_labels = torch.randint(classes, (test,), generator=generator)
    noise = [torch.randn(count, dim, generator=generator, dtype=dtype) for count in (train, test)]
    return centres[train_labels] + noise[0], train_labels, centres[test_labels] + noise[1], test_labels


@pytest.mark.parametrize(("train", "test"), [(60, 23), (60, 1), (3, 5), (1, 1), (200, 130)])
def test_it_equals_the_definition_for_any_number_of_images_and_neighbours(train, test):
    tensors = problem(train, test)
    ks = [1, 2, 5, 7, 40, 1000]
    found = knn_classify(*tensors, ks, temperature=0.1)
    assert list(found) == ks
    for k in ks:
        assert found[k] == pytest.approx(plain_knn(*tensors, k, 0.1, 9)), k


def test_pieces_of_the_bank_and_of_the_queries_change_nothing():
    tensors = problem(train=500, test=120, dtype=torch.float32)
    whole = knn_classify(*tensors, [1, 10, 50, 600])
    for working_bytes in (1, 5_000, 100_000):
        assert knn_classify(*tensors, [1, 10, 50, 600], working_bytes=working_bytes) == whole


def test_neighbours_found_in_pieces_are_those_of_the_whole_bank():
    bank, _, queries, _ = problem(train=333, test=20)
    similarities, indices = (F.normalize(queries, dim=1) @ F.normalize(bank, dim=1).T).topk(17)
    for working_bytes in (1, 8 * 20 * 30, 8 * 20 * 200, 2**30):
        found, where = nearest_neighbours(bank, queries, 17, working_bytes)
        torch.testing.assert_close(found, similarities)
        assert torch.equal(where, indices)


def test_the_working_set_does_not_grow_with_the_bank(monkeypatch):
    largest = 0
    topk = torch.Tensor.topk

    def watched(self, *args, **kwargs):
        nonlocal largest
        largest = max(largest, self.numel() * self.element_size())
        return topk(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "topk", watched)
    for train in (1000, 8000):
        knn_classify(*problem(train=train, test=64), [5], working_bytes=2**16)
        assert largest <= 2**16


def test_features_of_any_norm_and_a_very_low_temperature_work():
    train, train_labels, test, test_labels = problem()
    reference = knn_classify(train, train_labels, test, test_labels, [5])
    assert knn_classify(train * 7, train_labels, test * 1e-3, test_labels, [5]) == reference
    cold = knn_classify(train.float(), train_labels, test.float(), test_labels, [5], temperature=1e-4)
    assert cold[5][0] == knn_classify(train, train_labels, test, test_labels, [1])[1][0]


def test_top_five_counts_no_more_classes_than_neighbours():
    tensors = problem(train=400, test=200, classes=12)
    found = knn_classify(*tensors, [1, 3])
    assert found[1][0] == found[1][1]
    assert found[3] == pytest.approx(plain_knn(*tensors, 3, 0.07, 12))


def test_the_rank_of_a_class_breaks_ties_by_its_number():
    votes = torch.tensor([[1.0, 3.0, 3.0, 0.0]]).expand(4, 4)
    assert rank_of_class(votes, torch.arange(4)).tolist() == [2, 0, 1, 3]


def test_a_test_class_that_the_bank_lacks_is_simply_wrong():
    train, train_labels, test, test_labels = problem()
    right = knn_classify(train, train_labels, test, test_labels, [5])[5][0]
    assert right > 20
    assert knn_classify(train, train_labels, test, test_labels + 100, [5])[5][0] == 0


def test_an_empty_side_is_an_error():
    train, train_labels, test, test_labels = problem()
    with pytest.raises(ValueError, match="0 test images"):
        knn_classify(train, train_labels, test[:0], test_labels[:0], [5])


# ---- what a network has to beat -------------------------------------------------------------------------------------


def test_raw_pixels_are_means_over_areas():
    images = torch.randn(2, 3, 64, 64)
    assert torch.allclose(raw_pixels(images), F.avg_pool2d(images, 2).flatten(1), atol=1e-6)
    assert torch.equal(raw_pixels(images[..., :16, :16]), images[..., :16, :16].flatten(1))


def test_the_colour_histogram_counts_pixels_by_colour():
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    image = torch.zeros(3, 8, 8)
    image[:, :4] = torch.tensor([1.0, 0.3, 0.0]).view(3, 1, 1)
    histogram = colour_histogram(((image - mean) / std)[None])[0]
    assert histogram.nonzero().flatten().tolist() == [0, 3 * 16 + 1 * 4]
    assert histogram[0] == histogram[52] == 0.5


def test_the_table_is_aligned():
    lines = table(
        {"raw": {10: (1.0, 2.0), 20: (33.333, 50.0)}, "a longer name": {10: (100.0, 100.0), 20: (0.0, 0.0)}}, [10, 20]
    )
    first, second, third = lines.splitlines()
    assert first.split() == ["k=10", "k=20"] and len(first) == len(second) == len(third)
    assert second.split() == ["raw", "1.00", "33.33"] and third.endswith("100.00     0.00")


# ---- the script -----------------------------------------------------------------------------------------------------


@pytest.fixture
def evaluate(monkeypatch, tmp_path, capsys):
    """Run the script in this process on stripes: (exit code, standard output, standard error)."""
    monkeypatch.setattr(
        evaluation,
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
    path = micro(tmp_path, args={"global_crops_size": 32})
    code, said, error = evaluate("--pretrained_weights", path, "--nb_knn", 1, 5)
    assert code == 0, error
    assert "crop 32 of 32 pixels" in said and "matched 54 of 54" in said and "RANDOM" not in said
    (text,) = (tmp_path / "out" / "eval_knn.json").read_text().splitlines()
    result = json.loads(text)
    assert list(result) == ["evaluation", "checkpoint", "checkpoint_key", "arch", "data", "numbers"]
    assert (result["checkpoint"], result["checkpoint_key"], result["arch"]) == (str(path), "teacher", "vit_micro/8")
    top1, top5 = result["numbers"]["5"].values()
    assert f"5-NN classifier result: Top1: {top1}, Top5: {top5}\n" in said
    assert list(result["numbers"]["1"]) == ["top1"]  # the first of one neighbour is all there is
    assert f"1-NN classifier result: Top1: {result['numbers']['1']['top1']}\n" in said
    assert result["numbers"]["1"]["top1"] > 40  # four classes that differ in colour


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
        (["--data_path", "no/where"], ["--data_path no/where", "train/"]),
        (["--nb_knn", "0"], ["--nb_knn 0"]),
        (["--subset", "0"], ["--subset 0"]),
        (["--subset_starts", "5"], ["--subset_starts", "pass --subset too"]),
        (["--subset", "1", "--subset_starts", "0", "-1"], ["--subset_starts -1"]),
        (["--backend", "nccl"], ["--backend nccl"]),
        (["--temperature", "0"], ["--temperature 0"]),
        (["--crop_size", "8"], ["--crop_size 8", "patch"]),
        (["--crop_size", "64", "--resize_size", "32"], ["--resize_size 32"]),
        (["--batch_size_per_gpu", "0"], ["--batch_size_per_gpu 0"]),
        (["--num_workers", "-1"], ["--num_workers -1"]),
        (["--patch_size", "15"], ["--patch_size 15"]),
        (["--arch", "vit_smal"], ["vit_smal", "did you mean vit_small"]),
        (["--n_last_blocks", "9"], ["--n_last_blocks 9", "4 blocks"]),
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
    file["teacher"]["backbone.norm.weight"][:] = float("nan")
    torch.save(file, path)
    code, _, error = evaluate("--pretrained_weights", path, "--crop_size", 32)
    assert code == 2 and "not finite" in error


# ---- several processes ----------------------------------------------------------------------------------------------

TWO_RANKS = """
import sys, torch
from data.preprocess import eval_transform
from eval_knn.eval_knn import knn_classify
from evaluation.features import extract_features
from models.vit import VisionTransformer
from tests.sources import Stripes
from utils import UsageError, init_world, run_cli

torch.set_num_threads(1)
world = init_world("cpu")
torch.manual_seed(0)
model = VisionTransformer(embed_dim=12, depth=2, num_heads=3, patch_size=8, img_size=32)
options = dict(world=world, device=world.device, batch_size=4, num_workers=0)
sets = [extract_features(model, Stripes(3, n, seed), eval_transform(32, 36), **options) for n, seed in ((7, 0), (3, 1))]
accuracies = knn_classify(*sets[0], *sets[1], [1, 5], world=world)
single, _ = extract_features(model, Stripes(1, 1), eval_transform(32, 36), **options)  # fewer images than processes
try:
    extract_features(model, Stripes(3, 7, bad=(5,)), eval_transform(32, 36), **options)
except UsageError as error:
    problem = str(error)
torch.save((sets, accuracies, single, problem), f"{sys.argv[1]}.{world.rank}")
run_cli(lambda: 0)  # leaves the group of processes in an orderly way
"""


def test_two_processes_equal_one(tmp_path):
    script = tmp_path / "two_ranks.py"
    script.write_text(TWO_RANKS)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = ["--master_addr=127.0.0.1", f"--master_port={free.getsockname()[1]}"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", *address]
    for prefix, command in (("two", torchrun), ("one", [sys.executable])):
        done = subprocess.run(
            [*command, script, tmp_path / prefix], env=env, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
    one, *two = [torch.load(tmp_path / name) for name in ("one.0", "two.0", "two.1")]
    for rank in two:
        for (ours, labels), (theirs, their_labels) in zip(rank[0], one[0], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
            assert torch.equal(labels, their_labels)
        assert rank[1] == one[1]
        torch.testing.assert_close(rank[2], one[2], rtol=1e-5, atol=1e-6)
        assert rank[3] == one[3] and "stripes/5.png" in rank[3]  # both processes say so, and neither waits
