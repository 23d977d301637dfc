"""The fast operations against Pillow's, one by one and as whole crops."""

import random

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps
from torchvision import transforms
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from data import augment
from data.augment import Box, Crop, CropRecipe, crop_uniforms, draw_box, draw_crop, render
from data.views import MultiCropViews, seeded_generators
from tests.data.helpers import photograph

IMAGES = [photograph(seed, 150, 200) for seed in range(4)]
PIL_COLOUR = {
    "brightness": F.adjust_brightness,
    "contrast": F.adjust_contrast,
    "saturation": F.adjust_saturation,
    "hue": F.adjust_hue,
}
AMOUNTS = {
    "brightness": np.linspace(0.6, 1.4, 9),
    "contrast": np.linspace(0.6, 1.4, 9),
    "saturation": np.linspace(0.8, 1.2, 9),
    "hue": np.linspace(-0.1, 0.1, 9),
}


def difference(fast: np.ndarray, pil: Image.Image) -> np.ndarray:
    pil = np.asarray(pil)
    assert fast.dtype == np.uint8 and fast.shape == pil.shape
    return np.abs(fast.astype(int) - pil)


# ---- single operations: the tolerances are those that data/augment.py states ----------------------------------------


@pytest.mark.parametrize(
    ("name", "mean"), [("brightness", 0.03), ("contrast", 0.03), ("saturation", 0.02), ("hue", 1e-3)]
)
def test_colours_are_within_one_level_of_pillow(name, mean):
    for image in IMAGES:
        for amount in AMOUNTS[name].tolist():
            pil = PIL_COLOUR[name](Image.fromarray(image), amount)
            delta = difference(augment.COLOUR_OPERATIONS[name](image, amount), pil)
            assert delta.max() <= 1 and delta.mean() <= mean, amount


def test_hues_on_a_step_are_rounded_as_pillow_does():
    # colours of few levels: most of their hues are ratios of small numbers
    image = np.random.default_rng(0).integers(0, 16, (300, 300, 3)).astype(np.uint8) * 17
    assert difference(augment.adjust_hue(image, 0.03), F.adjust_hue(Image.fromarray(image), 0.03)).max() <= 1


@pytest.mark.parametrize("name", AMOUNTS)
@pytest.mark.parametrize("level", [0, 1, 127, 128, 255])
def test_colours_of_flat_images_stay_within_one_level_of_pillow(name, level):
    image = np.full((8, 8, 3), level, np.uint8)
    for amount in AMOUNTS[name].tolist():
        pil = PIL_COLOUR[name](Image.fromarray(image), amount)
        assert difference(augment.COLOUR_OPERATIONS[name](image, amount), pil).max() <= 1


def test_greyscale_is_within_one_level_and_solarise_and_flip_are_exact():
    for image in IMAGES:
        pil = Image.fromarray(image)
        delta = difference(augment.grayscale(image), pil.convert("L"))
        assert delta.max() <= 1 and delta.mean() < 0.01
        assert difference(augment.solarize(image), ImageOps.solarize(pil)).max() == 0
        assert difference(augment.flip(image), F.hflip(pil)).max() == 0


def test_blur_is_pillows_but_for_radii_whose_weights_leave_halves():
    radii = [*np.linspace(0.1, 2.0, 60).tolist(), 0.5, 1.0]
    deltas = []
    for image in IMAGES[:2]:
        pil = Image.fromarray(image)
        for radius in radii:
            delta = difference(augment.gaussian_blur(image, radius), pil.filter(ImageFilter.GaussianBlur(radius)))
            assert delta.max() <= 2 and delta.mean() <= 0.2, radius
            deltas.append(delta.max())
    assert np.mean(np.array(deltas) == 0) > 0.9


def test_a_grey_image_is_blurred_and_solarised_like_its_three_channels():
    grey = augment.grayscale(IMAGES[0])
    for operation in (lambda image: augment.gaussian_blur(image, 1.3), augment.solarize):
        assert np.array_equal(augment.to_planes(operation(grey)), augment.to_planes(operation(np.stack([grey] * 3, 2))))


@pytest.mark.parametrize("size", [32, 96, 224])
def test_resized_crops_are_pillows_larger_and_smaller(size):
    boxes = [(0, 0, 150, 200), (10, 20, 90, 60), (3, 5, 20, 30), (0, 0, 1, 1), (149, 0, 1, 200), (7, 3, 111, 123)]
    shares = []
    for box in boxes:
        pil = F.resized_crop(Image.fromarray(IMAGES[0]), *box, [size, size], InterpolationMode.BICUBIC)
        delta = difference(augment.resized_crop(IMAGES[0], Box(*box), size), pil)
        assert delta.max() <= 3 and delta.mean() <= 0.25, box
        shares.append((delta > 0).mean())
    assert np.median(shares) <= 0.01


def test_read_only_images_are_accepted_and_nothing_changes_its_input(recwarn):
    image = photograph(0)
    image.flags.writeable = False
    before = image.copy()
    for operation in augment.COLOUR_OPERATIONS.values():
        operation(image, 0.05)
    augment.gaussian_blur(image, 1.0)
    augment.solarize(image)
    render(image, Crop(Box(0, 0, *image.shape[:2]), True, (("hue", 0.1),), True, 1.0, True), 32)
    assert np.array_equal(image, before)
    assert not recwarn.list


# ---- what is drawn --------------------------------------------------------------------------------------------------


class ScriptedDraws:
    """Gives torchvision's RandomResizedCrop the uniform numbers that ``draw_box`` sees."""

    def __init__(self, monkeypatch, uniforms):
        self.areas, self.aspects = iter(uniforms[:10]), iter(uniforms[10:20])
        self.places = iter(uniforms[20:22])
        self.turn = 0
        monkeypatch.setattr(torch.Tensor, "uniform_", lambda _, low, high: self.uniform(low, high))
        monkeypatch.setattr(torch, "randint", self.randint)

    def uniform(self, low, high):
        u = next(self.areas if self.turn % 2 == 0 else self.aspects)
        self.turn += 1
        return torch.tensor(float(low) + (float(high) - float(low)) * u, dtype=torch.float64)

    def randint(self, low, high, size):
        return torch.tensor([int(low + next(self.places) * (high - low))])


@pytest.mark.parametrize("size", [(375, 500), (500, 375), (64, 64), (20, 400), (400, 20), (1, 1), (3, 2)])
@pytest.mark.parametrize("scale", [(0.05, 0.4), (0.4, 1.0), (1.0, 1.0)])
def test_boxes_follow_random_resized_crop_attempt_by_attempt(monkeypatch, size, scale):
    recipe = CropRecipe(96, scale)
    image = Image.new("RGB", size[::-1])
    for index in range(100):
        uniforms = crop_uniforms((1, 2, index), 1)[0]
        with monkeypatch.context() as patch:
            ScriptedDraws(patch, uniforms)
            expected = transforms.RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3])
        assert draw_box(recipe, uniforms, *size) == expected


def test_numbers_of_a_crop_depend_on_its_key_and_number_only():
    assert crop_uniforms((0, 1, 2), 5)[:3] == crop_uniforms((0, 1, 2), 3)
    seen = {tuple(row) for key in ((0, 1, 2), (0, 2, 1), (1, 1, 2)) for row in crop_uniforms(key, 4)}
    assert len(seen) == 12


def test_certain_and_impossible_decisions():
    always = CropRecipe(8, (0.5, 1), flip=1, jitter=1, grayscale=1, blur=1, solarize=1)
    never = CropRecipe(8, (0.5, 1), flip=0, jitter=0, grayscale=0, blur=0, solarize=0)
    for index in range(200):
        uniforms = crop_uniforms((0, 0, index), 1)[0]
        yes, no = draw_crop(always, uniforms, 30, 40), draw_crop(never, uniforms, 30, 40)
        assert yes.flip and len(yes.jitter) == 4 and yes.grayscale and yes.blur is not None and yes.solarize
        assert (no.flip, no.jitter, no.grayscale, no.blur, no.solarize) == (False, (), False, None, False)


# ---- whole crops ----------------------------------------------------------------------------------------------------


def rendered_by_pillow(image: np.ndarray, crop: Crop, size: int) -> np.ndarray:
    """The same decisions, carried out by the operations of the original."""
    pil = F.resized_crop(Image.fromarray(image), *crop.box, [size, size], InterpolationMode.BICUBIC)
    pil = F.hflip(pil) if crop.flip else pil
    for name, amount in crop.jitter:
        pil = PIL_COLOUR[name](pil, amount)
    pil = F.rgb_to_grayscale(pil, 3) if crop.grayscale else pil
    pil = pil if crop.blur is None else pil.filter(ImageFilter.GaussianBlur(crop.blur))
    return np.asarray(ImageOps.solarize(pil) if crop.solarize else pil).transpose(2, 0, 1)


def test_what_was_drawn_is_what_is_done():
    views = MultiCropViews(local_crops=[(3, 32)], global_crops_size=64)
    for index in range(40):
        image, key = IMAGES[index % 4], (0, 0, index)
        crops = views(image, key)["crops"]
        for recipe, uniforms, fast in zip(views.recipes, crop_uniforms(key, 5), crops, strict=True):
            crop = draw_crop(recipe, uniforms, *image.shape[:2])
            delta = np.abs(fast.numpy().astype(int) - rendered_by_pillow(image, crop, recipe.size))
            # one level more or less may turn a hue or solarise a value of 127
            assert delta.mean() <= 1 and (delta > 3).mean() <= 0.02, crop


def measurements(crops: torch.Tensor) -> np.ndarray:
    """(samples, 3, size, size) -> (samples, 8): what a network could tell two distributions of crops by."""
    pixels = crops.double() / 255
    channel_means = pixels.mean((2, 3))
    spread = pixels.std((1, 2, 3))
    saturation = (pixels.amax(1) - pixels.amin(1)).mean((1, 2))
    detail = pixels.diff(dim=3).square().mean((1, 2, 3)).sqrt()
    detail_down = pixels.diff(dim=2).square().mean((1, 2, 3)).sqrt()
    bright = (pixels > 0.5).double().mean((1, 2, 3))
    columns = [spread, saturation, detail, detail_down, bright]
    return torch.cat([channel_means, torch.stack(columns, 1)], 1).numpy()


def kolmogorov_smirnov(a: np.ndarray, b: np.ndarray) -> float:
    """Largest distance of the two cumulative distributions, in units in which 1.95 is exceeded once in a thousand."""
    both = np.concatenate([a, b])
    distance = np.searchsorted(np.sort(a), both, "right") / len(a) - np.searchsorted(np.sort(b), both, "right") / len(b)
    return np.abs(distance).max() * np.sqrt(len(a) * len(b) / (len(a) + len(b)))


def test_whole_crops_of_both_paths_have_the_same_distribution():
    samples, sizes = 700, {"global_crops_size": 48, "local_crops": [(1, 24)]}
    fast, pil = MultiCropViews(**sizes), MultiCropViews(**sizes, augment="pil")
    images = [photograph(seed, 75, 100) for seed in range(20)]
    pil_images = [Image.fromarray(image) for image in images]
    crops = {
        "fast": [fast(images[i % 20], (1, 0, i))["crops"] for i in range(samples)],
        "pil": [pil(pil_images[i % 20], (2, 0, i))["crops"] for i in range(samples)],
    }
    for kind in range(3):
        a, b = (measurements(torch.stack([sample[kind] for sample in crops[path]])) for path in ("fast", "pil"))
        error = np.sqrt(a.var(0) / samples + b.var(0) / samples)
        assert (np.abs(a.mean(0) - b.mean(0)) < 4 * error).all()
        assert all(kolmogorov_smirnov(a[:, column], b[:, column]) < 2.1 for column in range(a.shape[1]))


def test_the_comparison_of_distributions_would_notice_a_missing_operation():
    # the two global recipes differ in blur and solarise only
    views = MultiCropViews(global_crops_size=48, local_crops=[])
    crops = [views(photograph(i % 20, 75, 100), (1, 0, i))["crops"] for i in range(300)]
    a, b = (measurements(torch.stack([sample[kind] for sample in crops])) for kind in range(2))
    assert max(kolmogorov_smirnov(a[:, column], b[:, column]) for column in range(a.shape[1])) > 3


def test_the_pillow_path_repeats_the_original_seeded_alike():
    """The golden case holds every 16th pixel; here all pixels, against the documented order written out."""
    views = MultiCropViews((0.25, 1.0), (0.05, 0.25), [(2, 32)], 64, augment="pil")
    image = Image.fromarray(IMAGES[0])
    with seeded_generators(11):
        crops = views.pil_crops(image)
    with seeded_generators(11):
        colours = transforms.Compose(
            [
                transforms.RandomHorizontalFlip(0.5),
                transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8),
                transforms.RandomGrayscale(0.2),
            ]
        )
        table = [(64, (0.25, 1.0), 1.0, 0), (64, (0.25, 1.0), 0.1, 0.2), *[(32, (0.05, 0.25), 0.5, 0)] * 2]
        for crop, (size, scale, blur, solarize) in zip(crops, table, strict=True):
            cut = transforms.RandomResizedCrop(size, scale, interpolation=InterpolationMode.BICUBIC)
            pil = colours(cut(image))
            if random.random() <= blur:
                pil = pil.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))
            if solarize and random.random() < solarize:
                pil = ImageOps.solarize(pil)
            assert np.array_equal(crop.permute(1, 2, 0), np.asarray(pil))
