"""The photographs that come with the repository, served as tiles, so that everything runs without a data set.

Every photograph is one class. Training tiles come from its left half, test tiles from its right half: no pixel is in
both. Tiles show the photograph at full and at half resolution in turn: some hold a texture, some a part of an object.
To learn from the crops of a handful of photographs is an established set-up (Asano et al., "A critical analysis of
self-supervision, or what we can learn from a single image", ICLR 2020); the labels serve evaluation only.

Authors and licences: photographs/ATTRIBUTION.md.
"""

import hashlib
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from data.source import Source
from utils import UsageError

FOLDER = Path(__file__).parent / "photographs"
TILES = {"train": 192, "test": 64}  # per photograph
LEVELS = 2  # full and half resolution
PLASTIC = 1.324717957244746  # the real root of x^3 = x + 1, see ``BundledTiles._corner``


def photograph_paths() -> list[Path]:
    """The whole photographs in the order of their names, for pictures of attention."""
    return sorted(FOLDER.glob("*.jpg"))


@cache
def _levels(path: Path) -> list[np.ndarray]:
    """The photograph at full and at half resolution, (height, width, 3) uint8; decoded once per process."""
    with Image.open(path) as image:
        photograph = image.convert("RGB")
    return [np.asarray(photograph.reduce(2**level)) for level in range(LEVELS)]


class BundledTiles(Source):
    """Squares of ``tile_size`` pixels from one half of every photograph, the same number from each.

    ``split``: "train" (left halves), or "test", also called "val" (right halves). ``tiles``: how many from each
    photograph; the tiles of a short list are the first of a long one. Raises UsageError for another split.
    """

    def __init__(self, split: str = "train", tiles: int | None = None, tile_size: int = 64):
        self.split = "test" if split == "val" else split
        if self.split not in TILES:
            raise UsageError(f"split {split!r}: the bundled photographs have train and test (also called val)")
        self.tiles = TILES[self.split] if tiles is None else tiles
        self.tile_size = tile_size
        self.paths = photograph_paths()
        self.class_names = [path.stem for path in self.paths]
        self.labels = np.repeat(np.arange(len(self.paths)), self.tiles)
        self.name = f"bundled photographs/{self.split} ({len(self)} tiles, {len(self.paths)} photographs)"

    def __reduce__(self):
        return BundledTiles, (self.split, self.tiles, self.tile_size)

    @property
    def fingerprint(self) -> str:
        photographs = [(path.name, path.stat().st_size) for path in self.paths]
        key = (photographs, self.split, self.tiles, self.tile_size, LEVELS)
        return hashlib.sha256(repr(key).encode()).hexdigest()[:16]

    def image_name(self, index: int) -> str:
        photograph, tile = divmod(int(index), self.tiles)
        return f"{self.paths[photograph].name}, {self.split} tile {tile}"

    def array(self, index: int) -> np.ndarray:
        """Tile ``index`` as uint8 (tile_size, tile_size, 3)."""
        photograph, tile = divmod(int(index), self.tiles)
        level = _levels(self.paths[photograph])[tile % LEVELS]
        x, y = self._corner(tile, *level.shape[:2])
        return level[y : y + self.tile_size, x : x + self.tile_size].copy()

    def _corner(self, tile: int, height: int, width: int) -> tuple[int, int]:
        """Column and row where a tile begins in a level of that size.

        The corners are points of the additive sequence with steps 1/p and 1/p^2, p the plastic number: it fills the
        half evenly, however many tiles are taken.
        """
        left, right = (0, width // 2) if self.split == "train" else ((width + 1) // 2, width)
        across, down = (tile + 1) / PLASTIC % 1, (tile + 1) / PLASTIC**2 % 1
        x = left + int(across * (right - left - self.tile_size + 1))
        return x, int(down * (height - self.tile_size + 1))
