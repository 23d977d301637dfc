"""Features laid out in the plane by t-SNE (van der Maaten and Hinton, 2008): points, and a picture of them."""

import colorsys
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw

from evaluation.drawing import INK, PALE, font, shortened, text_width
from randomness import counted_uniforms
from utils import UsageError

LEAST_ITERATIONS = 300  # the first 250 exaggerate early, and leave no divergence to be told
NEIGHBOURS = 5


class Layout(NamedTuple):
    """``points`` (images, 2) float32 in the plane, and the divergence that is left."""

    points: np.ndarray
    divergence: float


def check_plane(images: int, perplexity: float, iterations: int) -> None:
    """Raise UsageError for what t-SNE cannot lay out."""
    if not perplexity >= 1:
        raise UsageError(f"--perplexity {perplexity:g}: about how many neighbours an image has, at least 1")
    if images <= perplexity:
        raise UsageError(
            f"--perplexity {perplexity:g}: {images} images are too few, there have to be more of them than "
            "neighbours; lower it or pass more images"
        )
    if iterations < LEAST_ITERATIONS:
        raise UsageError(f"--iters {iterations}: must be at least {LEAST_ITERATIONS}")


def check_library() -> None:
    """Raise UsageError where scikit-learn is missing, before anything is computed."""
    try:
        import sklearn.manifold  # noqa: F401
    except ImportError:
        raise UsageError(
            "scikit-learn is not installed and t-SNE is its: pip install -r requirements-eval.txt"
        ) from None


def embed(features: torch.Tensor, perplexity: float, iterations: int, seed: int, start: str = "pca") -> Layout:
    """Exact t-SNE of L2-normalised ``features`` (images, dim). ``start``: "pca", or "random" places from the seed.

    Memory and time grow with the square of the images.
    """
    from sklearn.manifold import TSNE

    unit = torch.nn.functional.normalize(features.double()).numpy()
    tsne = TSNE(
        perplexity=perplexity,
        max_iter=iterations,
        init=start,
        method="exact",
        random_state=seed,
        early_exaggeration=12.0,
        learning_rate="auto",
    )
    points = tsne.fit_transform(unit).astype(np.float32)
    return Layout(points, float(tsne.kl_divergence_))


def purity(points: np.ndarray, labels: np.ndarray, neighbours: int = NEIGHBOURS) -> float:
    """Share of the nearest ``neighbours`` of every point that have its label."""
    distances = np.square(points[:, None].astype(np.float64) - points).sum(axis=-1)
    np.fill_diagonal(distances, np.inf)
    nearest = np.argsort(distances, axis=1, kind="stable")[:, : min(neighbours, len(points) - 1)]
    return float((labels[nearest] == labels[:, None]).mean())


# ---------------------------------------------------------------------------------------------------------------------
# The picture: uint8 (height, width, 3)
# ---------------------------------------------------------------------------------------------------------------------

SIDE, MARGIN, LINE = 900, 28, 34  # pixels of a panel, around it, and of a line of text
FINER = 3  # drawn so many times as large, then reduced
NAME, FRAME = 320, (205, 205, 205)  # pixels of a class's name at most; around a panel
COLOURS = (
    (31, 119, 180),  # blue
    (255, 127, 14),  # orange
    (44, 160, 44),  # green
    (214, 39, 40),  # red
    (148, 103, 189),  # purple
    (140, 86, 75),  # brown
    (227, 119, 194),
    (90, 90, 90),
    (188, 189, 34),
    (23, 190, 207),
)


def class_colours(classes: int) -> list[tuple[int, int, int]]:
    """Colours that can be told apart: ten chosen ones, for more classes hues in equal steps, light and dark."""
    if classes <= len(COLOURS):
        return list(COLOURS[:classes])
    values = [(number / classes, 0.75, (0.9, 0.6)[number % 2]) for number in range(classes)]
    return [tuple(round(255 * part) for part in colorsys.hsv_to_rgb(*value)) for value in values]


def plane_picture(
    panels: Sequence[tuple[str, np.ndarray]], labels: np.ndarray, class_names: Sequence[str], title: str = ""
) -> np.ndarray:
    """Panels of (caption, points (images, 2)) beside each other, points in their classes' colours, and a legend."""
    colours = class_colours(len(class_names))
    columns = min(len(panels), 2) if len(panels) != 3 else 3
    names = [shortened(name, 20, NAME) for name in class_names]
    legend = max(text_width(name, 20) for name in names) + 3 * MARGIN
    rows = -(-len(panels) // columns)
    per_column = (rows * (SIDE + LINE) - MARGIN) // LINE
    legends = -(-len(names) // per_column)
    width = MARGIN + columns * (SIDE + MARGIN) + legends * legend
    height = MARGIN + LINE * bool(title) + rows * (SIDE + LINE + MARGIN)
    canvas = Image.new("RGB", (width, height), "white")
    draw, top = ImageDraw.Draw(canvas), MARGIN
    if title:
        draw.text((MARGIN, top), title, fill=INK, font=font(24))
        top += LINE + MARGIN // 2
    for number, (caption, points) in enumerate(panels):
        left, upper = MARGIN + number % columns * (SIDE + MARGIN), top + number // columns * (SIDE + LINE + MARGIN)
        canvas.paste(scatter(points, labels, colours), (left, upper))
        draw.text((left, upper + SIDE + 8), caption, fill=PALE, font=font(18))
    left = MARGIN + columns * (SIDE + MARGIN)
    for number, (name, colour) in enumerate(zip(names, colours, strict=True)):
        x, y = left + number // per_column * legend, top + number % per_column * LINE
        canvas.paste(_dot(colour, 9), (x, y + 3))
        draw.text((x + MARGIN, y), name, fill=INK, font=font(20))
    return np.asarray(canvas)


def scatter(points: np.ndarray, labels: np.ndarray, colours: Sequence[tuple[int, int, int]]) -> Image.Image:
    """SIDE x SIDE pixels, the same scale in both directions, no ticks: distances in t-SNE have no unit."""
    side = SIDE * FINER
    middle, span = (points.max(axis=0) + points.min(axis=0)) / 2, np.ptp(points, axis=0).max()
    places = (points - middle) / max(span, 1e-12) * 0.92 * side + side / 2
    radius = FINER * max(3.0, min(8.0, 130 / math.sqrt(len(points))))
    canvas = Image.new("RGB", (side, side), "white")
    draw = ImageDraw.Draw(canvas, "RGBA")
    for index in np.argsort(counted_uniforms(0, np.arange(len(points)))).tolist():  # no class covers another
        (x, y), colour = places[index].tolist(), colours[labels[index]]
        place = (x - radius, side - y - radius, x + radius, side - y + radius)
        draw.ellipse(place, fill=(*colour, 205), outline=(255, 255, 255, 230), width=FINER)
    draw.rectangle((0, 0, side - 1, side - 1), outline=FRAME, width=FINER)
    return canvas.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def _dot(colour: tuple[int, int, int], radius: int) -> Image.Image:
    side = 2 * radius * FINER
    dot = Image.new("RGB", (side, side), "white")
    ImageDraw.Draw(dot).ellipse((0, 0, side - 1, side - 1), fill=colour)
    return dot.resize((2 * radius,) * 2, Image.Resampling.LANCZOS)
