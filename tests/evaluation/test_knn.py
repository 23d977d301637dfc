"""The k-NN classifier against its plain form and over processes, and what a network has to beat."""

import os
import socket
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from evaluation.baselines import colour_histogram, raw_pixels
from evaluation.knn import (
    Bank,
    as_numbers,
    doubts,
    knn_classify,
    nearest_neighbours,
    rank_of_class,
    remark_on_k,
    runs_as_numbers,
    table,
)
from tests.launch import ROOT

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


# ---- what there is to vote -------------------------------------------------------------------------------------------


def test_more_neighbours_than_there_are_is_said_in_plain_words():
    bank = Bank.of(torch.tensor([0, 0, 0, 3, 3, 5]))
    assert bank == (6, 3, 3) and str(bank) == "6 images, 3 classes, the largest of 3 images"
    assert doubts([1, 2], bank) == []
    many, whole = doubts([2, 3, 5, 6, 200], bank)
    assert many.startswith("k = 3, 5: no class of the bank has more than 3 images") and "--nb_knn" in many
    assert whole.startswith("k = 6, 200: all 6 images of the bank vote for every test image")
    (one,) = doubts([1, 9], Bank.of(torch.tensor([4, 4])))
    assert "one class" in one
    assert [remark_on_k(k, bank) for k in (5, 6, 7)] == ["", "", " (6 neighbours: all there are)"]


def test_numbers_say_which_bank_they_are_of_and_where_neighbours_were_missing():
    small, large = Bank(6, 3, 3), Bank(8, 3, 4)
    assert as_numbers({1: (50.0, 50.0), 7: (20.0, 60.0)}, small) == {
        "1": {"top1": 50.0}, "7": {"top1": 20.0, "top5": 60.0, "neighbours": 6}
    }  # fmt: skip
    runs = {0: {7: (20.0, 60.0)}, 4: {7: (40.0, 60.0)}}
    numbers = runs_as_numbers(runs, {0: small, 4: large})
    assert numbers["7"]["top1"] == pytest.approx(30) and numbers["7"]["neighbours"] == 6
    assert numbers["starts"]["4"] == {
        "7": {"top1": 40.0, "top5": 60.0}, "bank": {"images": 8, "classes": 3, "largest_class": 4}
    }  # fmt: skip
    assert runs_as_numbers({4: runs[4]}, {4: large}) == numbers["starts"]["4"]


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


# ---- several processes ----------------------------------------------------------------------------------------------

TWO_RANKS = """
import sys, torch
from data.preprocess import eval_transform
from evaluation.knn import knn_classify
from evaluation.features import extract_features, labels_of
from evaluation.unreadable import readable
from models.vit import VisionTransformer
from tests.sources import Stripes
from utils import init_world, run_cli

torch.set_num_threads(1)
world = init_world("cpu")
torch.manual_seed(0)
model = VisionTransformer(embed_dim=12, depth=2, num_heads=3, patch_size=8, img_size=32)
options = dict(world=world, device=world.device, batch_size=4, num_workers=0)
sets = []
for source in (Stripes(3, 7, bad=(5, 8)), Stripes(3, 3, 1), Stripes(2, 3, bad=(1, 3, 5))):  # the last: none for rank 1
    features, unreadable = extract_features(model, source, eval_transform(32, 36), **options)
    labels = labels_of(source)[readable(len(source), unreadable)]
    sets.append((features, labels, [tuple(image) for image in unreadable]))
accuracies = knn_classify(*sets[0][:2], *sets[1][:2], [1, 5], world=world)
single, _ = extract_features(model, Stripes(1, 1), eval_transform(32, 36), **options)  # fewer images than processes
torch.save((sets, accuracies, single), f"{sys.argv[1]}.{world.rank}")
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
        for (ours, labels, bad), (theirs, their_labels, their_bad) in zip(rank[0], one[0], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
            assert torch.equal(labels, their_labels) and bad == their_bad
        assert rank[1] == one[1]
        torch.testing.assert_close(rank[2], one[2], rtol=1e-5, atol=1e-6)
        assert [[index for index, *_ in bad] for *_, bad in rank[0]] == [[5, 8], [], [1, 3, 5]]
