"""RandAugment (1909.13719) as Mugs has it: which operations are drawn, how strong they are, and what each does.

An image gets ``count`` different operations of a list of fifteen, in the drawn order, each of them with probability
1/2. timm's RandAugment of today draws with replacement; here no operation comes twice. ``draw_generators`` draws from
the generators that the original draws from, in its order; ``draw_counted`` from given uniform numbers.

``carry_out`` does with Pillow what an operation says, to the whole image; data/augmented.py does it to a box.
"""

import math
import random
import re
from collections.abc import Callable, Sequence
from itertools import accumulate
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageEnhance, ImageOps
from torchvision.transforms import functional as F

from data.finetune_views import posterize
from utils import UsageError

FILL = (124, 116, 104)  # where an operation looks beyond the image: the mean colour of ImageNet
TOP_LEVEL = 10.0
APPLY = 0.5  # probability of every drawn operation
TRANSLATE = 100  # pixels of TranslateX and TranslateY at TOP_LEVEL, which no policy's list holds

OPERATIONS = (
    *("AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "SolarizeAdd"),
    *("Color", "Contrast", "Brightness", "Sharpness", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel"),
)
_HAVE_TWO = {"Posterize", "Solarize", "Color", "Contrast", "Brightness", "Sharpness"}
INCREASING = tuple(name + "Increasing" * (name in _HAVE_TWO) for name in OPERATIONS)  # a higher level is stronger
WEIGHTS = (0.025, 0.005, 0, 0.3, 0, 0.005, 0.005, 0.025, 0.005, 0.005, 0.025, 0.2, 0.2, 0.1, 0.1)  # "w0", of OPERATIONS
INTERPOLATIONS = ("bilinear", "bicubic")
UNIFORMS_PER_OPERATION = 5


class Operation(NamedTuple):
    """One operation and its argument (``argument`` says of what kind); ``interpolation`` of what moves pixels."""

    name: str
    argument: float | None = None
    interpolation: str | None = None


class Policy(NamedTuple):
    """What ``rand-m9-mstd0.5-inc1`` says: of ``operations``, by ``weights``, ``count`` at level N(magnitude, std)."""

    operations: tuple[str, ...] = OPERATIONS
    magnitude: float = TOP_LEVEL
    std: float = 0.0
    count: int = 2
    weights: tuple[float, ...] | None = None


# ---------------------------------------------------------------------------------------------------------------------
# What is drawn
# ---------------------------------------------------------------------------------------------------------------------


def parse_policy(text: str, option: str = "--timm_auto_augment_par") -> Policy:
    """``rand``, then parts joined by dashes: m<level> n<operations> mstd<deviation of the level> w0 inc<anything>.

    parity: ``inc0`` is ``inc1``, and the weights of ``w0`` go by position, whichever of the two lists is used.
    Raises UsageError.
    """
    first, *parts = text.split("-")
    example = "rand-m9-mstd0.5-inc1 is one"
    if first != "rand":
        raise UsageError(f"{option} {text}: a policy starts with rand; {example}")
    policy = Policy()
    for part in parts:
        if found := re.fullmatch(r"m(\d+)", part):
            policy = policy._replace(magnitude=float(found[1]))
        elif found := re.fullmatch(r"n(\d+)", part):
            policy = policy._replace(count=int(found[1]))
        elif found := re.fullmatch(r"mstd(\d+\.?\d*)", part):
            policy = policy._replace(std=float(found[1]))
        elif part == "w0":
            policy = policy._replace(weights=tuple(weight / sum(WEIGHTS) for weight in WEIGHTS))
        elif re.fullmatch(r"inc.+", part):
            policy = policy._replace(operations=INCREASING)
        else:
            known = "m9 (level), n2 (operations), mstd0.5 (deviation of the level), w0 (weights), inc1 (increasing)"
            raise UsageError(f"{option} {text}: no part {part!r} is known; there are {known}")
    available = sum(weight > 0 for weight in policy.weights or (1,) * len(policy.operations))
    if policy.count > available:
        raise UsageError(f"{option} {text}: {policy.count} operations of {available}, of which none comes twice")
    return policy


def argument(name: str, level: float, negate: bool = False, translate: float = TRANSLATE) -> float | None:
    """What ``name`` is told at a level of 0 to 10: degrees, bits kept, threshold, what is added, factor, shear, share
    of the side or pixels; None where there is nothing to tell. ``negate``: the other way, where there are two."""
    sign, share = (-1 if negate else 1), level / TOP_LEVEL
    match name:
        case "AutoContrast" | "Equalize" | "Invert":
            return None
        case "Rotate":
            return sign * (share * 30.0)
        case "Posterize":
            return int(share * 4)
        case "PosterizeIncreasing":
            return 4 - int(share * 4)
        case "PosterizeOriginal":
            return 4 + int(share * 4)
        case "Solarize":
            return int(share * 256)
        case "SolarizeIncreasing":
            return 256 - int(share * 256)
        case "SolarizeAdd":
            return int(share * 110)
        case "Color" | "Contrast" | "Brightness" | "Sharpness":
            return share * 1.8 + 0.1
        case "ColorIncreasing" | "ContrastIncreasing" | "BrightnessIncreasing" | "SharpnessIncreasing":
            return 1.0 + sign * (share * 0.9)
        case "ShearX" | "ShearY":
            return sign * (share * 0.3)
        case "TranslateX" | "TranslateY":
            return sign * (share * translate)
        case "TranslateXRel" | "TranslateYRel":
            return sign * (share * 0.45)
    raise ValueError(f"no operation {name}")


def has_sign(name: str) -> bool:
    return argument(name, TOP_LEVEL) != argument(name, TOP_LEVEL, negate=True)


def moves_pixels(name: str) -> bool:
    return name.startswith(("Rotate", "Shear", "Translate"))


def draw_generators(policy: Policy) -> list[Operation]:
    """parity: which operations, from NumPy's generator; everything else from ``random``, one operation's draws after
    the other's. A level is drawn only where it deviates, a sign only where there are two."""
    chosen = np.random.choice(len(policy.operations), policy.count, replace=False, p=policy.weights)
    drawn = []
    for name in (policy.operations[number] for number in chosen):
        if random.random() > APPLY:
            continue
        level = random.gauss(policy.magnitude, policy.std) if policy.std else policy.magnitude
        negate = has_sign(name) and random.random() > 0.5
        value = argument(name, min(max(level, 0.0), TOP_LEVEL), negate)
        drawn.append(Operation(name, value, random.choice(INTERPOLATIONS) if moves_pixels(name) else None))
    return drawn


def draw_counted(policy: Policy, uniforms: Sequence[float]) -> list[Operation]:
    """The same distribution from ``policy.count`` * UNIFORMS_PER_OPERATION uniform numbers."""
    left, drawn = list(range(len(policy.operations))), []
    for first in range(0, policy.count * UNIFORMS_PER_OPERATION, UNIFORMS_PER_OPERATION):
        choice, apply, deviation, sign, interpolation = uniforms[first : first + UNIFORMS_PER_OPERATION]
        weights = policy.weights and [policy.weights[i] for i in left]
        name = policy.operations[left.pop(_chosen(choice, weights) if weights else int(choice * len(left)))]
        if apply >= APPLY:
            continue
        level = NormalDist(policy.magnitude, policy.std).inv_cdf(deviation + 2**-54) if policy.std else policy.magnitude
        value = argument(name, min(max(level, 0.0), TOP_LEVEL), negate=sign >= 0.5)
        how = INTERPOLATIONS[int(interpolation * len(INTERPOLATIONS))] if moves_pixels(name) else None
        drawn.append(Operation(name, value, how))
    return drawn


def _chosen(uniform: float, weights: Sequence[float]) -> int:
    """A position, in proportion to its weight."""
    until, sums = uniform * sum(weights), list(accumulate(weights))
    return next(i for i, end in enumerate(sums) if until < end or end == sums[-1])


# ---------------------------------------------------------------------------------------------------------------------
# What is done, with Pillow
# ---------------------------------------------------------------------------------------------------------------------


def carry_out(image: Image.Image, operation: Operation, fill: tuple[int, int, int] = FILL) -> Image.Image:
    """``operation`` on the whole RGB image."""
    name, value, interpolation = operation
    if not moves_pixels(name):
        return POINTWISE[plain_name(name)](image, value)
    resample = Image.Resampling[interpolation.upper()]
    if name == "Rotate":
        return image.rotate(value, resample, fillcolor=fill)
    matrix = affine_matrix(operation, *image.size)
    return image.transform(image.size, Image.Transform.AFFINE, matrix, resample, fillcolor=fill)


def affine_matrix(operation: Operation, width: int, height: int) -> tuple[float, ...]:
    """Where in an image an output pixel (x, y) looks: at (a x + b y + c, d x + e y + f), so a positive move is to the
    left. A rotation has the numbers of Pillow's, rounded as these."""
    name, value, _ = operation
    match name:
        case "ShearX":
            return (1, value, 0, 0, 1, 0)
        case "ShearY":
            return (1, 0, 0, value, 1, 0)
        case "TranslateX" | "TranslateXRel":
            return (1, 0, value * width if name.endswith("Rel") else value, 0, 1, 0)
        case "TranslateY" | "TranslateYRel":
            return (1, 0, 0, 0, 1, value * height if name.endswith("Rel") else value)
    angle, x, y = -math.radians(value % 360.0), width / 2, height / 2
    a, b, d, e = (round(v, 15) for v in (math.cos(angle), math.sin(angle), -math.sin(angle), math.cos(angle)))
    return (a, b, a * -x + b * -y + x, d, e, d * -x + e * -y + y)


def plain_name(name: str) -> str:
    """The operation without the way in which its level is understood: PosterizeIncreasing -> Posterize."""
    return name.removesuffix("Increasing").removesuffix("Original")


def solarize_add(image: Image.Image, value: float) -> Image.Image:
    return image.point([min(255, level + int(value)) if level < 128 else level for level in range(256)] * 3)


POINTWISE: dict[str, Callable[[Image.Image, float | None], Image.Image]] = {
    "AutoContrast": lambda image, _: ImageOps.autocontrast(image),
    "Equalize": lambda image, _: ImageOps.equalize(image),
    "Invert": lambda image, _: ImageOps.invert(image),
    "Posterize": lambda image, bits: posterize(image, int(bits)),
    "Solarize": lambda image, threshold: ImageOps.solarize(image, int(threshold)),
    "SolarizeAdd": solarize_add,
    "Color": lambda image, factor: ImageEnhance.Color(image).enhance(factor),
    "Contrast": lambda image, factor: ImageEnhance.Contrast(image).enhance(factor),
    "Brightness": lambda image, factor: ImageEnhance.Brightness(image).enhance(factor),
    "Sharpness": lambda image, factor: ImageEnhance.Sharpness(image).enhance(factor),
    "Hue": F.adjust_hue,  # this and the next are none of RandAugment's, but of the colour jitter that may follow it
    "Grayscale": lambda image, _: F.rgb_to_grayscale(image, 3),
}
