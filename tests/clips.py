"""A tiny DAVIS: stamps cut out of one bundled photograph and moved over another, so that every mask is exact."""

from pathlib import Path

import numpy as np
from PIL import Image

from data.bundled import photograph_paths
from data.davis import save_mask

SIZE = 48, 96  # height and width of a frame


def stamp(photograph: np.ndarray, radius: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixels and the shape of what is cut out of the middle."""
    rows, columns = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    row, column = (side // 2 for side in photograph.shape[:2])
    pixels = photograph[row - radius : row + radius + 1, column - radius : column + radius + 1]
    return pixels, rows**2 + columns**2 <= radius**2


def clip(number: int, frames: int, objects: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Frames (height, width, 3) and masks (height, width); the objects move along a path of their own."""
    photographs = [np.asarray(Image.open(path).convert("RGB").resize((192, 128))) for path in photograph_paths()]
    background = photographs[number % len(photographs)][: SIZE[0], : SIZE[1]]
    pictures, masks = [], []
    for frame in range(frames):
        picture, mask = background.copy(), np.zeros(SIZE, np.uint8)
        for thing in range(objects):
            pixels, shape = stamp(photographs[(number + thing + 1) % len(photographs)], 9)
            if thing % 2:
                pixels = 255 - pixels
            top, left = 3 + 22 * thing + frame % 3, 8 + 5 * frame
            place = np.s_[top : top + len(shape), left : left + len(shape)]
            picture[place][shape], mask[place][shape] = pixels[shape], thing + 1
        pictures.append(picture)
        masks.append(mask)
    return pictures, masks


def davis(root: Path, videos: int = 3, frames: int = 5, split: str = "val") -> Path:
    """The layout of DAVIS 2017 with ``videos`` clips, of one and of two objects in turn."""
    names = [f"clip-{number}" for number in range(videos)]
    (root / "ImageSets" / "2017").mkdir(parents=True)
    (root / "ImageSets" / "2017" / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))
    for number, name in enumerate(names):
        folders = [root / kind / "480p" / name for kind in ("JPEGImages", "Annotations")]
        for folder in folders:
            folder.mkdir(parents=True)
        for index, (picture, mask) in enumerate(zip(*clip(number, frames, 1 + number % 2), strict=True)):
            Image.fromarray(picture).save(folders[0] / f"{index:05}.jpg", quality=95)
            save_mask(mask, folders[1] / f"{index:05}.png")
    return root
