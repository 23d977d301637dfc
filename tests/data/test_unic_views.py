"""UNIC's crop: the original's operations bit for bit, the fast ones against them, and what is drawn."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from data import unic_views
from data.augment import Box, Crop, crop_uniforms, draw_crop
from data.device import normalise
from data.preprocess import MEAN, STD
from data.unic_views import UNICViews, render_floats, render_levels
from data.views import seeded_generators
from tests.data.helpers import photograph
from tests.data.test_augment import AMOUNTS, kolmogorov_smirnov, measurements

IMAGES = [photograph(seed, 150, 200) for seed in range(4)]
LEVELS = 255 * max(STD)  # of a normalised difference, at most


@pytest.fixture(params=["fast", "pil"])
def augment(request) -> str:
    return request.param


def crop_of(views: UNICViews, image: np.ndarray, key=(0, 0, 0)) -> torch.Tensor:
    (crop,) = views(Image.fromarray(image) if views.augment == "pil" else image, key)["crops"]
    return crop


def original(size: int) -> v2.Compose:
    """The training transform in the order in which it is documented."""
    return v2.Compose(
        [
            v2.ToImage(),
            v2.RandomResizedCrop(size, interpolation=InterpolationMode.BICUBIC, antialias=True),
            v2.RandomHorizontalFlip(0.5),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8),
            v2.RandomGrayscale(0.2),
            v2.ToDtype(torch.float32, scale=True),
            v2.RandomApply([v2.GaussianBlur(9, (0.1, 5.0))], 0.2),
            v2.RandomSolarize(0.5, 0.2),
            v2.Normalize(MEAN, STD),
        ]
    )


class Diary:
    """Remembers what torchvision's transforms decide, as a Crop."""

    def __init__(self, monkeypatch):
        for kind in (v2.RandomResizedCrop, v2.ColorJitter, v2.GaussianBlur):
            self.remember(monkeypatch, kind, "make_params" if hasattr(kind, "make_params") else "_get_params")
        for kind in (v2.RandomHorizontalFlip, v2.RandomGrayscale, v2.RandomSolarize):
            self.remember(monkeypatch, kind, "transform" if hasattr(kind, "transform") else "_transform")
        self.drawn = {}

    def remember(self, monkeypatch, kind: type, method: str) -> None:
        theirs = getattr(kind, method)

        def remembering(transform, *args):
            result = theirs(transform, *args)
            self.drawn[kind] = result
            return result

        monkeypatch.setattr(kind, method, remembering)

    def crop(self) -> Crop:
        drawn, self.drawn = self.drawn, {}
        box, jitter = drawn[v2.RandomResizedCrop], drawn.get(v2.ColorJitter)
        names = ("brightness", "contrast", "saturation", "hue")
        operations = [names[i] for i in jitter["fn_idx"]] if jitter else []
        return Crop(
            box=Box(box["top"], box["left"], box["height"], box["width"]),
            flip=v2.RandomHorizontalFlip in drawn,
            jitter=tuple((name, jitter[f"{name}_factor"]) for name in operations),
            grayscale=v2.RandomGrayscale in drawn,
            blur=drawn[v2.GaussianBlur]["sigma"][0] if v2.GaussianBlur in drawn else None,
            solarize=v2.RandomSolarize in drawn,
        )


def test_the_floating_point_path_is_torchvisions_pipeline_bit_for_bit(monkeypatch):
    diary, transform, seen = Diary(monkeypatch), original(48), set()
    for index in range(60):
        image = Image.fromarray(IMAGES[index % 4])
        with seeded_generators(index):
            theirs = transform(image)
        crop = diary.crop()
        assert torch.equal(render_floats(image, crop, 48), theirs), crop
        seen |= {name for name in ("flip", "jitter", "grayscale", "blur", "solarize") if getattr(crop, name)}
    assert len(seen) == 5


# ---- single fast operations: the tolerances are those that data/unic_views.py states --------------------------------


def difference(fast: np.ndarray, theirs: torch.Tensor) -> np.ndarray:
    assert fast.dtype == np.uint8
    fast = fast if fast.ndim == 3 else np.repeat(fast[..., None], 3, 2)
    return np.abs(fast.astype(int) - theirs.permute(1, 2, 0).numpy())


def planes(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image).permute(2, 0, 1).contiguous()


FLAT = [np.full((9, 9, 3), level, np.uint8) for level in (0, 1, 127, 128, 255)]


@pytest.mark.parametrize("name", AMOUNTS)
def test_colours_are_within_one_level_of_torchvision_in_few_values(name):
    shares = []
    for image in IMAGES + FLAT:
        for amount in AMOUNTS[name].tolist():
            theirs = unic_views.TENSOR_COLOUR_OPERATIONS[name](planes(image), amount)
            delta = difference(unic_views.COLOUR_OPERATIONS[name](image, amount), theirs)
            assert delta.max() <= 1, amount
            if len(image) > 9:
                shares.append(delta.mean())
    assert max(shares) <= (0.2 if name == "saturation" else 0.05) and np.mean(shares) <= 0.08


def test_greyscale_is_torchvisions_which_makes_white_darker():
    for image in IMAGES + FLAT:
        delta = difference(unic_views.grayscale(image), F.rgb_to_grayscale(planes(image), 3))
        assert delta.max() <= 1 and delta.mean() <= 0.01
    assert unic_views.grayscale(FLAT[-1]).max() == 254


@pytest.mark.parametrize("sigma", [0.1, 0.21, 0.29, 0.5, 1.0, 2.3, 5.0])
def test_blur_is_torchvisions_rounded_once(sigma):
    for image in (*IMAGES, photograph(5, 9, 9), IMAGES[0][..., 0].copy()):
        values = planes(image if image.ndim == 3 else np.stack([image] * 3, 2)).float() / 255
        theirs = F.gaussian_blur(values, [9, 9], [sigma, sigma]).mul(255).round()
        delta = difference(unic_views.gaussian_blur(image, sigma), theirs)
        assert delta.max() <= 1 and delta.mean() <= 1e-3


# ---- whole crops ----------------------------------------------------------------------------------------------------


def test_both_paths_carry_the_same_decisions_out_and_differ_by_rounding():
    fast, pil = UNICViews(64), UNICViews(64, "pil")
    for index in range(60):
        image, key = IMAGES[index % 4], (0, 0, index)
        crop = draw_crop(fast.recipe, crop_uniforms(key, 1)[0], *image.shape[:2])
        delta = (normalise(crop_of(fast, image, key)[None])[0] - crop_of(pil, image, key)).abs() * LEVELS
        # a level more or less may turn a hue; half a level may be on the other side of 0.5 and solarised, or not
        assert delta.mean() <= 0.6 and (delta > 3).float().mean() <= 0.02, crop


def test_crops_of_the_fast_path_have_the_distribution_of_torchvisions():
    samples, fast, transform = 700, UNICViews(32), original(32)
    images = [photograph(seed, 75, 100) for seed in range(20)]
    pil_images = [Image.fromarray(image) for image in images]
    ours = torch.stack([crop_of(fast, images[i % 20], (1, 0, i)) for i in range(samples)])
    with seeded_generators(2):
        theirs = torch.stack([transform(pil_images[i % 20]) for i in range(samples)])
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    a, b = measurements(ours), measurements(((theirs * std + mean) * 255).round(decimals=2))
    error = np.sqrt(a.var(0) / samples + b.var(0) / samples)
    assert (np.abs(a.mean(0) - b.mean(0)) < 4 * error).all()
    assert all(kolmogorov_smirnov(a[:, column], b[:, column]) < 2.1 for column in range(a.shape[1]))


def test_operations_are_as_frequent_and_as_strong_as_the_original_says():
    views, samples = UNICViews(), 4000
    crops = [draw_crop(views.recipe, crop_uniforms((0, 0, index), 1)[0], 1500, 2000) for index in range(samples)]
    expected = {"flip": 0.5, "jitter": 0.8, "grayscale": 0.2, "blur": 0.2, "solarize": 0.2}
    for name, p in expected.items():
        share = np.mean([getattr(crop, name) not in (False, (), None) for crop in crops])
        assert abs(share - p) < 4 * np.sqrt(p * (1 - p) / samples), name
    sigmas = np.array([crop.blur for crop in crops if crop.blur is not None])
    assert np.abs(np.quantile(sigmas, [0, 0.5, 1]) - [0.1, 2.55, 5]).max() < 0.3
    areas = np.array([crop.box.height * crop.box.width for crop in crops]) / (1500 * 2000)
    assert np.abs(np.quantile(areas, [0, 1]) - [0.08, 1]).max() < 0.02


@pytest.mark.parametrize("shape", [(90, 120), (10, 7), (1, 1), (200, 9)])
def test_one_crop_of_the_asked_size_whatever_the_image_is(augment, shape):
    views = UNICViews(32, augment)
    image = photograph(0, *(max(8, side) for side in shape))[: shape[0], : shape[1]].copy()
    for index in range(20):
        crop = crop_of(views, image, (0, 0, index))
        assert crop.shape == (3, 32, 32) and crop.is_contiguous()
        assert crop.dtype == (torch.uint8 if augment == "fast" else torch.float32)


def test_crops_depend_on_the_key_and_on_nothing_else(augment):
    views, image = UNICViews(32, augment), photograph(1)
    with seeded_generators(3):
        expected = torch.rand(3)
    with seeded_generators(3):
        first = crop_of(views, image, (5, 6, 7))
        assert torch.equal(torch.rand(3), expected)
    assert torch.equal(crop_of(pickle.loads(pickle.dumps(views)), image, (5, 6, 7)), first)
    for other in ((4, 6, 7), (5, 7, 7), (5, 6, 8)):
        assert not torch.equal(crop_of(views, image, other), first)


def test_nothing_changes_an_image_and_read_only_ones_are_accepted(recwarn):
    image = photograph(0)
    image.flags.writeable = False
    before = image.copy()
    jitter = tuple((name, 0.05) for name in unic_views.COLOUR_OPERATIONS)
    for grey in (True, False):
        render_levels(image, Crop(Box(0, 0, *image.shape[:2]), True, jitter, grey, 1.0, True), 32)
    assert np.array_equal(image, before) and not recwarn.list


def test_a_recipe_prints_what_it_does_and_an_unknown_path_is_an_error():
    assert "size=224" in repr(UNICViews()) and "blur_radius=(0.1, 5.0)" in repr(UNICViews())
    with pytest.raises(ValueError, match="'tensor': has to be fast or pil"):
        UNICViews(augment="tensor")
