"""Pictures with exact truth: cut-out stamps pasted on photographs, with the class of every pixel and a box of each."""

import json
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from data.bundled import photograph_paths

STAMPS = ("disc", "square", "cross")  # classes 2, 3 and 4 as ADE20K counts; the photograph is class 1
COLOURS = ((230, 40, 30), (30, 60, 230), (40, 220, 60))


def stamp(kind: int, size: int) -> np.ndarray:
    """Where it is: (size, size) bool."""
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    if STAMPS[kind] == "disc":
        return x**2 + y**2 <= (size / 2) ** 2
    if STAMPS[kind] == "square":
        return np.ones((size, size), bool)
    return (abs(x) < size / 5) | (abs(y) < size / 5)


def picture(number: int, height: int, width: int) -> tuple[np.ndarray, list[tuple[int, np.ndarray]]]:
    """(height, width, 3) uint8, and of every stamp its kind and where it can be seen (height, width) bool."""
    rng = np.random.default_rng(number)
    paths = photograph_paths()
    photograph = Image.open(paths[number % len(paths)]).convert("RGB").resize((width, height))
    pixels, found = np.asarray(photograph).copy(), []
    for kind in rng.permutation(len(STAMPS)):
        size = int(rng.integers(min(height, width) // 3, min(height, width) // 2))
        top, left = rng.integers(0, height - size + 1), rng.integers(0, width - size + 1)
        where = np.zeros((height, width), bool)
        where[top : top + size, left : left + size] = stamp(kind, size)
        pixels[where] = np.clip(COLOURS[kind] + rng.normal(0, 20, (where.sum(), 3)), 0, 255)
        found = [(other, seen & ~where) for other, seen in found] + [(int(kind), where)]
    return pixels, found


def class_map(found: list[tuple[int, np.ndarray]]) -> np.ndarray:
    """As ADE20K stores it; the topmost rows have no class."""
    labels = np.ones(found[0][1].shape, np.uint8)
    for kind, where in found:
        labels[where] = kind + 2
    labels[:2] = 0
    return labels


def ade20k(root: Path, train: int = 12, test: int = 5, height: int = 48, width: int = 60) -> Path:
    """A tiny copy of ADE20K's layout, of four classes; every picture has another size."""
    for split, numbers in (("training", range(train)), ("validation", range(train, train + test))):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        for number in numbers:
            pixels, found = picture(number, height + number % 3, width - number % 4)
            name = f"ADE_{split[:3]}_{number:08}"
            Image.fromarray(pixels).save(root / "images" / split / f"{name}.jpg", quality=95)
            Image.fromarray(class_map(found)).save(root / "annotations" / split / f"{name}.png")
    return root


def coco(root: Path, train: int = 12, test: int = 4, height: int = 64, width: int = 80) -> Path:
    """A tiny copy of COCO's layout with the stamps as things; every other mask is run lengths, the others polygons."""
    (root / "annotations").mkdir(parents=True)
    for split, numbers in (("train2017", range(train)), ("val2017", range(train, train + test))):
        (root / split).mkdir()
        images, things = [], []
        for number in numbers:
            pixels, found = picture(number, height, width)
            images.append({"id": 10 + number, "file_name": f"{number:012}.png", "height": height, "width": width})
            Image.fromarray(pixels).save(root / split / images[-1]["file_name"])
            for kind, where in found:
                if where.sum() < 30:
                    continue
                rows, columns = (np.flatnonzero(where.any(axis)) for axis in (1, 0))
                corner = columns[0], rows[0]
                box = [*corner, columns[-1] + 1 - corner[0], rows[-1] + 1 - corner[1]]
                thing = {"id": len(things) + 1, "image_id": 10 + number, "category_id": 2 * kind + 3, "iscrowd": 0}
                thing |= {"bbox": [float(x) for x in box], "area": float(where.sum())}
                things.append(thing | {"segmentation": run_lengths(where) if len(things) % 2 else polygons(where)})
        categories = [{"id": 2 * kind + 3, "name": name} for kind, name in enumerate(STAMPS)]
        content = {"images": images, "annotations": things, "categories": categories, "info": {}}
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root


def run_lengths(where: np.ndarray) -> dict:
    """COCO's plain run lengths: of zeros and ones in turn, down the columns."""
    flat = np.concatenate(([False], where.T.reshape(-1), [False]))
    edges = np.flatnonzero(flat[1:] != flat[:-1])
    counts = np.diff(np.concatenate(([0], edges, [where.size])))
    return {"size": list(where.shape), "counts": [int(count) for count in counts]}


def polygons(where: np.ndarray) -> list[list[float]]:
    outlines, _ = cv2.findContours(where.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    return [outline.reshape(-1).astype(float).tolist() for outline in outlines if len(outline) > 3]
