"""Linear classifiers on frozen features: many side by side, on one pass through the network.

Heads on the same feature are one weight tensor (heads, classes, dim) and one matrix product. The gradient of a mean
cross-entropy with respect to logits is (softmax - one-hot) / images, so nothing has to be recorded for a backward pass;
heads share no parameter, so the gradient of the sum of their losses is each one's own, and each takes the steps that it
would take alone. Several processes add up their gradients, those of all heads in one message.
"""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import torch

from models.layouts.names import unwrapped
from models.safe_load import CheckpointError
from randomness import counted_seed
from utils import all_reduce_sum

MOMENTUM, ETA = 0.9, 0.001  # of both optimisers; LARS: the trust ratio is ETA * norm of weights / norm of update
OPTIMIZERS = ("sgd", "lars")

# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


class Recipe(NamedTuple):
    """How a head is trained: ``lr`` at the first epoch, whatever batch and processes; ``optimizer``: sgd or lars."""

    lr: float
    weight_decay: float = 0.0
    optimizer: str = "sgd"


def cosine_factor(epoch: int, epochs: int) -> float:
    """What learning rates are multiplied by in an epoch: half a cosine from 1 to 0, one value per epoch."""
    return (1 + math.cos(math.pi * epoch / epochs)) / 2


def rate_at(lr: float | torch.Tensor, factor: float, floor: float = 0.0) -> float | torch.Tensor:
    """A learning rate on its way from ``lr`` to ``floor``, which is above it in some published recipes."""
    return floor + (lr - floor) * factor if floor else lr * factor


def initial_heads(heads: int, classes: int, dim: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (heads, classes, dim) from N(0, 0.01^2) and biases (heads, classes) of 0, float32.

    All heads begin alike, so that none depends on which others are trained beside it.
    """
    generator = torch.Generator().manual_seed(counted_seed(seed, classes, dim))
    weight = torch.randn(classes, dim, generator=generator) * 0.01
    return weight.repeat(heads, 1, 1), torch.zeros(heads, classes)


class LinearHeads:
    """Heads on one feature: ``weight`` (heads, classes, dim), ``bias`` (heads, classes), and a recipe for each.

    ``floor``: the learning rate where the schedule has fallen to 0, whatever a recipe's own.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor,
        recipes: Sequence[Recipe],
        momentum: float = MOMENTUM,
        floor: float = 0.0,
    ):
        if not len(weight) == len(bias) == len(recipes):
            raise ValueError(f"{len(weight)} weights, {len(bias)} biases and {len(recipes)} recipes")
        self.weight, self.bias, self.recipes = weight, bias, list(recipes)
        self.momentum, self.floor = momentum, floor
        self.momenta = torch.zeros_like(weight), torch.zeros_like(bias)
        columns = [(r.lr, r.weight_decay, r.optimizer == "lars") for r in recipes]
        self._lr, self._decay, self._lars = torch.tensor(columns, dtype=torch.float64).to(weight).T
        self._decays, self._has_lars = any(r.weight_decay for r in recipes), any(r.optimizer == "lars" for r in recipes)

    def __len__(self) -> int:
        return len(self.recipes)

    @property
    def parameters(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.weight, self.bias

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """(batch, dim) -> (batch, heads, classes)."""
        logits = torch.addmm(self.bias.flatten(), features, self.weight.flatten(0, 1).T)
        return logits.view(-1, *self.bias.shape)

    def loss_and_gradients(
        self, features: torch.Tensor, labels: torch.Tensor, images: int, gradients: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """Cross-entropies (heads,) of a share of a batch: their sum over the share, divided by the batch's ``images``.

        Features (share, dim), labels (share,); the share may be empty. Writes the gradients of weight and bias.
        """
        logits = self.logits(features)
        index = labels[:, None, None].expand(-1, len(self), 1)
        normaliser = logits.logsumexp(dim=2, keepdim=True)
        losses = (normaliser - logits.gather(2, index)).sum(dim=(0, 2)) / images
        errors = logits.sub_(normaliser).exp_()  # softmax; less one-hot it is the gradient
        errors.scatter_add_(2, index, torch.full_like(errors[..., :1], -1.0)).div_(images)
        weight_gradient, bias_gradient = gradients
        torch.mm(errors.flatten(1).T, features, out=weight_gradient.flatten(0, 1))
        torch.sum(errors, dim=0, out=bias_gradient)
        return losses

    def step(self, gradients: Sequence[torch.Tensor], factor: float) -> None:
        """One step ``factor`` of the way from the floor to the recipes' learning rates; the gradients are used up.

        As torch's SGD and DINO's LARS: of the latter, decay and trust ratio concern the weights only, not the biases.
        """
        for parameter, momentum, update in zip(self.parameters, self.momenta, gradients, strict=True):
            is_weight = parameter is self.weight
            shape = (-1,) + (1,) * (parameter.ndim - 1)
            if self._decays:
                decay = self._decay if is_weight else self._decay * (1 - self._lars)
                update.addcmul_(parameter, decay.view(shape))
            if self._has_lars and is_weight:
                update.mul_(torch.where(self._lars > 0, trust_ratio(parameter, update), 1.0).view(shape))
            momentum.mul_(self.momentum).add_(update)
            if self.floor:
                parameter.addcmul_(momentum, rate_at(self._lr, factor, self.floor).view(shape), value=-1)
            else:
                parameter.addcmul_(momentum, self._lr.view(shape), value=-factor)

    def test(self, features: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(3, heads) float64, summed over images: cross-entropy, true class first, and among the first five; and
        for which images it is first (heads, images).
        """
        logits = self.logits(features)
        index = labels[:, None, None].expand(-1, len(self), 1)
        losses = logits.logsumexp(dim=2) - logits.gather(2, index)[..., 0]
        hits = logits.topk(min(5, logits.shape[2]), dim=2).indices == index
        sums = torch.stack((losses.double().sum(0), hits[..., 0].double().sum(0), hits.any(2).double().sum(0)))
        return sums, hits[..., 0].T


def trust_ratio(weights: torch.Tensor, updates: torch.Tensor) -> torch.Tensor:
    """LARS: ETA * |weights| / |update| of every head, 1 where one of them is 0; (heads,)."""
    weights, updates = weights.flatten(1).norm(dim=1), updates.flatten(1).norm(dim=1)
    return torch.where((weights > 0) & (updates > 0), ETA * weights / updates, 1.0)


class Probe:
    """Heads on several features, in one order: all heads of the first feature, then those of the second, ..."""

    def __init__(self, groups: Sequence[LinearHeads]):
        self.groups = list(groups)
        shapes = [parameter.shape for group in groups for parameter in group.parameters]
        self._gradients = groups[0].weight.new_empty(sum(shape.numel() for shape in shapes))
        parts = self._gradients.split([shape.numel() for shape in shapes])
        parts = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
        self._parts = list(zip(parts[::2], parts[1::2], strict=True))  # of weight and bias of every group

    def __len__(self) -> int:
        return sum(map(len, self.groups))

    @property
    def recipes(self) -> list[Recipe]:
        return [recipe for group in self.groups for recipe in group.recipes]

    @property
    def floor(self) -> float:
        return self.groups[0].floor

    def train_step(
        self, features: Sequence[torch.Tensor], labels: torch.Tensor, images: int, factor: float
    ) -> torch.Tensor:
        """A step of all heads on a batch of ``images``, of which this process has a share (perhaps an empty one).

        Features of every group (share, its dim), labels (share,). Returns the share's part of the losses (heads,):
        summed over processes they are the means over the batch.
        """
        triples = list(zip(self.groups, features, self._parts, strict=True))
        losses = torch.cat([group.loss_and_gradients(x, labels, images, part) for group, x, part in triples])
        all_reduce_sum(self._gradients)
        for group, _, part in triples:
            group.step(part, factor)
        return losses

    def test(self, features: Sequence[torch.Tensor], labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``LinearHeads.test`` of all heads: (3, heads), (heads, images)."""
        found = [group.test(x, labels) for group, x in zip(self.groups, features, strict=True)]
        return torch.cat([sums for sums, _ in found], dim=1), torch.cat([hits for _, hits in found])

    def tensors(self) -> list[tuple[torch.Tensor, ...]]:
        """Weight, bias, and the momentum of each, of every head: views of what is trained."""
        columns = [(*group.parameters, *group.momenta) for group in self.groups]
        return [tuple(tensor[i] for tensor in column) for column in columns for i in range(len(column[0]))]


def best_head(accuracies: Sequence[float]) -> int:
    """The last of the heads with the highest accuracy (iBOT eval_linear_multi.py)."""
    return max(range(len(accuracies)), key=lambda head: (accuracies[head], head))


# ---------------------------------------------------------------------------------------------------------------------
# Files, as DINO, iBOT and AttMask lay them out
# ---------------------------------------------------------------------------------------------------------------------

HEAD_NAME = re.compile(r"(?:(?P<head>\d+)\.)?linear\.(?P<part>weight|bias)")


def saved_heads(probe: Probe, epoch: int, epochs: int) -> dict:
    """``epoch`` is how many are done. One head: state_dict, optimizer, scheduler; several: optimizers, schedulers.

    Parameters are called ``module.linear.weight``, of head i of several ``<i>.module.linear.weight``.
    """
    heads = [tuple(tensor.cpu() for tensor in tensors) for tensors in probe.tensors()]
    several, state = len(heads) > 1, {}
    for number, (weight, bias, *_) in enumerate(heads):
        prefix = f"{number}." if several else ""
        state |= {f"{prefix}module.linear.weight": weight, f"{prefix}module.linear.bias": bias}
    floor = probe.floor or 0
    rates = [rate_at(recipe.lr, cosine_factor(epoch, epochs), floor) for recipe in probe.recipes]
    parts = list(zip(probe.recipes, rates, heads, strict=True))
    optimizers = [_optimizer(recipe, rate, tensors[2:]) for recipe, rate, tensors in parts]
    schedulers = [
        {"T_max": epochs, "eta_min": floor, "base_lrs": [recipe.lr], "last_epoch": epoch, "_last_lr": [rate]}
        for recipe, rate, _ in parts
    ]
    if several:
        return {"epoch": epoch, "state_dict": state, "optimizers": optimizers, "schedulers": schedulers}
    return {"epoch": epoch, "state_dict": state, "optimizer": optimizers[0], "scheduler": schedulers[0]}


def _optimizer(recipe: Recipe, rate: float, momenta: Sequence[torch.Tensor]) -> dict:
    """The state dict of torch's SGD, or of DINO's LARS, over weight and bias."""
    name = {"sgd": "momentum_buffer", "lars": "mu"}[recipe.optimizer]
    group = {"lr": rate, "initial_lr": recipe.lr, "momentum": MOMENTUM}
    group |= {"weight_decay": recipe.weight_decay, "params": [0, 1]}
    group |= {"dampening": 0, "nesterov": False} if recipe.optimizer == "sgd" else {"eta": ETA}
    return {"state": {i: {name: momentum} for i, momentum in enumerate(momenta)}, "param_groups": [group]}


def heads_of(file: dict) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Weight (classes, dim) and bias (classes,) of every head in a file of ours or of the originals, in their order.

    A backbone may stand beside a head, as iBOT and AttMask combine them. [] when the file holds no head.
    """
    state = file.get("state_dict", file)
    found: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in state.items() if isinstance(state, dict) else ():
        if isinstance(name, str) and (match := HEAD_NAME.fullmatch(unwrapped(name))):
            found.setdefault(int(match["head"] or 0), {})[match["part"]] = tensor
    return [(found[head]["weight"], found[head]["bias"]) for head in sorted(found) if len(found[head]) == 2]


def restore_heads(probe: Probe, file: dict, path: object) -> int:
    """Fill ``probe`` with parameters and momenta of ``file``; the number of epochs it has behind it.

    Momenta that the file does not hold stay 0. Raises CheckpointError when heads or shapes are others.
    """
    heads = heads_of(file)
    shapes = [tuple(weight.shape) for weight, _ in heads]
    wanted = [tuple(weight.shape) for weight, *_ in probe.tensors()]
    if shapes != wanted:
        raise CheckpointError(f"{path}: holds heads of shape {_counted(shapes)}, these are {_counted(wanted)}")
    optimizers = file.get("optimizers") or [file.get("optimizer", {})] * len(probe)
    for tensors, parameters, optimizer in zip(probe.tensors(), heads, optimizers, strict=True):
        state = optimizer.get("state", {})
        saved = [[v for v in state.get(i, {}).values() if isinstance(v, torch.Tensor)] for i in range(2)]
        momenta = [values[0] if values else torch.zeros(()) for values in saved]
        for tensor, value in zip(tensors, (*parameters, *momenta), strict=True):
            tensor.copy_(value)
    return file.get("epoch", 0)


def _counted(shapes: list[tuple]) -> str:
    return ", ".join(f"{shapes.count(shape)} x {shape}" for shape in dict.fromkeys(shapes)) or "none"
