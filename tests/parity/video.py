"""Runners: labels that are propagated through a video, and what its frames and masks go through."""

import re
from collections.abc import Iterator

import numpy as np
import torch

from evaluation.propagation import (
    Settings,
    frame_size,
    frame_tensor,
    hard_mask,
    neighbourhood,
    one_hot_labels,
    propagate,
    resized_indices,
    stretch,
)
from tests.parity import Case
from tests.parity.preprocess import every_nth
from tests.parity.tolerance import Tolerance


def settings_of(case: Case) -> Settings:
    return Settings(**{name: case.params[name] for name in Settings._fields})


def neighbours_of_all(case: Case, rows: int, columns: int) -> torch.Tensor:
    """(tokens, tokens), row by row as the cases have them."""
    every = range(columns)
    near = neighbourhood(rows, every, every, case.params["size_mask_neighborhood"])
    return near.permute(1, 0, 3, 2).reshape(rows * columns, rows * columns)


def label_propagation(case: Case) -> Iterator[tuple]:
    """Cases that have an array for every frame, and name those of a frame by its number."""
    named = {int(found[1]): name for name in case.names("in") if (found := re.search(r"frame(\d+)", name))}
    (labels,) = (case.arrays[name] for name in case.names("in") if re.search("label", name))
    patch_size = case.params.get("patch_size", case.params.get("upsample_patch_size"))
    features = [case.tensor(named[number]) for number in sorted(named)]
    first = one_hot_labels(labels, case.dtype)
    for name in (name for name in case.outputs() if "mask" in name):
        yield name, neighbours_of_all(case, *labels.shape).to(torch.uint8), case.arrays[name]
    for number, soft in zip(sorted(named)[1:], propagate(features, first, settings_of(case)), strict=True):
        for name in case.outputs():
            if not re.search(rf"(?<!\d){number}(?!\d)", name):
                continue
            expected = case.arrays[name]
            if "seg" in name:
                yield name, soft[None], expected
            elif re.search("argmax|labels", name):
                pixels = torch.from_numpy(hard_mask(soft, patch_size))
                yield name, every_nth(pixels, expected, said_of(case, name)), expected


def said_of(case: Case, name: str) -> str:
    outputs = case.entry["outputs"]
    entries = outputs if isinstance(outputs, list) else [{"key": key} | value for key, value in outputs.items()]
    return next((entry.get("meaning", "") for entry in entries if entry["key"] == name), "")


def video_propagation(case: Case) -> Iterator[tuple]:
    """The case that has all frames in one array, and the steps before and behind."""
    arrays, p = case.arrays, case.params
    grid, original = (p["grid_h"], p["grid_w"]), (p["original_h"], p["original_w"])
    small = resized_indices(arrays["seg_original"], grid)
    first = one_hot_labels(small, case.dtype)
    yield "seg_small", small, arrays["seg_small"]
    yield "first_seg", first[None], arrays["first_seg"]
    yield "neighbourhood", neighbours_of_all(case, *grid), arrays["neighbourhood"]
    soft = list(propagate(case.tensor("features"), first, settings_of(case)))
    yield "seg_probs", torch.stack(soft), arrays["seg_probs"]
    yield "masks", np.stack([hard_mask(labels, p["patch_size"], original) for labels in soft]), arrays["masks"]
    yield "norm_out", stretch(case.tensor("norm_in")), arrays["norm_out"]
    # how large the frame became is said in words: "scale_size=[96]"
    said = re.search(r"scale_size\D*(\d+)", case.meaning("frame_tensor"))
    frame, expected = arrays["frame_rgb"], arrays["frame_tensor"]
    short = int(said[1]) if said else min(expected.shape[-2:])
    size = frame_size(*frame.shape[:2], short)
    yield "frame_tensor", frame_tensor(frame, size), expected, Tolerance(atol=case.entry["frame_tolerance"]["atol"])


def frame_io(case: Case) -> Iterator[tuple]:
    p, image, labels = case.params, case.arrays["in/image"], case.arrays["in/labels"]
    size = frame_size(*image.shape[:2], p["short_side"], p["multiple"])
    tensor = frame_tensor(image, size)
    for name in case.outputs():
        if "value" in case.entry["outputs"][name]:
            yield name, list(tensor.shape if name == "shape" else image.shape[:2]), case.value(name)
    yield "out/sub", every_nth(tensor, case.arrays["out/sub"], case.meaning("out/sub")), case.arrays["out/sub"]
    small = resized_indices(labels, tuple(side // p["patch"] for side in size))
    yield "out/onehot", one_hot_labels(small)[None], case.arrays["out/onehot"]


RUNNERS = {
    "eval_core/video_label_propagation": label_propagation,
    "eval_core/video_frame_io": frame_io,
    "mugs/video_label_propagation": label_propagation,
    "udi/video_propagation": video_propagation,
}
