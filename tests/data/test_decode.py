import io
import pickle
import warnings

import cv2
import numpy as np
import pytest
from PIL import Image

from data.decode import PLAIN, BadImage, Reading, add_reading_arguments, decode_array, decode_pil, reading_from
from tests.data.helpers import encoded, photograph
from utils import Parser, UsageError

IMAGE = photograph(1)
PIL_IMAGE = Image.fromarray(IMAGE)
GREY = np.asarray(PIL_IMAGE.convert("L"))


def both(data: bytes, reading: Reading = PLAIN) -> np.ndarray:
    """Decoded, having made sure that both decoders agree."""
    array, image = decode_array(data, "x", reading), decode_pil(data, "x", reading)
    assert image.mode == "RGB" and array.dtype == np.uint8 and array.ndim == 3 and array.flags.writeable
    assert np.array_equal(array, np.asarray(image))
    return array


def cv2_encoded(suffix: str, image: np.ndarray) -> bytes:
    return cv2.imencode(suffix, image[..., ::-1] if image.ndim == 3 else image)[1].tobytes()


def grey3(image: np.ndarray) -> np.ndarray:
    return np.repeat(image[..., None], 3, axis=2)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"quality": 20}])
@pytest.mark.parametrize("tail", [b"", bytes(3), b"appended by a camera"])
def test_a_jpeg_is_the_same_in_both_decoders(options, tail):
    array = both(encoded(IMAGE, "JPEG", **options) + tail)
    assert np.abs(array.astype(int) - IMAGE).mean() < 20


def test_a_jpeg_without_its_end_is_bad_even_if_a_preview_inside_it_has_one():
    exif = Image.Exif()
    exif[0x010E] = encoded(IMAGE[:16, :16], "JPEG").decode("latin1")
    data = encoded(IMAGE, "JPEG", exif=exif)
    assert data.count(b"\xff\xd9") >= 1
    with pytest.raises(BadImage, match="truncated"):
        decode_array(data[:-40], "x")


def test_a_grey_jpeg_has_three_equal_channels():
    array = both(encoded(PIL_IMAGE.convert("L"), "JPEG", quality=95))
    assert np.array_equal(array, grey3(array[..., 0]))


def test_a_cmyk_jpeg_becomes_rgb():
    array = both(encoded(PIL_IMAGE.convert("CMYK"), "JPEG", quality=95))
    assert np.abs(array.astype(int) - IMAGE).mean() < 8


def test_transparency_is_dropped_and_not_blended():
    alpha = np.full((*IMAGE.shape[:2], 1), 40, np.uint8)
    assert np.array_equal(both(encoded(np.concatenate([IMAGE, alpha], 2))), IMAGE)
    grey_alpha = Image.merge("LA", [PIL_IMAGE.convert("L"), Image.fromarray(alpha[..., 0])])
    assert np.array_equal(both(encoded(grey_alpha)), grey3(GREY))


@pytest.mark.parametrize("options", [{}, {"transparency": 3}, {"transparency": bytes(range(256))}])
def test_palette_images_take_their_palette_colours_without_a_warning(options):
    palette = PIL_IMAGE.quantize(200)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(both(encoded(palette, **options)), np.asarray(palette.convert("RGB")))


def test_grey_and_one_bit_images_load():
    assert np.array_equal(both(encoded(PIL_IMAGE.convert("L"))), grey3(GREY))
    one_bit = PIL_IMAGE.convert("1")
    assert np.array_equal(both(encoded(one_bit)), grey3(np.where(np.asarray(one_bit), 255, 0)))


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
@pytest.mark.parametrize("grey", [True, False])
def test_sixteen_bits_are_scaled_and_not_clipped(suffix, grey):
    image = GREY if grey else IMAGE
    fraction = np.random.default_rng(0).integers(0, 256, image.shape)  # the lower eight bits
    array = both(cv2_encoded(suffix, (image.astype(np.uint16) << 8 | fraction).astype(np.uint16)))
    assert np.abs(array.astype(int) - (grey3(image) if grey else image)).max() <= 1
    assert array.max() > array.min()


@pytest.mark.parametrize("white", [1.0, 255.0, 65535.0, 1e6])
def test_float_images_are_scaled_by_the_white_that_fits(white):
    values = (GREY / GREY.max() * white).astype(np.float32)
    array = both(encoded(Image.fromarray(values), "TIFF"))
    assert np.abs(array[..., 0] - GREY / GREY.max() * 255).max() <= 1


def test_thirty_two_bit_integers_are_scaled():
    array = both(encoded(Image.fromarray(GREY.astype(np.int32) * 257), "TIFF"))
    assert np.abs(array[..., 0].astype(int) - GREY).max() <= 1


def test_values_that_are_not_finite_are_refused():
    values = np.full((4, 4), np.nan, np.float32)
    with pytest.raises(BadImage, match="not finite"):
        decode_array(encoded(Image.fromarray(values), "TIFF"), "x")


@pytest.mark.parametrize("form", ["BMP", "WEBP", "GIF", "PPM", "TIFF"])
def test_other_formats_load(form):
    options = {"lossless": True} if form == "WEBP" else {}
    array = both(encoded(IMAGE, form, **options))
    assert array.shape == IMAGE.shape
    if form != "GIF":
        assert np.array_equal(array, IMAGE)


def test_the_first_frame_of_an_animation_is_taken():
    frames = [Image.fromarray(np.full((8, 8), level, np.uint8)) for level in (10, 200)]
    assert (both(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])) == 10).all()


TURNED = {  # what the file [[1, 2, 3], [4, 5, 6]] shows at every orientation
    1: [[1, 2, 3], [4, 5, 6]],
    2: [[3, 2, 1], [6, 5, 4]],
    3: [[6, 5, 4], [3, 2, 1]],
    4: [[4, 5, 6], [1, 2, 3]],
    5: [[1, 4], [2, 5], [3, 6]],
    6: [[4, 1], [5, 2], [6, 3]],
    7: [[6, 3], [5, 2], [4, 1]],
    8: [[3, 6], [2, 5], [1, 4]],
}


def fields(form: str, orientation: object) -> bytes:
    """Six grey fields of 16 x 16 pixels, marked with an orientation."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    levels = np.array(TURNED[1], np.uint8).repeat(16, axis=0).repeat(16, axis=1) * 40
    return encoded(np.stack([levels] * 3, axis=2), form, exif=exif)


def seen(array: np.ndarray) -> list[list[int]]:
    return np.rint(array[8::16, 8::16, 0] / 40).astype(int).tolist()


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF", "MPO"])
@pytest.mark.parametrize("orientation", TURNED)
def test_exif_orientation_is_ignored_as_the_original_does_unless_it_is_asked_for(form, orientation):
    data = fields(form, orientation)
    assert seen(both(data, Reading(exif=True))) == TURNED[orientation]
    ignored = TURNED[orientation if form == "TIFF" else 1]  # parity: Pillow turns a TIFF while it reads it
    assert seen(both(data)) == seen(np.asarray(Image.open(io.BytesIO(data)))) == ignored


@pytest.mark.parametrize("orientation", [0, 9, 255])
def test_an_orientation_that_means_nothing_turns_nothing(orientation):
    assert seen(both(fields("JPEG", orientation), Reading(exif=True))) == TURNED[1]


def test_damaged_exif_turns_nothing():
    data = encoded(IMAGE, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert np.array_equal(both(data, Reading(exif=True)), both(data))


def test_deep_greys_and_colours_are_turned_too():
    exif = Image.Exif()
    exif[0x0112] = 6
    deep = np.array(TURNED[1], np.uint16) * 600
    grey = encoded(Image.fromarray(deep), "PNG", exif=exif)
    assert both(grey, Reading(exif=True))[..., 0].tolist() == [[149, 37], [187, 75], [224, 112]]  # 4095 is white
    colours = cv2_encoded(".png", np.stack([deep] * 3, axis=2))
    chunk = grey[grey.index(b"eXIf") - 4 : grey.index(b"IDAT") - 4]
    assert both(colours[:33] + chunk + colours[33:], Reading(exif=True))[..., 0].tolist() == [
        [149, 37],
        [187, 75],
        [224, 112],
    ]


@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize("share", [0.5, 0.97])
def test_a_truncated_file_is_a_bad_image(form, share):
    data = encoded(IMAGE, form)
    for decode in (decode_array, decode_pil):
        with pytest.raises(BadImage) as caught:
            decode(data[: int(len(data) * share)], "folder/x.jpg")
        assert caught.value.name == "folder/x.jpg"
        assert caught.value.reason and "\n" not in caught.value.reason


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b"<html>not an image</html>", "not an image in a known format"),
        (bytes(1000), "not an image in a known format"),
        (b"\xff\xd8\xff\xe0" + b"garbage" * 20, ""),
        (b"\x89PNG\r\n\x1a\n" + b"garbage" * 20, ""),
    ],
)
def test_what_is_no_image_is_a_bad_image_with_a_reason(data, reason):
    for decode in (decode_array, decode_pil):
        with pytest.raises(BadImage, match=reason or None) as caught:
            decode(data, "x.jpg")
        assert "0x" not in caught.value.reason  # the same text in every run


@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF"])
def test_an_image_of_too_many_pixels_is_a_bad_image_that_names_the_option(form):
    data, pixels, before = encoded(IMAGE, form), IMAGE.shape[0] * IMAGE.shape[1], Image.MAX_IMAGE_PIXELS
    for decode in (decode_array, decode_pil):
        with pytest.raises(BadImage, match=r"10800 pixels, more than --max_image_pixels 10799: .*decompression bomb"):
            decode(data, "x", Reading(max_pixels=pixels - 1))
    both(data, Reading(max_pixels=pixels))
    assert before == Image.MAX_IMAGE_PIXELS  # other users of Pillow keep its limit


def test_more_pixels_than_pillow_allows_can_be_allowed(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    both(encoded(IMAGE, "PNG"), Reading(max_pixels=20_000))


def test_what_opencv_refuses_is_read_by_pillow(monkeypatch):
    def refuse(*_):
        raise cv2.error("CV_IO_MAX_IMAGE_PIXELS")

    data = encoded(IMAGE, "JPEG")
    expected = both(data)
    monkeypatch.setattr(cv2, "imdecode", refuse)
    assert np.array_equal(both(data), expected)


def test_the_default_limit_is_pillows():
    assert Reading().max_pixels == 2 * Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize(
    ("argv", "reading"),
    [
        ("", Reading()),
        ("--exif true --max_image_pixels 7", Reading(True, 7)),
        ("--max_image_pixels 0", r"--max_image_pixels: 0: a number of pixels, at least 1"),
        ("--max_image_pixels -5", r"--max_image_pixels: -5: a number of pixels"),
        ("--max_image_pixels 1e9", r"--max_image_pixels: 1e9: a number of pixels"),
        ("--exif maybe", "--exif: 'maybe' is neither true nor false"),
    ],
)
def test_the_options_make_a_reading_or_are_refused(argv, reading):
    parser = Parser()
    add_reading_arguments(parser)
    if isinstance(reading, Reading):
        assert reading_from(parser.parse_args(argv.split())) == reading
        return
    with pytest.raises(UsageError, match=reading):
        parser.parse_args(argv.split())


def test_a_bad_image_survives_the_way_from_a_worker():
    error = pickle.loads(pickle.dumps(BadImage("a.jpg", "why")))
    assert (error.name, error.reason, str(error)) == ("a.jpg", "why", "a.jpg: why")
