"""Runners: UDI's backbone with two class tokens, its sampling of patches, its head."""

from collections.abc import Iterator

import torch

from methods.heads import DINOHead
from methods.srs import SampledBackbone
from models.vit import VisionTransformer
from tests.parity import Case
from tests.parity.constants import constants_of_norms


def sparse(maps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Dense maps (..., places, patches) -> index and weight (..., places, 4), and whether a place has any weight."""
    weight, index = maps.topk(4, dim=-1)
    return index, weight, maps.sum(dim=-1) > 0


def srs_module(case: Case) -> Iterator[tuple]:
    p = case.params
    vit = VisionTransformer(patch_size=8, img_size=16, embed_dim=p["dim"], depth=1, num_heads=1)
    tokens = case.tensor("tokens")
    yield from constants_of_norms(p, SampledBackbone(vit, num_heads=p["num_heads"]))
    for side in ("src", "tgt"):
        backbone = SampledBackbone(vit, num_heads=p["num_heads"]).to(case.dtype)
        backbone.attn.load_state_dict(case.state("attn"))
        backbone.norm1.load_state_dict(case.state("norm1"))
        maps = case.tensor(f"map_{side}")
        index, weight, there = sparse(maps)
        rows = [
            backbone.sample(tokens, i, w, torch.arange(i[..., 0].numel())) for i, w in zip(index, weight, strict=True)
        ]
        found = torch.stack(rows).view(case.arrays[f"reps_{side}"].shape)
        yield f"reps_{side}", found, case.arrays[f"reps_{side}"]
        weights = attention_of(backbone, tokens, index, weight) * there[:, :, None, :, None]
        yield f"attn_{side}", weights, case.arrays[f"attn_{side}"]
    for prefix in ("grad", "cot0_grad"):
        backbone = SampledBackbone(vit, num_heads=p["num_heads"]).to(case.dtype)
        backbone.attn.load_state_dict(case.state("attn"))
        backbone.norm1.load_state_dict(case.state("norm1"))
        leaf = tokens.clone().requires_grad_()
        total = 0.0
        for side in ("src", "tgt"):
            index, weight, there = sparse(case.tensor(f"map_{side}"))
            for i, w, t, cot in zip(index, weight, there, case.tensor(f"cot_{side}"), strict=True):
                points = torch.arange(t.numel()) if prefix == "grad" else t.flatten().nonzero().flatten()
                total = total + (backbone.sample(leaf, i, w, points) * cot.flatten(0, 1)[points]).sum()
        total.backward()
        yield f"{prefix}_tokens", leaf.grad, case.arrays[f"{prefix}_tokens"]
        for module in ("attn", "norm1"):
            for name, parameter in getattr(backbone, module).named_parameters():
                label = f"{prefix}_{module}/{name}"
                yield label, parameter.grad, case.arrays[label]


def attention_of(backbone: SampledBackbone, tokens, index, weight) -> torch.Tensor:
    """Softmax attention of every place (sets, batch, heads, places, patches), which training never forms."""
    y, attn = backbone.norm1(tokens), backbone.attn
    heads = attn.num_heads
    q_all, k, _ = attn.qkv(y).chunk(3, dim=-1)
    maps = torch.zeros(*index.shape[:-1], tokens.shape[1], dtype=tokens.dtype).scatter_add_(-1, index, weight)
    q, k = ((maps @ q_all).unflatten(-1, (heads, -1)).transpose(2, 3), k.unflatten(-1, (heads, -1)).transpose(1, 2))
    return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)


def head(case: Case) -> Iterator[tuple]:
    p = case.params
    sizes = {name: p[name] for name in ("out_dim", "nlayers", "hidden_dim", "bottleneck_dim")}
    module = DINOHead(p["in_dim"], norm_last_layer=False, **sizes).to(case.dtype)
    module.load_state_dict(case.state("sd"))
    leaf = case.tensor("x3").requires_grad_()
    results = {name: module(x) for name, x in (("3", leaf), ("4", case.tensor("x4")))}
    sum((case.tensor(f"cot{name}") * y).sum() for name, y in results.items()).backward()
    for name, y in results.items():
        yield f"y{name}", y, case.arrays[f"y{name}"]
    yield "grad_x3", leaf.grad, case.arrays["grad_x3"]
    for name in case.names("grad/"):
        yield name, module.get_parameter(name.removeprefix("grad/")).grad, case.arrays[name]
    normed = DINOHead(p["in_dim"], use_bn=True, **sizes).to(case.dtype)
    normed.load_state_dict(case.state("bn_sd"))
    yield from constants_of_norms(p, normed)
    for name, buffer in normed.named_buffers():
        if name.endswith("num_batches_tracked"):
            buffer.zero_()  # the case has recorded this counter, of all its "before", after the pass
    yield "bn_y_train", normed.train()(case.tensor("bn_x")), case.arrays["bn_y_train"]
    for name in case.names("bn_sd_after/"):
        yield name, normed.get_buffer(name.removeprefix("bn_sd_after/")), case.arrays[name]
    yield "bn_y_eval", normed.eval()(case.tensor("bn_x")), case.arrays["bn_y_eval"]


def backbone_two_class_tokens(case: Case) -> Iterator[tuple]:
    p = case.params
    vit = VisionTransformer(
        **{
            name: p[name]
            for name in ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "qkv_bias")
        },
        num_class_tokens=p["num_class_token"],
    ).to(case.dtype)
    vit.load_state_dict(case.state("sd"))
    yield from constants_of_norms(p, vit)
    for name in case.names("x_"):
        kind, images = name.removeprefix("x_"), case.tensor(name)
        yield f"cls_{kind}", vit(images), case.arrays[f"cls_{kind}"]
        yield f"cls_{kind}, with patches", vit.forward_with_patches([images])[0], case.arrays[f"cls_{kind}"]
        yield f"attn_{kind}", vit.get_last_selfattention(images), case.arrays[f"attn_{kind}"]
        yield f"pos_{kind}", vit.position_embedding(*images.shape[-2:]), case.arrays[f"pos_{kind}"]
        for index, layer in enumerate(vit.get_intermediate_layers(images, vit.depth)):
            if f"layer{index}_{kind}" in case.arrays:
                yield f"layer{index}_{kind}", layer, case.arrays[f"layer{index}_{kind}"]


RUNNERS = {
    "udi/head": head,
    "udi/backbone_two_class_tokens": backbone_two_class_tokens,
    "udi/srs_module": srs_module,
}
