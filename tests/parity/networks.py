"""Runners: vision transformer, projection head, multi-crop wrapper."""

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn as nn

from methods.heads import DINOHead
from methods.multicrop import MultiCropNetwork
from models import build_backbone
from models.vit import VisionTransformer, group_by_size
from tests.parity import Case


def build_vit(config: dict, **kwargs) -> VisionTransformer:
    """A vision transformer of the sizes a manifest gives."""
    return VisionTransformer(
        patch_size=config["patch"],
        embed_dim=config["dim"],
        depth=config["depth"],
        num_heads=config["heads"],
        mlp_ratio=config.get("mlp_ratio", 4),
        qkv_bias=config.get("qkv_bias", True),
        img_size=config["img"],
        **{name: config[name] for name in ("init_values", "use_mean_pooling") if name in config},
        **kwargs,
    )


def vit_forward(case: Case) -> Iterator[tuple]:
    vit = build_vit(case.params).to(case.dtype).eval()
    vit.load_state_dict(case.state("state"))
    depth = len(vit.blocks)
    for name in case.names("in/x_"):
        kind = name.removeprefix("in/x_")
        images = case.tensor(name)
        with torch.no_grad():
            computed = {
                f"out/cls_{kind}": lambda images=images: vit(images),
                f"out/tokens_{kind}": lambda images=images: vit.forward_features(images),
                f"out/inter_{kind}": lambda images=images: torch.stack(vit.get_intermediate_layers(images, depth)),
                f"out/pos_{kind}": lambda images=images: vit.position_embedding(*images.shape[-2:]),
                f"out/attn_{kind}": lambda images=images: vit.get_last_selfattention(images),
                **{
                    f"out/inter{i}_{kind}": lambda images=images, i=i: vit.get_intermediate_layers(images, depth)[i]
                    for i in range(depth)
                },
                **{
                    f"out/inter_n{n}_{kind}": lambda images=images, n=n: vit.get_intermediate_layers(images, n)[0]
                    for n in range(1, depth + 1)
                },
            }
            for label, compute in computed.items():
                if label in case.arrays:
                    yield label, compute(), case.arrays[label]
            if f"out/attn_{kind}" in case.arrays:
                row = vit.get_last_selfattention(images, queries=1)
                yield f"out/attn_{kind} class row", row, case.arrays[f"out/attn_{kind}"][:, :, :1]


def vit_backward(case: Case) -> Iterator[tuple]:
    vit = build_vit(case.params).to(case.dtype)
    with np.load(case.folder / case.params["state_from"], allow_pickle=False) as file:
        vit.load_state_dict(
            {k.removeprefix("state/"): torch.from_numpy(v).to(case.dtype) for k, v in file.items() if k[:6] == "state/"}
        )
    (case.tensor("in/w") * vit(case.tensor("in/x"))).sum().backward()
    grads = {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in vit.named_parameters()}
    for name, norm in case.value("grad_norms").items():
        yield f"grad_norms {name}", grads[name].norm(), norm
    for name in case.names("out/grad/"):
        yield name, grads[name.removeprefix("out/grad/")], case.arrays[name]


def vit_structure(case: Case) -> Iterator[tuple]:
    for name, facts in case.value("architectures").items():
        arch, patch_size = name.split("/")
        rate = facts["drop_path"][-1]
        vit = build_backbone(arch, int(patch_size), drop_path_rate=round(rate, 6))
        yield f"architectures {name} params", sum(p.numel() for p in vit.parameters()), facts["params"]
        yield f"architectures {name} width", vit.embed_dim, facts["embed_dim"]
        yield f"architectures {name} depth", len(vit.blocks), facts["depth"]
        yield f"architectures {name} heads", vit.blocks[0].attn.num_heads, facts["heads"]
        yield f"architectures {name} drop path", [block.drop_path for block in vit.blocks], facts["drop_path"]
    for label in case.outputs():
        if label.endswith("_state_keys_block0"):
            state = build_backbone(label.removesuffix("_state_keys_block0")).state_dict()
            first = [k for k in state if not k.startswith("blocks.") or k.startswith("blocks.0.")]
            keys = [[k, list(state[k].shape)] for k in first]
            yield label, keys, case.value(label)
        if label.startswith("head_params_"):
            _, _, size, prototypes = label.split("_")
            head = DINOHead(build_backbone(f"vit_{size}").embed_dim, int(prototypes))
            facts = case.value(label)
            yield f"{label} total", sum(p.numel() for p in head.parameters()), facts["total"]
            yield f"{label} trainable", sum(p.numel() for p in head.parameters() if p.requires_grad), facts["trainable"]
            yield f"{label} keys", [[k, list(v.shape)] for k, v in head.state_dict().items()], facts["keys"]


def head(case: Case) -> Iterator[tuple]:
    module = DINOHead(**case.params).to(case.dtype)
    module.load_state_dict(case.state("state"))
    x = case.tensor("in/x").requires_grad_()
    logits = module.train()(x)
    (case.tensor("in/w") * logits).sum().backward()
    yield "out/logits_train", logits, case.arrays["out/logits_train"]
    yield "out/grad_x", x.grad, case.arrays["out/grad_x"]
    for name in case.names("out/grad_weight_"):
        yield name, getattr(module.last_layer, name.removeprefix("out/grad_")).grad, case.arrays[name]
    yield "weight_g_requires_grad", module.last_layer.weight_g.requires_grad, case.value("weight_g_requires_grad")
    for name in case.names("out/buffer_after/"):
        yield name, module.get_buffer(name.removeprefix("out/buffer_after/")), case.arrays[name]
    yield "out/logits_eval", module.eval()(x), case.arrays["out/logits_eval"]


def multicrop_wrapper(case: Case) -> Iterator[tuple]:
    p = case.params
    head_sizes = {key: p[key] for key in ("out_dim", "hidden_dim", "bottleneck_dim")}
    network = MultiCropNetwork(build_vit(p), DINOHead(p["dim"], **head_sizes)).to(case.dtype)
    network.load_state_dict(case.state("state"))
    crops = [case.tensor(f"in/crop{i}") for i in range(len(case.names("in/crop")))]
    yield "out/logits", network(crops), case.arrays["out/logits"]
    yield "out/logits_single", network(crops[0]), case.arrays["out/logits_single"]
    groups = [list(group.shape) for group in group_by_size(crops)]
    yield "backbone_call_shapes", [*groups, list(crops[0].shape)], case.value("backbone_call_shapes")

    grouped_by_hand = nn.ModuleDict({"backbone": network.backbone, "head": network.head})
    features = torch.cat([grouped_by_hand["backbone"](group) for group in group_by_size(crops)])
    yield "out/logits, one backbone call per size", grouped_by_hand["head"](features), case.arrays["out/logits"]


RUNNERS = {
    "dino/vit_forward": vit_forward,
    "ibot/vit_layerscale": vit_forward,
    "ibot/vit_meanpool": vit_forward,
    "dino/vit_backward": vit_backward,
    "dino/vit_structure": vit_structure,
    "dino/head_*": head,
    "dino/multicrop_wrapper": multicrop_wrapper,
}
