"""Steps of main_pretrain.py on a GPU that does not exist, and what is asked of it in the first and any other."""

import tempfile
from dataclasses import dataclass, field

import torch

import main_pretrain
from models import build_backbone
from simulation.gpu import DEVICE, fake_gpu
from simulation.watch import Record
from training.options import check_options, parse_options
from training.planner import three_steps
from utils import World

FILES = tempfile.TemporaryDirectory()  # of teachers


def teachers() -> str:
    """Two of them, of random weights, as ``--teachers`` names them."""
    for name in ("first", "second"):
        torch.save(build_backbone("vit_micro", 8).state_dict(), f"{FILES.name}/{name}.pth")
    return ",".join(f"{name}={FILES.name}/{name}.pth" for name in ("first", "second"))


# what the published recipes have and the defaults have not
RECIPES = {
    "dino": [],
    "ibot": ["--shared_head", "true", "--local_crops_number", "10"],
    "attmask": ["--shared_head", "true", "--local_crops_number", "10", "--out_dim", "8192"],
    "udi": ["--local_crops_number", "10", "--norm_last_layer", "false"],
    "unic": ["--teachers", teachers()],
    "esvit": ["--use_dense_prediction", "true"],
    "mugs": ["--norm_last_layer", "false"],
}
MICRO = ["--arch", "vit_micro", "--patch_size", "8", "--batch_size_per_gpu", "8", "--epochs", "40"]
CROPS = ["--out_dim", "48", "--global_crops_size", "32", "--local_crops_size", "16", "--local_crops_number", "2"]
LADDER = ["--image_size", "32", "--lp_args", "{'hidden_dim': 16, 'last_hidden_dim': 24}"]
QUEUES = ["--instance_queue_size", "64", "--local_group_queue_size", "64", "--group_out_dim", "48"]
SIZES = {"unic": LADDER, "mugs": [*CROPS[2:], *QUEUES]}
SMALL = {method: [*MICRO, *SIZES.get(method, CROPS)] for method in RECIPES}
FULL = ["--arch", "vit_small", "--batch_size_per_gpu", "64", "--epochs", "100"]


@dataclass
class Steps:
    run: main_pretrain.Run
    first: Record
    second: Record
    losses: dict[str, torch.Tensor] = field(default_factory=dict)


def take_steps(method: str, *options: str, sizes: list[str] | None = None, devices: int = 1) -> Steps:
    """``sizes``: left out, small ones."""
    words = ["--method", method, "--output_dir", "/nowhere", "--knn_every", "0", *RECIPES[method]]
    words += [*(SMALL[method] if sizes is None else sizes), *options]
    args = parse_options(words)
    args.output_dir = "."
    with fake_gpu(devices):
        check_options(args, World(0, devices, 0, DEVICE))
    seen: dict[str, torch.Tensor] = {}

    def train_one_epoch(run: main_pretrain.Run, epoch: int, pieces: object) -> None:
        note = run.monitor.step
        run.monitor.step = lambda losses, *rest: (seen.update(losses), note(losses, *rest))
        main_pretrain.train_one_epoch(run, epoch, pieces)

    run, records, _ = three_steps(args, devices, main_pretrain.build, train_one_epoch)
    return Steps(run, *records[:2], seen)
