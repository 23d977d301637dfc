"""Reading a checkpoint: which of its tensors are the network in question, and that network under our names.

A file is opened without running any code in it (models/safe_load.py), and its layout is looked up in models/layouts/.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from models.layouts.names import State, below, grouped, networks_in, renamed, unwrapped
from models.layouts.table import Layout, recognise, recorded_arguments
from models.safe_load import CheckpointError, load_file


@dataclass(frozen=True)
class Info:
    """What a file turned out to be."""

    path: Path
    layout: Layout
    method: str | None
    key: str | None  # top-level key the weights stand under; None: the file itself is the state dict
    epoch: int | None
    arguments: dict  # of the training run
    top_level: dict[str, str]  # key -> what stands there
    prefix: str = ""  # of several networks there, or of one beside other things: what its names begin with
    notes: tuple[str, ...] = ()

    @property
    def where(self) -> str:
        """Path, key and prefix, as messages name them."""
        key, prefix = f", key {self.key!r}" if self.key else "", f", names with {self.prefix}" if self.prefix else ""
        return f"{self.path}{key}{prefix}"


def read_backbone(path: str | Path, checkpoint_key: str = "teacher", *others: str) -> tuple[State, Info]:
    """The network in ``path`` under our names (its heads, if any, among them), and what the file is.

    The weights are looked for under ``checkpoint_key`` and the ``others``, then ``state_dict``, then ``model``, then in
    the file itself; where several networks stand there, ``checkpoint_key`` chooses by what their names begin with.
    Raises CheckpointError when none of these holds tensors, or when it stays open which network is meant.
    """
    file = load_file(path, mapped=True)
    key, tensors = choose_tensors(file, checkpoint_key, path, others)
    try:
        tensors = renamed(tensors, unwrapped)
        prefix, network = choose_network(tensors, checkpoint_key)
        layout, state = recognise(file, network), network
        for step in layout.convert:
            state = step(state)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    notes = []
    place = f"key {key!r}" if key else "the file itself"
    kept = {prefix + name for name in network}
    if aside := [name for name in tensors if name not in kept]:
        notes.append(f"left aside in {place}: {grouped(aside)}")
    if prefix:
        notes.append(f"took the network whose names begin with {prefix} from {place}")
    elif key != checkpoint_key and key not in others:
        notes.append(f"no key {checkpoint_key!r}: took the weights from {place}")
    if layout.method == "dinov2" and "register_tokens" in state:
        notes.append("DINOv2 with registers resizes positions by another rule: features agree at its own size only")
    ours = file["tutelage"] if isinstance(file.get("tutelage"), dict) else {}
    info = Info(
        path=Path(path),
        layout=layout,
        method=layout.method or ours.get("method"),
        key=key,
        epoch=file["epoch"] if isinstance(file.get("epoch"), int) else None,
        arguments=recorded_arguments(file) | {name: ours[name] for name in ("arch",) if name in ours},
        top_level={str(name): _summary(value) for name, value in file.items()} if key else {},
        prefix=prefix,
        notes=tuple(notes),
    )
    return state, info


def choose_tensors(
    file: dict, checkpoint_key: str, path: str | Path = "the file", others: Sequence[str] = ()
) -> tuple[str | None, State]:
    """(top-level key or None, the named tensors there), looked up in the order that ``read_backbone`` states."""
    for key in (checkpoint_key, *others, "state_dict", "model"):
        if tensors := _tensors_of(file.get(key)):
            return key, tensors
    if flat := _tensors_of(file):
        return None, flat
    held = ", ".join(str(key) for key, value in file.items() if _tensors_of(value))
    advice = f"pass --checkpoint_key with one of: {held}" if held else "it holds no weights at all"
    raise CheckpointError(f"{path}: no weights under {checkpoint_key!r}; {advice}")


def choose_network(tensors: State, checkpoint_key: str) -> tuple[str, State]:
    """(prefix, the tensors below it): what ``checkpoint_key`` names, else the network at the root, else the only one.

    A key names a prefix of which it is a part: ``teacher`` stands for ``model.teacher.`` too.
    """
    prefixes = networks_in(tensors)
    named = [prefix for prefix in prefixes if f".{checkpoint_key}." in f".{prefix}"]
    if len(named) == 1:
        prefix = named[0]
    elif not prefixes or "" in prefixes:
        prefix = ""
    elif len(prefixes) == 1:
        prefix = prefixes[0]
    else:
        names = [prefix.removesuffix(".") for prefix in prefixes]
        raise CheckpointError(
            f"holds {len(names)} networks: {', '.join(names)}; choose one, as with --checkpoint_key {names[-1]}"
        )
    return prefix, below(tensors, prefix, prefixes)


def _tensors_of(value) -> State:
    if not isinstance(value, dict):
        return {}
    return {
        name: tensor for name, tensor in value.items() if isinstance(name, str) and isinstance(tensor, torch.Tensor)
    }


def _summary(value) -> str:
    if tensors := _tensors_of(value):
        return f"{len(tensors)} tensors, {sum(t.numel() for t in tensors.values()) / 1e6:.2f} M values"
    return str(value) if isinstance(value, (int, float, str)) else type(value).__name__
