"""Images for the tests: noise with a photograph's spectrum, so that blurs and resizes have something to do."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from utils import World


def photograph(seed: int = 0, height: int = 90, width: int = 120) -> np.ndarray:
    """(height, width, 3) uint8 with smooth areas, edges, texture and all hues."""
    random = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    spectrum = np.fft.rfft2(random.normal(size=(3, height, width))) / np.maximum(frequency, 1 / width) ** 1.2
    planes = np.fft.irfft2(spectrum, s=(height, width))
    planes = planes / planes.std() * 45 + random.uniform(80, 170, (3, 1, 1))
    for _ in range(3):  # objects
        y, x = random.integers(0, height // 2), random.integers(0, width // 2)
        planes[:, y : y + height // 3, x : x + width // 3] += random.uniform(-70, 70, (3, 1, 1))
    return np.clip(planes, 0, 255).astype(np.uint8).transpose(1, 2, 0).copy()


def encoded(image: np.ndarray | Image.Image, form: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, form, **options)
    return buffer.getvalue()


def write_image(path: Path, seed: int = 0, height: int = 24, width: int = 32) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    form = {".jpg": "JPEG", ".jpeg": "JPEG", ".tif": "TIFF", ".pgm": "PPM", ".ppm": "PPM"}
    suffix = path.suffix.lower()
    Image.fromarray(photograph(seed, height, width)).save(path, form.get(suffix, suffix[1:].upper()))


def write_folder(root: Path, names: list[str]) -> Path:
    for seed, name in enumerate(names):
        write_image(root / name, seed)
    return root


def write_list(root: Path, lines: list[str], name: str = "list.txt") -> Path:
    """A list, and an empty file for every path in it."""
    for line in lines:
        file = root / line.split("\t")[0]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    (root / name).write_text("\n".join(lines) + "\n")
    return root / name


def one_process(rank: int = 0, size: int = 1) -> World:
    import torch

    return World(rank, size, rank, torch.device("cpu"))
