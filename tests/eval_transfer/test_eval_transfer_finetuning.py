"""Fine-tuning by DeiT's recipe: on official files and from inside a head, continued exactly, shared by processes."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F

from data.labelled import open_labelled
from data.loader import TrainLoader
from eval_semi_supervised import eval_semi_supervised_finetuning
from eval_transfer import eval_transfer_finetuning
from evaluation import finetune
from evaluation.deit import lagged_rates
from evaluation.finetune_network import head_inside
from methods.heads import DINOHead
from models import build_backbone
from tests.eval_linear.test_eval_linear import assert_same, lines_of, saved
from tests.launch import ROOT, SMALL, finish, make_images, start
from tests.sources import Stripes
from utils import UsageError, World, run_cli

OPTIONS = ("--device", "cpu", "--precision", "fp64", "--num_workers", 0, "--input_size", 16, "--drop_path", 0.2)


@pytest.fixture
def tune(monkeypatch, tmp_path, capsys):
    """Run a script in this process: (exit code, standard output, standard error)."""

    def run(script, *arguments: object, out: str = "out") -> tuple[int, str, str]:
        options = [*OPTIONS, "--output_dir", tmp_path / out, *arguments]
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, options)])
        with pytest.raises(SystemExit) as exit_:
            run_cli(script.main)
        return exit_.value.code, *capsys.readouterr()

    return run


def checkpoint(path: Path) -> Path:
    """A teacher with a whole projection head."""
    torch.manual_seed(3)
    backbone = build_backbone("vit_micro", 8, img_size=16)
    head = DINOHead(backbone.embed_dim, 24, hidden_dim=20, bottleneck_dim=12)
    state = {f"backbone.{name}": tensor for name, tensor in backbone.state_dict().items()}
    state |= {f"head.{name}": tensor for name, tensor in head.state_dict().items()}
    torch.save({"teacher": state, "epoch": 1}, path)
    return path


def make_cifar(root: Path, images: int = 4) -> Path:
    root.mkdir()
    rng = np.random.default_rng(0)
    for name in (*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"):
        records = rng.integers(0, 256, (images, 3073), dtype=np.uint8)
        records[:, 0] = np.arange(images) * 3 % 10
        (root / name).write_bytes(records.tobytes())
    (root / "batches.meta.txt").write_text("\n".join("abcdefghij"))
    return root


def test_cifar_is_read_from_its_binary_version(tmp_path):
    root = make_cifar(tmp_path / "bin")
    source = open_labelled("cifar10", root, "trainval", official=False)
    assert source.labels.tolist() == [0, 3, 6, 9] * 5 and source.class_names == list("abcdefghij")
    record = np.frombuffer((root / "data_batch_2.bin").read_bytes(), np.uint8).reshape(-1, 3073)[1]
    pixels = source.array(5)
    assert pixels.shape == (32, 32, 3) and pixels[2, 3, 1] == record[1 + 1024 + 2 * 32 + 3]
    assert source.image_name(5).endswith("data_batch_2.bin image 1")
    with pytest.raises(UsageError, match="20 images instead of the official 50000; complete it from CIFAR-10"):
        open_labelled("cifar10", root, "trainval")
    (root / "test_batch.bin").write_bytes(b"12345")
    for path, words in ((root, "no whole records"), (tmp_path, "No such file.* comes from CIFAR-10, binary version")):
        with pytest.raises(UsageError, match=words):
            open_labelled("cifar10", path, "test", official=False)


def test_copies_of_an_image_are_cut_differently_and_an_epoch_has_as_many_as_there_are():
    def views(image, key):
        return {"key": torch.tensor(key)}

    views.augment = "array"
    options = {"batch_size": 8, "world": World(0, 1, 0, torch.device("cpu")), "seed": 0, "epochs": 2, "num_workers": 0}
    pieces = list(TrainLoader(Stripes(2, 8), views, repeated=True, **options))
    assert len(pieces) == 4
    keys = torch.cat([piece["key"] for piece in pieces[:2]])
    assert keys[:, 2].tolist() == torch.cat([piece["indices"] for piece in pieces[:2]]).tolist()
    assert len(keys.unique(dim=0)) == 16 and keys[:6, 3].tolist() == [0, 1, 2, 0, 1, 2]
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0)).repeat_interleave(3)
    assert keys[:, 2].tolist() == order[:16].tolist()


def test_official_files_are_learnt_with_the_published_rates_and_a_run_is_continued(tune, tmp_path, monkeypatch):
    data = ("--data_set", "CIFAR10", "--data_path", make_cifar(tmp_path / "bin"), "--any_counts", "--save_ckpt_freq", 1)
    options = (*data, "--finetune", checkpoint(tmp_path / "c.pth"), "--batch_size", 8, "--lr", 0.01, "--epochs", 3)
    script = eval_transfer_finetuning
    code, said, error = tune(script, *options, "--warmup_epochs", 1)
    assert code == 0, error
    rates = lagged_rates(0.01 * 8 / 512, 3, 1, 1e-6, 1e-5)
    assert [line["train_lr"] for line in lines_of(tmp_path / "out")] == pytest.approx(rates)
    result = json.loads((tmp_path / "out" / "eval_transfer_finetuning.json").read_text())
    assert (
        len(result["numbers"]["interval"]) == 2 and "head.weight" in saved(tmp_path / "out", "checkpoint.pth")["model"]
    )
    whole = saved(tmp_path / "out", "checkpoint.pth")
    assert "model_ema" in whole and "head.weight" in whole["model"]
    (tmp_path / "cut").mkdir()
    (tmp_path / "out" / "checkpoint-0.pth").rename(tmp_path / "cut" / "checkpoint.pth")
    first = (tmp_path / "out" / "log.txt").read_text().splitlines()[0]
    (tmp_path / "cut" / "log.txt").write_text(first + "\n")
    code, said, error = tune(script, *options, "--warmup_epochs", 1, out="cut")
    assert code == 0 and "Epoch: [0]" not in said, error
    assert_same(saved(tmp_path / "cut", "checkpoint.pth")["model"], whole["model"])
    right = [dict(np.load(tmp_path / o / "eval_transfer_finetuning_right.npz"))["top-1"] for o in ("out", "cut")]
    assert np.array_equal(*right) and 100 * right[0].mean() == pytest.approx(result["numbers"]["top1"])
    compare = ("--compare", tmp_path / "out" / "eval_transfer_finetuning_right.npz", "--eval")
    code, said, error = tune(script, *options, "--warmup_epochs", 1, *compare, out="cut")
    assert code == 0 and "+0.00" in said and "no difference is shown" in said, error
    for arguments, words in (
        ((*data[:4],), "20 images instead of the official 50000"),
        (("--data_set", "Cars"), "pass --data_path"),
        (("--finetune_head_layer", 1), "pass --finetune"),
        (("--warmup_lr", -1), "must not be negative"),
    ):
        code, _, error = tune(script, *arguments, "--warmup_epochs", 1, out="no")
        assert code == 2 and words in error and error.rstrip().count("\n") == 0, error


def test_a_supervised_teacher_takes_part_of_the_labels_place(tune, tmp_path):
    torch.manual_seed(0)
    logits, said, labels = torch.randn(4, 3), torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    args = SimpleNamespace(precision="fp32", smoothing=0.0, drop_path=0.0, drop=0.0, attn_drop_rate=0.0, seed=0)
    args.distillation_type, args.distillation_alpha, args.distillation_tau = "soft", 0.25, 2.0
    run = SimpleNamespace(args=args, mixup=None, sets=SimpleNamespace(classes=3), world=SimpleNamespace(device="cpu"))
    run.model, run.teacher = (lambda images, draws: logits), (lambda images: said)
    loss, _ = finetune.loss_of(run, {"images": torch.zeros(4, 3, 2, 2), "first_sample": 0}, labels, 0)
    p, q = (said / 2).softmax(1), (logits / 2).softmax(1)
    expected = 0.75 * F.cross_entropy(logits, labels) + 0.25 * 4 * (p * (p / q).log()).mean()
    torch.testing.assert_close(loss, expected)

    data = ("--data_set", "CIFAR10", "--data_path", make_cifar(tmp_path / "bin", 2), "--any_counts", "--batch_size", 10)
    options = (*data, "--model", "vit_micro", "--patch_size", 8, "--epochs", 1, "--warmup_epochs", 0)
    name, path = "mobilenetv3_small_050", tmp_path / "teacher.pth"
    hard = ("--distillation-type", "hard", "--teacher-model", name, "--teacher-path", path)
    torch.save({"model": timm.create_model(name, num_classes=10).state_dict()}, path)
    script = eval_transfer_finetuning
    code, said, error = tune(script, *options, *hard)
    assert code == 0 and f"teacher: {name}" in said, error
    assert tune(script, *options, out="plain")[0] == 0
    assert lines_of(tmp_path / "out")[0]["train_loss"] != lines_of(tmp_path / "plain")[0]["train_loss"]
    for arguments, words in (
        (("--distillation_type", "soft"), "--teacher_path is not given"),
        (("--teacher_path", path), "none has no use for it"),
        ((*hard, "--distillation_alpha", 2), "between 0 and 1"),
        ((*hard, "--teacher-model", "hf-hub:a/b"), "timm has no network of this name"),
        ((*hard, "--teacher-model", "resnet18"), "does not fit resnet18 with 10 classes"),
        ((*hard, "--distillation_alpha", 0.25), "distillation_alpha: 0.5 there, 0.25 here"),
        ((), "belongs to another run"),
    ):
        code, _, error = tune(script, *options, *arguments)
        assert code == 2 and words in error and error.rstrip().count("\n") == 0, error


def test_a_network_is_tuned_from_inside_its_head_on_one_process_and_on_two(tune, tmp_path):
    train = make_images(tmp_path / "data" / "train", 24, 3)
    make_images(tmp_path / "data" / "val", 6, 3)
    (tmp_path / "list.txt").write_text("\n".join(sorted(path.name for path in train.glob("*/*.jpg"))[:13]))
    path = checkpoint(tmp_path / "c.pth")
    words = ["--finetune", path, "--data_path", tmp_path / "data", "--target_list_path", tmp_path / "list.txt"]
    words += ["--finetune_head_layer", 3, "--epochs", 2, "--warmup_epochs", 1, "--lr", 0.01]
    words += ["--mixup", 0, "--cutmix", 0]
    script = eval_semi_supervised_finetuning
    code, said, error = tune(script, *words, "--batch_size", 6)
    assert code == 0 and "of which 13 are listed" in said and "left as initialised: head.* (2)" in said, error
    one = saved(tmp_path / "out", "checkpoint.pth")["model"]
    assert one["head.last_layer.weight_v"].shape == (24, 12) and one["head.cls_head.weight"].shape == (3, 24)
    first = torch.load(path)["teacher"]["head.mlp.0.weight"]
    assert (one["head.mlp.0.weight"] - first).abs().max() < 0.01  # it began there
    words = [str(ROOT / "eval_semi_supervised" / f"{script.__name__.split('.')[1]}.py"), *map(str, (*OPTIONS, *words))]
    words += ["--batch_size", "3", "--output_dir", str(tmp_path / "two")]
    finish(start(2, words, **dict.fromkeys(SMALL)))
    for name, tensor in saved(tmp_path / "two", "checkpoint.pth")["model"].items():
        torch.testing.assert_close(tensor, one[name], rtol=1e-6, atol=1e-9)
    with pytest.raises(UsageError, match=r"--finetune_head_layer 2: x has no head\.mlp\.2\.weight"):
        head_inside("x", {"head.mlp.0.weight": first}, 128, 3, 2)
