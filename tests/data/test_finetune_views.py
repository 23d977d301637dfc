"""timm's augmentation by a key: the same for the same key, whoever else draws, and never stopped by a picture."""

import random

import numpy as np
import pytest
import torch
from PIL import Image

from data.finetune_views import FinetuneViews, posterize
from data.preprocess import MEAN, STD
from tests.sources import Stripes
from utils import UsageError

POLICIES = ["rand-m9-mstd0.5-inc1", "v0", "originalr", "augmix-m3-w2", None]


@pytest.mark.parametrize("policy", POLICIES)
def test_a_crop_follows_from_its_key_alone(policy):
    views, image = FinetuneViews(24, MEAN, STD, policy=policy, erase=0.5), Stripes().pil(1)
    first = views(image, (0, 1, 2))["images"]
    assert first.shape == (3, 24, 24) and first.dtype == torch.float32
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    expected = random.random(), np.random.rand(), torch.rand(1)
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    assert torch.equal(views(image, (0, 1, 2))["images"], first)
    assert (random.random(), np.random.rand(), torch.rand(1)) == expected
    assert not torch.equal(views(image, (0, 2, 2))["images"], first)


@pytest.mark.parametrize("policy", POLICIES)
def test_hundreds_of_pictures_survive_the_strongest_draws(policy):
    views, image = FinetuneViews(8, MEAN, STD, policy=policy), Stripes(size=12).pil(1)
    assert all(torch.isfinite(views(image, (0, 0, index))["images"]).all() for index in range(400))


def test_no_bits_are_black():
    image = Image.new("RGB", (4, 4), (255, 100, 3))
    assert [posterize(image, bits).getpixel((0, 0)) for bits in (8, 1, 0)] == [(255, 100, 3), (128, 0, 0), (0, 0, 0)]


def test_an_unknown_policy_is_refused():
    with pytest.raises(UsageError, match="--aa nonsense"):
        FinetuneViews(8, MEAN, STD, policy="nonsense")
