"""Twins of the golden cases of Mugs's augmentation: the same format with other numbers, computed in another way."""

import math
import random as python_random

import numpy as np
import torch
from PIL import Image
from timm.data import auto_augment
from timm.data.random_erasing import RandomErasing
from torchvision import transforms

from tests.data.helpers import photograph
from tests.parity import find_runner, judge
from tests.parity.mugs_views import seed_everything
from tests.twins import agrees, copied, golden


def test_operations_on_another_image_with_another_fill():
    case = golden("mugs", "randaugment_ops")
    image, fill = photograph(5, 9, 17), (3, 200, 90)
    levels, x = image.astype(float), np.arange(17)
    grey = np.asarray(Image.fromarray(image).convert("L")).astype(float)[..., None]
    rank = np.stack([np.searchsorted(np.sort(image[..., c].ravel()), np.arange(256)) for c in range(3)])
    step = np.array([(9 * 17 - (image[..., c] == image[..., c].max()).sum()) // 255 for c in range(3)])
    assert (step == 0).all() and rank.shape == (3, 256)  # so few pixels are left as they are
    low, high = levels.min(axis=(0, 1)), levels.max(axis=(0, 1))

    def shifted(pixels: float) -> np.ndarray:
        """Where x + pixels lies, between its two neighbours, from the edge on the last one; beyond it the fill."""
        place = x + 0.5 + pixels
        first = np.floor(place - 0.5).astype(int)
        share = (place - 0.5 - first)[None, :, None]
        left, right = (levels[:, np.clip(first + i, 0, 16)] for i in (0, 1))
        inside = ((place >= 0) & (place < 17))[None, :, None]
        return np.where(inside, left + (right - left) * share, fill)

    def mixed(other: np.ndarray, factor: float) -> np.ndarray:
        return np.clip(other + factor * (levels - other), 0, 255)

    calls = [
        ("AutoContrast", [], None, (levels - low) * 255 / (high - low)),
        ("Equalize", [], None, levels),
        ("Invert", [], None, 255 - levels),
        ("PosterizeIncreasing", [2], None, levels // 64 * 64),
        ("PosterizeIncreasing", [0], None, 0 * levels),
        ("Solarize", [77], None, np.where(levels < 77, levels, 255 - levels)),
        ("SolarizeAdd", [60], None, np.where(levels < 128, levels + 60, levels)),
        ("ColorIncreasing", [0.4], None, mixed(grey, 0.4)),
        ("ContrastIncreasing", [1.6], None, mixed(np.floor(grey.mean() + 0.5), 1.6)),
        ("BrightnessIncreasing", [1.3], None, mixed(0.0, 1.3)),
        ("TranslateXRel", [0.1234567], "bilinear", shifted(0.1234567 * 17)),
        ("TranslateX", [-2.3], "bilinear", shifted(-2.3)),
    ]
    case.params["fillcolor"] = list(fill)
    case.params["calls"] = [
        {"key": f"out.op{i}", "op": name, "args": args, "interpolation": how}
        for i, (name, args, how, _) in enumerate(calls)
    ]
    outputs = {f"out.op{i}": np.floor(expected).astype(np.uint8) for i, (*_, expected) in enumerate(calls)}
    outputs["out.solarize_40"] = np.where(levels < 40, levels, 255 - levels).astype(np.uint8)
    case.__dict__["arrays"] = {"in.image": image} | outputs
    case.entry["outputs"] = [{"key": key} for key in outputs]
    assert judge(case, find_runner(case)).problems == []
    for key in outputs:  # a level more or less is allowed, two are not
        wrong = copied(case)
        wrong.arrays[key] = outputs[key] ^ 2
        assert judge(wrong, find_runner(wrong)).problems


def test_magnitudes_at_other_levels_and_policies():
    case = golden("mugs", "randaugment_magnitudes")
    case.params["hparams"] = {"translate_const": 40, "img_mean": [124, 116, 104]}

    def entry(level: float, argument, opposite) -> dict:
        return {"level": level, "args_u_le_half": [argument], "args_u_gt_half": [opposite]}

    levels = {
        "Invert": None,
        "Rotate": [entry(level, 3.0 * level, -3.0 * level) for level in (1.7, 6.1)],
        "PosterizeIncreasing": [
            entry(level, 4 - math.floor(0.4 * level), 4 - math.floor(0.4 * level)) for level in (3, 7)
        ],
        "SolarizeAdd": [entry(4.4, 48, 48)],
        "TranslateX": [entry(4.4, 17.6, -17.6)],
        "SharpnessIncreasing": [entry(6.5, 1.585, 0.415)],
        "Brightness": [entry(6.5, 1.27, 1.27)],
    }
    names = case.arrays["configs"]["rand-m5-n3"]["ops"]
    policy = {"ops": names, "op_prob": 0.5, "magnitude": 2, "magnitude_std": 1.5, "num_layers": 4}
    policy |= {"choice_weights": None, "fillcolor": [124, 116, 104]}
    case.__dict__["arrays"] |= {"magnitudes": levels, "configs": {"rand-n4-mstd1.5-m2": policy}}
    agrees(case)


def test_crops_are_chosen_by_other_numbers():
    case = golden("mugs", "crop_assignment")
    both, strong = ["global_weak_1", "global_weak_2"], ["global_strong"] * 2
    entry = {"prob": 0.2, "vanilla_weak_augmentation": False, "local_crops_number": 1}
    entries = [
        entry | {"uniforms_drawn": [0.3, 0.1], "crops": both + strong + ["local_weak"], "weak_flag": False},
        entry | {"uniforms_drawn": [0.2, 0.21], "crops": both * 2 + ["local_strong"], "weak_flag": True},
        entry | {"local_crops_number": 0, "uniforms_drawn": [0.9], "crops": both + strong, "weak_flag": False},
        entry | {"prob": 1.0, "uniforms_drawn": [], "crops": both * 2 + ["local_weak"], "weak_flag": True},
    ]
    case.__dict__["arrays"] = {"other": entries}
    assert judge(case, find_runner(case)).problems == []
    for number, entry in enumerate(entries):
        for change in ({"crops": entry["crops"][::-1]}, {"weak_flag": not entry["weak_flag"]}):
            wrong = copied(case)
            wrong.__dict__["arrays"] = {"other": [*entries[:number], entry | change, *entries[number + 1 :]]}
            assert judge(wrong, find_runner(wrong)).problems


def test_a_strong_crop_of_another_size_from_other_seeds():
    """timm's functions of one operation, and its erasing, in the order in which the case says what is drawn."""
    case = golden("mugs", "strong_transform_rng")
    image, size = photograph(7, 50, 44), 24
    case.params |= {"img_size": size, "scale": [0.1, 0.6], "ratio": [0.5, 1.5], "config": "rand-m6-n3-mstd1-inc1"}
    case.params |= {"re_prob": 0.6, "seeds": []}
    hparams = {"translate_const": 100, "img_mean": (124, 116, 104)}
    names, outputs = auto_augment._RAND_INCREASING_TRANSFORMS, {}
    assert len(names) == 15 and names[4] == "PosterizeIncreasing"
    for seed in range(40, 48):
        seed_everything(seed)
        picture, drawn = transforms.RandomHorizontalFlip()(Image.fromarray(image)), []
        for name in np.random.choice(names, 3, replace=False):
            drawn.append([str(name), python_random.random() <= 0.5])
            if drawn[-1][1]:
                level = min(max(python_random.gauss(6, 1), 0), 10)
                level_fn = auto_augment.LEVEL_TO_ARG[name]
                keywords = {"fillcolor": hparams["img_mean"], "resample": (Image.BILINEAR, Image.BICUBIC)}
                arguments = level_fn(level, hparams) if level_fn else ()
                picture = auto_augment.NAME_TO_OP[name](picture, *arguments, **keywords)
        crop = transforms.RandomResizedCrop(size, (0.1, 0.6), (0.5, 1.5), transforms.InterpolationMode.BICUBIC)
        erasing = RandomErasing(0.6, mode="pixel", device="cpu", max_area=1 / 3)
        outputs[f"out.seed{seed}"] = erasing(transforms.ToTensor()(crop(picture))).numpy()
        case.params["seeds"].append({"seed": seed, "ops": drawn})
    case.__dict__["arrays"] = {"in.image": image} | outputs
    case.entry["outputs"] = [{"key": key} for key in outputs]
    agrees(case)
    assert torch.tensor([values.max() for values in outputs.values()]).max() > 2  # something was erased
