"""A chart of bars around zero, drawn with Pillow: groups of one bar per series, with their values."""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from evaluation.charts import round_step

COLOURS = ((0, 114, 178), (230, 159, 0), (0, 158, 115), (204, 121, 167), (86, 180, 233), (213, 94, 0))  # Okabe and Ito
INK, SOFT, GRID = (35, 38, 43), (110, 116, 125), (228, 231, 235)
SCALE = 3  # drawn so much larger, then reduced: smooth edges
BAR, BETWEEN, AROUND = 52, 8, 46  # pixels: a bar, the gap to its neighbour, half the gap between groups
LEFT, RIGHT, TOP, BOTTOM, PLOT = 74, 28, 104, 72, 270  # margins, and the height of what they surround
TICKS = 5


def bar_chart(
    title: str,
    subtitle: str,
    series: Sequence[str],
    groups: Sequence[tuple[str, str, Sequence[float | None]]],
    unit: str = " %",
) -> np.ndarray:
    """uint8 (height, width, 3). ``groups``: label, a line below it, and of each of ``series`` a value or None."""
    values = [value for *_, row in groups for value in row if value is not None]
    ticks = ticks_over(min(*values, 0.0), max(*values, 0.0))
    canvas = _Canvas(len(series), len(groups), ticks, [title, subtitle, *series])
    canvas.text((LEFT, 24), title, 19, INK, "lm")
    canvas.text((LEFT, 47), subtitle, 13, SOFT, "lm")
    canvas.legend(series)
    step = ticks[1] - ticks[0]
    decimals = next(digits for digits in range(9) if math.isclose(step, round(step, digits)))
    for tick in ticks:
        zero = abs(tick) < 1e-9
        canvas.line(tick, SOFT if zero else GRID, 1.6 if zero else 1)
        label = "0" if zero else f"{tick:+.{decimals}f}"
        canvas.text((LEFT - 10, canvas.y(tick)), label + unit, 12, SOFT, "rm")
    for place, (label, below, row) in enumerate(groups):
        left = canvas.group_left(place)
        for number, value in enumerate(row):
            if value is not None:
                canvas.bar(
                    left + number * (BAR + BETWEEN), value, COLOURS[number % len(COLOURS)], f"{value:+.1f}{unit}"
                )
        middle = left + (len(series) * (BAR + BETWEEN) - BETWEEN) / 2
        canvas.text((middle, canvas.height - BOTTOM + 24), label, 14, INK, "mm")
        canvas.text((middle, canvas.height - BOTTOM + 44), below, 12, SOFT, "mm")
    return canvas.picture()


def ticks_over(low: float, high: float) -> list[float]:
    """Round numbers around ``low`` to ``high``, with room for a label beyond both ends; the last are the ends."""
    span = max(high - low, 1e-3)
    step = round_step(span / TICKS)
    room = 0.12 * span
    first = math.floor((low - room * (low < 0)) / step)
    last = max(first + 1, math.ceil((high + room * (high > 0)) / step))
    return [number * step for number in range(first, last + 1)]


class _Canvas:
    """What is drawn on, in pixels of the finished picture."""

    def __init__(self, series: int, groups: int, ticks: Sequence[float], texts: Sequence[str]):
        self.group_width = series * (BAR + BETWEEN) - BETWEEN + 2 * AROUND
        self.ticks, self.height = ticks, TOP + PLOT + BOTTOM
        legend = sum(self.font(13).getlength(text) / SCALE + 44 for text in texts[2:])
        least = max(
            legend, *(self.font(size).getlength(t) / SCALE for t, size in zip(texts[:2], (19, 13), strict=True))
        )
        self.plot_width = max(groups * self.group_width, math.ceil(least))
        self.width = LEFT + self.plot_width + RIGHT
        self.image = Image.new("RGB", (self.width * SCALE, self.height * SCALE), (255, 255, 255))
        self.draw = ImageDraw.Draw(self.image)
        self.margin = (self.plot_width - groups * self.group_width) / 2

    @staticmethod
    def font(size: int) -> ImageFont.ImageFont:
        return ImageFont.load_default(size * SCALE)

    def group_left(self, place: int) -> float:
        return LEFT + self.margin + place * self.group_width + AROUND

    def y(self, value: float) -> float:
        low, high = self.ticks[0], self.ticks[-1]
        return TOP + PLOT * (high - value) / (high - low)

    def text(self, place: tuple[float, float], text: str, size: int, colour: tuple, anchor: str) -> None:
        x, y = (SCALE * part for part in place)
        self.draw.text((x, y), text, colour, self.font(size), anchor)

    def line(self, value: float, colour: tuple, thickness: float) -> None:
        y = SCALE * self.y(value)
        ends = [(SCALE * LEFT, y), (SCALE * (LEFT + self.plot_width), y)]
        self.draw.line(ends, colour, round(thickness * SCALE))

    def bar(self, left: float, value: float, colour: tuple, label: str) -> None:
        zero, end = self.y(0.0), self.y(value)
        top, bottom = sorted((zero, end))
        if bottom - top >= 1 / SCALE:
            box = [SCALE * part for part in (left, top, left + BAR, bottom)]
            up = value > 0
            radius = min(4 * SCALE, (bottom - top) * SCALE / 2)
            self.draw.rounded_rectangle(box, radius, colour, corners=(up, up, not up, not up))
        place = end - 11 if value >= 0 else end + 11
        self.text((left + BAR / 2, place), label, 12, INK, "mm")

    def legend(self, series: Sequence[str]) -> None:
        x, y = LEFT, 76
        for number, name in enumerate(series):
            box = [SCALE * part for part in (x, y - 6, x + 12, y + 6)]
            self.draw.rounded_rectangle(box, 2 * SCALE, COLOURS[number % len(COLOURS)])
            self.text((x + 19, y), name, 13, INK, "lm")
            x += 19 + self.font(13).getlength(name) / SCALE + 25

    def picture(self) -> np.ndarray:
        return np.asarray(self.image.reduce(SCALE))
