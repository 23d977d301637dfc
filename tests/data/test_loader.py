import os
import pickle
import signal
import subprocess
import time

import numpy as np
import pytest
import torch
from torchvision import transforms

from data.datasets import BadImage, Source, open_source
from data.device import normalise, to_device_ahead
from data.loader import MAX_ATTEMPTS, TrainLoader, stack, steps_per_epoch
from data.preprocess import MEAN, STD
from data.views import MultiCropViews
from randomness import Permutation
from simulation.gpu import DEVICE, fake_gpu
from tests.data.helpers import encoded, one_process, photograph, write_folder
from utils import UsageError

SIZES = {"global_crops_size": 16, "local_crops": [(1, 8)]}


class Photographs(Source):
    """Generated images, of which some cannot be read."""

    def __init__(self, count: int, bad: tuple[int, ...] = ()):
        self.count, self.bad, self.name = count, bad, f"{count} generated images"
        self.labels, self.class_names = np.full(count, -1), []

    def array(self, index: int) -> np.ndarray:
        if index in self.bad:
            raise BadImage(f"image{index}", "it is bad")
        return photograph(index, 20, 24)


@pytest.fixture(autouse=True)
def processors(monkeypatch):
    monkeypatch.setattr("data.loader.usable_cpus", lambda: 4)


def make_loader(source=None, *, rank=0, size=1, augment="fast", **options) -> TrainLoader:
    options = {"batch_size": 4, "pieces": 1, "seed": 3, "epochs": 2, "num_workers": 0, **options}
    views = MultiCropViews(**SIZES, augment=augment)
    return TrainLoader(source or Photographs(18), views, world=one_process(rank, size), **options)


def samples(*loaders: TrainLoader) -> list[tuple]:
    """(index, first bytes of every crop) sample by sample in the order of the global batches."""
    result = []
    for pieces in zip(*map(in_steps, loaders), strict=True):
        for piece in sorted((piece for step in pieces for piece in step), key=lambda piece: piece["first_sample"]):
            for number, index in enumerate(piece["indices"].tolist()):
                result.append((index, tuple(crop[number].numpy().tobytes() for crop in piece["crops"])))
    return result


def in_steps(loader: TrainLoader):
    pieces = list(loader)
    assert len(pieces) == len(loader)
    return [pieces[i : i + loader.pieces] for i in range(0, len(pieces), loader.pieces)]


# ---- order and randomness -------------------------------------------------------------------------------------------


def test_an_epoch_is_the_permutation_of_its_seed_in_batches():
    pieces = list(make_loader())
    for epoch in range(2):
        order = Permutation(18, 3, epoch)[np.arange(18)]
        indices = torch.cat([piece["indices"] for piece in pieces[4 * epoch : 4 * epoch + 4]])
        assert indices.tolist() == order[:16].tolist()  # the last two are left out
    assert [tuple(crop.shape) for crop in pieces[0]["crops"]] == [(4, 3, 16, 16)] * 2 + [(4, 3, 8, 8)]
    assert all(crop.dtype == torch.uint8 for crop in pieces[0]["crops"])
    assert pieces[0]["indices"].dtype == torch.int64 and pieces[0]["first_sample"] == 0 and pieces[0]["bad"] == []


def test_the_last_images_may_be_a_smaller_batch_of_which_a_process_has_none():
    whole = make_loader(drop_last=False)
    assert whole.niter == 5 and len(list(whole)) == len(whole) == 10
    shares = [[p["indices"].tolist() for p in make_loader(size=2, rank=r, drop_last=False, epochs=1)] for r in (0, 1)]
    assert [len(share) for share in shares[0]] == [4, 4, 2] and [len(share) for share in shares[1]] == [4, 4, 0]
    order = Permutation(18, 3, 0)[np.arange(18)].tolist()
    assert [i for parts in zip(*shares, strict=True) for part in parts for i in part] == order
    empty = list(make_loader(size=2, rank=1, drop_last=False, epochs=1))[-1]
    assert empty["indices"].dtype == torch.int64 and "crops" not in empty
    assert next(iter(to_device_ahead([empty], torch.device("cpu"))))["indices"].shape == (0,)


@pytest.mark.parametrize("augment", ["fast", "pil"])
def test_workers_processes_and_pieces_change_no_bit(augment):
    reference = samples(make_loader(augment=augment))
    assert len(reference) == 32 and len(set(reference)) == 32
    for workers in (1, 2):
        assert samples(make_loader(augment=augment, num_workers=workers)) == reference
    assert samples(make_loader(augment=augment, pieces=2, num_workers=2)) == reference
    for size in (2, 4):
        ranks = [make_loader(augment=augment, rank=r, size=size, batch_size=4 // size) for r in range(size)]
        assert samples(*ranks) == reference
    ranks = [make_loader(augment=augment, rank=r, size=2, batch_size=2, pieces=2) for r in range(2)]
    assert samples(*ranks) == reference


@pytest.mark.parametrize("start", [(0, 0), (0, 3), (1, 0), (1, 3), (0, 4)])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_sees_what_was_left(start, workers):
    whole = samples(make_loader())
    rest = samples(make_loader(start_epoch=start[0], start_step=start[1], num_workers=workers))
    assert rest == whole[(start[0] * 4 + start[1]) * 4 :]


def test_a_single_piece_can_be_made_again():
    loader = make_loader(rank=1, size=2, batch_size=4, pieces=2, num_workers=2)
    pieces = list(loader)
    assert len(pieces) == 8
    again = loader.piece(epoch=1, step=1, piece=1)
    assert again["first_sample"] == 6
    assert torch.equal(again["indices"], pieces[7]["indices"])
    assert all(torch.equal(a, b) for a, b in zip(again["crops"], pieces[7]["crops"], strict=True))


def test_the_seed_changes_order_and_crops():
    a, b = samples(make_loader()), samples(make_loader(seed=4))
    assert [index for index, _ in a] != [index for index, _ in b]
    crops = dict(a[:16])
    assert all(crops[index] != crop for index, crop in b[:16] if index in crops)


def test_the_global_generators_are_left_alone():
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    list(make_loader(num_workers=1))
    list(make_loader(augment="pil"))
    assert torch.equal(torch.rand(2), expected)


def test_a_real_folder_gives_the_same_through_workers(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = write_folder(tmp_path / "train", [f"{c}/{i}.jpg" for c in "ab" for i in range(4)])
    source = open_source(str(root))
    reference = samples(make_loader(source))
    assert samples(make_loader(source, num_workers=2)) == reference
    assert samples(make_loader(pickle.loads(pickle.dumps(source)))) == reference


def test_training_keeps_its_threads():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        list(make_loader())
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_workers_may_be_started_by_any_method_since_all_they_get_can_be_pickled():
    loader = make_loader()
    key = loader.key(Permutation(18, 3, 0), epoch=0, step=1, piece=0)
    piece, copied = loader.dataset[key], pickle.loads(pickle.dumps(loader.dataset))[key]
    assert all(torch.equal(a, b) for a, b in zip(piece["crops"], copied["crops"], strict=True))


# ---- bad images -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_are_replaced_alike_everywhere_and_named(workers):
    bad = (2, 5, 11)
    reference = make_loader(Photographs(18, bad))
    expected = samples(reference)
    assert samples(make_loader(Photographs(18, bad), num_workers=workers, pieces=2)) == expected
    ranks = [make_loader(Photographs(18, bad), rank=r, size=2, batch_size=2) for r in range(2)]
    assert samples(*ranks) == expected
    assert not {index for index, _ in expected} & set(bad)
    reported = [entry for piece in make_loader(Photographs(18, bad), num_workers=workers) for entry in piece["bad"]]
    assert {f"image{index}" for index in bad} == {name for name, _ in reported}
    assert {reason for _, reason in reported} == {"it is bad"} and all(type(entry) is tuple for entry in reported)


def test_an_epoch_counts_every_unreadable_image_once_however_often_it_is_tried():
    """The replacement may be unreadable too, and is, in its own turn: attempts are more than images."""
    bad = tuple(range(12))
    pieces = list(make_loader(Photographs(18, bad), epochs=1, batch_size=3))
    assert sum(piece["replaced"] for piece in pieces) == 12 < sum(len(piece["bad"]) for piece in pieces)


def test_a_replacement_has_other_crops_than_in_its_own_turn():
    all_samples = samples(make_loader(Photographs(18, (2, 5, 11)), epochs=1))
    indices = [index for index, _ in all_samples]
    assert len(set(indices)) < len(indices)  # some image stands for another one
    assert len({crop for _, crop in all_samples}) == len(all_samples)


def test_damaged_files_are_replaced_and_reported_with_their_path(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = write_folder(tmp_path / "train", [f"{i}.png" for i in range(8)])
    (root / "1.png").write_bytes(b"")
    (root / "2.jpg").write_bytes(encoded(photograph(0), "JPEG")[:500])
    (root / "3.png").write_text("text")
    for augment in ("fast", "pil"):
        loader = make_loader(open_source(str(root)), batch_size=9, epochs=1, num_workers=1, augment=augment)
        (piece,) = loader
        reasons = dict(piece["bad"])
        assert set(reasons) == {str(root / name) for name in ("1.png", "2.jpg", "3.png")}
        assert reasons[str(root / "1.png")] == "the file is empty"
        assert piece["crops"][0].shape[0] == 9


@pytest.mark.parametrize("workers", [0, 1])
def test_when_no_image_can_be_read_it_ends_with_a_sentence(workers):
    loader = make_loader(Photographs(6, tuple(range(6))), num_workers=workers)
    with pytest.raises(UsageError) as caught:
        list(loader)
    assert f"none of {MAX_ATTEMPTS} images could be read" in str(caught.value)
    assert "it is bad" in str(caught.value) and "\n" not in str(caught.value)


# ---- what can go wrong ----------------------------------------------------------------------------------------------


def test_a_batch_larger_than_the_data_names_both_numbers():
    with pytest.raises(UsageError, match=r"--batch_size_per_gpu: a batch of 32 images .* data set of 18"):
        make_loader(batch_size=8, size=4)
    assert steps_per_epoch(18, 18) == 1 and steps_per_epoch(18, 5) == 3


def test_a_batch_that_pieces_do_not_divide_is_refused():
    with pytest.raises(UsageError, match="4 images cannot be divided into 3"):
        make_loader(pieces=3)


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"pieces": 0}, {"num_workers": -1}])
def test_impossible_numbers_are_refused(options):
    with pytest.raises(UsageError, match="at least"):
        make_loader(**options)


def test_more_workers_than_processors_are_not_started(monkeypatch, caplog):
    monkeypatch.setattr("data.loader.usable_cpus", lambda: 1)
    caplog.set_level("INFO", "tutelage")
    assert make_loader(num_workers=10).num_workers == 1
    assert "1 data workers instead of 10" in caplog.text
    assert make_loader(num_workers=0).num_workers == 0


def workers_of_this_process() -> list[int]:
    import multiprocessing

    return [process.pid for process in multiprocessing.active_children()]


def test_a_killed_worker_gives_a_sentence_where_the_next_piece_is_awaited():
    iterator = iter(make_loader(num_workers=2, epochs=1000))
    next(iterator)
    os.kill(workers_of_this_process()[0], signal.SIGKILL)
    time.sleep(0.2)  # nothing is raised here, where a step may be half done
    with pytest.raises(UsageError, match=r"a data worker died \(SIGKILL\).*lower --num_workers 2"):
        list(iterator)
    assert workers_of_this_process() == []


def test_signals_for_the_run_do_not_end_its_workers():
    iterator = iter(make_loader(num_workers=1, epochs=3))
    next(iterator)
    (worker,) = workers_of_this_process()
    for name in ("USR1", "TERM"):  # sent by another process, as a cluster's scheduler would
        subprocess.run(["kill", f"-{name}", str(worker)], check=True)
    time.sleep(0.2)
    assert len(list(iterator)) == 11
    assert workers_of_this_process() == []  # and they end when the run does


def test_workers_end_when_the_iteration_is_abandoned():
    iterator = iter(make_loader(num_workers=2, epochs=1000))
    next(iterator)
    assert len(workers_of_this_process()) == 2
    started = time.time()
    del iterator
    assert workers_of_this_process() == [] and time.time() - started < 4


def test_a_mistake_in_a_recipe_shows_its_own_traceback():
    class Broken(MultiCropViews):
        def __call__(self, image, key):
            raise RuntimeError("a mistake in the recipe")

    loader = TrainLoader(
        Photographs(8), Broken(**SIZES), batch_size=4, world=one_process(), seed=0, epochs=1, num_workers=1
    )
    with pytest.raises(RuntimeError, match="a mistake in the recipe"):
        list(loader)


# ---- stacking and the device ----------------------------------------------------------------------------------------


def test_whatever_views_return_is_stacked():
    crops = [torch.zeros(3, 4, 4), torch.ones(3, 2, 2)]
    stacked = stack([{"crops": crops, "mask": torch.tensor(True), "weak": False, "n": (1, 2.5)}] * 2)
    assert [tuple(crop.shape) for crop in stacked["crops"]] == [(2, 3, 4, 4), (2, 3, 2, 2)]
    assert stacked["mask"].tolist() == [True, True] and stacked["weak"].tolist() == [False, False]
    assert [column.tolist() for column in stacked["n"]] == [[1, 1], [2.5, 2.5]]


def test_images_are_normalised_bit_for_bit_as_totensor_and_normalize_do():
    image = photograph(0)
    expected = transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])(image)
    batch = torch.from_numpy(image).permute(2, 0, 1)[None]
    assert torch.equal(normalise(batch)[0], expected)
    assert torch.equal(normalise(batch, torch.bfloat16)[0], expected.bfloat16())
    double = normalise(batch, torch.float64)
    assert double.dtype == torch.float64
    mean, std = (torch.tensor(value, dtype=torch.float64).view(3, 1, 1) for value in (MEAN, STD))
    assert torch.equal(double, (batch.double() / 255 - mean) / std)
    assert batch.dtype == torch.uint8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_pieces_arrive_on_the_device_in_order_with_images_normalised(dtype):
    pieces = list(make_loader(num_workers=1))
    arrived = list(to_device_ahead(iter(pieces), torch.device("cpu"), dtype))
    assert len(arrived) == len(pieces)
    for piece, on_device in zip(pieces, arrived, strict=True):
        assert torch.equal(piece["indices"], on_device["indices"]) and on_device["bad"] == []
        assert on_device["first_sample"] == piece["first_sample"]
        for before, after in zip(piece["crops"], on_device["crops"], strict=True):
            assert after.dtype == dtype and torch.equal(after, normalise(before, dtype))


def test_only_images_are_normalised():
    piece = {
        "mask": torch.ones(2, 3, dtype=torch.bool),
        "maps": torch.ones(2, 3, 4, 4),
        "few": torch.ones(2, 3, dtype=torch.uint8),
        "name": "x",
    }
    (arrived,) = to_device_ahead([piece], torch.device("cpu"), torch.float64)
    assert all(value is arrived[name] or torch.equal(value, arrived[name]) for name, value in piece.items())
    assert arrived["maps"].dtype == torch.float32 and arrived["few"].dtype == torch.uint8


def test_on_a_gpu_every_tensor_of_a_piece_is_known_to_the_stream_that_uses_it(monkeypatch):
    """The copies of the next piece run beside the step: memory of the present one must not be given to them."""
    events = []

    class Stream:
        def __init__(self, name="side"):
            self.name = name

        def wait_stream(self, other):
            events.append(f"{self.name} waits for {other.name}")

        def __enter__(self):
            events.append("side begins")

        def __exit__(self, *_):
            events.append("side ends")

    main, known = Stream("main"), []
    with fake_gpu():
        image = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
        pieces = [{"crops": [image, image], "places": {"a": torch.ones(2), "b": [torch.ones(1)]}, "bad": []}] * 2
        monkeypatch.setattr("torch.cuda.Stream", lambda device: Stream())
        monkeypatch.setattr("torch.cuda.current_stream", lambda device: main)
        monkeypatch.setattr("torch.cuda.stream", lambda stream: stream)
        monkeypatch.setattr("torch.Tensor.record_stream", lambda tensor, stream: known.append((tensor, stream)))
        arriving = to_device_ahead(iter(pieces), DEVICE)
        first = next(arriving)
        ahead = ["side begins", "side ends"]
        assert events == [*ahead, *ahead, "main waits for side", *ahead]  # constants, this piece, the next one
        tensors = [*first["crops"], first["places"]["a"], first["places"]["b"][0]]
        assert all(any(tensor is t and stream is main for t, stream in known) for tensor in tensors)
        assert len(known) == len(tensors)  # the next piece is not in use yet
        arriving.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_crops_that_are_normalised_already_only_change_their_type(dtype):
    crop = torch.randn(2, 3, 4, 4)
    (arrived,) = to_device_ahead([{"crops": [crop]}], torch.device("cpu"), dtype)
    assert arrived["crops"][0].dtype == dtype and torch.equal(arrived["crops"][0], crop.to(dtype))
