"""UNIC as its algorithm is written: a small network for every teacher, token and block; statistics of all features put
together; which teachers an image keeps, image by image and teacher by teacher.
"""

import torch
import torch.nn.functional as F

from methods.base import Clock
from methods.unic import UNIC
from models.stochastic_depth import BatchDraws
from models.teacher_space import EPS
from models.vit import VisionTransformer
from plain import textbook

KINDS = ("cls", "patch")


def forward(method: UNIC, batch: dict, clock: Clock) -> torch.Tensor:
    (images,) = batch["crops"]
    student = method.student
    blocks = every_block(student.encoder, images, clock.batch_draws(student.encoder.depth, len(images)))
    parts = {"cls": [x[:, 0] for x in blocks], "patch": [x[:, student.encoder.num_prefix_tokens :] for x in blocks]}
    losses = []
    for teacher in method.teachers:
        with torch.no_grad():
            tokens = textbook.vit(teacher.network, images, None)
        targets = {"cls": tokens[:, 0], "patch": tokens[:, teacher.network.num_prefix_tokens :]}
        of_kinds = []
        for kind in KINDS:
            projectors = student.lp.heads[teacher.name][kind]
            y = sum(projector(parts[kind][int(block)]) for block, projector in projectors.items())
            z = standardised(method, teacher.name, kind, targets[kind].float(), clock.momentum)
            y = y.float()
            cosine = 1 - F.cosine_similarity(y, z, dim=-1)
            loss = method.weights[0] * cosine + method.weights[1] * F.smooth_l1_loss(y, z, reduction="none").mean(-1)
            of_kinds.append(loss if kind == "cls" else loss.mean(dim=1))
        losses.append((of_kinds[0] + of_kinds[1]) / 2)
    losses = torch.stack(losses)
    draws, kept = method.uniforms(clock, len(images)), torch.zeros_like(losses)
    for i in range(len(images)):
        hardest = losses[:, i].argmax()
        for t in range(len(losses)):
            if t == hardest or draws[t, i] >= method.t_drop_prob:
                kept[t, i] = 1.0
    return (losses * kept / kept.sum()).sum()


def every_block(network: VisionTransformer, images: torch.Tensor, draws: BatchDraws) -> list[torch.Tensor]:
    rates = torch.tensor([block.drop_path for block in network.blocks], dtype=torch.float64).numpy()
    kept, scales = draws.kept(rates)
    x, outputs = network.prepare_tokens(images), []
    for index, block in enumerate(network.blocks):
        for branch in (0, 1):
            y = textbook.attention(block, block.norm1(x)) if branch == 0 else block.mlp(block.norm2(x))
            if rates[index] > 0:
                y = y * scales[index] * torch.from_numpy(kept[index, branch]).to(y.device)[:, None, None]
            x = x + y
        outputs.append(x)
    return outputs


@torch.no_grad()
def standardised(method: UNIC, teacher: str, kind: str, features: torch.Tensor, momentum: float) -> torch.Tensor:
    statistics = method.standardisation
    at = statistics.slices.index((teacher, kind))
    mean, std = (vector.split(statistics.sizes)[at] for vector in (statistics.mean, statistics.std))
    target = (features - mean) / (std + EPS)
    together = torch.cat([features])  # of all processes
    rows = together.flatten(0, -2)
    mean.mul_(1 - momentum).add_(momentum * rows.mean(dim=0))
    std.mul_(1 - momentum).add_(momentum * (rows.std(dim=0) + EPS))
    return target
