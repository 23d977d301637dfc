"""Mugs as its algorithm is written: one backbone pass for every size of crops, the whole memory normalised in each; for
every pair of views and each contrastive loss a product with the queue, a copy of it, and concatenated logits; for every
pair of views a log-softmax over prototypes.
"""

import torch
import torch.nn.functional as F

from methods.base import Clock
from methods.memory import Memory, Queue
from methods.mugs import INSTANCE, LOCAL_GROUP, Mugs
from plain import textbook


def forward(method: Mugs, batch: dict, clock: Clock) -> torch.Tensor:
    crops, student, teacher = batch["crops"], method.student.backbone, method.teacher.backbone
    for crop, (positions, values) in zip(crops, batch["erased"], strict=True):
        crop.view(-1)[positions] = values
    draws = clock.drop_path_draws(student.depth, len(crops) - 2, len(crops[0]))
    globals_ = 2 * len(crops[0])
    with torch.no_grad():
        t_tokens = [textbook.raw_tokens(teacher, torch.cat(crops[:2]), None)]
    s_tokens = [textbook.raw_tokens(student, torch.cat(crops[2:4]), draws[..., :globals_])]
    if crops[4:]:
        s_tokens.append(textbook.raw_tokens(student, torch.cat(crops[4:]), draws[..., globals_:]))
    return heads_and_loss(method, t_tokens, s_tokens, batch["weak"], clock)


def heads_and_loss(method: Mugs, t_tokens: list, s_tokens: list, weak: torch.Tensor, clock: Clock) -> torch.Tensor:
    """Retrieval, relation block, heads and losses from the tokens of every size, and what is written afterwards."""
    student, teacher, memories = method.student, method.teacher, method.memories
    views = sum(map(len, s_tokens)) // (len(t_tokens[0]) // 2)
    with torch.no_grad():
        t_cls, t_relation, t_patches = features(teacher.backbone, t_tokens, memories["teacher"], method.top_n)
    s_cls, s_relation, s_patches = features(student.backbone, s_tokens, memories["student"], method.top_n)
    losses = []
    for name, head, ours, theirs in (
        (INSTANCE, "instance_head", s_cls, t_cls),
        (LOCAL_GROUP, "local_group_head", s_relation, t_relation),
    ):
        with torch.no_grad():
            keys = getattr(teacher, head)(theirs).chunk(2)
        z = getattr(student, head)(ours).chunk(views)
        queue = method.queues[name.rstrip(".")]
        losses.append(pairwise(z, keys, lambda z, y, q=queue, t=method.contrast_temps[name]: contrast(z, y, q, t)))
        for key in keys:
            columns = (queue.queue_ptr + torch.arange(len(key), device=key.device)) % queue.queue.shape[1]
            queue.queue[:, columns] = key.t()
            queue.queue_ptr.copy_((queue.queue_ptr + len(key)) % queue.queue.shape[1])
    with torch.no_grad():
        logits = textbook.head(teacher.group_head, t_cls)
        targets = F.softmax((logits.float() - method.centres.center) / method.teacher_temps[clock.epoch], dim=-1)
    predictions = (textbook.head(student.group_head, s_cls).float() / method.student_temp).chunk(views)

    def entropy(s, q):
        return torch.sum(-q * F.log_softmax(s, dim=-1), dim=-1).mean()

    losses.append(pairwise(predictions, targets.chunk(2), entropy))
    textbook.move(method.centres.center, logits.float(), method.centres.momentum)
    with torch.no_grad():
        write(memories["student"], s_patches[: len(weak)][weak])
        write(memories["teacher"], t_patches[: len(weak)])
    return sum(losses) / sum(method.weights.values())


def features(backbone, tokens: list[torch.Tensor], memory: Memory, k: int) -> tuple[torch.Tensor, ...]:
    """Class tokens, relations, and mean patches of the first size, of tokens (samples, tokens, dim) of every size."""
    classes, relations, patches = [], [], None
    for x in tokens:
        query = x.mean(dim=1)
        with torch.no_grad():
            similarity = F.normalize(query.float(), dim=1) @ F.normalize(memory.queue_q, dim=1).t()
            rows = memory.queue_k[similarity.topk(k, dim=1).indices]
        together = torch.cat((query[:, None], rows.to(query.dtype)), dim=1)
        for block in backbone.relation_blocks:
            together = together + textbook.attention(block, block.norm1(together))
            together = together + block.mlp(block.norm2(together))
        relations.append(backbone.norm(together)[:, 0])
        normed = backbone.norm(x)
        classes.append(normed[:, 0])
        patches = normed[:, 1:].detach().mean(dim=1) if patches is None else patches
    return torch.cat(classes), torch.cat(relations), patches


def contrast(z: torch.Tensor, y: torch.Tensor, queue: Queue, temperature: float) -> torch.Tensor:
    with torch.autocast(z.device.type, enabled=False):
        positive = torch.einsum("nc,nc->n", z, y)[:, None]
        negative = torch.einsum("nc,ck->nk", z, queue.queue.clone().detach())
        logits = torch.cat((positive, negative), dim=1) / temperature
        return F.cross_entropy(logits, torch.zeros(len(z), dtype=torch.int64, device=z.device))


def pairwise(views, targets, loss) -> torch.Tensor:
    large = [loss(views[v], targets[i]) for i in (0, 1) for v in (0, 1) if v != i]
    small = [loss(views[v], targets[i]) for i in (0, 1) for v in range(2, len(views))]
    large = sum(large) / len(large)
    return (large + sum(small) / len(small)) / 2 if small else large


def write(memory: Memory, rows: torch.Tensor) -> None:
    """A place for every row, as the pointer of the original goes."""
    size, pointer = len(memory.queue_q), int(memory.queue_ptr)
    places = (pointer + torch.arange(len(rows), device=rows.device)) % size
    memory.queue_q[places] = rows
    memory.queue_k[places] = rows
    end = pointer + len(rows)
    memory.queue_ptr[0] = (end + len(rows)) % size if end <= size else end - size
