"""Runners: which patches are hidden."""

import math
import random
import re
from collections.abc import Iterator

import numpy as np
import torch

from methods.attmask import hint_counts
from methods.masking import MaskedViews, MaskRatio, attention_mask, draw_hints, hidden_ranks
from tests.parity import Case


class NoCrops:
    """Views without crops: all that is wanted here are their masks."""

    augment = "fast"

    def __call__(self, image, key) -> dict:
        return {}


def _list(value) -> list:
    return value if isinstance(value, list) else [value]


def _ratio(config: dict, start_epoch: int = 0) -> MaskRatio:
    return MaskRatio(_list(config["pred_ratio"]), _list(config["pred_ratio_var"]), start_epoch)


def masks_seeded(case: Case) -> Iterator[tuple]:
    """Block masks draw from ``random``, random ones from numpy's generator, one crop after the other."""
    generators: dict[str, tuple] = {}
    for label in case.names("out/"):
        config, seed, _ = label.removeprefix("out/").split("_")
        settings, expected = case.value(config), case.arrays[label]
        key = f"{config} {seed}"
        if key not in generators:
            number = int(seed.removeprefix("seed"))
            generators[key] = random.Random(number), np.random.RandomState(number).shuffle
        views = MaskedViews(NoCrops(), 1, expected.shape, settings["pred_shape"], _ratio(settings))
        yield label, views.mask(0, *generators[key]), expected


def masks_statistics(case: Case) -> Iterator[tuple]:
    for label in [name for name in case.entry["inputs"] if name.startswith("config")]:
        config = case.value(label)
        rows, columns = config["grid"]
        views = MaskedViews(NoCrops(), 1, (rows, columns), config.get("pred_shape", "block"), _ratio(config))
        masks = torch.stack([views(None, (0, 0, i))["masks"][0] for i in range(case.params["samples"])]).double()
        fraction = masks.mean(dim=(1, 2))
        expected = case.value(f"{label}_stats")
        computed = {
            "mean_fraction": fraction.mean(),
            "std_fraction": fraction.std(),
            "p_empty": (fraction == 0).double().mean(),
            "horizontal_pair_fraction": (masks[:, :, 1:] * masks[:, :, :-1]).mean(),
            "vertical_pair_fraction": (masks[:, 1:] * masks[:, :-1]).mean(),
            "center_cell": masks[:, rows // 2, columns // 2].mean(),
            "corner_cell": masks[:, 0, 0].mean(),
        }
        for name, value in computed.items():
            if name in expected:
                yield f"{label}_stats {name}", value, expected[name]
        name = "quantiles_05_25_50_75_95"
        quantiles = fraction.quantile(torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=torch.float64))
        wider = re.search(r"quantiles within ([\d.]+\d)", case.entry.get("notes", ""))
        tolerance = (0.0, float(wider[1])) if wider else case.tolerance
        yield f"{label}_stats {name}", quantiles, expected[name], tolerance
        largest = max(m + v for m, v in _ratio(config).pairs)
        yield f"{label}_stats never more than the ratio", bool(fraction.max() <= largest), True
        name = f"out/{label}_cell_frequency"
        yield name, symmetrised(masks.mean(dim=0).numpy()), symmetrised(case.arrays[name])
    for label in (name for name in case.outputs() if name.startswith("pred_start_epoch_")):
        yield label, late_masks(case, label), case.value(label)


def late_masks(case: Case, label: str) -> dict:
    """``epoch<e>_total`` and ``epoch<e>_all_nonempty`` where masks begin in an epoch: of the first config that hides
    patches in every crop.
    """
    start, samples = int(label.rpartition("_")[2]), 100
    configs = [case.value(name) for name in case.entry["inputs"] if name.startswith("config")]
    config = next(c for c in configs if min(m - v for m, v in _ratio(c).pairs) > 0)
    views = MaskedViews(NoCrops(), 1, tuple(config["grid"]), config.get("pred_shape", "block"), _ratio(config, start))
    found = {}
    for name in case.value(label):
        epoch, kind = re.fullmatch(r"epoch(\d+)_(\w+)", name).groups()
        hidden = [int(views(None, (0, int(epoch), i))["masks"][0].sum()) for i in range(samples)]
        found[name] = {"total": sum(hidden), "all_nonempty": min(hidden) > 0}[kind]
    return found


def symmetrised(cells: np.ndarray) -> np.ndarray:
    """Mean over the reflections of the grid: the law of the masks has them, and 4000 samples of one cell are noisy."""
    cells = (cells + cells[::-1]) / 2
    cells = (cells + cells[:, ::-1]) / 2
    return (cells + cells.T) / 2 if cells.shape[0] == cells.shape[1] else cells


def top_n(case: Case) -> Iterator[tuple]:
    attention = case.tensor("attention")
    yield "n_tokens", attention.shape[1], case.params["n_tokens"]
    yield "masking_prob", case.params["masking_prob"], 1.0
    everyone = np.ones(len(attention), dtype=bool)
    for index, ratio in enumerate(case.params["masking_ratios"]):
        count = int(attention.shape[1] * ratio)
        yield f"mask_high_{index} count", count, case.params["expected_masked_per_row"][index]
        for kind in ("high", "low"):
            hidden = hidden_ranks(attention.shape[1], count, everyone)
            masks, masked = attention_mask(attention, hidden, lowest=kind == "low")
            yield f"mask_{kind}_{index}", masks, case.arrays[f"mask_{kind}_{index}"]
            positions = masks.flatten().nonzero().flatten()
            yield f"mask_{kind}_{index} positions", masked.sort().values, positions


def keep(case: Case) -> Iterator[tuple]:
    attention, tokens = case.tensor("attention"), case.params["n_tokens"]
    kept = case.arrays["u"] <= case.params["masking_prob"]
    hidden = hidden_ranks(tokens, int(tokens * case.params["masking_ratio"]), kept)
    for kind in ("high", "low"):
        masks, _ = attention_mask(attention, hidden, lowest=kind == "low")
        yield f"mask_{kind}", masks, case.arrays[f"mask_{kind}"]


def hints(case: Case) -> Iterator[tuple]:
    """Hints that are given as patches are ranks first; with as many hints as candidates there is nothing to draw."""
    p, attention = case.params, case.tensor("attention")
    rows, tokens = attention.shape
    top, count = hint_counts(tokens, p["show_max"], p["show_ratio"] / p["show_max"])
    yield "hints", [top, count], [p["top_count"], p["reveal_count"]]
    for name, found in (("n_tokens", tokens), ("mask_count_before_reveal", int(tokens * p["masking_ratio"]))):
        if name in p:
            yield name, found, p[name]
    kept, revealed = np.ones(rows, dtype=bool), draw_hints(np.random.rand(rows, top), count)
    if "revealed_idx" in case.arrays:
        rank_of_patch = attention.argsort(dim=1, descending=True).argsort(dim=1)
        revealed = rank_of_patch.gather(1, case.tensor("revealed_idx")).numpy()
        kept = case.arrays["u"] <= p["masking_prob"]
        top_mask, _ = attention_mask(attention, hidden_ranks(tokens, top, np.ones(rows, dtype=bool)))
        yield "top_mask", top_mask, case.arrays["top_mask"]
    hidden = hidden_ranks(tokens, int(tokens * p["masking_ratio"]), kept, revealed)
    yield "mask", attention_mask(attention, hidden)[0], case.arrays["mask"]


def hint_stats(case: Case) -> Iterator[tuple]:
    p, outputs = case.params, case.entry["outputs"]
    attention = case.tensor("attention").expand(p["rows_per_trial"], -1)
    tokens, samples = attention.shape[1], p["trials"] * p["rows_per_trial"]
    top, count = hint_counts(tokens, p["show_max"], p["show_ratio"] / p["show_max"])
    size = int(tokens * p["masking_ratio"])
    yield "counts", [size, top, count], [p["mask_count"], p["top_count"], p["reveal_count"]]
    rng, by_rank, masked_rows, violations, sizes = np.random.default_rng(0), np.zeros(tokens), 0, 0, set()
    order = attention.argsort(dim=1, descending=True)
    for _ in range(p["trials"]):
        kept = rng.random(len(attention)) <= p["masking_prob"]
        revealed = draw_hints(rng.random((len(attention), top)), count)
        masks, _ = attention_mask(attention, hidden_ranks(tokens, size, kept, revealed))
        ranks = masks.gather(1, order).numpy()
        sizes |= {str(total) for total in ranks.sum(axis=1)}
        violations += int((~ranks[kept, top:size]).sum() + ranks[:, size:].sum() + ranks[~kept].sum())
        by_rank += (~ranks[kept]).sum(axis=0)
        masked_rows += kept.sum()
    theory = outputs["reveal_freq_theory"]
    errors = float(re.search(r"within ([\d.]+) ?\* ?sqrt", case.entry["tolerance"])[1])
    near = [errors * math.sqrt(q * (1 - q) / samples) for q in (outputs["row_masked_fraction_theory"], 2 * theory)]
    yield "row_masked_fraction_theory", masked_rows / samples, outputs["row_masked_fraction_theory"], (0, near[0])
    yield "row_masked_fraction", masked_rows / samples, outputs["row_masked_fraction"], (0, 2 * near[0])
    yield "reveal_freq_theory", count / top, theory, (0, 1e-12)
    observed = case.arrays["reveal_freq_by_rank"]
    yield "reveal_freq_by_rank", by_rank[:top] / masked_rows, observed, (0, 2 * near[1])
    yield "reveal_freq_by_rank, theory", by_rank[:top] / masked_rows, np.full(top, theory), (0, near[1])
    yield "observed_mask_sizes", sorted(sizes), sorted(outputs["observed_mask_sizes"])
    yield "invariant_violations", violations, outputs["invariant_violations"]


def seeded(case: Case) -> Iterator[tuple]:
    """The original's draws: gate, then for hints a second gate that is not used, and multinomial."""
    p, attention = case.params, case.tensor("attention")
    rows, tokens = attention.shape
    count = int(tokens * p["masking_ratio"])
    for kind in ("high", "low", "hint"):
        generator = torch.Generator().manual_seed(p["seed"])
        kept, revealed = (torch.rand(rows, generator=generator) <= p["masking_prob"]).numpy(), None
        if kind == "hint":
            torch.rand(rows, generator=generator)
            top, shown = int(tokens * p["show_max"]), int(p["show_ratio"] * tokens)
            top_mask, _ = attention_mask(attention, hidden_ranks(tokens, top, np.ones(rows, dtype=bool)))
            # torch.multinomial as the torch of the golden case has it; that of 2.6 draws its exponentials otherwise
            exponentials = -torch.log1p(-torch.rand(rows, tokens, dtype=torch.float64, generator=generator))
            patches = (top_mask / exponentials.float()).topk(shown).indices
            revealed = attention.argsort(dim=1, descending=True).argsort(dim=1).gather(1, patches).numpy()
        masks, _ = attention_mask(attention, hidden_ranks(tokens, count, kept, revealed), lowest=kind == "low")
        yield f"mask_{kind}", masks, case.arrays[f"mask_{kind}"]


def pred_ratio(case: Case) -> Iterator[tuple]:
    for number, run in enumerate(case.params["runs"]):
        rng, ratio = random.Random(run["python_random_seed"]), _ratio(run, run["pred_start_epoch"])
        epoch = math.inf if run["epoch"] is None else run["epoch"]
        drawn = [ratio.draw(epoch, rng) for _ in run["ratios"]]
        yield f"ratios of run {number}", drawn, run["ratios"]
        for name in (name for name in run if name.startswith("mask_counts_n")):
            tokens = int(name.removeprefix("mask_counts_n"))
            yield f"ratios of run {number}, counts", [int(tokens * r) for r in drawn], run[name]


def hint_params(case: Case) -> Iterator[tuple]:
    p, outputs = case.params, case.entry["outputs"]
    for number, (first, second) in enumerate(p["pairs_(r1,r2)"]):
        count = int(p["n_tokens"] * first)
        top, shown = hint_counts(p["n_tokens"], p["show_max"], second)
        hidden = hidden_ranks(p["n_tokens"], count, np.ones(1, bool), draw_hints(np.random.rand(1, top), shown))
        yield f"mask_count {number}", count, outputs["mask_count"][number]
        yield f"top_count {number}", top, outputs["top_count"]
        yield f"reveal_count {number}", shown, outputs["reveal_count"][number]
        yield f"masked_tokens_after_reveal {number}", hidden.sum(), outputs["masked_tokens_after_reveal"][number]


RUNNERS = {
    "ibot/masks_seeded": masks_seeded,
    "ibot/masks_statistics": masks_statistics,
    "attmask/topn_*": top_n,
    "attmask/keep_*": keep,
    "attmask/hint_given_*": hints,
    "attmask/hint_det_*": hints,
    "attmask/hint_stats": hint_stats,
    "attmask/seeded_*": seeded,
    "attmask/pred_ratio": pred_ratio,
    "attmask/hint_params": hint_params,
}
