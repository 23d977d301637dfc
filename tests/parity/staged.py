"""Runners: the networks of EsViT that are no Swin."""

import contextlib
import hashlib
import re
from collections.abc import Iterator
from unittest import mock

import numpy as np
import torch
import torch.nn as nn

from evaluation.features import Feature
from methods.heads import DINOHead
from models import build_backbone, cvt
from models.cvt import CvT
from models.stages import StagedTransformer
from models.vil import VisionLongformer, parse_architecture
from tests.parity import Case
from tests.parity.constants import constants_of_norms
from tests.parity.swin import esvit_images, hash_weights, stored_weights

CVT_KEYS = {
    "PATCH_SIZE": "kernel",
    "PATCH_STRIDE": "stride",
    "PATCH_PADDING": "padding",
    "DIM_EMBED": "dim",
    "NUM_HEADS": "num_heads",
    "DEPTH": "depth",
    "WINDOW_SIZE": "window",
    "MLP_RATIO": "mlp_ratio",
    "QKV_BIAS": "qkv_bias",
    "KERNEL_QKV": "qkv_kernel",
    "PADDING_QKV": "qkv_padding",
}


def build_cvt(config: dict) -> CvT:
    """A CvT of the sizes a manifest gives."""
    given = {name: config[key] for key, name in CVT_KEYS.items() if key in config}
    stages = [cvt.Stage(**dict(zip(given, values, strict=True))) for values in zip(*given.values(), strict=True)]
    return CvT(stages, config.get("REL_POS_EMBED", False))


def build_vil(config: dict) -> VisionLongformer:
    return VisionLongformer(parse_architecture(config["arch"]), config["img_size"], config["mode"])


def feature_outputs(case: Case, network: StagedTransformer, size: int) -> Iterator[tuple]:
    """What evaluations see of images of a size, and what a pass for crops of several sizes sees of them."""
    images = esvit_images(case, size)
    taller = torch.cat((images, images[:, :, : size // 2]), dim=2)
    with torch.no_grad():
        features = network.forward_features(images)
        pooled, tokens = network.forward_regions([images, images, taller])
        for label in (name for name in case.arrays if name.endswith(f"_{size}")):
            kind, expected = label.removesuffix(f"_{size}"), case.arrays[label]
            if kind == "tokens":
                yield label, features[:, network.num_prefix_tokens :], expected
                for part in tokens[0].split(len(images)):
                    yield f"{label} among crops", part, expected
            elif kind == "pooled":
                yield label, network(images), expected
                yield f"{label} among crops", pooled[len(images) : 2 * len(images)], expected
                yield f"{label} of all tokens", features[:, 0], expected
            elif kind.startswith("nlast"):
                yield label, Feature(int(kind.removeprefix("nlast")))(network, images), expected


def cvt_forward(case: Case) -> Iterator[tuple]:
    network, weights = build_cvt(case.params).to(case.dtype), stored_weights(case)
    yield "names of the state dict", list(network.state_dict()), list(weights)
    yield from constants_of_norms(case.params, network)
    for size in case.params["input_sizes"]:
        images = esvit_images(case, size)
        network.load_state_dict(weights)
        yield from feature_outputs(case, network.eval(), size)
        with torch.no_grad():
            first = network.stages[0][0](images[:1].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            yield f"conv_embed0_{size}", first, case.arrays[f"conv_embed0_{size}"]
            tokens = network.train().forward_features(images)[:, network.num_prefix_tokens :]
            yield f"tokens_train_{size}", tokens, case.arrays[f"tokens_train_{size}"]
        for label in case.names(f"after_{size}::"):
            yield label, network.get_buffer(label.split("::")[1]), case.arrays[label]


def vil_forward(case: Case) -> Iterator[tuple]:
    p, weights = case.params, stored_weights(case)
    network = build_vil(p).to(case.dtype)
    yield "names of the state dict", list(network.state_dict()), list(weights)
    for name, buffer in network.named_buffers():
        yield name, buffer, weights[name]
    network.load_state_dict(weights)
    yield from constants_of_norms(p, network)
    for size in p["input_sizes"]:
        images = esvit_images(case, size)
        yield from feature_outputs(case, network.eval(), size)
        if f"tokens_train_{size}" in case.arrays:
            said = next(value for key, value in p.items() if re.search(rf"neighbour.*\bsize {size}$", key))
            neighbours = torch.tensor([said, said[::-1]]).numpy()
            taller = torch.cat((images, images[:, :, : size // 2]), dim=2)
            with torch.no_grad():
                tokens = network.train().forward_regions([images, taller], neighbours=neighbours)[1]
            yield f"tokens_train_{size}", tokens[0], case.arrays[f"tokens_train_{size}"]


def resnet_forward(case: Case) -> Iterator[tuple]:
    network = build_backbone(case.params["arch"]).to(case.dtype)
    seed = int(re.search(r"seed (\d+)\+t", case.params["weights"])[1])
    weights = hash_weights(network.state_dict(), seed)
    yield "names", list(weights), case.params["names"]
    for size in case.params["sizes"]:
        images = esvit_images(case, size)
        for mode in ("eval", "train"):
            network.load_state_dict(weights)
            with torch.no_grad():
                pooled, (tokens,) = network.train(mode == "train").forward_regions([images])
            rows = tokens.flatten(0, 1)
            found = {
                "pooled": pooled.numpy(),
                "tokens_sum_l2": torch.stack((rows.sum(dim=1), rows.norm(dim=1)), dim=1).numpy(),
                "npatch": np.array([tokens.shape[1]]),
            }
            for kind, value in found.items():
                label = f"{kind}_{mode}_{size}"
                if label in case.arrays:  # of which some are stored in single precision
                    yield label, value.astype(case.arrays[label].dtype), case.arrays[label]


# ---- names and shapes -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def uninitialised() -> Iterator[None]:
    """Weights stay what memory holds: only names and shapes of large networks matter."""
    names = ("trunc_normal_", "normal_", "kaiming_normal_", "kaiming_uniform_", "uniform_", "zeros_", "ones_")
    with mock.patch.multiple(nn.init, **{name: lambda tensor, *rest, **more: tensor for name in names}):
        yield


def networks_of(name: str) -> dict[str, nn.Module]:
    """What an entry of the table is about, by what stands in front of its names."""
    words = name.split()
    if match := re.search(r"head (\d+) -> (\d+)", name):
        return {"": DINOHead(int(match[1]), int(match[2]))}
    if match := re.search(r"heads with out_dim (\d+)", name):
        backbone = build_backbone(words[0])
        heads = {key: DINOHead(backbone.embed_dim, int(match[1])) for key in ("head.", "head_dense.")}
        return {"backbone.backbone.": backbone} | heads
    if words[0] == "cvt":
        return {"": build_backbone({"s1": "cvt_tiny"}[words[1].split("_")[0]], rel_pos_embed="rpe" in words[1])}
    windows = {"window_size": int(words[1].lstrip("W"))} if len(words) > 1 else {}
    return {"": build_backbone(words[0], **windows)}


def state_dict_layouts(case: Case) -> Iterator[tuple]:
    for name, facts in case.arrays.items():
        with uninitialised():
            parts = networks_of(name)
        shapes = {
            prefix + key: list(tensor.shape)
            for prefix, part in parts.items()
            for key, tensor in part.state_dict().items()
        }
        parameters = [p for part in parts.values() for p in part.parameters()]
        computed = {
            "backbone_parameters": lambda of=parameters: sum(p.numel() for p in of),
            "parameters": lambda of=parameters: sum(p.numel() for p in of),
            "trainable_tensors": lambda of=parameters: len(of),
            "state_dict_entries": lambda of=shapes: len(of),
            "sha256_of_name_space_shape_lines": lambda of=shapes: digest(of),
            "entries": lambda of=shapes: list(of.items()),
        }
        for fact, expected in facts.items():
            expected = list(expected.items()) if fact == "entries" else expected
            yield f"{name} {fact}", computed[fact](), [tuple(e) for e in expected] if fact == "entries" else expected


def digest(shapes: dict[str, list[int]]) -> str:
    return hashlib.sha256("\n".join(f"{name} {shape}" for name, shape in shapes.items()).encode()).hexdigest()


RUNNERS = {
    "esvit/cvt_forward*": cvt_forward,
    "esvit/vil_forward*": vil_forward,
    "esvit/resnet_forward": resnet_forward,
    "esvit/state_dict_layouts": state_dict_layouts,
}
