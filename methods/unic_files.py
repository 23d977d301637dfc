"""How a UNIC student stands in files: the original's names of its tensors, and whether a ladder there is ours."""

import re
from collections.abc import Mapping

import torch

from models.ladder import KINDS, Ladder
from models.layouts.names import below, rename_tokens_and_scales, unchunk_blocks
from utils import UsageError, escape

ENCODER = "encoder."


def student_to_file(state: dict) -> dict:
    """Our names -> the original's: its blocks are in one chunk, ``encoder.blocks.0.<i>``."""

    def rename(name: str) -> str:
        name = re.sub(r"^encoder\.blocks\.(\d+)\.", r"encoder.blocks.0.\1.", name)
        name = re.sub(r"\.gamma_([12])$", r".ls\1.gamma", name)
        return {"encoder.masked_embed": "encoder.mask_token"}.get(name, name)

    return {rename(name): value for name, value in state.items()}


def student_from_file(state: dict) -> dict:
    """Undoes ``student_to_file``; blocks that are in no chunk are taken as they are."""
    encoder = rename_tokens_and_scales(unchunk_blocks(below(state, ENCODER)))
    rest = {name: value for name, value in state.items() if not name.startswith(ENCODER)}
    return {**{f"{ENCODER}{name}": value for name, value in encoder.items()}, **rest}


def refuse_another_ladder(lp: Ladder, state: Mapping[str, torch.Tensor]) -> None:
    """Raises UsageError for a student whose ladder leads to other teachers, or is of other widths or blocks.

    A student without any ladder is fine: ours begins fresh.
    """
    ours, theirs = lp.state_dict(), below(dict(state), "lp.")
    leads = [sorted({match[1] for name in side if (match := _HEAD.match(name))}) for side in (ours, theirs)]
    if theirs and leads[0] != leads[1]:
        here, there = (", ".join(map(escape, names)) or "nobody" for names in leads)
        raise UsageError(f"its ladder leads to {there}, --teachers are {here}; pass the teachers it was trained with")
    for name in {**ours, **theirs} if theirs else ():
        here, there = (tuple(side[name].shape) if name in side else "none" for side in (ours, theirs))
        if here != there:
            raise UsageError(
                f"its ladder has another shape (lp.{escape(name)}: {there} there, {here} here); pass its --lp_args"
            )


_HEAD = re.compile(rf"heads\.(.+)\.({'|'.join(KINDS)})\.\d+\.layers\.")
