"""Twins of golden cases of retrieval, robustness and correspondence: the same format with other numbers."""

import numpy as np
import torch
from PIL import Image

from tests.twins import agrees, golden, random, rewrite


def area_under_precision(hits: list[bool], relevant: int) -> float:
    """Average precision as the area of trapezoids, image by image."""
    area = recall = found = 0.0
    before = 1.0
    for looked, hit in enumerate(hits, start=1):
        found += hit
        precision = found / looked
        area += (found / relevant - recall) * (before + precision) / 2
        recall, before = found / relevant, precision
    return area


def test_retrieval_is_scored_with_other_lists_and_ks():
    case = golden("eval_core", "retrieval_map")
    database, queries = random(15, 5, seed=1).numpy(), random(3, 5, seed=2).numpy()
    gnd = [
        {"easy": [1, 4], "hard": [2], "junk": []},
        {"easy": [], "hard": [3, 9, 14], "junk": [0, 5, 6]},
        {"easy": [], "hard": [], "junk": [1]},
    ]
    unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)  # noqa: E731
    ranks = np.argsort(-(unit(database) @ unit(queries).T), axis=0)
    case.params["ks"] = [2, 7]
    image = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    small = Image.fromarray(image).resize((70, 90), Image.BICUBIC)
    small.thumbnail((50, 50), Image.LANCZOS)
    values = {"gnd": gnd, "thumbnail_size": list(small.size)}
    for name, relevant, ignored in (("M", ("easy", "hard"), ("junk",)), ("H", ("hard",), ("junk", "easy"))):
        aps, precisions = [], []
        for q, lists in enumerate(gnd):
            wanted, out = ([image for key in keys for image in lists[key]] for keys in (relevant, ignored))
            hits = [image in wanted for image in ranks[:, q] if image not in out]
            if not wanted:
                aps.append(None)
                continue
            aps.append(area_under_precision(hits, len(wanted)))
            last = max(place for place, hit in enumerate(hits, 1) if hit)
            precisions.append([sum(hits[: min(k, last)]) / min(k, last) for k in case.params["ks"]])
        mean = float(np.mean([ap for ap in aps if ap is not None]))
        values[name] = {"mAP": mean, "aps": aps, "mP_at_k": np.mean(precisions, axis=0).tolist()}
    inputs = {"in/db_features": database, "in/query_features": queries, "in/seed_image": image}
    outputs = {"out/ranks": ranks, "out/thumbnail50": np.asarray(small)[::3, ::3]}
    case = rewrite(case, inputs, outputs, values, {"out/thumbnail50": "thumbnail((50,50), LANCZOS), every 3rd pixel"})
    case.entry["inputs"] = {
        "gnd": {"value": case.entry["outputs"].pop("gnd")["value"]},
        "in/seed_image": {"meaning": "Pillow bicubic resize of this to (width,height)=(70,90)"},
    }
    agrees(case)


def test_copies_are_described_and_whitened_with_other_powers():
    case = golden("eval_core", "copy_detection")
    case.params |= {"gem_p": 3, "gem_eps": 1e-2, "whitening_power": 0.25}
    tokens, learnt = random(2, 7, 4, seed=1), random(30, 6, seed=2)
    learnt[:, 5] = learnt[:, 4] + 1e-5 * learnt[:, 5]  # a direction without variance
    database, queries = random(9, 6, seed=3), random(4, 6, seed=4)
    gem = (tokens[:, 1:].clamp(min=1e-2) ** 3).mean(1) ** (1 / 3)
    values, vectors = np.linalg.eigh((learnt.T @ learnt).numpy() / len(learnt))
    scale = np.maximum(values, values.max() * 1e-5) ** -0.25
    white = [((x - learnt.mean(0)).numpy() @ vectors) * scale for x in (queries, database)]
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in white)
    rows = [{"ranks": [1, 5], "nres": 3, "ap": area_under_precision([False, True, False, False, False, True], 3)},
            {"ranks": [], "nres": 1, "ap": 0.0}]  # fmt: skip
    inputs = {"in/tokens": tokens, "in/whitening_features": learnt, "in/database": database, "in/queries": queries}
    outputs = {"out/descriptor": torch.cat((tokens[:, 0], gem), dim=1), "out/similarity": a @ b.T}
    agrees(rewrite(case, inputs, outputs, {"average_precision": rows}))
