"""Runners: the augmentation: single operations, the seeded pipeline, and the statistics of what is drawn.

The Pillow path has to repeat the numbers exactly; the fast path is held to the tolerances that the notes of
``augmentation_ops`` give to implementations on tensors.
"""

import random
import re
from collections.abc import Callable, Iterator

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from data import augment
from data.device import normalise
from data.views import MultiCropViews, seeded_generators
from tests.parity import Case
from tests.parity.preprocess import every_nth

EXACT = (0.0, 0.0)
NUMBER = r"(\d+(?:\.\d+)?(?:e-?\d+)?)"
SAMPLES = 5000  # the notes ask for 4000 at least


# ---- single operations ----------------------------------------------------------------------------------------------


def operations(case: Case) -> Iterator[tuple]:
    """out/<operation>[_<amount>], or out/to_tensor_normalized_sub, of the uint8 image in/image."""
    image = np.ascontiguousarray(case.arrays["in/image"])
    box = augment.Box(*map(int, case.value("crop_box_top_left_h_w")))
    notes = case.entry["notes"]
    (levels,), (blurred, slight), (mean,) = (
        map(float, re.search(pattern.replace("#", NUMBER), notes).groups())
        for pattern in ("atol # for colour", "# for blur of sigma <= #", "mean absolute difference <= #")
    )
    for name in case.names("out/"):
        expected = case.arrays[name]
        operation, amount = parse(name.removeprefix("out/"))
        if operation == "to_tensor_normalized_sub":
            pixels = normalise(augment.to_planes(image)[None])[0]
            said = case.meaning(name)
            atol = float(re.search(f"atol {NUMBER}", said)[1])
            yield name, every_nth(pixels, expected, said), expected, (0.0, atol)
            continue
        pil, fast = OPERATIONS[operation]
        size = expected.shape[0]
        yield f"{name} pil", np.asarray(pil(Image.fromarray(image), amount, box, size)), expected, EXACT
        actual = fast(image, amount, box, size)
        smooth = operation == "blur" and amount <= slight
        yield f"{name} fast", as_rgb(actual), expected, (0.0, blurred if smooth else levels)
        difference = np.abs(as_rgb(actual).astype(float) - expected).mean()
        yield f"{name} fast, mean absolute difference", difference, np.zeros(()), (0.0, mean)


def parse(name: str) -> tuple[str, float]:
    """blur_0.7 -> ("blur", 0.7); hue_neg_-0.1 -> ("hue", -0.1); hflip -> ("hflip", 0)."""
    match = re.fullmatch(r"([a-z_]+?)(?:_neg)?_(-?\d+(?:\.\d+)?)", name)
    return (match[1], float(match[2])) if match else (name, 0.0)


def as_rgb(image: np.ndarray) -> np.ndarray:
    return image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2)


def _resized(mode: str) -> tuple[Callable, Callable]:
    return (
        lambda image, _, box, size: F.resized_crop(image, *box, [size, size], InterpolationMode(mode)),
        lambda image, _, box, size: augment.resized_crop(image, box, size, mode),
    )


OPERATIONS = {
    "blur": (
        lambda image, amount, *_: image.filter(ImageFilter.GaussianBlur(amount)),
        lambda image, amount, *_: augment.gaussian_blur(image, amount),
    ),
    "solarize": (lambda image, *_: ImageOps.solarize(image), lambda image, *_: augment.solarize(image)),
    "hflip": (lambda image, *_: F.hflip(image), lambda image, *_: augment.flip(image)),
    "grayscale3": (lambda image, *_: F.rgb_to_grayscale(image, 3), lambda image, *_: augment.grayscale(image)),
    "brightness": (
        lambda image, amount, *_: F.adjust_brightness(image, amount),
        lambda image, amount, *_: augment.adjust_brightness(image, amount),
    ),
    "contrast": (
        lambda image, amount, *_: F.adjust_contrast(image, amount),
        lambda image, amount, *_: augment.adjust_contrast(image, amount),
    ),
    "saturation": (
        lambda image, amount, *_: F.adjust_saturation(image, amount),
        lambda image, amount, *_: augment.adjust_saturation(image, amount),
    ),
    "hue": (
        lambda image, amount, *_: F.adjust_hue(image, amount),
        lambda image, amount, *_: augment.adjust_hue(image, amount),
    ),
    "resized_crop_bicubic": _resized("bicubic"),
    "resized_crop_bilinear": _resized("bilinear"),
}


# ---- the whole pipeline ---------------------------------------------------------------------------------------------


def seeded_pipeline(case: Case) -> Iterator[tuple]:
    """out/seed<s>_crop<c>: every n-th pixel of the normalised crop; out/seed<s>_means: means of all its pixels."""
    options = {name: value for name, value in case.params.items() if "_crops_" in name}
    said = case.entry.get("notes", "")
    options["global_crops_size"], local_size = map(
        int, re.search(r"Global crops are (\d+), local (\d+)", said).groups()
    )
    local_crops = [(options.pop("local_crops_number"), local_size)]
    views = MultiCropViews(**options, local_crops=local_crops, augment="pil")
    image = Image.fromarray(case.arrays["in/image"])
    for seed in case.params["seeds"]:
        with seeded_generators(0):  # what the originals seed is put back afterwards
            torch.manual_seed(seed)
            random.seed(seed)
            crops = [normalise(crop[None])[0] for crop in views.pil_crops(image)]
        for number, crop in enumerate(crops):
            name = f"out/seed{seed}_crop{number}"
            expected = case.arrays[name]
            yield name, every_nth(crop, expected, said), expected
        name = f"out/seed{seed}_means"
        yield name, np.array([crop.mean().item() for crop in crops]), case.arrays[name]


# ---- statistics -----------------------------------------------------------------------------------------------------

KINDS = ("global1", "global2", "local")
OPERATION_OF_STEP = {
    "RandomHorizontalFlip": "horizontal_flip",
    "RandomApply": "color_jitter",
    "RandomGrayscale": "grayscale",
    "PILGaussianBlur": "blur",
    "PILSolarize": "solarize",
}


def statistics(case: Case) -> Iterator[tuple]:
    """How often each operation is applied to each kind of crop, and how its amount is distributed, on both paths."""
    for path, sample in (("pil", sample_pil), ("fast", sample_fast)):
        frequencies, amounts, orders = sample()
        for name, expected in case.value("probabilities").items():
            operation, _, kind = name.rpartition("_")
            operation, kinds = (operation, [kind]) if kind in KINDS else (name, KINDS)
            for kind in kinds:
                actual = frequencies.get((operation, kind), 0.0)
                yield f"probabilities: {name} of {kind}, {path}", np.array(actual), np.array(expected)
        for name, expected in case.value("magnitudes").items():
            if name == "jitter_op_order":
                yield f"magnitudes: {name}, {path}", place_frequencies(orders), np.full((4, 4), 0.25)
            else:
                quantiles = np.linspace(0, 1, 5)
                logarithmic = name == "aspect_ratio"
                low, high, values = (np.log(x) if logarithmic else np.array(x) for x in (*expected, amounts[name]))
                actual = np.quantile((values - low) / (high - low), quantiles)
                yield f"magnitudes: {name} in its range, {path}", actual, quantiles


def place_frequencies(orders: list[tuple]) -> np.ndarray:
    """How often operation i comes at place j: (4, 4)."""
    orders = np.array(orders)
    return np.stack([(orders == operation).mean(0) for operation in np.unique(orders)])


def sample_fast() -> tuple[dict, dict, list]:
    views = MultiCropViews(local_crops=[(1, 96)])
    crops = []
    for index in range(SAMPLES):
        uniforms = augment.crop_uniforms((0, 0, index), len(views.recipes))
        drawn = zip(views.recipes, uniforms, strict=True)
        crops.append([augment.draw_crop(recipe, u, 1500, 2000) for recipe, u in drawn])
    by_kind = dict(zip(KINDS, zip(*crops, strict=True), strict=True))
    applied = {
        "horizontal_flip": lambda crop: crop.flip,
        "color_jitter": lambda crop: bool(crop.jitter),
        "grayscale": lambda crop: crop.grayscale,
        "blur": lambda crop: crop.blur is not None,
        "solarize": lambda crop: crop.solarize,
    }
    frequencies = {
        (name, kind): np.mean([test(crop) for crop in crops])
        for name, test in applied.items()
        for kind, crops in by_kind.items()
    }
    jitters = [crop.jitter for crop in by_kind["local"] if crop.jitter]
    amounts = {name: [dict(jitter)[name] for jitter in jitters] for name in augment.COLOUR_OPERATIONS}
    amounts["blur_radius"] = [crop.blur for crop in by_kind["global1"]]
    amounts["aspect_ratio"] = [crop.box.width / crop.box.height for crop in by_kind["local"]]
    return frequencies, amounts, [tuple(name for name, _ in jitter) for jitter in jitters]


def sample_pil() -> tuple[dict, dict, list]:
    """Runs the transforms themselves; one that does nothing returns the image it was given."""
    views = MultiCropViews(local_crops=[(1, 96)], augment="pil")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    frequencies = {}
    with seeded_generators(0):
        for kind, transform in zip(KINDS, views.transforms, strict=True):
            for step in transform.transforms[1:]:
                name = OPERATION_OF_STEP[type(step).__name__]
                frequencies[name, kind] = np.mean([step(image) is not image for _ in range(SAMPLES)])
        crop, _, jitter = transform.transforms[:3]
        jitter = jitter.transforms[0]
        drawn = [
            jitter.get_params(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue) for _ in range(SAMPLES)
        ]
        amounts = {name: [row[1 + i] for row in drawn] for i, name in enumerate(augment.COLOUR_OPERATIONS)}
        blur = next(step for step in views.transforms[0].transforms if isinstance(step, augment.PILGaussianBlur))
        amounts["blur_radius"] = [blur.draw() for _ in range(SAMPLES)]
        large = Image.new("RGB", (2000, 1500))
        boxes = [crop.get_params(large, crop.scale, crop.ratio) for _ in range(SAMPLES)]
        amounts["aspect_ratio"] = [width / height for _, _, height, width in boxes]
    return frequencies, amounts, [tuple(order.tolist()) for order, *_ in drawn]


RUNNERS = {
    "dino/augmentation_ops": operations,
    "dino/augmentation_pipeline_seeded": seeded_pipeline,
    "dino/augmentation_statistics": statistics,
}
