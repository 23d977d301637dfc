"""Text in pictures for people."""

import math

from PIL import ImageFont

from utils import escape

INK, PALE = (45, 45, 45), (120, 120, 120)


def font(size: int) -> ImageFont.ImageFont:
    return ImageFont.load_default(size)


def text_width(text: str, size: int) -> int:
    """In pixels."""
    return math.ceil(font(size).getlength(text))


def shortened(text: str, size: int, width: int) -> str:
    """``text`` as far as ``width`` pixels go, on one line."""
    text = escape(text)
    if text_width(text, size) <= width:
        return text
    while text and text_width(text + "\u2026", size) > width:
        text = text[:-1]
    return text + "\u2026"
