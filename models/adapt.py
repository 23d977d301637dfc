"""Weights for a network that is fine-tuned: those of a backbone, fitted to another image size and to what is new.

What the file cannot bring begins as initialised: the head, ``fc_norm`` of pooled patches, LayerScale, tables of
relative positions. Everything else has to match, as in models/matching.py.
"""

import re

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from models.layouts.names import State, square_side
from models.layouts.shapes import advice
from models.matching import Report, compare
from models.reading import Info
from models.safe_load import CheckpointError
from utils import log

NEW = re.compile(
    r"head\.(cls_head\.)?(weight|bias)$|fc_norm\.|blocks\.\d+\.(gamma_[12]$|attn\.relative_position_bias_table$)"
)
TABLE = re.compile(r"blocks\.\d+\.attn\.relative_position_bias_table$")
SHARED_TABLE = "rel_pos_bias.relative_position_bias_table"


def select_class_tokens(state: State, count: int) -> State:
    """The first ``count`` class tokens and their positions, and all patches'; with 0 there is no ``cls_token``."""
    if "cls_token" not in state:
        return state
    classes = state["cls_token"].shape[1]
    state = dict(state)
    tokens = state.pop("cls_token")[:, :count].clone()
    state = ({"cls_token": tokens} if count else {}) | state
    if "pos_embed" in state:
        positions = state["pos_embed"]
        state["pos_embed"] = torch.cat((positions[:, :count], positions[:, classes:]), dim=1)
    return state


def resize_positions(positions: torch.Tensor, prefix: int, side: int) -> torch.Tensor:
    """(1, prefix + patches, dim) -> (1, prefix + side^2, dim), bicubic to exactly this size.

    parity: not by the factor with 0.1 added that ``VisionTransformer.position_embedding`` takes.
    """
    old = square_side(positions.shape[1] - prefix)
    if old is None or old == side:
        return positions
    grid = positions[:, prefix:].reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat((positions[:, :prefix], grid.permute(0, 2, 3, 1).flatten(1, 2)), dim=1)


def resize_bias_table(table: torch.Tensor, rows: int) -> torch.Tensor:
    """A table of relative positions, ((2s - 1)^2 + 3, heads), for another side: (rows, heads).

    The known offsets are laid out at distances that grow by one factor from step to step, so that near offsets keep
    their values and far ones are stretched; between them a cubic spline (BEiT run_class_finetuning.py).
    """
    old, new = square_side(table.shape[0] - 3), square_side(rows - 3)
    if old is None or new is None or old == new:
        return table
    known = _growing_distances(old, new)
    wanted = (np.arange(new) - new // 2).clip(known[0], known[-1])  # beyond what is known the farthest value holds
    matrix = torch.from_numpy(_spline_matrix(known, wanted)).to(table)
    heads = table[:-3].reshape(old, old, -1)
    resized = torch.einsum("ai,bj,ijh->abh", matrix, matrix, heads)
    return torch.cat((resized.flatten(0, 1), table[-3:]))


def _growing_distances(old: int, new: int) -> np.ndarray:
    """Offsets -k..k of an old table in patches of the new one: 1 + q + q^2 + ..., to reach as far as the new table."""
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        factor = (low + high) / 2
        if (1 - factor ** (old // 2)) / (1 - factor) > new // 2:
            high = factor
        else:
            low = factor
    distances = np.cumsum(((low + high) / 2) ** np.arange(old // 2))
    return np.concatenate((-distances[::-1], [0.0], distances))


def _spline_matrix(known: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Values at ``known`` positions -> values of their cubic spline (not-a-knot) at ``wanted`` ones, as a matrix."""
    scale = np.abs(known).max()

    def basis(x: np.ndarray) -> np.ndarray:
        knots = known[2:-2] / scale
        powers = (x / scale)[:, None] ** np.arange(min(4, len(known)))
        return np.concatenate((powers, np.clip((x / scale)[:, None] - knots, 0, None) ** 3), axis=1)

    return np.linalg.solve(basis(known).T, basis(wanted).T).T


def load_to_finetune(model: nn.Module, state: State, info: Info) -> Report:
    """Fill ``model`` (models/finetuned.py) from what ``read_backbone`` returned; says what begins as initialised.

    Raises CheckpointError, with the table of models/matching.py, when anything but what is new does not match.
    """
    target = model.state_dict()
    state = fitted(state, target)
    for name, reason in left_behind(model, state).items():
        log.warning(f"warning: {info.path}: {name} is left behind: {reason}")
        del state[name]
    fresh = [name for name in target if NEW.match(name) and name not in state]
    report = compare({name: tensor for name, tensor in target.items() if name not in fresh}, state, info)
    if not report.complete:
        tip = _layer_scale_tip(report) or advice(target, state)
        raise CheckpointError(f"{info.where}: does not fit the network: {report}. {tip}\n{report.table()}")
    model.load_state_dict(target | {name: state[name] for name in report.matched})
    report.untouched += fresh
    return report


def fitted(state: State, target: State) -> State:
    """One class token, positions and tables for the target's grid, a shared table for every block."""
    state = select_class_tokens(state, 1)
    tables = [name for name in target if TABLE.match(name)]
    if SHARED_TABLE in state:
        shared = state.pop(SHARED_TABLE)
        state |= {name: shared.clone() for name in tables}
    for name in tables:
        if name in state:
            state[name] = resize_bias_table(state[name], target[name].shape[0])
    if {"pos_embed", "cls_token"} <= state.keys() and "pos_embed" in target:
        side = square_side(target["pos_embed"].shape[1] - 1)
        state["pos_embed"] = resize_positions(state["pos_embed"], 1, side)
    return state


def left_behind(model: nn.Module, state: State) -> dict[str, str]:
    """Tensors of a file that this network has no use for, and why."""
    target = model.state_dict()
    reasons = {}
    for name, tensor in state.items():
        if name in target:
            if re.match(r"head\.(weight|bias)$", name) and tensor.shape != target[name].shape:
                reasons[name] = f"of {tensor.shape[0]} classes, here {target[name].shape[0]}"
        elif name == "pos_embed":
            reasons[name] = "--abs_pos_emb is off"
        elif TABLE.match(name):
            reasons[name] = "--rel_pos_bias is off"
        elif name.startswith("norm.") and "fc_norm.weight" in target:
            reasons[name] = "patches are pooled and have a norm of their own (--use_cls is off)"
    return reasons


def _layer_scale_tip(report: Report) -> str:
    if any(re.search(r"gamma_[12]$", name) for name in report.unexpected):
        return "Its blocks have LayerScale: pass a positive --layer_scale_init_value"
    return ""
