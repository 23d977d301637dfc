"""Runners: UNIC's student, its stochastic depth, the teachers and their targets."""

from collections.abc import Iterator

import numpy as np
import torch

from evaluation.zero_shot import LOGIT_SCALE, class_logits, read_projection
from models.blocks import Block
from models.layouts.clip import from_open_clip
from models.layouts.shapes import vit_arguments
from models.layouts.table import CHUNKED
from models.matching import load_tensors
from models.reading import read_backbone
from models.stochastic_depth import BatchDraws, kept_samples
from models.teacher_space import EPS, unstandardised
from models.teachers import IMAGENET, Pixels, Teacher
from models.vit import Variant, VisionTransformer
from tests.parity import Case
from tests.parity.tolerance import EXACT


def our_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A student's own state dict as the reader of its checkpoints names it."""
    for step in CHUNKED:
        state = step(state)
    return state


def student(case: Case) -> Iterator[tuple]:
    state = our_names(case.state("sd"))
    p, shape = case.params, vit_arguments(state)
    model = built(state, p["num_heads"], masked_im_modeling=True)
    model.to(case.dtype).load_state_dict(state)
    yield "parameters norms", model.blocks[0].norm1.eps, p["layernorm_eps"], EXACT
    for name in ("embed_dim", "depth", "patch_size", "img_size", "mlp_ratio"):
        yield f"parameters {name}", shape[name], p[name], EXACT
    yield "parameters registers", model.num_registers, p["num_register_tokens"], EXACT
    yield "parameters ffn", {"gelu": "mlp", "swiglu": "swiglufused"}[shape["variant"].mlp], p["ffn_layer"], EXACT
    exact = model.num_registers > 0
    yield "parameters positions", (0.0 if exact else 0.1), p["interpolate_offset"], EXACT
    yield "parameters antialias", exact, p["interpolate_antialias"], EXACT
    for name in case.names("in/image_"):
        tag, images = name.removeprefix("in/image_"), case.tensor(name)
        computed = {f"out/{tag}/{key}": value for key, value in outputs_of(model, images).items()}
        for label in case.names(f"out/{tag}/"):
            yield label, computed[label], case.arrays[label]


def outputs_of(model: VisionTransformer, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the original's encoder returns, by its names."""
    tokens, classes, prefix = model.forward_features(images), model.num_class_tokens, model.num_prefix_tokens
    blocks = model.forward_blocks(images)
    found = {
        "x_norm_clstoken": tokens[:, 0],
        "x_norm_regtokens": tokens[:, classes:prefix],
        "x_norm_patchtokens": tokens[:, prefix:],
        "x_prenorm": blocks[-1],
        "last_selfattention": model.get_last_selfattention(images),
        "all_block_tokens": torch.stack([model.prepare_tokens(images), *blocks]),
    }
    grid = [side // model.patch_size for side in images.shape[-2:]]
    for index, layer in enumerate(model.get_intermediate_layers(images, 2)):
        found[f"inter{index}_cls"] = layer[:, 0]
        found[f"inter{index}_patch_map"] = layer[:, prefix:].transpose(1, 2).unflatten(-1, grid)
    return found


def stochastic_depth(case: Case) -> Iterator[tuple]:
    """Draws that keep what the case kept: the largest are those that come first in its permutation."""
    p = case.params
    rates = {f"subset{i}": rate for i, rate in enumerate(p["subset_rates"])} | {"persample": p.get("persample_rate")}
    for kind, rate in rates.items():
        if f"{kind}/in/x" not in case.arrays:
            continue
        state = case.state("sd") if case.names("sd/") else case.state(f"{kind}/sd")
        ratio = len(state["mlp.fc1.weight"]) / p["dim"]
        block = Block(p["dim"], p["heads"], mlp_ratio=ratio, drop_path=rate, norm_eps=1e-6).to(case.dtype)
        block.load_state_dict(state)
        x = case.tensor(f"{kind}/in/x")
        batch, tokens, _ = x.shape
        uniforms = np.zeros((1, 2, batch))
        for branch, name in enumerate(("attn", "ffn")):
            if kind == "persample":
                uniforms[0, branch] = case.arrays[f"{kind}/in/keep_{name}"]
            else:
                uniforms[0, branch, case.arrays[f"{kind}/in/perm_{name}"]] = np.arange(batch, 0, -1) / batch
        for skip in (True, False):
            (kept,) = kept_samples([block], BatchDraws(uniforms, 0, batch), x.device, skip)
            groups = [(batch, tokens)]
            y = block(x.flatten(0, 1), groups, None, *block.drops(kept, x.flatten(0, 1), groups, None))
            yield f"{kind}/out/y, {'gathered' if skip else 'multiplied'}", y.view_as(x), case.arrays[f"{kind}/out/y"]


def built(state: dict[str, torch.Tensor], heads: int, **options) -> VisionTransformer:
    return VisionTransformer(**vit_arguments(state) | options, num_heads=heads)


def teacher(name: str, network: VisionTransformer, images: torch.Tensor, pixels: Pixels = IMAGENET) -> Teacher:
    """A teacher whose student has its own patches and sees these images."""
    side = images.shape[-1]
    return Teacher(name, network, network.embed_dim, side, side // network.patch_size, pixels).to(images.dtype)


def teachers(case: Case) -> Iterator[tuple]:
    p = case.params
    for name, file in p["files"].items():
        state, info = read_backbone(case.folder / file)
        yield f"parameters {name} key", info.key, p["ckpt_key"][name] if info.key else None, EXACT
        network = built(state, p["dims"][name]["num_heads"])
        load_tensors(network, state, info)
        for size in ("depth", "embed_dim"):
            yield f"parameters {name} {size}", getattr(network, size), p["dims"][name][size], EXACT
        yield f"parameters {name} norms", network.blocks[0].norm1.eps, p["layernorm_eps"], EXACT
        network.to(case.dtype)
        for tag in ("native", "bigger"):
            images = case.tensor(f"in/image_{tag}")
            computed = dict(zip(("cls", "patch"), teacher(name, network, images)(images), strict=True))
            computed["x_prenorm"] = network.forward_blocks(images)[-1]
            for label in case.names(f"out/{name}/{tag}/"):
                yield label, computed[label.rpartition("/")[2]], case.arrays[label]


def teacher_openclip(case: Case) -> Iterator[tuple]:
    p = case.params
    state, info = read_backbone(case.folder / p["file"])
    state = from_open_clip(state)
    variant = Variant(mlp="quick_gelu", norm_first=True)
    network = built(state, p["num_heads"], variant=variant, norm_eps=info.norm_eps)
    load_tensors(network, state, info)
    yield "parameters layernorm_eps", info.norm_eps, p["layernorm_eps"], EXACT
    for name in ("embed_dim", "depth", "patch_size", "img_size"):
        yield f"parameters {name}", vit_arguments(state)[name], p[name], EXACT
    yield "parameters logit_scale", LOGIT_SCALE, p["logit_scale"], EXACT
    yield "parameters std_eps", EPS, p["std_eps"], EXACT
    images = case.tensor("in/image")
    classes, patches = teacher("clip", network.to(case.dtype), images)(images)
    yield "out/cls", classes, case.arrays["out/cls"]
    yield "out/patch", patches, case.arrays["out/patch"]
    projection = read_projection(case.folder / p["file"], network.embed_dim).to(case.dtype)
    yield "parameters proj_dim", len(projection), p["proj_dim"], EXACT
    yield "out/projected", classes @ projection.t(), case.arrays["out/projected"]
    statistics = case.tensor("in/zs_mean"), case.tensor("in/zs_std")
    features = unstandardised(case.tensor("in/zs_student_pred"), *statistics)
    logits = class_logits(features, projection, case.tensor("in/zs_text"))
    yield "out/zs_logits", logits, case.arrays["out/zs_logits"]
    yield "out/zs_pred", logits.argmax(dim=1), case.arrays["out/zs_pred"]


RUNNERS = {
    "unic/teachers": teachers,
    "unic/teacher_openclip": teacher_openclip,
    "unic/student_vit*": student,
    "unic/stochastic_depth": stochastic_depth,
}
