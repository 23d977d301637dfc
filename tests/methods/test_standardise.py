import pytest
import torch

from methods.standardise import Standardisation
from models.teacher_space import EPS, unstandardised

WIDTHS = {"b": 3, "a": 2}


def features(batch: int = 6, seed: int = 0, mean: float = 0.0) -> dict[str, tuple]:
    torch.manual_seed(seed)
    made = {name: (torch.randn(batch, d), torch.randn(batch, 4, d)) for name, d in WIDTHS.items()}
    return {name: tuple(mean + (1 + x.double()) * 0.1 for x in pair) for name, pair in made.items()}


def part(of: dict[str, tuple], at: slice) -> dict[str, tuple]:
    return {name: tuple(x[at] for x in pair) for name, pair in of.items()}


def stored(statistics: Standardisation) -> dict:
    return statistics.to_file(statistics.state_dict())


def test_statistics_are_those_of_all_rows_of_a_step_and_pieces_see_the_old_ones():
    statistics, whole = Standardisation(WIDTHS).double(), features()
    for at in (slice(0, 1), slice(1, 6)):
        piece = part(whole, at)
        standardised = statistics(piece)
        torch.testing.assert_close(standardised["a"][0], piece["a"][0] / (1 + EPS))
        statistics.collect(standardised)
    statistics.commit(0.25, None)
    for name, pair in whole.items():
        for kind, x in zip(("cls", "patch"), pair, strict=True):
            rows, found = x.flatten(0, -2), stored(statistics)[name][kind]
            torch.testing.assert_close(found["mean"].flatten(), 0.25 * rows.mean(dim=0))
            torch.testing.assert_close(found["std"].flatten(), 0.75 + 0.25 * (rows.std(dim=0) + EPS))


def test_a_mean_far_larger_than_its_spread_costs_no_precision():
    statistics = Standardisation(WIDTHS)  # single precision
    for seed in range(4):
        far = {n: tuple(x.float() for x in pair) for n, pair in features(400, seed, mean=100.0).items()}
        statistics.collect(statistics(far))
        statistics.commit(1.0, None)
    expected = far["b"][1].double().flatten(0, -2).std(dim=0)
    torch.testing.assert_close(stored(statistics)["b"]["patch"]["std"].flatten().double(), expected, rtol=1e-3, atol=0)


def test_a_skipped_step_is_forgotten():
    statistics = Standardisation(WIDTHS).double()
    statistics.collect({name: tuple(x * float("nan") for x in pair) for name, pair in features().items()})
    statistics.commit(1.0, torch.tensor(0.0))
    assert torch.equal(statistics.mean, torch.zeros(10).double()) and torch.equal(
        statistics.std, torch.ones(10).double()
    )
    assert statistics.drift == 0
    statistics.collect(statistics(features()))
    statistics.commit(1.0, torch.tensor(1.0))
    torch.testing.assert_close(stored(statistics)["a"]["cls"]["mean"][0], features()["a"][0].mean(dim=0))
    assert statistics.drift > 0


def test_what_was_standardised_goes_back():
    statistics, given = Standardisation(WIDTHS).double(), features()
    statistics.collect(statistics(given))
    statistics.commit(1.0, None)
    for name, pair in statistics(given).items():
        for kind, y, x in zip(("cls", "patch"), pair, given[name], strict=True):
            torch.testing.assert_close(unstandardised(y, **stored(statistics)[name][kind]), x)


def test_files_have_the_originals_names_and_shapes():
    statistics = Standardisation(WIDTHS).double()
    statistics.collect(statistics(features()))
    statistics.commit(1.0, None)
    nested = stored(statistics)
    shapes = {kind: {name: tuple(v.shape) for name, v in values.items()} for kind, values in nested["b"].items()}
    assert list(nested) == ["a", "b"]
    assert shapes == {"cls": {"mean": (1, 3), "std": (1, 3)}, "patch": {"mean": (1, 1, 3), "std": (1, 1, 3)}}
    other = Standardisation(WIDTHS).double()
    other.load_state_dict(other.from_file(nested))
    assert torch.equal(other.mean, statistics.mean) and torch.equal(other.std, statistics.std)
    with pytest.raises(ValueError, match="its statistics are of a, b, the teachers are a, c"):
        Standardisation({"a": 2, "c": 3}).from_file(nested)
