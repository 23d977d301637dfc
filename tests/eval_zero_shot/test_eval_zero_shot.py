"""Zero-shot as a script: its numbers against their definition, every form of its files, and refusals in one line."""

import json
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import eval_knn.eval_knn
import eval_semi_supervised.eval_semi_supervised
from data.preprocess import eval_transform
from eval_zero_shot.eval_zero_shot import main
from evaluation import sets, zero_shot_run
from evaluation.zero_shot import accuracies
from models.teacher_space import teacher_space_from_file
from tests.sources import Stripes
from tests.students import student_file
from utils import run_cli

CLASSES, SHARED, DIM = 6, 4, 7


@pytest.fixture
def evaluate(monkeypatch, tmp_path, capsys):
    """Run a script in this process on stripes: (exit code, standard output, standard error)."""
    monkeypatch.setattr(zero_shot_run, "open_source", lambda path, split: Stripes(CLASSES, bad=options["bad"]))
    monkeypatch.setattr(sets, "open_source", lambda path, *rest, **more: Stripes(CLASSES))
    options = {"bad": ()}

    def run(*words: object, script=main, bad=()) -> tuple[int, str, str]:
        options["bad"] = bad
        common = ["--device", "cpu", "--num_workers", 0, "--output_dir", tmp_path / "out", "--crop_size", 16]
        monkeypatch.setattr(sys, "argv", ["script.py", *map(str, [*common, *words])])
        with pytest.raises(SystemExit) as exit_:
            run_cli(script)
        return exit_.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def matrices(tmp_path):
    rng = np.random.default_rng(0)
    projection, texts = (rng.standard_normal(shape).astype(np.float32) for shape in ((DIM, SHARED), (CLASSES, SHARED)))
    np.savez(tmp_path / "texts.npz", texts)
    np.save(tmp_path / "projection.npy", projection)
    student_file(tmp_path)
    return torch.from_numpy(projection), torch.from_numpy(texts)


def words(folder, projection="projection.npy", texts="texts.npz", head="a") -> list:
    files = ("--projection", folder / projection, "--texts", folder / texts)
    return ["--pretrained_weights", folder / "unic.pth", "--apply_head", head, *files]


def test_accuracy_is_the_share_of_images_whose_own_text_is_nearest(evaluate, matrices, tmp_path):
    projection, _ = matrices
    model, source = teacher_space_from_file(tmp_path / "unic.pth", "model", "a").model, Stripes(CLASSES)
    images = torch.stack([eval_transform(16, 16)(source.pil(i)) for i in range(len(source))])
    with torch.no_grad():
        shared = model(images) @ projection
    texts = (shared - shared.mean(dim=0))[[1, 0, 2, 3, 4, 5]]  # an image of each class, two of them confused
    np.savez(tmp_path / "own.npz", texts.numpy())
    first, five = 0, 0
    for row, label in zip(shared, source.labels, strict=True):
        cosines = [float(row @ text / (row.norm() * text.norm())) for text in texts]
        best = sorted(range(CLASSES), key=lambda c, cosines=cosines: -cosines[c])
        first, five = first + (best[0] == label), five + (label in best[:5])
    code, said, error = evaluate(*words(tmp_path, texts="own.npz"), "--resize_size", 16)
    assert code == 0, error
    result = json.loads((tmp_path / "out" / "eval_zero_shot.json").read_text())
    assert result["arch"] == "vit_micro/8 in the space of a" and "texts, 4 wide" in said
    assert result["numbers"] == pytest.approx({"top1": 100 * first / 36, "top5": 100 * five / 36})
    assert 0 < first < five < 36


def test_of_fewer_than_five_classes_there_is_no_top5():
    found = accuracies(torch.tensor([0, 1, 0]), torch.eye(3), torch.eye(3), torch.tensor([[1.0, 1, 2], [2, 0, -1]]))
    assert found == {"top1": pytest.approx(100 / 3)}


def test_every_form_of_the_files_gives_the_same_number(evaluate, matrices, tmp_path):
    projection, texts = matrices
    torch.save(
        {"state_dict": {"module.visual.proj": projection, "module.text_projection": texts}}, tmp_path / "clip.pt"
    )
    torch.save({"head.weight": projection.t().contiguous(), "other": texts}, tmp_path / "timm.pth")
    save_file({"visual_projection.weight": projection.t().contiguous()}, tmp_path / "hf.safetensors")
    torch.save(projection.t(), tmp_path / "bare.pt")
    torch.save(texts, tmp_path / "texts.pt")
    results = set()
    for file, text in (("projection.npy", "texts.npz"), ("clip.pt", "texts.pt"), ("timm.pth", "texts.npz"),
                       ("hf.safetensors", "texts.npz"), ("bare.pt", "texts.npz")):  # fmt: skip
        code, _, error = evaluate(*words(tmp_path, file, text))
        assert code == 0, error
        results.add((tmp_path / "out" / "eval_zero_shot.json").read_text())
    assert len(results) == 1


def test_what_cannot_be_is_refused_in_one_line(evaluate, matrices, tmp_path):
    _, texts = matrices
    np.save(tmp_path / "wide.npy", np.zeros((SHARED, 9), np.float32))
    np.save(tmp_path / "turned.npy", texts.t().numpy())
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    np.save(tmp_path / "nan.npy", np.full((CLASSES, SHARED), np.nan, np.float32))
    torch.save({"one": texts, "two": texts}, tmp_path / "two.pth")
    (tmp_path / "evil.pth").write_bytes(b"\x80\x02cos\nsystem\nq\x00X\x04\x00\x00\x00trueq\x01\x85q\x02Rq\x03.")
    for options, said in (
        (words(tmp_path, projection="wide.npy"), "wide.npy: (4, 9), the features are 7 wide; pass that of the same"),
        (
            words(tmp_path, texts="turned.npy"),
            "(4, 6), expected (6, 4): a row per class of the images, as wide as what",
        ),
        (words(tmp_path, texts="turned.npy"), "pass its transpose"),
        (words(tmp_path, texts="objects.npy"), "objects.npy: no arrays of NumPy"),
        (words(tmp_path, texts="nan.npy"), "--texts"),
        (words(tmp_path, texts="two.pth"), "one matrix is wanted; it holds 2 (one, two)"),
        (words(tmp_path, projection="evil.pth"), "evil.pth: refused"),
        (words(tmp_path, projection="nowhere.npy"), "nowhere.npy: no such file"),
        (words(tmp_path, head="b"), "its ladder does not lead there; it leads to a, timm/b_c"),
        (words(tmp_path)[2:], "--apply_head a: names a part of a checkpoint; pass it as --pretrained_weights"),
    ):
        code, _, error = evaluate(*options)
        assert code == 2 and said in error and error.count("\n") == 1, error
    code, _, error = evaluate(*words(tmp_path), bad=(3,))
    assert code == 2 and "cut off in the middle" in error and "--skip_unreadable" in error
    assert not (tmp_path / "out").exists()
    code, said, error = evaluate(*words(tmp_path), "--skip_unreadable", bad=(3,))
    assert code == 0 and "(unreadable: 1 test image)" in said


def test_other_evaluations_look_at_the_students_image_in_the_teachers_space(evaluate, matrices, tmp_path):
    network = ("--pretrained_weights", tmp_path / "unic.pth", "--nb_knn", 3, "--dump_features", tmp_path / "kept")
    code, said, error = evaluate(*network, "--apply_head", "timm/b.c", script=eval_knn.eval_knn.main)
    assert code == 0 and "in the space of timm/b.c: its pooled output is taken" in said, error
    assert torch.load(tmp_path / "kept" / "testfeat.pth").shape == (36, 5)
    regression = eval_semi_supervised.eval_semi_supervised.main
    code, said, error = evaluate(*network[:2], "--apply_head", "timm/b.c", "--lr_lambd", 1, script=regression)
    assert code == 0 and "in the space of timm/b.c: its pooled output is taken" in said, error
    code, _, error = evaluate(*network, "--apply_head", "a", "--avgpool_patchtokens", 2, script=eval_knn.eval_knn.main)
    assert code == 2 and "only its pooled output can be taken" in error
    code, _, error = evaluate(*network, "--apply_head", "nobody", script=eval_knn.eval_knn.main)
    assert code == 2 and "it leads to a, timm/b_c" in error and error.count("\n") == 1
