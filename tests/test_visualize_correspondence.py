"""Correspondence as a script: pictures, measures, and geometry of views that is exact."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation.correspondence import random_view
from evaluation.matching import patch_centres
from tests.scripts import Scripts, micro, photograph, save
from visualize_correspondence import main


@pytest.fixture
def scripts(monkeypatch, capsys, tmp_path):
    return Scripts(monkeypatch, capsys, tmp_path / "out")


def options(tmp_path, *more: object) -> list:
    path = tmp_path / "micro.pth"
    if not path.exists():
        micro(path)
    common = ["--img_size", 64, "--device", "cpu", "--output_dir", tmp_path / "out"]
    return [*([] if "--arch" in more else ["--pretrained_weights", path]), *common, *more]


def test_the_corner_of_a_view_says_where_its_patches_lie():
    """On a picture whose brightness is the place, from the left and from the top."""
    mirrored = 0
    for axis in (0, 1):
        ramp = np.linspace(0, 250, 200)
        pixels = np.broadcast_to(ramp[:, None] if axis == 0 else ramp, (200, 200)).astype(np.uint8)
        image = Image.fromarray(pixels).convert("RGB")
        for seed in range(6):
            view = random_view(image, 64, (0.4, 1.0), seed, colours=False)
            centres = patch_centres(view.corner[None], (4, 4))[0, :, axis].view(4, 4)
            means = (view.pixels[0] * 0.229 + 0.485).view(4, 16, 4, 16).mean(dim=(1, 3)) * 255 / 250
            torch.testing.assert_close(means.double(), centres, atol=0.02, rtol=0)
            coloured = random_view(image, 64, (0.4, 1.0), seed)
            centres = patch_centres(coloured.corner[None], (4, 4))[0, :, 1]
            mirrored += int(centres[0] > centres[-1])
            if axis == 1:
                first, last = coloured.pixels[0, :, :8].mean(), coloured.pixels[0, :, -8:].mean()
                assert (first < last) == (centres[0] < centres[-1])
    assert 0 < mirrored < 12


def test_pairs_of_a_class_and_views_of_an_image_are_drawn(scripts, tmp_path):
    for label in range(2):
        for number in range(2):
            save(photograph(10 * label + number), tmp_path / "data" / "val" / f"c{label}" / f"{number}.png")
    data = ("--data_path", tmp_path / "data")
    scripts.run(main, *options(tmp_path, *data, "--show_with_attn"))
    names = [f"class_corresp{number}_cls{number // 2}_nh4.png" for number in range(4)]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    assert Image.open(tmp_path / "out" / names[0]).size == (2 * 64 + 5, 2 * 64)
    said = scripts.run(
        main, *options(tmp_path, *data, "--sample_type", "instance", "--show_pics", 2, "--eval_radius", 8)
    )
    assert "2 pairs" in said and "100.00 % of patches are found within 8" in said
    assert Image.open(tmp_path / "out" / "instance_corresp1_cls0_nh4.png").size == (2 * 64 + 5, 64)
    scripts.run(main, *options(tmp_path, *data, "--arch", "resnet18", "--show_pics", 1))  # ranked by similarity


@pytest.mark.parametrize("arch", ["vit_micro", "swin_tiny", "resnet18"])
def test_a_place_is_found_in_its_mirror_image_by_every_kind_of_backbone(scripts, tmp_path, arch):
    save(photograph(3, (80, 70)), tmp_path / "data" / "a.png")
    words = options(tmp_path, "--arch", arch, "--measure_correspondence", "--data_path", tmp_path / "data")
    said = scripts.run(main, *words)
    found = json.loads((tmp_path / "out" / "data" / "measure_correspondence.json").read_text())
    assert list(found) == ["count", "sim_value_avg", "accuracy_avg", "distance_error_avg"] and found["count"] == 1
    assert 0 <= found["accuracy_avg"] <= 1 and "accuracy_avg" in said


def test_esvit_draws_a_pair_of_views_and_where_a_place_looks(scripts, tmp_path):
    image = save(photograph(3, (80, 70)), tmp_path / "bird.png")
    both = ("--vis_correspondence", "--vis_attention", "--image_path", image)
    said = scripts.run(main, *options(tmp_path, *both, "--query", 5))
    out = tmp_path / "out" / "bird"
    assert said.count("similarity 0.") + said.count("similarity 1.") == 10 and "heads by entropy in bits" in said
    assert sorted(path.name for path in (out / "seed8").iterdir()) == ["correspondence8.png", "img1.png", "img2.png"]
    names = {path.name for path in out.iterdir()}
    masked = {"attn_masked_all_3_query5.png", "attn_masked_all_3_query5_compressed.png"}
    assert names == {"seed8", "img.png", "attn_all_3_query5.png", "layer3_query5"} | masked
    assert len(list((out / "layer3_query5" / "attn").iterdir())) == 4
    assert (out / "layer3_query5" / "mask_th0.6" / "mask_th0.6_head_03.png").exists()
    again = scripts.run(main, *options(tmp_path, *both[:1], *both[2:], "--use_saved_aug"))
    pairs = [[line for line in text.splitlines() if line.startswith("pair ")] for text in (said, again)]
    assert pairs[0] == pairs[1]
    scripts.run(main, *options(tmp_path, "--arch", "swin_tiny", *both[1:]), "--img_size", 224)
    assert len(list((out / "layer11_query9" / "attn").iterdir())) == 24


def test_bad_input_ends_in_one_line(scripts, tmp_path):
    image = save(photograph(3, (80, 70)), tmp_path / "bird.png")
    looks = ("--vis_attention", "--image_path", image)
    for words, said in (
        ((), "--sample_type class: needs classes"),
        (("--topk", 0), "--topk 0"),
        (("--query", -1), "--query -1"),
        (("--threshold", 0), "--threshold 0"),
        ((*looks, "--query", 64), "--query 64"),
        ((*looks, "--arch", "resnet18"), "no attention between places"),
        ((*looks, "--arch", "swin_tiny", "--img_size", 448), "in several windows"),
        (("--vis_attention", "--image_path", tmp_path / "none.png"), "none.png"),
        (("--img_size", 4), "smaller than a patch"),
        (("--vis_correspondence", "--image_path", image, "--use_saved_aug"), "img1.png"),
        (("--data_path", tmp_path / "nowhere"), "nowhere"),
    ):
        assert said in scripts.refused(main, *options(tmp_path, *words)), (words, scripts.error)
    image.write_bytes(b"no image")
    assert "cannot be read as an image" in scripts.refused(main, *options(tmp_path, *looks))
