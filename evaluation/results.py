"""What an evaluation found, for people and programs: one line of JSON with the same fields everywhere."""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from models.checkpoints import Network
from utils import UsageError, log, make_folder, save_atomically


class Images(Protocol):
    data: str  # which they are


def write_result(
    args: argparse.Namespace,
    evaluation: str,
    network: Network | None,
    sets: Images | str,
    unreadable: Mapping[str, int],
    numbers: dict,
    append: bool = False,
) -> Path:
    """``<--output_dir>/<evaluation>.json``: one line, with the same fields in every evaluation.

    ``network``: None where features were given; ``sets``, or what to say of the images.
    ``unreadable``: how many images of "train" and of "test" could not be read.
    ``append``: after the lines that are there, of further networks of the same command.
    """
    info = network.report.info if network and network.report else None
    result = {
        "evaluation": evaluation,
        "checkpoint": str(info.path) if info else None,
        "checkpoint_key": (info.prefix.removesuffix(".") or info.key or args.checkpoint_key) if info else None,
        "arch": network.label if network else None,
        "data": sets if isinstance(sets, str) else sets.data,
        "unreadable": dict(unreadable),
        "numbers": numbers,
    }
    path = Path(args.output_dir) / f"{evaluation}.json"
    make_folder(path.parent)
    try:
        before = path.read_text() if append else ""
        save_atomically(path, lambda temporary: temporary.write_text(before + json.dumps(result) + "\n"))
    except OSError as error:
        raise UsageError(f"--output_dir {args.output_dir}: {path.name} cannot be written: {error}") from error
    log.info(f"written to {path}")
    return path
