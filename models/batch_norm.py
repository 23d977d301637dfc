"""Batch norm over all processes: torch's on GPUs, our own where torch has none (processors, for tests)."""

import torch
import torch.nn as nn
from torch.nn.modules.batchnorm import _BatchNorm

from utils import all_reduce_sum, world_size


def synchronise_batch_norm(module: nn.Module, device: torch.device) -> nn.Module:
    """Replace every batch norm below ``module`` by one that sees the batches of all processes; names stay.

    A norm that stands in several places stays one; torch's own conversion forgets all places but the first.
    """
    if world_size() == 1 or not any(isinstance(child, _BatchNorm) for child in module.modules()):
        return module
    convert = nn.SyncBatchNorm.convert_sync_batchnorm if device.type == "cuda" else AllReduceBatchNorm
    made: dict[nn.Module, nn.Module] = {}
    for parent in list(module.modules()):
        for name, child in parent._modules.items():
            if isinstance(child, _BatchNorm):
                made[child] = made.get(child) or convert(child)
                parent._modules[name] = made[child]
    return module


def batch_norm_of_the_batch(module: nn.Module) -> str | None:
    """Name of the first batch norm below ``module`` that takes its statistics from the batch; None without any."""
    norms = ((name, child) for name, child in module.named_modules() if isinstance(child, _BatchNorm))
    return next((name for name, child in norms if child.training or child.running_mean is None), None)


class AllReduceBatchNorm(_BatchNorm):
    """The batch norm it is made from (parameters and buffers are shared), with statistics of all processes."""

    def __init__(self, original: _BatchNorm):
        super().__init__(
            original.num_features, original.eps, original.momentum, original.affine, original.track_running_stats
        )
        self.__dict__.update(original.__dict__)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(x)
        axes = [axis for axis in range(x.ndim) if axis != 1]
        shape = [1, -1] + [1] * (x.ndim - 2)
        count = all_reduce_sum(torch.tensor(float(x.numel() / x.shape[1]), dtype=torch.float64)).item()
        mean = _SumOverProcesses.apply(x.sum(axes)) / count
        centred = x - mean.view(shape)
        var = _SumOverProcesses.apply(centred.square().sum(axes)) / count
        if self.track_running_stats:
            with torch.no_grad():
                self.num_batches_tracked += 1
                self.running_mean.lerp_(mean.to(self.running_mean), self.momentum)
                self.running_var.lerp_((var * count / max(1.0, count - 1)).to(self.running_var), self.momentum)
        y = centred * (var + self.eps).rsqrt().view(shape)
        return y * self.weight.view(shape) + self.bias.view(shape) if self.affine else y

    def _check_input_dim(self, x: torch.Tensor) -> None:
        pass


class _SumOverProcesses(torch.autograd.Function):
    """Sum over processes, whose gradient is the sum of the gradients of all processes."""

    @staticmethod
    def forward(ctx, x):
        return all_reduce_sum(x.clone())

    @staticmethod
    def backward(ctx, grad):
        return all_reduce_sum(grad.clone())
