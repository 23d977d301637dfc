"""Detection as a script: it trains, continues exactly, and refuses in one line."""

import json
import sys
from pathlib import Path

import pytest
import torch

from eval_detection.eval_detection import main
from evaluation import detection, detection_run
from tests.eval_knn.test_eval_knn import micro
from tests.eval_linear.test_eval_linear import assert_same, saved
from tests.stamps import coco
from utils import run_cli

TINY = {"scale": 0.08, "num_workers": 0, "batch_size_per_gpu": 1, "device": "cpu", "epochs": 1, "save_every": 2}


@pytest.fixture
def detect(monkeypatch, tmp_path, capsys):
    """Run the script in this process with few samples and channels: (exit code, standard output, standard error)."""
    build = detection_run.build_detector

    def small(*arguments, **options):
        model = build(*arguments, **options)
        model.roi_heads.fg_bg_sampler.batch_size_per_image = 16
        model.roi_heads.detections_per_img = 5
        model.roi_heads.score_thresh = 0.0
        return model

    monkeypatch.setattr(detection.Pyramid, "out_channels", 16)
    monkeypatch.setattr(detection_run, "build_detector", small)

    def run(*arguments: object, out: str = "out", **options: object) -> tuple[int, str, str]:
        options = TINY | {"output_dir": tmp_path / out} | options
        words = [word for name, value in options.items() if value is not None for word in (f"--{name}", str(value))]
        monkeypatch.setattr(sys, "argv", ["eval_detection.py", *words, *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            run_cli(main)
        return exit_.value.code, *capsys.readouterr()

    return run


def result(folder: Path) -> dict:
    return json.loads((folder / "eval_detection.json").read_text())["numbers"]


@pytest.mark.parametrize("preset", ["udi", "mugs"])
def test_a_run_that_was_interrupted_ends_with_the_same_bits(detect, monkeypatch, tmp_path, preset):
    pytest.importorskip("pycocotools")
    data = coco(tmp_path / "coco", 3, 1)
    options = ("--pretrained_weights", micro(tmp_path), "--blocks", 0, 1, 2, 3, "--preset", preset)
    code, said, error = detect(*options, data_path=data, out="whole")
    assert code == 0, error
    numbers = result(tmp_path / "whole")
    assert {"AP", "AP50", "mask_AP", "mask_APl"} <= numbers.keys() and numbers["iterations"] == 3
    assert said.splitlines()[-1] == f"box AP: {numbers['AP']:.2f}, mask AP: {numbers['mask_AP']:.2f}"
    iterate = detection_run.iterate

    def stop_in_the_third(run, piece, iteration, lr):
        if iteration == 2:
            raise KeyboardInterrupt
        return iterate(run, piece, iteration, lr)

    monkeypatch.setattr(detection_run, "iterate", stop_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        detect(*options, data_path=data, out="parts")
    monkeypatch.setattr(detection_run, "iterate", iterate)
    code, said, error = detect(*options, data_path=data, out="parts")
    assert code == 0 and "at iteration 2 of 3" in said, error
    whole = saved(tmp_path / "whole", "checkpoint.pth")
    assert_same(whole, saved(tmp_path / "parts", "checkpoint.pth"))
    tokens = [name for name in whole["state_dict"] if name.endswith("cls_token")]
    assert len(tokens) == (0 if preset == "udi" else 1)
    code, _, error = detect(*options, data_path=data, out="parts", lr=0.5)
    assert code == 2 and "learning rate" in error and error.count("\n") == 1


def test_what_cannot_work_is_said_in_one_line(detect, monkeypatch, tmp_path):
    pytest.importorskip("pycocotools")
    data, weights = coco(tmp_path / "coco", 2, 1), ("--pretrained_weights", micro(tmp_path))
    ours = ("--blocks", 0, 1, 2, 3)

    def refused(*arguments, **options):
        code, _, error = detect(*arguments, **options)
        assert code == 2 and error.count("\n") == 1, error
        return error

    assert "--data_path: pass the folder" in refused()
    assert "there is no annotations/instances_train2017.json" in refused(data_path=tmp_path)
    assert "from 0 to 3" in refused(*weights, data_path=data)
    assert "patches of 8 or 16" in refused("--arch", "vit_micro", "--patch_size", 14, *ours, data_path=data)
    assert "larger than the data set" in refused(*weights, *ours, data_path=data, batch_size_per_gpu=4)
    assert "invalid choice" in refused("--preset", "maskformer", data_path=data)
    annotations = data / "annotations" / "instances_val2017.json"
    content = json.loads(annotations.read_text())
    annotations.write_text(json.dumps(content | {"images": [{"id": 12, "file_name": "../outside.png"}]}))
    assert "leaves the folder" in refused(*weights, *ours, data_path=data)
    annotations.write_text(json.dumps(content | {"categories": content["categories"][:1]}))
    assert "different categories" in refused(*weights, *ours, data_path=data)
    annotations.write_text("{")
    assert "cannot be read as JSON" in refused(*weights, *ours, data_path=data)
    annotations.write_text(json.dumps(content))
    (next((data / "val2017").iterdir())).write_bytes(b"nothing")
    assert "1 of its 1 test images cannot be read" in refused(*weights, *ours, data_path=data)


def test_without_pycocotools_one_line_says_what_to_install(detect, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    monkeypatch.setitem(sys.modules, "pycocotools.mask", None)
    code, _, error = detect(data_path=tmp_path)
    assert code == 2 and error == "error: pycocotools is not installed; pip install -r requirements-eval.txt\n"


def test_what_is_found_exactly_has_an_average_precision_of_100(tmp_path):
    """Boxes, polygons, run lengths and COCO's numbering of classes, there and back."""
    pytest.importorskip("pycocotools")
    from data.coco import Instances

    source = Instances(coco(tmp_path / "coco", 1, 3), "val2017", learns=False)
    found = []
    for index in range(3):
        image, things = source.array(index)
        assert image.shape == (64, 80, 3)
        rows = [torch.from_numpy(things[name]) for name in ("boxes", "labels", "masks")]
        answer = {"boxes": rows[0], "labels": rows[1], "masks": rows[2][:, None].float()}
        answer["scores"] = torch.linspace(1, 0.5, len(rows[0]))
        model = torch.nn.Module()
        model.backbone = torch.nn.Module()
        model.forward = lambda images, answer=answer: [answer]
        found += detection.results_of(model, None, index, source)
    numbers = detection.average_precision(source, found, range(3))
    assert numbers["AP"] == pytest.approx(100, abs=0.1) and numbers["mask_AP"] > 95
    half = detection.average_precision(source, found[: len(found) // 2], range(3))
    assert half["AP"] < 90
    assert detection.average_precision(source, [], range(3))["AP"] == 0


def test_groups_have_the_rates_and_decays_of_the_originals(tmp_path):
    from models import build_backbone

    for name in ("udi", "mugs"):
        preset = detection.PRESETS[name]
        model = detection.build_detector(build_backbone("vit_micro", 16), 3, preset, (0, 1, 2, 3))
        groups = detection.detector_groups(model, preset, 4)
        of = {id(p): (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}
        rates = {n: of[id(p)] for n, p in model.named_parameters() if id(p) in of}
        network = "backbone.adapter.network."
        layer = preset.layer_decay or 1.0
        assert rates["roi_heads.mask_predictor.mask_fcn_logits.weight"] == (1.0, 0.05)
        assert rates[f"{network}blocks.3.mlp.fc1.weight"] == (layer, 0.05)
        assert rates[f"{network}pos_embed"] == (pytest.approx(layer**5), 0.0 if name == "udi" else 0.05)
        assert rates[f"{network}blocks.0.norm1.weight"] == (pytest.approx(layer**4), 0.0)
        assert rates[f"{network}blocks.0.mlp.fc1.bias"][1] == (0.05 if name == "udi" else 0.0)
        assert (f"{network}cls_token" in rates) == (name == "mugs")


def test_rates_rise_and_fall_as_published():
    preset = detection.PRESETS["udi"]
    rates = [detection.learning_rate(i, 1.0, 500, preset) for i in (0, 500, 1000, 3999, 4000, 5499, 5500)]
    assert rates == pytest.approx([0.001, 0.5005, 1, 1, 0.1, 0.1, 0.01])
