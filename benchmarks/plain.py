"""The plain formulation of a training step: what our fast path is measured against.

Textbook form, nothing clever: explicit softmax attention over all tokens in every block, every size of crops on its
own, dropped branches computed and multiplied by zero, heads on all tokens they are defined for, one log-softmax for
every pair of views, Python loops over parameters for clipping and EMA, AdamW one tensor at a time. It reads the same
modules as the fast path and must give the same loss.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from methods.base import Clock
from methods.dino import DINO
from models.blocks import Block
from models.vit import VisionTransformer
from training.optim import set_schedules


def attention(block: Block, x: torch.Tensor) -> torch.Tensor:
    batch, tokens, dim = x.shape
    heads = block.attn.num_heads
    qkv = block.attn.qkv(x).reshape(batch, tokens, 3, heads, dim // heads).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)
    weights = ((q @ k.transpose(-2, -1)) * (dim // heads) ** -0.5).softmax(dim=-1)
    return block.attn.proj((weights @ v).transpose(1, 2).reshape(batch, tokens, dim))


def vit(network: VisionTransformer, images: torch.Tensor, draws) -> torch.Tensor:
    """Class token (batch, dim); ``draws`` (depth, 2, batch) or None."""
    x = network.prepare_tokens(images)
    for index, block in enumerate(network.blocks):
        for branch in (0, 1):
            y = attention(block, block.norm1(x)) if branch == 0 else block.mlp(block.norm2(x))
            if draws is not None and block.drop_path > 0:
                kept = torch.from_numpy(draws[index, branch] >= block.drop_path).to(y.device)[:, None, None]
                y = y / (1 - block.drop_path) * kept
            x = x + y
    return network.norm(x)[:, 0]


def backbone(network: VisionTransformer, crops: list[torch.Tensor], draws) -> torch.Tensor:
    """(crops * batch, dim), one pass for every size."""
    outputs, first = [], 0
    sizes = [crop.shape[-1] for crop in crops]
    while first < len(crops):
        last = first
        while last < len(crops) and sizes[last] == sizes[first]:
            last += 1
        batch = crops[0].shape[0]
        part = None if draws is None else draws[..., first * batch : last * batch]
        outputs.append(vit(network, torch.cat(crops[first:last]), part))
        first = last
    return torch.cat(outputs)


def head(module, x: torch.Tensor) -> torch.Tensor:
    z = F.normalize(module.mlp(x), dim=-1)
    v = module.last_layer.weight_v
    return F.linear(z, module.last_layer.weight_g * v / v.norm(dim=1, keepdim=True))


def dino_loss(
    student: torch.Tensor, teacher: torch.Tensor, centre: torch.Tensor, temps: tuple[float, float], views: int
):
    student_views = (student.float() / temps[0]).chunk(views)
    teacher_views = F.softmax((teacher.float() - centre) / temps[1], dim=-1).chunk(2)
    total, terms = 0.0, 0
    for i, target in enumerate(teacher_views):
        for v, prediction in enumerate(student_views):
            if i != v:
                total = total + torch.sum(-target * F.log_softmax(prediction, dim=-1), dim=-1).mean()
                terms += 1
    return total / terms


def dino_forward(method: DINO, crops: list[torch.Tensor], clock: Clock) -> torch.Tensor:
    depth = len(method.student.backbone.blocks)
    draws = clock.drop_path_draws(depth, len(crops), crops[0].shape[0])
    with torch.no_grad():
        teacher = head(method.teacher.head, backbone(method.teacher.backbone, crops[:2], None))
    student = head(method.student.head, backbone(method.student.backbone, crops, draws))
    temps = (method.student_temp, method.teacher_temps[clock.epoch])
    loss = dino_loss(student, teacher, method.centre.center, temps, len(crops))
    mean = teacher.float().mean(dim=0, keepdim=True)
    method.centre.center.mul_(method.centre.momentum).add_(mean * (1 - method.centre.momentum))
    return loss


def update(method: DINO, optimizer: torch.optim.Optimizer, clip: float, clock: Clock) -> None:
    """Clipping, freezing, optimiser, EMA."""
    for parameter in method.student.parameters():
        if parameter.grad is not None and clip:
            factor = clip / (parameter.grad.norm() + 1e-6)
            if factor.item() < 1:
                parameter.grad.mul_(factor)
    method.after_backward(clock)
    optimizer.step()
    with torch.no_grad():
        for teacher, student in zip(method.teacher.parameters(), method.student.parameters(), strict=True):
            teacher.mul_(clock.momentum).add_((1 - clock.momentum) * student)


def plain_optimizer(groups: list[dict]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=0.0, foreach=False, fused=False)


FORWARD: dict[str, Callable] = {"dino": dino_forward}

__all__ = ["FORWARD", "plain_optimizer", "set_schedules", "update"]
