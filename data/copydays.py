"""INRIA Copydays: ``original/``, ``strong/``, ``jpegqual/<quality>/``, ``crops/<percent>/`` with files ``*.jpg``."""

from pathlib import Path

from data.decode import PLAIN, Reading
from data.named import NamedFiles
from utils import UsageError, escape

ORIGINAL, STRONG = "original", "strong"
QUALITIES, CROPS = (3, 5, 8, 10, 15, 20, 30, 50, 75), (10, 15, 20, 30, 40, 50, 60, 70, 80)
BLOCKS = (ORIGINAL, STRONG, *(f"jpegqual/{q}" for q in QUALITIES), *(f"crops/{c}" for c in CROPS))
COUNTS = {block: 229 if block == STRONG else 157 for block in BLOCKS}
SAME = 4  # first letters that a strong copy shares with its original


def open_copydays(data_path: str, reading: Reading = PLAIN) -> dict[str, NamedFiles]:
    """The blocks that are there, ``original`` first. Raises UsageError where it is missing, or is alone."""
    root = Path(data_path)
    blocks = {}
    for block in BLOCKS:
        files = sorted(file.name for file in (root / block).glob("*.jpg"))
        if files:
            blocks[block] = NamedFiles(root / block, files, "images", reading)
    if ORIGINAL not in blocks or len(blocks) == 1:
        what = f"{ORIGINAL}/" if ORIGINAL not in blocks else f"{STRONG}/, nor jpegqual/ or crops/"
        raise UsageError(
            f"--data_path {escape(data_path)}: no {what} with *.jpg there; the images are published as INRIA Copydays"
        )
    return blocks


def positives(block: str, blocks: dict[str, NamedFiles]) -> list[list[int]]:
    """Of every image of ``block``: which originals it is a copy of. Raises UsageError where there is none."""
    originals, copies = blocks[ORIGINAL].files, blocks[block].files
    if block != STRONG:
        if len(copies) != len(originals):
            raise UsageError(
                f"{escape(blocks[block].root)}: {len(copies)} images, and {len(originals)} originals; copies belong to "
                "them one by one"
            )
        return [[index] for index in range(len(copies))]
    found = [[i for i, name in enumerate(originals) if name[:SAME] == copy[:SAME]] for copy in copies]
    lonely = [copy for copy, places in zip(copies, found, strict=True) if not places]
    if lonely:
        raise UsageError(f"{escape(blocks[block].root)}: no original begins as {escape(lonely[0])} does")
    return found
