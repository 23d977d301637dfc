"""Which test images a network gets right, kept in a file, so that two networks are compared on the same images."""

import argparse
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from evaluation.confidence import compare_paired
from utils import UsageError, log, make_folder, save_atomically

COMPARE_HELP = (
    "the ..._right.npz of another network on the same test images: tells the difference, and whether it is one"
)
IMAGES = "images"  # beside the results: what tells the list of images apart


def compared(args: argparse.Namespace, evaluation: str, images: str, right: Mapping[str, np.ndarray]) -> dict:
    """Keep ``right``, a row (test images,) per result, in ``<--output_dir>/<evaluation>_right.npz``, and hold it
    against that of --compare. For the JSON: what came of it.

    ``images``: fingerprint of the test images. Raises UsageError where the other file is of others.
    """
    numbers = {}
    if args.compare:
        theirs = _read(Path(args.compare), images)
        common = [name for name in right if name in theirs and theirs[name].shape == right[name].shape]
        if not common:
            raise UsageError(f"--compare {args.compare}: holds {', '.join(theirs)}, and here are {', '.join(right)}")
        for name in common:
            found = compare_paired(right[name], theirs[name])
            log.info(f"{name}, compared with {args.compare}: {found}")
            numbers[name] = found._asdict() | {"interval": list(found.interval)}
    path = Path(args.output_dir) / f"{evaluation}_right.npz"
    make_folder(path.parent)
    try:
        save_atomically(path, lambda temporary: _write(temporary, images, right))
    except OSError as error:
        raise UsageError(f"--output_dir {args.output_dir}: {path.name} cannot be written: {error}") from error
    return {"compared": {"with": str(args.compare), "results": numbers}} if args.compare else {}


def _write(path: Path, images: str, right: Mapping[str, np.ndarray]) -> None:
    with open(path, "wb") as file:
        np.savez_compressed(file, **{IMAGES: np.array(images)}, **right)


def _read(path: Path, images: str) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        theirs = str(arrays.pop(IMAGES))
    except (OSError, ValueError, KeyError, EOFError) as error:
        reason = getattr(error, "strerror", None) or "not a file that these evaluations write"
        raise UsageError(f"--compare {path}: {reason}") from error
    if theirs != images:
        raise UsageError(f"--compare {path}: is of other test images; both networks have to see the same ones")
    return arrays
