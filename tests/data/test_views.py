import pickle
import random

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from data.views import LinearViews, MultiCropViews, seeded_generators
from tests.data.helpers import photograph

SMALL = {"global_crops_size": 32, "local_crops": [(3, 16)]}


def crops(views: MultiCropViews, image: np.ndarray, key=(0, 0, 0)) -> list[torch.Tensor]:
    return views(Image.fromarray(image) if views.augment == "pil" else image, key)["crops"]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture(params=["fast", "pil"])
def augment(request) -> str:
    return request.param


@pytest.mark.parametrize("number", [0, 1, 3])
@pytest.mark.parametrize("shape", [(90, 120), (10, 7), (1, 1), (200, 9)])
def test_crops_are_bytes_of_the_asked_sizes_whatever_the_image_is(augment, number, shape):
    views = MultiCropViews(local_crops=[(number, 16)], global_crops_size=32, augment=augment)
    image = photograph(0, *(max(8, side) for side in shape))[: shape[0], : shape[1]].copy()
    for index in range(10):
        made = crops(views, image, (0, 0, index))
        assert [tuple(crop.shape) for crop in made] == [(3, 32, 32)] * 2 + [(3, 16, 16)] * number
        assert all(crop.dtype == torch.uint8 and crop.is_contiguous() for crop in made)


def test_crops_depend_on_the_key_and_on_nothing_else(augment):
    views, image = MultiCropViews(**SMALL, augment=augment), photograph(1)
    first = crops(views, image, (5, 6, 7))
    random.seed(1)
    torch.manual_seed(1)
    np.random.seed(1)
    assert same(crops(pickle.loads(pickle.dumps(views)), image, (5, 6, 7)), first)
    for other in ((4, 6, 7), (5, 7, 7), (5, 6, 8)):
        assert not any(torch.equal(a, b) for a, b in zip(crops(views, image, other), first, strict=True))
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[2], first[3])


def test_global_generators_go_on_as_if_nothing_had_been(augment):
    views, image = MultiCropViews(**SMALL, augment=augment), photograph(1)
    with seeded_generators(3):
        expected = (torch.rand(3), random.random())
    with seeded_generators(3):
        crops(views, image)
        assert torch.equal(torch.rand(3), expected[0]) and random.random() == expected[1]


def test_more_local_crops_leave_the_others_as_they_are(augment):
    image = photograph(2)
    few = crops(MultiCropViews(**{**SMALL, "local_crops": [(1, 16)]}, augment=augment), image)
    many = crops(MultiCropViews(**SMALL, augment=augment), image)
    assert same(few, many[:3])


def test_local_crops_of_several_sizes_are_those_of_each_size_at_the_same_place(augment):
    image = photograph(2)

    def made(*local_crops):
        return crops(MultiCropViews(**{**SMALL, "local_crops": local_crops}, augment=augment), image, (1, 2, 3))

    several = made((2, 16), (0, 24), (1, 12))
    assert [crop.shape[-1] for crop in several] == [32, 32, 16, 16, 12]
    assert same(several[:4], made((3, 16))[:4])
    if augment == "fast":  # Pillow's path goes on drawing where the crop before ended
        assert torch.equal(several[4], made((3, 12))[4])


def test_a_recipe_prints_as_a_table():
    text = repr(MultiCropViews())
    assert text.startswith("MultiCropViews (fast)") and len(text.splitlines()) == 11
    assert "size=224" in text and "blur=0.1" in text and "solarize=0.2" in text


def test_an_unknown_path_is_an_error():
    with pytest.raises(ValueError, match="'tensor': has to be fast or pil"):
        MultiCropViews(augment="tensor")


def test_the_crop_of_linear_probing_is_the_originals_bit_for_bit_and_the_fast_one_is_alike():
    image = Image.fromarray(photograph(2))
    theirs = transforms.Compose([transforms.RandomResizedCrop(32), transforms.RandomHorizontalFlip()])
    pil, fast = LinearViews(32, "pil"), LinearViews(32)
    means = []
    for index in range(200):
        with seeded_generators(index):
            ours = pil.pil_crops(image)[0]
        with seeded_generators(index):
            assert np.array_equal(ours.permute(1, 2, 0).numpy(), np.array(theirs(image)))
        means.append(
            [views(x, (0, 0, index))["crops"][0].float() for views, x in ((pil, image), (fast, photograph(2)))]
        )
    pil_crops, fast_crops = (torch.stack(crops) for crops in zip(*means, strict=True))
    assert fast_crops.shape == (200, 3, 32, 32)
    assert abs(pil_crops.mean() - fast_crops.mean()) < 3 and abs(pil_crops.std() - fast_crops.std()) < 3
