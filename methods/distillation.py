"""The cross-entropy between teacher distributions and student views that every clustering method shares.

With s = z W^T / temperature the student's logits and p_i the teacher's distributions, the textbook loss is

    for every teacher view i, every student view v != i:  mean over the batch of  - sum_k p_i[k] log_softmax(s_v)[k]

It is linear in the teacher: with Q_v the sum of the p_i paired with view v and k_v their number, the sum over pairs is

    sum_v  k_v * logsumexp(s_v) - <Q_v, s_v>

so one pass per student view is enough and no log-probability is stored. Everything is computed in float32 or better.
"""

from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

CHUNK_ELEMENTS = 2**24  # logits held at a time: 64 MiB of float32
# exact in every format. fp16: gradients of the logits (1 / 65536 and more) stay among its normal numbers, and their
# product with the vectors of FP16_ROWS rows below its largest, were all of these alike
HEADROOM, FP16_ROWS = 2.0**3, 1024


def teacher_probabilities(logits: torch.Tensor, centre: torch.Tensor, temperature: float) -> torch.Tensor:
    """softmax((logits - centre) / temperature) over the last axis, float32 or better."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.softmax((logits - centre) / temperature, dim=-1)


def mean_logits(layer: nn.Module, z: torch.Tensor) -> torch.Tensor:
    """Mean over tokens of a linear layer's output, (batch, tokens, dim) -> (batch, prototypes), float32 or better."""
    accurate = torch.float64 if z.dtype == torch.float64 else torch.float32
    with torch.autocast(z.device.type, enabled=False):
        return layer(z.mean(dim=1, dtype=accurate))


def cross_view_targets(probs: torch.Tensor, num_views: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What every student row is compared with, when a view is not compared with itself.

    Shapes     probs (teacher views, batch, prototypes); student rows are views-major: (num_views * batch)
    Returns    targets (sources, prototypes): distinct sums Q_v, one block of ``batch`` rows each;
               rows (num_views * batch,): the target of every student row; mass (num_views * batch,): k_v
    """
    teacher_views, batch, _ = probs.shape
    total = probs.sum(dim=0)
    blocks = [total - own for own in probs]  # the teacher's own views skip themselves
    if num_views > teacher_views:
        blocks.append(total)
    view = torch.arange(num_views, device=probs.device)[:, None]
    rows = view.clamp(max=teacher_views) * batch + torch.arange(batch, device=probs.device)
    mass = (teacher_views - 1) + (view >= teacher_views).to(probs.dtype)
    return torch.cat(blocks), rows.flatten(), mass.expand(-1, batch).flatten()


class Targets(NamedTuple):
    """What consecutive student rows are compared with.

    Shapes     probs (sources, prototypes), no gradient; source (rows,) int64, the one of every row, or (rows, terms),
               those that are added up; mass (rows,), the sum of every row's target; row_weight (rows,) or a number;
               share, of the group in the sum
    """

    probs: torch.Tensor
    source: torch.Tensor
    mass: torch.Tensor
    row_weight: torch.Tensor | float
    share: float = 1.0


def prototype_cross_entropy(
    z: torch.Tensor, weight: torch.Tensor, targets: list[Targets], temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """What every group of rows loses, and the sum of these, each times its share:

    sum_r row_weight_r * (mass_r * logsumexp(s_r) - <probs[source_r], s_r>),  s = z weight^T / temperature

    where probs[source_r] is a sum of several rows if source_r is several numbers: the row's logits are formed once.

    Shapes     z (rows, dim), the rows of the first group first; weight (prototypes, dim)
    Returns    the sum, and the groups' losses (groups,) without a gradient; nats, float32 or better
    Exactness  equals ``soft_cross_entropy`` of the materialised logits up to rounding, gradients included; at most
               ``CHUNK_ELEMENTS`` logits exist at a time and none are kept for the backward pass. All groups share one
               gradient of the prototypes, which is as large as they are
    """
    # a number is multiplied in on the device: a tensor of it made here would be a copy that the host waits for
    groups = [group._replace(row_weight=torch.ones_like(group.mass) * group.row_weight) for group in targets]
    return _PrototypeCrossEntropy.apply(z, weight, groups, temperature)


def cross_view_loss(z: torch.Tensor, weight: torch.Tensor, probs: torch.Tensor, temperature: float) -> torch.Tensor:
    """Mean cross-entropy over every pair of a teacher view with another student view, and over the batch.

    Shapes     z (views * batch, dim) student vectors, views-major, the teacher's views first; weight (prototypes, dim);
               probs (teacher views, batch, prototypes)
    Returns    a scalar in nats
    Source     DINO (2104.14294), eq. 3 and algorithm 1; parity: division by pairs, not by views
    """
    teacher_views, batch, _ = probs.shape
    num_views = z.shape[0] // batch
    pairs = teacher_views * (num_views - 1)
    targets, rows, mass = cross_view_targets(probs, num_views)
    return prototype_cross_entropy(z, weight, [Targets(targets, rows, mass, 1.0 / (pairs * batch))], temperature)[0]


def mixed_view_loss(
    z: torch.Tensor, weight: torch.Tensor, probs: torch.Tensor, mixes: torch.Tensor, temperature: float
) -> torch.Tensor:
    """``cross_view_loss`` of student views whose images are mixed with each other.

    Shapes     as there, and mixes (views, batch, batch): how much of every image there is in each of a view's
    Returns    a scalar in nats
    Source     EsViT main_esvit.py, DINOLoss: of a mixed image every part is compared with what it came from
    """
    teacher_views, batch, _ = probs.shape
    views = len(mixes)
    pairs = teacher_views * (views - 1)
    targets, rows, mass = cross_view_targets(probs, views)
    blocks, block = targets.unflatten(0, (-1, batch)), rows[::batch].div(batch, rounding_mode="floor")
    with torch.autocast(z.device.type, enabled=False):
        mixed = torch.bmm(mixes.to(probs.dtype), blocks.index_select(0, block)).flatten(0, 1)
    mass = mass * mixes.sum(dim=2).flatten()
    own = Targets(mixed, torch.arange(len(z), device=z.device), mass, 1.0 / (pairs * batch))
    return prototype_cross_entropy(z, weight, [own], temperature)[0]


def masked_patch_loss(
    z: torch.Tensor, weight: torch.Tensor, probs: torch.Tensor, masks: torch.Tensor, masked: torch.Tensor, temp: float
) -> torch.Tensor:
    """Mean cross-entropy of the hidden patches of every image, averaged over all images and crops.

    Shapes     z (positions, dim) student vectors and probs (positions, prototypes) teacher distributions at the flat
               positions ``masked`` of ``masks`` (crops * batch, patches)
    Returns    a scalar in nats; exactly 0 where nothing is hidden
    Source     iBOT (2111.07832), eq. 2; parity: images without hidden patches count in the average
    """
    images, patches = masks.shape
    per_image = masks.sum(dim=1).clamp(min=1).to(probs.dtype) * images
    row_weight = 1.0 / per_image[masked.div(patches, rounding_mode="floor")]
    rows = torch.arange(len(masked), device=z.device)
    return prototype_cross_entropy(z, weight, [Targets(probs, rows, torch.ones_like(row_weight), row_weight)], temp)[0]


class _PrototypeCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, weight, groups, temperature):
        device = z.device.type
        compute = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        needs_z, needs_weight = ctx.needs_input_grad[:2]
        accurate = torch.float64 if z.dtype == torch.float64 else torch.float32
        mass, row_weight = (torch.cat([getattr(group, name) for group in groups]) for name in ("mass", "row_weight"))
        shared = torch.cat([group.share * group.row_weight for group in groups])
        with torch.autocast(device, enabled=False):
            zc, wc = z.to(compute), weight.to(compute)
            lost = torch.empty(len(z), dtype=accurate, device=z.device)
            grad_z = torch.empty(z.shape, dtype=accurate, device=z.device) if needs_z else None
            grad_weight = torch.zeros_like(weight, dtype=accurate) if needs_weight and not len(z) else None
            # the largest weight (1 of no rows) is kept out of the products: they stay in the middle of a half's range
            common = shared.max() if len(shared) else shared.new_ones(())
            relative = (shared / common)[:, None]
            chunk = max(1, CHUNK_ELEMENTS // weight.shape[0])
            if compute == torch.float16:
                chunk = min(chunk, FP16_ROWS)
            for first in range(0, len(z), chunk):
                rows = slice(first, first + chunk)
                logits = (zc[rows] @ wc.t()).to(accurate).div_(temperature)
                target = _target_rows(groups, first, first + len(logits))
                lse = logits.logsumexp(dim=1)
                lost[rows] = mass[rows] * lse - torch.linalg.vecdot(target, logits)
                if not (needs_z or needs_weight):
                    continue
                grad = logits.sub_(lse[:, None]).exp_().mul_(mass[rows, None]).sub_(target)
                grad = grad.mul_(HEADROOM).to(compute)
                if needs_z:
                    grad_z[rows] = (grad @ wc).to(accurate) * relative[rows]
                if needs_weight:
                    product = (grad.t() @ (zc[rows] * relative[rows]).to(compute)).to(accurate)
                    grad_weight = product if grad_weight is None else grad_weight.add_(product)
        ctx.grads = (grad_z, z.dtype), (grad_weight, weight.dtype)
        ctx.factor = common / (temperature * HEADROOM)
        losses = torch.stack([part.sum() for part in (row_weight * lost).split([len(group.mass) for group in groups])])
        ctx.mark_non_differentiable(losses)
        return (shared * lost).sum(), losses

    @staticmethod
    def backward(ctx, grad_loss, _):
        factor = grad_loss * ctx.factor
        grads = [None if grad is None else grad.mul_(factor).to(dtype) for grad, dtype in ctx.grads]
        del ctx.grads  # they were formed in place: a second backward pass has nothing to start from
        return (*grads, None, None)


def _target_rows(groups: list[Targets], first: int, last: int) -> torch.Tensor:
    """The targets of rows ``first`` to ``last``, counted through all groups: (rows, prototypes)."""
    target = groups[0].probs.new_empty(last - first, groups[0].probs.shape[1])
    start = 0
    for group in groups:
        stop = start + len(group.source)
        low, high = max(first, start), min(last, stop)
        if low < high:
            part, source = target[low - first : high - first], group.source[low - start : high - start]
            head, *others = source.unbind(dim=1) if source.ndim == 2 else (source,)
            torch.index_select(group.probs, 0, head, out=part)
            for column in others:
                part += group.probs.index_select(0, column)
        start = stop
    return target
