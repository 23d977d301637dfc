"""The backbone of a checkpoint as a flat file of its own: what fine-tuning, and other codes, load.

    python eval_finetuning/extract_backbone_weights_for_finetuning.py checkpoint.pth backbone.pth            as in iBOT
    python eval_finetuning/extract_backbone_weights_for_finetuning.py --checkpoint F --output X.pth          as in UDI

Every layout that models/checkpoints.py reads; the names are those of models/vit.py and models/swin.py. The file is
opened again and compared before the command says that it is there. eval_finetuning.py takes checkpoints themselves too.
"""

import argparse
import re
from pathlib import Path

import torch

from models.adapt import select_class_tokens
from models.checkpoints import network_from_file
from models.layouts.names import NOT_NEEDED, State
from models.layouts.shapes import arch_of, describe, swin_arguments, vit_arguments
from models.matching import load_tensors
from models.reading import Info, read_backbone
from models.safe_load import CheckpointError
from models.vit import VisionTransformer
from utils import Parser, UsageError, run_cli, save_torch

VIT = r"(cls_token|pos_embed|pos_grid|register_tokens|patch_embed|blocks|norm)(\.|$)"
SWIN = r"(patch_embed|layers|norm)\."


def backbone_only(state: State, info: Info, num_class_tokens: int | None = 1) -> State:
    """The tensors of the backbone with so many class tokens (None: all), each with memory of its own.

    Raises CheckpointError where there is neither a vision transformer nor a Swin, or not all of it.
    """
    shape, names = vit_arguments(state), SWIN
    if shape is None and swin_arguments(state) is None:
        raise CheckpointError(f"{info.path}: holds a {describe(state)}; no vision transformer or Swin to be extracted")
    if shape is not None:
        load_tensors(VisionTransformer(**shape, num_heads=1), state, info)
        names = VIT + r"|fc_norm\." * shape["use_mean_pooling"]
        if num_class_tokens is not None:
            state = select_class_tokens(state, num_class_tokens)
    kept = {name: tensor for name, tensor in state.items() if re.match(names, name) and not NOT_NEEDED.match(name)}
    return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in kept.items()}


def check_written(path: Path, flat: State) -> None:
    """Open the file as any evaluation would. Raises CheckpointError when it is not what was written."""
    state, _ = read_backbone(path)
    if state.keys() != flat.keys() or not all(torch.equal(state[name], flat[name]) for name in flat):
        raise CheckpointError(f"{path}: reads differently from what was written; delete it, and check the disk")
    if arch_of(flat):
        network_from_file(path)


def get_args_parser() -> Parser:
    parser = Parser(
        prog="extract_backbone_weights_for_finetuning.py", description="Write a checkpoint's backbone as a flat file."
    )
    add = parser.add_argument
    add("files", nargs="*", metavar="checkpoint output", help="the two files, unless options name them")
    add("--checkpoint", default=None, metavar="FILE", help="checkpoint of any layout")
    add("--output", default=None, metavar="FILE", help="where the backbone goes; must end in .pth")
    add(
        "--checkpoint_key",
        default="teacher",
        help="which network of a file to take: its key, or what its names begin with",
    )
    add(
        "--num_class_tokens",
        default="1",
        choices=["keep", "1", "0"],
        help="of networks with several (UDI): 1 for fine-tuning, keep for frozen features, 0 for dense tasks",
    )
    return parser


def paths(args: argparse.Namespace) -> tuple[Path, Path]:
    given = [*args.files, *(path for path in (args.checkpoint, args.output) if path is not None)]
    if len(given) != 2 or len(args.files) == 1:
        raise UsageError("name two files: checkpoint output, or --checkpoint FILE --output FILE.pth")
    source, target = map(Path, given)
    if target.suffix != ".pth":
        raise UsageError(f"--output {target}: the name must end in .pth")
    if not target.parent.is_dir() or target.is_dir():
        raise UsageError(f"--output {target}: not a file name in an existing directory; create {target.parent} first")
    if target.exists() and source.exists() and target.samefile(source):
        raise UsageError(f"--output {target}: this is the checkpoint itself; choose another name")
    return source, target


def main() -> None:
    args = get_args_parser().parse_args()
    source, target = paths(args)
    state, info = read_backbone(source, args.checkpoint_key)
    flat = backbone_only(state, info, None if args.num_class_tokens == "keep" else int(args.num_class_tokens))
    print(f"{source}: {info.layout.name}, {describe(state)}")
    for note in info.notes:
        print(f"{source}: {note}")
    tokens = state["cls_token"].shape[1] if "cls_token" in state else 0
    if tokens > 1 and args.num_class_tokens != "keep":
        print(f"{args.num_class_tokens} of {tokens} class tokens are kept, which changes the features slightly")
    try:
        save_torch(flat, target)
    except OSError as error:
        raise UsageError(f"--output {target}: cannot be written: {error}") from error
    check_written(target, flat)
    print(f"wrote {target}: {len(flat)} tensors, {sum(t.numel() for t in flat.values()) / 1e6:.2f} M values")


if __name__ == "__main__":
    run_cli(main)
