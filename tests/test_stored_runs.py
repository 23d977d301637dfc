"""The same images as a folder, in tar shards, in a mapped zip and in TSV files: one run to the bit, and one result."""

import json
import sys
from pathlib import Path

import pytest

import main_pretrain
from errors import UsageError
from eval_knn import eval_knn
from main_pretrain import RunStopped
from tests.data.archives import write_mapped_zip, write_shards, write_tsv
from tests.launch import assert_same_run, make_images, run_here
from utils import run_cli

RUN = {"epochs": 1, "warmup_epochs": 0, "knn_every": 1, "nb_knn": 3}


@pytest.fixture(scope="module")
def roots(tmp_path_factory) -> dict[str, tuple[Path, dict]]:
    """Form -> where its 16 training and 8 test images lie, and the options that say how."""
    folder = tmp_path_factory.mktemp("stored")
    forms = {"folder": (folder / "folder", {}), "shards": (folder / "shards", {})}
    forms |= {mode: (folder / mode, {f"{mode}_mode": True}) for mode in ("zip", "tsv")}
    for part, count in (("train", 16), ("val", 8)):
        root = make_images(folder / "folder" / part, count)
        files = [(str(file.relative_to(root)), file.read_bytes()) for file in sorted(root.glob("*/*"))]
        labels = [int(name.split("/")[0].removeprefix("class")) for name, _ in files]
        write_shards(folder / "shards" / part, files, 3, "images")
        write_mapped_zip(folder / "zip", files, labels, part)
        rows = [(name, str(label), data) for label, (name, data) in zip(labels, files, strict=True)]
        write_tsv(folder / "tsv" / f"{part}.tsv", rows)
    return forms


def test_runs_and_evaluations_of_all_forms_are_the_same_and_shards_resume_exactly(roots, tmp_path, monkeypatch, capsys):
    results = {}
    for form, (root, options) in roots.items():
        assert run_here(monkeypatch, data_path=root, output_dir=tmp_path / form, **options, **RUN) == 0
        assert_same_run(tmp_path / "folder", tmp_path / form)
        assert json.loads((tmp_path / form / "log.txt").read_text().splitlines()[-1])["k-NN"]["3"]
        words = ["--pretrained_weights", tmp_path / "folder" / "checkpoint.pth", "--data_path", root, "--nb_knn", 3,
                 "--device", "cpu", "--num_workers", 0, "--output_dir", tmp_path / form,
                 *[f"--{name}" for name in options]]  # fmt: skip
        monkeypatch.setattr(sys, "argv", ["eval_knn", *map(str, words)])
        with pytest.raises(SystemExit) as exit_:
            run_cli(eval_knn.main)
        assert exit_.value.code == 0, capsys.readouterr().err
        results[form] = json.loads((tmp_path / form / "eval_knn.json").read_text())["numbers"]
    assert all(result == results["folder"] for result in results.values())

    save = main_pretrain.save_or_stop

    def stop_once(run, epoch, step, stop, due):
        save(run, epoch, step, stop=(epoch, step) == (0, 1), due=due)

    shards = {"data_path": roots["shards"][0], "output_dir": tmp_path / "parts", **RUN}
    monkeypatch.setattr(main_pretrain, "save_or_stop", stop_once)
    with pytest.raises(RunStopped):
        run_here(monkeypatch, **shards)
    monkeypatch.setattr(main_pretrain, "save_or_stop", save)
    with pytest.raises(UsageError, match="list of images: "):
        run_here(monkeypatch, **shards | {"data_path": roots["folder"][0]})
    run_here(monkeypatch, **shards, num_workers=2)
    assert_same_run(tmp_path / "folder", tmp_path / "parts")


def test_what_cannot_be_read_ends_in_one_line_and_writes_nothing(roots, tmp_path, monkeypatch):
    cut = tmp_path / "cut"
    cut.mkdir()
    shard = next((roots["shards"][0] / "train").glob("*.tar")).read_bytes()
    (cut / "a.tar").write_bytes(shard[: len(shard) // 2])
    for options, said in (
        ({"data_path": cut}, r"a\.tar is damaged, or no tar archive: "),
        ({"data_path": roots["tsv"][0], "zip_mode": True}, "--zip_mode needs train.zip"),
        ({"data_path": roots["zip"][0], "tsv_mode": "true"}, "--tsv_mode needs train.tsv"),
        ({"data_path": cut, "zip_mode": True, "tsv_mode": True}, "--zip_mode and --tsv_mode"),
        ({"data_path": cut, "sampler": "chunk"}, "download from Azure"),
        ({"data_path": roots["zip"][0], "zip_mode": True, "split": "all"}, "--split all"),
    ):
        with pytest.raises(UsageError, match=said):
            run_here(monkeypatch, **options, output_dir=tmp_path / "out")
        assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
