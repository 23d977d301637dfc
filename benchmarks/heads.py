"""Heads and loss of masked distillation by themselves, from given tokens: this repository's form against the plain one.

What a backbone would have given is random; the gradient goes back to these tokens and to the student's head.
"""

from collections.abc import Callable

import plain
import torch
import torch.nn.functional as F

from methods.base import Clock
from methods.masked_distillation import MaskedDistillation
from methods.masking import attention_mask


def random_tokens(method: MaskedDistillation, batch: dict, clock: Clock) -> dict[str, torch.Tensor]:
    """Tokens as the networks give them of ``batch``, and masks as the method draws them."""
    crops, views, patch = batch["crops"], method.teacher_views, method.student.backbone.patch_size
    size, dim = crops[0].shape[0], method.student.backbone.embed_dim

    def draw(images: int, side: int) -> torch.Tensor:
        return F.layer_norm(torch.randn(images, 1 + (side // patch) ** 2, dim, device=crops[0].device), (dim,))

    shown = [draw(views * size, crops[0].shape[-1]), draw((len(crops) - views) * size, crops[-1].shape[-1])]
    if method.name == "attmask":
        patches = shown[0].shape[1] - 1
        attention = torch.rand(views * size, patches, device=crops[0].device)
        masks, masked = attention_mask(attention, method.draw_hidden_ranks(clock, size, patches))
    else:
        masks, masked = torch.cat(batch["masks"]).flatten(1), batch["masked"]
    teacher = draw(views * size, crops[0].shape[-1])
    return {"teacher": teacher, "global": shown[0], "local": shown[1], "masks": masks, "masked": masked}


def plain_part(method: MaskedDistillation, tokens: dict[str, torch.Tensor], clock: Clock) -> torch.Tensor:
    student = [tokens["global"], tokens["local"]]
    return plain.masked_heads_and_loss(method, tokens["teacher"], student, tokens["masks"], clock)


def fast_part(method: MaskedDistillation, tokens: dict[str, torch.Tensor], clock: Clock) -> torch.Tensor:
    probs, patch_probs = method.teacher_targets(tokens["teacher"], tokens["masked"], clock)
    patches = tokens["global"][:, 1:].flatten(0, 1).index_select(0, tokens["masked"])
    rows = torch.cat((tokens["global"][:, 0], tokens["local"][:, 0], patches))
    z, z_patches = method.student.head.bottleneck(rows).split([len(rows) - len(patches), len(patches)])
    return method.losses(z, z_patches, probs, patch_probs, tokens["masks"], tokens["masked"])["loss"]


PARTS: dict[str, Callable] = {"plain": plain_part, "fast": fast_part}


def run(side: str, method: MaskedDistillation, tokens: dict[str, torch.Tensor], clock: Clock) -> float:
    """Forward and backward once; the loss."""
    for name in ("global", "local"):
        tokens[name] = tokens[name].detach().requires_grad_()
    method.zero_grad(set_to_none=True)
    loss = PARTS[side](method, tokens, clock)
    loss.backward()
    return loss.item()
