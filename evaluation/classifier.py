"""A frozen network with a linear head: which file the head is in, which feature it reads, and both in one file."""

import argparse
from pathlib import Path
from typing import NamedTuple

import torch

from evaluation.features import BOTH, CLASS, CLS, Feature, feature_widths
from evaluation.linear_heads import heads_of
from evaluation.network import network_from_options, pooling, within_depth
from models.checkpoints import Network
from models.layouts.names import plain_name
from models.reading import choose_tensors, read_backbone
from models.safe_load import load_file
from utils import UsageError, World, log, save_torch


class Head(NamedTuple):
    weight: torch.Tensor  # (classes, dim)
    bias: torch.Tensor
    feature: Feature | None  # None where the file does not say
    accuracy: float | None  # of the test images it was chosen by, in percent


def read_head(path: Path, network: Network) -> Head:
    """The best head of a file of ours or of the originals. Raises UsageError where it holds none."""
    file = load_file(path)
    heads = heads_of(file)
    if not heads:
        raise UsageError(f"{path}: holds no linear head; pass the file of one that was trained by eval_linear.py")
    number, feature = file.get("best_acc_hidx", 0), None
    if not 0 <= number < len(heads):
        raise UsageError(f"{path}: says that head {number} is best, and holds {len(heads)}")
    if "tutelage" in file and "heads" in file["tutelage"]:
        said = file["tutelage"]["heads"][number]
        feature = Feature(said["n_last_blocks"], said["avgpool_patchtokens"], said.get("class_token", CLS))
        (feature,) = within_depth(network, [feature])
    accuracy = file.get("best_acc")
    return Head(*heads[number], feature, accuracy if isinstance(accuracy, float) else None)


class Classifier(torch.nn.Module):
    """Images to logits (batch, classes)."""

    def __init__(self, network: Network, head: Head, feature: Feature):
        super().__init__()
        self.network, self.model, self.feature, self.accuracy = network, network.model, feature, head.accuracy
        self.register_buffer("weight", head.weight.float())
        self.register_buffer("bias", head.bias.float())

    @property
    def classes(self) -> int:
        return len(self.bias)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.bias, self.feature(self.model, images), self.weight.T)


def add_head_arguments(parser: argparse._ActionsContainer) -> None:
    add = parser.add_argument
    add("--load_from", "--checkpoint_linear", default=None, metavar="FILE",
        help="the linear head, also below --output_dir; left out: in the file of the network")  # fmt: skip
    add("--n_last_blocks", default=None, type=int, help="as the head was trained; left out: recorded, else by size")
    add("--avgpool_patchtokens", default=None, type=pooling, metavar="POOLING", help="likewise")


def classifier_from_options(args: argparse.Namespace, world: World) -> Classifier:
    """The network and head that options describe, on the device, ready to be evaluated. Raises UsageError."""
    network = network_from_options(args)
    network.model.to(world.device).eval().requires_grad_(False)
    path = head_path(args)
    head = read_head(path, network)
    feature = head.feature or usual_feature(args, network)
    size = network.arguments.get("img_size", 224)
    (width,) = feature_widths(network.model, [feature], size, world.device)
    if width != head.weight.shape[1]:
        raise UsageError(
            f"{path}: a head on features of width {head.weight.shape[1]}, but the {feature} of {network.label} has "
            f"{width}; pass the --n_last_blocks and --avgpool_patchtokens it was trained with"
        )
    if not (torch.isfinite(head.weight).all() and torch.isfinite(head.bias).all()):
        raise UsageError(f"{path}: the head's weights are not finite numbers; its training diverged")
    log.info(f"{path}: {len(head.bias)} classes, on the {feature}")
    return Classifier(network, head, feature).to(world.device).eval()


def head_path(args: argparse.Namespace) -> Path:
    if args.load_from is None:
        if args.pretrained_weights and heads_of(load_file(args.pretrained_weights)):
            return Path(args.pretrained_weights)
        raise UsageError(
            "--load_from: which linear head classifies? pass the checkpoint_teacher_linear.pth of eval_linear.py, or a "
            "file that `combine` made as --pretrained_weights"
        )
    path, below = Path(args.load_from), Path(args.output_dir) / args.load_from
    if not path.exists() and not below.exists():
        raise UsageError(f"--load_from {args.load_from}: no such file, here or below --output_dir {args.output_dir}")
    return path if path.exists() else below


def usual_feature(args: argparse.Namespace, network: Network) -> Feature:
    """What options say, else what the originals take: four class tokens of small networks, else one and the mean."""
    large = any(word in network.arch for word in ("base", "large", "huge", "giant")) and "swin" not in network.arch
    blocks, pool = args.n_last_blocks, args.avgpool_patchtokens
    feature = Feature(blocks or (1 if large else 4), pool or (BOTH if large else CLASS))
    return within_depth(network, [feature])[0]


def combine(backbone: str, linear: str, checkpoint_key: str = "teacher") -> dict:
    """The file of a linear head with the network's tensors beside it; of several heads the best one.

    As iBOT and AttMask lay it out: ``state_dict`` holds the backbone by bare names, ``head.*``, and ``linear.*``.
    """
    _, info = read_backbone(backbone, checkpoint_key)  # refuses what holds no backbone
    _, tensors = choose_tensors(load_file(backbone), checkpoint_key)
    file = load_file(linear)
    heads = heads_of(file)
    if not heads:
        raise UsageError(f"{linear}: holds no linear head; pass the checkpoint_teacher_linear.pth of eval_linear.py")
    number = file.get("best_acc_hidx", 0)
    if not 0 <= number < len(heads):
        raise UsageError(f"{linear}: says that head {number} is best, and holds {len(heads)}")
    weight, bias = heads[number]
    log.info(f"{info.path}: {info.layout.name}; {linear}: head {number} of {len(heads)}")
    state = {plain_name(name): tensor for name, tensor in tensors.items()}
    several = ("best_acc_hidx", "best_acc_sweep_lr_only", "optimizers", "schedulers")
    kept = {name: value for name, value in file.items() if name not in several or len(heads) == 1}
    combined = {**kept, "state_dict": state | {"linear.weight": weight, "linear.bias": bias}}
    said = {name: info.arguments[name] for name in ("arch", "image_size") if name in info.arguments}
    if "heads" in file.get("tutelage", {}):
        combined["tutelage"] = said | {"heads": [file["tutelage"]["heads"][number]]}
    return combined


def write_combined(backbone: str, linear: str, output: str, checkpoint_key: str) -> None:
    combined = combine(backbone, linear, checkpoint_key)
    path = Path(output)
    if not path.parent.is_dir():
        raise UsageError(f"--output_file {path}: there is no folder {path.parent}")
    if path.exists() and any(path.samefile(source) for source in (backbone, linear)):
        raise UsageError(f"--output_file {path}: is one of the files to be combined; choose another name")
    try:
        save_torch(combined, path)
    except OSError as error:
        raise UsageError(f"--output_file {path}: cannot be written: {error}") from error
    log.info(f"save {combined.get('epoch')}th head with acc {combined.get('best_acc')}")
