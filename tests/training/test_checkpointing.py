import copy
import os
from pathlib import Path

import pytest
import torch

from training.checkpointing import _keep_as, _load_optimizer
from training.optim import build_optimizer, optimizer_step
from utils import UsageError


def test_a_second_name_replaces_the_file_that_had_it(tmp_path):
    latest, previous = tmp_path / "latest", tmp_path / "previous"
    latest.write_text("new")
    previous.write_text("old")
    _keep_as(latest, previous)
    assert (latest.read_text(), previous.read_text()) == ("new", "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "previous"]


def test_two_names_of_one_file_stay_as_they_are(tmp_path):
    latest, previous = tmp_path / "latest", tmp_path / "previous"
    latest.write_text("same")
    os.link(latest, previous)
    for _ in range(2):
        _keep_as(latest, previous)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "previous"]


@pytest.mark.parametrize("links", [True, False])
def test_what_a_killed_process_left_does_not_matter(tmp_path, monkeypatch, links):
    latest, previous = tmp_path / "latest", tmp_path / "previous"
    latest.write_text("new")
    rest = tmp_path / f"previous.tmp{os.getpid()}"
    os.link(latest, rest)
    if not links:

        def no_links(*_):
            raise OSError("this file system has no links")

        monkeypatch.setattr(os, "link", no_links)
    _keep_as(latest, previous)
    assert (latest.read_text(), previous.read_text()) == ("new", "new")
    assert not rest.exists()


def weights() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.arange(1.0, 4.0)), torch.nn.Parameter(torch.ones(2, 2))]


def step(optimizer: torch.optim.Optimizer, gate: torch.Tensor | None) -> None:
    for group in optimizer.param_groups:
        group["lr"] = 0.1
        for parameter in group["params"]:
            parameter.grad = parameter.detach().cos() if parameter.requires_grad else None
    optimizer_step(optimizer, None, gate)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_an_optimiser_of_the_original_code_goes_on_where_every_step_has_a_gate(name):
    """As on GPUs. Its file says ``fused: None``; its counters and moments are taken, how it computed is not."""
    theirs, ours = weights(), weights()
    kind = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[name]
    original = kind(theirs, lr=0.1, weight_decay=0.0, **({"momentum": 0.9} if name == "sgd" else {}))
    theirs[1].requires_grad_(False)  # as the last layer in the first epochs
    step(original, None)
    theirs[1].requires_grad_(True)
    with torch.no_grad():
        for mine, parameter in zip(ours, theirs, strict=True):
            mine.copy_(parameter)
    optimizer = build_optimizer(name, [{"params": ours, "weight_decay": 0.0, "lr_multiplier": 0.5}])
    state = copy.deepcopy(original.state_dict())
    assert not state["param_groups"][0]["fused"]
    _load_optimizer(optimizer, state, Path("checkpoint.pth"))
    assert optimizer.param_groups[0]["fused"] and optimizer.param_groups[0]["lr_multiplier"] == 0.5
    assert not state["param_groups"][0]["fused"]  # what was given is left as it was
    step(optimizer, torch.zeros(()))
    assert all(torch.equal(mine, parameter) for mine, parameter in zip(ours, theirs, strict=True))
    step(optimizer, torch.ones(()))
    step(original, None)
    for mine, parameter in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, parameter)


def test_an_optimiser_of_other_groups_is_refused():
    optimizer = build_optimizer("adamw", [{"params": weights()}])
    state = torch.optim.AdamW([{"params": [parameter]} for parameter in weights()]).state_dict()
    with pytest.raises(UsageError, match=r"checkpoint\.pth: its optimiser does not fit this run: 2 groups there"):
        _load_optimizer(optimizer, state, Path("checkpoint.pth"))
