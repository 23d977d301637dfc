"""The options of Mugs's crops: names and defaults of the original, and one line for what cannot work."""

import argparse

import numpy as np
import pytest

from data.device import normalise
from data.mugs_views import MugsViews
from data.pictures import HIDDEN
from methods.mugs_crops import add_mugs_crop_arguments, check_mugs_crop_arguments, crops_picture, mugs_views
from tests.data.helpers import photograph
from utils import Parser, UsageError


def options(*words: str) -> argparse.Namespace:
    parser = Parser()
    add_mugs_crop_arguments(parser)
    args = parser.parse_args(list(words))
    return argparse.Namespace(**vars(args), arch="vit_small", patch_size=16, augment="fast")


def test_names_and_defaults_are_the_originals():
    args = options()
    assert (args.global_crops_scale, args.local_crops_scale) == ((0.25, 1.0), (0.05, 0.25))
    assert (args.local_crops_number, args.local_crops_size, args.global_crops_size) == (10, 96, 224)
    assert (args.prob, args.re_prob, args.strong_ratio) == (0.5, 0.25, 0.45)
    assert not args.color_aug and not args.vanilla_weak_augmentation and args.use_prefetcher
    assert options("--size_crops", "64").local_crops_size == options("--local_crops_size", "64").local_crops_size == 64
    check_mugs_crop_arguments(args)
    assert "rand-m9-mstd0.5-inc1" in repr(mugs_views(args))


def test_every_option_reaches_the_views():
    words = "--size_crops 48 --prob 0.2 --re_prob 0.1 --color_aug on --vanilla_weak_augmentation 1 --use_prefetcher 0"
    views = mugs_views(options(*words.split(), "--timm_auto_augment_par", "rand-m5-n3"))
    assert (views.prob, views.erase, views.vanilla, views.prefetched) == (0.2, 0.1, True, False)
    assert views.policy.count == 3 and views.strong["local_strong"].size == 48
    assert views.strong["global_strong"].jitter == 0.8 and views.weak["local_weak"].scale == (0.05, 0.25)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--prob 1.5", "--prob 1.5: a probability"),
        ("--prob -0.1", "--prob -0.1: a probability"),
        ("--re_prob nan", "--re_prob nan: a probability"),
        ("--size_crops 224", "--size_crops 224 --global_crops_size 224: they have to differ"),
        ("--timm_auto_augment_par augmix-m3", "a policy starts with rand"),
        ("--timm_auto_augment_par rand-m9-x1", "no part 'x1'"),
        ("--local_crops_number -1", "--local_crops_number -1"),
        ("--local_crops_scale 0.3 0.2", "--local_crops_scale 0.3 0.2"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(words, said):
    with pytest.raises(UsageError) as refused:
        check_mugs_crop_arguments(options(*words.split()))
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_no_local_crops_may_have_the_global_size():
    check_mugs_crop_arguments(options("--local_crops_number", "0", "--size_crops", "224"))


def test_strong_crops_are_framed_in_the_picture_of_a_batch_and_the_batch_stays_as_it_is():
    views = MugsViews(local_crops_number=3, global_crops_size=32, local_crops_size=32, erase=0.5)
    batch = MugsViews.collate([views(photograph(0, 60, 80), (0, 0, index)) for index in range(6)])
    batch["crops"] = [normalise(crop) for crop in batch["crops"]]
    before = [crop.clone() for crop in batch["crops"]]
    corners = crops_picture(batch)[4::36, 4::36][:6, :7]
    assert np.array_equal((corners == HIDDEN).all(axis=-1), batch["strong"].numpy()) and batch["strong"].any()
    assert all(crop.equal(same) for crop, same in zip(batch["crops"], before, strict=True))
