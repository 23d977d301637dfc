"""Loading tensors of a file into a network, and saying what matched.

A backbone is loaded whole or not at all: ``load_backbone`` refuses, with a table of what did not match, instead of
leaving some weights random.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch.nn as nn

from models.layouts.checks import unusable
from models.layouts.names import NOT_NEEDED, State, grouped, plain_names, to_timm
from models.layouts.shapes import advice, vit_arguments
from models.reading import Info, read_backbone
from models.safe_load import CheckpointError
from utils import shortened


@dataclass
class Report:
    """How the tensors of a file and those of a network compare; names are ours, shapes are tuples."""

    info: Info
    total: int  # tensors of the network that a file must bring, and what it brought besides
    matched: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)  # in the network, not in the file
    unexpected: list[str] = field(default_factory=list)  # in the file, not in the network
    mismatched: list[tuple[str, tuple, tuple]] = field(default_factory=list)  # name, network's shape, file's shape
    ignored: list[str] = field(default_factory=list)  # in the file, and no part of a backbone
    untouched: list[str] = field(default_factory=list)  # in the network, and not needed for evaluation
    assumed: str = ""  # what no tensor shows, in words

    @property
    def complete(self) -> bool:
        return not (self.missing or self.unexpected or self.mismatched)

    def __str__(self) -> str:
        ignored = f"; ignored {grouped(self.ignored)}" if self.ignored else ""
        untouched = f"; left as initialised: {grouped(self.untouched)}" if self.untouched else ""
        return f"matched {len(self.matched)} of {self.total} tensors{ignored}{untouched}"

    def table(self, rows: int = 8) -> str:
        """What did not match, one name a line, the first ``rows`` of each kind."""
        mismatched = [(shortened(name), *shapes) for name, *shapes in self.mismatched[:rows]]
        lines = [f"shape       {name}: network {ours}, file {theirs}" for name, ours, theirs in mismatched]
        for kind, names in (("missing", self.missing), ("unexpected", self.unexpected)):
            lines += [f"{kind:<11} {shortened(name)}" for name in names[:rows]]
            lines += [f"{kind:<11} ... {len(names) - rows} more"] * (len(names) > rows)
        lines += [f"shape       ... {len(self.mismatched) - rows} more"] * (len(self.mismatched) > rows)
        return "\n".join(f"  {line}" for line in lines)


def compare(target: State, state: State, info: Info) -> Report:
    """Sort the names of a file and of a network's state dict into what matched and what did not."""
    needed = [name for name in target if not NOT_NEEDED.match(name)]
    report = Report(info, total=len(needed))
    for name, tensor in state.items():
        if name in target and target[name].shape == tensor.shape:
            report.matched.append(name)
        elif name in needed:
            report.mismatched.append((name, tuple(target[name].shape), tuple(tensor.shape)))
        elif not info.layout.belongs_to_backbone(name):
            report.ignored.append(name)
        else:
            report.unexpected.append(name)
    report.missing = [name for name in needed if name not in state]
    report.total += sum(name not in needed for name in report.matched)
    report.untouched = [name for name in target if name not in needed and name not in report.matched]
    return report


def load_backbone(model: nn.Module, path: str | Path, checkpoint_key: str = "teacher") -> Report:
    """Fill ``model`` with the backbone in ``path``; all of it or nothing.

    Ignored on purpose, and listed in the report: heads, mask tokens, pooling norms, what only pretraining used.
    Raises CheckpointError, with a table and advice, when a tensor is missing, has another shape or has no place.
    """
    return load_tensors(model, *read_backbone(path, checkpoint_key))


def load_tensors(model: nn.Module, state: State, info: Info) -> Report:
    """``load_backbone`` for what ``read_backbone`` returned."""
    state, report = fit(model.state_dict(), state, info)
    if not report.complete:
        raise CheckpointError(
            f"{info.where}: does not fit the network: {report}. {advice(model.state_dict(), state)}\n{report.table()}"
        )
    if why := unusable(model.state_dict(), state):
        raise CheckpointError(f"{info.where}: {why}")
    model.load_state_dict(model.state_dict() | {name: state[name] for name in report.matched})
    return report


def fit(target: State, state: State, info: Info) -> tuple[State, Report]:
    """The naming of ``state``, ours, timm's or with the network's own wrappers, under which most matches ``target``."""
    own = plain_names(target)
    namings = [state, {own.get(name, name): tensor for name, tensor in state.items()}]
    if vit_arguments(state):
        namings += [to_timm(state, fold_class_position=fold) for fold in (False, True)]
    reports = [compare(target, naming, info) for naming in namings]
    best = max(range(len(reports)), key=lambda i: (reports[i].complete, len(reports[i].matched)))
    return namings[best], reports[best]
