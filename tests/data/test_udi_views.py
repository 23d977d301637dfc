"""UDI's crops as a whole: what is drawn, what is carried out, and what a batch holds."""

import pickle
import random

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from data import udi_views
from data.augment import PIL_COLOUR_OPERATIONS
from data.udi_views import UDIViews
from data.views import seeded_generators
from tests.data.helpers import photograph

SMALL = {"global_crops_size": 64, "local_crops_size": 32, "local_crops_number": 3, "patch_size": 8}
MAPS = ["source", "target_index", "target_weight", "valid"]
LOCAL_MAPS = ["local_source", "local_index", "local_weight", "local_valid"]


@pytest.fixture(params=["fast", "pil"])
def augment(request) -> str:
    return request.param


def sample(views: UDIViews, image: np.ndarray, key=(0, 0, 0)) -> dict:
    return views(Image.fromarray(image) if views.augment == "pil" else image, key)


def flat(sample: dict) -> list[torch.Tensor]:
    return [*sample["crops"], *(value for name, value in sample.items() if name != "crops")]


def same(a: dict, b: dict) -> bool:
    return list(a) == list(b) and all(torch.equal(x, y) for x, y in zip(flat(a), flat(b), strict=True))


@pytest.mark.parametrize("number", [0, 1, 3])
@pytest.mark.parametrize("shape", [(90, 120), (10, 7), (1, 1), (3, 500), (200, 1)])
@pytest.mark.filterwarnings("error")
def test_samples_have_the_asked_shapes_whatever_the_image_is(augment, number, shape):
    views = UDIViews(**{**SMALL, "local_crops_number": number}, augment=augment)
    image = photograph(0, *(max(8, side) for side in shape))[: shape[0], : shape[1]].copy()
    for index in range(5):
        made = sample(views, image, (0, 0, index))
        crops = made.pop("crops")
        assert [tuple(crop.shape) for crop in crops] == [(3, 64, 64)] * 2 + [(3, 32, 32)] * number
        assert all(crop.dtype == torch.uint8 and crop.is_contiguous() for crop in crops)
        assert list(made) == MAPS + (LOCAL_MAPS if number else [])
        shapes = [(2, 4), (2, 4, 4), (2, 4, 4), (2,), (number, 2, 4), (number, 2, 4, 4), (number, 2, 4, 4), (number, 2)]
        assert [tuple(value.shape) for value in made.values()] == shapes[: len(made)]
        weights = {"target_weight", "local_weight"}
        assert all(v.dtype == (torch.float32 if n in weights else torch.int64) for n, v in made.items())


def test_the_points_of_the_paper():
    made = sample(UDIViews(local_crops_number=1), photograph())
    assert made["source"].shape == (2, 16) and made["local_index"].shape == (1, 2, 9, 4)
    assert made["target_index"].max() < 196 and made["local_index"].max() < 196


def test_samples_depend_on_the_key_and_on_nothing_else(augment):
    views, image = UDIViews(**SMALL, augment=augment), photograph(1)
    first = sample(views, image, (5, 6, 7))
    random.seed(1)
    torch.manual_seed(1)
    np.random.seed(1)
    with seeded_generators(3):
        expected = (torch.rand(3), random.random())
    with seeded_generators(3):
        assert same(sample(pickle.loads(pickle.dumps(views)), image, (5, 6, 7)), first)
        assert torch.equal(torch.rand(3), expected[0]) and random.random() == expected[1]
    for key in ((4, 6, 7), (5, 7, 7), (5, 6, 8)):
        other = sample(views, image, key)
        assert not any(torch.equal(a, b) for a, b in zip(other["crops"], first["crops"], strict=True))
        assert not torch.equal(other["source"], first["source"])


def test_more_local_crops_leave_the_others_as_they_are(augment):
    image = photograph(2)
    none, one, three = (
        sample(UDIViews(**{**SMALL, "local_crops_number": number}, augment=augment), image) for number in (0, 1, 3)
    )
    assert all(torch.equal(a, b) for a, b in zip(none["crops"], three["crops"], strict=False))
    assert torch.equal(one["crops"][2], three["crops"][2])
    assert all(torch.equal(none[name], three[name]) for name in MAPS)
    assert all(torch.equal(one[name], three[name][:1]) for name in LOCAL_MAPS)


def test_without_patches_the_crops_are_the_same_and_nothing_else_is_there(augment):
    with_patches, without = (
        sample(UDIViews(**SMALL, augment=augment, include_patch=include), photograph()) for include in (True, False)
    )
    assert list(without) == ["crops"] and same(without, {"crops": with_patches["crops"]})
    assert list(UDIViews.collate([without, without])) == ["crops"]


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"window 9: has to be in 1\.\.8"):
        UDIViews(**SMALL, global_sampling_window_size=9)
    with pytest.raises(ValueError, match=r"window 5: has to be in 1\.\.4"):
        UDIViews(**SMALL, local_sampling_window_size=5)
    UDIViews(**{**SMALL, "local_crops_number": 0}, local_sampling_window_size=5)  # nothing is sampled there
    UDIViews(**SMALL, local_sampling_window_size=5, include_patch=False)
    with pytest.raises(ValueError, match="'tensor': has to be fast or pil"):
        UDIViews(augment="tensor")


def test_a_recipe_prints_as_a_table():
    lines = repr(UDIViews()).splitlines()
    assert lines[0] == "UDIViews (fast)" and len(lines) == 11
    assert lines[-2] == "  16 points of 14 x 14 patches of a global crop"
    assert lines[-1] == "  9 points of 6 x 6 patches of a local crop"
    assert len(repr(UDIViews(local_crops_number=0)).splitlines()) == 4


# ---- what is drawn and what is done ---------------------------------------------------------------------------------


def test_blur_and_solarise_come_together_as_often_as_they_should():
    views, samples = UDIViews(local_crops_number=2), 3000
    crops = [views.draw((0, 0, index), 375, 500)[0] for index in range(samples)]
    for number in range(4):
        drawn = [(image[number].blur is not None, image[number].solarize) for image in crops]
        for outcome, p in {(True, True): 0.01, (False, True): 0.09, (True, False): 0.415}.items():
            assert abs(drawn.count(outcome) / samples - p) < 4 * (p * (1 - p) / samples) ** 0.5
    radii = [crop.blur for image in crops for crop in image if crop.blur is not None]
    assert 0.1 <= min(radii) < 0.11 and 1.99 < max(radii) <= 2.0


def by_pillow(image: np.ndarray, crop, size: int) -> np.ndarray:
    top, left, height, width = crop.box
    pil = F.crop(Image.fromarray(image), top, left, height, width)
    pil = F.resize(F.hflip(pil) if crop.flip else pil, [size, size], InterpolationMode.BICUBIC)
    for name, amount in crop.jitter:
        pil = PIL_COLOUR_OPERATIONS[name](pil, amount)
    pil = F.rgb_to_grayscale(pil, 3) if crop.grayscale else pil
    pil = pil if crop.blur is None else pil.filter(ImageFilter.GaussianBlur(crop.blur))
    return np.asarray(ImageOps.solarize(pil) if crop.solarize else pil).transpose(2, 0, 1)


def test_both_paths_carry_out_the_same_decisions():
    fast, pil = UDIViews(**SMALL), UDIViews(**SMALL, augment="pil")
    for index in range(40):
        image, key = photograph(index % 4, 150, 200), (0, 0, index)
        made = sample(fast, image, key), sample(pil, image, key)
        assert same(*(dict(part, crops=[]) for part in made))
        drawn = fast.draw(key, 150, 200)[0]
        for recipe, crop, quick, slow in zip(fast.recipes, drawn, *(part["crops"] for part in made), strict=True):
            assert np.array_equal(slow, by_pillow(image, crop, recipe.size))
            delta = np.abs(quick.numpy().astype(int) - slow.numpy())
            # one level more or less may turn a hue or solarise a value of 127
            assert delta.mean() <= 1 and (delta > 3).mean() <= 0.02, crop


def test_a_point_and_its_place_show_the_same_part_of_the_image(augment, monkeypatch):
    """Two channels say at which row and column of the image a pixel is."""
    monkeypatch.setattr(udi_views, "coloured", lambda recipe, _: recipe)
    views = UDIViews(local_crops_number=2, augment=augment)
    views.recipes = [udi_views.replace(recipe, jitter=0, grayscale=0) for recipe in views.recipes]
    rows, columns = np.mgrid[:200, :250].astype(np.uint8)
    image, compared, flips = np.stack([rows, columns, rows], 2), 0, set()

    def shown(crop: torch.Tensor, place: np.ndarray) -> np.ndarray:
        row, column = np.rint(np.asarray(place) * (crop.shape[-1] - 1)).astype(int)
        return crop[:2, row, column].numpy().astype(int)

    for index in range(30):
        made = sample(views, image, (3, 0, index))
        crops, drawn = made["crops"], views.draw((3, 0, index), 200, 250)
        flips |= {tuple(crop.flip for crop in drawn[0][:2])}
        pairs = [(crops[v], crops[1 - v], 14, *(made[name][v] for name in MAPS)) for v in range(2)]
        pairs += [
            (crops[2 + n], crops[1 - v], 6, *(made[name][n, v] for name in LOCAL_MAPS))
            for n in range(2)
            for v in range(2)
        ]
        for source, target, grid, token, at, weight, valid in pairs:
            for point in range(int(valid)):
                here = shown(source, np.divmod(int(token[point]), grid) / np.float64(grid - 1))
                row, column = np.divmod(at[point].numpy(), 14)
                place = np.array([weight[point].numpy() @ row, weight[point].numpy() @ column]) / 13
                assert np.abs(here - shown(target, place)).max() <= 3
                compared += 1
    assert compared > 800 and len(flips) == 4


# ---- batches --------------------------------------------------------------------------------------------------------


def test_a_batch_says_where_the_valid_points_are():
    views = UDIViews(**SMALL)
    samples = [sample(views, photograph(1), (0, 0, index)) for index in range(6)]
    piece = views.collate(samples)
    assert piece["source"].shape == (6, 2, 4) and piece["local_weight"].shape == (6, 3, 2, 4, 4)
    points = [
        (view * 6 + image) * 4 + point
        for view in range(2)
        for image in range(6)
        for point in range(int(samples[image]["valid"][view]))
    ]
    local = [
        ((crop * 2 + view) * 6 + image) * 4 + point
        for crop in range(3)
        for view in range(2)
        for image in range(6)
        for point in range(int(samples[image]["local_valid"][crop, view]))
    ]
    assert piece["points"].tolist() == points and 0 < len(points) < 48
    assert piece["local_points"].tolist() == local and 0 < len(local) < 144
    weights = piece["target_weight"].transpose(0, 1).reshape(-1, 4)
    assert torch.allclose(weights[piece["points"]].sum(1), torch.ones(len(points)))
    assert weights.sum() == pytest.approx(len(points), abs=1e-4)


def test_a_batch_without_local_crops_has_no_local_points():
    views = UDIViews(**{**SMALL, "local_crops_number": 0})
    piece = views.collate([sample(views, photograph(1), (0, 0, index)) for index in range(2)])
    assert list(piece) == ["crops", *MAPS, "points"] and len(piece["crops"]) == 2
