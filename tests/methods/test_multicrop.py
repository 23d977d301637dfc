import argparse

import pytest
import torch
import torch.nn as nn

from methods.multicrop import (
    MultiCropNetwork,
    add_crop_arguments,
    check_crop_arguments,
    crop_kinds,
    local_crops,
    multi_crop_views,
)
from utils import Parser, UsageError


def options(*argv: str, several: bool = False, **others) -> argparse.Namespace:
    parser = Parser()
    add_crop_arguments(parser.add_argument_group("crops"), several)
    parsed = vars(parser.parse_args(list(argv)))
    return argparse.Namespace(**{"arch": "vit_small", "patch_size": 16, "augment": "fast", **parsed, **others})


TWO = ("--local_crops_number", "2", "1", "--local_crops_size", "96", "64")


def test_one_number_and_one_size_say_the_same_as_lists_of_one():
    one, several = options(), options(several=True)
    assert (one.local_crops_number, several.local_crops_number) == (8, [8])
    assert local_crops(one) == local_crops(several) == [(8, 96)]
    assert crop_kinds(one) == crop_kinds(several) == [("global", 224), ("local", 96)]
    assert repr(multi_crop_views(one)) == repr(multi_crop_views(several))


def test_local_crops_of_several_sizes_follow_the_global_ones_in_the_order_of_the_options():
    args = options(*TWO, several=True)
    check_crop_arguments(args)
    assert [recipe.size for recipe in multi_crop_views(args).recipes] == [224, 224, 96, 96, 64]
    none = options("--local_crops_number", "0", "0", "--local_crops_size", "1", "2", several=True)
    check_crop_arguments(none)  # of crops that are not made the size does not matter
    assert crop_kinds(none) == [("global", 224)] and len(multi_crop_views(none).recipes) == 2
    args = options(*TWO, several=True, global_crops_number=1)
    assert [recipe.size for recipe in multi_crop_views(args).recipes] == [224, 96, 96, 64]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--local_crops_number 2 1", "--local_crops_number 2 1 --local_crops_size 96: one size each"),
        ("--local_crops_size 96 64", "--local_crops_number 8 --local_crops_size 96 64: one size each"),
        ("--local_crops_number 2 -1 --local_crops_size 96 64", "--local_crops_number -1: must be 0"),
        (
            "--local_crops_number 2 1 --local_crops_size 96 40",
            "does not divide --local_crops_size 40; nearest 32 or 48",
        ),
        ("--local_crops_number 2 1 --local_crops_size 8 96", "--local_crops_size 8 is smaller than one patch of 16"),
        ("--local_crops_number 0 1 --local_crops_size 8 0", "--local_crops_size 0: must be at least 1 pixel"),
        ("--local_crops_number 0 1 --local_crops_size 8 96 --local_crops_scale 0.4 0", "--local_crops_scale 0.4 0.0"),
    ],
)
def test_what_is_wrong_with_one_of_several_sizes_is_said_of_that_one(argv, message):
    with pytest.raises(UsageError, match=message) as caught:
        check_crop_arguments(options(*argv.split(), several=True))
    assert "\n" not in str(caught.value)


def test_features_of_several_sizes_come_in_the_order_of_the_crops():
    class Mean(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.mean(dim=(2, 3))

    crops = [torch.full((2, 3, size, size), float(number)) for number, size in enumerate((8, 8, 4, 2, 2))]
    features = MultiCropNetwork(Mean(), nn.Identity()).features(crops)
    assert features[:, 0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
