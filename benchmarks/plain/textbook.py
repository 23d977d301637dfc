"""What the plain formulation of every method is made of: textbook networks, heads, losses, and an update."""

import torch
import torch.nn.functional as F

from methods.base import Clock, Method
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
    return network.norm(raw_tokens(network, images, draws, masks))


def raw_tokens(network: VisionTransformer, images: torch.Tensor, draws, masks=None) -> torch.Tensor:
    """Tokens as the last block leaves them (batch, tokens, dim)."""
    x = network.prepare_tokens(images, masks)
    for index, block in enumerate(network.blocks):
        for branch in (0, 1):
            y = attention(block, block.norm1(x)) if branch == 0 else block.mlp(block.norm2(x))
            if draws is not None and block.drop_path > 0:
                kept = torch.from_numpy(draws[index, branch] >= block.drop_path).to(y.device)[:, None, None]
                y = y / (1 - block.drop_path) * kept
            x = x + y
    return x


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


def cross_view_loss(
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


def move(centre: torch.Tensor, logits: torch.Tensor, momentum: float) -> None:
    centre.mul_(momentum).add_(logits.mean(dim=0, keepdim=True) * (1 - momentum))


def update(method: Method, optimizer: torch.optim.Optimizer, clip: float, clock: Clock) -> None:
    """Clipping, freezing, optimiser, EMA."""
    for parameter in method.student.parameters():
        if parameter.grad is not None and clip:
            factor = clip / (parameter.grad.norm() + 1e-6)
            if factor.item() < 1:
                parameter.grad.mul_(factor)
    method.after_backward(clock)
    optimizer.step()
    if not hasattr(method, "teacher"):  # none that follows
        return
    with torch.no_grad():
        students = dict(method.student.named_parameters())
        for name, teacher in method.teacher.named_parameters():
            teacher.mul_(clock.momentum).add_((1 - clock.momentum) * students[name])


def plain_optimizer(groups: list[dict]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=0.0, foreach=False, fused=False)
