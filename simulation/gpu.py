"""A GPU that does not exist: tensors with shapes, types, devices and bytes, but without values.

Torch's FakeTensorMode computes what every operation would return but for the numbers; here it is made to do so for a
CUDA device on a machine without a driver. A host that asks for a value of such a tensor gets an error, two devices in
one operation too. Everything that depends on names inside torch is in this file.

Older torch asks the driver for a stream wherever a gradient will flow, in C++, and ends the process where there is
none: ``obstacle`` tells before that.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from simulation.backward import SavedTensors, backward_in_python
from simulation.watch import IdSet, Watch, on_device

aten = torch.ops.aten
DEVICE = torch.device("cuda", 0)
DRIVERLESS = (2, 14)  # the oldest torch that was seen to do without a driver; 2.6 and 2.9 were seen not to


def obstacle() -> str:
    """Why nothing can be simulated here; '' where it can."""
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version >= DRIVERLESS or torch.cuda.device_count():
        return ""
    return f"torch {torch.__version__} cannot without a GPU's driver, torch {DRIVERLESS[0]}.{DRIVERLESS[1]} can"


@dataclass
class GPU:
    """What there is while ``fake_gpu`` lasts."""

    watch: Watch
    saved: SavedTensors | None = None
    buckets: dict[int, torch.Tensor] = field(default_factory=dict)  # id of a parameter -> where its gradient lies

    def keep_gradients_in_buckets(self, module: nn.Module) -> int:
        """As DistributedDataParallel keeps them: made once, exchanged in place. Returns their bytes."""
        with self.watch.holding("gradients"):
            self.buckets = {id(p): torch.empty_like(p) for p in module.parameters() if p.requires_grad}
        return sum(bucket.numel() * bucket.element_size() for bucket in self.buckets.values())

    def keep_gradient(self, parameter: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        if id(parameter) in self.buckets:
            return self.buckets[id(parameter)].detach().copy_(gradient)
        self.watch.book(gradient, "gradients")
        return gradient

    def pin(self, value: object) -> None:
        """Tensors of the host, wherever in ``value``, as if a loader had pinned them."""
        for tensor in tree_leaves(value):
            if isinstance(tensor, torch.Tensor):
                self.watch.pinned.add(tensor)

    @staticmethod
    def build(make: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
        """What ``make`` makes of numbers on the host, as a module without numbers on the device."""
        with unset_fake_temporarily():
            real = make()
        return onto_device(real, dtype)


@contextlib.contextmanager
def fake_gpu(devices: int = 1, bf16: bool = True) -> Iterator[GPU]:
    """Within, ``cuda`` is a device that computes nothing, and everything asked of it is seen by ``GPU.watch``."""
    pinned = IdSet()
    watch = Watch(pinned)
    with contextlib.ExitStack() as stack:
        for name, stand_in in _stand_ins(watch, devices, bf16).items():
            stack.enter_context(mock.patch(name, stand_in))
        stack.enter_context(_Answers(pinned))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(_WithoutFakes())
        stack.enter_context(watch)
        gpu = GPU(watch)
        gpu.saved = stack.enter_context(backward_in_python(gpu.keep_gradient))
        yield gpu


def onto_device(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of ``module`` with fakes on the device instead of its tensors, wherever they are referred to."""
    tensors = {id(p): nn.Parameter(_fake(p, dtype), p.requires_grad) for p in module.parameters()}
    tensors |= {id(b): _fake(b, dtype) for b in module.buffers()}
    return copy.deepcopy(module, tensors)


def _fake(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    kind = dtype if tensor.is_floating_point() else tensor.dtype
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=kind, device=DEVICE)


# ---------------------------------------------------------------------------------------------------------------------
# Names inside torch
# ---------------------------------------------------------------------------------------------------------------------


def _stand_ins(watch: Watch, devices: int, bf16: bool) -> dict[str, object]:
    """What asks the driver, and what answers instead."""
    return {
        "torch.cuda.amp.common.amp_definitely_not_available": lambda: False,  # a GradScaler asks
        "torch.cuda.is_bf16_supported": lambda including_emulation=True: bf16,
        "torch.cuda.device_count": lambda: devices,
        "torch.cuda.set_device": lambda device: None,
        "torch.cuda.max_memory_allocated": lambda device=None: 0,
        "torch.cuda.Event": _event(watch),
        "torch.cuda.Stream": _Stream,
        "torch.cuda.current_stream": lambda device=None: _Stream(),
        "torch.cuda.stream": lambda stream: stream,
        "torch.Tensor.record_stream": lambda tensor, stream: None,
        "torch.nn.functional.scaled_dot_product_attention": _attention,
        "torch._subclasses.fake_tensor.FakeTensor.tolist": _tolist(watch),
        "torch.nn.Module._apply": _apply,
    }


def _apply(module: nn.Module, function: Callable, recurse: bool = True) -> nn.Module:
    """``Module.to`` and its like; torch's swaps what it replaces, which fakes that are looked at do not allow."""
    for child in module.children() if recurse else ():
        child._apply(function)
    for tensors in (module._parameters, module._buffers):
        for name, tensor in tensors.items():
            made = None if tensor is None else function(tensor.detach())
            if made is not None and (made.dtype, made.device) != (tensor.dtype, tensor.device):
                tensors[name] = nn.Parameter(made, tensor.requires_grad) if tensors is module._parameters else made
    return module


def _tolist(watch: Watch) -> Callable:
    """What arrived in pinned memory may be read: the host sees zeros, to its verdicts as good as "all is well"."""
    otherwise = FakeTensor.tolist

    def tolist(tensor: torch.Tensor) -> list:
        return np.zeros(tensor.shape).tolist() if tensor in watch.pinned else otherwise(tensor)

    return tolist


class _Stream:
    def __init__(self, *_: object, **__: object):
        pass

    def wait_stream(self, other: "_Stream") -> None:
        pass

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *_: object) -> None:
        pass


def _event(watch: Watch) -> type:
    class Event:
        """Waiting for it costs nothing once the device has gone on to another step: to another Record, that is."""

        def __init__(self, *_: object, **__: object):
            self.recorded = None

        def record(self, stream: object = None) -> None:
            self.recorded = watch.record

        def synchronize(self) -> None:
            if self.recorded is None:
                raise RuntimeError("an event is waited for that was never recorded")
            if self.recorded is watch.record:
                watch.wait("an event of this step")

    return Event


class _Answers(TorchFunctionMode):
    """Pinned memory needs a driver; here it is remembered which tensors would lie in it."""

    def __init__(self, pinned: IdSet):
        super().__init__()
        self.pinned = pinned

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        pin = kwargs.pop("pin_memory", False)
        if func == torch.Tensor.is_cuda.__get__:  # fakes say no, whatever their device
            return on_device(args[0])
        if func is torch.Tensor.pin_memory:
            out, pin = args[0].clone(), True
        else:
            out = func(*args, **kwargs)
        if pin and isinstance(out, torch.Tensor):
            self.pinned.add(out)
        return out


_sdpa = torch.nn.functional.scaled_dot_product_attention


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_mask: torch.Tensor | None = None, **options):
    """The kernel that a GPU would choose; torch chooses by the driver it finds, and finds none.

    ``options`` as networks of timm pass them: what drops or hides nothing changes no kernel, the rest goes to torch.
    """
    if not on_device(q) or q.dtype == torch.float64 or any(options.values()):
        return _sdpa(q, k, v, attn_mask=attn_mask, **options)
    if torch.is_autocast_enabled("cuda"):
        q, k, v = (x.to(torch.get_autocast_dtype("cuda")) for x in (q, k, v))
    bias = attn_mask
    if not q.dtype == k.dtype == v.dtype or (bias is not None and bias.dtype != q.dtype):
        raise RuntimeError(f"attention of {q.dtype}, {k.dtype}, {v.dtype}, {None if bias is None else bias.dtype}")
    if bias is None and q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] <= 256:
        return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False, False)[0]
    if bias is not None:  # the kernel wants rows whose length a multiple of 16 holds
        size = bias.shape[-1]
        padded = torch.nn.functional.pad(bias, (0, -size % 16))[..., :size]
        bias = padded.expand(*q.shape[:3], k.shape[2])
    backward = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    return aten._scaled_dot_product_efficient_attention(q, k, v, bias, backward)[0]


class _WithoutFakes(TorchDispatchMode):
    """What a kernel returns that torch has no fake of: the fused step of SGD, which changes its arguments."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return None if func is aten._fused_sgd_.default else func(*args, **(kwargs or {}))


@contextlib.contextmanager
def fake_world(size: int) -> Iterator[None]:
    """A group of ``size`` processes of which this is the first, and in which nothing is ever sent."""
    if size == 1:
        yield
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()
