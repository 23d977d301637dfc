"""Which network the tensors of a file are, by their names and shapes, and what to pass for it."""

import itertools
import re
from collections.abc import Collection

from models.layouts.checks import check_shapes
from models.layouts.libraries import resnet_of
from models.layouts.names import State
from models.layouts.positions import grid_of
from models.layouts.stages import CVT_OF_SHAPE, VIL_OF_DEPTHS, cvt_arguments, vil_arguments
from models.vit import Variant
from utils import shortened

NAME_OF_SHAPE = {  # (width, blocks); a test compares it with models/vit.py
    (128, 4): "vit_micro",
    (192, 12): "vit_tiny",
    (384, 12): "vit_small",
    (768, 12): "vit_base",
    (1024, 24): "vit_large",
    (1280, 32): "vit_huge",
    (1536, 40): "vit_giant2",
}


def vit_arguments(state: State) -> dict | None:
    """Arguments of ``VisionTransformer``, all but ``num_heads``, which no shape shows; None for other networks."""
    try:
        patch, positions, classes = state["patch_embed.proj.weight"], state["pos_embed"], state.get("cls_token")
        qkv, gated = state["blocks.0.attn.qkv.weight"], "blocks.0.mlp.w12.weight" in state
        hidden = state["blocks.0.mlp.w3.weight"].t() if gated else state["blocks.0.mlp.fc1.weight"]
    except KeyError:
        return None
    check_shapes(state)
    if classes is None and (positions.ndim != 3 or patch.ndim != 4 or hidden.ndim != 2 or "attn_pool.latent" in state):
        return None
    grid = grid_of(state)
    if grid is None or qkv.shape[0] != 3 * patch.shape[0]:
        return None
    rows, columns = (count * patch.shape[-1] for count in grid)
    return {
        "embed_dim": patch.shape[0],
        "depth": count_blocks(state),
        "patch_size": patch.shape[-1],
        "img_size": rows if rows == columns else (rows, columns),
        "mlp_ratio": hidden.shape[0] / hidden.shape[1] * (1.5 if gated else 1),
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        "init_values": 1e-5 if "blocks.0.gamma_1" in state else 0.0,
        "num_class_tokens": 0 if classes is None else classes.shape[1],
        "num_registers": state["register_tokens"].shape[1] if "register_tokens" in state else 0,
        "use_mean_pooling": "fc_norm.weight" in state and "norm.weight" not in state,
        "variant": Variant(mlp="swiglu" if gated else "gelu"),
    }


def count_blocks(state: State) -> int:
    """Blocks from 0 on; a number that leaves a gap of more than one is no block of this network."""
    numbers = {int(match[1]) for name in state if (match := re.match(r"blocks\.(\d{1,6})\.", name))}
    return next(number for number in itertools.count() if not {number, number + 1} & numbers)


SWIN_OF_SHAPE = {  # (width of the first stage, blocks of every stage); a test compares it with models/swin.py
    (32, (1, 1, 2, 1)): "swin_micro",
    (96, (2, 2, 6, 2)): "swin_tiny",
    (96, (2, 2, 18, 2)): "swin_small",
    (128, (2, 2, 18, 2)): "swin_base",
    (192, (2, 2, 18, 2)): "swin_large",
}


def swin_arguments(state: State) -> dict | None:
    """Arguments of ``SwinTransformer``, all but ``img_size``; None for other networks.

    The window is the largest of all stages: in the last ones it is as small as the map was when the network was built.
    """
    table = re.compile(r"layers\.(\d{1,3})\.blocks\.(\d{1,6})\.attn\.relative_position_bias_table")
    tables = {tuple(map(int, m.groups())): tensor for name, tensor in state.items() if (m := table.fullmatch(name))}
    numbers = sorted({stage for stage, _ in tables})
    if numbers != list(range(len(numbers))):
        return None
    try:
        patch, hidden = state["patch_embed.proj.weight"], state["layers.0.blocks.0.mlp.fc1.weight"]
        heads = tuple(tables[stage, 0].shape[1] for stage in range(1 + max(stage for stage, _ in tables)))
    except (KeyError, ValueError):
        return None
    return {
        "embed_dim": patch.shape[0],
        "depths": tuple(sum(stage == s for s, _ in tables) for stage in range(len(heads))),
        "num_heads": heads,
        "patch_size": patch.shape[-1],
        "mlp_ratio": hidden.shape[0] / hidden.shape[1],
        "window_size": max(round(tensor.shape[0] ** 0.5 + 1) // 2 for tensor in tables.values()),
    }


def arch_of(state: State) -> str | None:
    """The name of the architecture among ours, from the shapes; None for any other."""
    if shape := vit_arguments(state):
        return NAME_OF_SHAPE.get((shape["embed_dim"], shape["depth"]))
    if shape := swin_arguments(state):
        return SWIN_OF_SHAPE.get((shape["embed_dim"], shape["depths"]))
    if shape := cvt_arguments(state):
        return CVT_OF_SHAPE.get((shape["embed_dims"], shape["depths"]))
    if shape := vil_arguments(state):
        return VIL_OF_DEPTHS.get(shape["depths"])
    return resnet_of(state)


GATED = re.compile(r"blocks\.\d+\.mlp\.(w1|gate_proj|fc1_g)\.weight")


def gated_mlp(state: State) -> str | None:
    """The name of a weight that shows a gate in a vision transformer's blocks that is not DINOv2's SwiGLU."""
    for name, tensor in state.items():
        second = state.get(name.replace(".fc1.", ".fc2."))
        packed = re.fullmatch(r"blocks\.\d+\.mlp\.fc1\.weight", name) and second is not None
        if GATED.fullmatch(name) or (packed and tensor.shape[0] == 2 * second.shape[1]):
            return name
    return None


def _typical(front: str, once: str, block: str, parts: str) -> list[str]:
    return [front + name for name in once.split()] + [block + name for name in parts.split()]


_PARTS = "norm1 attn.qkv attn.proj norm2 mlp.fc1 mlp.fc2"
_HUGGING = "cls_token position_embeddings patch_embeddings.projection"
_HUGGING_PARTS = "attention.attention.query attention.attention.key attention.attention.value attention.output.dense"
NAMES = {  # what tensors of a layout are called, for the nearest of what is unknown
    "DINO, iBOT, MAE and timm": _typical("", "cls_token pos_embed patch_embed.proj norm", "blocks.0.", _PARTS),
    "DINOv2 and UNIC": _typical("", "cls_token pos_embed patch_embed.proj norm", "blocks.0.0.", _PARTS),
    "Swin": _typical("", "patch_embed.proj patch_embed.norm norm", "layers.0.blocks.0.", _PARTS),
    "Hugging Face's ViT": _typical(
        "embeddings.", _HUGGING, "layer.0.", f"{_HUGGING_PARTS} layernorm_before layernorm_after intermediate.dense"
    ),
    "Hugging Face's Dinov2": _typical(
        "embeddings.", _HUGGING, "layer.0.", f"{_HUGGING_PARTS} norm1 norm2 layer_scale1 layer_scale2 mlp.fc1 mlp.fc2"
    ),
    "torchvision's ResNet": _typical("", "conv1 bn1", "layer1.0.", "conv1 bn1 conv2 bn2 downsample.0"),
    "CLIP": _typical(
        "visual.", "class_embedding positional_embedding conv1", "visual.transformer.resblocks.0.", "ln_1"
    ),
}


def nearest_layout(names: Collection[str]) -> str:
    """The layout that shares most names with those of an unknown network, wherever in it they stand."""
    plain = [re.sub(r"\.(weight|bias|lambda1)$", "", name) for name in names]
    theirs = {"." + re.sub(r"(?<=\.)\d+(?=\.)", "0", name) for name in plain}

    def shared(layout: str) -> list[str]:
        return [name for name in NAMES[layout] if any(other.endswith(f".{name}") for other in theirs)]

    nearest = max(NAMES, key=lambda layout: len(shared(layout)) / len(NAMES[layout]))
    missing = [name for name in NAMES[nearest] if name not in shared(nearest)]
    if len(missing) == len(NAMES[nearest]):
        return "no layout known here has a name in common with it"
    rest = f", not {', '.join(missing[:3])}" + ", ..." * (len(missing) > 3) if missing else ""
    return f"nearest is {nearest}: it has {len(NAMES[nearest]) - len(missing)} of {len(NAMES[nearest])} names{rest}"


def describe(state: State) -> str:
    """What network the tensors are, in words."""
    if name := gated_mlp(state):
        return f"vision transformer with a gated MLP ({name}) that is not DINOv2's"
    shape = vit_arguments(state)
    if shape:
        name = arch_of(state) or "vision transformer"
        rows, columns = grid_of(state)
        pixels = f"{shape['img_size']} px" if rows == columns else "{} x {} px".format(*shape["img_size"])
        extras = [f"{shape['num_class_tokens']} class tokens"] * (shape["num_class_tokens"] > 1)
        extras += [f"{shape['num_registers']} registers"] * (shape["num_registers"] > 0)
        extras += ["LayerScale"] * (shape["init_values"] > 0)
        extras += ["SwiGLU"] * (shape["variant"].mlp == "swiglu")
        extras += ["mean pooling"] * (shape["use_mean_pooling"] or not shape["num_class_tokens"])
        extras += ["no class token"] * (not shape["num_class_tokens"])
        return ", ".join(
            [
                f"{name} (width {shape['embed_dim']}, {shape['depth']} blocks)",
                f"patch {shape['patch_size']}",
                f"{rows} x {columns} positions ({pixels})",
                *extras,
            ]
        )
    if count := open_positions(state):
        return f"vision transformer whose {count} positions are of a grid that nothing tells"
    if shape := swin_arguments(state):
        blocks = "+".join(map(str, shape["depths"]))
        return (
            f"{arch_of(state) or 'Swin transformer'} (width {shape['embed_dim']}, {blocks} blocks), "
            f"patch {shape['patch_size']}, window {shape['window_size']}"
        )
    if shape := cvt_arguments(state):
        blocks, widths = ("+".join(map(str, shape[name])) for name in ("depths", "embed_dims"))
        bias = ", relative bias" * shape["rel_pos_embed"]
        return f"{arch_of(state) or 'CvT'} (widths {widths}, {blocks} blocks){bias}"
    if shape := vil_arguments(state):
        return f"{arch_of(state) or 'Vision Longformer'} ({shape['vil_arch']}), built for {shape['img_size']} px"
    if name := resnet_of(state):
        return f"{name} of {len(state)} tensors"
    kinds = {
        "layers.0.": "transformer of several stages",
        "stage0.0.proj.": "CvT",
        "layer1.0.norm_embed.": "Vision Longformer",
        "layer1.0.conv1.": "ResNet",
        "visual.": "CLIP",
        "module.linear.": "linear classifier",
        "linear.": "linear classifier",
    }
    if kind := next((kind for prefix, kind in kinds.items() if any(n.startswith(prefix) for n in state)), None):
        return f"{kind} of {len(state)} tensors"
    if any(name.endswith("flat_param") for name in state):
        return f"run's shards as FSDP keeps them ({len(state)} flat tensors), which no names tell apart"
    names = ", ".join(map(shortened, list(state)[:3])) + ", ..." * (len(state) > 3)
    return f"network of unknown names, {len(state)} tensors ({names}); {nearest_layout(state)}"


def open_positions(state: State) -> int:
    """How many positions a plain vision transformer has whose grid is not known (models/layouts/positions.py), or 0."""
    names = {"pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.0.mlp.fc1.weight"}
    if any(mark in state for mark in TIMM_ONLY) or not names <= state.keys() or vit_arguments(state):
        return 0
    if {state["pos_embed"].ndim, state.get("cls_token", state["pos_embed"]).ndim} != {3}:
        return 0
    return state["pos_embed"].shape[1] if grid_of(state) is None else 0


def remedy(state: State) -> str:
    """What to do about a file that shows no network of ours."""
    if gated_mlp(state):
        return "take a network without it; of those with a gate only DINOv2's giant is known here"
    if any(shapes(state) for shapes in (vit_arguments, swin_arguments, cvt_arguments, vil_arguments)):
        return "nothing here has that shape: pass its --arch"
    if any(name.endswith("flat_param") for name in state):
        return "save it with StateDictType.FULL_STATE_DICT"
    if open_positions(state):
        return "say it: pass --grid ROWS COLUMNS, without the class token"
    if example := next((example for mark, example in TIMM_ONLY.items() if mark in state), None):
        return f"of timm --arch timm/{example} and its like load such a file"
    return "pass its --arch if it is a network of timm or torchvision"


TIMM_ONLY = {  # a tensor -> of the networks that have it one that timm builds
    "dist_token": "deit_small_distilled_patch16_224",
    "blocks.0.attn.relative_position_bias_table": "beit_base_patch16_224",
    "blocks.0.attn.q_bias": "beit_base_patch16_224",
    "rel_pos_bias.relative_position_bias_table": "beit_base_patch16_224",
    "layers.0.blocks.0.attn.cpb_mlp.0.weight": "swinv2_tiny_window8_256",
    "attn_pool.latent": "vit_base_patch16_siglip_224",
    "stem.0.weight": "convnext_tiny",
    "patch_embed.proj.0.0.weight": "xcit_small_12_p16_224",
    "blocks_token_only.0.gamma_1": "cait_xxs24_224",
}


def advice(target: State, state: State) -> str:
    """What to pass instead, from the shapes on both sides."""
    ours, theirs = vit_arguments(dict(target)), vit_arguments(state)
    if gated_mlp(state) and not gated_mlp(dict(target)):
        return f"The file holds a {describe(state)}: {remedy(state)}"
    if theirs and theirs["use_mean_pooling"] and not (ours and ours["use_mean_pooling"]):
        return "The file pools patch tokens (fc_norm instead of norm), which this network does not do"
    swins = swin_arguments(dict(target)), swin_arguments(state)
    if all(swins):
        name = arch_of(state)
        tips = [f"--arch {name}" if name else "its own --arch"] if name is None or name != arch_of(target) else []
        if swins[0]["window_size"] != swins[1]["window_size"]:
            tips.append(f"--window_size {swins[1]['window_size']}")
        return f"The file holds a {describe(state)}" + (f": pass {', '.join(tips)}" if tips else "")
    if ours is None or theirs is None:
        name = arch_of(state)
        return f"The file holds a {describe(state)}: {f'pass --arch {name}' if name else remedy(state)}"
    tips = []
    if any(ours[key] != theirs[key] for key in ("embed_dim", "depth", "mlp_ratio")):
        name = NAME_OF_SHAPE.get((theirs["embed_dim"], theirs["depth"]))
        tips.append(f"--arch {name}" if name else "its own --arch (none of ours has this width and depth)")
    if ours["patch_size"] != theirs["patch_size"]:
        tips.append(f"--patch_size {theirs['patch_size']}")
    if grid_of(dict(target)) != grid_of(state):
        tips.append(f"img_size={theirs['img_size']} to build_backbone (the evaluations do so by themselves)")
    for key in ("num_class_tokens", "num_registers", "init_values"):
        if ours[key] != theirs[key]:
            tips.append(f"{key}={theirs[key]:g} to build_backbone")
    return f"The file holds a {describe(state)}" + (f": pass {', '.join(tips)}" if tips else "")
