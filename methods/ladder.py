"""UNIC's ladder of projectors (2408.05088, section 3.2): from every block of the student to the space of every teacher.

    y_t = sum over blocks b of  W2_tb gelu(W1_tb x_b)      apart for class token and patches, biases left out

A projector per teacher, kind of token and block; patches share theirs over positions. They serve distillation alone:
evaluations leave them out, except for a student's image in a teacher's space. Names of tensors are the original's,
``heads.<teacher>.<cls|patch>.<block>.layers.<j>``, and widths can be read from their shapes.

Second layers add to what the blocks before gave, in the product itself, and their biases are added once: no tensor for
every projector's output. Stacking the first layers of a block, which read the same tokens, would copy all weights in
every step, and was slower.
"""

import ast
import functools
import re
from collections.abc import Mapping, Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from utils import UsageError, escape, nearest

KINDS = ("cls", "patch")  # of tokens
DEFAULTS = {  # of --lp_args, with what they may be
    "which_blocks": None,
    "hidden_dim": 768,
    "last_hidden_dim": 3072,
    "prenorm": False,
    "midnorm": False,
    "std": 0.02,
}


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
        tokens = [blocks[b] for b in self.blocks]
        batch = tokens[0].shape[0]
        classes = self._project("cls", [t[:, 0] for t in tokens])
        patches = self._project("patch", [t[:, num_prefix_tokens:].flatten(0, 1) for t in tokens])
        pairs = zip(self.teachers, classes, patches, strict=True)
        return {name: (cls, patch.unflatten(0, (batch, -1))) for name, cls, patch in pairs}

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


# ---------------------------------------------------------------------------------------------------------------------
# Widths: from options, from shapes
# ---------------------------------------------------------------------------------------------------------------------


def literal_options(option: str, text: str, defaults: Mapping[str, object]) -> dict:
    """A dictionary that is written as in Python (``{'std': 0.02}``), with ``defaults`` for what it leaves out.

    Raises UsageError for anything that is no literal of a dictionary, and for unknown keys.
    """
    example = f'pass a dictionary as "{dict(list(defaults.items())[-1:])}"'
    try:
        given = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise UsageError(f"{option} {escape(text)[:80]}: no Python literal; {example}") from None
    if not isinstance(given, dict):
        raise UsageError(f"{option} {escape(text)[:80]}: a {type(given).__name__}; {example}")
    for key in given:
        if key not in defaults:
            near = nearest(str(key), defaults)
            raise UsageError(f"{option}: unknown key {escape(str(key))}{near}; there are {', '.join(defaults)}")
    return {**defaults, **given}


def ladder_options(text: str) -> dict:
    """``--lp_args``, checked; which blocks exist shows when the network is there (``hidden_widths``)."""
    options = literal_options("--lp_args", text, DEFAULTS)
    for name in ("hidden_dim", "last_hidden_dim"):
        if not _whole(options[name]) or options[name] < 1:
            raise UsageError(f"--lp_args: {name} {options[name]!r} has to be a whole number of at least 1")
    for name in ("prenorm", "midnorm"):
        if not isinstance(options[name], bool):
            raise UsageError(f"--lp_args: {name} {options[name]!r} has to be True or False")
    if isinstance(options["std"], bool) or not isinstance(options["std"], int | float) or not options["std"] > 0:
        raise UsageError(f"--lp_args: std {options['std']!r} has to be a positive number")
    blocks = options["which_blocks"]
    if blocks is not None and not (isinstance(blocks, list | tuple) and blocks and all(map(_whole, blocks))):
        raise UsageError(f"--lp_args: which_blocks {blocks!r} has to be None (all) or a list of blocks, the first is 0")
    return options


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def hidden_widths(options: Mapping[str, object], depth: int) -> dict[int, int]:
    """Block -> width, from checked ``--lp_args``: the last block of the network has its own, whoever else has any.

    Raises UsageError for blocks that a network of ``depth`` does not have.
    """
    blocks = range(depth) if options["which_blocks"] is None else sorted(set(options["which_blocks"]))
    for block in blocks:
        if not 0 <= block < depth:
            raise UsageError(f"--lp_args: which_blocks has {block}, and the student's blocks are 0 to {depth - 1}")
    return {block: options["last_hidden_dim" if block == depth - 1 else "hidden_dim"] for block in blocks}


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
