"""Runners: correspondence of views, entropy of attention."""

from collections.abc import Iterator

import numpy as np
import torch

from evaluation.attention import attention_entropy, keep_mass
from evaluation.matching import (
    best_matches,
    matched_within,
    mirror_matches,
    overlapping,
    patch_centres,
    true_matches,
)
from tests.parity import Case


def correspondence(case: Case) -> Iterator[tuple]:
    p = case.params
    tokens = [case.tensor(f"in/tokens{view}") for view in (1, 2)]
    side = p["img_size"] // p["patch_size"]
    centres = [patch_centres(case.tensor(f"in/corner{view}"), (side, side)) for view in (1, 2)]
    margin = p["patch_size"] // 2 / p["img_size"]
    overlap, found, true = overlapping(*centres, margin), best_matches(*tokens), true_matches(*centres)
    computed = {"pos1": centres[0], "pos2": centres[1], "overlap": overlap, "match": found, "true_match": true}
    for radius in p["eval_radius"]:
        computed[f"accuracy_radius{radius}"] = matched_within(found, true, side, radius)[overlap].double().mean()
    for name, value in computed.items():
        if f"out/{name}" in case.arrays:
            yield f"out/{name}", value, case.arrays[f"out/{name}"]


def mirror(case: Case) -> Iterator[tuple]:
    p, rows = case.params, []
    for name in case.names("fea1_"):
        image = name.removeprefix("fea1_")
        tokens = [case.tensor(f"fea{view}_{image}") for view in (1, 2)]
        found = mirror_matches(*tokens, (p["grid"], p["grid"]), p["cell"], p["top_pairs"])
        yield f"match_{image}", found.match, case.arrays[f"match_{image}"]
        yield f"order_{image}", found.order, case.arrays[f"order_{image}"]
        rows.append([found.accuracy, found.distance, found.similarity])
    yield "per_image", np.array(rows), case.arrays["per_image"]
    yield "average", np.mean(rows, axis=0), case.arrays["average"]


def entropy(case: Case) -> Iterator[tuple]:
    p, attention = case.params, case.tensor("attention")[0]
    found = attention_entropy(attention)
    of_query = found[:, p["query"]]
    order = of_query.argsort(descending=True)
    maps = attention[order, p["query"]].unflatten(-1, (p["grid"], p["grid"]))
    computed = {"entropy": of_query, "entropy_sorted": of_query[order], "head_order": order}
    computed |= {"entropy_mean_over_queries": found.mean(dim=1), "masks": keep_mass(maps, p["threshold"])}
    for name, value in computed.items():
        if name not in case.arrays:
            continue
        yield name, value.to(torch.int8) if value.dtype == torch.bool else value, case.arrays[name]


RUNNERS = {
    "eval_core/correspondence": correspondence,
    "esvit/correspondence_measure": mirror,
    "esvit/attention_analysis": entropy,
}
