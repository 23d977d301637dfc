"""UNIC's ladder of projectors (2408.05088, section 3.2): from every block of the student to the space of every teacher.

    y_t = sum over blocks b of  W2_tb gelu(W1_tb x_b)      apart for class token and patches, biases left out

A projector per teacher, kind of token and block; patches share theirs over positions. They serve distillation alone:
evaluations leave them out, except for a student's image in a teacher's space. Names of tensors are the original's,
``heads.<teacher>.<cls|patch>.<block>.layers.<j>``, and widths can be read from their shapes.

Second layers add to what the blocks before gave, in the product itself, and their biases are added once: no tensor for
every projector's output. Stacking the first layers of a block, which read the same tokens, would copy all weights in
every step, and was slower.
"""

import functools
import re
from collections.abc import Mapping, Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from utils import UsageError, escape

KINDS = ("cls", "patch")  # of tokens


class Projector(nn.Module):
    """[LayerNorm,] Linear, [LayerNorm,] GELU (exact), Linear: (rows, dim) -> (rows, out_dim)."""

    def __init__(self, dim: int, hidden_dim: int, out_dim: int, prenorm: bool, midnorm: bool, std: float):
        super().__init__()
        first, second = nn.Linear(dim, hidden_dim), nn.Linear(hidden_dim, out_dim)
        before = [nn.LayerNorm(dim)] if prenorm else []
        between = [nn.LayerNorm(hidden_dim)] if midnorm else []
        self.layers = nn.Sequential(*before, first, *between, nn.GELU(), second)
        for layer in (first, second):
            nn.init.trunc_normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


class Ladder(nn.Module):
    """See the module docstring. ``heads``: name -> width of every teacher; ``hidden``: block -> width of its hidden
    layers; blocks that are left out have no projectors.
    """

    def __init__(
        self,
        dim: int,
        heads: Mapping[str, int],
        hidden: Mapping[int, int],
        prenorm: bool = False,
        midnorm: bool = False,
        std: float = 0.02,
    ):
        super().__init__()
        self.grad_checkpointing = False
        self.blocks = sorted(hidden)
        self.teachers = sorted(heads)
        self.heads = nn.ModuleDict()
        for name in self.teachers:
            if hasattr(self.heads, module_name(name)):
                raise UsageError(f"--teachers {escape(name)}: the name of a ladder's own part; choose another")
            self.heads[module_name(name)] = nn.ModuleDict(
                {
                    kind: nn.ModuleDict(
                        {str(b): Projector(dim, hidden[b], heads[name], prenorm, midnorm, std) for b in self.blocks}
                    )
                    for kind in KINDS
                }
            )

    def forward(
        self, blocks: Sequence[torch.Tensor], num_prefix_tokens: int = 1
    ) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Raw tokens (batch, tokens, dim) after every block -> {teacher: (class token (batch, its dim), patches
        (batch, patches, its dim))}. The first token is the class token, ``num_prefix_tokens`` are no patches.
        """
        classes = self.classes(blocks)
        rows = [blocks[b][:, num_prefix_tokens:].flatten(0, 1) for b in self.blocks]
        patches = [patch.unflatten(0, (len(blocks[0]), -1)) for patch in self._project("patch", rows)]
        return dict(zip(self.teachers, zip(classes, patches, strict=True), strict=True))

    def classes(self, blocks: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The class tokens alone, (batch, its dim) for every teacher."""
        return self._project("cls", [blocks[b][:, 0] for b in self.blocks])

    def _project(self, kind: str, rows: list[torch.Tensor]) -> list[torch.Tensor]:
        """Rows (rows, dim) of every block -> (rows, its dim) for every teacher."""
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(self._sums, kind, rows, use_reentrant=False)
        return self._sums(kind, rows)

    def _sums(self, kind: str, rows: list[torch.Tensor]) -> list[torch.Tensor]:
        columns = [self.heads[module_name(name)][kind].values() for name in self.teachers]
        return [summed([projector.layers for projector in column], rows) for column in columns]


def summed(projectors: Sequence[nn.Sequential], rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of what every projector makes of its rows (rows, dim)."""
    # one by one: the gradients of a stack that is summed would be one memory, in which pieces and clips meet
    bias = functools.reduce(torch.add, [layers[-1].bias for layers in projectors])
    total = None
    for layers, x in zip(projectors, rows, strict=True):
        hidden, weight = layers[:-1](x), layers[-1].weight
        total = F.linear(hidden, weight, bias) if total is None else torch.addmm(total, hidden, weight.t())
    return total


def module_name(teacher: str) -> str:
    """A teacher's name as part of a tensor's name, in which dots separate modules."""
    return teacher.replace(".", "_")


FIRST = re.compile(r"heads\.(.+)\.(cls)\.(\d+)\.layers\.(\d)\.weight")


def ladder_arguments(state: Mapping[str, torch.Tensor]) -> dict:
    """Arguments of ``Ladder`` from the tensors of one, whatever options it was made with. Raises UsageError without
    any."""
    found = {m.groups(): tensor for name, tensor in state.items() if (m := FIRST.fullmatch(name))}
    if not found:
        raise UsageError("no ladder of projectors (lp.heads.*): the file holds the student alone")
    linear = {(name, int(b), int(j)): t.shape for (name, _, b, j), t in found.items() if t.ndim == 2}
    first, last = min(j for *_, j in linear), max(j for *_, j in linear)
    widths = {(name, b): shape for (name, b, j), shape in linear.items() if j == first}
    return {
        "dim": next(iter(widths.values()))[1],
        "heads": {name: shape[0] for (name, _, j), shape in linear.items() if j == last},
        "hidden": {b: shape[0] for (_, b), shape in widths.items()},
        "prenorm": first == 1,
        "midnorm": last - first == 3,
    }
