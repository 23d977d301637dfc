"""Steps of main_pretrain.py on a GPU that does not exist, and what is asked of it in the first and any other."""

from dataclasses import dataclass, field

import torch

import main_pretrain
from simulation.gpu import DEVICE, fake_gpu
from simulation.watch import Record
from training.options import check_options, parse_options
from training.planner import three_steps
from utils import World

# what the published recipes have and the defaults have not
RECIPES = {
    "dino": [],
    "ibot": ["--shared_head", "true", "--local_crops_number", "10"],
    "attmask": ["--shared_head", "true", "--local_crops_number", "10", "--out_dim", "8192"],
    "udi": ["--local_crops_number", "10", "--norm_last_layer", "false"],
}
SMALL = [
    *("--arch", "vit_micro", "--patch_size", "8", "--out_dim", "48", "--batch_size_per_gpu", "8"),
    *("--global_crops_size", "32", "--local_crops_size", "16", "--local_crops_number", "2", "--epochs", "40"),
]
FULL = ["--arch", "vit_small", "--batch_size_per_gpu", "64", "--epochs", "100"]


@dataclass
class Steps:
    run: main_pretrain.Run
    first: Record
    second: Record
    losses: dict[str, torch.Tensor] = field(default_factory=dict)


def take_steps(method: str, *options: str, sizes: list[str] = SMALL, devices: int = 1) -> Steps:
    words = ["--method", method, "--output_dir", "/nowhere", "--knn_every", "0", *RECIPES[method], *sizes, *options]
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
