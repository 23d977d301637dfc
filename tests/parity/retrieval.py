"""Runners: revisited Oxford and Paris, copy detection."""

import re
from collections.abc import Iterator

import numpy as np
from PIL import Image

from evaluation.retrieval import PROTOCOLS, Whitening, average_precision, copy_descriptor, rank, score, similarities
from evaluation.retrieval_run import thumbnail
from tests.parity import Case


def retrieval_map(case: Case) -> Iterator[tuple]:
    ranks = rank(case.tensor("in/query_features"), case.tensor("in/db_features"))
    yield "out/ranks", ranks, case.arrays["out/ranks"]
    for name in [name for name in case.outputs() if name in PROTOCOLS]:
        expected = case.value(name)
        found = score(ranks.numpy(), case.value("gnd"), PROTOCOLS[name], case.params["ks"])
        yield f"{name} mAP", found.mean_ap, expected["mAP"]
        yield f"{name} aps", found.aps, [np.nan if value is None else value for value in expected["aps"]]
        yield f"{name} mP_at_k", found.precisions, expected["mP_at_k"]
    if case.names("out/thumbnail"):
        yield from thumbnails(case)


def thumbnails(case: Case) -> Iterator[tuple]:
    size = tuple(map(int, re.search(r"\(width,height\)=\((\d+),(\d+)\)", case.meaning("in/seed_image")).groups()))
    image = Image.fromarray(case.arrays["in/seed_image"]).resize(size, Image.BICUBIC)
    for name in case.names("out/thumbnail"):
        longest, every = int(name.removeprefix("out/thumbnail")), re.search(r"every (\d+)", case.meaning(name))[1]
        small = thumbnail(image, longest)
        yield name, np.asarray(small)[:: int(every), :: int(every)], case.arrays[name]
        yield "thumbnail_size", list(small.size), case.value("thumbnail_size")


def copy_detection(case: Case) -> Iterator[tuple]:
    p = case.params
    if "out/descriptor" in case.arrays:
        tokens = case.tensor("in/tokens")
        yield "out/descriptor", copy_descriptor(tokens, 1, p["gem_p"], p["gem_eps"]), case.arrays["out/descriptor"]
    whitening = None
    if "in/whitening_features" in case.arrays:
        whitening = Whitening(case.tensor("in/whitening_features"), p["whitening_power"])
    found = similarities(case.tensor("in/queries"), case.tensor("in/database"), whitening)
    yield "out/similarity", found, case.arrays["out/similarity"]
    for number, query in enumerate(case.value("average_precision")):
        found = average_precision(query["ranks"], query["nres"])
        yield f"average_precision of query {number}", found, query["ap"]


RUNNERS = {"eval_core/retrieval_map": retrieval_map, "eval_core/copy_detection": copy_detection}
