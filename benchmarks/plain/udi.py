"""UDI: dense sampling maps, logits of every place, means of logits, a log-softmax for every pair."""

import torch
import torch.nn.functional as F

from methods.base import Clock
from methods.udi import UDI
from plain import textbook


def forward(method: UDI, batch: dict, clock: Clock) -> torch.Tensor:
    """The teacher twice, for the places of global and of local crops, as the original has it."""
    crops, size = batch["crops"], len(batch["crops"][0])
    student, teacher = method.student.backbone.backbone, method.teacher.backbone.backbone
    draws = clock.drop_path_draws(student.depth, len(crops), size)
    with torch.no_grad():
        views = torch.cat((crops[1], crops[0]))
        t_tokens = textbook.raw_tokens(teacher, views, None)
        textbook.raw_tokens(teacher, views, None)
    s_tokens = textbook.raw_tokens(student, torch.cat(crops[:2]), draws[..., : 2 * size])
    l_tokens = textbook.raw_tokens(student, torch.cat(crops[2:]), draws[..., 2 * size :])
    return heads_and_loss(method, t_tokens, s_tokens, l_tokens, batch, clock)


def sampled(backbone, patches: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
    """Vectors of all places (rows, places, dim), valid or not, from maps (rows, places, patches)."""
    y, attn = backbone.norm1(patches), backbone.attn
    q, k, v = (x.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for x in attn.qkv(y).chunk(3, dim=-1))
    weights = ((maps[:, None].to(q.dtype) @ q) @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)
    return attn.norm(attn.proj((weights @ v).transpose(1, 2).flatten(2)) + maps.to(y.dtype) @ y)


def dense(index: torch.Tensor, weight: torch.Tensor, patches: int) -> torch.Tensor:
    maps = torch.zeros(*index.shape[:-1], patches, device=index.device)
    return maps.scatter_add_(-1, index, weight).transpose(0, 1).flatten(0, 1)


def heads_and_loss(method: UDI, t_tokens, s_tokens, l_tokens, batch: dict, clock: Clock) -> torch.Tensor:
    """Sampling with dense maps, logits of every place, masked means of logits, a log-softmax for every pair."""
    student, teacher, alpha = method.student, method.teacher, method.alpha
    patches, crops = s_tokens.shape[1] - 2, batch["local_index"].shape[1]
    centre, temp = method.centres.center, method.teacher_temps[clock.epoch]

    def classes(network, tokens, level):
        return textbook.head(network.head[0], network.backbone.backbone.norm(tokens)[:, level])

    def entropy(logits, level, prediction):
        probs = F.softmax((logits.float() - centre[level]) / temp, dim=-1)
        return torch.sum(-probs * F.log_softmax(prediction.float() / method.student_temp, dim=-1), dim=-1)

    with torch.no_grad():
        t_cls = classes(teacher, t_tokens, 0)
        maps = [dense(batch["target_index"], batch["target_weight"], patches)]
        for n in range(crops):
            maps.append(dense(batch["local_index"][:, n], batch["local_weight"][:, n], patches))
        places = [textbook.head(teacher.head[0], sampled(teacher.backbone, t_tokens[:, 2:], m)) for m in maps]
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
    prediction = textbook.head(student.head[0], sampled(student.backbone, s_tokens[:, 2:], source))
    total = total + (entropy(places[0], 2, prediction) * valid).sum() / valid.sum()
    mean = sum((w * t).sum((0, 1)) for w, t in zip(sums, places, strict=True)) / sum(w.sum() for w in sums)
    rows = torch.stack((t_cls.mean(0), torch.cat(blends).mean(0), mean)).float()
    centre.mul_(0.9).add_(0.1 * rows)
    return total / 3
