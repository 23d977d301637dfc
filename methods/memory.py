"""What Mugs (2203.14415) remembers of earlier images: queues of keys to contrast with, and rows to find neighbours in.

Rows are collected while a step's pieces are computed and written only when the step is taken, as centres are
(centring.py): every piece sees the old content, and a skipped step leaves it as it was. Pointers are numbers on the
device, and where a row goes, how many rows there are and whether the step counts is arithmetic with them: no wait.
The rows of all processes are written in the order of the global batch, so all processes hold the same.
"""

from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from methods.distillation import CHUNK_ELEMENTS
from utils import all_gather_rows

NEVER = -1  # of a row that holds no image: the number of its image, and of the step that wrote it
BLOCK = 64  # columns whose largest similarity stands for all of them in a first search


class Queue(nn.Module):
    """The latest unit vectors of a teacher, first in, first out: (dim, size), the layout of the original's files."""

    def __init__(self, dim: int, size: int):
        super().__init__()
        self.register_buffer("queue", F.normalize(torch.randn(dim, size), dim=0))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.int64))
        self._pending: list[torch.Tensor] = []

    def collect(self, keys: torch.Tensor) -> None:
        """Remember the keys (2, batch, dim) of a piece."""
        self._pending.append(keys.detach())

    @torch.no_grad()
    def commit(self, gate: torch.Tensor | None) -> None:
        """Write view 0 of all images, then view 1; a ``gate`` of 0 (a tensor on the device) forgets them instead."""
        keys, self._pending = torch.cat(self._pending, dim=1), []
        taken = _taken(gate)
        for view in all_gather_rows(keys.transpose(0, 1)).to(self.queue.dtype).unbind(1):
            columns = (self.queue_ptr + torch.arange(len(view), device=view.device)) % self.queue.shape[1]
            written = view.t() if taken is None else torch.where(taken, view.t(), self.queue[:, columns])
            self.queue.index_copy_(1, columns, written)
            moved = (self.queue_ptr + len(view)) % self.queue.shape[1]
            self.queue_ptr.copy_(moved if taken is None else torch.where(taken, moved, self.queue_ptr))


class Neighbours(NamedTuple):
    """``rows`` (queries, k, dim) and ``index`` (queries, k) in the memory, the nearest first."""

    rows: torch.Tensor
    index: torch.Tensor


class Memory(nn.Module):
    """Rows (size, dim) of earlier images, found by the cosine with a query.

    ``queue_q`` is searched and ``queue_k`` is returned. parity: they start as independent draws and are written alike,
    so that a row which was never written returns something unrelated to what was matched; the pointer advances by twice
    the number of rows unless they wrap, so that with a constant number of them the rows between are written a round
    later or never. ``advance_once``: by their number.

    ``unit`` is ``queue_q`` normalised, kept up to date row by row with the norms it is divided by, so that a search is
    one product. ``images`` and ``written`` tell which image a row is of, and which step wrote it.
    """

    def __init__(self, dim: int, size: int, advance_once: bool = False):
        super().__init__()
        self.advance_once = advance_once
        for name in ("queue_q", "queue_k"):
            self.register_buffer(name, torch.randn(size, dim))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.int64))
        for name in ("images", "written"):
            self.register_buffer(name, torch.full((size,), NEVER), persistent=False)
        self.register_buffer("norms", torch.empty(size, 1), persistent=False)
        self.register_buffer("unit", torch.empty(size, dim), persistent=False)
        self._pending: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self.renormalise()

    # ---- reading ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def nearest(self, queries: torch.Tensor, k: int) -> Neighbours:
        """The ``k`` rows whose keys have the largest cosine with every query (queries, dim)."""
        with torch.autocast(queries.device.type, enabled=False):
            queries = F.normalize(queries.to(self.unit.dtype), dim=-1)
            chunk = max(1, CHUNK_ELEMENTS // len(self.unit))
            index = torch.cat([largest(part @ self.unit.t(), k) for part in queries.split(chunk)])
        return Neighbours(self.queue_k[index], index)

    def share_written(self) -> torch.Tensor:
        """The share of rows that were ever written: in no other do key and value agree."""
        return (self.queue_q[:, 0] == self.queue_k[:, 0]).float().mean()

    # ---- writing ----------------------------------------------------------------------------------------------------

    def collect(
        self, rows: torch.Tensor, images: torch.Tensor | None = None, wanted: torch.Tensor | None = None
    ) -> None:
        """Remember rows (batch, dim) of a piece, the numbers of their ``images``, and which of them are ``wanted``."""
        count = (len(rows),)
        images = rows.new_full(count, NEVER, dtype=torch.int64) if images is None else images
        wanted = rows.new_ones(count, dtype=torch.bool) if wanted is None else wanted
        self._pending.append((rows.detach(), images, wanted))

    @torch.no_grad()
    def commit(self, iteration: int, gate: torch.Tensor | None) -> torch.Tensor:
        """Write what is wanted of all processes; a ``gate`` of 0 (a tensor on the device) forgets it instead.

        Returns the number of rows, of all processes, that were to be written.
        """
        rows, images, wanted = (torch.cat(parts) for parts in zip(*self._pending, strict=True))
        self._pending = []
        rows, notes = all_gather_rows(rows), all_gather_rows(torch.stack((images, wanted.to(images.dtype)), dim=1))
        images, wanted = notes[:, 0], notes[:, 1]
        # the wanted rows first, in their order; behind them, in places of their own, those that leave what is there
        wanted, order = wanted.sort(descending=True, stable=True)
        number, rows, images = wanted.sum(), rows[order], images[order]
        places = (self.queue_ptr + torch.arange(len(rows), device=rows.device)) % len(self.unit)
        taken = _taken(gate)
        writes = wanted > 0 if taken is None else (wanted > 0) & taken
        self._write(places, writes, rows.to(self.queue_q.dtype), images, iteration)
        self._advance(number, taken)
        return number

    def _write(self, places, writes, rows, images, iteration) -> None:
        norms = rows.norm(dim=1, keepdim=True).clamp_min(1e-12)
        steps = torch.full_like(images, iteration)
        new = {
            "queue_q": rows,
            "queue_k": rows,
            "norms": norms,
            "unit": rows / norms,
            "images": images,
            "written": steps,
        }
        for name, value in new.items():
            buffer = getattr(self, name)
            kept = writes.view(-1, *[1] * (value.ndim - 1))
            buffer.index_copy_(0, places, torch.where(kept, value, buffer[places]))

    def _advance(self, number: torch.Tensor, taken: torch.Tensor | None) -> None:
        size, end = len(self.unit), self.queue_ptr + number
        moved = end % size if self.advance_once else torch.where(end <= size, (end + number) % size, end - size)
        self.queue_ptr.copy_(moved if taken is None else torch.where(taken, moved, self.queue_ptr))

    # ---- state ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def renormalise(self) -> None:
        """Make ``norms`` and ``unit`` anew from all rows."""
        self.norms.copy_(self.queue_q.norm(dim=1, keepdim=True).clamp_min(1e-12))
        torch.div(self.queue_q, self.norms, out=self.unit)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self.renormalise()  # in the precision of what the rows are now
        return self

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.renormalise()

    def notes(self) -> dict[str, torch.Tensor]:
        """What the original's files have no place for: whose rows they are, since when, and the norms bit for bit."""
        return {name: getattr(self, name) for name in ("images", "written", "norms")}

    def load_notes(self, notes: dict[str, torch.Tensor]) -> None:
        for name, value in notes.items():
            getattr(self, name).copy_(value)
        torch.div(self.queue_q, self.norms, out=self.unit)

    @staticmethod
    def to_file(state: dict) -> dict:
        """Our names -> the original's. ``queue_v`` is never read and, written alike, the storage of ``queue_k``."""
        return {f"block.{name}": state[key] for name, key in FILE_NAMES.items()}

    @staticmethod
    def from_file(state: dict) -> dict:
        return {key: state[f"block.{name}"] for name, key in FILE_NAMES.items() if name == key}


FILE_NAMES = {"queue_q": "queue_q", "queue_k": "queue_k", "queue_v": "queue_k", "queue_ptr": "queue_ptr"}


def largest(similarity: torch.Tensor, k: int) -> torch.Tensor:
    """Columns of the ``k`` largest of every row, the largest first: (rows, k) of (rows, columns).

    The largest are in the k blocks of columns whose maxima are largest, so most columns are looked at once only.
    """
    rows, columns = similarity.shape
    blocks = columns // BLOCK
    if columns % BLOCK or blocks <= k:
        return similarity.topk(k, dim=1).indices
    found = similarity.view(rows, blocks, BLOCK).amax(dim=2).topk(k, dim=1).indices
    inside = found[..., None] * BLOCK + torch.arange(BLOCK, device=similarity.device)  # (rows, k, BLOCK)
    inside = inside.flatten(1)
    return inside.gather(1, similarity.gather(1, inside).topk(k, dim=1).indices)


def _taken(gate: torch.Tensor | None) -> torch.Tensor | None:
    return None if gate is None else gate > 0
