"""Files with more than 8 bits per channel, written here byte by byte, and the levels they have to become."""

import io
import logging
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from data import depth
from data.decode import decode_array, decode_pil
from tests.data.helpers import encoded


@pytest.fixture(autouse=True)
def said(caplog, monkeypatch):
    """What the log says, counted anew in every test."""
    depth._COUNTS[:] = 0
    monkeypatch.setattr(depth.log, "propagate", True)
    caplog.set_level(logging.INFO, "tutelage")
    return lambda: [record.getMessage() for record in caplog.records]


def both(data: bytes) -> np.ndarray:
    """Decoded, having made sure that both decoders agree."""
    array, image = decode_array(data, "x"), decode_pil(data, "x")
    assert image.mode == "RGB" and np.array_equal(array, np.asarray(image))
    return array


def grey(data: bytes) -> list[int]:
    """The levels of a grey picture of one row."""
    array = both(data)
    assert (array == array[..., :1]).all() and len(array) == 1
    return array[0, :, 0].tolist()


def colours(values: list[int]) -> np.ndarray:
    """A row of pixels: red as given, green in reverse order, blue 0; (1, pixels, 3)."""
    return np.array([[values, values[::-1], [0] * len(values)]], np.uint16).transpose(0, 2, 1)


# ---- writers --------------------------------------------------------------------------------------------------------


def png(values, sbit: bytes = b"") -> bytes:
    """16 bits per channel; ``values`` (height, width, channels), grey, grey and alpha, RGB or RGBA."""
    values = np.atleast_3d(np.array(values, ">u2"))
    height, width, channels = values.shape

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = zlib.compress(b"".join(b"\0" + row.astype(">u2").tobytes() for row in values))
    body = chunk(b"IHDR", header) + (chunk(b"sBIT", sbit) if sbit else b"") + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def pnm(values, maxval: int = 65535, plain: bool = False) -> bytes:
    """A PGM or PPM with a comment in its header."""
    values = np.atleast_3d(np.array(values, ">u2"))
    height, width, channels = values.shape
    magic = {(1, False): 5, (3, False): 6, (1, True): 2, (3, True): 3}[channels, plain]
    body = b" ".join(b"%d" % value for value in values.ravel()) + b"\n" if plain else values.tobytes()
    return b"P%d\n# 12 34\n%d %d\n%d\n" % (magic, width, height, maxval) + body


SHORT, LONG, FLOAT = 3, 4, 11


def tiff(values, bits: int = 16, form: int = 1, photometric: int | None = None, packed: bytes = b"", **tags) -> bytes:
    """One strip, uncompressed. ``form`` 1: unsigned, 2: signed, 3: float; ``tags``: name=(type, value)."""
    values = np.atleast_3d(np.array(values, f"<{' uif'[form]}{max(16, bits) // 8}"))
    height, width, channels = values.shape
    body = packed or values.tobytes()
    entries = {256: (LONG, [width]), 257: (LONG, [height]), 258: (SHORT, [bits] * channels), 259: (SHORT, [1])}
    entries |= {262: (SHORT, [(2 if channels == 3 else 1) if photometric is None else photometric])}
    entries |= {277: (SHORT, [channels]), 278: (LONG, [height]), 279: (LONG, [len(body)])}
    entries |= {339: (SHORT, [form] * channels), 273: (LONG, [8])}
    numbers = {"max_sample_value": 281, "s_max_sample_value": 341}
    entries |= {numbers[name]: (kind, [value] * channels) for name, (kind, value) in tags.items()}
    directory, tail, start = b"", b"", 8 + len(body)  # of the directory; what does not fit into it follows
    for tag, (kind, values) in sorted(entries.items()):
        content = struct.pack("<" + {SHORT: "H", LONG: "I", FLOAT: "f"}[kind] * len(values), *values)
        if len(content) > 4:
            place = start + 2 + 12 * len(entries) + 4 + len(tail)
            content, tail = struct.pack("<I", place), tail + content
        directory += struct.pack("<HHI", tag, kind, len(values)) + content.ljust(4, b"\0")
    return b"II*\0" + struct.pack("<I", start) + body + struct.pack("<H", len(entries)) + directory + bytes(4) + tail


# ---- integers -------------------------------------------------------------------------------------------------------

CONTAINERS = pytest.mark.parametrize("write", [png, tiff, pnm])
PICTURES = pytest.mark.parametrize(
    ("values", "levels", "white"),
    [
        ([0, 32768, 65535, 257], [0, 128, 255, 1], None),
        ([0, 40000, 10000, 1], [0, 156, 39, 0], None),  # the highest bit is used: 16 bits
        ([0, 2048, 4095, 1000], [0, 128, 255, 62], 4095),
        ([0, 600, 1023, 1], [0, 150, 255, 0], 1023),
        ([0, 300, 511, 2], [0, 150, 255, 1], 511),
        ([0, 100, 255, 7], [0, 100, 255, 7], 255),
        ([0, 3, 5, 1], [0, 3, 5, 1], 255),  # fewer than 8 bits stay dark
        ([0, 0, 0, 0], [0, 0, 0, 0], None),
    ],
)


@CONTAINERS
@PICTURES
def test_the_same_sixteen_bit_values_are_the_same_picture_in_every_container(write, values, levels, white, said):
    assert grey(write([values])) == levels
    if white is None:
        assert said() == []
    else:
        assert said()[0].startswith(f"warning: x: values up to {max(values)}, read with {white} as white (the smallest")


@CONTAINERS
@PICTURES
def test_colours_have_the_levels_of_greys(write, values, levels, white):
    found = both(write(colours(values)))
    if white is None:  # parity: Pillow's pixels, the high byte; of a PPM it rounds
        expected = np.asarray(Image.open(io.BytesIO(write(colours(values)))))
        assert np.array_equal(found, expected)
        assert np.abs(found.astype(int) - colours(levels)).max() <= 1
    else:
        assert np.array_equal(found, colours(levels))


def test_transparency_does_not_count_as_a_value():
    row = [[0, 65535], [1000, 0], [4095, 9]]
    assert grey(png([row])) == [0, 62, 255]
    assert both(png([[[0, 1000, 4095, 65535]]])).tolist() == [[[0, 62, 255]]]


# ---- what a file declares -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        pnm([[0, 1000, 2000]], 4095),
        pnm([[0, 1000, 2000]], 4095, plain=True),
        tiff([[0, 1000, 2000]], max_sample_value=(SHORT, 4095)),
        tiff([[0, 1000, 2000]], s_max_sample_value=(SHORT, 4095)),
        tiff([[0, 1000, 2000]], s_max_sample_value=(SHORT, 4095), max_sample_value=(SHORT, 65535)),
        tiff([[0, 1000, 2000]], bits=12, packed=bytes.fromhex("0003e87d00")),
        png([[0, 1000, 2000]], sbit=b"\x0c"),  # values as they are, though the format asks for stretched ones
        png([[0, 16000, 32001]], sbit=b"\x0c"),  # stretched
    ],
)
def test_the_range_that_a_file_declares_holds_though_its_values_need_less(data):
    assert grey(data) == [0, 62, 125]


@pytest.mark.parametrize(
    "data",
    [
        pnm(colours([0, 1000, 2000]), 4095),
        pnm(colours([0, 1000, 2000]), 4095, plain=True),
        tiff(colours([0, 1000, 2000]), max_sample_value=(SHORT, 4095)),
        png(colours([0, 1000, 2000]), sbit=b"\x0c\x0c\x0c"),
    ],
)
def test_the_declared_range_holds_for_colours(data, said):
    assert np.array_equal(both(data), colours([0, 62, 125]))
    assert "as the file declares" in said()[0]


DARK = [0, 4112, 16448]  # 16 and 64 times 257


@pytest.mark.parametrize(
    "data",
    [
        png([DARK], sbit=b"\x10"),
        png(colours(DARK), sbit=b"\x10\x10\x10"),
        png([DARK], sbit=b"\x0c"),  # 12 bits, stretched
        tiff([DARK], max_sample_value=(SHORT, 65535)),
        tiff(colours(DARK), max_sample_value=(SHORT, 65535)),
    ],
)
def test_a_dark_photograph_stays_dark_where_its_file_says_so(data, said):
    assert both(data)[0, :, 0].tolist() == [0, 16, 64]
    assert said() == []


def test_a_dark_stretched_png_is_known_by_its_empty_low_bits():
    assert grey(png([[0, 16 * 16, 16 * 255]], sbit=b"\x0c")) == [0, 1, 16]


@pytest.mark.parametrize(
    "data",
    [
        tiff([[0, 1000, 4095]], max_sample_value=(SHORT, 255)),  # exceeded
        tiff([[0, 1000, 4095]], max_sample_value=(SHORT, 0)),
        png([[0, 1000, 4095]], sbit=b"\x00"),
        png([[0, 1000, 4095]], sbit=b"\xff"),
    ],
)
def test_what_cannot_be_a_range_is_no_declaration(data):
    assert grey(data) == [0, 62, 255]


def test_a_jpeg_2000_tells_its_precision():
    data = bytearray(encoded(Image.fromarray(np.array([[0, 16000, 32000] * 8] * 8, np.uint16)), "JPEG2000"))
    assert both(bytes(data))[0, :3, 0].tolist() == [0, 125, 249]  # 32767 is white
    precision = data.index(b"\xff\x4f\xff\x51") + 42
    assert data[precision] == 15
    image = Image.open(io.BytesIO(bytes(data)))
    data[precision] = 11
    assert depth._declared(image, bytes(data)) == 65520  # Pillow shifts 4095 up


# ---- other kinds of numbers -----------------------------------------------------------------------------------------


def test_negative_values_are_black_and_zero_may_be_white():
    assert grey(tiff([[-300, 0, 16384, 32767]], form=2)) == [0, 0, 128, 255]
    assert grey(tiff([[0, 32768, 65535]], photometric=0)) == [255, 127, 0]


def test_thirty_two_bits_have_the_smallest_power_that_holds_them():
    assert grey(tiff([[0, 2**23, 2**24 - 1]], bits=32)) == [0, 128, 255]
    assert grey(tiff([[0, 1000, 4095]], bits=32)) == [0, 62, 255]


@pytest.mark.parametrize(
    ("values", "levels", "said_of_it"),
    [
        ([0, 0.5, 1.0], [0, 128, 255], "up to 1, read with 1 as white (floating"),
        ([-0.02, 0.5, 1.001], [0, 128, 255], "up to 1.001, read with 1 as white (what exceeds it is clipped)"),
        ([0, 0.5, 1.2], [0, 128, 255], "up to 1.2, read with 1 as white"),
        ([0, 100, 255], [0, 100, 255], "up to 255, read with 255 as white"),
        ([0, 100, 255.5], [0, 100, 255], "up to 255.5, read with 255 as white"),
        ([0, 32768, 65540.0], [0, 128, 255], "up to 65540, read with 65535 as white"),
        ([0, 1e5, 2e5], [0, 128, 255], "up to 200000, read with 200000 as white (their largest)"),
    ],
)
def test_floats_a_hair_above_a_range_belong_to_it(values, levels, said_of_it, said):
    assert grey(tiff([values], bits=32, form=3)) == levels
    assert said_of_it in said()[0]


def test_floats_have_the_white_their_file_declares():
    assert grey(tiff([[0, 1, 2]], bits=32, form=3, s_max_sample_value=(FLOAT, 4.0))) == [0, 64, 128]
    assert grey(tiff([[0, 2, 4.001]], bits=32, form=3, s_max_sample_value=(FLOAT, 4.0))) == [0, 128, 255]


def test_eight_bits_are_pillows_whatever_a_file_declares():
    data = encoded(Image.fromarray(np.array([[0, 3, 9]], np.uint8)), "PNG")
    marked = data[:33] + png([[0]], sbit=b"\x04")[33:46] + data[33:]
    assert grey(data) == grey(marked) == [0, 3, 9]
    assert grey(b"P5 3 1 255\n\0\3\t") == [0, 3, 9]
    assert grey(encoded(Image.fromarray(np.array([[0, 0, 1]], bool)), "PPM")) == [0, 0, 255]


# ---- the log --------------------------------------------------------------------------------------------------------


def test_the_log_names_the_first_image_of_a_kind_and_counts_the_others(said):
    twelve, floats = tiff([[0, 1000, 4095]]), tiff([[0, 0.5]], bits=32, form=3)
    for number in range(123):
        decode_array(twelve, f"{number}.tif")
    decode_array(floats, "float.tif")
    assert [line.split(":")[1] for line in said()] == [" 0.tif", " 9.tif", " 99.tif", " float.tif"]
    assert [line.split("; ")[-1] for line in said()[1:3]] == [f"{n} such images read so far" for n in (10, 100)]


def test_processes_that_a_run_forks_count_together(said):
    data = tiff([[0, 1000, 4095]])
    decode_array(data, "first.tif")
    child = os.fork()
    if not child:
        for _ in range(9):
            decode_array(data, "x")
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert depth._COUNTS.tolist() == [0, 10, 0]
    decode_array(data, "last.tif")
    assert [line.split(":")[1] for line in said()] == [" first.tif"]
