"""A step of fine-tuning: mixed images and soft targets, the loss, the gradient, AdamW with a rate for every layer."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from randomness import counted_seed, counted_uniforms

_DROPOUT, _DROP_PATH = 0xD20, 0xD9A  # keep these draws apart


class Stepper:
    """AdamW over ``groups`` of models/finetuned.py: gradients are collected by ``backward`` and used by ``step``.

    ``fp16``: the loss is scaled so that small gradients survive, and a step whose gradient overflows is left out.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: list[dict],
        betas: Sequence[float] | None = None,
        eps: float = 1e-8,
        clip_grad: float | None = None,
        fp16: bool = False,
    ):
        groups = [{name: value for name, value in group.items() if name != "names"} for group in groups]
        betas = (0.9, 0.999) if betas is None else tuple(betas)
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps, fused=True)
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.scaler = torch.amp.GradScaler(self.parameters[0].device.type) if fp16 else None
        self.clip_grad = clip_grad

    def backward(self, loss: torch.Tensor) -> None:
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def step(self, lr: float, weight_decay: float) -> torch.Tensor:
        """One step with these values of the schedules; the norm of the gradient before it was clipped."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
            group["weight_decay"] = weight_decay if group["decays"] else 0.0
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        if self.clip_grad:
            torch._foreach_mul_(gradients, (self.clip_grad / (norm + 1e-6)).clamp(max=1.0))
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return norm


def weight_average(model: nn.Module, decay: float, device: str | None = None) -> nn.Module:
    """timm's average of ``model``'s weights and buffers (``module``), moved on by ``update(model)`` after a step."""
    from timm.utils import ModelEmaV3

    return ModelEmaV3(model, decay=decay, device=device)


def soft_cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy with a distribution per image; the mean over images."""
    return -(targets * F.log_softmax(logits.float() if logits.dtype != torch.float64 else logits, -1)).sum(-1).mean()


def smoothed(labels: torch.Tensor, classes: int, smoothing: float) -> torch.Tensor:
    """Targets (batch, classes): 1 - smoothing for the label, and smoothing shared among all classes."""
    return F.one_hot(labels, classes) * (1 - smoothing) + smoothing / classes


def seed_dropout(*key: int) -> None:
    """Dropout, the only thing that draws from torch's own generators, goes on from ``key``."""
    torch.manual_seed(counted_seed(*key, _DROPOUT))


def drop_path_draws(depth: int, batch: int, seed: int, iteration: int, first_sample: int) -> np.ndarray:
    """Uniform numbers (depth, 2, batch) for stochastic depth."""
    blocks, branches = np.arange(depth)[:, None, None], np.arange(2)[None, :, None]
    positions = first_sample + np.arange(batch)[None, None]
    return counted_uniforms(seed, iteration, blocks, branches, positions, _DROP_PATH)
