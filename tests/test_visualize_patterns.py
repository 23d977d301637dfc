"""Patterns as a script: prototypes of patches and of images, drawn where they are surest."""

import pytest
import torch
from PIL import Image

from data.named import NamedFiles
from evaluation.patterns import Bank, draw_clusters, members
from methods.heads import IBOTHead
from models import build_backbone
from tests.eval_clustering.test_eval_clustering import checkpoint
from tests.scripts import Scripts, photograph, save
from visualize_patterns import main


@pytest.fixture
def scripts(monkeypatch, capsys, tmp_path):
    return Scripts(monkeypatch, capsys, tmp_path / "out")


def options(tmp_path, *more: object) -> list:
    path = tmp_path / "ibot.pth"
    if not path.exists():
        head = IBOTHead(128, 7, patch_out_dim=5, shared_head=False, hidden_dim=24, bottleneck_dim=12)
        checkpoint(path, head)
        for number in range(6):
            save(photograph(number), tmp_path / "data" / f"{number}.png")
    common = ["--pretrained_weights", path, "--data_path", tmp_path / "data", "--img_size", 64, "--device", "cpu"]
    return [*common, "--num_workers", 0, "--output_dir", tmp_path / "out", *more]


def test_a_bank_holds_the_best_prototype_of_every_place(scripts, tmp_path):
    said = scripts.run(main, *options(tmp_path))
    bank = torch.load(tmp_path / "out" / "memory_patch.pth")
    assert bank["memory_bank"].shape == (6, 64, 2) and bank["num_per_cluster"].sum() == 6 * 64
    assert len(bank["num_per_cluster"]) == 5 and "of 5 prototypes are used" in said
    fullest = int(bank["num_per_cluster"].argmax())
    assert (tmp_path / "out" / f"cpatch_crank0_cid{fullest}_top196.png").exists()
    scripts.run(main, *options(tmp_path, "--type", "cls", "--show_pics", 1, "--topk", 2))
    bank = torch.load(tmp_path / "out" / "memory_cls.pth")
    assert bank["memory_bank"].shape == (6, 1, 2) and len(bank["num_per_cluster"]) == 7
    assert len(list((tmp_path / "out").glob("ccls_crank*"))) == 1


def test_the_surest_place_of_every_image_is_shown_and_what_is_dark_is_not(tmp_path):
    for number, level in enumerate((200, 10, 120)):
        save(Image.new("RGB", (64, 64), (level, level, level)), tmp_path / f"{number}.png")
    source = NamedFiles(tmp_path, ["0.png", "1.png", "2.png"], "images")
    found = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 1]])
    logits = torch.tensor([[9.0, 1.0, 2.0, 8.0], [5.0, 7.0, 6.0, 4.0], [0.0, 0.0, 0.0, 3.0]])
    bank = Bank(found, logits, torch.arange(3), torch.bincount(found.flatten()))
    assert [part.tolist() for part in members(bank, 1)] == [[1, 2, 0], [1, 3, 2]]
    drawn = draw_clusters(bank, source, tmp_path, patches=True, size=32, patch_window=1, topk=9, most=9)
    assert drawn == [(1, 2), (0, 2)]  # the second image is dark
    picture = Image.open(tmp_path / "cpatch_crank0_cid1_top9.png")
    assert picture.size == (2 * 18 + 2, 16 + 4)


def test_bad_input_ends_in_one_line(scripts, tmp_path):
    for words, said in (
        (("--patch_window", 4), "--patch_window 4"),
        (("--topk", 0), "--topk 0"),
        (("--data_path", tmp_path / "nowhere"), "nowhere"),
    ):
        assert said in scripts.refused(main, *options(tmp_path, *words))
    assert "--pretrained_weights" in scripts.refused(main, *options(tmp_path)[2:])
    torch.save(build_backbone("vit_micro", 8, img_size=32).state_dict(), tmp_path / "bare.pth")
    bare = ["--pretrained_weights", tmp_path / "bare.pth", *options(tmp_path)[2:]]
    assert "holds no projection head" in scripts.refused(main, *bare)
    (tmp_path / "data" / "2.png").write_bytes(b"no image")
    assert "1 of its 6 test images cannot be read" in scripts.refused(main, *options(tmp_path))
    scripts.run(main, *options(tmp_path, "--skip_unreadable"))
    assert torch.load(tmp_path / "out" / "memory_patch.pth")["images"].tolist() == [0, 1, 3, 4, 5]
