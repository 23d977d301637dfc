"""Images with boxes and masks of things, in COCO's layout.

annotations/instances_train2017.json    train2017/*.jpg
annotations/instances_val2017.json      val2017/*.jpg
"""

import copy
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image

from data.decode import PLAIN, BadImage, Reading, decode_array, decode_pil
from data.encoded import read_regular
from data.segmentation import rescaled, resize_image
from data.source import Source
from randomness import counted_uniforms
from utils import UsageError, escape

SPLITS = ("train2017", "val2017")
WHERE = "they are train2017.zip, val2017.zip and annotations_trainval2017.zip of https://cocodataset.org, unpacked"
LONGEST = 1333


def masks_module():  # noqa: ANN201 (a module that need not be there)
    """pycocotools.mask. Raises UsageError where it is not installed."""
    try:
        import pycocotools.mask
    except ImportError:
        raise UsageError("pycocotools is not installed; pip install -r requirements-eval.txt") from None
    return pycocotools.mask


class Instances(Source):
    """The images of one split; ``array`` returns an image with the boxes, masks and classes of what is in it.

    ``learns``: pass over images without things, and over crowds. Raises UsageError when the layout is another one.
    """

    def __init__(self, root: str | Path, split: str, learns: bool):
        self.root, self.split, self.reading = Path(root), split, PLAIN
        self.path = self.root / "annotations" / f"instances_{split}.json"
        for place in (self.path, self.root / split):
            if not place.exists():
                raise UsageError(f"--data_path {escape(root)}: there is no {place.relative_to(root)}; {WHERE}")
        content = _read_json(self.path)
        try:
            self.categories = {int(c["id"]): str(c["name"]) for c in content["categories"]}
            files = {int(image["id"]): str(image["file_name"]) for image in content["images"]}
            things: dict[int, list[dict]] = {}
            for thing in content["annotations"]:
                kept = not learns or (not thing.get("iscrowd", 0) and min(thing["bbox"][2:]) >= 1)
                if kept and thing["category_id"] in self.categories:
                    things.setdefault(int(thing["image_id"]), []).append(thing)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise UsageError(f"{escape(self.path)}: not annotations in COCO's layout ({error!r})") from None
        self.ids = sorted(set(files) & set(things) if learns else set(files))
        if not self.ids or not self.categories:
            raise UsageError(f"{escape(self.path)}: no image with anything on it")
        self.files, self.things = [files[i] for i in self.ids], [things.get(i, []) for i in self.ids]
        if bad := next((f for f in self.files if Path(f).is_absolute() or ".." in Path(f).parts), None):
            raise UsageError(f"{escape(self.path)}: file_name {escape(bad)} leaves the folder {split}")
        self.numbers = {category: number for number, category in enumerate(sorted(self.categories))}
        self.name = f"{escape(self.root / split)} ({len(self.ids)} images, {len(self.numbers)} classes)"
        self.labels = np.full(len(self.ids), -1)
        self.class_names = [self.categories[category] for category in self.numbers]

    @property
    def fingerprint(self) -> str:
        digest = hashlib.blake2b(json.dumps([self.files, self.things, self.class_names]).encode(), digest_size=16)
        return digest.hexdigest() + self.reading.mark

    def read_as(self, reading: Reading) -> "Instances":
        source = copy.copy(self)
        source.reading = reading
        return source

    def image_name(self, index: int) -> str:
        return escape(self.root / self.split / self.files[index])

    def array(self, index: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """(height, width, 3) uint8, and ``boxes`` (things, 4) float32 left, top, right, bottom, ``masks`` (things,
        height, width) uint8, ``labels`` (things,) int64 from 1 on.
        """
        image = decode_array(self._read(index), self.image_name(index), self.reading)
        return image, self.things_of(index, *image.shape[:2])

    def things_of(self, index: int, height: int, width: int) -> dict[str, np.ndarray]:
        things = self.things[index]
        corners = np.array([thing["bbox"] for thing in things], np.float32).reshape(-1, 4)
        corners[:, 2:] += corners[:, :2]
        masks = np.zeros((len(things), height, width), np.uint8)
        for mask, thing in zip(masks, things, strict=True):
            mask[:] = self._mask(index, thing["segmentation"], height, width)
        labels = np.array([self.numbers[thing["category_id"]] + 1 for thing in things], np.int64)
        return {"boxes": corners, "masks": masks, "labels": labels}

    def _mask(self, index: int, segmentation: object, height: int, width: int) -> np.ndarray:
        coco = masks_module()
        try:
            parts = coco.frPyObjects(segmentation, height, width)
            return coco.decode(coco.merge(parts) if isinstance(parts, list) else parts)
        except Exception as error:  # what a damaged polygon does to a C extension
            raise BadImage(self.image_name(index), f"a mask that cannot be read ({type(error).__name__})") from error

    def pil(self, index: int) -> Image.Image:
        return decode_pil(self._read(index), self.image_name(index), self.reading)

    def _read(self, index: int) -> bytes:
        try:
            return read_regular(self.root / self.split / self.files[index], self.reading.max_bytes)
        except (OSError, ValueError, MemoryError) as error:
            raise BadImage(self.image_name(index), getattr(error, "strerror", None) or str(error)) from error


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UsageError(f"{escape(path)}: cannot be read as JSON ({error})") from None
    if not isinstance(content, dict):
        raise UsageError(f"{escape(path)}: not annotations in COCO's layout")
    return content


class Splits:
    """Training and test images of a data set, and the number of its classes."""

    def __init__(self, root: str | Path, reading: Reading):
        self.train, self.test = (Instances(root, split, split == SPLITS[0]).read_as(reading) for split in SPLITS)
        if self.train.categories != self.test.categories:
            raise UsageError(f"--data_path {escape(root)}: training and test annotations have different categories")
        self.classes = len(self.train.class_names)

    @property
    def data(self) -> str:
        """For results: which images these are."""
        return f"{self.train.name}; {self.test.name}"


class InstanceViews:
    """One training image: flipped or not, at one of eleven sizes, or cut out at a first size and scaled again (DETR).

    ``scale``: times all lengths; 1 are the published ones: 480, 512, ... 800 for the shorter side and 1333 for the
    longer, 400, 500 or 600 before a crop of 384 to 600 pixels a side. Returns ``image`` (3, height, width) uint8,
    ``boxes``, ``masks``, ``labels``.
    """

    augment = "fast"

    def __init__(self, scale: float = 1.0):
        self.sides = [round(scale * side) for side in range(480, 801, 32)]
        self.first = [round(scale * side) for side in (400, 500, 600)]
        self.crop, self.longest = (round(scale * 384), round(scale * 600)), round(scale * LONGEST)

    def __call__(self, pair: tuple[np.ndarray, dict[str, np.ndarray]], key: tuple[int, ...]) -> dict[str, torch.Tensor]:
        image, things = pair
        flip, crops, first, side, *draws = counted_uniforms(*key, np.arange(8))
        if flip < 0.5:
            image, things = flipped(image, things)
        if crops < 0.5:
            image, things = self._scaled(image, things, self.first[int(first * len(self.first))])
            image, things = self._cut(image, things, draws)
        image, things = self._scaled(image, things, self.sides[int(side * len(self.sides))])
        tensors = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in things.items()}
        return {"image": torch.from_numpy(image.transpose(2, 0, 1).copy())} | tensors

    def _scaled(self, image: np.ndarray, things: dict, short_side: int) -> tuple[np.ndarray, dict]:
        size = rescaled(image.shape[1], image.shape[0], self.longest, short_side)
        factors = np.array([new / old for new, old in zip(size, image.shape[1::-1], strict=True)] * 2, np.float32)
        masks = [cv2.resize(mask, size, interpolation=cv2.INTER_NEAREST) for mask in things["masks"]]
        masks = np.stack(masks) if masks else np.zeros((0, *size[::-1]), np.uint8)
        return resize_image(image, size), things | {"boxes": things["boxes"] * factors, "masks": masks}

    def _cut(self, image: np.ndarray, things: dict, draws: Sequence[float]) -> tuple[np.ndarray, dict]:
        """A part of the image; things whose boxes have nothing left of them are left out, perhaps all."""
        low, high = self.crop
        starts, lengths = [], []
        for length, draw, place in zip(image.shape[:2], draws[:2], draws[2:], strict=True):
            least, most = min(length, low), min(length, high)
            lengths.append(least + int(draw * (most - least + 1)))
            starts.append(int(place * (length - lengths[-1] + 1)))
        rows, columns = (slice(start, start + length) for start, length in zip(starts, lengths, strict=True))
        limits = np.array(lengths[::-1] * 2, np.float32)
        boxes = (things["boxes"] - np.array(starts[::-1] * 2, np.float32)).clip(0, limits)
        left = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
        masks = things["masks"][left][:, rows, columns]
        return image[rows, columns], {"boxes": boxes[left], "masks": masks, "labels": things["labels"][left]}

    def collate(self, samples: list[dict]) -> dict[str, list[torch.Tensor]]:
        """Lists, as nothing here has the same size."""
        return {name: [sample[name] for sample in samples] for name in samples[0]}


def flipped(image: np.ndarray, things: dict) -> tuple[np.ndarray, dict]:
    boxes = things["boxes"].copy()
    boxes[:, [0, 2]] = image.shape[1] - things["boxes"][:, [2, 0]]
    return image[:, ::-1], things | {"boxes": boxes, "masks": things["masks"][..., ::-1]}


class Whole:
    """Pillow RGB image -> (3, height, width) in [0, 1], as it is."""

    def __call__(self, image: Image.Image) -> torch.Tensor:
        return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy()).float().div_(255)
