"""Batch norm over all processes, one form for every device: no process asks another one, or its device, for a number.

torch's SyncBatchNorm waits for the GPU in every layer (it counts who had rows), and does not run on processors.
"""

import contextlib
from collections.abc import Iterator

import torch
import torch.nn as nn
from torch.nn.modules.batchnorm import _BatchNorm

from utils import all_gather_rows, all_reduce_sum, world_size


def synchronise_batch_norm(module: nn.Module) -> nn.Module:
    """Replace every batch norm below ``module`` by one that sees the batches of all processes; names stay.

    A norm that stands in several places stays one; torch's own conversion forgets all places but the first.
    """
    if world_size() == 1:
        return module
    made: dict[nn.Module, nn.Module] = {}
    for parent in list(module.modules()):
        for name, child in parent._modules.items():
            if isinstance(child, _BatchNorm):
                made[child] = made.get(child) or BatchNormOverProcesses(child)
                parent._modules[name] = made[child]
    return module


def batch_norm_of_the_batch(module: nn.Module) -> str | None:
    """Name of the first batch norm below ``module`` that takes its statistics from the batch; None without any."""
    norms = ((name, child) for name, child in module.named_modules() if isinstance(child, _BatchNorm))
    return next((name for name, child in norms if child.training or child.running_mean is None), None)


@contextlib.contextmanager
def statistics_as_they_are(module: nn.Module) -> Iterator[None]:
    """No batch norm below ``module`` counts what it sees: a batch that is computed again was counted before."""
    norms = [norm for norm in module.modules() if isinstance(norm, _BatchNorm) and norm.track_running_stats]
    before = [(norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0  # without running averages autograd would save fewer tensors than the first time
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(count)


def recomputing(module: nn.Module) -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
    """Contexts of the two passes through ``module`` of torch's activation checkpointing."""
    return contextlib.nullcontext(), statistics_as_they_are(module)


class BatchNormOverProcesses(_BatchNorm):
    """The batch norm it is made from (parameters and buffers are shared), with statistics of all processes."""

    def __init__(self, original: _BatchNorm):
        super().__init__(
            original.num_features, original.eps, original.momentum, original.affine, original.track_running_stats
        )
        self.__dict__.update(original.__dict__)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._then(self._normalised(x))

    def _then(self, y: torch.Tensor) -> torch.Tensor:
        """What some networks of timm have their batch norms do besides."""
        for part in ("drop", "act"):
            y = self._modules[part](y) if part in self._modules else y
        return y

    def _normalised(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(x)
        y, mean, var, count = _Normalise.apply(x, self.weight, self.bias, self.eps)
        if self.track_running_stats:
            with torch.no_grad():
                self.num_batches_tracked += 1
                unbiased = var * (count / (count - 1).clamp(min=1.0))
                self.running_mean.lerp_(mean.to(self.running_mean), self.momentum)
                self.running_var.lerp_(unbiased.to(self.running_var), self.momentum)
        return y

    def _check_input_dim(self, x: torch.Tensor) -> None:
        pass


class _Normalise(torch.autograd.Function):
    """(rows, channels, ...) -> the same shape, and mean, variance (channels,) and number of rows of all processes.

    y = n w + b with n = (x - mean) / sqrt(var + eps). Of g, the gradient of y, with means over all processes:
    dx = w (g - mean(g) - n mean(g n)) / sqrt(var + eps). Kept for it is x alone. Computed in float32 or better.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        wide, axes, shape = _layout(x)
        var, mean = torch.var_mean(wide, axes, correction=0)
        rows = torch.full_like(mean[:1], x.numel() // x.shape[1])
        seen = all_gather_rows(torch.cat((rows, mean, var))[None])
        rows, means, variances = seen.split([1, len(mean), len(mean)], dim=1)
        count = rows.sum()
        there = rows > 0  # a process without rows has no mean
        mean = torch.where(there, rows * means, 0.0).sum(dim=0) / count
        var = torch.where(there, rows * (variances + (means - mean).square()), 0.0).sum(dim=0) / count
        scale = (var + eps).rsqrt()
        ctx.save_for_backward(x, weight, mean, scale, count)
        y = (wide - mean.view(shape)) * scale.view(shape)
        if weight is not None:
            y = torch.addcmul(bias.to(y.dtype).view(shape), y, weight.to(y.dtype).view(shape))
        ctx.mark_non_differentiable(mean, var, count)
        return y.to(x.dtype), mean, var, count

    @staticmethod
    def backward(ctx, gradient, *_):
        x, weight, mean, scale, count = ctx.saved_tensors
        wide, axes, shape = _layout(x)
        g = gradient.to(wide.dtype)
        normalised = (wide - mean.view(shape)) * scale.view(shape)
        grad_bias, grad_weight = g.sum(axes), (g * normalised).sum(axes)
        mean_g, mean_gn = (all_reduce_sum(torch.cat((grad_bias, grad_weight))) / count).chunk(2)
        factor = scale if weight is None else scale * weight.to(scale.dtype)
        grad_x = (g - mean_g.view(shape) - normalised * mean_gn.view(shape)) * factor.view(shape)
        if weight is None:
            return grad_x.to(x.dtype), None, None, None
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), grad_bias.to(weight.dtype), None


def _layout(x: torch.Tensor) -> tuple[torch.Tensor, list[int], list[int]]:
    """``x`` in float32 or better, the axes that are averaged, and the shape of what every channel has."""
    wide = x if x.dtype == torch.float64 else x.float()
    return wide, [axis for axis in range(x.ndim) if axis != 1], [1, -1] + [1] * (x.ndim - 2)
