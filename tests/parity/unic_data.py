"""Runners: UNIC's crop, stage by stage with its decisions given, and what an image goes through before validation."""

from collections.abc import Iterator

import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from data.augment import Box, Crop
from data.device import normalise
from data.preprocess import MEAN, STD, eval_transform
from data.unic_views import coloured, render_floats, render_levels, smoothed
from tests.parity import Case


def transforms(case: Case) -> Iterator[tuple]:
    size = case.params["image_size"]
    for name in case.names("in/"):
        image = Image.fromarray(case.arrays[name])
        label = name.replace("in/", "out/eval_transfer/")
        yield label, eval_transform(size, size)(image), case.arrays[label]
        # nothing here computes the validation loss, so only the way of our uint8 crops to the network is ours
        resized = F.resize(F.pil_to_tensor(image), [size], InterpolationMode.BICUBIC, antialias=True)
        label = name.replace("in/", "out/distill_val/")
        yield label, normalise(F.center_crop(resized, [size])[None])[0], case.arrays[label]
    yield from augmentation(case, size)


def augmentation(case: Case, size: int) -> Iterator[tuple]:
    drawn, image = case.params["aug"], case.arrays["in/landscape"]
    operations = [case.params["jitter_op_codes"][str(code)] for code in drawn["order"]]
    jitter = tuple((name, drawn[name]) for name in operations)
    crop = Crop(Box(*drawn["crop"]), drawn["flip"], jitter, drawn["gray"], drawn["sigma"], drawn["solarize"])

    pil = Image.fromarray(image)
    pixels = F.pil_to_tensor(pil)
    cut = coloured(pixels, crop._replace(flip=False, jitter=(), grayscale=False), size)
    yield "aug/after_crop", cut, case.arrays["aug/after_crop"]
    pixels = coloured(pixels, crop, size)
    yield "aug/after_jitter", pixels, case.arrays["aug/after_jitter"]
    blurred = F.normalize(case.tensor("aug/after_blur").float(), list(MEAN), list(STD))
    yield "aug/after_blur, normalised", smoothed(pixels, crop._replace(solarize=False)), blurred
    yield "aug/final", render_floats(pil, crop, size), case.arrays["aug/final"]

    # on uint8: a level is 1 / 255 / 0.22 after normalisation; one that the rounding moves across the threshold, more
    fast = normalise(render_levels(image, crop, size)[None])[0]
    wrong = (fast - torch.from_numpy(case.arrays["aug/final"])).abs() > 1 / 255 / min(STD)
    yield "aug/final, fast, share of values a level off", wrong.float().mean(), torch.zeros(()), (0.0, 0.01)


RUNNERS = {"unic/transforms": transforms}
