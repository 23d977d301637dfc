"""Which positions of a vision transformer's file are of patches, on which grid; no tensor shows it but for a square.

Of 25 positions beside one class token 4 x 6 may be of patches and one of the token, or 5 x 5 and none.
"""

import math

import torch

from models.layouts.names import State, square_side
from models.safe_load import CheckpointError

Grid = tuple[int, int]  # rows, columns
GRID = "pos_grid"  # of networks whose positions are no square: (2,) int64
WITHOUT_CLASS = (224, 240, 384, 518)  # pixels of published networks whose class token has no position
SIZES = ("img_size", "image_size", "input_size", "global_crops_size")  # options: timm's, UNIC's, MAE's, DINO's


def lay_out_positions(
    state: State, told: Grid | None, recorded: dict, class_position: bool = True
) -> tuple[State, bool]:
    """The positions as models/vit.py has them, (1, class tokens + patches, dim), and whether their grid was known.

    ``told``: what a user says of the grid; ``recorded``: options of the training run, taken where they fit. Class
    tokens without a position get zeros, and the positions of registers are added to these: same network. A grid that
    is no square becomes a tensor of its own. Without a word of it only squares are taken; and of a square that counts
    the class token in, or does not, neither, unless networks of that size were published, or (``class_position`` False)
    the file is laid out as theirs. What stays open is left as it is.
    Raises CheckpointError where ``told`` does not fit.
    """
    positions, patch = state.get("pos_embed"), state.get("patch_embed.proj.weight")
    tokens = [state.get(name) for name in ("cls_token", "register_tokens")]
    there = [tensor for tensor in (positions, *tokens) if tensor is not None]
    if positions is None or patch is None or patch.ndim != 4 or not patch.numel() or {t.ndim for t in there} != {3}:
        if told:
            raise CheckpointError(f"--grid {told[0]} {told[1]}: it holds no vision transformer with learnt positions")
        return state, False
    count, (classes, registers) = positions.shape[1], (0 if t is None else t.shape[1] for t in tokens)
    fronts = list(dict.fromkeys((classes, 0, classes + registers)))  # how many positions may be of no patch
    if told and count - math.prod(told) not in fronts:
        raise CheckpointError(
            f"--grid {told[0]} {told[1]}: it holds {count} positions, of which {math.prod(told)} patches leave "
            f"{count - math.prod(told)} for {classes} class tokens and {registers} registers"
        )
    if GRID in state and not told:
        return state, True
    grid = told or recorded_grid(recorded, patch.shape[-1], [count - front for front in fronts])
    known = grid is not None
    if grid is None:
        side = next((side for front in fronts if (side := square_side(count - front))), None)
        if side is None:
            return state, False
        published = side * patch.shape[-1] in WITHOUT_CLASS or registers
        published = published or (not class_position and "blocks.0.gamma_1" in state)
        if classes and side * side == count and not published:
            return state, False
        grid = side, side
    front = count - math.prod(grid)
    if front == 0 and classes:
        positions = torch.cat((positions.new_zeros(1, classes, positions.shape[2]), positions), dim=1)
    elif front > classes:
        state = state | {"register_tokens": tokens[1] + positions[:, classes:front]}
        positions = torch.cat((positions[:, :classes], positions[:, front:]), dim=1)
    laid_out = {name: tensor for name, tensor in state.items() if name != GRID} | {"pos_embed": positions}
    return laid_out | ({} if grid[0] == grid[1] else {GRID: torch.tensor(grid)}), known


def recorded_grid(recorded: dict, patch: int, counts: list[int]) -> Grid | None:
    """The grid of patches of the first size among the options that gives one of ``counts`` patches."""
    for name in SIZES:
        size = recorded.get(name)
        size = [size, size] if isinstance(size, int) else size
        if isinstance(size, list | tuple) and len(size) in (2, 3) and all(isinstance(n, int) and n > 0 for n in size):
            grid = size[-2] // patch, size[-1] // patch  # a third is the number of colours, in front
            if math.prod(grid) in counts and math.prod(grid):
                return grid
    return None


def grid_of(state: State) -> Grid | None:
    """Rows and columns of the positions of patches, laid out as above; None where they are open."""
    positions, classes = state["pos_embed"].shape[1], state["cls_token"].shape[1] if "cls_token" in state else 0
    if GRID not in state:
        side = square_side(positions - classes)
        return None if side is None else (side, side)
    grid = state[GRID].tolist() if state[GRID].shape == (2,) else []
    if not all(isinstance(count, int) and count > 0 for count in grid) or math.prod(grid) != positions - classes:
        raise CheckpointError(f"{GRID} is no grid of {positions - classes} patches")
    return tuple(grid)
