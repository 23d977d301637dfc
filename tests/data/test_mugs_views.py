"""The crops of Mugs: which are weak and which strong, what is erased of them, and what the loader makes of it."""

import pickle
import random

import numpy as np
import pytest
import torch
from PIL import Image

from data.augment import CropRecipe, crop_uniforms, draw_crop
from data.augmented import Original
from data.device import normalise, to_device_ahead
from data.loader import TrainLoader
from data.mugs_views import MugsViews, erase_
from data.preprocess import MEAN, STD
from data.randaugment import Operation, carry_out
from data.strong_crops import AREA, UNIFORMS_PER_ERASING, draw_erased, render_strong
from randomness import counted_uniforms
from tests.data.helpers import one_process, photograph
from tests.sources import Stripes

IMAGE = photograph(0, 60, 80)
SMALL = {"global_crops_size": 32, "local_crops_size": 16, "local_crops_number": 3}
KINDS = ["global_weak_1", "global_weak_2"]


@pytest.fixture(params=["fast", "pil"])
def augment(request) -> str:
    return request.param


def views_of(augment: str = "fast", **options) -> MugsViews:
    return MugsViews(**SMALL | options, augment=augment)


def sample(views: MugsViews, key: tuple[int, int, int] = (0, 0, 0)) -> dict:
    return views(Image.fromarray(IMAGE) if views.augment == "pil" else IMAGE, key)


def samples(views: MugsViews, number: int) -> list[dict]:
    return [sample(views, (0, 0, index)) for index in range(number)]


def same(a: dict, b: dict) -> bool:
    crops = all(map(torch.equal, a["crops"], b["crops"]))
    return crops and torch.equal(a["strong"], b["strong"]) and all(map(same_erased, a["erased"], b["erased"]))


def same_erased(a, b) -> bool:
    return a is b is None or (a.box == b.box and torch.equal(a.values, b.values))


def test_an_image_has_two_crops_for_the_teacher_and_all_sizes_for_the_student(augment):
    made = sample(views_of(augment))
    assert [tuple(crop.shape) for crop in made["crops"]] == [(3, 32, 32)] * 4 + [(3, 16, 16)] * 3
    assert all(crop.dtype == torch.uint8 for crop in made["crops"])
    assert made["weak"] is (not made["strong"][2]) and made["strong"].shape == (7,)
    assert made["strong"][2] == made["strong"][3] and not made["strong"][:2].any()


def test_crops_follow_from_the_key_alone(augment):
    views = pickle.loads(pickle.dumps(views_of(augment, prob=0.0, erase=1.0)))
    first, other = sample(views), sample(views, (0, 0, 1))
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    expected = random.random(), np.random.rand(), torch.rand(1)
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    assert same(sample(views), first) and not same(other, first)
    assert (random.random(), np.random.rand(), torch.rand(1)) == expected


def test_weak_has_the_probability_that_was_asked_for(augment):
    views = views_of(augment, prob=0.3, global_crops_size=8, local_crops_size=4)
    made = samples(views, 120)
    weak, local = np.mean([s["weak"] for s in made]), torch.stack([~s["strong"][4:] for s in made]).float().mean()
    assert abs(weak - 0.3) < 4 * (0.21 / 120) ** 0.5 and abs(local - 0.3) < 4 * (0.21 / 360) ** 0.5


def test_probabilities_of_0_and_1_are_certain(augment):
    assert sample(views_of(augment, prob=0.0))["strong"].tolist() == [False] * 2 + [True] * 5
    weak = sample(views_of(augment, prob=1.0))
    assert not weak["strong"].any() and weak["weak"] and weak["erased"] == [None] * 7


def test_vanilla_shows_the_student_the_teachers_global_crops(augment):
    views = views_of(augment, vanilla=True, prob=0.0)
    made = sample(views)
    assert torch.equal(made["crops"][0], made["crops"][2]) and torch.equal(made["crops"][1], made["crops"][3])
    assert made["weak"] and made["strong"].tolist() == [False] * 4 + [True] * 3
    assert list(views.kinds(lambda: 0.9)) == KINDS * 2 + ["local_strong"] * 3


def test_there_may_be_no_local_crops(augment):
    batch = MugsViews.collate(samples(views_of(augment, local_crops_number=0), 2))
    assert [tuple(crop.shape) for crop in batch["crops"]] == [(2, 3, 32, 32)] * 4 and len(batch["erased"]) == 4


def test_the_fast_strong_crop_is_the_whole_images():
    """Equal up to the resize: with boxes of the crop's size nothing is resized."""
    recipe = CropRecipe(40, (0.3, 0.3))
    operations = [Operation("ShearX", 0.2123456, "bicubic"), Operation("Equalize")]
    for index in range(8):
        crop = draw_crop(recipe, crop_uniforms((index,), 1)[0], *IMAGE.shape[:2])
        crop = crop._replace(box=crop.box._replace(top=index, left=2 * index, height=40, width=40), jitter=())
        crop = crop._replace(grayscale=index % 3 == 0)
        pixels = render_strong(Original(IMAGE), crop, operations, 40).permute(1, 2, 0).numpy()
        image = Image.fromarray(np.ascontiguousarray(IMAGE[:, ::-1] if crop.flip else IMAGE))
        for operation in [*operations, *[Operation("Grayscale")] * crop.grayscale]:
            image = carry_out(image, operation)
        assert np.array_equal(pixels, np.asarray(image.crop((2 * index, index, 2 * index + 40, index + 40))))


def test_colours_come_after_randaugment_where_they_are_asked_for(augment):
    plain, coloured = (views_of(augment, color_aug=on, prob=0.0, policy="rand-n0", erase=0.0) for on in (False, True))
    changed = [not torch.equal(a, b) for a, b in zip(sample(plain)["crops"], sample(coloured)["crops"], strict=True)]
    assert any(changed[2:]) and (augment == "pil" or not any(changed[:2]))


# ---------------------------------------------------------------------------------------------------------------------
# What is erased
# ---------------------------------------------------------------------------------------------------------------------


def test_an_erased_box_is_noise_of_unit_variance_before_the_normalisation(augment):
    views = views_of(augment, prob=0.0, erase=1.0, local_crops_number=0, global_crops_size=64)
    values = [part.values for made in samples(views, 12) for part in made["erased"] if part is not None]
    noise = torch.cat([part.flatten(1) for part in values], dim=1) * torch.tensor([STD]).T + torch.tensor([MEAN]).T
    assert noise.mean(dim=1).abs().max() < 0.05 and (noise.std(dim=1) - 1).abs().max() < 0.05
    raw = views_of(augment, prob=0.0, erase=1.0, local_crops_number=0, global_crops_size=64, prefetched=False)
    values = torch.cat([part.values.flatten() for part in sample(raw)["erased"] if part is not None])
    assert abs(values.mean()) < 0.1 and abs(values.std() - 1) < 0.1


def test_boxes_have_the_same_distribution_in_both_families():
    numbers = np.arange(UNIFORMS_PER_ERASING)
    fast = [draw_erased(0.4, u, 32, (0,)) for u in counted_uniforms(1, np.arange(1500)[:, None], numbers).tolist()]
    transform = views_of("pil", erase=0.4).strong_transforms["global_strong"]
    random.seed(0)
    boxes = [[part.box for part in drawn if part] for drawn in (fast, [transform._erased() for _ in range(1500)])]
    assert all(abs(len(found) / 1500 - 0.4) < 0.05 for found in boxes)
    shapes = [np.array([(b.height * b.width, b.height, b.top, b.left) for b in found]) for found in boxes]
    assert np.abs(shapes[0].mean(axis=0) / shapes[1].mean(axis=0) - 1).max() < 0.12
    assert all(
        found[:, 0].min() >= AREA[0] * 1024 - 20 and found[:, 0].max() <= AREA[1] * 1024 + 20 for found in shapes
    )
    assert all(0 <= b.top <= 32 - b.height and 0 <= b.left <= 32 - b.width for found in boxes for b in found)


def written(batch: dict) -> list[torch.Tensor]:
    crops = [normalise(crop) for crop in batch["crops"]]
    erase_(crops, batch["erased"])
    return crops


def test_positions_and_values_write_every_box_into_its_crop_and_nothing_else():
    made = samples(views_of(prob=0.2, erase=0.6), 5)
    batch = MugsViews.collate(made)
    assert all(
        positions.dtype == torch.int64 and values.dtype == torch.float32 for positions, values in batch["erased"]
    )
    assert batch["weak"].tolist() == [s["weak"] for s in made] and batch["weak"].dtype == torch.bool
    for number, crop in enumerate(written(batch)):
        for image, one in enumerate(made):
            expected, erased = normalise(one["crops"][number][None])[0], one["erased"][number]
            if erased is not None:
                top, left, height, width = erased.box
                expected[:, top : top + height, left : left + width] = erased.values
            assert torch.equal(crop[image], expected)


def test_pieces_workers_and_other_precisions_keep_what_is_erased():
    views = views_of(prob=0.3, erase=0.7)
    options = {"batch_size": 4, "world": one_process(), "seed": 0, "epochs": 1}

    def batches(pieces: int, workers: int = 0, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
        loader = TrainLoader(Stripes(8), views, pieces=pieces, num_workers=workers, **options)
        found: list[dict] = list(to_device_ahead(loader, torch.device("cpu"), dtype))
        for piece in found:
            erase_(piece["crops"], piece["erased"])
        return [torch.cat([piece["crops"][number] for piece in found]) for number in range(7)]

    whole = batches(1)
    assert all(map(torch.equal, whole, batches(2, workers=1)))
    assert all(half.dtype == torch.float16 and torch.isfinite(half).all() for half in batches(1, dtype=torch.float16))
