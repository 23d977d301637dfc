"""The published ways to measure segmentation: what is put on which maps, and how it is trained and tested."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn

from evaluation.segmentation import LinearHead, Segmenter
from evaluation.semantic_fpn import SemanticFPN
from models.checkpoints import Network
from models.dense import without_class_tokens
from models.layouts.names import State, unwrapped
from models.safe_load import load_file
from models.vit import VisionTransformer
from randomness import counted_seed
from utils import UsageError

_HEAD = 0x5E6


@dataclass(frozen=True)
class Protocol:
    """``blocks``: of twelve, None is the last one whatever their number; their maps pass the final norm or not."""

    blocks: tuple[int, ...] | None
    out_norm: bool
    lr: float
    weight_decay: float
    iterations: int
    batch: int  # images of a step, over all processes
    eval_every: int
    long_side: int  # no image is made longer, in training at ratio 1
    slides: bool = True  # tested with windows; else the whole image at once
    frozen: bool = True
    drop_path: float = 0.0


PROTOCOLS = {
    "linear": Protocol(None, True, 1e-3, 1e-4, 80_000, 8, 10_000, 99_999_999),
    "linear4": Protocol((3, 5, 7, 11), True, 8e-4, 0.05, 160_000, 16, 16_000, 2048),
    "semfpn": Protocol((2, 5, 8, 11), False, 6e-5, 0.01, 40_000, 32, 4_000, 2048, False, False, 0.1),
}


def chosen_blocks(network: Network, protocol: Protocol, asked: Sequence[int] | None) -> tuple[int, ...]:
    """Of ``--blocks``, else the protocol's. Raises UsageError where the network has none such."""
    if not isinstance(network.model, VisionTransformer):
        raise UsageError(f"{network.label}: maps of patches are taken of vision transformers of ours (vit_*)")
    depth = network.model.depth
    if asked is None and protocol.blocks and depth != 12:
        raise UsageError(f"{network.label} has {depth} blocks, the protocol names those of 12: pass --blocks")
    blocks = tuple(asked or protocol.blocks or (depth - 1,))
    if sorted(set(blocks)) != list(blocks) or not 0 <= blocks[0] <= blocks[-1] < depth:
        raise UsageError(f"--blocks {' '.join(map(str, blocks))}: ascending, from 0 to {depth - 1}")
    if len(blocks) != len(protocol.blocks or (0,)):
        raise UsageError(f"--blocks {' '.join(map(str, blocks))}: this head takes {len(protocol.blocks or (0,))}")
    return blocks


def build_segmenter(
    network: Network, head: str, blocks: Sequence[int], classes: int, seed: int, drop_path: float
) -> Segmenter:
    """The network with a head of this kind, whose weights ``seed`` decides."""
    protocol, model = PROTOCOLS[head], network.model
    if not protocol.frozen:
        model = without_class_tokens(model)
        for block, rate in zip(model.blocks, torch.linspace(0, drop_path, model.depth).tolist(), strict=True):
            block.drop_path = rate
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(counted_seed(seed, _HEAD))
        width = model.embed_dim
        if head == "semfpn":
            decoder: nn.Module = SemanticFPN(width, classes)
        else:
            decoder = LinearHead(width * len(blocks), classes, norm=head == "linear")
    return Segmenter(model, blocks, protocol.out_norm, decoder, protocol.frozen)


def parameter_groups(segmenter: Segmenter, weight_decay: float) -> list[dict]:
    """All that is trained; beside a network that is trained too, positions and norms do not decay.

    parity: by words in names, so biases do, and the batch norms of a head, which are called bn in the original (UDI).
    """
    named = [(name, p) for name, p in segmenter.named_parameters() if p.requires_grad]
    spared = [p for name, p in named if re.match(r"network\..*(pos_embed|cls_token|norm)", name)]
    decaying = [p for name, p in named if not any(p is other for other in spared)]
    groups = [{"params": decaying, "weight_decay": weight_decay}]
    return groups + [{"params": spared, "weight_decay": 0.0}] * bool(spared)


def read_head(path: str | Path) -> tuple[str, State]:
    """Kind and tensors of a head in a file of ours, of UNIC's or of mmsegmentation's."""
    path = Path(path)
    if not path.exists():
        raise UsageError(f"--head {path}: neither one of {', '.join(PROTOCOLS)} nor a file")
    file = load_file(path)
    state = file.get("state_dict", file)
    found = {
        name.removeprefix("decode_head."): tensor
        for name, tensor in ((unwrapped(n), t) for n, t in state.items() if isinstance(n, str))
        if name.startswith(("decode_head.", "conv_seg.", "bn.")) and isinstance(tensor, torch.Tensor)
    }
    if "scale_heads.0.0.0.weight" in found:
        raise UsageError(f"--head {path}: a Semantic FPN was trained with its network, and is tested as its run is")
    names = {"conv_seg.weight", "conv_seg.bias"}
    norm = {f"bn.{name}" for name in ("weight", "bias", "running_mean", "running_var")}
    if not names <= found.keys() <= names | norm | {"bn.num_batches_tracked"}:
        raise UsageError(f"--head {path}: holds no linear head (decode_head.conv_seg.weight, ...)")
    return ("linear" if norm <= found.keys() else "linear4"), found


def load_head(segmenter: Segmenter, path: str, state: State, classes: int) -> None:
    """Raises UsageError, in one line, when classes or width are others."""
    theirs, width = state["conv_seg.weight"].shape[:2]
    if theirs != classes:
        raise UsageError(f"--head {path}: a head of {theirs} classes, the images have {classes} (--num_classes)")
    ours = segmenter.decode_head.conv_seg.in_channels
    if width != ours:
        raise UsageError(f"--head {path}: made for maps of width {width}, those of this network have {ours}")
    whole = segmenter.decode_head.state_dict()
    segmenter.decode_head.load_state_dict(whole | {name: tensor.view_as(whole[name]) for name, tensor in state.items()})
