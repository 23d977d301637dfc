"""Maps, masks and pictures of attention, and the script that writes them."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.decode import BadImage
from data.preprocess import to_pixels
from evaluation.attention import (
    attention_maps,
    attention_sheet,
    blended,
    bright_colour,
    coloured_heads,
    head_colours,
    heat,
    keep_mass,
    stretched,
)
from evaluation.image_files import image_files, read_image, refuse_unreadable
from models import build_backbone
from models.vit import VisionTransformer
from tests.sources import Stripes
from utils import UsageError, run_cli
from visualize_attention import main

COLOUR_MAPS = Path(__file__).parent / "golden" / "eval_core" / "data_colormaps.json"


def small(**kwargs) -> VisionTransformer:
    return VisionTransformer(embed_dim=12, depth=2, num_heads=3, patch_size=4, img_size=32, **kwargs).eval()


# ---- maps and masks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [{}, {"num_class_tokens": 2}, {"num_registers": 3}])
@pytest.mark.parametrize(("height", "width"), [(32, 32), (40, 24), (43, 30)])
def test_maps_are_the_attention_of_the_class_token_to_the_patches(tokens, height, width):
    model, images = small(**tokens), torch.randn(2, 3, height, width)
    rows, columns = height // 4, width // 4
    maps = attention_maps(model, images)
    assert maps.shape == (2, 3, rows, columns)
    full = model.get_last_selfattention(images[..., : rows * 4, : columns * 4])
    patches = slice(model.num_prefix_tokens, None)
    torch.testing.assert_close(maps.flatten(2), full[:, :, 0, patches])
    last = model.num_class_tokens - 1
    torch.testing.assert_close(attention_maps(model, images, class_token=last).flatten(2), full[:, :, last, patches])


def test_networks_without_a_class_token_are_refused():
    with pytest.raises(UsageError, match=r"ResNet.*vit_"):
        attention_maps(build_backbone("resnet18"), torch.randn(1, 3, 64, 64))
    with pytest.raises(UsageError, match=r"VisionTransformer: no class token"):
        attention_maps(small(num_class_tokens=0), torch.randn(1, 3, 32, 32))


@pytest.mark.parametrize("threshold", [0.1, 0.6, 0.95, 1.0])
def test_a_mask_keeps_the_fewest_strongest_patches_that_hold_the_mass(threshold):
    maps = torch.rand(2, 3, 5, 7, dtype=torch.float64) ** 3
    masks = keep_mass(maps, threshold)
    assert masks.shape == maps.shape and masks.dtype == torch.bool
    for values, mask in zip(maps.flatten(0, 1), masks.flatten(0, 1), strict=True):
        kept, total = values[mask], values.sum()
        assert kept.sum() >= threshold * total - 1e-9  # enough of it,
        assert kept.sum() - kept.min() < threshold * total + 1e-9  # with no patch to spare,
        assert mask.all() or kept.min() >= values[~mask].max()  # and the strongest ones


# ---- pictures -------------------------------------------------------------------------------------------------------


def test_heat_uses_the_reference_colour_table():
    viridis = np.array(json.loads(COLOUR_MAPS.read_text())["viridis"])
    values = np.linspace(-3, 5, 1000).reshape(20, 50)
    index = np.minimum(255, np.floor(256 * (values + 3) / 8)).astype(int)
    assert np.array_equal(heat(values), viridis[index])
    assert np.array_equal(heat(np.ones((2, 2))), np.broadcast_to(viridis[0], (2, 2, 3)))


def test_pictures_show_the_image_in_its_own_colours_or_stretched():
    photograph = Stripes(size=32).array(1)
    mean, std = np.array((0.485, 0.456, 0.406)), np.array((0.229, 0.224, 0.225))
    normalised = torch.from_numpy((photograph / 255 - mean) / std).permute(2, 0, 1).float()
    assert np.array_equal(to_pixels(normalised), photograph)
    assert (stretched(normalised).min(), stretched(normalised).max()) == (0, 255)


def test_a_mask_is_half_colour_half_image_with_an_outline_and_the_rest_is_untouched():
    image = np.full((40, 40, 3), 100, np.uint8)
    mask = np.zeros((40, 40), bool)
    mask[8:32, 8:32] = True
    picture = blended(image, mask, (255, 0, 51))
    assert picture[20, 20].tolist() == [177, 50, 75] and picture[8, 20].tolist() == [255, 0, 51]
    assert np.array_equal(picture[~mask], image[~mask])


def test_colours_are_bright_differ_and_are_the_same_every_time():
    colours = [bright_colour(number) for number in range(12)]
    assert colours == [bright_colour(number) for number in range(12)] and len(set(colours)) > 8
    assert all(max(colour) == 255 and min(colour) == 0 for colour in colours)


def test_coloured_heads_paint_a_patch_for_the_head_that_looks_at_it_most():
    maps = torch.full((3, 4, 5), 0.001, dtype=torch.float64)
    maps[0, 0, 0] = maps[1, 0, 0] = 0.5  # two heads look there alike
    maps[1, 2, 3], maps[2, 3, 4], maps[2, 3, 3] = 0.4, 0.9, 0.2
    maps /= maps.sum(dim=(1, 2), keepdim=True)
    picture = coloured_heads(np.full((32, 40, 3), 200, np.uint8), maps, 0.8)
    first, second, third = head_colours(3).tolist()
    assert picture[3, 3].tolist() == first and picture[31, 39].tolist() == third
    low, high = maps[1].min(), maps[1].max()
    light = ((maps[1, 2, 3] - low) / (high - low)).sqrt().item()
    expected = np.array(second) * light + 20 * (1 - light)
    assert np.abs(picture[20, 30] - expected).max() <= 0.5
    assert (picture[12, 12] == 20).all()  # a tenth of the image where no head looks
    assert not coloured_heads(np.zeros((8, 10, 3), np.uint8), torch.full((3, 4, 5), torch.nan), 0.6).any()


@pytest.mark.parametrize("heads", [1, 3, 6, 12])
def test_the_sheet_holds_the_image_the_mean_and_every_head(heads):
    image = Stripes(size=48).array(0)
    sheets = [attention_sheet(image, torch.rand(heads, 6, 6)) for _ in range(2)]
    assert sheets[0].dtype == np.uint8 and sheets[0].shape[2] == 3
    assert sheets[0].shape == sheets[1].shape  # so that sheets can be stacked
    cells = 2 + heads
    assert sheets[0].shape[0] * sheets[0].shape[1] > cells * 240 * 240
    wider = attention_sheet(image, torch.rand(heads, 6, 6), [image] * heads)
    assert wider.size > sheets[0].size


def test_hidden_pictures_of_a_folder_are_passed_over(tmp_path):
    for name in (".shown/b.jpg", ".shown/._b.jpg", ".shown/@eaDir/b.jpg/thumb.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert image_files(str(tmp_path / ".shown")) == [tmp_path / ".shown" / "b.jpg"]


# ---- the script -----------------------------------------------------------------------------------------------------


@pytest.fixture
def visualise(monkeypatch, tmp_path, capsys):
    """Run the script in this process: (exit code, standard output, standard error)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        options = ["--device", "cpu", "--output_dir", tmp_path / "out", *arguments]
        monkeypatch.setattr(sys, "argv", ["visualize_attention.py", *map(str, options)])
        with pytest.raises(SystemExit) as exit_:
            run_cli(main)
        return exit_.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def weights(tmp_path) -> Path:
    torch.save(build_backbone("vit_micro", 8, img_size=64).state_dict(), tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


def photographs(folder: Path) -> Path:
    folder.mkdir()
    image = Image.fromarray(Stripes(size=90).array(0)).crop((0, 0, 90, 61))
    (folder / "nested").mkdir()
    image.save(folder / "one.jpg")
    image.convert("L").save(folder / "two.png")
    image.convert("RGBA").save(folder / "nested" / "one.png")
    (folder / "notes.txt").write_text("not an image")
    return folder


def test_one_image_becomes_the_originals_files_and_a_sheet(visualise, weights, tmp_path):
    image = photographs(tmp_path / "photos") / "one.jpg"
    code, said, error = visualise(
        "--pretrained_weights", weights, "--image_path", image, "--image_size", 60, 84, "--threshold", 0.6
    )
    assert code == 0, error
    names = {path.name for path in (tmp_path / "out").iterdir()}
    heads = {f"attn-head{h}.png" for h in range(4)} | {f"mask_th0.6_head{h}.png" for h in range(4)}
    assert names == {"img.png", "sheet.png"} | heads and "one.jpg" in said
    for name in names - {"sheet.png"}:
        with Image.open(tmp_path / "out" / name) as picture:
            assert (picture.size, picture.mode) == ((80, 56), "RGB")  # cut to whole patches
    with Image.open(tmp_path / "out" / "attn-head0.png") as picture:
        blocks = np.asarray(picture).reshape(7, 8, 10, 8, 3)
    assert (blocks == blocks[:, :1, :, :1]).all()  # every patch is one colour


def test_of_two_class_tokens_both_are_shown(visualise, tmp_path):
    model = build_backbone("vit_micro", 8, img_size=64, num_class_tokens=2).eval()
    torch.save(model.state_dict(), tmp_path / "two.pth")
    image = photographs(tmp_path / "photos") / "one.jpg"
    options = ("--image_path", image, "--image_size", 60, 84, "--threshold", 0.6, "--color_heads")
    code, _, error = visualise("--pretrained_weights", tmp_path / "two.pth", *options)
    assert code == 0, error
    names = {path.name for path in (tmp_path / "out").iterdir()}
    heads = {f"attn{t}-head{h}.png" for t in ("", "-cls+") for h in range(4)}
    assert names == {"img.png", "sheet.png", "heads.png", "heads-cls+.png"} | heads | {
        f"mask{t}_th0.6_head{h}.png" for t in ("", "-cls+") for h in range(4)
    }
    for token, name in enumerate(("attn-head1.png", "attn-cls+-head1.png")):
        values = attention_maps(model, read_image(image, [60, 84])[None], token)[0, 1]
        with Image.open(tmp_path / "out" / name) as picture:
            assert (np.asarray(picture)[::8, ::8] == heat(values)).all()


def test_a_folder_becomes_a_folder_for_every_image_with_its_shape_kept_if_asked(visualise, weights, tmp_path):
    folder = photographs(tmp_path / "photos")
    code, _, error = visualise("--pretrained_weights", weights, "--data_path", folder, "--image_size", 40)
    assert code == 0, error
    made = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert made == ["0000_one", "0001_one", "two"]
    with Image.open(tmp_path / "out" / "two" / "img.png") as picture:
        assert picture.size == (56, 40)
    assert not (tmp_path / "out" / "two" / "mask_th0.6_head0.png").exists()


def test_pictures_are_the_same_every_time(visualise, weights, tmp_path):
    image = photographs(tmp_path / "photos") / "one.jpg"
    options = ("--pretrained_weights", weights, "--image_path", image, "--image_size", 64, "--threshold", 0.5)
    visualise(*options)
    first = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    visualise(*options)
    assert first == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}


def test_sixteen_bit_images_are_scaled_and_not_cut_off(tmp_path):
    values = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    picture = to_pixels(read_image(tmp_path / "deep.png", [64]))
    assert np.abs(picture[..., 0].astype(int) - values // 257).max() <= 1


def test_a_folder_goes_on_after_an_unreadable_image_and_ends_with_its_name(visualise, tmp_path):
    folder = photographs(tmp_path / "photos")
    (folder / "broken.png").write_bytes((folder / "two.png").read_bytes()[:60])
    (folder / "gone.jpg").symlink_to(folder / "nowhere.jpg")
    (folder / "album.jpg").mkdir()
    os.mkfifo(folder / "pipe.jpg")
    options = ("--arch", "vit_micro", "--image_size", 32, "--image_path", folder)
    code, said, error = visualise(*options)
    assert code == 1 and error.count("\n") == 1
    assert error.startswith("error: 2 of 5 images cannot be read") and "album" not in error
    assert f"{folder}/broken.png (" in error and f"{folder}/gone.jpg (No such file or directory)" in error
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"0002_one", "0003_one", "two"}
    assert all((path / "sheet.png").exists() for path in (tmp_path / "out").iterdir()) and "-> " in said


def test_an_unreadable_picture_of_ten_has_no_folder_and_the_others_have_theirs(visualise, tmp_path):
    (tmp_path / "photos").mkdir()
    for number in range(10):
        Image.new("RGB", (8, 8), (25 * number, 0, 0)).save(tmp_path / "photos" / f"{number}.png")
    (tmp_path / "photos" / "4.png").write_bytes(b"\x89PNG")
    code, _, error = visualise("--arch", "vit_micro", "--image_size", 16, "--image_path", tmp_path / "photos")
    assert code == 1 and error.startswith("error: 1 of 10 images cannot be read")
    folders = {path.name for path in (tmp_path / "out").iterdir()}
    assert folders == {str(number) for number in range(10)} - {"4"}
    assert all(list((tmp_path / "out" / name).iterdir()) for name in folders)


def test_the_names_of_many_unreadable_images_are_shortened():
    errors = [BadImage(f"{number}.jpg", "empty") for number in range(23)]
    with pytest.raises(UsageError, match=r"23 of 30 images .*; 19\.jpg \(empty\); and 3 more$"):
        refuse_unreadable(errors, None, 30)


def test_what_the_script_wrote_is_no_image_of_the_next_time(visualise, tmp_path):
    folder = photographs(tmp_path / "photos")
    options = ("--arch", "vit_micro", "--image_size", 32, "--image_path", folder)
    for output_dir in (folder, folder / "nested" / "pictures"):
        for _ in range(2):
            assert visualise(*options, "--output_dir", output_dir)[0] == 0
    written = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("sheet.png"))
    results = ["0000_one/", "0001_one/", "two/"]  # not one more than there are images
    assert len(image_files(str(folder))) == 3 and len(written) == 6
    assert written == sorted(f"{place}{name}sheet.png" for place in ("", "nested/pictures/") for name in results)
    code, said, _ = visualise(*options, "--output_dir", tmp_path / "elsewhere")
    assert code == 0 and "36 pictures that were made by Tutelage are left out" in said
    code, _, error = visualise(*options[:-1], folder / "two", "--output_dir", tmp_path / "elsewhere")
    assert code == 2 and "no image in this folder (6 pictures that were made by Tutelage are left out)" in error


def test_an_image_is_never_overwritten_by_its_own_pictures(visualise, tmp_path):
    folder = photographs(tmp_path / "photos")
    image = (folder / "two.png").rename(folder / "img.png")
    before = image.read_bytes()
    options = ("--arch", "vit_micro", "--image_size", 32, "--image_path", image)
    code, _, error = visualise(*options, "--output_dir", folder)
    assert code == 2 and "img.png" in error and image.read_bytes() == before
    assert sorted(path.name for path in folder.iterdir()) == ["img.png", "nested", "notes.txt", "one.jpg"]


def test_photographs_are_turned_if_asked(visualise, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 8
    Image.fromarray(Stripes(size=64).array(0)[:32]).save(tmp_path / "photo.jpg", exif=exif)
    options = ("--arch", "vit_micro", "--image_size", 32, "--image_path", tmp_path / "photo.jpg")
    for words, size in (((), (64, 32)), (("--exif", "true"), (32, 64))):
        assert visualise(*options, *words)[0] == 0
        with Image.open(tmp_path / "out" / "img.png") as picture:
            assert picture.size == size


def test_the_largest_image_is_an_option(visualise, tmp_path):
    image = photographs(tmp_path / "photos") / "one.jpg"
    options = ("--arch", "vit_micro", "--image_size", 32, "--image_path", image, "--max_image_pixels")
    code, _, error = visualise(*options, 5489)
    assert code == 2 and "5490 pixels, more than --max_image_pixels 5489" in error
    assert visualise(*options, 5490)[0] == 0


def test_random_weights_are_announced(visualise, tmp_path):
    image = photographs(tmp_path / "photos") / "one.jpg"
    code, said, _ = visualise("--arch", "vit_micro", "--image_path", image, "--image_size", 32)
    assert code == 0 and "RANDOM WEIGHTS" in said


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--image_path", "no/where.jpg"], "no/where.jpg"),
        (["--image_path", "tests/methods"], "no image in this folder"),
        (["--image_path", "pyproject.toml"], "cannot be read as an image"),
        (["--threshold", "1.5"], "--threshold 1.5"),
        (["--max_image_pixels", "-1"], "--max_image_pixels: -1: a number of pixels"),
        (["--image_size", "1", "2", "3"], "--image_size 1 2 3"),
        (["--image_size", "8"], "smaller than a patch"),
        (["--arch", "resnet18"], "no class token"),
        (["--output_dir", "/proc/nothing"], "/proc/nothing"),
        (["--pretrained_weights", "tests/golden/unic/checkpoint_plain.pth"], "width 18"),
    ],
)
def test_bad_options_end_in_one_line_and_exit_code_two(visualise, tmp_path, monkeypatch, arguments, word):
    monkeypatch.chdir(Path(__file__).parents[1])
    defaults = ["--arch", "vit_micro"] if "--pretrained_weights" not in arguments else []
    image = photographs(tmp_path / "photos") / "one.jpg"
    code, _, error = visualise(*defaults, "--image_path", image, *arguments)
    assert code == 2 and word in error and error.count("\n") == 1, error
