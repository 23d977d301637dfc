import pickle
import warnings

import cv2
import numpy as np
import pytest
from PIL import Image

from data.decode import BadImage, decode_array, decode_pil
from tests.data.helpers import encoded, photograph

IMAGE = photograph(1)
PIL_IMAGE = Image.fromarray(IMAGE)
GREY = np.asarray(PIL_IMAGE.convert("L"))


def both(data: bytes) -> np.ndarray:
    """Decoded, having made sure that both decoders agree."""
    array, image = decode_array(data, "x"), decode_pil(data, "x")
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


def test_exif_orientation_is_ignored_as_the_original_does():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(IMAGE, "JPEG", exif=exif)
    assert both(data).shape == IMAGE.shape


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


def test_a_decompression_bomb_is_a_bad_image_that_says_so(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for form in ("JPEG", "PNG"):
        for decode in (decode_array, decode_pil):
            with pytest.raises(BadImage, match="decompression bomb"):
                decode(encoded(IMAGE, form), "x")


def test_a_bad_image_survives_the_way_from_a_worker():
    error = pickle.loads(pickle.dumps(BadImage("a.jpg", "why")))
    assert (error.name, error.reason, str(error)) == ("a.jpg", "why", "a.jpg: why")
