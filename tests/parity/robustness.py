"""Runners: what is done to images before a classifier sees them, and what is made of its answers."""

import json
import re
from collections.abc import Iterator

import torch

from data.preprocess import MEAN, STD
from evaluation.attention import attention_maps
from evaluation.features import Feature, most_attended_mean
from evaluation.imagenet_classes import imagenet_9
from evaluation.linear_heads import heads_of
from evaluation.robustness import (
    OFFSET,
    calibration_error,
    composed,
    dropped,
    hits,
    most_attended,
    outcomes,
    painted,
    response_rate_accuracy,
    shuffled,
    visible,
)
from models.matching import load_tensors
from models.reading import read_backbone
from models.safe_load import load_file
from tests.parity import Case
from tests.parity.networks import build_vit


def masked_eval(case: Case) -> Iterator[tuple]:
    p = case.params
    file, key = re.match(r"(\S+) (\w+)", p["backbone"]).groups()
    model, attentioner = (build_vit(p["model"]).to(case.dtype).eval() for _ in range(2))
    load_tensors(model, *read_backbone(case.folder / file, key))
    attentioner.load_state_dict(case.state("attentioner"), strict=False)
    images, labels = torch.from_numpy(case.arrays["images"]), case.tensor("labels")
    weight, bias = case.tensor("linear_weight"), case.tensor("linear_bias")
    feature = Feature(p["n_last_blocks"])
    attention = attention_maps(attentioner, images.to(case.dtype)).mean(dim=1)
    if "attention" in case.arrays:
        yield "attention", attention.flatten(1), case.arrays["attention"], case.tolerance_of("loss")

    @torch.no_grad()
    def found(images: torch.Tensor) -> dict:
        logits = feature(model, images.to(case.dtype)) @ weight.T + bias
        loss, acc1, acc5 = outcomes(logits, labels).mean(dim=0).tolist()
        return {"loss": loss, "acc1": 100 * acc1, "acc5": 100 * acc5}

    results = case.entry["outputs"]["results"]
    masks = [most_attended(attention, run["masking_ratio"]) for run in results]
    for number, (run, mask) in enumerate(zip(results, masks, strict=True)):
        yield f"mask_{number}", mask, case.arrays[f"mask_{number}"]
        yield f"results {number} masked_tokens", int(mask[0].sum()), run["masked_tokens"]
        seen = painted(images, mask, p["fill_value_normalised"])
        if run["masking_ratio"] == p["masked_images_is_for_ratio"]:
            yield "masked_images", seen, case.arrays["masked_images"]
        for name, value in found(seen).items():
            yield f"results {number} {name}", value, run[name], case.tolerance_of(name)
    for name, value in found(images).items():
        yield f"clean {name}", value, case.entry["outputs"]["clean"][name], case.tolerance_of(name)


def in9_map(case: Case) -> Iterator[tuple]:
    (name,) = (name for name in case.params if name.startswith("map_counts"))
    mapped = imagenet_9()
    first, last = map(int, re.fullmatch(r"map_counts_(-?\d+)\.\.(\d+)", name).groups())
    counts = [int((mapped == number).sum()) for number in range(first, last + 1)]
    yield "accuracy from a map with these counts", counts, case.params[name]
    table = [case.arrays[str(number)] for number in range(len(mapped))]
    yield "accuracy from this map", mapped, table
    predictions, labels = (torch.tensor(case.entry["inputs"][side]) for side in ("pred", "labels"))
    accuracy = float(hits(predictions, labels, mapped).double().mean())
    yield "accuracy", accuracy, case.entry["outputs"]["accuracy"]
    yield "percent_2dp", f"{100 * accuracy:.2f}", case.entry["outputs"]["percent_2dp"]


def adversarial_backgrounds(case: Case) -> Iterator[tuple]:
    """The classifier is the combined one of the same folder, as in the case of ImageNet-9."""
    file = next(path for path in sorted(case.folder.glob("*.pth")) if "linear.weight" in state_of(path))
    state, info = read_backbone(file)
    heads = heads_of(load_file(file))
    model = build_vit(small_config(case)).to(case.dtype).eval()
    load_tensors(model, state, info)
    ((weight, bias),) = heads
    feature = Feature(weight.shape[1] // model.embed_dim)
    mean, std = (torch.tensor(values).to(case.dtype).view(3, 1, 1) for values in (MEAN, STD))
    backgrounds, foregrounds, masks = (case.tensor(name) for name in ("backgrounds", "foregrounds", "fg_masks"))
    classes = case.params["class_to_super"]
    mapped = torch.tensor([classes[str(number)] for number in range(len(classes))])
    predictions = []
    with torch.no_grad():
        for foreground, mask in zip(foregrounds, masks, strict=True):
            images = (composed(foreground, mask, backgrounds).clamp(0, 1) - mean) / std
            logits = feature(model, images) @ weight.to(case.dtype).T + bias.to(case.dtype)
            predictions.append(logits.argmax(dim=1))
    found = torch.stack(predictions)
    yield "pred_per_background", found, case.arrays["pred_per_background"]
    labels = torch.tensor(case.params["fg_class"])[:, None]
    vulnerable = (~hits(found, labels, mapped)).any(dim=1).tolist()
    yield "vulnerable", vulnerable, case.entry["outputs"]["vulnerable"]


def state_of(path) -> dict:
    state = load_file(path).get("state_dict", {})
    return state if isinstance(state, dict) else {}


def small_config(case: Case) -> dict:
    """The sizes of the folder's networks: this case does not repeat them."""
    entries = json.loads((case.folder / "manifest.json").read_text())["cases"]
    return next(entry["params"]["model"] for entry in entries if entry["name"] == "in9_model")


def occlusion_shuffle(case: Case) -> Iterator[tuple]:
    side = case.params["img"]
    image = torch.arange(side * side, dtype=torch.float64).view(1, 1, side, side)
    for name, options in case.entry["inputs"].items():
        if name.startswith("in/"):
            continue
        options, blocks = options["value"], case.tensor(f"in/{name}_indices")
        size = options["shuffle_size"]
        grid = (size, size) if isinstance(size, int) else tuple(size)
        if options["shuffle"]:
            seen = shuffled(image, grid, blocks)
        else:
            seen = dropped(image, grid, blocks, OFFSET if options["random_offset_drop"] else 0)
        label = f"out/{name}_image"
        every = int(re.search(r"::(\d+),::\1", case.meaning(label).replace(" ", ""))[1])
        yield label, seen[0, 0, ::every, ::every], case.arrays[label]
    for label in case.names("out/saliency"):
        share = float(re.search(r"drop_lambda ([\d.]+)", case.meaning(label))[1])
        yield label, visible(case.tensor("in/saliency_attention"), share, label.endswith("True")), case.arrays[label]


def calibration(case: Case) -> Iterator[tuple]:
    confidence, correct = case.arrays["in/confidence"], case.arrays["in/correct"]
    size = int(re.search(r"bins of (\d+)", case.entry["tests"])[1])
    computed = {
        "rms_calibration_error": calibration_error(confidence, correct, 2, size),
        "l1": calibration_error(confidence, correct, 1, size),
        "aurra": response_rate_accuracy(confidence, correct),
    }
    for name in case.outputs():
        yield name, computed[name], case.value(name)


def part_linear_feature(case: Case) -> Iterator[tuple]:
    tokens, attention = case.tensor("in/tokens"), case.tensor("in/attention")
    for label in case.names("out/feature_reverse"):
        found = most_attended_mean(tokens[:, 1:], attention[:, :, 0, 1:], case.params["topk"], label.endswith("True"))
        yield label, found, case.arrays[label]


RUNNERS = {
    "attmask/masked_eval": masked_eval,
    "attmask/in9_map": in9_map,
    "attmask/adv_backgrounds": adversarial_backgrounds,
    "eval_core/occlusion_shuffle": occlusion_shuffle,
    "eval_core/calibration": calibration,
    "eval_core/part_linear_feature": part_linear_feature,
}
