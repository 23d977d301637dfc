"""Which of EsViT's own networks the tensors of a file are, CvT or Vision Longformer, by their shapes."""

import re

from models.layouts.names import State, square_side
from models.vil import Stage, architecture_string

CVT_OF_SHAPE = {  # (width, blocks) of every stage; a test compares it with models/cvt.py
    ((64, 192, 384, 768), (2, 2, 6, 2)): "cvt_tiny",
    ((64, 128, 256, 512), (2, 2, 10, 4)): "cvt_small",
}
VIL_OF_DEPTHS = {  # as the original names them; a test compares it with models/vil.py
    (1, 2, 8, 1): "vil_1281",
    (2, 2, 6, 2): "vil_2262",
    (1, 4, 12, 1): "vil_14121",
}


def cvt_arguments(state: State) -> dict | None:
    """Width and blocks of every stage of a CvT, and whether it has relative biases; None for other networks."""
    widths: list[int] = []
    while (convolution := state.get(f"stage{len(widths)}.0.proj.weight")) is not None:
        widths.append(convolution.shape[0])
    block = re.compile(r"stage(\d+)\.1\.layers\.\d+\.0\.fn\.qkv\.dw\.weight")
    stages = [int(match[1]) for name in state if (match := block.fullmatch(name))]
    if not widths or set(stages) != set(range(len(widths))):
        return None
    return {
        "embed_dims": tuple(widths),
        "depths": tuple(stages.count(stage) for stage in range(len(widths))),
        "rel_pos_embed": "stage0.1.layers.0.0.fn.rel_pos_bias_table" in state,
    }


def vil_arguments(state: State) -> dict | None:
    """The architecture's string of a Vision Longformer and the size it was built for; None for other networks.

    A full attention shows the map of its construction, but not its window, which it does not have.
    """
    stages: list[Stage] = []
    img_size, patches = None, 1
    while (patch := state.get(f"layer{(number := len(stages) + 1)}.0.proj.weight")) is not None:
        if f"layer{number}.0.norm_embed.weight" not in state:
            return None
        front = f"layer{number}.1.attn."
        table = state.get(f"{front}local_relative_position_bias_table")
        reach = square_side(table.shape[0]) if table is not None and table.ndim == 2 else None
        if reach is None:
            return None
        reach, sparse = (reach + 1) // 2, f"{front}query.weight" in state
        tokens = state.get(f"layer{number}.0.cls_token")
        depth = sum(re.fullmatch(rf"layer{number}\.\d+\.norm\.weight", name) is not None for name in state) // 2
        patches *= patch.shape[-1]
        stages.append(
            Stage(
                num_heads=table.shape[1],
                dim=patch.shape[0],
                depth=depth,
                sparse=sparse,
                global_tokens=0 if tokens is None else tokens.shape[1],
                patch=patch.shape[-1],
                window=reach // 2 if sparse else 7,
            )
        )
        if not sparse and img_size is None:
            img_size = reach * patches
    if not stages:
        return None
    return {
        "vil_arch": architecture_string(stages),
        "vil_mode": 0,
        "depths": tuple(stage.depth for stage in stages),
        "img_size": img_size or 224,
    }
