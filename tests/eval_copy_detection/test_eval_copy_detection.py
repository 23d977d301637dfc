"""Copy detection as a script, on a tiny copy of the published layout whose answers are known."""

from pathlib import Path

import pytest

from eval_copy_detection.eval_copy_detection import main
from tests.scripts import Scripts, micro, photograph, save


@pytest.fixture
def scripts(monkeypatch, capsys, tmp_path):
    return Scripts(monkeypatch, capsys, tmp_path / "out")


def copydays(root: Path, originals: int = 4) -> Path:
    for number in range(originals):
        image = photograph(number)
        save(image, root / "original" / f"20{number:02}00.jpg")
        save(image.point(lambda v: 255 - v), root / "strong" / f"20{number:02}01.jpg")
        save(image, root / "strong" / f"20{number:02}02.jpg")
        save(image, root / "jpegqual" / "75" / f"20{number:02}00.jpg")
    return root


def options(tmp_path: Path, *more: object) -> list:
    path = micro(tmp_path / "micro.pth")
    common = ["--pretrained_weights", path, "--data_path", tmp_path / "copies", "--imsize", 32, "--device", "cpu"]
    return [*common, "--num_workers", 0, "--output_dir", tmp_path / "out", "--partial", *more]


def test_copies_are_found_among_distractors_with_and_without_whitening(scripts, tmp_path):
    copydays(tmp_path / "copies")
    for number in range(20):
        save(photograph(100 + number), tmp_path / "others" / f"{number}.jpg")
    said = scripts.run(main, *options(tmp_path))
    found = scripts.result("eval_copy_detection")
    assert found["mAP"]["original"] == found["mAP"]["jpegqual/75"] == 1.0 and 0.3 < found["mAP"]["strong"] < 1
    assert f"eval on strong mAP={found['mAP']['strong']:.3f}" in said and "crops/10" in said + scripts.error
    others = ("--distractors_path", tmp_path / "others", "--whitening_path", tmp_path / "others")
    said = scripts.run(main, *options(tmp_path, *others))
    whitened = scripts.result("eval_copy_detection")
    assert whitened["database"] == 24 and whitened["mAP"]["original"] == 1.0 and "whitened with" in said
    assert whitened["mAP"]["strong"] != found["mAP"]["strong"]
    scripts.run(main, *options(tmp_path, "--neighbours", 1))
    assert scripts.result("eval_copy_detection")["mAP"]["strong"] <= found["mAP"]["strong"]


def test_bad_input_ends_in_one_line(scripts, tmp_path):
    assert "no original/ with *.jpg there" in scripts.refused(main, *options(tmp_path))
    save(photograph(0), tmp_path / "copies" / "original" / "200000.jpg")
    assert "no strong/" in scripts.refused(main, *options(tmp_path))
    copydays(tmp_path / "copies")
    whole = [option for option in options(tmp_path) if option != "--partial"]
    assert "original/: 4 there, 157 published" in scripts.refused(main, *whole)
    assert "resnet18: has no patch tokens" in scripts.refused(main, *options(tmp_path)[2:], "--arch", "resnet18")
    assert "--whitening_path" in scripts.refused(main, *options(tmp_path, "--whitening_path", tmp_path / "none"))
    assert "--neighbours 0" in scripts.refused(main, *options(tmp_path, "--neighbours", 0))
    extra = save(photograph(9), tmp_path / "copies" / "strong" / "990000.jpg")
    assert "no original begins as 990000.jpg does" in scripts.refused(main, *options(tmp_path))
    extra.unlink()
    (tmp_path / "copies" / "jpegqual" / "75" / "200000.jpg").unlink()
    assert "3 images, and 4 originals" in scripts.refused(main, *options(tmp_path))
