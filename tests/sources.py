"""Sources for tests: images made in memory, of classes that differ in colour and texture."""

import numpy as np
from PIL import Image

from data.datasets import BadImage, Source


class Stripes(Source):
    """``per_class`` images of each class: stripes of the class's direction and hue, with noise drawn from ``seed``."""

    def __init__(self, classes: int = 4, per_class: int = 6, seed: int = 0, size: int = 40, bad: tuple[int, ...] = ()):
        self.seed, self.size, self.bad = seed, size, bad
        self.class_names = [f"class{number}" for number in range(classes)]
        self.labels = np.arange(classes * per_class) % classes
        self.labels.setflags(write=False)  # as an index that is mapped from a file
        self.name = f"stripes {seed} ({len(self.labels)} images, {classes} classes)"

    @property
    def fingerprint(self) -> str:
        return f"{self.name} {self.size} {self.bad}"

    def __len__(self) -> int:
        return len(self.labels)

    def image_name(self, index: int) -> str:
        return f"stripes/{index}.png"

    def array(self, index: int) -> np.ndarray:
        if index in self.bad:
            raise BadImage(self.image_name(index), "cut off in the middle")
        label = int(self.labels[index])
        rng = np.random.default_rng((self.seed, index))
        rows, columns = np.mgrid[: self.size, : self.size]
        angle = np.pi * label / len(self.class_names)
        wave = np.sin((np.cos(angle) * rows + np.sin(angle) * columns) / 2 + rng.uniform(0, 6))
        colour = np.array([0.5 + 0.4 * np.cos(angle * 2 + shift) for shift in (0, 2, 4)])
        pixels = colour * (0.7 + 0.3 * wave[..., None]) + rng.normal(0, 0.08, (self.size, self.size, 3))
        return (pixels.clip(0, 1) * 255).astype(np.uint8)

    def pil(self, index: int) -> Image.Image:
        return Image.fromarray(self.array(index))
