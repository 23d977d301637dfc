"""Buffers that the originals change in place, where a file holds for every step what they were after the last one.

What was recorded of a step is then a view of the buffer itself. The last step can still be compared, and where the
start of a queue is lost in that way, the gradients of the first steps tell what it was: they are more numbers than it
has.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from tests.parity import Case

STARTS, ROUNDS = 20, 1500  # of the search for what a queue was; without local views it is a long way down
SOLVED = 1e-24  # sum of squares


def stepwise(case: Case, found: dict[str, torch.Tensor]) -> Iterator[tuple]:
    """Compare what was ``found`` after every step, by label, with what was recorded: of each, or of the last only."""
    found = {label: value for label, value in found.items() if label in case.arrays}
    expected = [case.arrays[label] for label in found]
    late = len(expected) > 1 and all(np.array_equal(expected[0], array) for array in expected)
    last = list(found.values())[-1] if found else None
    for label, value in found.items():
        yield label, last if late else value, case.arrays[label]


def queue_at_start(
    recorded: torch.Tensor, steps: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]], temperature: float
) -> torch.Tensor:
    """The queue (dim, size) before steps of student vectors, keys (2, batch, dim) and gradients of the former.

    Backwards from the first step that sees nothing of the start: the columns that a step is the last to see are those
    with which its gradients are what they are. They are unit vectors, and in which order they stand means nothing.
    What no step writes over is what it was.
    """
    written = torch.arange(sum(keys.shape[0] * keys.shape[1] for _, keys, _ in steps)) % recorded.shape[1]
    start = recorded.index_fill(1, written.unique(), torch.nan)
    for number in reversed(range(len(steps))):
        queue, pointer = start.clone(), 0
        for _, keys, _ in steps[:number]:
            columns = (pointer + torch.arange(keys.shape[0] * keys.shape[1])) % queue.shape[1]
            queue[:, columns] = keys.flatten(0, 1).t()
            pointer += len(columns)
        lost = queue[0].isnan().nonzero().flatten()
        if len(lost):
            start[:, lost] = _columns(queue, lost, steps[number], temperature)
    return start


def _columns(queue: torch.Tensor, lost: torch.Tensor, step: tuple, temperature: float) -> torch.Tensor:
    z, keys, wanted = step

    def residuals(x: torch.Tensor) -> torch.Tensor:
        columns = x.view(len(queue), -1)
        off = gradients(z, keys, queue.index_copy(1, lost, columns), temperature) - wanted
        return torch.cat((off.flatten(), columns.square().sum(dim=0) - 1))

    for seed in range(STARTS):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(len(queue), len(lost), generator=generator, dtype=queue.dtype)
        x, cost = _least_squares(residuals, F.normalize(x, dim=0).flatten())
        if cost < SOLVED:
            return x.view(len(queue), -1)
    raise ArithmeticError("no queue was found that has the gradients that were recorded")


def _least_squares(residuals, x: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Levenberg and Marquardt's way down from ``x``."""
    damping, off = 1e-3, residuals(x)
    for _ in range(ROUNDS):
        jacobian = torch.func.jacrev(residuals)(x)
        square = jacobian.t() @ jacobian
        damped = square + damping * square.diagonal().clamp_min(1e-12).diag()
        step = torch.linalg.solve(damped, -jacobian.t() @ off)
        new = residuals(x + step)
        better = new.square().sum() < off.square().sum()
        x, off, damping = (x + step, new, damping / 5) if better else (x, off, damping * 4)
        if off.square().sum() < 1e-29 or damping > 1e12:
            break
    return x, off.square().sum().item()


def gradients(z: torch.Tensor, keys: torch.Tensor, queue: torch.Tensor, temperature: float) -> torch.Tensor:
    """Of the contrastive loss, by student vectors (views * batch, dim), written out: differentiable once more."""
    batch = keys.shape[1]
    views = z.view(-1, batch, z.shape[1])
    positive = torch.einsum("vbd,ibd->vib", views, keys) / temperature
    logits = z @ queue / temperature
    shares = torch.sigmoid(logits.logsumexp(dim=1).view(-1, 1, batch) - positive)
    large, small = torch.zeros_like(positive), torch.zeros_like(positive)
    large[0, 1] = large[1, 0] = 0.5 / batch
    small[2:] = 0.5 / (batch * max(1, len(views) - 2))
    shares = shares * ((large + small) / 2 if len(views) > 2 else large)
    means = (logits.softmax(dim=1) @ queue.t()).view_as(views)
    found = shares.sum(dim=1)[..., None] * means - torch.einsum("vib,ibd->vbd", shares, keys)
    return found.flatten(0, 1) / temperature
