"""Twins of golden cases of pictures and evaluations: the same format with other numbers.

What they expect is computed here, from the textbook form or with the product's functions: a runner that has taken a
number of its case for granted then disagrees. ``agrees`` also makes every expected number another one, and the runner
has to notice.
"""

import random as python_random
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from data.device import normalise
from data.preprocess import MEAN, STD, eval_transform
from data.views import MultiCropViews, seeded_generators
from evaluation.linear_heads import LinearHeads, Probe, Recipe, saved_heads
from tests.parity import Case, find_runner, judge
from tests.parity.linear import said_slices
from tests.parity.networks import build_vit
from tests.parity.preprocess import every_nth
from tests.twins import GOLDEN, agrees, altered, as_arrays, golden, random, rewrite, unnoticed

# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------


def strongest(attention: torch.Tensor, threshold: float) -> torch.Tensor:
    """The smallest of the strongest that hold the share, head by head."""
    kept = torch.zeros(attention.shape, dtype=torch.bool)
    for row, values in zip(kept, attention / attention.sum(1, keepdim=True), strict=True):
        left_out = 0.0
        for place in values.argsort():
            left_out += values[place]
            row[place] = left_out > 1 - threshold
    return kept


def test_attention_of_a_grid_that_is_not_square():
    case = golden("eval_core", "attention_threshold")
    case.params |= {"threshold": 0.35, "patch_size": 3}
    attention = random(1, 2, 22, 22).softmax(-1)
    maps = attention[0, :, 0, 1:]
    outputs = {"out/heatmap": maps.view(2, 3, 7), "out/mask": strongest(maps, 0.35).view(2, 3, 7)}
    agrees(
        rewrite(
            case,
            {"in/attention": attention},
            {n: np.kron(m, np.ones((3, 3), m.numpy().dtype)) for n, m in outputs.items()},
        )
    )


def test_attention_over_patches_in_no_grid():
    case = golden("udi", "attention_threshold")
    case.params["threshold"] = 0.8
    attention = random(2, 15).softmax(-1)
    agrees(rewrite(case, {"attention": attention}, {"mask": strongest(attention, 0.8)}))


@pytest.mark.parametrize("words", ["every 7th pixel of the 3x100x100 result", "every 7th pixel from row 2", ""])
def test_every_nth_pixel_of_other_sizes(words):
    case = golden("eval_core", "eval_transform")
    case.params |= {"resize": 130, "crop": 100}
    start = 2 if "from" in words else 0
    seed = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    pixels = eval_transform(100, 130)(Image.fromarray(seed).resize((150, 190), Image.Resampling.BICUBIC))
    case.entry["inputs"] = {"in/seed_x": {"meaning": "Image.fromarray(seed).resize((150, 190), BICUBIC)"}}
    outputs = {"out/sub_x": pixels[:, start::7, start::7], "out/mean_x": pixels.double().mean((1, 2))}
    agrees(rewrite(case, {"in/seed_x": seed}, outputs, words={"out/sub_x": words}))


def test_what_is_left_of_pixels_says_which_they_are():
    pixels = torch.arange(50.0).expand(48, 50)
    assert every_nth(pixels, np.zeros((10, 10)), "")[0, -1] == 45
    assert every_nth(pixels, np.zeros((2, 2)), "every 40th pixel")[0, 1] == 40
    assert every_nth(pixels, np.zeros((4, 4)), "Only every 16th (global) / 13th (local) pixel")[0, -1] == 39
    with pytest.raises(ValueError, match=r"no every n-th of \(48, 50\) pixels are \(7, 3\)"):
        every_nth(pixels, np.zeros((7, 3)), "")


def test_operations_of_other_amounts_on_an_image_of_another_size():
    case = golden("dino", "augmentation_ops")
    image = np.random.default_rng(0).integers(0, 256, (21, 33, 3), dtype=np.uint8)
    case.entry["inputs"] = {"crop_box_top_left_h_w": {"value": [2, 3, 15, 20]}}
    pil = Image.fromarray(image)
    outputs = {"out/hflip": image[:, ::-1], "out/solarize": np.where(image < 128, image, 255 - image)}
    outputs["out/brightness_0.4"] = np.asarray(ImageEnhance.Brightness(pil).enhance(0.4))
    outputs["out/resized_crop_bicubic"] = np.asarray(
        pil.crop((3, 2, 23, 17)).resize((11, 11), Image.Resampling.BICUBIC)
    )
    outputs["out/to_tensor_normalized_sub"] = normalise(torch.from_numpy(image).permute(2, 0, 1)[None])[0, :, ::4, ::4]
    words = {"out/to_tensor_normalized_sub": "every 4th pixel, float32 (atol 1e-6)"}
    agrees(rewrite(case, {"in/image": image}, outputs, words=words))


def test_seeded_crops_of_other_seeds_and_steps():
    case = golden("dino", "augmentation_pipeline_seeded")
    case.params |= {"seeds": [5], "local_crops_number": 1}
    case.entry["notes"] = "Global crops are 100, local 36. Only every 13th (global) / 5th (local) pixel is stored."
    image = case.arrays["in/image"]
    views = MultiCropViews((0.25, 1.0), (0.05, 0.25), local_crops=[(1, 36)], global_crops_size=100, augment="pil")
    with seeded_generators(0):
        torch.manual_seed(5)
        python_random.seed(5)
        crops = [normalise(crop[None])[0] for crop in views.pil_crops(Image.fromarray(image))]
    outputs = {
        f"out/seed5_crop{i}": crop[:, ::n, ::n] for i, (crop, n) in enumerate(zip(crops, (13, 13, 5), strict=True))
    }
    agrees(rewrite(case, {"in/image": image}, outputs | {"out/seed5_means": [crop.mean() for crop in crops]}))


def test_a_grey_crop_of_another_image_that_is_neither_flipped_nor_solarised():
    case = golden("unic", "transforms")
    image = np.random.default_rng(0).integers(0, 256, (21, 33, 3), dtype=np.uint8)
    drawn = {
        "crop": [2, 3, 15, 20],
        "flip": False,
        "gray": True,
        "solarize": False,
        "order": [3, 1, 2, 0],
        "sigma": 0.9,
    }
    case.params |= {"image_size": 16, "aug": case.params["aug"] | drawn}
    pixels = torch.from_numpy(image).permute(2, 0, 1)
    validated = tv.center_crop(tv.resize(pixels, [16], InterpolationMode.BICUBIC), [16])
    cut = tv.resized_crop(pixels, 2, 3, 15, 20, [16, 16], InterpolationMode.BICUBIC)
    pixels = cut
    for name in ("hue", "contrast", "saturation", "brightness"):
        pixels = getattr(tv, f"adjust_{name}")(pixels, case.params["aug"][name])
    grey = tv.rgb_to_grayscale(pixels, 3)
    blurred = tv.gaussian_blur(grey / 255, [9, 9], [0.9, 0.9])
    case.__dict__["arrays"] = as_arrays(
        {
            "in/landscape": image,
            "out/eval_transfer/landscape": eval_transform(16, 16)(Image.fromarray(image)),
            "out/distill_val/landscape": tv.normalize(validated / 255, MEAN, STD),
            "aug/after_crop": cut,
            "aug/after_jitter": grey,
            "aug/after_blur": blurred,
            "aug/final": tv.normalize(blurred, MEAN, STD),
        }
    )
    agrees(case)


# ---------------------------------------------------------------------------------------------------------------------
# Evaluations
# ---------------------------------------------------------------------------------------------------------------------


def votes_of(train, labels, test, k: int, temperature: float, classes: int) -> torch.Tensor:
    similarities, nearest = (F.normalize(test) @ F.normalize(train).T).topk(k)
    return torch.zeros(len(test), classes, dtype=torch.float64).scatter_add_(
        1, labels[nearest], (similarities / temperature).exp()
    )


def test_votes_of_other_images_neighbours_and_temperatures():
    case = golden("udi", "knn")
    case.params["num_classes"] = 4
    train, test, generator = random(40, 5), random(120, 5, seed=1), torch.Generator().manual_seed(0)
    labels, truth = (torch.randint(0, 4, (n,), generator=generator) for n in (40, 120))
    rows = []
    for temperature, k in ((0.1, 3), (0.5, 9)):
        votes = votes_of(train, labels, test, k, temperature, 4)
        rows.append([temperature, k, (votes.argmax(1) == truth).double().mean() * 100, 100.0, 100.0])
    inputs = {"train": train, "test": test, "train_labels": labels, "test_labels": truth}
    outputs = {"results": rows, "votes_first": votes_of(train, labels, test, 9, 0.5, 4)[:17]}
    agrees(rewrite(case, inputs, outputs, words={"votes_first": "class votes of the first 17 for T=0.5, k=9"}))


def test_low_shot_runs_of_several_temperatures():
    case = golden("attmask", "lowshot_knn")
    train, labels, test, truth = (
        torch.from_numpy(case.arrays[f"{s}_{k}"]) for s in ("train", "test") for k in ("features", "labels")
    )
    runs = []
    for temperature in (0.07, 1.0):
        means = []
        for start in (0, 3):
            rows = torch.cat([(labels == c).nonzero().flatten()[start : start + 4] for c in range(10)])
            votes = votes_of(train[rows], labels[rows], test, 6, temperature, 10)
            means.append((votes.argmax(1) == truth).double().mean().item() * 100)
            runs.append(
                {
                    "subset": 4,
                    "subset_starts": start,
                    "nb_knn": 6,
                    "temperature": temperature,
                    "top1": means[-1],
                    "top5": None,
                }
            )
        runs.append({"subset": 4, "nb_knn": 6, "temperature": temperature, "mean_top1_over_starts": sum(means) / 2})
    assert runs[2] != runs[5] | {"temperature": 0.07}
    case.entry["outputs"]["runs"] = runs
    agrees(case)


def probe_by_torch(weight, bias, batches: list[list], lr: float, floor: float) -> tuple:
    """Weight, bias, mean losses and rates after one epoch on every list of batches."""
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0]).double()
    layer.weight.data, layer.bias.data = weight.clone(), bias.clone()
    optimizer = torch.optim.SGD(layer.parameters(), lr, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches), eta_min=floor)
    rates, means = [], []
    for epoch in batches:
        rates.append(optimizer.param_groups[0]["lr"])
        losses = []
        for x, y in epoch:
            loss = F.cross_entropy(layer(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        means.append(sum(losses) / len(losses))
        scheduler.step()
    return layer, means, rates


def test_a_linear_probe_whose_rate_has_a_floor():
    case = golden("udi", "linear_probe")
    case.params |= {
        "B": 4,
        "n": 2,
        "C": 3,
        "classes": 5,
        "lr": 0.5,
        "lr_min": 0.01,
        "world": 2,
        "epochs": 3,
        "niter": 2,
    }
    lr = case.params["lr_scaled"] = 0.5 * 4 * 2 / 256
    weight, bias, generator = random(5, 6), random(5), torch.Generator().manual_seed(0)
    tokens = [random(4, 3, 4, 3, seed=i) for i in range(6)]  # the last 2 of 3 blocks are read
    targets = [torch.randint(0, 5, (4,), generator=generator) for _ in range(6)]
    batches = [(t[:, -2:, 0].flatten(1), y) for t, y in zip(tokens, targets, strict=True)]
    layer, means, rates = probe_by_torch(weight, bias, [batches[i : i + 2] for i in (0, 2, 4)], lr, 0.01)
    inputs = {"init/linear.weight": weight, "init/linear.bias": bias}
    for i in range(6):
        inputs |= {f"step{i}/tokens": tokens[i], f"step{i}/target": targets[i]}
    outputs = {"weight": layer.weight, "bias": layer.bias, "mean_loss_per_epoch": means, "lr_per_epoch": rates}
    agrees(rewrite(case, inputs, outputs))


def test_batches_are_those_that_the_manifest_says():
    assert said_slices("images[0:bs], images[bs:2bs], images[2bs:3bs] in that order", 4) == [
        slice(0, 4),
        slice(4, 8),
        slice(8, 12),
    ]
    assert said_slices("images[3bs:] as one batch", 4) == [slice(12, None)]


def test_a_linear_probe_on_three_batches_of_a_checkpoint(tmp_path):
    case = golden("attmask", "linear_probe")
    p = case.params
    p |= {
        "batch_size": 5,
        "epochs": 2,
        "lr_arg": 2.0,
        "effective_lr": 2.0 * 5 / 256,
        "n_last_blocks": 9,
    }  # of the 4 that there are
    p["train_batches"] = "images[0:bs], images[bs:2bs], images[2bs:3bs] in that order each epoch"
    p["val"] = "images[3bs:] as one batch"
    arrays = case.arrays
    shutil.copy(GOLDEN / "attmask" / "checkpoint_plain.pth", tmp_path / "backbone.pth")
    p["backbone"] = "backbone.pth teacher cast to float64"
    vit = build_vit(p["model"]).double().eval()
    state = torch.load(tmp_path / "backbone.pth", weights_only=True)["teacher"]
    vit.load_state_dict({n.removeprefix("backbone."): t for n, t in state.items() if n.startswith("backbone.")})
    with torch.no_grad():
        images = torch.from_numpy(arrays["images"]).double()
        features = torch.cat([tokens[:, 0] for tokens in vit.get_intermediate_layers(images, 4)], dim=1)
    labels = torch.from_numpy(arrays["labels"])
    weight, bias, lr = random(7, features.shape[1]), random(7), p["effective_lr"]
    batches, truth = [(features[i : i + 5], labels[i : i + 5]) for i in (0, 5, 10)], labels[15:]
    layers, log = [], []
    for epoch, factor in enumerate((1.0, 0.5)):
        layer, means, _ = probe_by_torch(weight, bias, [batches] * (epoch + 1), lr, 0.0)
        logits = layer(features[15:]).detach()
        hits = (logits.topk(5).indices == truth[:, None]).double() * 100
        line = {"epoch": epoch, "train_loss": means[-1], "lr_used": lr * factor}
        line |= {"acc1": hits[:, 0].mean().item(), "acc5": hits.sum(1).mean().item()}
        log.append(line | {"test_loss": F.cross_entropy(logits, truth).item()})
        layers.append(layer)
    best = max(range(2), key=lambda epoch: (log[epoch]["acc1"], epoch))
    kept, final = layers[best], layers[-1]
    probe = Probe([LinearHeads(kept.weight.data[None], kept.bias.data[None], [Recipe(lr)])])
    file = saved_heads(probe, best + 1, 2) | {"best_acc": log[best]["acc1"]}
    file["scheduler"] |= saved_heads(probe, 2, 2)["scheduler"]
    torch.save(file, tmp_path / "linear.pth")
    started = {"init_weight": weight, "init_bias": bias}
    ended = {"final_weight": final.weight.detach(), "final_bias": final.bias.detach()}
    np.savez(tmp_path / "arrays.npz", images=arrays["images"], labels=arrays["labels"], **started, **ended)
    entry = case.entry | {"file": ["arrays.npz", "linear.pth"], "outputs": case.entry["outputs"] | {"log": log}}
    twin = Case(tmp_path, "attmask", entry)
    result = judge(twin, find_runner(twin))
    assert result.status == "ok", result.problems
    assert unnoticed(twin) == ["checkpoint_teacher_linear.pth"]


@pytest.mark.parametrize(
    ("method", "name", "all_blocks", "more"),
    [
        ("dino", "checkpoint_and_features", "out/teacher_linear_n2", "out/teacher_linear_n7"),
        ("udi", "checkpoint_eval_features", "student/linear_n2", "student/linear_n5"),
        ("esvit", "checkpoint_features", "teacher_nlast5_48", "teacher_nlast8_48"),
    ],
)
def test_more_last_blocks_than_there_are_are_all(method, name, all_blocks, more):
    case = golden(method, name)
    outputs = case.entry["outputs"]
    if isinstance(outputs, dict):
        outputs[more] = outputs[all_blocks]
    else:
        outputs.append({"key": more})
    case.arrays[more] = case.arrays[all_blocks]
    agrees(case)


def test_agreement_does_not_ask_for_the_names_of_clusters():
    case = golden("attmask", "unsup_cls")
    for run in case.params["runs"]:
        run["pred"] = [500 - 3 * cluster for cluster in run["pred"]]
    agrees(case)


def test_what_alters_values_alters_one():
    assert altered({"a": [1, 2.0], "b": None, "c": "x"}) == {"a": [1, 2.0 + 2.0 / 3], "b": None, "c": "x"}
    assert altered(["x", 3]) == ["x", 2] and altered(True) is False
    assert (altered(np.arange(4)) != np.arange(4)).tolist() == [True, False, False, True]
