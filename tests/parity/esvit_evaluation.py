"""Runners: EsViT's evaluations: weighted k-NN, a linear head, what images go through."""

import re
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from data.augment import Box, Crop, render_pil
from data.device import normalise
from data.preprocess import eval_transform
from evaluation.knn import class_votes, knn_classify, neighbours_in_chunks
from evaluation.linear_heads import LinearHeads, Probe, Recipe, cosine_factor
from tests.parity import Case
from tests.parity.linear import original_meters, train_epoch
from tests.parity.preprocess import every_nth

SOLARIZED_FROM = 128  # Pillow's own, which the product does not change


def weighted_knn(case: Case) -> Iterator[tuple]:
    p = case.params
    train, test = (F.normalize(case.tensor(f"{side}_features"), dim=1) for side in ("train", "test"))
    labels, test_labels = case.tensor("train_labels"), case.tensor("test_labels")
    yield "sizes", [len(train), len(test), train.shape[1]], [p["n_train"], p["n_test"], p["dim"]]
    accuracies = knn_classify(train, labels, test, test_labels, p["ks"], p["T"], p["classes"])
    for k in p["ks"]:
        parts = neighbours_in_chunks(train, labels, test, k, p["classes"])
        scores = torch.cat([class_votes(near, of, p["T"], p["classes"]) for _, near, of in parts])
        found = {"top1_top5": accuracies[k], "scores": scores, "pred": scores.argmax(dim=1)}
        for name, value in found.items():
            if f"{name}_k{k}" in case.arrays:
                yield f"{name}_k{k}", value, case.arrays[f"{name}_k{k}"]


def linear_probe(case: Case) -> Iterator[tuple]:
    p = case.params
    lr = p["lr"] * p["batch"] * p["world_size"] / 256
    weight = case.tensor("weight0")
    heads = LinearHeads(weight[None], torch.zeros(1, len(weight), dtype=case.dtype), [Recipe(lr, p["weight_decay"])])
    probe = Probe([heads])
    batches = [(case.tensor(f"x{i}"), case.tensor(f"y{i}")) for i in range(p["iters"])]
    factors = [cosine_factor(epoch, p["epochs"]) for epoch in range(p["epochs"])]
    losses = [train_epoch(probe, batches, factor).item() for factor in factors]
    yield "lr_per_epoch", [lr * factor for factor in factors], case.arrays["lr_per_epoch"]
    yield "train_loss_per_epoch", losses, case.arrays["train_loss_per_epoch"]
    ((weight, bias, *_),) = probe.tensors()
    yield "weight", weight, case.arrays["weight"]
    yield "bias", bias, case.arrays["bias"]
    yield "val_loss_acc1_acc5", original_meters(probe, batches)[:, 0], case.arrays["val_loss_acc1_acc5"]


def preprocessing(case: Case) -> Iterator[tuple]:
    p, image = case.params, image_of(case.params)
    rows = case.arrays["u8_first_rows"]
    yield "u8_first_rows", image[: len(rows)], rows
    resized, crop = map(int, re.search(r"Resize\((\d+).*CenterCrop\W*(\d+)", case.entry["tests"]).groups())
    pixels = eval_transform(crop, resized)(Image.fromarray(image))
    yield from seen(case, pixels, "sub", "mean_std")
    if "aug" in p:
        drawn = p["aug"]
        made = Crop(Box(*drawn["box_top_left_height_width"]), drawn["hflip"], (), False, drawn["blur_radius"], True)
        yield "solarize_threshold", drawn["solarize_threshold"], SOLARIZED_FROM
        pixels = normalise(render_pil(Image.fromarray(image), made, drawn["out"])[None])[0]
        yield from seen(case, pixels, "aug_sub", "aug_mean_std")


def seen(case: Case, pixels: torch.Tensor, some: str, moments: str) -> Iterator[tuple]:
    yield some, every_nth(pixels, case.arrays[some], case.meaning(some)), case.arrays[some]
    flat = pixels.double().flatten(1)
    yield moments, torch.stack((flat.mean(dim=1), flat.std(dim=1)), dim=1), case.arrays[moments]


def image_of(p: dict) -> np.ndarray:
    """The picture that the manifest's ``formula`` describes: (height, width, 3) uint8."""
    expression, low, high = re.search(r"uint8\(clip\((.+), (\d+), (\d+)\)\)", p["formula"]).groups()
    i, j, c = np.ogrid[: p["height"], : p["width"], :3]
    names = {"i": i, "j": j, "c": c, "sin": np.sin, "cos": np.cos}
    values = eval(expression, {"__builtins__": {}}, names)
    return np.clip(values, int(low), int(high)).astype(np.uint8)


RUNNERS = {
    "esvit/weighted_knn": weighted_knn,
    "esvit/linear_probe": linear_probe,
    "esvit/eval_preprocess": preprocessing,
}
