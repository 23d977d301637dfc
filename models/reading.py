"""Reading a checkpoint: which of its tensors are the network in question, and that network under our names.

A file is opened without running any code in it (models/safe_load.py), and its layout is looked up in models/layouts/.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from models.blocks import ACTIVATIONS
from models.layouts.checks import check_shapes, check_tensors
from models.layouts.names import State, below, grouped, listed, networks_in, renamed, unwrapped
from models.layouts.positions import Grid, lay_out_positions
from models.layouts.shapes import describe
from models.layouts.table import Layout, recognise, recorded_arguments
from models.safe_load import CheckpointError, load_file
from utils import shortened

DEFAULT_KEY = "teacher"  # the one key that a file need not have: FALLBACKS serve it
FALLBACKS = ("state_dict", "model")
QUERY = re.compile(r"(^|\.)(base_encoder|encoder_q)\.$")  # MoCo's network, beside that of its keys
AVERAGED = re.compile(r"(^|_)(ema|averaged)(_|$)")  # keys of averages of the weights beside them: model_ema


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
    norm_eps: float = 1e-6
    prefix: str = ""  # of several networks there, or of one beside other things: what its names begin with
    notes: tuple[str, ...] = ()
    grid_known: bool = False  # of positions: told or recorded

    @property
    def where(self) -> str:
        """Path, key and prefix, as messages name them."""
        key, prefix = f", key {self.key!r}" if self.key else "", f", names with {self.prefix}" if self.prefix else ""
        return f"{self.path}{key}{prefix}"


def read_backbone(
    path: str | Path, checkpoint_key: str = "teacher", *others: str, grid: Grid | None = None
) -> tuple[State, Info]:
    """The network in ``path`` under our names (its heads, if any, among them), and what the file is.

    The weights are looked for under ``checkpoint_key`` and the ``others``, then ``state_dict``, then ``model``, then in
    the file itself; where several networks stand there, ``checkpoint_key`` chooses by what their names begin with.
    ``grid``: rows and columns of a vision transformer's positions; None: as recorded, else a square.
    Raises CheckpointError when none of these holds tensors, or when it stays open which network is meant.
    """
    file = load_file(path, mapped=True)
    key, tensors = choose_tensors(file, checkpoint_key, path, others)
    try:
        check_tensors(tensors)
        tensors = renamed(tensors, unwrapped)
        prefix, network = choose_network(tensors, checkpoint_key)
        layout, state = recognise(file, network), network
        for step in layout.convert:
            state = step(state)
        config = config_beside(Path(path), layout)
        state, known = lay_out_positions(state, grid, config | recorded_arguments(file), layout.class_position)
        check_shapes(state)
        describe(state)  # the same conclusions as later, when nobody expects an error
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except (ArithmeticError, LookupError, TypeError, ValueError, RuntimeError) as error:
        why = shortened(str(error).strip().split("\n")[0]) or type(error).__name__
        raise CheckpointError(f"{path}: its tensors have shapes that no network has ({why})") from error
    notes = []
    place = f"key {key!r}" if key else "the file itself"
    kept = {prefix + name for name in network}
    if aside := [name for name in tensors if name not in kept]:
        notes.append(f"left aside in {place}: {grouped(aside)}")
    if prefix:
        notes.append(f"took the network whose names begin with {prefix} from {place}")
    elif key != checkpoint_key and key not in others:
        if checkpoint_key != DEFAULT_KEY and not others:
            held = [name for name, value in file.items() if isinstance(name, str) and _tensors_of(value)]
            there = f"it has {listed(held)}" if held else "its weights stand at its top level, so leave the option out"
            raise CheckpointError(f"{path}: no key {shortened(checkpoint_key)!r}; {there}")
        notes.append(f"no key {checkpoint_key!r}: took the weights from {place}")
    notes += _averages(file, key, tensors, prefix)
    norm_eps = config.get("layer_norm_eps", layout.norm_eps)
    notes += _differences(layout, state, norm_eps)
    ours = file["tutelage"] if isinstance(file.get("tutelage"), dict) else {}
    info = Info(
        path=Path(path),
        layout=layout,
        method=layout.method or ours.get("method"),
        key=key,
        epoch=file["epoch"] if isinstance(file.get("epoch"), int) else None,
        arguments=recorded_arguments(file)
        | config
        | {name: ours[name] for name in ("arch", "image_size") if name in ours},
        top_level={shortened(str(name)): _summary(value) for name, value in file.items()} if key else {},
        norm_eps=norm_eps,
        prefix=prefix,
        notes=tuple(notes),
        grid_known=known,
    )
    return state, info


def choose_tensors(
    file: dict, checkpoint_key: str, path: str | Path = "the file", others: Sequence[str] = ()
) -> tuple[str | None, State]:
    """(top-level key or None, the named tensors there), looked up in the order that ``read_backbone`` states."""
    for key in (checkpoint_key, *others, *FALLBACKS):
        if tensors := _tensors_of(file.get(key)):
            return key, tensors
    if flat := _tensors_of(file):
        return None, flat
    held = listed(str(key) for key, value in file.items() if _tensors_of(value))
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
    elif checkpoint_key == DEFAULT_KEY and len(queries := [p for p in prefixes if QUERY.search(p)]) == 1:
        prefix = queries[0]  # its authors evaluate that one
    else:
        names = [prefix.removesuffix(".") for prefix in prefixes]
        raise CheckpointError(
            f"holds {len(names)} networks: {listed(names)}; choose one, as with --checkpoint_key {shortened(names[-1])}"
        )
    return prefix, below(tensors, prefix, prefixes)


def config_beside(path: Path, layout: Layout) -> dict:
    """What ``config.json`` beside a file says of its network and no tensor shows; {} where there is none.

    Hugging Face's library and timm write such files. Raises CheckpointError for what our networks do not do.
    """
    path = path.with_name("config.json")
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text())
        if not layout.name.startswith("Hugging Face"):
            return _timm_config(config) if isinstance(config, dict) and "architecture" in config else {}
        known = {name: config[name] for name in ("layer_norm_eps", "num_attention_heads") if name in config}
        activation = config.get("hidden_act", "gelu")
        known = {name: float(value) for name, value in known.items()}
        known |= {"image_size": config["image_size"]} if "image_size" in config else {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); mend it, or move it away from the weights") from error
    if activation not in ACTIVATIONS:
        raise CheckpointError(
            f"{path}: hidden_act is {shortened(activation)!r}; the vision transformers here have "
            f"{' or '.join(ACTIVATIONS)}"
        )
    return known | {"act": activation}


def _timm_config(config: dict) -> dict:
    """Of a configuration of timm what choose_architecture reads. Plain vision transformers are those of this house."""
    arguments = config.get("model_args") if isinstance(config.get("model_args"), dict) else {}
    architecture, found = str(config["architecture"]), {}
    if isinstance(arguments.get("num_heads"), int):
        found["num_heads"] = arguments["num_heads"]
    pretrained = config.get("pretrained_cfg") if isinstance(config.get("pretrained_cfg"), dict) else {}
    if size := arguments.get("img_size", pretrained.get("input_size")):
        found["img_size"] = size
    act = arguments.get("act_layer", "quick_gelu" if "quickgelu" in architecture else "gelu")
    pool = arguments.get("global_pool", config.get("global_pool", "token"))
    if not architecture.startswith("vit_") or act not in ACTIVATIONS or pool != "token":
        return found | {"arch": f"timm/{architecture}", "global_pool": pool}
    return found | {"act": act, "global_pool": pool}


def _averages(file: dict, key: str | None, tensors: State, prefix: str) -> list[str]:
    """That averages of the weights lie beside those taken, and how to take them."""
    if key is not None and not AVERAGED.search(key):
        beside = [k for k, value in file.items() if isinstance(k, str) and AVERAGED.search(k) and _tensors_of(value)]
        notes = [f"took key {key!r}; averages (EMA) lie beside it: --checkpoint_key {shortened(k)}" for k in beside]
        if notes:
            return notes[:1]
    others = [p.removesuffix(".") for p in networks_in(tensors) if p != prefix and AVERAGED.search(p.removesuffix("."))]
    return [f"averages (EMA) lie beside the network taken: --checkpoint_key {shortened(p)}" for p in others[:1]]


def _differences(layout: Layout, state: State, norm_eps: float) -> list[str]:
    """What is not the same here as where the file comes from."""
    notes = []
    if layout.name.startswith("Hugging Face"):
        notes.append("Hugging Face's library resizes positions by another rule: features agree at its own size only")
    if norm_eps != 1e-6:
        notes.append(f"its norms add {norm_eps:g} to the variance; a file written from it is read with 1e-06")
    return notes


def _tensors_of(value) -> State:
    if not isinstance(value, dict):
        return {}
    return {
        name: tensor for name, tensor in value.items() if isinstance(name, str) and isinstance(tensor, torch.Tensor)
    }


def _summary(value) -> str:
    if tensors := _tensors_of(value):
        return f"{len(tensors)} tensors, {sum(t.numel() for t in tensors.values()) / 1e6:.2f} M values"
    return shortened(str(value)) if isinstance(value, (int, float, str)) else type(value).__name__
