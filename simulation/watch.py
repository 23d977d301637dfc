"""What a step asks of a GPU: operations, copies, waits of the host, bytes that live, and who asked for them."""

import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

aten = torch.ops.aten
ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = ("simulation/", "tests/", ".venv/")  # what looks on is not what asked
ACTIVATIONS, LOSS = "activations", "heads and loss"
GRANULARITY = 512  # bytes: what the caching allocator rounds up to

# their results' sizes or values are known to the device alone, and the host asks for them
ASK_THE_DEVICE = {
    getattr(getattr(aten, name), overload)
    for name, overload in (
        ("_local_scalar_dense", "default"),
        ("nonzero", "default"),
        ("masked_select", "default"),
        ("_unique2", "default"),
        ("unique_dim", "default"),
        ("unique_consecutive", "default"),
        ("repeat_interleave", "Tensor"),
        ("bincount", "default"),
        ("equal", "default"),
    )
}
WANT_PRECISION = {  # what normalises or measures; torch's own attention and layer norms see to themselves
    aten.logsumexp.default,
    aten._log_softmax.default,
    aten._softmax.default,
    aten.special_entr.default,
    aten.linalg_vector_norm.default,
    aten._foreach_norm.Scalar,
    aten.var_mean.correction,
    aten._weight_norm_interface.default,
    aten.lerp_.Scalar,
    aten._foreach_lerp_.Scalar,
}
STATISTICS = ("methods/centring", "methods/distillation", "methods/standardise")  # where sums have to be accurate
SUMS = {aten.sum.dim_IntList, aten.sum.default, aten.mean.dim, aten.mean.default}
HALVES = (torch.float16, torch.bfloat16)
INDEXING = {
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
}


@dataclass
class Record:
    """What happened in a while."""

    operations: Counter = field(default_factory=Counter)  # name -> calls on the device
    waits: Counter = field(default_factory=Counter)  # (what, where) -> times the host waits for the device
    pageable: Counter = field(default_factory=Counter)  # where -> copies to the device that are no pinned ones
    pinned: Counter = field(default_factory=Counter)  # (direction, where) -> copies that nobody waits for
    collectives: Counter = field(default_factory=Counter)  # name -> bytes
    in_half: Counter = field(default_factory=Counter)  # (name, where) -> calls of what wants more than half precision
    flops: float = 0.0
    peak: int = 0  # bytes
    peak_parts: Counter = field(default_factory=Counter)  # what held them
    peak_where: str = ""


class Watch(TorchDispatchMode):
    """A dispatch mode that notes everything in ``record``; put another Record there to begin anew.

    Living bytes are booked by what holds them: ``holder`` at the time a storage is made (ACTIVATIONS if nobody said
    otherwise, or LOSS where a method asked for it), another one where ``book`` says so. ``pinned``: what is known to
    lie in pinned memory of the host.
    """

    def __init__(self, pinned: "IdSet"):
        super().__init__()
        self.record, self.pinned = Record(), pinned
        self.holder = ACTIVATIONS
        self.living: Counter = Counter()
        self._storages = WeakIdKeyDictionary(ref_type=weakref.ref)  # storage -> [holder, bytes]

    # ---- memory -----------------------------------------------------------------------------------------------------

    @contextmanager
    def holding(self, holder: str) -> Iterator[None]:
        """What is made meanwhile belongs to ``holder``."""
        before, self.holder = self.holder, holder
        try:
            yield
        finally:
            self.holder = before

    def book(self, tensor: torch.Tensor, holder: str) -> None:
        """The storage of ``tensor`` belongs to ``holder`` from now on."""
        if on_device(tensor):
            entry = self._enter(tensor)
            self.living[entry[0]] -= entry[1]
            self.living[holder] += entry[1]
            entry[0] = holder

    @property
    def bytes(self) -> int:
        return sum(self.living.values())

    def _enter(self, tensor: torch.Tensor) -> list:
        storage = tensor.untyped_storage()
        entry = self._storages.get(storage)
        if entry is None:
            in_method = self.holder == ACTIVATIONS and where_from().startswith("methods/")
            entry = [LOSS if in_method else self.holder, -(-storage.nbytes() // GRANULARITY) * GRANULARITY]
            self._storages[storage] = entry
            self.living[entry[0]] += entry[1]
            weakref.finalize(storage, self._gone, entry)
            if self.bytes > self.record.peak:
                self.record.peak, self.record.peak_where = self.bytes, where_from()
                self.record.peak_parts = Counter({name: size for name, size in self.living.items() if size})
        return entry

    def _gone(self, entry: list) -> None:
        self.living[entry[0]] -= entry[1]

    # ---- operations -------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        touches = any(map(on_device, leaves))
        if touches:
            self._look_for_waits(func, args, kwargs)
        out = func(*args, **kwargs)
        results = tree_leaves(out)
        for tensor in results:
            if on_device(tensor):
                touches = True
                self._enter(tensor)
        if func is aten._to_copy.default:
            self._note_copy(args[0], results[0], kwargs.get("non_blocking", False))
        if func.namespace == "c10d":
            self.record.collectives[func._schema.name.removeprefix("c10d::").rstrip("_")] += sum(
                x.numel() * x.element_size() for x in leaves if isinstance(x, torch.Tensor)
            )
        elif touches and func.namespace != "prim":
            self.record.operations[str(func)] += 1
            if self._loses_precision(func, args, leaves, results):
                self.record.in_half[str(func), where_from()] += 1
            if func.overloadpacket in flop_registry:
                self.record.flops += flop_registry[func.overloadpacket](*args, **kwargs, out_val=out)
        return out

    @staticmethod
    def _loses_precision(func, args: tuple, leaves: list, results: list) -> bool:
        if func in (aten._softmax.default, aten._log_softmax.default) and args[2]:  # half in, float32 out
            return False
        if func in SUMS:
            return any(map(is_half, results)) and where_from().startswith(STATISTICS)
        return func in WANT_PRECISION and any(map(is_half, leaves))

    def _look_for_waits(self, func, args: tuple, kwargs: dict) -> None:
        if func in ASK_THE_DEVICE:
            self.wait(func._schema.name.removeprefix("aten::"))
        elif func is aten.copy_.default:
            self._note_copy(args[1], args[0], kwargs.get("non_blocking", args[2] if len(args) > 2 else False))
        elif func in INDEXING:
            for index in args[1]:
                if isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8):
                    self.wait("a boolean index")
                elif isinstance(index, torch.Tensor) and not on_device(index):
                    self.wait("an index on the host")

    def _note_copy(self, source: torch.Tensor, target: torch.Tensor, non_blocking: bool) -> None:
        if on_device(source) == on_device(target):
            return
        direction = "to the host" if on_device(source) else "to the device"
        host = target if on_device(source) else source
        if host in self.pinned and non_blocking:
            self.record.pinned[direction, where_from()] += 1
        elif on_device(source):
            self.wait("a copy to the host")
        else:
            self.record.pageable[where_from()] += 1
            if not non_blocking:
                self.wait("a copy to the device")

    def wait(self, what: str) -> None:
        self.record.waits[what, where_from()] += 1


class IdSet:
    """Tensors, by identity, as long as they live."""

    def __init__(self):
        self._known = WeakIdKeyDictionary()

    def add(self, tensor: torch.Tensor) -> None:
        self._known[tensor] = True

    def __contains__(self, tensor: torch.Tensor) -> bool:
        return tensor in self._known


def on_device(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == "cuda"


def is_half(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype in HALVES


def where_from() -> str:
    """The innermost line of the product on the stack, as ``methods/dino.py:12``."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(f"{ROOT}/"):
            place = name[len(str(ROOT)) + 1 :]
            if not place.startswith(OUTSIDE):
                return f"{place}:{frame.f_lineno}"
        frame = frame.f_back
    return "autograd"
