"""Robustness as a script: what is done to tiny images, and published layouts in small."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.preprocess import eval_transform
from eval_robustness.eval_robustness import main, parse_arguments
from evaluation.features import Feature
from evaluation.imagenet_classes import CORRUPTIONS, IMAGENET_9, IMAGENET_A, imagenet_9, numbers
from models import build_backbone
from models.safe_load import load_file
from tests.scripts import Scripts, micro, photograph, save
from tests.sources import Stripes

SIZE, CLASSES = 32, 4


@pytest.fixture
def scripts(monkeypatch, capsys, tmp_path):
    return Scripts(monkeypatch, capsys, tmp_path / "out")


def head_file(path: Path, checkpoint: Path, classes: int = 0, **extra) -> Path:
    """A linear head in AttMask's layout: of stripes the nearest class mean, or with random weights of ``classes``."""
    model = build_backbone("vit_micro", 8, img_size=SIZE).eval()
    model.load_state_dict({n[9:]: t for n, t in torch.load(checkpoint)["teacher"].items()})
    source, transform = Stripes(CLASSES, 6, seed=0), eval_transform(SIZE, 37)
    with torch.no_grad():
        features = Feature(4)(model, torch.stack([transform(source.pil(i)) for i in range(len(source))]))
    labels = torch.from_numpy(np.array(source.labels))
    means = torch.stack([features[labels == c].mean(dim=0) for c in range(CLASSES)])
    weight, bias = means, -(means**2).sum(dim=1) / 2
    if classes:
        weight = torch.randn(classes, features.shape[1], generator=torch.Generator().manual_seed(0))
        bias = torch.zeros(classes)
    state = {"module.linear.weight": weight, "module.linear.bias": bias}
    torch.save({"epoch": 3, "state_dict": state, "best_acc": 87.5} | extra, path)
    return path


def stripes(root: Path, classes: int = CLASSES) -> Path:
    source = Stripes(CLASSES, 5, seed=1)
    for index, label in enumerate(source.labels):
        if label < classes:
            save(source.pil(index), root / f"c{label}" / f"{index:02}.png")
    return root


def options(tmp_path: Path, what: str, *more: object, data: object = None) -> list:
    path = tmp_path / "micro.pth"
    if not path.exists():
        head_file(tmp_path / "linear.pth", micro(path))
    data = stripes(tmp_path / "data" / "val").parent if data is None else data
    common = ["--pretrained_weights", path, "--load_from", tmp_path / "linear.pth", "--data_path", data]
    common += [
        "--crop_size",
        SIZE,
        "--device",
        "cpu",
        "--num_workers",
        0,
        "--output_dir",
        tmp_path / "out",
        "--partial",
    ]
    return [what, *common, *more]


def test_class_maps_are_those_that_are_published():
    golden = Path(__file__).parent.parent / "golden" / "eval_core"
    nine, adversarial = (json.loads((golden / f"data_imagenet{name}.json").read_text()) for name in ("9", "_a"))
    assert imagenet_9().tolist() == nine["map"] and list(IMAGENET_9) == nine["in9_classes"]
    assert numbers(IMAGENET_A) == adversarial["indices"]


def test_masked_images_are_classified_for_every_ratio_in_one_pass(scripts, tmp_path):
    more = ("--masking_ratio", 0.3, 0.9, "--test_image", "--attention_weights", micro(tmp_path / "other.pth", seed=5))
    said = scripts.run(main, *options(tmp_path, "masked", *more))
    found = scripts.result("eval_masked")["masking_ratio"]
    assert list(found) == ["0.0", "0.3", "0.9"] and found["0.0"]["acc1"] > 70
    assert found["0.9"]["acc1"] < found["0.0"]["acc1"] and "acc5" not in found["0.0"]
    assert "less than of whole images" in said and "the head's file says 87.50" in said
    assert Image.open(tmp_path / "out" / "eval_masked.png").size == (3 * (SIZE + 4) + 4, 4 * (SIZE + 4) + 4)
    scripts.run(main, *options(tmp_path, "masked", "--masking_ratio", 0.9, "--batch_size_per_gpu", 3, *more[3:]))
    again = scripts.result("eval_masked")["masking_ratio"]["0.9"]
    assert again["acc1"] == found["0.9"]["acc1"] and again["loss"] == pytest.approx(found["0.9"]["loss"], rel=1e-5)


def test_blocks_are_dropped_shuffled_and_removed(scripts, tmp_path):
    blocks = ("--shuffle_size", 4, "--exp_count", 2, "--test_image")
    scripts.run(main, *options(tmp_path, "occlusion", *blocks))
    runs = scripts.result("eval_occlusion")["dropped_tenths"]
    assert list(runs) == ["0", "1"] and list(runs["0"]) == [str(i) for i in range(10)]
    assert runs["0"]["0"] == runs["1"]["0"] > 0.7 and min(runs["0"].values()) < runs["0"]["0"]
    scripts.run(main, *options(tmp_path, "occlusion", *blocks, "--random_offset_drop"))
    assert scripts.result("eval_occlusion")["dropped_tenths"] != runs
    scripts.run(main, *options(tmp_path, "shuffle", "--shuffle_h", 1, 2, 8, "--shuffle_w", 1, 4, 8))
    shuffled = scripts.result("eval_shuffle")["shuffled"]["0"]
    assert list(shuffled) == ["1x1", "2x4", "8x8"] and shuffled["1x1"] == runs["0"]["0"]
    scripts.run(main, *options(tmp_path, "salience", "--drop_lambda", 0.5, 1.0))
    found = scripts.result("eval_salience")["salience"]
    assert list(found) == ["foreground", "background"] and found["background"]["1.0"]["removed"] == 0
    assert found["background"]["1.0"]["accuracy"] == runs["0"]["0"]
    parts = [found[mode]["0.5"]["removed"] for mode in found]
    assert sum(parts) == pytest.approx(1, abs=0.07)


def test_backbone_and_best_head_are_combined_into_one_file(scripts, tmp_path):
    options(tmp_path, "masked")
    several = torch.load(tmp_path / "linear.pth")
    good = {name.removeprefix("module."): tensor for name, tensor in several["state_dict"].items()}
    state = {f"0.module.{n}": torch.zeros_like(t) for n, t in good.items()}
    state |= {f"1.module.{n}": t for n, t in good.items()}
    torch.save({**several, "state_dict": state, "best_acc_hidx": 1}, tmp_path / "several.pth")
    said = []
    for linear in ("linear.pth", "several.pth"):
        files = ("--checkpoint_backbone", tmp_path / "micro.pth", "--checkpoint_linear", tmp_path / linear)
        said.append(scripts.run(main, "combine", *files, "--output_file", tmp_path / f"with_{linear}"))
        assert "save 3th head with acc 87.5" in said[-1]
        words = options(tmp_path, "masked")
        words[2] = tmp_path / f"with_{linear}"
        del words[3:5]
        scripts.run(main, *words)
        assert scripts.result("eval_masked")["masking_ratio"]["0.0"]["acc1"] > 70
    assert list(load_file(tmp_path / "with_linear.pth")) == ["epoch", "state_dict", "best_acc"]
    files = ("--checkpoint_backbone", tmp_path / "micro.pth", "--checkpoint_linear", tmp_path / "linear.pth")
    assert "no folder" in scripts.refused(main, "combine", *files, "--output_file", tmp_path / "no" / "x.pth")
    assert "is one of the files" in scripts.refused(main, "combine", *files, "--output_file", tmp_path / "micro.pth")
    assert "no linear head" in scripts.refused(main, "combine", *files[:2], "--checkpoint_linear",
                                               tmp_path / "micro.pth", "--output_file", tmp_path / "x.pth")  # fmt: skip


def challenge_folder(root: Path, images: int = 2) -> Path:
    for variant in ("original", "mixed_same", "mixed_rand", "only_bg_t"):
        for number, name in enumerate(IMAGENET_9):
            for image in range(images):
                picture = photograph(1000 * len(variant) + 10 * number + image, (SIZE, SIZE))
                save(
                    picture, root / variant / "val" / f"{number:02}_{name}" / f"{variant}_n0000000{number}_{image}.png"
                )
    for number, name in enumerate(IMAGENET_9):
        folder = root / "fg_mask" / "val" / f"{number:02}_{name}"
        folder.mkdir(parents=True)
        for image in range(images):
            mask = np.zeros((SIZE, SIZE), bool)
            mask[4:] = True
            np.save(folder / f"fg_n0000000{number}_{image}.npy", mask)
    return root


def test_imagenet_9_and_its_challenge(scripts, tmp_path):
    options(tmp_path, "masked")
    head_file(tmp_path / "linear.pth", tmp_path / "micro.pth", classes=9)
    root = challenge_folder(tmp_path / "bg")
    said = scripts.run(main, *options(tmp_path, "backgrounds", "--in9", data=root))
    found = scripts.result("eval_backgrounds")
    assert list(found["accuracy"]) == ["mixed_rand", "mixed_same", "only_bg_t", "original"] and "BG-gap" in said
    assert f"Accuracy on original is {found['accuracy']['original']:.2f}%" in said
    scripts.run(main, *options(tmp_path, "challenge", "--in9", "--batch_size", 5, data=root))
    hard = scripts.result("eval_challenge")
    assert hard["foregrounds"] == hard["backgrounds"] == 18
    assert hard["accuracy"] == pytest.approx(100 - 100 * hard["vulnerable"] / 18)
    assert "asks for a head of 1000 classes" in scripts.refused(main, *options(tmp_path, "backgrounds", data=root))
    head_file(tmp_path / "linear.pth", tmp_path / "micro.pth", classes=1000)
    scripts.run(main, *options(tmp_path, "backgrounds", data=root))
    assert scripts.result("eval_backgrounds")["accuracy"] != found["accuracy"]
    whole = [word for word in options(tmp_path, "backgrounds", data=root) if word != "--partial"]
    assert "mixed_rand/val/: 18 there, 4050 published" in scripts.refused(main, *whole)
    assert "no <variant>/val/" in scripts.refused(main, *options(tmp_path, "backgrounds", data=tmp_path / "out"))
    next((root / "fg_mask").rglob("*.npy")).unlink()
    assert "has no mask in fg_mask/val/" in scripts.refused(main, *options(tmp_path, "challenge", data=root))


def test_imagenet_a_lets_its_classes_compete_and_says_how_calibrated_they_are(scripts, tmp_path):
    options(tmp_path, "masked")
    head_file(tmp_path / "linear.pth", tmp_path / "micro.pth", classes=1000)
    for number in range(200):
        save(photograph(number, (36, 36)), tmp_path / "a" / f"n{number:08}" / "x.png")
    said = scripts.run(main, *options(tmp_path, "imagenet_a", data=tmp_path / "a"))
    found = scripts.result("eval_imagenet_a")
    assert found["images"] == 200 and 0 <= found["rms_calibration_error"] <= 100 and "AURRA (%):" in said
    assert "200 there, 7500 published" in said + scripts.error
    (tmp_path / "a" / f"n{3:08}" / "x.png").unlink()
    assert "199 classes, and ImageNet-A 200" in scripts.refused(
        main, *options(tmp_path, "imagenet_a", data=tmp_path / "a")
    )


def test_imagenet_c_is_one_pass_over_all_corruptions(scripts, tmp_path):
    root = tmp_path / "c"
    for name in (*CORRUPTIONS, "saturate"):
        for severity in range(1, 6):
            for label in range(CLASSES):
                picture = Stripes(CLASSES, 1, seed=severity).pil(label)
                save(picture, root / name / str(severity) / f"c{label}" / "x.png")
    said = scripts.run(main, *options(tmp_path, "imagenet_c", data=root))
    found = scripts.result("eval_imagenet_c")
    assert list(found["error"]) == [*CORRUPTIONS, "saturate"] and found["images"] == 16 * 5 * CLASSES
    assert found["mean_error"] == pytest.approx(np.mean(list(found["error"].values())))
    error = found["error"]["fog"] / 100  # the same images everywhere
    assert found["mCE"] == pytest.approx(100 * np.mean([error / alexnet for alexnet in CORRUPTIONS.values()]))
    assert said.count("images/s") == 1 and "nothing of speckle_noise, gaussian_blur, spatter" in said + scripts.error
    (root / "fog" / "3").rename(tmp_path / "away")
    assert "fog/ has no severity 3" in scripts.refused(main, *options(tmp_path, "imagenet_c", data=root))
    assert "no <corruption>/" in scripts.refused(main, *options(tmp_path, "imagenet_c", data=tmp_path / "data"))


def test_commands_of_the_original_are_understood():
    parse = parse_arguments
    words = "--pretrained_weights x.pth --arch vit_small --patch_size 16 --checkpoint_key teacher --n_last_blocks 4"
    words += " --avgpool_patchtokens 0 --load_from checkpoint_teacher_linear.pth --masking_ratio 0.7 --lr 0.005"
    words += " --epochs 100 --data_path d --batch_size_per_gpu 30 --num_workers 4 --subset -1"
    args = parse(["masked", *words.split()])
    assert args.masking_ratio == [0.7] and args.load_from == "checkpoint_teacher_linear.pth"
    words = "--checkpoint_pretraining a.pth --checkpoint_linear b.pth --output_file c.pth --checkpoint_key teacher"
    assert parse(["combine", *words.split()]).checkpoint_backbone == "a.pth"
    words = "--arch vit_small --pretrained_weights c.pth --data-path bg_challenge --batch_size 16"
    assert parse(["backgrounds", *words.split()]).data_path == "bg_challenge"


def test_bad_input_ends_in_one_line(scripts, tmp_path):
    refused = lambda *words: scripts.refused(main, *options(tmp_path, *words))  # noqa: E731
    for words, said in (
        (("masked", "--masking_ratio", 1.0), "--masking_ratio 1.0"),
        (("masked", "--load_from", tmp_path / "none.pth"), "no such file"),
        (("masked", "--load_from", tmp_path / "micro.pth"), "holds no linear head"),
        (("masked", "--n_last_blocks", 2), "of width 512, but the class token of the last 2 blocks"),
        (("masked", "--crop_size", 36, "--resize_size", 36), "not a whole number of patches"),
        (("occlusion", "--shuffle_size", 5), "not so many whole blocks"),
        (("occlusion", "--exp_count", 0), "--exp_count 0"),
        (("salience", "--attention_head", 9), "there are 4"),
        (("salience", "--drop_lambda", 0.0), "--drop_lambda 0.0"),
        (("shuffle", "--shuffle_h", 2), "1 and 7 values"),
        (("masked", "--crop_size", 4), "patch size (8)"),
        (("imagenet_a",), "asks for a head of 1000 classes"),
    ):
        assert said in refused(*words), scripts.error
    three = stripes(tmp_path / "three" / "val", classes=3).parent
    assert "has 3 classes, and the linear head 4" in scripts.refused(main, *options(tmp_path, "masked", data=three))
    assert "invalid choice" in scripts.refused(main, "maskde")
    stripes(tmp_path / "data" / "val")
    (tmp_path / "data" / "val" / "c1" / "01.png").write_bytes(b"no image")
    data = tmp_path / "data"
    assert "1 of its 20 test images cannot be read" in scripts.refused(main, *options(tmp_path, "masked", data=data))
    scripts.run(main, *options(tmp_path, "masked", "--skip_unreadable", data=data))
    assert json.loads((tmp_path / "out" / "eval_masked.json").read_text())["unreadable"] == {"train": 0, "test": 1}
    broken = torch.load(tmp_path / "linear.pth")
    broken["state_dict"]["module.linear.weight"][0, 0] = float("nan")
    torch.save(broken, tmp_path / "linear.pth")
    assert "not finite" in refused("masked")
