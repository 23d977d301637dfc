"""Optimisers, and how a step is taken or skipped without asking the device."""

import torch

from methods.base import Clock
from utils import UsageError

# what each remembers of a parameter, under torch's names or those of DINO's LARS
MOMENTS = {"adamw": {"step", "exp_avg", "exp_avg_sq"}, "sgd": {"momentum_buffer"}, "lars": {"mu"}}
OPTIMIZERS = tuple(MOMENTS)


def build_optimizer(name: str, groups: list[dict]) -> torch.optim.Optimizer:
    """``groups`` from ``Method.param_groups``; learning rate and weight decay follow from ``set_schedules``."""
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), eps=1e-8, fused=True)
    if name == "sgd":
        optimizer = torch.optim.SGD(groups, lr=0.0, momentum=0.9, fused=True)
        complete_moments(optimizer)
        return optimizer
    if name == "lars":
        return LARS(groups)
    raise UsageError(f"--optimizer {name}: choose one of {', '.join(OPTIMIZERS)}")


def complete_moments(optimizer: torch.optim.Optimizer) -> None:
    """Give SGD the momentum it lacks, zeros, from which a first step is torch's first step.

    The fused kernel wants it for all or for none, and a layer that rested in the first epochs has its first step later.
    """
    if isinstance(optimizer, torch.optim.SGD):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if optimizer.state[parameter].get("momentum_buffer") is None:
                    optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def set_schedules(optimizer: torch.optim.Optimizer, clock: Clock) -> None:
    """This iteration's learning rate and weight decay, times every group's own multipliers."""
    for group in optimizer.param_groups:
        group["lr"] = clock.lr * group.get("lr_multiplier", 1.0)
        group["weight_decay"] = clock.weight_decay * group.get("wd_multiplier", 1.0)


def optimizer_step(
    optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None, gate: torch.Tensor | None
) -> None:
    """Take the step; a ``gate`` of 0 on the device makes it change nothing, optimiser state included.

    So does, with a scaler (fp16), a gradient that overflows; either lowers the scale of the loss.
    """
    if scaler is not None:
        if gate is not None:
            overflow(optimizer, scaler).clamp_(min=1.0 - gate)
        scaler.step(optimizer)
        scaler.update()
        return
    optimizer.found_inf = None if gate is None else 1.0 - gate  # read by the fused kernels, and by LARS
    optimizer.step()


def overflow(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> torch.Tensor:
    """1 where a gradient that the scaler has unscaled is not finite, else 0: the number itself that skips the step."""
    (found,) = scaler._found_inf_per_device(optimizer).values()  # the public ways to it wait for the device
    return found


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You et al., 1708.03888) as DINO uses it.

    Weight decay and trust ratio apply to tensors of more than one dimension; the ratio is 1 where a norm is 0.
    """

    _step_supports_amp_scaling = True  # a scaler leaves ``found_inf`` here instead of waiting for it

    def __init__(self, params, lr: float = 0.0, weight_decay: float = 0.0, momentum: float = 0.9, eta: float = 0.001):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "eta": eta})

    @torch.no_grad()
    def step(self) -> None:
        found_inf = getattr(self, "found_inf", None)
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._update(params, group, None if found_inf is None else 1.0 - found_inf)

    def _update(self, params: list[torch.Tensor], group: dict, gate: torch.Tensor | None) -> None:
        updates = [p.grad if gate is None else torch.where(gate > 0, p.grad, 0.0) for p in params]
        scaled = [i for i, p in enumerate(params) if p.ndim != 1]
        if scaled:
            weights = [params[i] for i in scaled]
            decayed = torch._foreach_add([updates[i] for i in scaled], weights, alpha=group["weight_decay"])
            ratios = [
                torch.where((p > 0) & (u > 0), group["eta"] * p / u, 1.0)
                for p, u in zip(torch._foreach_norm(weights), torch._foreach_norm(decayed), strict=True)
            ]
            for i, update in zip(scaled, torch._foreach_mul(decayed, ratios), strict=True):
                updates[i] = update
        buffers = [self.state[p].setdefault("mu", torch.zeros_like(p)) for p in params]
        if gate is None:
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, updates)
            torch._foreach_add_(params, buffers, alpha=-group["lr"])
        else:
            torch._foreach_mul_(buffers, 1.0 - gate * (1.0 - group["momentum"]))
            torch._foreach_add_(buffers, torch._foreach_mul(updates, gate))
            torch._foreach_add_(params, torch._foreach_mul(buffers, -group["lr"] * gate))
