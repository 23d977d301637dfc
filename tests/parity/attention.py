"""Runners: pictures of attention."""

from collections.abc import Iterator

from evaluation.attention import enlarge, keep_mass, patch_maps
from tests.parity import Case


def attention_threshold(case: Case) -> Iterator[tuple]:
    attention, patch_size = case.tensor("in/attention"), case.params["patch_size"]
    rows, columns = (size // patch_size for size in case.arrays["out/heatmap"].shape[-2:])
    (maps,) = patch_maps(attention, attention.shape[-1] - rows * columns, rows, columns)
    yield "out/heatmap", enlarge(maps, patch_size), case.arrays["out/heatmap"]
    yield "out/mask", enlarge(keep_mass(maps, case.params["threshold"]), patch_size), case.arrays["out/mask"]


RUNNERS = {"eval_core/attention_threshold": attention_threshold}
