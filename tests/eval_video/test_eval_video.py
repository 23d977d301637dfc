"""Video segmentation as a script, on clips whose masks are exact. On two processes: tests/test_evaluate.py."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.davis import palette, read_mask
from eval_video.eval_video import main
from evaluation.video_scores import score_frame, summarise
from tests.clips import davis
from tests.scripts import Scripts, micro


@pytest.fixture
def scripts(monkeypatch, capsys, tmp_path):
    return Scripts(monkeypatch, capsys, tmp_path / "out")


def options(tmp_path: Path, *more: object) -> list:
    path = tmp_path / "micro.pth"
    if not path.exists():
        micro(path)
    common = ["--pretrained_weights", path, "--data_path", tmp_path / "DAVIS", "--short_side", 96, "--partial"]
    return [*common, "--size_mask_neighborhood", 2, "--output_dir", tmp_path / "out", "--device", "cpu", *more]


def files(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def test_objects_are_found_again_and_scored_by_what_was_written(scripts, tmp_path):
    root = davis(tmp_path / "DAVIS")
    said = scripts.run(main, *options(tmp_path))
    numbers = scripts.result("eval_video")
    assert (numbers["videos"], numbers["objects"], numbers["unscored"]) == (3, 4, [])
    assert numbers["J-Mean"] > 50 and numbers["J&F-Mean"] > 50  # weights are random, colours are not
    assert f"4 objects: J&F-Mean {numbers['J&F-Mean']:.1f}" in said and "3 there, 30 published" in said
    objects = []
    for number in range(3):
        found, truth = (folder / f"clip-{number}" for folder in (tmp_path / "out", root / "Annotations" / "480p"))
        assert sorted(p.name for p in found.glob("*.png")) == sorted(p.name for p in truth.glob("*.png"))
        with Image.open(found / "00002.png") as image:
            assert image.mode == "P" and image.getpalette()[:9] == palette()[:3].flatten().tolist()
        assert np.array_equal(read_mask(found / "00000.png"), read_mask(truth / "00000.png"))
        pairs = [  # of five frames the first and the last do not count
            score_frame(read_mask(found / name), read_mask(truth / name), 1 + number % 2)
            for name in ("00001.png", "00002.png", "00003.png")
        ]
        objects += [{"J": [j for j, _ in one], "F": [f for _, f in one]} for one in zip(*pairs, strict=True)]
    assert summarise(objects) == {name: numbers[name] for name in summarise(objects)}


def test_a_run_that_was_stopped_follows_what_is_missing_and_no_other_run_goes_on_there(scripts, tmp_path):
    davis(tmp_path / "DAVIS", videos=2)
    scripts.run(main, *options(tmp_path))
    whole = files(tmp_path / "out")
    (tmp_path / "out" / "clip-1" / "scores.json").unlink()  # as if killed before its end
    (tmp_path / "out" / "clip-1" / "00003.png").write_bytes(b"half a pic")
    kept = (tmp_path / "out" / "clip-0" / "00003.png").stat().st_mtime_ns
    said = scripts.run(main, *options(tmp_path))
    assert "1 of 2: clip-0: 5 frames, J&F" in said and said.count("from an earlier start") == 1
    assert files(tmp_path / "out") == whole and (tmp_path / "out/clip-0/00003.png").stat().st_mtime_ns == kept
    error = scripts.refused(main, *options(tmp_path, "--topk", 3))
    assert "belongs to another run (topk: 5 there, 3 here)" in error and files(tmp_path / "out") == whole


def test_a_video_without_every_true_mask_is_followed_and_not_scored(scripts, tmp_path):
    root = davis(tmp_path / "DAVIS", videos=2)
    (root / "Annotations" / "480p" / "clip-1" / "00002.png").unlink()
    said = scripts.run(main, *options(tmp_path))
    numbers = scripts.result("eval_video")
    assert numbers["unscored"] == ["clip-1"] and numbers["objects"] == 1 and "not scored: clip-1" in said
    assert len(list((tmp_path / "out" / "clip-1").glob("*.png"))) == 5


def test_every_class_token_is_left_out_and_odd_patches_fit(scripts, tmp_path):
    davis(tmp_path / "DAVIS", videos=1, frames=3)
    micro(tmp_path / "two.pth", patch_size=7, img_size=28, num_class_tokens=2)
    words = options(tmp_path, "--n_last_frames", 0, "--size_mask_neighborhood", 0)
    words[1] = tmp_path / "two.pth"
    scripts.run(main, *words)
    numbers = scripts.result("eval_video")
    assert numbers["objects"] == 1 and numbers["J-Mean"] > 0 and numbers["size_mask_neighborhood"] == 0


def test_bad_input_ends_in_one_line(scripts, tmp_path):
    refused = lambda *more: scripts.refused(main, *options(tmp_path, *more))  # noqa: E731
    assert "ImageSets/2017/val.txt cannot be read (No such file or directory); pass the folder DAVIS" in refused()
    root = davis(tmp_path / "DAVIS", videos=1, frames=3)
    whole = [word for word in options(tmp_path) if word != "--partial"]
    assert "videos of val: 1 there, 30 published; complete them, or pass --partial" in scripts.refused(main, *whole)
    assert "ImageSets/2017/test.txt cannot be read" in refused("--split", "test")
    assert "--topk 0: must be at least 1" in refused("--topk", 0)
    assert "--short_side 7: too small for frames of 96 x 48" in refused("--short_side", 7)
    first = root / "Annotations" / "480p" / "clip-0" / "00000.png"
    mask = first.read_bytes()
    first.unlink()
    assert "00000.png: not there; the mask of a video's first frame says what to follow" in refused()
    Image.new("RGB", (96, 48)).save(first)
    assert "a picture of mode RGB; wants an index image" in refused()
    Image.new("P", (95, 48)).save(first)
    assert "95 x 48 pixels, and 96 x 48 the frame" in refused()
    first.write_bytes(mask[:60])
    assert "cannot be read as a mask" in refused()
    first.write_bytes(mask)
    frame = root / "JPEGImages" / "480p" / "clip-0" / "00001.jpg"
    frame.write_bytes(b"no picture")
    assert "00001.jpg: cannot be read as an image" in refused()
    Image.new("RGB", (50, 48)).save(frame)
    assert "00001.jpg: 50 x 48 pixels, unlike the first frame" in refused()
    listed = root / "ImageSets" / "2017" / "val.txt"
    for text, said in (("", "no video in this list"), ("../x\n", "../x: wants names of folders"),
                       ("a\na\n", "each of them once"), ("gone\n", "0 frames (*.jpg) there")):  # fmt: skip
        listed.write_text(text)
        assert said in refused()
    listed.write_text("clip-0\n")
    words = options(tmp_path, "--arch", "resnet18")[2:]
    assert "a video wants patch tokens; use one of our vision transformers" in scripts.refused(main, *words)
    shutil.rmtree(root)
    davis(root, videos=1, frames=3)
    damaged = torch.load(tmp_path / "micro.pth")
    damaged["teacher"]["backbone.patch_embed.proj.weight"].fill_(3e38)
    torch.save(damaged, tmp_path / "micro.pth")
    assert "features that are not finite numbers" in refused()
    assert not list((tmp_path / "out").rglob("scores.json"))
