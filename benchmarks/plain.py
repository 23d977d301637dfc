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
from methods.udi import UDI
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


def udi_forward(method: UDI, batch: dict, clock: Clock) -> torch.Tensor:
    """The teacher twice, for the places of global and of local crops, as the original has it."""
    crops, size = batch["crops"], len(batch["crops"][0])
    student, teacher = method.student.backbone.backbone, method.teacher.backbone.backbone
    draws = clock.drop_path_draws(student.depth, len(crops), size)
    with torch.no_grad():
        views = torch.cat((crops[1], crops[0]))
        t_tokens = raw_tokens(teacher, views, None)
        raw_tokens(teacher, views, None)
    s_tokens = raw_tokens(student, torch.cat(crops[:2]), draws[..., : 2 * size])
    l_tokens = raw_tokens(student, torch.cat(crops[2:]), draws[..., 2 * size :])
    return udi_heads_and_loss(method, t_tokens, s_tokens, l_tokens, batch, clock)


def sampled(backbone, patches: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
    """Vectors of all places (rows, places, dim), valid or not, from maps (rows, places, patches)."""
    y, attn = backbone.norm1(patches), backbone.attn
    q, k, v = (x.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for x in attn.qkv(y).chunk(3, dim=-1))
    weights = ((maps[:, None].to(q.dtype) @ q) @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)
    return attn.norm(attn.proj((weights @ v).transpose(1, 2).flatten(2)) + maps.to(y.dtype) @ y)


def dense(index: torch.Tensor, weight: torch.Tensor, patches: int) -> torch.Tensor:
    maps = torch.zeros(*index.shape[:-1], patches, device=index.device)
    return maps.scatter_add_(-1, index, weight).transpose(0, 1).flatten(0, 1)


def udi_heads_and_loss(method: UDI, t_tokens, s_tokens, l_tokens, batch: dict, clock: Clock) -> torch.Tensor:
    """Sampling with dense maps, logits of every place, masked means of logits, a log-softmax for every pair."""
    student, teacher, alpha = method.student, method.teacher, method.alpha
    patches, crops = s_tokens.shape[1] - 2, batch["local_index"].shape[1]
    centre, temp = method.centres.center, method.teacher_temps[clock.epoch]

    def classes(network, tokens, level):
        return head(network.head[0], network.backbone.backbone.norm(tokens)[:, level])

    def entropy(logits, level, prediction):
        probs = F.softmax((logits.float() - centre[level]) / temp, dim=-1)
        return torch.sum(-probs * F.log_softmax(prediction.float() / method.student_temp, dim=-1), dim=-1)

    with torch.no_grad():
        t_cls = classes(teacher, t_tokens, 0)
        maps = [dense(batch["target_index"], batch["target_weight"], patches)]
        for n in range(crops):
            maps.append(dense(batch["local_index"][:, n], batch["local_weight"][:, n], patches))
        places = [head(teacher.head[0], sampled(teacher.backbone, t_tokens[:, 2:], m)) for m in maps]
        sums = [m.sum(-1, keepdim=True) for m in maps]
        means = [(w * t).sum(1) / (w.sum(1) + 1e-5) for w, t in zip(sums, places, strict=True)]
        blends = [alpha * mean + (1 - alpha) * t_cls for mean in means]
    total = 0.0
    for level, targets in enumerate(([t_cls] * (1 + crops), blends)):
        whole = entropy(targets[0], level, classes(student, s_tokens, level)).mean()
        local = classes(student, l_tokens, level).chunk(crops)
        pairs = [entropy(targets[1 + n], level, torch.cat((local[n], local[n]))).mean() for n in range(crops)]
        total = total + (whole + sum(pairs)) / (1 + crops)
    source = F.one_hot(batch["source"].transpose(0, 1).flatten(0, 1), patches).float()
    valid = torch.arange(source.shape[1], device=source.device) < batch["valid"].T.flatten()[:, None]
    prediction = head(student.head[0], sampled(student.backbone, s_tokens[:, 2:], source))
    total = total + (entropy(places[0], 2, prediction) * valid).sum() / valid.sum()
    mean = sum((w * t).sum((0, 1)) for w, t in zip(sums, places, strict=True)) / sum(w.sum() for w in sums)
    rows = torch.stack((t_cls.mean(0), torch.cat(blends).mean(0), mean)).float()
    centre.mul_(0.9).add_(0.1 * rows)
    return total / 3


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


FORWARD: dict[str, Callable] = {
    "dino": dino_forward,
    "ibot": masked_forward,
    "attmask": masked_forward,
    "udi": udi_forward,
}
