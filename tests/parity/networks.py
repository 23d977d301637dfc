"""Runners: vision transformer, projection head, multi-crop wrapper."""

import json
import re
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn as nn

from methods.heads import DINOHead, IBOTHead
from methods.multicrop import MultiCropNetwork
from models import build_backbone
from models.vit import VisionTransformer, group_by_size
from tests.parity import Case
from tests.parity.constants import constants_of_norms


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
    yield from constants_of_norms(case.params, vit)
    depth = len(vit.blocks)
    for name in case.names("in/x_"):
        kind = name.removeprefix("in/x_")
        images = case.tensor(name)
        with torch.no_grad():
            computed = {
                f"out/cls_{kind}": lambda images=images: vit(images),
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


def ibot_head(case: Case) -> Iterator[tuple]:
    module = IBOTHead(**case.params).to(case.dtype)
    module.load_state_dict(case.state("state"))
    parameters = [[name, list(p.shape), p.requires_grad] for name, p in module.named_parameters()]
    yield "named_parameters", parameters, case.value("named_parameters")
    x = case.tensor("in/x3").requires_grad_()
    cls, patch = module.train()(x)
    ((case.tensor("in/w_cls") * cls).sum() + (case.tensor("in/w_patch") * patch).sum()).backward()
    yield "out/cls_train", cls, case.arrays["out/cls_train"]
    yield "out/patch_train", patch, case.arrays["out/patch_train"]
    yield "out/grad_x3", x.grad, case.arrays["out/grad_x3"]
    for name in case.names("out/grad/"):
        yield name, module.get_parameter(name.removeprefix("out/grad/")).grad, case.arrays[name]
    for name in case.names("out/buffer_after/"):
        yield name, module.get_buffer(name.removeprefix("out/buffer_after/")), case.arrays[name]
    cls, patch = module.eval()(x)
    yield "out/cls_eval", cls, case.arrays["out/cls_eval"]
    yield "out/patch_eval", patch, case.arrays["out/patch_eval"]
    yield "out/cls2d_eval", module(case.tensor("in/x2")), case.arrays["out/cls2d_eval"]


def ibot_multicrop(case: Case) -> Iterator[tuple]:
    p = case.params
    head_sizes = {key: p[key] for key in ("out_dim", "hidden_dim", "bottleneck_dim")}
    backbone = build_vit(p, masked_im_modeling=True)
    network = MultiCropNetwork(backbone, IBOTHead(p["dim"], **head_sizes)).to(case.dtype)
    network.load_state_dict(case.state("state"))
    crops, local_crops = ([case.tensor(name) for name in case.names(f"in/{kind}")] for kind in ("global", "local"))
    masks = torch.cat([case.tensor(name) for name in case.names("in/mask")])

    cls, patch = network.head(backbone.forward_features(torch.cat(crops), masks))
    yield "out/backbone_feat", backbone.forward_features(torch.cat(crops)), case.arrays["out/backbone_feat"]
    yield "out/cls", cls, case.arrays["out/cls"]
    yield "out/patch", patch, case.arrays["out/patch"]
    if local_crops:
        local_cls, local_patch = network.head(backbone.forward_features(torch.cat(local_crops)))
        yield "out/local_cls", local_cls, case.arrays["out/local_cls"]
        yield "out/local_patch", local_patch, case.arrays["out/local_patch"]

    masked = masks.flatten().nonzero().flatten()
    classes, patches = backbone.forward_masked(crops, local_crops, masks, masked)
    count = len(case.arrays["out/cls"])
    yield "out/cls, one pass for all crops", network.head(classes[:count]), case.arrays["out/cls"]
    if local_crops:
        yield "out/local_cls, one pass for all crops", network.head(classes[count:]), case.arrays["out/local_cls"]
    expected = case.tensor("out/patch").flatten(0, 1)[masked]
    yield "out/patch, masked positions", network.head.last_layer2(network.head.bottleneck(patches)), expected


def vit_masked(case: Case) -> Iterator[tuple]:
    vit = build_vit(case.params, masked_im_modeling=True).to(case.dtype)
    vit.load_state_dict(case.state("state"))
    yield from constants_of_norms(case.params, vit)
    for name in case.names("in/x_"):
        kind = name.removeprefix("in/x_")
        images, masks = case.tensor(name), case.tensor(f"in/mask_{kind}")
        vit.zero_grad()
        tokens = vit.forward_features(images, masks)
        (case.tensor(f"in/w_{kind}") * tokens).sum().backward()
        yield f"out/tokens_{kind}", tokens, case.arrays[f"out/tokens_{kind}"]
        yield f"out/grad_masked_embed_{kind}", vit.masked_embed.grad, case.arrays[f"out/grad_masked_embed_{kind}"]
        bias = vit.patch_embed.proj.bias.grad
        yield f"out/grad_patch_bias_{kind}", bias, case.arrays[f"out/grad_patch_bias_{kind}"]
        yield f"out/tokens_nomask_{kind}", vit.forward_features(images), case.arrays[f"out/tokens_nomask_{kind}"]
        inter = torch.stack(vit.get_intermediate_layers(images, len(case.arrays[f"out/inter_{kind}"])))
        yield f"out/inter_{kind}", inter, case.arrays[f"out/inter_{kind}"]
        yield f"out/attn_{kind}", vit.get_last_selfattention(images), case.arrays[f"out/attn_{kind}"]


def vit_tokens(case: Case) -> Iterator[tuple]:
    vit = build_vit(case.params).to(case.dtype)
    vit.load_state_dict(case.state("state"))
    yield from constants_of_norms(case.params, vit)
    for name in case.names("in/x_"):
        kind = name.removeprefix("in/x_")
        images = case.tensor(name)
        yield f"out/tokens_{kind}", vit.forward_features(images), case.arrays[f"out/tokens_{kind}"]
        yield f"out/cls_{kind}", vit(images), case.arrays[f"out/cls_{kind}"]
        inter = torch.stack(vit.get_intermediate_layers(images, len(case.arrays[f"out/inter_{kind}"])))
        yield f"out/inter_{kind}", inter, case.arrays[f"out/inter_{kind}"]


def attmask_init(case: Case) -> Iterator[tuple]:
    """The names of a published student are ours, and the crops, first the global ones, are of its two sizes."""
    p, (head, backbone) = case.params["model"], attmask_network(case)
    sizes: dict[str, list[list[int]]] = {}
    for name in case.names("step"):
        sizes.setdefault(name.partition("_crop")[0], []).append(list(case.arrays[name].shape[1:]))
    for step, shapes in sizes.items():
        large, small = ([3, p[kind], p[kind]] for kind in ("img", "local"))
        count = shapes.count(large)
        yield f"{step}_crop, shapes", shapes, [large] * count + [small] * (len(shapes) - count)
    ours = {f"{part}.{n}": t for part, m in (("backbone", backbone), ("head", head)) for n, t in m.state_dict().items()}
    found = {name: list(tensor.shape) for name, tensor in ours.items()}
    yield "names", found, {name: list(a.shape) for name, a in case.arrays.items() if not name.startswith("step")}


def shared_state_and_crops(case: Case) -> tuple[dict[str, torch.Tensor], Case]:
    """The student and the crops ``step<s>_crop<i>`` in the files that several cases have in common and name."""
    files = re.findall(r"[\w.-]+\.npz", json.dumps([case.entry["inputs"], case.params]))
    shared = Case(case.folder, case.method, case.entry | {"file": list(dict.fromkeys(files))})
    state = {name: shared.tensor(name) for name in shared.arrays if not name.startswith("step")}
    return state, shared


def attmask_network(case: Case) -> tuple[IBOTHead, VisionTransformer]:
    p = case.params["model"]
    sizes = {name: p[name] for name in ("out_dim", "patch_out_dim", "act", "nlayers", "shared_head", "norm_last_layer")}
    head = IBOTHead(p["dim"], hidden_dim=p["hidden"], bottleneck_dim=p["bottleneck"], **sizes)
    return head.to(case.dtype), build_vit(p, masked_im_modeling=True).to(case.dtype)


def attmask_forward(case: Case) -> Iterator[tuple]:
    head, backbone = attmask_network(case)
    state, shared = shared_state_and_crops(case)
    for module, prefix in ((head, "head."), (backbone, "backbone.")):
        module.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    said = case.params["images"]
    images, local = (shared.tensor(re.search(rf"(\w+) \({kind}\)", said)[1]) for kind in ("global", "local"))
    more = int(re.search(r"img ?\+ ?(\d+) ?\* ?patch", said)[1]) * backbone.patch_size
    wide = torch.cat([images] * (1 + -(-more // images.shape[3])), dim=3)[..., : images.shape[3] + more]
    masks = case.tensor("mask")

    tokens, attention = backbone.forward_features_with_attention(images)
    yield "tokens", tokens, case.arrays["tokens"]
    yield "tokens, without attention", backbone.forward_features(images), case.arrays["tokens"]
    yield "cls_attention", attention[..., backbone.num_prefix_tokens :].mean(dim=1), case.arrays["cls_attention"]
    for name, crop in (("last_attention", images), ("local_attention", local)):
        yield name, backbone.get_last_selfattention(crop[which_images(case, name)]), case.arrays[name]
    for index, block in enumerate(backbone.get_intermediate_layers(images, backbone.depth)):
        yield f"intermediate_{index}", block, case.arrays[f"intermediate_{index}"]
    yield "local_tokens", backbone.forward_features(local), case.arrays["local_tokens"]
    yield "nonsquare_tokens", backbone.forward_features(wide), case.arrays["nonsquare_tokens"]
    cls, patch = head(tokens)
    yield "head_cls", cls, case.arrays["head_cls"]
    yield "head_patch", patch, case.arrays["head_patch"]
    yield "local_head_cls", head(backbone(local)), case.arrays["local_head_cls"]
    yield "masked_tokens", backbone.forward_features(images, masks), case.arrays["masked_tokens"]
    # the attention of a masked image is asked of nobody but the case: blocks by hand
    x = backbone.prepare_tokens(images, masks)[which_images(case, "masked_attention")]
    rows, groups = x.flatten(0, 1), [x.shape[:2]]
    for block in backbone.blocks[:-1]:
        rows = block(rows, groups)
    last = backbone.blocks[-1]
    yield "masked_attention", last.attn.weights(last.norm1(rows), groups), case.arrays["masked_attention"]


def which_images(case: Case, name: str) -> slice:
    """``its last attention, second-to-last image only``"""
    places = {"second-to-last": slice(-2, -1), "first": slice(0, 1), "last": slice(-1, None)}
    said = re.search(rf"({'|'.join(places)}) image only", case.meaning(name))
    return places[said[1]] if said else slice(None)


RUNNERS = {
    "attmask/init": attmask_init,
    "attmask/forward": attmask_forward,
    "ibot/head_*": ibot_head,
    "ibot/multicrop_wrapper": ibot_multicrop,
    "ibot/vit_masked": vit_masked,
    "ibot/vit_layerscale": vit_tokens,
    "ibot/vit_meanpool": vit_tokens,
    "dino/vit_forward": vit_forward,
    "dino/vit_backward": vit_backward,
    "dino/vit_structure": vit_structure,
    "dino/head_*": head,
    "dino/multicrop_wrapper": multicrop_wrapper,
}
