"""What a checkpoint holds of a method, and how it goes from one run to another.

A part is whatever has ``state_dict`` and ``load_state_dict``: a module, or something that keeps its state otherwise.
"""

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
import torch.nn as nn

from models.layouts.names import NOT_NEEDED, square_side
from models.layouts.shapes import describe
from utils import UsageError, escape


class Part(Protocol):
    """``load_state_dict`` raises RuntimeError, KeyError or ValueError for a state that does not fit."""

    def state_dict(self) -> dict: ...

    def load_state_dict(self, state: dict) -> object: ...


class Renamed:
    """A module whose state stands in files under other names than its own, those of the original.

    ``to_file`` and ``from_file`` are functions of a dict that undo each other and change neither dict nor tensors.
    """

    def __init__(self, module: nn.Module, to_file: Callable[[dict], dict], from_file: Callable[[dict], dict]):
        self.module, self.to_file, self.from_file = module, to_file, from_file

    def state_dict(self) -> dict:
        return self.to_file(self.module.state_dict())

    def load_state_dict(self, state: dict) -> object:
        return self.module.load_state_dict(self.from_file(state))

    def parameters(self) -> Iterator[nn.Parameter]:
        return self.module.parameters()


def module_of(part: Part) -> nn.Module | None:
    """The module whose state a part is; None for a part that is none."""
    return part.module if isinstance(part, Renamed) else part if isinstance(part, nn.Module) else None


def own_names(part: Part, state: dict) -> dict:
    """What a file holds of a part, under the names of its module."""
    return part.from_file(state) if isinstance(part, Renamed) else state


# ---------------------------------------------------------------------------------------------------------------------
# Beginning from another run
# ---------------------------------------------------------------------------------------------------------------------


def adopt_parts(parts: dict[str, Part], state: dict[str, dict], backbone: nn.Module) -> list[str]:
    """Load what fits of another run's ``state``, as its file has it; returns the names of what stays as it was built.

    ``backbone``, a module of one of the parts, has to fit as a whole, there and where other parts have its like; only
    its positions may be of another size of images, and are resampled. A part that is no module is taken whole or not at
    all. Raises UsageError, before anything is loaded, for another backbone.
    """
    modules = {key: module for key, part in parts.items() if (module := module_of(part)) is not None and key in state}
    prefix = _prefix_of(backbone, parts)
    fitting = {}
    for key, module in modules.items():
        named = own_names(parts[key], state[key])
        theirs = {name: value for name, value in named.items() if isinstance(value, torch.Tensor)}
        network = dict(module.named_modules()).get(prefix) if prefix or module is backbone else None
        if network is not None:
            theirs = theirs | _resampled(network, theirs, prefix)
            _refuse_another_backbone(key, network, theirs, prefix)
        fitting[key] = _fitting(module.state_dict(), theirs)
    fresh = []
    for key, part in parts.items():
        if key in fitting:
            own = modules[key].state_dict()
            modules[key].load_state_dict(own | fitting[key])
            fresh += [f"{key}.{name}" for name in own if name not in fitting[key]]
        elif key not in state or not _was_loaded(part, state[key]):
            fresh.append(key)
    return fresh


def _prefix_of(backbone: nn.Module, parts: dict[str, Part]) -> str:
    """The name of ``backbone`` in the part that holds it; none if it is the part itself."""
    modules = (module for part in parts.values() if (module := module_of(part)) is not None)
    return next(name for module in modules for name, child in module.named_modules() if child is backbone)


def _joined(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _was_loaded(part: Part, state: dict) -> bool:
    try:
        part.load_state_dict(state)
    except (RuntimeError, KeyError, ValueError):
        return False
    return True


def _resampled(network: nn.Module, state: dict, prefix: str) -> dict:
    """The positions of another size of images as ``network`` has them, under the name they have in ``state``."""
    name = _joined(prefix, "pos_embed")
    if name not in state or not hasattr(network, "adopt_positions"):
        return {}
    theirs, ours = state[name], network.pos_embed
    square = square_side(theirs.shape[1] - network.num_class_tokens)
    if theirs.shape == ours.shape or theirs.shape[2] != ours.shape[2] or not square:
        return {}
    return {name: network.adopt_positions(theirs)}


def _refuse_another_backbone(key: str, network: nn.Module, state: dict, prefix: str) -> None:
    def needed(tensors: dict) -> dict:
        return {name: tensor for name, tensor in tensors.items() if not NOT_NEEDED.match(name)}

    start = _joined(prefix, "")
    inside = {name.removeprefix(start): value for name, value in state.items() if name.startswith(start)}
    ours, theirs = needed(network.state_dict()), needed(inside)
    for name in {**ours, **theirs}:
        here, there = (tuple(tensors[name].shape) if name in tensors else "none" for tensors in (ours, theirs))
        if here != there:
            kinds = f"its {key} is a {describe(theirs)}, here it is a {describe(ours)}"
            raise UsageError(f"{kinds} ({escape(name)}: {there} there, {here} here)")


def _fitting(own: dict, state: dict) -> dict[str, torch.Tensor]:
    """The tensors of ``state`` that have a place in ``own``.

    One tensor of ours that stands under several names, as heads that are shared do, takes none of several that differ.
    """
    found = {name: state[name] for name, ours in own.items() if name in state and state[name].shape == ours.shape}
    shared: dict[tuple, list[str]] = {}
    for name in found:
        shared.setdefault((own[name].data_ptr(), own[name].shape), []).append(name)
    for first, *others in shared.values():
        if not all(torch.equal(found[first], found[name]) for name in others):
            for name in (first, *others):
                del found[name]
    return found
