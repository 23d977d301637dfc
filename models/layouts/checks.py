"""What makes tensors of a file no weights: names, types, memory and shapes that no network has."""

import re

import torch

from models.layouts.names import State
from models.safe_load import SHARD, CheckpointError
from utils import shortened

LONGEST_NAME = 400  # characters; wrapped several times, published networks stay below 200
EXPANDED = 2**28  # values: a tensor that claims so many without holding them would be filled in when it is used
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

# of a plain vision transformer: name -> dimensions
PLAIN = ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight")
DIMENSIONS = {"cls_token": 3, "pos_embed": 3, "patch_embed.proj.weight": 4, "register_tokens": 3}
MATRIX = re.compile(r"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.(fc1|fc2|w12|w3))\.weight")


def check_tensors(tensors: State) -> None:
    """Raises CheckpointError for a tensor that cannot be computed with, or cannot be shown."""
    for name, tensor in tensors.items():
        if len(name) > LONGEST_NAME or not name.isprintable():
            raise CheckpointError(
                f"a tensor is called {shortened(name)!r} ({len(name)} characters), which could garble a terminal; "
                "rename it"
            )
        if what := _no_values(tensor):
            advice = "" if SHARD in what else "; save the weights as float32, float16 or bfloat16"
            raise CheckpointError(f"{name} {what}{advice}")


def _no_values(tensor: torch.Tensor) -> str:
    if hasattr(tensor, "device_mesh"):  # a DTensor; its class is not imported for files that have none
        return f"is {SHARD}"
    if tensor.is_meta:
        return "is on the meta device, which holds no values"
    if tensor.layout != torch.strided or tensor.is_quantized:
        return "is sparse or quantised"
    if tensor.is_complex() or (tensor.is_floating_point() and tensor.dtype not in FLOATS):
        return f"is {_type(tensor)}, in which nothing here computes"
    held = tensor.untyped_storage().nbytes()
    if tensor.numel() > EXPANDED and tensor.numel() * tensor.element_size() > held:
        return f"has shape {tuple(tensor.shape)} but only {held} bytes of values, repeated"
    return ""


def _type(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def check_shapes(state: State) -> None:
    """Raises CheckpointError where a plain vision transformer's tensors have shapes from which nothing follows."""
    if not all(name in state for name in PLAIN):
        return
    for name, tensor in state.items():
        dimensions = DIMENSIONS.get(name) or (2 if MATRIX.fullmatch(name) else None)
        if dimensions is not None and (tensor.ndim != dimensions or not tensor.numel()):
            what = "patches are projected by a linear layer, in an order of pixels that is not known"
            linear = (name, tensor.ndim) == ("patch_embed.proj.weight", 2)
            why = what if linear else f"{dimensions} dimensions are expected, none of them 0"
            raise CheckpointError(f"{name} has shape {tuple(tensor.shape)}: {why}")
    patch = state["patch_embed.proj.weight"]
    if patch.shape[2] != patch.shape[3]:
        raise CheckpointError(f"patch_embed.proj.weight has shape {tuple(patch.shape)}: square patches are expected")
    block, values = state["blocks.0.attn.qkv.weight"], sum(tensor.numel() for tensor in state.values())
    depth = 1 + max((int(number) for name in state if (number := _block(name))), default=0)
    if depth * block.numel() > 4 * values:
        raise CheckpointError(
            f"its names count {shortened(str(depth))} blocks, and it does not hold the weights of so many"
        )


def _block(name: str) -> str:
    """The number of the block a tensor is of, as text; "" where there is none that could be counted."""
    match = re.match(r"blocks\.(\d{1,6})\.", name)
    return match[1] if match else ""


def unusable(target: State, state: State) -> str:
    """The first of the tensors ``state`` has for ``target`` that is no finite number of the right kind, in words."""
    for name, tensor in state.items():
        if name not in target or not target[name].is_floating_point():
            continue
        if not tensor.is_floating_point():
            return f"{name} is {_type(tensor)} where the network has {_type(target[name])}: save floating point weights"
        if bad := tensor.numel() - int(tensor.isfinite().sum()):
            return f"{name}: {bad} of its {tensor.numel()} values are NaN or infinite: take an earlier checkpoint"
    return ""
