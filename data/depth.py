"""Values of more than 8 bits per channel to 256 levels: which value is white?

A file has one white, found once from all its channels:

1. What the file declares: a PGM's or PPM's maxval, a TIFF's SMaxSampleValue, MaxSampleValue or BitsPerSample (12), a
   PNG's sBIT, the precision of a JPEG 2000. A field that has to be there and says no more than that the container has
   16 bits (maxval 65535, BitsPerSample 16, precision 16) declares nothing: everybody who stores 12 bits in 16 writes
   it. One that is there by choice (sBIT 16, MaxSampleValue 65535) counts. What the values exceed is no declaration.
2. Integers: the smallest 2^n - 1, from 255 on, that no value exceeds. So the same values are the same picture in every
   container. The price: a 16-bit photograph that leaves its highest bits unused because it is dark becomes brighter,
   twice for every such bit. To keep it as it is, give its file one of the optional fields above.
3. Floats: the smallest of 1, 255 and 65535 that the values exceed by a quarter at most, which resizing filters add at
   edges; the excess is clipped. Above these the largest value.

Negative values are black. Files with 8 bits per channel never come here, and colours whose white is 65535 stay as
Pillow makes them (parity: so does torchvision's ImageFolder). Whatever is assumed, or declared, is said in the log.
"""

import contextlib
import mmap
import re
import struct

import cv2
import numpy as np
from PIL import Image

from utils import log

FULL = 65535
OVERSHOOT = 1.25  # Lanczos in two directions adds a fifth
GREYS = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")
DECLARED, HELD, FLOATS = range(3)  # what the log counts
BITS_PER_SAMPLE, PHOTOMETRIC, MAX_SAMPLE_VALUE, S_MAX_SAMPLE_VALUE = 258, 262, 281, 341  # tags of TIFF
WHITE_IS_ZERO = 0


def grey_levels(image: Image.Image, data: bytes, name: str) -> np.ndarray:
    """The values of a loaded image of a mode in GREYS as (height, width) uint8. Raises ValueError for NaN."""
    values = np.asarray(image)
    if values.dtype.kind != "u":
        values = values.astype(np.float64)
        if not np.isfinite(values).all():
            raise ValueError("holds values that are not finite")
    if image.format == "PPM" and image.mode == "I":
        values = np.rint(values * (_maxval(data) / FULL))  # Pillow has stretched them
    levels = _levels(values, _white(values, image, data, name))
    return 255 - levels if image.format == "TIFF" and image.tag_v2.get(PHOTOMETRIC) == WHITE_IS_ZERO else levels


def colour_levels(image: Image.Image, rgb: Image.Image, data: bytes, name: str) -> Image.Image:
    """``rgb``, what Pillow makes of the loaded ``image``, or a better picture of a file whose values it loses.

    Pillow keeps the high byte of 16 bits. Where the highest bit is used, or the file says that it is white, nothing is
    lost; else OpenCV reads the values. It is believed when its high bytes are Pillow's.
    """
    if _bits(image, data) <= 8:
        return rgb
    high, declared = np.asarray(rgb), _declared(image, data)
    if declared and image.format in ("PPM", "JPEG2000"):  # Pillow has stretched the values
        _say(DECLARED, f"{name}: read with {declared} as white (as the file declares)")
        return rgb
    if high.max() > 127 and not declared:
        return rgb
    values = None
    with contextlib.suppress(cv2.error):
        values = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if values is None or values.dtype != np.uint16 or values.shape[:2] != high.shape[:2] or values.ndim != 3:
        return rgb
    values = values[..., 2::-1]  # without transparency
    if np.abs((values >> 8).astype(np.int16) - high).max() > 1:  # a PPM is rounded
        return rgb
    white = _white(values, image, data, name)
    return rgb if white == FULL else Image.fromarray(_levels(values, white))


def _levels(values: np.ndarray, white: float) -> np.ndarray:
    if values.dtype.kind == "u":  # 16 bits: a table is sooner
        return _levels(np.arange(FULL + 1.0), white)[values]
    return np.clip(values * (255 / white) + 0.5, 0, 255).astype(np.uint8)


def _white(values: np.ndarray, image: Image.Image, data: bytes, name: str) -> float:
    """The value that becomes 255, and a word about it in the log unless 16 bits are used as such."""
    largest, declared = values.max(), _declared(image, data)
    if declared and image.format == "PNG" and _is_stretched(values, declared):
        declared = FULL
    if image.mode == "F":
        kind, (white, why) = FLOATS, _white_of_floats(largest, declared)
    elif declared and largest <= declared:
        kind, white, why = DECLARED, declared, "as the file declares"
    else:
        kind, white = HELD, max(255, 2 ** int(max(0, largest)).bit_length() - 1)
        why = "the smallest 2^n - 1 that holds them, since the file declares no range"
    if (white != FULL or kind == FLOATS) and largest > 0:
        shown = [f"{value:g}" if image.mode == "F" else str(int(value)) for value in (largest, white)]
        _say(kind, f"{name}: values up to {shown[0]}, read with {shown[1]} as white ({why})")
    return white


def _white_of_floats(largest: float, declared: float | None) -> tuple[float, str]:
    if declared and largest <= declared * OVERSHOOT:
        return declared, "as the file declares"
    for white in (1, 255, FULL):
        if largest <= white * OVERSHOOT:
            return white, "what exceeds it is clipped" if largest > white else "floating-point numbers"
    return largest, "their largest"


# ---------------------------------------------------------------------------------------------------------------------
# What a file declares
# ---------------------------------------------------------------------------------------------------------------------


def _declared(image: Image.Image, data: bytes) -> float | None:
    """The white that the file names; None where it names none, or no more than the container has."""
    if image.format == "PPM" and image.mode != "F":
        maxval = _maxval(data)
        return maxval if maxval < FULL else None
    if image.format == "PNG":
        bits = _significant_bits(data)
        return 2**bits - 1 if bits else None
    if image.format == "JPEG2000":
        unused = max(0, 16 - _precision(data))
        return FULL >> unused << unused if unused else None  # Pillow has shifted the values up
    if image.format == "TIFF":
        for tag in (S_MAX_SAMPLE_VALUE, MAX_SAMPLE_VALUE):
            value = image.tag_v2.get(tag)
            value = max(value) if isinstance(value, tuple) else value
            if value and value > 0:
                return float(value)
        bits = _bits(image, data)
        return 2**bits - 1 if bits not in (16, 32) else None
    return None


def _bits(image: Image.Image, data: bytes) -> int:
    """Bits per channel of the file, 8 where Pillow reads no more."""
    if image.format == "PNG":
        return data[24]
    if image.format == "TIFF":
        return max(image.tag_v2.get(BITS_PER_SAMPLE, (1,)))
    if image.format == "JPEG2000":
        return _precision(data)
    return 16 if image.format == "PPM" and image.mode != "1" and _maxval(data) > 255 else 8


def _maxval(data: bytes) -> int:
    """Of a PGM or PPM: the third number of its header."""
    header = re.match(rb"P[2356]" + rb"(?:\s|#[^\r\n]*[\r\n])+(\d+)" * 3, data)
    return int(header[3]) if header else FULL


def _precision(data: bytes) -> int:
    """Of a JPEG 2000: bits of its first channel."""
    start = data.index(b"\xff\x4f\xff\x51")  # the codestream, and the size of its image
    return (data[start + 42] & 0x7F) + 1


def _significant_bits(data: bytes) -> int | None:
    """Of a PNG: the most that its sBIT gives to grey, red, green or blue."""
    position = 8
    while position + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        if kind == b"sBIT":
            channels = data[position + 8 : position + 8 + (3 if length >= 3 else 1)]
            bits = max(channels, default=0)
            return bits if 1 <= bits <= 16 else None
        if kind == b"IDAT":
            return None
        position += 12 + length
    return None


def _is_stretched(values: np.ndarray, declared: float) -> bool:
    """Whether the values of a PNG with sBIT fill its 16 bits, as the format asks for and not everybody does it."""
    return values.max() > declared or not (values % ((FULL + 1) // (int(declared) + 1))).any()


# ---------------------------------------------------------------------------------------------------------------------
# What is said about it
# ---------------------------------------------------------------------------------------------------------------------

_COUNTS = np.frombuffer(mmap.mmap(-1, 8 * 3), np.int64)  # a process and the workers it forks count together
_SAID = {10**digits for digits in range(12)}


def _say(kind: int, sentence: str) -> None:
    """The first time, and then whenever ten times as many images were like that: a data set may hold a million."""
    _COUNTS[kind] += 1
    count = int(_COUNTS[kind])
    if count in _SAID:
        log.warning("warning: %s%s", sentence, f"; {count} such images read so far" if count > 1 else "")
