"""What a checkpoint holds of a method, and how it goes from one run to another.

A part is whatever has ``state_dict`` and ``load_state_dict``: a module, or something that keeps its state otherwise.
"""

from collections.abc import Callable, Iterator
from typing import Protocol

import torch.nn as nn


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
