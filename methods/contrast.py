"""InfoNCE of many student views against a queue of earlier keys, with one product for all pairs of views.

With z_v a student's unit vector, y_i the teacher's and Q the queue, the textbook loss of a pair (i, v) is

    - log softmax([z_v y_i, z_v Q] / temperature)[0]  =  logaddexp(s_v, z_v y_i / t) - z_v y_i / t

with s_v = logsumexp(z_v Q / t), which no teacher view has a part in: every student row meets the queue once. Everything
is computed in float32 or better.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from methods.distillation import CHUNK_ELEMENTS


class Contrast(NamedTuple):
    """``loss``: a scalar in nats. ``rank``: share of the queue that is nearer to the first view than its positive."""

    loss: torch.Tensor
    rank: torch.Tensor


def info_nce(z: torch.Tensor, keys: torch.Tensor, queue: torch.Tensor, temperature: float) -> Contrast:
    """Half the mean over the pairs of two global views, and half that over the pairs of a global with a local view.

    Shapes     z (views * batch, dim) student vectors, views-major, the two global views first; keys (2, batch, dim) of
               the teacher's views; queue (dim, keys). All of them unit vectors
    Source     Mugs (2203.14415), eq. 2; parity: a view is not compared with the teacher's of the same number, though
               these are other crops; without local views the global pairs are all there is
    """
    accurate = torch.promote_types(z.dtype, torch.float32)
    _, batch, dim = keys.shape
    with torch.autocast(z.device.type, enabled=False):
        z, keys = z.to(accurate) / temperature, keys.to(accurate)
        positive = torch.einsum("vbd,ibd->vib", z.view(-1, batch, dim), keys)  # (views, 2, batch)
        lse, above = _QueueLogSumExp.apply(z, queue.to(accurate), positive[0, 1].detach())
        pairs = F.softplus(lse.view(-1, 1, batch) - positive)  # log(1 + exp(s - p)) = logaddexp(s, p) - p
        loss = (pairs * pair_weights(len(pairs), batch, pairs)).sum()
    return Contrast(loss, above.to(accurate).mean() / queue.shape[1])


def pair_weights(views: int, batch: int, like: torch.Tensor) -> torch.Tensor:
    """What the loss of every student view (views, 2, 1) against each teacher view counts for one image."""
    local = views - 2
    weights = torch.full((views, 2, 1), 0.25 / (batch * max(1, local)), dtype=like.dtype, device=like.device)
    weights[:2] = (0.25 if local else 0.5) / batch
    weights[0, 0] = weights[1, 1] = 0.0
    return weights


class _QueueLogSumExp(torch.autograd.Function):
    """logsumexp(z queue) of every row, and how many of the queue lie above ``reference``, for the first rows of z.

    At most ``CHUNK_ELEMENTS`` products exist at a time; the gradient, softmax(z queue) queue^T, is formed in place.
    """

    @staticmethod
    def forward(ctx, z, queue, reference):
        needs_z = ctx.needs_input_grad[0]
        lse = z.new_empty(len(z))
        gradient = torch.empty_like(z) if needs_z else None
        above = torch.zeros(len(reference), dtype=torch.int64, device=z.device)
        chunk = max(1, CHUNK_ELEMENTS // queue.shape[1])
        for first in range(0, len(z), chunk):
            rows = slice(first, first + chunk)
            logits = z[rows] @ queue
            compared = reference[rows]
            above[rows] = (logits[: len(compared)] > compared[:, None]).sum(dim=1)
            largest = logits.amax(dim=1, keepdim=True)
            total = logits.sub_(largest).exp_().sum(dim=1, keepdim=True)
            lse[rows] = (total.log() + largest)[:, 0]
            if needs_z:
                gradient[rows] = (logits @ queue.t()).div_(total)
        ctx.gradient = gradient
        ctx.mark_non_differentiable(above)
        return lse, above

    @staticmethod
    def backward(ctx, grad_lse, _):
        gradient = ctx.gradient
        del ctx.gradient  # it was formed in place: a second backward pass has nothing to start from
        return gradient.mul_(grad_lse[:, None]), None, None
