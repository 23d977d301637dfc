"""Runners: Swin transformers. Cases of EsViT describe images and some weights by a hash instead of storing them."""

import re
from collections.abc import Iterator

import numpy as np
import torch

from evaluation.features import Feature
from methods.esvit import RegionNetwork, names_of_ours
from methods.heads import DINOHead
from models import build_backbone
from models.matching import load_backbone
from models.swin import DEFAULT_DROP_PATH, SwinTransformer, relative_position_index, shift_mask
from tests.parity import Case
from tests.parity.constants import constants_of_norms

SIZES = ("img_size", "patch_size", "embed_dim", "depths", "num_heads", "window_size", "mlp_ratio")


def build_swin(config: dict, **kwargs) -> SwinTransformer:
    """A Swin transformer of the sizes a manifest gives."""
    return SwinTransformer(**{name: config[name] for name in SIZES if name in config}, **kwargs)


# ---- iBOT -----------------------------------------------------------------------------------------------------------


def swin_forward(case: Case) -> Iterator[tuple]:
    swin = build_swin(case.params, masked_im_modeling=True).to(case.dtype).eval()
    swin.load_state_dict(case.state("state"))
    yield from constants_of_norms(case.params, swin)
    for name in case.names("in/x_"):
        kind, images = name.removeprefix("in/x_"), case.tensor(name)
        layers = len([label for label in case.names("out/inter") if label.endswith(f"_{kind}")])
        with torch.no_grad():
            yield f"out/tokens_{kind}", swin.forward_features(images), case.arrays[f"out/tokens_{kind}"]
            yield f"out/pooled_{kind}", swin(images), case.arrays[f"out/pooled_{kind}"]
            for i, tokens in enumerate(swin.get_intermediate_layers(images, layers)):
                yield f"out/inter{i}_{kind}", tokens, case.arrays[f"out/inter{i}_{kind}"]
            if f"out/lastattn_{kind}" in case.arrays:
                yield f"out/lastattn_{kind}", swin.window_attention(images), case.arrays[f"out/lastattn_{kind}"]
        if f"in/mask_{kind}" in case.arrays:
            tokens = swin.forward_features(images, case.tensor(f"in/mask_{kind}"))
            yield f"out/tokens_masked_{kind}", tokens, case.arrays[f"out/tokens_masked_{kind}"]
            (gradient,) = torch.autograd.grad(tokens.square().sum(), swin.masked_embed)
            yield f"out/grad_masked_embed_{kind}", gradient, case.arrays[f"out/grad_masked_embed_{kind}"]


def swin_structure(case: Case) -> Iterator[tuple]:
    for arch, facts in case.value("architectures").items():
        swin = build_backbone(arch, drop_path_rate=DEFAULT_DROP_PATH[arch])
        label = f"architectures {arch}"
        yield f"{label} params", sum(p.numel() for p in swin.parameters()), facts["params"]
        yield f"{label} width", swin.embed_dim, facts["num_features"]
        yield f"{label} depths", [len(layer.blocks) for layer in swin.layers], facts["depths"]
        yield f"{label} drop path", swin.blocks[-1].drop_path, facts["default_drop_path_last"]


# ---- EsViT ----------------------------------------------------------------------------------------------------------


def hashed(count: int, seed: int) -> np.ndarray:
    """The manifest's hash32 of 0 .. count - 1."""
    k = np.arange(count, dtype=np.uint64) + np.uint64(1000003 * seed + 1)
    mixed = k * (k + np.uint64(6)) * np.uint64(48271) + k * np.uint64(2654435761)
    return mixed & np.uint64(0xFFFFFFFF)


def hash_images(seed: int, *shape: int) -> torch.Tensor:
    values = (hashed(int(np.prod(shape)), seed) >> np.uint64(24)).astype(np.float64)
    return torch.from_numpy((values - 128) / 64).view(shape)


def hash_weights(state: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    """The manifest's rule for weights that are not stored."""
    filled = {}
    for position, (name, tensor) in enumerate(state.items()):
        if not tensor.is_floating_point():
            continue
        w = torch.from_numpy(hashed(tensor.numel(), seed + position) / 2.0**31 - 1).view(tensor.shape)
        if name.endswith(("running_var", "running_mean")):
            filled[name] = 1 + 0.4 * w if name.endswith("var") else 0.2 * w
        elif name.endswith("weight_g"):
            filled[name] = torch.ones_like(w)
        elif name.endswith("relative_position_bias_table"):
            filled[name] = 0.7 * w
        elif w.ndim > 1:
            filled[name] = w * (4 / w[0].numel()) ** 0.5
        else:
            filled[name] = 0.2 * w if name.endswith("bias") else 1 + 0.3 * w
    return state | filled


def esvit_images(case: Case, size: int) -> torch.Tensor:
    """``hash image of size S: seed = 1000 + S, shape (2,3,S,S)`` or ``hash image, seed = image size, ...``."""
    text = case.params["input"]
    offset = re.search(r"seed = (\d+) ?\+ ?S", text)
    batch, channels = re.search(r"shape \((\d+), ?(\d+), ?S, ?S\)", text).groups()
    return hash_images(size + (int(offset[1]) if offset else 0), int(batch), int(channels), size, size)


def stored_weights(case: Case) -> dict[str, torch.Tensor]:
    return {name.removeprefix("w::"): case.tensor(name) for name in case.names("w::")}


def esvit_forward(case: Case) -> Iterator[tuple]:
    swin = build_swin(case.params).to(case.dtype).eval()
    if case.names("w::"):
        weights = stored_weights(case)
    else:
        weights = hash_weights(swin.state_dict(), int(case.params["weights"].split("seed ")[1].split("+")[0]))
        yield "names", list(weights), case.params["names"]
    swin.load_state_dict(weights)
    yield from constants_of_norms(case.params, swin)
    built = [[block.attn.window for block in layer.blocks] for layer in swin.layers]
    shifts = [[block.attn.shift for block in layer.blocks] for layer in swin.layers]
    yield "build_time_window", built, case.params["build_time_window"]
    yield "build_time_shift", shifts, case.params["build_time_shift"]
    for size in case.params["input_sizes"]:
        with torch.no_grad():
            computed = esvit_outputs(swin, esvit_images(case, size))
        for label in (name for name in case.arrays if name.endswith(f"_{size}")):
            kind = label.removesuffix(f"_{size}")
            if kind.startswith("nlast"):
                with torch.no_grad():
                    value = Feature(int(kind.removeprefix("nlast")))(swin, esvit_images(case, size))
            else:
                value = computed[kind]
            yield label, value, case.arrays[label]


def esvit_outputs(swin: SwinTransformer, images: torch.Tensor) -> dict:
    """Everything but linear features; ``block<i>`` is the output of block i, without norm."""
    outputs, attention = [], []

    def watch(block, arguments, output):
        attention.append(block.attn.weights(block.norm1(arguments[0]), arguments[1]))
        outputs.append(output.flatten(1, 2))

    handles = [block.register_forward_hook(watch) for block in swin.blocks]
    features = swin.forward_features(images)
    for handle in handles:
        handle.remove()
    return {
        "tokens": features[:, 1:],
        "pooled": swin(images),
        "last_attn": swin.window_attention(images),
        "attn_l2": torch.stack([weights.square().sum() for weights in attention]),
        "attn_shape": np.array([weights.shape for weights in attention]),
        "block_l2": torch.stack([output.square().sum() for output in outputs]),
        **{f"block{i}": output for i, output in enumerate(outputs)},
    }


def esvit_tables(case: Case) -> Iterator[tuple]:
    for label, expected in case.arrays.items():
        if label.startswith("rel_index_w"):
            yield label, relative_position_index(int(label.removeprefix("rel_index_w"))), expected
        else:
            grid, window, shift = (int(part.lstrip("gridws")) for part in label.removeprefix("mask_").split("_"))
            mask = shift_mask(grid + -grid % window, window, shift)
            yield label, mask, -100.0 * expected


def esvit_multicrop(case: Case) -> Iterator[tuple]:
    p, weights = case.params, stored_weights(case)
    swin = build_swin(p)
    sizes = {"out_dim": p["head out_dim"], "hidden_dim": p["head hidden"], "bottleneck_dim": p["head bottleneck"]}
    network = RegionNetwork(swin, *(DINOHead(swin.embed_dim, **sizes) for _ in range(2))).to(case.dtype).eval()
    yield from constants_of_norms(p, swin)
    network.load_state_dict(network.state_dict() | names_of_ours(weights))

    # "crop 0: hash image seed 10000 shape (2,3,48,48)"
    said = [re.search(r"seed (\d+) shape \(([\d, ]+)\)", text).groups() for text in p["crops"]]
    crops = [hash_images(int(seed), *map(int, shape.split(","))) for seed, shape in said]
    locals_ = [s for s, n in zip(p["local_sizes"], p["n_local"], strict=True) for _ in range(n)]
    sizes = [p["global_size"]] * (len(crops) - len(locals_)) + locals_
    yield "npatch, sizes of the crops", [crop.shape[-1] for crop in crops], sizes
    with torch.no_grad():
        vectors, tokens = network.regions(crops, None, None)
        regions = torch.cat([t.flatten(0, 1) for t in tokens])
        yield "cls_logits", network.head(vectors), case.arrays["cls_logits"]
        yield "cls_logits_view_only", network(crops), case.arrays["cls_logits_view_only"]
        yield "region_features", regions, case.arrays["region_features"]
        yield "region_logits", network.head_dense(regions), case.arrays["region_logits"]
    yield "npatch", np.array([t.shape[1] for t in tokens]), case.arrays["npatch"]


def esvit_checkpoint_features(case: Case) -> Iterator[tuple]:
    for file in case.params["files"]:
        for key in ("teacher", "student"):
            swin = build_swin(case.params["arch_config"]).to(case.dtype).eval()
            load_backbone(swin, case.folder / file, key)
            for label in case.names(f"{key}_"):
                kind, size = label.removeprefix(f"{key}_").rsplit("_", 1)
                images = (case.tensor(f"u8_{size}").to(case.dtype) - 128) / 64
                with torch.no_grad():
                    if kind.startswith("nlast"):
                        feature = Feature(int(kind.removeprefix("nlast")))(swin, images)
                    else:
                        feature = swin(images)
                if kind == "knn_normalised":
                    feature = torch.nn.functional.normalize(feature, dim=1)
                yield f"{label} of {file}", feature, case.arrays[label]


RUNNERS = {
    "ibot/swin_forward": swin_forward,
    "ibot/swin_structure": swin_structure,
    "esvit/swin_forward_*": esvit_forward,
    "esvit/swin_tables": esvit_tables,
    "esvit/swin_multicrop": esvit_multicrop,
    "esvit/checkpoint_features": esvit_checkpoint_features,
}
