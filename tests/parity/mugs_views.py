"""Runners: RandAugment as Mugs has it, its strong crop from pinned generators, and which crop of an image is what."""

import random
import re
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image

from data.augment import Box, CropRecipe, PILGaussianBlur
from data.augmented import Original, changed
from data.mugs_views import MugsViews, erase_
from data.randaugment import (
    APPLY,
    FILL,
    TOP_LEVEL,
    Operation,
    argument,
    carry_out,
    draw_generators,
    parse_policy,
)
from data.strong_crops import StrongTransform
from tests.parity import Case


def magnitudes(case: Case) -> Iterator[tuple]:
    translate, fill = case.params["hparams"]["translate_const"], case.params["hparams"]["img_mean"]
    yield "max_level", TOP_LEVEL, case.arrays["max_level"]
    for name, levels in case.arrays["magnitudes"].items():
        if levels is None:
            yield f"magnitudes of {name}", argument(name, TOP_LEVEL), None
        for entry in levels or ():
            for key, negate in (("args_u_le_half", False), ("args_u_gt_half", True)):
                kind = "ints" if all(isinstance(value, int) for value in entry[key]) else "floats"
                ours = [argument(name, entry["level"], negate, translate)]
                yield f"magnitudes, {kind} of {name} at {entry['level']}, {key}", ours, entry[key]
    for text, expected in case.arrays["configs"].items():
        policy = parse_policy(text)
        yield f"configs, {text}, ops", list(policy.operations), expected["ops"]
        yield f"configs, {text}, ints", [policy.count, *FILL], [expected["num_layers"], *expected["fillcolor"]]
        yield f"configs, {text}, hparams, ints", list(FILL), fill
        numbers = [expected[name] for name in ("op_prob", "magnitude", "magnitude_std")]
        yield f"configs, {text}, floats", [APPLY, policy.magnitude, policy.std], numbers
        weights = policy.weights and list(policy.weights)
        yield f"configs, {text}, choice weights, floats", weights, expected["choice_weights"]


def operations(case: Case) -> Iterator[tuple]:
    """RandAugment's with Pillow on the whole image, and box by box; and those of the weak chain that take a number."""
    image, fill = case.arrays["in.image"], tuple(case.params["fillcolor"])
    calls = [
        (call["key"], Operation(call["op"], *(call["args"] or [None]), call["interpolation"]))
        for call in case.params["calls"]
    ]
    calls += [(name, Operation("Solarize", number_in(name))) for name in case.names("out.solarize_")]
    for key, operation in calls:
        words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", operation.name)
        label, expected = f"{key} {operation.name}, {words}, others", case.arrays[key]
        yield label, np.asarray(carry_out(Image.fromarray(image), operation, fill)), expected
        source = changed(Original(image), [operation], fill)
        for box in quarters(*image.shape[:2]):
            part = expected[box.top : box.top + box.height, box.left : box.left + box.width]
            yield f"{label}, {box}", source.pixels(box), part
    for name in case.names("out.gaussian_blur_"):
        blur = PILGaussianBlur(1.0, (number_in(name),) * 2)
        yield f"{name}, others", np.asarray(blur(Image.fromarray(image))), case.arrays[name]


def number_in(name: str) -> float:
    return float(name.rpartition("_")[2])


def quarters(height: int, width: int) -> Iterator[Box]:
    for top, bottom in ((0, height // 2), (height // 2, height)):
        for left, right in ((0, width // 2), (width // 2, width)):
            yield Box(top, left, bottom - top, right - left)


def strong_transform(case: Case) -> Iterator[tuple]:
    params, image = case.params, Image.fromarray(case.arrays["in.image"])
    policy = parse_policy(params["config"])
    recipe = CropRecipe(params["img_size"], params["scale"], params["ratio"], jitter=0.0, grayscale=0.0)
    transform = StrongTransform(recipe, policy, params["re_prob"])
    for entry in params["seeds"]:
        seed_everything(entry["seed"])
        label = f"out.seed{entry['seed']}"
        applied = [name for name, is_applied in entry["ops"] if is_applied]
        yield f"{label}, operations", [operation.name for operation in draw_generators(policy)], applied
        seed_everything(entry["seed"])
        crop, erased = transform(image)
        batch = MugsViews.collate([{"crops": [crop], "erased": [erased]}])
        pixels = batch["crops"][0] / 255
        erase_([pixels], batch["erased"])
        yield label, pixels[0], case.arrays[label]


def seed_everything(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def crop_assignment(case: Case) -> Iterator[tuple]:
    (entries,) = case.arrays.values()
    for number, entry in enumerate(entries):
        views = MugsViews(
            prob=entry["prob"],
            vanilla=entry["vanilla_weak_augmentation"],
            local_crops_number=entry["local_crops_number"],
        )
        drawn = iter(entry["uniforms_drawn"])
        kinds = list(views.kinds(lambda drawn=drawn: next(drawn)))
        yield f"crops of entry {number}", kinds, entry["crops"]
        yield f"weak_flag of entry {number}", views.is_weak(kinds), entry["weak_flag"]
        yield f"crops of entry {number}, numbers that were not drawn", list(drawn), []


RUNNERS = {
    "mugs/randaugment_magnitudes": magnitudes,
    "mugs/randaugment_ops": operations,
    "mugs/strong_transform_rng": strong_transform,
    "mugs/crop_assignment": crop_assignment,
}
