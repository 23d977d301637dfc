"""CLIP's image tower, as open_clip and MetaCLIP write it: its names -> those of models/vit.py."""

import re

from models.layouts.names import State, below, renamed
from models.safe_load import CheckpointError

NAMES = (
    (r"^ln_pre\.", "norm_pre."),
    (r"^ln_post\.", "norm."),
    (r"^conv1\.weight$", "patch_embed.proj.weight"),
    (r"^transformer\.resblocks\.", "blocks."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.attn\.in_proj_", ".attn.qkv."),
    (r"\.attn\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)


def from_open_clip(state: State) -> State:
    """The image tower of a file; the text tower stays behind, ``proj`` becomes ``head.weight``, as timm has it.

    Patches have no bias there: here it is one of zeros. Raises CheckpointError where there is no such tower.
    """

    def rename(name: str) -> str:
        for pattern, ours in NAMES:
            name = re.sub(pattern, ours, name)
        return name

    tower = renamed(below(state, "visual."), rename)
    missing = {"class_embedding", "positional_embedding", "patch_embed.proj.weight"} - tower.keys()
    if missing:
        raise CheckpointError(f"holds no vision transformer of CLIP: {', '.join(sorted(missing))} is missing")
    token, positions, patch = (
        tower.pop("class_embedding"),
        tower.pop("positional_embedding"),
        tower["patch_embed.proj.weight"],
    )
    tower |= {"cls_token": token.view(1, 1, -1), "pos_embed": positions[None]}
    tower["patch_embed.proj.bias"] = patch.new_zeros(patch.shape[0])
    if "proj" in tower:
        tower["head.weight"] = tower.pop("proj").t()
    return tower
