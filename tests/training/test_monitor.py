import json

import pytest
import torch

from methods.base import Clock
from tests.launch import tensorboard_of
from training.monitor import CLOCKS, Meter, Monitor, spoken
from utils import World


@pytest.fixture
def monitor(tmp_path):
    made = []

    def make(rank=0):
        made.append(Monitor(tmp_path, 2, 3, 1, 8, World(rank, rank + 1, 0, torch.device("cpu"))))
        return made[-1]

    yield make
    for each in made:
        each.close()


def record(m, epoch, values, health=None):
    for step, loss in enumerate(values):
        clock = Clock(epoch, epoch * 3 + step, lr=0.1, weight_decay=0.4)
        m.step({"loss": torch.tensor(loss)}, {"centre_norm": torch.tensor(1.0)}, clock, waited=0.0)


def test_log_txt_begins_with_the_keys_of_the_original(monitor, tmp_path):
    m = monitor()
    m.open(0, 0)
    record(m, 0, [1.0, 2.0, 3.0])
    m.note({"nmi": 0.25})
    numbers = {"10": {"top1": 50.0, "top5": 75.0, "neighbours": 7}}
    m.end_epoch(0, numbers, {"train": 1, "test": 0}, unreadable=3)
    m.close()
    line = json.loads((tmp_path / "log.txt").read_text())
    assert list(line)[:4] == ["train_loss", "train_lr", "train_wd", "epoch"]
    assert (line["train_loss"], line["epoch"], line["train_nmi"], line["train_unreadable"]) == (2.0, 0, 0.25, 3)
    assert not {f"train_{name}" for name in CLOCKS} & set(line), "what no two runs share is not written"
    assert line["k-NN"] == numbers and line["k-NN_unreadable"] == {"train": 1, "test": 0}
    tags = {tag for tag in tensorboard_of(tmp_path).Tags()["scalars"] if "knn" in tag}
    assert tags == {"epoch/knn10_top1", "epoch/knn10_top5"}
    assert line["train_wd"] == pytest.approx(0.4)


def test_skipped_steps_do_not_enter_the_average(monitor, tmp_path):
    m = monitor()
    m.open(0, 0)
    record(m, 0, [1.0, float("nan"), 3.0])
    assert m.end_epoch(0, {})["train_loss"] == 2.0


@pytest.mark.parametrize("last", ['{"train_loss": 2, "epoch": 1}\n', '{"train_loss": 2, "ep'], ids=["whole", "torn"])
def test_lines_of_epochs_that_will_be_repeated_are_removed(monitor, tmp_path, last):
    (tmp_path / "log.txt").write_text('{"train_loss": 1, "epoch": 0}\n' + last)
    monitor().open(1, 2)
    assert [json.loads(line)["epoch"] for line in (tmp_path / "log.txt").read_text().splitlines()] == [0]


def test_an_interrupted_epoch_has_the_average_of_a_whole_one(monitor, tmp_path):
    first, second = monitor(rank=1), monitor(rank=1)
    record(first, 0, [1.0, 2.0])
    second.load_state_dict(first.state_dict())
    record(second, 0, [6.0])
    assert second.end_epoch(0, {})["train_loss"] == 3.0


@pytest.mark.parametrize(
    ("saved", "total", "count"),
    [
        ([{"loss": [3.0, 2]}, {"loss": [5.0, 2]}], 5.0, 2),
        ([{"loss": [3.0, 2]}, {"loss": [5.0, 2]}, {"loss": [7.0, 2]}], 5.0, 2.0),
        ({"loss": [3.0, 2]}, 3.0, 2),
        ([], None, None),
    ],
    ids=["as many", "another number", "of the first alone, as once", "at an epoch's beginning"],
)
def test_every_process_goes_on_from_its_own_sums_or_from_the_mean_of_all(monitor, saved, total, count):
    second = monitor(rank=1)
    second.load_state_dict(saved)
    assert {name: (meter.total, meter.count) for name, meter in second.meters.items()} == (
        {"loss": (total, count)} if saved else {}
    )


def test_an_epoch_that_only_lacks_its_test_keeps_its_measures(monitor, tmp_path):
    first, second = monitor(rank=1), monitor(rank=1)
    record(first, 0, [1.0, 2.0, 3.0])
    first.note({"nmi": 0.25})
    second.load_state_dict(first.state_dict())
    line = second.end_epoch(0, {})
    assert (line["train_loss"], line["train_nmi"]) == (2.0, 0.25) and "k-NN" not in line


def test_tensorboard_shows_losses_schedules_health_and_speed(monitor, tmp_path):
    m = monitor()
    m.open(0, 0)
    record(m, 0, [1.0, 2.0, 3.0])
    m.note({"nmi": 0.25})
    m.end_epoch(0, {"10": {"top1": 50.0, "top5": 75.0}})
    m.close()
    tags = set(tensorboard_of(tmp_path).Tags()["scalars"])
    assert tags >= {"train/loss", "schedule/lr", "schedule/weight_decay", "schedule/momentum", "health/centre_norm"}
    assert tags >= {"speed/images_per_second", "speed/data_wait_share", "speed/max_memory_mb"}
    assert tags >= {"epoch/loss", "epoch/centre_norm", "epoch/nmi", "epoch/knn10_top1", "epoch/knn10_top5"}


def test_a_problem_is_said_once_per_epoch(monitor, tmp_path, caplog):
    m = monitor()
    for _ in range(3):
        m.warn({"flat loss": "the loss stays"})
    assert caplog.text.count("the loss stays") == 1


def test_health_is_not_judged_in_the_first_epochs_of_which_every_one_begins_uniform(tmp_path, caplog):
    m = Monitor(tmp_path, 4, 2, 1, 8, World(0, 1, 0, torch.device("cpu")), quiet_epochs=1)
    m.open(0, 0)
    for iteration in range(3):
        assert ("lie on a line" in caplog.text) == (iteration > 2)
        health = {"effective_rank": torch.tensor(1.0)}
        m.step({"loss": torch.tensor(1.0)}, health, Clock(iteration // 2, iteration), 0.0)
    m.end_epoch(1, {})
    assert caplog.text.count("lie on a line") == 1
    m.close()


def test_a_meter_shows_the_median_of_the_last_values_and_the_mean_of_all():
    meter = Meter()
    for value in range(100):
        meter.add(float(value))
    assert (meter.median, meter.mean) == (89.0, 49.5)


def test_the_first_steps_tell_once_how_long_the_run_will_take(tmp_path, caplog, monkeypatch):
    caplog.set_level("INFO", "tutelage")
    m = Monitor(tmp_path, 3, 20, 10, 8, World(0, 1, 0, torch.device("cpu")))
    m.open(0, 0)
    now = iter(range(0, 100_000, 36))  # every step takes 36 seconds
    monkeypatch.setattr("training.monitor.time.perf_counter", lambda: float(next(now)))
    m.begin_epoch()
    for iteration in range(40):
        m.step({"loss": torch.tensor(1.0)}, {}, Clock(iteration // 20, iteration), waited=0.0)
    m.close()
    said = [record.getMessage() for record in caplog.records if "to go" in record.getMessage()]
    assert said == ["about 29 minutes to go: 49 steps of 36.00 s on this machine, tests not counted"]


@pytest.mark.parametrize(
    ("seconds", "words"), [(40, "40 seconds"), (100, "1.7 minutes"), (7200, "2.0 hours"), (200_000, "2.3 days")]
)
def test_times_are_said_in_the_unit_of_people(seconds, words):
    assert spoken(seconds) == words
