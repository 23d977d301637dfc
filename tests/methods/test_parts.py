"""What checkpoints hold of a method, under whatever names, and what another run takes of it."""

import pytest
import torch
import torch.nn as nn

from methods.parts import Renamed


def to_file(state: dict) -> dict:
    return {f"backbone.{name}": value for name, value in state.items()}


def from_file(state: dict) -> dict:
    return {name.removeprefix("backbone."): value for name, value in state.items()}


def test_a_renamed_module_has_the_files_names_there_and_its_own_here():
    module, other = nn.Linear(2, 3), nn.Linear(2, 3)
    part = Renamed(module, to_file, from_file)
    assert list(part.state_dict()) == ["backbone.weight", "backbone.bias"]
    assert [id(parameter) for parameter in part.parameters()] == [id(parameter) for parameter in module.parameters()]
    part.load_state_dict(to_file(other.state_dict()))
    assert torch.equal(module.weight, other.weight)
    with pytest.raises(RuntimeError):
        part.load_state_dict({"backbone.weight": torch.zeros(2, 3)})
