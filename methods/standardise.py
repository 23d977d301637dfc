"""Teachers' features on one scale: the running mean and spread of every dimension (UNIC, 2408.05088, section 3.3)."""

from collections.abc import Mapping

import torch
import torch.nn as nn

from models.ladder import KINDS
from models.teacher_space import EPS
from utils import all_reduce_sum


class Standardisation(nn.Module):
    """z -> (z - mean) / (std + eps), apart for every teacher, class token and patches, and dimension.

    Rows are collected while a step's pieces are computed and enter the statistics only when the step is taken, with
    that step's momentum: every piece sees the old ones, and a skipped step leaves them as they were. What is collected
    are number, sum and sum of squares of what was standardised, in float64: as good as those of the features, also
    where a mean is far larger than its spread. All teachers are one vector, so one exchange serves them all.

    parity: the momentum is the weight of the new value, and the first is 1; spreads are unbiased, over the images of
    all processes; eps is added to what is kept, and again where it is divided by.
    """

    def __init__(self, widths: Mapping[str, int]):
        """``widths``: name -> dimension of every teacher."""
        super().__init__()
        self.slices = [(name, kind) for name in sorted(widths) for kind in KINDS]
        self.sizes = [widths[name] for name, _ in self.slices]
        self.register_buffer("mean", torch.zeros(sum(self.sizes)))
        self.register_buffer("std", torch.ones(sum(self.sizes)))
        self.register_buffer("drift", torch.zeros(()), persistent=False)  # of the latest commit, in spreads
        self.pending: torch.Tensor | None = None  # sums, sums of squares, numbers of rows

    def forward(self, features: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> dict[str, tuple]:
        """{teacher: (class token (batch, dim), patches (batch, patches, dim))} -> the same, standardised."""
        return {
            name: tuple(self._standardised(name, kind, part) for kind, part in zip(KINDS, pair, strict=True))
            for name, pair in features.items()
        }

    @torch.no_grad()
    def collect(self, standardised: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Remember the rows that ``forward`` returned of this piece."""
        rows = [standardised[name][KINDS.index(kind)].flatten(0, -2) for name, kind in self.slices]
        wide = torch.float64
        sums = torch.cat([x.sum(dim=0, dtype=wide) for x in rows])
        squares = torch.cat([x.square().sum(dim=0, dtype=wide) for x in rows])
        counts = torch.cat([sums.new_full((x.shape[1],), x.shape[0]) for x in rows])
        piece = torch.stack((sums, squares, counts))
        self.pending = piece if self.pending is None else self.pending + piece

    @torch.no_grad()
    def commit(self, momentum: float, gate: torch.Tensor | None) -> None:
        """Move the statistics to what was collected; a ``gate`` of 0 (a tensor on the device) discards it instead."""
        sums, squares, counts = all_reduce_sum(self.pending)
        self.pending = None
        old = torch.stack((self.mean, self.std)).double()
        mean, scale = old[0], old[1] + EPS
        shift = sums / counts
        spread = ((squares - counts * shift.square()).clamp_min(0.0) / (counts - 1)).sqrt()
        moved = (1 - momentum) * old + momentum * torch.stack((mean + shift * scale, spread * scale + EPS))
        moved = moved if gate is None else torch.where(gate > 0, moved, old)
        self.drift.copy_(((moved[0] - mean) / (moved[1] + EPS)).square().mean().sqrt())
        self.mean.copy_(moved[0])
        self.std.copy_(moved[1])

    def _standardised(self, name: str, kind: str, features: torch.Tensor) -> torch.Tensor:
        mean, std = self._statistics(name, kind)
        return (features.to(mean.dtype) - mean) / (std + EPS)

    def _statistics(self, name: str, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
        at = self.slices.index((name, kind))
        return self.mean.split(self.sizes)[at], self.std.split(self.sizes)[at]

    # ---- in files ---------------------------------------------------------------------------------------------------

    def to_file(self, state: dict) -> dict:
        """The original's {teacher: {"cls": {"mean": (1, dim), "std": ...}, "patch": {"mean": (1, 1, dim), ...}}}."""
        parts = {name: vector.split(self.sizes) for name, vector in state.items()}
        nested: dict[str, dict] = {}
        for at, (teacher, kind) in enumerate(self.slices):
            shape = (1,) * (1 + KINDS.index(kind)) + (-1,)
            values = {name: vectors[at].reshape(shape).clone() for name, vectors in parts.items()}
            nested.setdefault(teacher, {})[kind] = values
        return nested

    def from_file(self, nested: dict) -> dict:
        """Undoes ``to_file``. Raises ValueError for statistics of other teachers, or what are none."""
        wanted = sorted({teacher for teacher, _ in self.slices})
        if sorted(nested) != wanted:
            raise ValueError(f"its statistics are of {', '.join(sorted(nested))}, the teachers are {', '.join(wanted)}")
        try:
            return {
                name: torch.cat([nested[teacher][kind][name].flatten() for teacher, kind in self.slices])
                for name in ("mean", "std")
            }
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"its statistics are not those of teachers ({error!r})") from None
