"""The contract every method keeps, and what most of them share: clipping per tensor, an EMA teacher, one backbone.

A method is one module that owns its student, its teachers and its state. The training loop calls, in this order:

    forward(batch, clock)         a dict with "loss" and every part worth plotting, still on the device
    clip_gradients(clip, clock)   as the original clips; returns the norms before clipping
    after_backward(clock)         e.g. cancel the last layer's gradients in the first epochs
    after_step(clock, gate)       EMA, centres, queues: whatever follows the optimiser. A ``gate`` of 0 (a tensor on the
                                  device) means that loss or gradient was not finite: change nothing, forget what
                                  ``forward`` collected. None means that the step was certainly taken. In fp16 the loss
                                  decides: a gradient that overflows stops the optimiser alone, as in the originals

Adding a method: CONTRIBUTING.md.
"""

import argparse
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn as nn

from data.pictures import crops_grid
from methods.parts import Part, adopt_parts
from models import family_of
from models.stochastic_depth import BatchDraws
from randomness import counted_uniforms
from utils import cosine_scheduler


@dataclass(frozen=True)
class Clock:
    """Where training stands, and this iteration's values of the schedules.

    ``first_sample`` is the position of the batch's first image in the global batch of all processes and pieces, which
    has ``global_batch`` images: with ``seed`` and ``iteration`` it keys the random draws, so that they do not depend on
    how a batch is divided.
    """

    epoch: int
    iteration: int
    lr: float = 0.0
    weight_decay: float = 0.0
    momentum: float = 1.0
    seed: int = 0
    first_sample: int = 0
    global_batch: int = 0

    def drop_path_draws(self, depth: int, crops: int, batch: int) -> np.ndarray:
        """Uniform numbers for stochastic depth: (depth, 2 branches, crops * batch), crops-major like the features."""
        block = np.arange(depth)[:, None, None, None]
        branch = np.arange(2)[:, None, None]
        crop = np.arange(crops)[:, None]
        sample = self.first_sample + np.arange(batch)
        return counted_uniforms(self.seed, self.iteration, block, branch, crop, sample).reshape(depth, 2, crops * batch)

    def batch_draws(self, depth: int, batch: int) -> BatchDraws:
        """The same numbers for one crop, of the whole batch, of which ``batch`` images are here."""
        whole = replace(self, first_sample=0).drop_path_draws(depth, 1, self.global_batch)
        return BatchDraws(whole, self.first_sample, batch)


class Method(nn.Module):
    """See the module docstring."""

    name: str
    wrapped = ("student",)  # keys of checkpoints whose names start with "module.", as in the original's files
    inherited = ("student", "teacher")  # keys of what begins with another run even without that run's progress
    free_options: frozenset[str] = frozenset()  # of its own options those that a run may be continued with others of

    # ---- options and data -------------------------------------------------------------------------------------------

    @staticmethod
    def add_arguments(parser: argparse._ArgumentGroup) -> None:
        """The method's own options, with the names, defaults and ranges of the original."""
        raise NotImplementedError

    @staticmethod
    def check_arguments(args: argparse.Namespace) -> None:
        """Raise UsageError for values that cannot work, before anything is built."""

    @staticmethod
    def views(args: argparse.Namespace) -> Callable:
        """A picklable transform: (image, key) -> dict of the tensors one image contributes (data/views.py)."""
        raise NotImplementedError

    @staticmethod
    def image_size(args: argparse.Namespace) -> int:
        """Pixels along a side of what the network is trained on; evaluations crop to it unless told otherwise."""
        return args.global_crops_size

    @classmethod
    def build(cls, args: argparse.Namespace) -> "Method":
        """The method with its networks, from checked options."""
        raise NotImplementedError

    def place(self, device: torch.device, dtype: torch.dtype, half: torch.dtype | None) -> "Method":
        """The method on ``device`` with weights of ``dtype``. ``half``: the type that the run's products are computed
        in, None where it is ``dtype`` as well; what is never trained may be kept in it.
        """
        return self.to(device, dtype)

    @staticmethod
    def schedules(args: argparse.Namespace, niter: int, global_batch: int) -> dict[str, np.ndarray]:
        """``Clock``'s lr, weight_decay and momentum, one value per iteration. ``niter``: steps per epoch."""
        last_decay = args.weight_decay if args.weight_decay_end is None else args.weight_decay_end
        momentum = getattr(args, "momentum_teacher", 1.0)
        return {
            "lr": cosine_scheduler(args.lr * global_batch / 256, args.min_lr, args.epochs, niter, args.warmup_epochs),
            "weight_decay": cosine_scheduler(args.weight_decay, last_decay, args.epochs, niter),
            "momentum": cosine_scheduler(momentum, 1.0, args.epochs, niter),
        }

    # ---- one step ---------------------------------------------------------------------------------------------------

    def forward(self, batch: dict, clock: Clock) -> dict[str, torch.Tensor]:
        raise NotImplementedError

    def param_groups(self) -> list[dict]:
        """Groups for the optimiser; ``lr_multiplier`` and ``wd_multiplier`` scale the schedules (default 1).

        parity: biases and one-dimensional tensors are not decayed, everything else is, class token and positions too
        (DINO utils.get_params_groups).
        """
        decayed, undecayed = [], []
        for name, parameter in self.student.named_parameters():
            if parameter.requires_grad:
                (undecayed if name.endswith(".bias") or parameter.ndim == 1 else decayed).append(parameter)
        return [{"params": decayed}, {"params": undecayed, "weight_decay": 0.0, "wd_multiplier": 0.0}]

    def clip_gradients(self, clip: float, clock: Clock) -> torch.Tensor:
        return clip_per_tensor_([p.grad for p in self.student.parameters() if p.grad is not None], clip)

    def after_backward(self, clock: Clock) -> None:
        pass

    def after_step(self, clock: Clock, gate: torch.Tensor | None) -> None:
        pass

    # ---- looking at it ----------------------------------------------------------------------------------------------

    def health(self) -> dict[str, torch.Tensor]:
        """Label-free signs of life from the latest forward pass (training/health.py says what they mean)."""
        return {}

    def epoch_state(self) -> dict:
        """What ``health`` remembers of the epoch so far, of all processes, which all take part; a checkpoint keeps it
        beside the original's keys.
        """
        return {}

    def load_epoch_state(self, state: dict) -> None:
        """Go on from what ``epoch_state`` returned."""

    def pseudo_labels(self) -> torch.Tensor | None:
        """Prototype of every image of the latest piece, (batch,) int64 on the device; None where there are none."""
        return None

    def pictures(self, batch: dict, clock: Clock) -> Iterator[tuple[str, np.ndarray]]:
        """Names and pictures, uint8 (height, width, 3), of what a batch holds; each is drawn when it is asked for.

        --dry_run writes all of them as files of their names, TensorBoard shows the first.
        """
        yield "first_batch", crops_grid(batch["crops"])

    def checkpoint_parts(self) -> dict[str, Part]:
        """Top-level key in the checkpoint -> what has the state that stands there, in the original's layout: a module,
        ``Renamed`` where files have other names, or whatever else keeps a state (methods/parts.py).
        """
        raise NotImplementedError

    def identity(self) -> dict[str, str]:
        """What decides a run's numbers besides its options: what it is called, and a hash or a name of it.

        A run is only continued with the same. Whatever frozen network comes from a file belongs here.
        """
        return {}

    def frozen_networks(self) -> dict[str, nn.Module]:
        """Networks that are never trained, by name, which take a batch of images: the start says what they cost."""
        return {}

    def adopt(self, state: dict[str, dict]) -> list[str]:
        """Begin with parts of another run (training/start.py), as its file has them; returns what begins fresh.

        Raises UsageError for a state of another architecture.
        """
        return adopt_parts(self.checkpoint_parts(), state, self.evaluation_backbone())

    def evaluation_backbone(self) -> nn.Module:
        """The network that evaluations look at: the teacher's backbone, or the student's where there is no EMA."""
        raise NotImplementedError


def clip_per_tensor_(grads: list[torch.Tensor], clip: float) -> torch.Tensor:
    """Scale every gradient by min(1, clip / (norm + 1e-6)), in place; 0 leaves them. Returns the norms (tensors,).

    parity: each tensor on its own, not the global norm (DINO utils.clip_gradients). No norm is read on the host.
    """
    norms = torch.stack(torch._foreach_norm(grads))
    if clip:
        factors = (clip / (norms + 1e-6)).clamp(max=1.0)
        if norms.device.type == "cpu":  # reading is free here, and most tensors are not clipped
            large = [i for i, factor in enumerate(factors.tolist()) if factor < 1.0]
            grads, factors = [grads[i] for i in large], factors[large]
        if grads:
            torch._foreach_mul_(grads, list(factors.to(grads[0].dtype).unbind()))
    return norms


@torch.no_grad()
def ema_update_(
    teacher: Iterable[torch.Tensor], student: Iterable[torch.Tensor], momentum: float, gate: torch.Tensor | None
) -> None:
    """teacher <- momentum * teacher + (1 - momentum) * student, all tensors at once; a gate of 0 changes nothing."""
    teacher, student = list(teacher), [tensor.detach() for tensor in student]
    if gate is None:
        torch._foreach_lerp_(teacher, student, 1.0 - momentum)
    else:
        moves = torch._foreach_sub(student, teacher)
        torch._foreach_mul_(moves, (1.0 - momentum) * gate)
        torch._foreach_add_(teacher, moves)


def backbone_arguments(args: argparse.Namespace) -> dict:
    """What ``build_backbone`` has to be told, besides the architecture, for student and teacher alike."""
    return family_of(args.arch).arguments(vars(args))
