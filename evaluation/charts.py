"""Charts as SVG, for a page that has to stand by itself: lines over epochs, and bars around zero."""

import math
from collections.abc import Mapping, Sequence
from html import escape

COLOURS = ("#2f6fb5", "#d1642b", "#2b9a72", "#b3478f", "#c79a1b", "#5aa9d6", "#7a5bb5", "#6b7a3a")
WIDTH, HEIGHT = 440, 230
LEFT, RIGHT, TOP, BOTTOM = 54, 14, 12, 30
BAR, BAR_GAP = 16, 6
MOST_POINTS = 400  # of a line; more cannot be told apart at this width


def colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def round_step(least: float) -> float:
    """The smallest round distance of ticks that is not below ``least``."""
    power = 10 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= least * 0.999)


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers in [low, high]."""
    step = round_step((high - low) / about)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    return f"{value:.4g}".replace("e-0", "e-").replace("e+0", "e")


def signed(value: float) -> str:
    return f"{value:+.1f}".replace("-", "\u2212")


def _span(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    if low == high:
        margin = abs(low) / 10 or 1.0
        return low - margin, high + margin
    return low, high


def line_chart(title: str, lines: Mapping[int, Sequence[tuple[float, float]]]) -> str:
    """``lines``: points (x, y) by the number of a colour; points that are not finite break a line."""
    finite = [point for points in lines.values() for point in points if math.isfinite(point[1])]
    if not finite:
        return ""
    (left, right), (low, high) = _span([x for x, _ in finite]), _span([y for _, y in finite])
    across, down = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    place_x = lambda x: LEFT + across * (x - left) / (right - left)  # noqa: E731
    place_y = lambda y: TOP + down * (high - y) / (high - low)  # noqa: E731
    parts = []
    for y in ticks(low, high):
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{place_y(y):.1f}" y2="{place_y(y):.1f}"/>'
        )
        parts.append(f'<text class="tick" x="{LEFT - 7}" y="{place_y(y) + 4:.1f}" text-anchor="end">{number(y)}</text>')
    for x in ticks(left, right):
        parts.append(
            f'<text class="tick" x="{place_x(x):.1f}" y="{HEIGHT - 9}" text-anchor="middle">{number(x)}</text>'
        )
    for index, points in lines.items():
        for piece in _pieces(points):
            drawn = " ".join(f"{place_x(x):.1f},{place_y(y):.1f}" for x, y in piece)
            parts.append(f'<polyline fill="none" stroke="{colour(index)}" stroke-width="1.8" points="{drawn}"/>')
            if len(piece) == 1:
                (x, y) = piece[0]
                parts.append(f'<circle cx="{place_x(x):.1f}" cy="{place_y(y):.1f}" r="3" fill="{colour(index)}"/>')
    said = escape(title)
    head = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{said}">'
    return f"<figure><figcaption>{said}</figcaption>{head}{''.join(parts)}</svg></figure>"


def _pieces(points: Sequence[tuple[float, float]]) -> list[list[tuple[float, float]]]:
    """The points of a line between those that are not finite, every n-th of very many, and the last one."""
    step = -(-len(points) // MOST_POINTS)
    thinned = [point for place, point in enumerate(points) if place % step == 0 or place == len(points) - 1]
    pieces: list[list[tuple[float, float]]] = [[]]
    for point in thinned:
        if math.isfinite(point[1]):
            pieces[-1].append(point)
        elif pieces[-1]:
            pieces.append([])
    return [piece for piece in pieces if piece]


def bar_chart(title: str, groups: Sequence[tuple[str, Sequence[tuple[int, float]]]], unit: str = " %") -> str:
    """Bars to the left and the right of zero: (label, [(number of a colour, value), ...]) of every group."""
    values = [value for _, bars in groups for _, value in bars]
    if not values:
        return ""
    low, high = min(0.0, *values), max(0.0, *values)
    low, high = (-1.0, 1.0) if low == high else (low, high)
    label, room, width = 190, 62, 900
    across = width - label - 2 * room
    place = lambda value: label + room + across * (value - low) / (high - low)  # noqa: E731
    parts, top = [], 6
    for name, bars in groups:
        middle = top + (len(bars) * (BAR + 3)) / 2 + 4
        parts.append(f'<text class="name" x="{label - 12}" y="{middle:.1f}" text-anchor="end">{escape(name)}</text>')
        for index, value in bars:
            begin, end = sorted((place(0), place(value)))
            parts.append(
                f'<rect x="{begin:.1f}" y="{top}" width="{max(end - begin, 0.8):.1f}" height="{BAR}" rx="2" '
                f'fill="{colour(index)}"/>'
            )
            side, at = ("start", end + 6) if value >= 0 else ("end", begin - 6)
            parts.append(
                f'<text class="tick" x="{at:.1f}" y="{top + BAR - 4}" text-anchor="{side}">{signed(value)}{unit}</text>'
            )
            top += BAR + 3
        top += BAR_GAP + 4
    parts.append(f'<line class="axis" x1="{place(0):.1f}" x2="{place(0):.1f}" y1="0" y2="{top}"/>')
    said = escape(title)
    head = f'<svg viewBox="0 0 {width} {top}" role="img" aria-label="{said}">'
    return f'<figure class="wide"><figcaption>{said}</figcaption>{head}{"".join(parts)}</svg></figure>'
