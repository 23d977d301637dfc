"""Which test images a network gets right, kept in a file, so that two networks are compared on the same images."""

import argparse
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from evaluation.confidence import compare_paired
from utils import UsageError, log, make_folder, save_atomically

IMAGES = "images"  # beside the results: for every one of them what tells its list of images apart


def add_compare_argument(parser: argparse._ActionsContainer) -> None:
    what = "the ..._right.npz of another network on the same test images: tells the difference, and whether it is one"
    parser.add_argument("--compare", default=None, metavar="FILE", help=what)


def check_compare(args: argparse.Namespace) -> None:
    """Raise UsageError where there would be several networks here, or --compare is no file that can be read."""
    if args.compare and "," in args.checkpoint_key:
        raise UsageError(f"--checkpoint_key {args.checkpoint_key}: --compare is for one network; pass one key")
    if args.compare:
        _read(Path(args.compare))


def compared(
    args: argparse.Namespace, evaluation: str, images: str | Sequence[str], right: Mapping[str, np.ndarray]
) -> dict:
    """Keep ``right``, a row (test images,) per result, in ``<--output_dir>/<evaluation>_right.npz``, and hold it
    against that of --compare. For the JSON: what came of it.

    ``images``: fingerprint of the test images, of every row or of all. Raises UsageError where the other file is of
    others.
    """
    numbers, images = {}, [images] * len(right) if isinstance(images, str) else list(images)
    if args.compare:
        for name, theirs in rows_to_compare(args.compare, dict(zip(right, images, strict=True))).items():
            if theirs.shape != right[name].shape:
                raise UsageError(
                    f"--compare {args.compare}: {name} is of {theirs.size} images that could be read, and of "
                    f"{right[name].size} here; mend those that cannot"
                )
            found = compare_paired(right[name], theirs)
            log.info(f"{name}, compared with {args.compare}: {found}")
            numbers[name] = found._asdict() | {"interval": list(found.interval)}
    path = Path(args.output_dir) / f"{evaluation}_right.npz"
    make_folder(path.parent)
    try:
        save_atomically(path, lambda temporary: _write(temporary, images, right))
    except OSError as error:
        raise UsageError(f"--output_dir {args.output_dir}: {path.name} cannot be written: {error}") from error
    return {"compared": {"with": str(args.compare), "results": numbers}} if args.compare else {}


def rows_to_compare(path: str, images: Mapping[str, str]) -> dict[str, np.ndarray]:
    """Those rows of a file that are named in ``images``, fingerprints of the test images of every result here.

    Raises UsageError where there is none, or one of other images.
    """
    theirs, their_images = _read(Path(path))
    common = [name for name in images if name in theirs]
    if not common:
        raise UsageError(f"--compare {path}: holds {', '.join(theirs)}, and here are {', '.join(images)}")
    if any(their_images[name] != images[name] for name in common):
        raise UsageError(f"--compare {path}: is of other test images; both networks have to see the same ones")
    return {name: theirs[name] for name in common}


def _write(path: Path, images: list[str], right: Mapping[str, np.ndarray]) -> None:
    with open(path, "wb") as file:
        np.savez_compressed(file, **{IMAGES: np.array(images)}, **right)


def _read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Rows and fingerprints, by name."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        images = np.broadcast_to(arrays.pop(IMAGES), len(arrays)).tolist()
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        reason = getattr(error, "strerror", None) or "not a file that these evaluations write"
        raise UsageError(f"--compare {path}: {reason}") from error
    return arrays, dict(zip(arrays, map(str, images), strict=True))
