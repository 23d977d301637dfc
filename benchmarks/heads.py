"""Heads and loss of a method by themselves, from given tokens: this repository's form against the plain one.

What a backbone would have given is random; the gradient goes back to these tokens and to the student's head.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from plain import esvit, masked_distillation, mugs, udi

from methods.base import Clock
from methods.esvit import TEACHER_VIEWS, EsViT
from methods.masked_distillation import MaskedDistillation
from methods.masking import attention_mask
from methods.mugs import Mugs
from methods.udi import UDI, teacher_places
from models.blocks import pack

Tokens = dict[str, torch.Tensor]


def draw(images: int, tokens: int, dim: int, device: torch.device) -> torch.Tensor:
    return F.layer_norm(torch.randn(images, tokens, dim, device=device), (dim,))


def random_tokens(method: MaskedDistillation | UDI | EsViT | Mugs, batch: dict, clock: Clock) -> Tokens:
    """Tokens as the networks give them of ``batch``, and what the method draws besides."""
    if method.name == "esvit":
        return random_regions(method, batch)
    crops, device = batch["crops"], batch["crops"][0].device
    network = method.student.backbone.backbone if method.name == "udi" else method.student.backbone
    sides = [crop.shape[-1] // network.patch_size for crop in (crops[0], crops[-1])]
    counts = [network.num_prefix_tokens + side**2 for side in sides]
    size, views, dim = len(crops[0]), 2, network.embed_dim
    shown = len(crops) - views if method.name == "mugs" else len(crops)  # to the student
    tokens = {
        "teacher": draw(views * size, counts[0], dim, device),
        "global": draw(views * size, counts[0], dim, device),
        "local": draw((shown - views) * size, counts[1], dim, device),
    }
    if method.name in ("udi", "mugs"):
        return tokens | {name: value for name, value in batch.items() if name != "crops"}
    if method.name == "attmask":
        attention = torch.rand(views * size, counts[0] - 1, device=device)
        masks, masked = attention_mask(attention, method.draw_hidden_ranks(clock, size, counts[0] - 1))
    else:
        masks, masked = torch.cat(batch["masks"]).flatten(1), batch["masked"]
    return tokens | {"masks": masks, "masked": masked}


def random_regions(method: EsViT, batch: dict) -> Tokens:
    """Tokens of the teacher's views, and of all crops; those of one image are as alike as those of two."""
    crops, device, network = batch["crops"], batch["crops"][0].device, method.student.backbone
    unit = network.mask_unit
    counts = [(-(-crop.shape[-1] // unit)) ** 2 for crop in (crops[0], crops[-1])]
    size, dim = len(crops[0]), network.embed_dim
    return {
        "teacher": draw(TEACHER_VIEWS * size, counts[0], dim, device),
        "global": draw(TEACHER_VIEWS * size, counts[0], dim, device),
        "local": draw((len(crops) - TEACHER_VIEWS) * size, counts[1], dim, device),
    }


def describe(tokens: Tokens) -> str:
    """How many rows there are besides those of whole crops."""
    if "masked" in tokens:
        return f"{len(tokens['masked'])} hidden patches"
    if "points" in tokens:
        return f"{len(tokens['points'])} places"
    if "weak" in tokens:
        return f"{len(tokens['weak'])} images"
    return f"{sum(tokens[name].shape[:2].numel() for name in ('global', 'local'))} regions"


def both_sides(tokens: Tokens) -> tuple:
    """Of a student and of a teacher: vectors of crops, tokens of every size of them."""
    sides = [tokens["global"], tokens["local"]], [tokens["teacher"]]
    return tuple((torch.cat([part.mean(dim=1) for part in side]), side) for side in sides)


def plain_regions(method: EsViT, tokens: Tokens, clock: Clock) -> torch.Tensor:
    return esvit.heads_and_loss(method, *both_sides(tokens), clock)


def fast_regions(method: EsViT, tokens: Tokens, clock: Clock) -> torch.Tensor:
    return method.losses(*both_sides(tokens), clock)["loss"]


def plain_masked(method: MaskedDistillation, tokens: Tokens, clock: Clock) -> torch.Tensor:
    student = [tokens["global"], tokens["local"]]
    return masked_distillation.heads_and_loss(method, tokens["teacher"], student, tokens["masks"], clock)


def fast_masked(method: MaskedDistillation, tokens: Tokens, clock: Clock) -> torch.Tensor:
    probs, patch_probs = method.teacher_targets(tokens["teacher"], tokens["masked"], clock)
    patches = tokens["global"][:, 1:].flatten(0, 1).index_select(0, tokens["masked"])
    rows = torch.cat((tokens["global"][:, 0], tokens["local"][:, 0], patches))
    z, z_patches = method.student.head.bottleneck(rows).split([len(rows) - len(patches), len(patches)])
    return method.losses(z, z_patches, probs, patch_probs, tokens["masks"], tokens["masked"])["loss"]


def plain_udi(method: UDI, tokens: Tokens, clock: Clock) -> torch.Tensor:
    given = (tokens[name] for name in ("teacher", "global", "local"))
    return udi.heads_and_loss(method, *given, tokens, clock)


def fast_udi(method: UDI, tokens: Tokens, clock: Clock) -> torch.Tensor:
    with torch.no_grad():
        head, backbone = method.teacher.head[0], method.teacher.backbone
        index, weight, points = teacher_places(tokens)
        z_cls = head.bottleneck(backbone.backbone.norm(tokens["teacher"][:, 0]))
        z_points = head.bottleneck(backbone.sample(tokens["teacher"][:, 2:], index, weight, points))
        weights = weight.double().sum(dim=2).flatten().index_select(0, points)
        targets = method.targets_of(z_cls, z_points, weights, tokens, clock)
    norm = method.student.backbone.backbone.norm
    classes = norm(torch.cat((tokens["global"][:, :2], tokens["local"][:, :2])))
    vectors = method.bottleneck_vectors(classes, tokens["global"][:, 2:], tokens)
    crops = len(tokens["local"]) // (len(tokens["global"]) // 2)
    return method.losses(vectors, targets, crops)["loss"]


def plain_mugs(method: Mugs, tokens: Tokens, clock: Clock) -> torch.Tensor:
    student = [tokens["global"], tokens["local"]]
    return mugs.heads_and_loss(method, [tokens["teacher"]], student, tokens["weak"], clock)


def fast_mugs(method: Mugs, tokens: Tokens, clock: Clock) -> torch.Tensor:
    """With what is written afterwards, as the plain form has it."""

    def views(side: str, *groups: torch.Tensor):
        backbone, memory = getattr(method, side).backbone, method.memories[side]
        return backbone.views_of(*pack(groups), len(tokens["weak"]), memory, method.top_n)

    with torch.no_grad():
        teacher = views("teacher", tokens["teacher"])
    student = views("student", tokens["global"], tokens["local"])
    loss = method.losses(student, teacher, clock)["loss"]
    method.remember(student, teacher, tokens, clock)
    method.write(clock, None)
    method.centres.commit(None)
    return loss


MASKED = {"plain": plain_masked, "fast": fast_masked}
PARTS: dict[str, dict[str, Callable]] = {
    "ibot": MASKED,
    "attmask": MASKED,
    "udi": {"plain": plain_udi, "fast": fast_udi},
    "esvit": {"plain": plain_regions, "fast": fast_regions},
    "mugs": {"plain": plain_mugs, "fast": fast_mugs},
}


def run(side: str, method: MaskedDistillation | UDI | EsViT | Mugs, tokens: Tokens, clock: Clock) -> float:
    """Forward and backward once; the loss."""
    for name in ("global", "local"):
        tokens[name] = tokens[name].detach().requires_grad_()
    method.zero_grad(set_to_none=True)
    loss = PARTS[method.name][side](method, tokens, clock)
    loss.backward()
    return loss.item()
