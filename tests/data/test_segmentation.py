"""Training crops of images with a class for every pixel: what is drawn, and that nothing depends on who draws."""

import numpy as np
import torch

from data.preprocess import MEAN, STD
from data.segmentation import IGNORED, SegmentationViews, blank, classes_of, drawn_photometric, is_varied
from tests.stamps import class_map, picture


def test_a_crop_and_its_labels_stay_together():
    """A picture whose red says the class keeps that through scaling, cropping and flipping."""
    labels = np.repeat(np.repeat(np.arange(4, dtype=np.uint8).reshape(2, 2), 30, 0), 30, 1)
    image = np.stack([labels * 60] * 3, axis=-1)
    seen, flips = set(), 0
    for index in range(40):
        view = SegmentationViews(32)((image, labels), (0, 0, index))
        rows, columns = view["extent"].tolist()
        assert (view["labels"][rows:] == IGNORED).all() and (view["labels"][:, columns:] == IGNORED).all()
        crop, inside = view["crops"][0][0, :rows, :columns].float(), view["labels"][:rows, :columns]
        means = [crop[inside == k].mean() for k in range(4) if (inside == k).sum() > 40]
        assert means == sorted(means)  # colours are distorted, their order is not
        flips += int(inside[0, 0] % 2 > inside[0, -1] % 2)
        seen.add((rows, columns))
    assert len(seen) > 3 and 5 < flips < 35
    assert (16, 16) in seen or min(seen)[0] < 32  # ratios below 1 leave padding


def test_a_view_depends_on_its_key_alone():
    pixels, found = picture(3, 40, 50)
    pair, views = (pixels, class_map(found)), SegmentationViews(24)
    one, again, other = (views(pair, key) for key in ((1, 2, 3), (1, 2, 3), (1, 2, 4)))
    assert torch.equal(one["crops"][0], again["crops"][0]) and torch.equal(one["labels"], again["labels"])
    assert not torch.equal(one["crops"][0], other["crops"][0])


def test_crops_of_one_class_are_avoided_where_that_is_possible():
    labels = np.zeros((64, 64), np.uint8)
    labels[:, 40:] = 1
    image = np.zeros((64, 64, 3), np.uint8)
    views = SegmentationViews(32, ratios=(2.0, 2.0))  # ratio x side is the shorter side: the picture as it is
    varied = [is_varied(views((image, labels), (0, 0, i))["labels"].numpy()) for i in range(60)]
    single = SegmentationViews(32, ratios=(2.0, 2.0))((image, np.zeros_like(labels)), (0, 0, 0))
    assert sum(varied) > 55 and (single["labels"] == 0).all()


def test_colours_are_drawn_as_often_as_they_should_be():
    rng = np.random.default_rng(0)
    drawn = [drawn_photometric(rng.random(10)) for _ in range(2000)]
    for name, low, high in (
        ("brightness", -32, 32),
        ("contrast", 0.5, 1.5),
        ("saturation", 0.5, 1.5),
        ("hue", -18, 17),
    ):
        values = [getattr(how, name) for how in drawn if getattr(how, name) is not None]
        assert 0.45 < len(values) / 2000 < 0.55
        width = high - low
        assert low <= min(values) < low + 0.05 * width and high - 0.05 * width < max(values) <= high
    assert 0.45 < sum(how.contrast_first for how in drawn) / 2000 < 0.55


def test_padding_is_nought_after_normalisation():
    images = torch.randn(2, 3, 6, 6)
    result = blank(images, torch.tensor([[6, 6], [4, 3]]))
    assert torch.equal(result[0], images[0]) and torch.equal(result[1, :, :4, :3], images[1, :, :4, :3])
    assert result[1, :, 4:].abs().sum() == result[1, :, :, 3:].abs().sum() == 0
    assert len(MEAN) == len(STD) == 3


def test_classes_count_from_one_in_files():
    raw = np.array([0, 1, 150, 255], np.uint8)
    assert classes_of(raw).tolist() == [IGNORED, 0, 149, IGNORED]
