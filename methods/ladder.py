"""``--lp_args`` of UNIC: a ladder of projectors (models/ladder.py) in words."""

import ast
from collections.abc import Mapping

from utils import UsageError, escape, nearest

DEFAULTS = {  # of --lp_args, with what they may be
    "which_blocks": None,
    "hidden_dim": 768,
    "last_hidden_dim": 3072,
    "prenorm": False,
    "midnorm": False,
    "std": 0.02,
}


def literal_options(option: str, text: str, defaults: Mapping[str, object]) -> dict:
    """A dictionary that is written as in Python (``{'std': 0.02}``), with ``defaults`` for what it leaves out.

    Raises UsageError for anything that is no literal of a dictionary, and for unknown keys.
    """
    example = f'pass a dictionary as "{dict(list(defaults.items())[-1:])}"'
    try:
        given = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise UsageError(f"{option} {escape(text)[:80]}: no Python literal; {example}") from None
    if not isinstance(given, dict):
        raise UsageError(f"{option} {escape(text)[:80]}: a {type(given).__name__}; {example}")
    for key in given:
        if key not in defaults:
            near = nearest(str(key), defaults)
            raise UsageError(f"{option}: unknown key {escape(str(key))}{near}; there are {', '.join(defaults)}")
    return {**defaults, **given}


def ladder_options(text: str) -> dict:
    """``--lp_args``, checked; which blocks exist shows when the network is there (``hidden_widths``)."""
    options = literal_options("--lp_args", text, DEFAULTS)
    for name in ("hidden_dim", "last_hidden_dim"):
        if not _whole(options[name]) or options[name] < 1:
            raise UsageError(f"--lp_args: {name} {options[name]!r} has to be a whole number of at least 1")
    for name in ("prenorm", "midnorm"):
        if not isinstance(options[name], bool):
            raise UsageError(f"--lp_args: {name} {options[name]!r} has to be True or False")
    if isinstance(options["std"], bool) or not isinstance(options["std"], int | float) or not options["std"] > 0:
        raise UsageError(f"--lp_args: std {options['std']!r} has to be a positive number")
    blocks = options["which_blocks"]
    if blocks is not None and not (isinstance(blocks, list | tuple) and blocks and all(map(_whole, blocks))):
        raise UsageError(f"--lp_args: which_blocks {blocks!r} has to be None (all) or a list of blocks, the first is 0")
    return options


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def hidden_widths(options: Mapping[str, object], depth: int) -> dict[int, int]:
    """Block -> width, from checked ``--lp_args``: the last block of the network has its own, whoever else has any.

    Raises UsageError for blocks that a network of ``depth`` does not have.
    """
    blocks = range(depth) if options["which_blocks"] is None else sorted(set(options["which_blocks"]))
    for block in blocks:
        if not 0 <= block < depth:
            raise UsageError(f"--lp_args: which_blocks has {block}, and the student's blocks are 0 to {depth - 1}")
    return {block: options["last_hidden_dim" if block == depth - 1 else "hidden_dim"] for block in blocks}
