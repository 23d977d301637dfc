"""Checkpoints: every published layout of this family of methods, read safely and under our names.

    python -m models.checkpoints FILE                    what is this file?
    python -m models.checkpoints FILE --to OUT.pth       its backbone as a flat file that timm loads (or .safetensors)

models/reading.py opens a file and gives its tensors the names of models/vit.py and models/swin.py; models/matching.py
loads them into a network, whole or not at all. Here is which network that is.
"""

import argparse
import hashlib
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
from safetensors import SafetensorError
from safetensors.torch import save_file

from models import ALIASES, FAMILIES, VIL, VIT, backbone_names, build_backbone, family_of
from models.blocks import ACTIVATIONS, Mlp
from models.layouts.checks import unusable
from models.layouts.names import State, to_timm
from models.layouts.positions import Grid, grid_of
from models.layouts.shapes import NAME_OF_SHAPE, advice, arch_of, describe, gated_mlp, remedy, vit_arguments
from models.matching import Report, fit, load_tensors
from models.reading import Info, read_backbone
from models.safe_load import CheckpointError
from models.vit import Variant, VisionTransformer
from utils import Parser, UsageError, run_cli, save_atomically, save_torch, shortened

KEYS_SHOWN, LONGEST_LINE = 16, 600  # of what ``main`` prints

# ---------------------------------------------------------------------------------------------------------------------
# The network that evaluations look at
# ---------------------------------------------------------------------------------------------------------------------


class Network(NamedTuple):
    """A backbone ready to be evaluated, and how to build another like it: ``build_backbone(arch, **arguments)``."""

    model: nn.Module
    arch: str
    arguments: dict
    report: Report | None  # None: random weights
    head: str | None = None  # the teacher in whose space ``model`` shows a student (models/teacher_space.py)

    @property
    def label(self) -> str:
        """``vit_small/16``: as tables name it."""
        name = f"{self.arch}/{self.arguments['patch_size']}" if "patch_size" in self.arguments else self.arch
        return f"{name} in the space of {self.head}" if self.head else name


def weights_hash(model: nn.Module) -> str:
    """sha256 over names, shapes and values of a network's state dict."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def network_from_file(
    path: str | Path,
    checkpoint_key: str = "teacher",
    arch: str | None = None,
    patch_size: int | None = None,
    window_size: int | None = None,
    num_heads: int | None = None,
    act: str | None = None,
    grid: Grid | None = None,
) -> Network:
    """Build the architecture a file was written with, or the given one, and load its backbone into it.

    ``num_heads``, ``act``, ``grid`` (rows and columns of positions): of a vision transformer, which no tensor shows;
    None: as recorded, else as the architecture, and a square.
    """
    state, info = read_backbone(path, checkpoint_key, grid=grid)
    return network_from_state(state, info, arch, patch_size, window_size, num_heads=num_heads, act=act)


def network_from_state(
    state: State,
    info: Info,
    arch: str | None = None,
    patch_size: int | None = None,
    window_size: int | None = None,
    *,
    num_heads: int | None = None,
    act: str | None = None,
    **arguments: object,
) -> Network:
    """``network_from_file`` for what ``read_backbone`` returned; ``arguments``: what its tensors do not show."""
    arch, chosen = choose_architecture(state, info, arch, patch_size, window_size, num_heads, act)
    arguments = chosen | arguments
    model = build_backbone(arch, **arguments)
    report = load_tensors(model, state, info)
    report.assumed = assumed(model, info, num_heads, act)
    return Network(model, arch, arguments, report)


def assumed(model: nn.Module, info: Info, num_heads: int | None, act: str | None) -> str:
    """What was taken for granted of a vision transformer of ours, in words; "" where it was said or recorded."""
    if not isinstance(model, VisionTransformer):
        return ""
    words = []
    if num_heads is None and recorded_heads(info) is None:
        words.append(f"{model.blocks[0].attn.num_heads} heads of attention (--num_heads)")
    if act is None and "act" not in info.arguments and isinstance(model.blocks[0].mlp, Mlp):
        words.append("GELU (--act)")
    if not model.pools_patches and "global_pool" not in info.arguments:
        words.append("the class token as output")
    if not info.grid_known:
        words.append("positions {} x {} (--grid)".format(*model.grid))
    return f"{', '.join(words)}, which no tensor shows" if words else ""


def recorded_heads(info: Info) -> int | None:
    """Heads of attention as the file or the configuration beside it says, where it does."""
    heads = info.arguments.get("num_attention_heads", info.arguments.get("num_heads"))
    return int(heads) if isinstance(heads, int | float) and heads >= 1 else None


def choose_architecture(
    state: State,
    info: Info,
    arch: str | None,
    patch_size: int | None,
    window_size: int | None = None,
    num_heads: int | None = None,
    act: str | None = None,
) -> tuple[str, dict]:
    """(name, arguments) for ``build_backbone``: as asked, else as the shapes say, else as the file records.

    Raises CheckpointError when none of these names a network.
    """
    recorded, others = info.arguments.get("arch"), {}
    if arch is None and any(f.shapes(state) for f in FAMILIES) and not str(recorded).startswith("timm/"):
        arch, others = arch_of(state), _unnamed(state, num_heads or recorded_heads(info))
        arch = others.pop("arch", arch)
        if arch is None and VIL.shapes(state) and recorded in VIL.networks:  # built as the file's string says
            arch = recorded
    elif arch is None and isinstance(recorded, str):
        if recorded not in backbone_names() and not recorded.startswith("timm/"):
            raise CheckpointError(
                f"{info.path}: holds a {describe(state)} with --arch {recorded}, which is unknown here"
            )
        arch = recorded
    if arch is None:
        if num_heads is None and not gated_mlp(state) and (shape := vit_arguments(state)):
            raise CheckpointError(
                f"{info.where}: holds a {describe(state)}; nothing here has its width {shape['embed_dim']}: pass its "
                "--num_heads, or its --arch"
            )
        raise CheckpointError(f"{info.where}: holds a {describe(state)}; {remedy(state)}")
    family, name = family_of(arch), ALIASES.get(arch, arch)
    shape = family.shapes(state) or {}
    asked = {"patch_size": patch_size, "window_size": window_size}
    arguments = family.arguments(shape | {name: value for name, value in asked.items() if value is not None})
    arguments |= {name: shape[name] for name in family.from_file if shape}
    if family is VIT and shape:  # as many positions as the file has, whatever patches are asked for
        rows, columns = (count * arguments["patch_size"] for count in grid_of(state))
        arguments["img_size"] = rows if rows == columns else (rows, columns)
    if family is VIL and info.arguments.get("vil_mode") == -1:  # the others are the same where nothing is trained
        arguments["vil_mode"] = -1
    if family is VIT:  # what no tensor shows
        if info.norm_eps != 1e-6:
            arguments["norm_eps"] = info.norm_eps
        arguments |= others | _attention_and_mlp(name, arguments | others, info, num_heads, act)
    elif num_heads or act:
        raise UsageError(f"--num_heads, --act: {arch} is no vision transformer of ours; leave them out")
    return name, arguments


def _unnamed(state: State, heads: int | None) -> dict:
    """Name and arguments of a plain vision transformer of a depth or width that has no name; {} where it has one.

    One of a named width has that name's heads, unless it is said how many.
    """
    shape = vit_arguments(state)
    if not shape or arch_of(state):
        return {}
    named = {width: name for (width, _), name in NAME_OF_SHAPE.items()}
    name = named.get(shape["embed_dim"], "vit_small" if heads else None)
    own = {key: shape[key] for key in ("embed_dim", "depth", "mlp_ratio")}
    return {"arch": name, **own} if name else {}


def _attention_and_mlp(arch: str, arguments: dict, info: Info, num_heads: int | None, act: str | None) -> dict:
    """The arguments of a vision transformer that no tensor shows, where they are not the architecture's own."""
    usual = VIT.networks[arch](network=dict)
    width, heads = arguments.get("embed_dim", usual["embed_dim"]), num_heads or recorded_heads(info)
    different = {}
    if heads and heads != usual["num_heads"]:
        if width % heads:
            raise UsageError(f"--num_heads {heads}: does not divide the width {width} of {info.where}")
        different["num_heads"] = heads
    act, variant = act or info.arguments.get("act"), arguments.get("variant", Variant())
    if act and act != variant.mlp and variant.mlp in ACTIVATIONS:
        different["variant"] = replace(variant, mlp=act)
    return different


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def add_unseen_arguments(parser: argparse._ActionsContainer) -> None:
    """What no tensor of a vision transformer shows."""
    parser.add_argument("--num_heads", default=None, type=_count, help="of attention; left out: the architecture's own")
    parser.add_argument(
        "--act", default=None, choices=ACTIVATIONS, help="of its MLPs; left out: as recorded, else gelu"
    )
    parser.add_argument(
        "--grid",
        default=None,
        type=_count,
        nargs=2,
        metavar=("ROWS", "COLUMNS"),
        help="of its positions, without the class token; left out: as recorded, else a square",
    )


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: a number, at least 1")
    return int(text)


def main() -> int:
    parser = Parser(
        prog="python -m models.checkpoints", description="Say what a checkpoint is, and convert it for timm."
    )
    parser.add_argument("file", help="checkpoint of any layout")
    parser.add_argument(
        "--checkpoint_key",
        default="teacher",
        help="the network in question: its top-level key, or what its names begin with",
    )
    parser.add_argument("--arch", default=None, help="compare with this architecture; left out: the file's own")
    parser.add_argument("--patch_size", default=None, type=int, help="compare with this patch size; left out: its own")
    add_unseen_arguments(parser)
    parser.add_argument("--to", default=None, help="write the backbone here, .pth or .safetensors, under timm's names")
    args = parser.parse_args()
    state, info = read_backbone(args.file, args.checkpoint_key, grid=args.grid)

    def say(label: str, text: object) -> None:
        print(f"{label:<12}{shortened(text, LONGEST_LINE)}")

    say("file", f"{info.path} ({info.path.stat().st_size / 1e6:.2f} MB)")
    say("layout", info.layout.name)
    say("method", info.method or "not recorded")
    say("epoch", info.epoch if info.epoch is not None else "not recorded")
    for name, content in itertools.islice(info.top_level.items(), KEYS_SHOWN):
        say("key", f"{name}: {content}")
    if len(info.top_level) > KEYS_SHOWN:
        say("key", f"... {len(info.top_level) - KEYS_SHOWN} more")
    say("network", describe(state))
    named = ("arch", "patch_size")  # None: a network without patches
    if recorded := {name: info.arguments[name] for name in named if info.arguments.get(name) is not None}:
        say("recorded", ", ".join(f"--{name} {value}" for name, value in recorded.items()))
    usable = _say_what_matches(state, info, args, say)
    for note in info.notes:
        say("note", note)
    if args.to:
        _convert(state, info, Path(args.to), say)
    if not usable:  # 1: the answer to a question, 2: a file that nothing can be done with
        return 1 if args.arch and not args.to else 2 * (not args.to)
    return 0


def _say_what_matches(state: State, info: Info, args: argparse.Namespace, say: Callable) -> bool:
    shape = vit_arguments(state)
    named = {width for width, _ in NAME_OF_SHAPE}
    if args.arch is None and args.num_heads is None and shape and shape["embed_dim"] not in named:
        model, name = VisionTransformer(**shape, num_heads=1), "a vision transformer of these shapes"
    else:
        try:
            arch, arguments = choose_architecture(
                state, info, args.arch, args.patch_size, num_heads=args.num_heads, act=args.act
            )
            model = build_backbone(arch, **arguments)
        except UsageError as error:
            say("matched", f"not checked: {error}")
            return False
        name = f"{arch}, patch {arguments['patch_size']}" if "patch_size" in arguments else arch
        if words := assumed(model, info, args.num_heads, args.act):
            say("assumed", words)
    fitted, report = fit(model.state_dict(), state, info)
    share = 100 * len(report.matched) / max(1, report.total)
    say("matched", f"{share:.1f} % of {name}: {report}")
    if not report.complete:
        print(f"{report.table()}\n  {shortened(advice(model.state_dict(), state), LONGEST_LINE)}")
    elif why := unusable(model.state_dict(), fitted):
        say("unusable", why)
        return False
    return report.complete


def _convert(state: State, info: Info, target: Path, say: Callable) -> None:
    if not vit_arguments(state):
        raise CheckpointError(
            f"{info.path}: holds a {describe(state)}; only vision transformers are converted for timm"
        )
    if not target.parent.is_dir() or target.is_dir():
        raise UsageError(f"--to {target}: not a file name in an existing directory; create {target.parent} first")
    if target.exists() and target.samefile(info.path):
        raise UsageError(f"--to {target}: this is the checkpoint itself; choose another name")
    flat = {name: tensor for name, tensor in state.items() if info.layout.belongs_to_backbone(name)}
    if "cls_token" in flat and flat["cls_token"].shape[1] > 1:
        say("note", "timm knows one class token: the others are left out, which changes the features slightly")
    flat = to_timm(flat)
    try:
        if target.suffix == ".safetensors":  # timm tells the formats apart by the name
            save_atomically(target, lambda temporary: save_file(_contiguous(flat), temporary))
        else:
            save_torch(flat, target)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"--to {target}: cannot be written: {error}") from error
    say("wrote", f"{target}: {len(flat)} tensors for timm.create_model(..., num_classes=0, checkpoint_path=...)")


def _contiguous(state: State) -> State:
    """With memory of their own, as safetensors wants them."""
    return {name: tensor.clone().contiguous() for name, tensor in state.items()}


if __name__ == "__main__":
    run_cli(main)
