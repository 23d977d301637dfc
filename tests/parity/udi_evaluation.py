"""Runners: what UDI's evaluations read from its checkpoints, and how they judge it."""

import re
from collections.abc import Iterator

import torch

from evaluation.attention import keep_mass
from evaluation.features import Feature, class_token, pool_tokens
from evaluation.knn import class_votes, knn_classify, neighbours_in_chunks
from evaluation.linear_heads import MOMENTUM, LinearHeads, Probe, Recipe, cosine_factor
from models.adapt import select_class_tokens
from models.matching import load_tensors
from models.reading import read_backbone
from models.safe_load import load_file
from models.vit import VisionTransformer
from tests.parity import Case


def weighted_knn(case: Case) -> Iterator[tuple]:
    tensors = [case.tensor(name) for name in ("train", "train_labels", "test", "test_labels")]
    classes = case.params["num_classes"]
    for temperature, k, top1, top5, ambiguous in case.arrays["results"]:
        found = knn_classify(*tensors, [int(k)], temperature, classes)[int(k)]
        label = f"results T={temperature} k={int(k)}"
        yield f"{label} top1", found[0], top1
        yield f"{label} top5", found[1], top5, (0, ambiguous + 1e-9)
    for label in case.names("votes"):
        expected, said = case.arrays[label], case.meaning(label)
        temperature, k = float(re.search(r"T ?= ?([\d.]+\d)", said)[1]), int(re.search(r"k ?= ?(\d+)", said)[1])
        chunks = neighbours_in_chunks(tensors[0], tensors[1], tensors[2], k, classes)
        votes = torch.cat([class_votes(found, labels, temperature, classes) for _, found, labels in chunks])
        yield label, votes[: len(expected)], expected


def linear_probe(case: Case) -> Iterator[tuple]:
    p = case.params
    lr, floor = p["lr"] * p["B"] * p["world"] / 256, p.get("lr_min", 0.0)
    yield "lr_scaled", lr, p["lr_scaled"]
    yield "momentum", MOMENTUM, p["momentum"]
    init = case.state("init")
    recipe = Recipe(lr, p["weight_decay"])
    heads = LinearHeads(init["linear.weight"][None].clone(), init["linear.bias"][None].clone(), [recipe])
    probe, rates, losses = Probe([heads]), [], []
    for epoch in range(p["epochs"]):
        rates.append(floor + (lr - floor) * cosine_factor(epoch, p["epochs"]))
        total = 0.0
        for step in range(epoch * p["niter"], (epoch + 1) * p["niter"]):
            layers = case.tensor(f"step{step}/tokens").unbind(1)
            feature = pool_tokens(layers, layers[-1], Feature(p["n"]), 2)
            target = case.tensor(f"step{step}/target")
            total += probe.train_step([feature], target, len(target), rates[-1] / lr).item()
        losses.append(total / p["niter"])
    yield "lr_per_epoch", rates, case.arrays["lr_per_epoch"]
    yield "mean_loss_per_epoch", losses, case.arrays["mean_loss_per_epoch"]
    yield "weight", heads.weight[0], case.arrays["weight"]
    yield "bias", heads.bias[0], case.arrays["bias"]


def attention_threshold(case: Case) -> Iterator[tuple]:
    """Which patches are kept is a question to the patches of a head, wherever they lie: one row of them will do."""
    found = keep_mass(case.tensor("attention").unsqueeze(1), case.params["threshold"])
    yield "mask", found.flatten(1), case.arrays["mask"]


def checkpoint_eval_features(case: Case) -> Iterator[tuple]:
    training, bare = {}, []
    for name in case.extra_files:
        file = load_file(case.folder / name)
        if "teacher" in file:
            training[name] = ("teacher", "student")
        else:
            bare.append(name)
    for name, keys in (training | dict.fromkeys(bare, ("teacher",))).items():
        for key in keys:
            model = model_of(case, name, key)
            for label in case.names(f"{key}/"):
                yield f"{label} of {name}", feature_of(case, model, label.removeprefix(f"{key}/")), case.arrays[label]
    for name in training:
        yield from features_of_one_class_token(case, name)


def feature_of(case: Case, model: VisionTransformer, label: str) -> torch.Tensor:
    """Of knn_cls, cls_plus, linear_n<blocks>, linear_avgpool_patches or linear_avgpool_literal, on x or, _large, on
    x_large.
    """
    images = case.tensor("x_large" if label.endswith("_large") else "x")
    kind = label.removesuffix("_large")
    if kind == "knn_cls":
        return class_token(model, images)
    if kind == "cls_plus":
        return model(images)[:, 1]
    if kind == "linear_avgpool_patches":
        return Feature(1, "interleaved")(model, images)
    if kind == "linear_avgpool_literal":
        tokens = model.get_intermediate_layers(images, 1)[0]
        return torch.stack((tokens[:, 0], tokens[:, 1:].mean(1)), dim=2).flatten(1)
    return Feature(int(re.fullmatch(r"linear_n(\d+)", kind)[1]))(model, images)


def features_of_one_class_token(case: Case, name: str) -> Iterator[tuple]:
    """What is left of a training checkpoint for a network without cls+, and the attention of both class tokens."""
    model, large = model_of(case, name, "teacher"), case.tensor("x_large")
    for token, label in enumerate(("attn_cls", "attn_cls_plus")):
        expected = case.arrays[label]
        attention = model.get_last_selfattention(large[: len(expected)], queries=2)[:, :, token, 2:]
        yield f"{label} of {name}", attention, expected
    state, info = read_backbone(case.folder / name, "teacher")
    single = select_class_tokens(state, 1)
    yield f"finetune_cls_token of {name}", single["cls_token"], case.arrays["finetune_cls_token"]
    yield f"finetune_pos_embed of {name}", single["pos_embed"], case.arrays["finetune_pos_embed"]
    model = small_vit(case, 1)
    load_tensors(model, single, info)
    for label in case.names("one_cls_"):
        kind = label.removeprefix("one_cls_")
        found = feature_of(case, model, "knn_cls" if kind == "knn" else kind)
        yield f"{label} of {name}", found, case.arrays[label]


def small_vit(case: Case, class_tokens: int) -> VisionTransformer:
    sizes = {name: case.params[name] for name in ("img_size", "patch_size", "embed_dim", "depth", "num_heads")}
    return VisionTransformer(**sizes, num_class_tokens=class_tokens).to(case.dtype).eval()


def model_of(case: Case, file: str, key: str) -> VisionTransformer:
    vit = small_vit(case, 2)
    load_tensors(vit, *read_backbone(case.folder / file, key))
    return vit


RUNNERS = {
    "udi/knn": weighted_knn,
    "udi/linear_probe": linear_probe,
    "udi/attention_threshold": attention_threshold,
    "udi/checkpoint_eval_features": checkpoint_eval_features,
}
