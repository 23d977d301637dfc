"""Runners: the crops of UDI, the points sampled in them, and where these lie in the other crops.

The cases hold dense maps, (points, tokens): one-hot rows for the source, bilinear weights for the target.
"""

import re
from collections.abc import Iterator

import numpy as np

from data.augment import fitting_box
from data.correspondence import (
    SamplingMaps,
    crop_coordinates,
    image_maps,
    reference_box,
    sampling_maps,
    shift_towards,
    stratified_sample,
)
from data.udi_views import UDIViews
from tests.parity import Case


def _side(tokens: int) -> int:
    return round(tokens**0.5)


def dense_source(maps: SamplingMaps, tokens: int) -> np.ndarray:
    """(points, tokens) one-hot, from maps of a single pair."""
    dense = np.zeros((len(maps.source), tokens), np.float32)
    rows = np.arange(maps.valid)
    dense[rows, maps.source[rows]] = 1
    return dense


def dense_target(maps: SamplingMaps, tokens: int) -> np.ndarray:
    dense = np.zeros((len(maps.index), tokens), np.float32)
    np.add.at(dense, (np.arange(len(dense))[:, None], maps.index), maps.weight)
    return dense


def _pair(maps: SamplingMaps, *place: int) -> SamplingMaps:
    return SamplingMaps(*(part[place] for part in maps))


# ---- points and maps ------------------------------------------------------------------------------------------------


def sampling_mask(case: Case) -> Iterator[tuple]:
    for number, layout in case.params["layouts"].items():
        grid, window = layout["feature_size"], layout["window"]
        selections, corners = case.arrays[f"sel{number}"], case.arrays[f"corner{number}"]
        for name, drawn in (
            (f"mask{number}", (selections, corners)),
            (f"mask_fixed{number}", (np.zeros_like(selections[0]), np.zeros((), int))),
        ):
            mask = np.zeros(case.arrays[name].shape, bool)
            np.put_along_axis(mask, stratified_sample(*drawn, grid, window), True, axis=-1)
            yield name, mask, case.arrays[name]


def create_map(case: Case) -> Iterator[tuple]:
    for name in case.names(""):
        label, _, part = name.partition("/")
        if part != "tgt_map":
            continue
        source, target, mask = (case.arrays[f"{label}/{part}"] for part in ("src_coord", "tgt_coord", "mask"))
        expected = case.arrays[f"{label}/src_map"], case.arrays[name]
        tokens = [dense.shape[-1] for dense in expected]
        maps = sampling_maps(source, target, np.flatnonzero(mask), *map(_side, tokens))
        yield f"{label}/src_map", dense_source(maps, tokens[0]), expected[0]
        yield f"{label}/tgt_map", dense_target(maps, tokens[1]), expected[1]


def sample_assembly(case: Case) -> Iterator[tuple]:
    """The lists of one image: sources by target, then local crop; targets by local crop, then target."""
    coordinates, masks = case.arrays["coords"], (case.arrays["mask_g"], case.arrays["mask_l"])
    grids = case.params["global_grid"], case.params["local_grid"]
    between, local = image_maps(coordinates, [np.flatnonzero(mask) for mask in masks], grids)
    crops = case.params["local_crops_number"]
    globals_ = [_pair(between, view) for view in range(2)]
    by_target = [_pair(local, crop, view) for view in range(2) for crop in range(crops)]
    by_crop = [_pair(local, crop, view) for crop in range(crops) for view in range(2)]
    for number, maps in enumerate(globals_ + by_target):
        expected = case.arrays[f"src_map{number}"]
        yield f"src_map{number}", dense_source(maps, expected.shape[-1]), expected
    for number, maps in enumerate(globals_ + by_crop):
        expected = case.arrays[f"tgt_map{number}"]
        yield f"tgt_map{number}", dense_target(maps, expected.shape[-1]), expected
    yield "local_ref_box", reference_box(coordinates[0], coordinates[1]), case.arrays["local_ref_box"]


# ---- boxes ----------------------------------------------------------------------------------------------------------


def crop_params(case: Case) -> Iterator[tuple]:
    inputs = zip(*(case.arrays[name] for name in ("wh", "ref", "draws", "uij")), strict=True)
    boxes, coordinates = [], []
    for (width, height), reference, attempts, place in inputs:
        height, width = int(height), int(width)
        box = fitting_box(attempts.tolist(), place.tolist(), height, width, case.params["ratio"])
        boxes.append(box if np.isnan(reference).any() else shift_towards(box, reference, height, width))
        coordinates.append(crop_coordinates(boxes[-1], False, height, width))
    yield "box", np.array(boxes), case.arrays["box"]
    yield "coord", np.array(coordinates), case.arrays["coord"]


def reference_boxes(case: Case) -> Iterator[tuple]:
    yield "box", reference_box(case.arrays["coord0"], case.arrays["coord1"]), case.arrays["box"]


# ---- statistics -----------------------------------------------------------------------------------------------------


def statistics(case: Case) -> Iterator[tuple]:
    """Means over many images within the standard errors of both; the crops of one image count as one observation."""
    params, samples = case.params, case.params["images"]
    deviations = float(re.search(r"within ([\d.]+) ?\* ?sqrt", case.entry["tolerance"])[1])  # standard errors
    views = UDIViews(
        params["global_crops_scale"],
        params["local_crops_scale"],
        params["local_crops_number"],
        params["global_size"],
        params["local_size"],
        params["patch_size"],
        params["window_g"],
        params["window_l"],
    )
    flip = params["horizontal_flip"]
    width, height = params["image_wh"]
    crops, coordinates, valid, local_valid = [], [], [], []
    for index in range(samples):
        drawn, places = views.draw((0, 0, index), height, width)
        between, local = views.maps((0, 0, index), places)
        crops.append(drawn)
        coordinates.append(places)
        valid.append(between.valid)
        local_valid.append(local.valid)
    observed = observations(np.array(coordinates), np.array(valid), np.array(local_valid), crops)
    for name, expected in case.arrays["statistics"].items():
        values = np.asarray(observed[name], np.float64)
        error = np.hypot(expected["stderr"], values.std() / samples**0.5)
        yield f"json, mean of {name}", values.mean(), expected["mean"], (0.0, deviations * error)
    applied = {
        "color_jitter": lambda crop: bool(crop.jitter),
        "grayscale": lambda crop: crop.grayscale,
        "gaussian_blur": lambda crop: crop.blur is not None,
        "solarize": lambda crop: crop.solarize,
        "horizontal_flip": lambda crop: crop.flip,
    }
    probabilities = case.arrays["photometric_probabilities"] | {"horizontal_flip": flip}
    probabilities.pop("note", None)
    for name, p in probabilities.items():
        tolerance = 0.0, deviations * (p * (1 - p) / samples) ** 0.5
        share = np.mean([[applied[name](crop) for crop in drawn] for drawn in crops], axis=0)
        yield f"json, share of {name}, by crop", share, np.full(share.shape, p), tolerance


def observations(coordinates: np.ndarray, valid: np.ndarray, local_valid: np.ndarray, crops: list) -> dict:
    """The values of every statistic, by name.

    Shapes     coordinates (images, crops, 4); valid (images, 2); local_valid (images, local crops, 2), in the second
               global crop and in the first
    """
    low = np.minimum(coordinates[..., :2], coordinates[..., 2:])
    high = np.maximum(coordinates[..., :2], coordinates[..., 2:])
    flips = coordinates[..., 1] > coordinates[..., 3]
    area = (high - low).prod(-1)

    def common(a, b) -> np.ndarray:
        sides = np.minimum(high[:, a], high[:, b]) - np.maximum(low[:, a], low[:, b])
        return np.maximum(sides, 0).prod(-1)

    first, second, local = slice(0, 1), slice(1, 2), slice(2, None)
    return {
        "area_g0": area[:, 0],
        "area_g1": area[:, 1],
        "area_l": area[:, 2:],
        "flip_g0": flips[:, 0],
        "flip_g1": flips[:, 1],
        "flip_l": flips[:, 2:],
        "valid_g": valid[:, 0],
        "valid_g_back": valid[:, 1],
        "valid_l_to_g1": local_valid[..., 0],
        "valid_l_to_g0": local_valid[..., 1],
        "overlap_g_over_min": common(first, second)[:, 0] / area[:, :2].min(1),
        "l_in_g1": common(local, second) / area[:, 2:],
        "l_in_g0": common(local, first) / area[:, 2:],
        "no_valid_g": valid[:, 0] == 0,
        "no_valid_l_to_g1": local_valid[..., 0] == 0,
        "aspect_g0": [drawn[0].box.width / drawn[0].box.height for drawn in crops],
    }


RUNNERS = {
    "udi/sampling_mask": sampling_mask,
    "udi/create_map": create_map,
    "udi/sample_assembly": sample_assembly,
    "udi/crop_params": crop_params,
    "udi/reference_box": reference_boxes,
    "udi/augmentation_statistics": statistics,
}
