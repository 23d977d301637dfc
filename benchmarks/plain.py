"""The plain formulation of a training step: what our fast path is measured against.

Textbook form, nothing clever: explicit softmax attention over all tokens in every block, every size of crops on its
own, dropped branches computed and multiplied by zero, heads on all tokens they are defined for, one log-softmax for
every pair of views, Python loops over parameters for clipping and EMA, AdamW one tensor at a time. It reads the same
modules as the fast path and must give the same loss.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from methods.base import Clock, Method
from methods.dino import DINO
from methods.masked_distillation import MaskedDistillation
from models.blocks import Block
from models.vit import VisionTransformer


def attention(block: Block, x: torch.Tensor) -> torch.Tensor:
    batch, tokens, dim = x.shape
    heads = block.attn.num_heads
    qkv = block.attn.qkv(x).reshape(batch, tokens, 3, heads, dim // heads).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)
    weights = ((q @ k.transpose(-2, -1)) * (dim // heads) ** -0.5).softmax(dim=-1)
    return block.attn.proj((weights @ v).transpose(1, 2).reshape(batch, tokens, dim))


def vit(network: VisionTransformer, images: torch.Tensor, draws, masks: torch.Tensor | None = None) -> torch.Tensor:
    """Normalised tokens (batch, tokens, dim); ``draws`` (depth, 2, batch) or None."""
    x = network.prepare_tokens(images, masks)
    for index, block in enumerate(network.blocks):
        for branch in (0, 1):
            y = attention(block, block.norm1(x)) if branch == 0 else block.mlp(block.norm2(x))
            if draws is not None and block.drop_path > 0:
                kept = torch.from_numpy(draws[index, branch] >= block.drop_path).to(y.device)[:, None, None]
                y = y / (1 - block.drop_path) * kept
            x = x + y
    return network.norm(x)


def backbone(network: VisionTransformer, crops: list[torch.Tensor], draws, masks=None) -> list[torch.Tensor]:
    """Tokens (crops * batch, tokens, dim) of every size of crops; ``masks`` are those of the first size."""
    outputs, first = [], 0
    sizes = [crop.shape[-1] for crop in crops]
    while first < len(crops):
        last = first
        while last < len(crops) and sizes[last] == sizes[first]:
            last += 1
        batch = crops[0].shape[0]
        part = None if draws is None else draws[..., first * batch : last * batch]
        outputs.append(vit(network, torch.cat(crops[first:last]), part, None if first else masks))
        first = last
    return outputs


def class_tokens(network: VisionTransformer, crops: list[torch.Tensor], draws) -> torch.Tensor:
    """(crops * batch, dim)."""
    return torch.cat([tokens[:, 0] for tokens in backbone(network, crops, draws)])


def head(module, x: torch.Tensor) -> torch.Tensor:
    return prototypes(module.last_layer, F.normalize(module.mlp(x), dim=-1))


def prototypes(layer, z: torch.Tensor) -> torch.Tensor:
    return F.linear(z, layer.weight_g * layer.weight_v / layer.weight_v.norm(dim=1, keepdim=True))


def dino_loss(
    student: torch.Tensor, teacher: torch.Tensor, centre: torch.Tensor, temps: tuple[float, float], views: int
) -> torch.Tensor:
    student_views = (student.float() / temps[0]).chunk(views)
    teacher_views = F.softmax((teacher.float() - centre) / temps[1], dim=-1).chunk(2)
    total, terms = 0.0, 0
    for i, target in enumerate(teacher_views):
        for v, prediction in enumerate(student_views):
            if i != v:
                total = total + torch.sum(-target * F.log_softmax(prediction, dim=-1), dim=-1).mean()
                terms += 1
    return total / terms


def dino_forward(method: DINO, batch: dict, clock: Clock) -> torch.Tensor:
    crops = batch["crops"]
    draws = clock.drop_path_draws(method.student.backbone.depth, len(crops), crops[0].shape[0])
    with torch.no_grad():
        teacher = head(method.teacher.head, class_tokens(method.teacher.backbone, crops[:2], None))
    student = head(method.student.head, class_tokens(method.student.backbone, crops, draws))
    temps = (method.student_temp, method.teacher_temps[clock.epoch])
    loss = dino_loss(student, teacher, method.centres.center, temps, len(crops))
    move(method.centres.center, teacher.float(), method.centres.momentum)
    return loss


def move(centre: torch.Tensor, logits: torch.Tensor, momentum: float) -> None:
    centre.mul_(momentum).add_(logits.mean(dim=0, keepdim=True) * (1 - momentum))


def masked_forward(method: MaskedDistillation, batch: dict, clock: Clock) -> torch.Tensor:
    crops, views = batch["crops"], method.teacher_views
    draws = clock.drop_path_draws(method.student.backbone.depth, len(crops), crops[0].shape[0])
    with torch.no_grad():
        (teacher,) = backbone(method.teacher.backbone, crops[:views], None)
        looked = method.teacher.backbone.get_last_selfattention(torch.cat(crops[:views]))[:, :, 0, 1:].mean(dim=1)
        masks, _ = method.choose_masks(batch, clock, looked if method.name == "attmask" else None)
    student = backbone(method.student.backbone, crops, draws, masks)
    return masked_heads_and_loss(method, teacher, student, masks.flatten(1), clock)


def masked_heads_and_loss(
    method: MaskedDistillation, teacher: torch.Tensor, student: list[torch.Tensor], masks: torch.Tensor, clock: Clock
) -> torch.Tensor:
    """Heads on every token, local crops too; one log-softmax over all patches and for every pair of class tokens."""

    def both(module, tokens):
        z = F.normalize(module.mlp(tokens), dim=-1)
        return prototypes(module.last_layer, z[:, 0]), prototypes(module.last_layer2, z[:, 1:])

    views, centres = method.teacher_views, method.centres
    with torch.no_grad():
        teacher_cls, teacher_patch = both(method.teacher.head, teacher)
    outputs = [both(method.student.head, tokens) for tokens in student]
    cls = torch.cat([classes for classes, _ in outputs])
    temps = (method.student_temp, method.teacher_temps[clock.epoch])
    loss = dino_loss(cls, teacher_cls, centres.center, temps, len(cls) // (len(teacher_cls) // views))
    targets = F.softmax((teacher_patch.float() - centres.center2) / method.teacher_patch_temps[clock.epoch], dim=-1)
    log_probs = F.log_softmax(outputs[0][1].float() / method.student_temp, dim=-1)
    per_patch = torch.sum(-targets * log_probs, dim=-1)
    patch = ((per_patch * masks).sum(dim=-1) / masks.sum(dim=-1).clamp(min=1)).mean()
    move(centres.center, teacher_cls.float(), centres.momentum)
    move(centres.center2, teacher_patch.float().mean(dim=1, keepdim=True), centres.momentum)
    return method.lambda1 * loss + method.lambda2 * patch


def update(method: Method, optimizer: torch.optim.Optimizer, clip: float, clock: Clock) -> None:
    """Clipping, freezing, optimiser, EMA."""
    for parameter in method.student.parameters():
        if parameter.grad is not None and clip:
            factor = clip / (parameter.grad.norm() + 1e-6)
            if factor.item() < 1:
                parameter.grad.mul_(factor)
    method.after_backward(clock)
    optimizer.step()
    with torch.no_grad():
        students = dict(method.student.named_parameters())
        for name, teacher in method.teacher.named_parameters():
            teacher.mul_(clock.momentum).add_((1 - clock.momentum) * students[name])


def plain_optimizer(groups: list[dict]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=0.0, foreach=False, fused=False)


FORWARD: dict[str, Callable] = {"dino": dino_forward, "ibot": masked_forward, "attmask": masked_forward}
