"""Autograd's backward pass in Python, for tensors on a GPU that does not exist: torch's own asks the driver for it.

Nodes run in the engine's order (whatever is ready, the latest first), gradients are cast and summed as it does, and
what a node had saved is released once it ran, so that memory is that of a real backward pass.
"""

import contextlib
import heapq
import math
from collections.abc import Callable, Iterator, Sequence
from unittest import mock

import torch

GradientHook = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (parameter, gradient) -> what it keeps


class SavedTensors:
    """What nodes keep for the backward pass: they hold a number, this holds the tensor until the node has run."""

    def __init__(self):
        self._kept: dict[int, torch.Tensor] = {}
        self._count, self._read = 0, []

    def pack(self, tensor: torch.Tensor) -> int:
        self._count += 1
        self._kept[self._count] = tensor.detach() if tensor.grad_fn is not None else tensor
        return self._count

    def unpack(self, number: int) -> torch.Tensor:
        self._read.append(number)
        return self._kept[number]

    def release_what_was_read(self) -> None:
        for number in self._read:
            self._kept.pop(number, None)
        self._read.clear()

    def clear(self) -> None:
        self._kept.clear()


@contextlib.contextmanager
def backward_in_python(on_gradient: GradientHook = lambda _, gradient: gradient) -> Iterator[SavedTensors]:
    """``loss.backward()`` runs here. ``on_gradient`` sees what becomes a parameter's gradient, and may replace it."""
    saved = SavedTensors()

    def backward(tensors, grad_tensors=None, *_, **__) -> None:
        roots = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
        gradients = [grad_tensors] if isinstance(grad_tensors, torch.Tensor) else list(grad_tensors or ())
        _Pass(saved, on_gradient).run(roots, gradients or [None] * len(roots))

    # checkpointed blocks ask which backward pass they are recomputed for
    one_pass = mock.patch("torch._C._current_graph_task_id", lambda: 1)
    hooks = torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack)
    with mock.patch("torch.autograd.backward", backward), one_pass, hooks:
        yield saved


class _Pass:
    """One backward pass."""

    def __init__(self, saved: SavedTensors, on_gradient: GradientHook):
        self.saved, self.on_gradient = saved, on_gradient
        self.waiting: dict = {}  # node -> gradients that are still to come
        self.arrived: dict = {}  # node -> {number of its output: gradient}
        self.ready: list = []
        self.pushed = 0

    def run(self, roots: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor | None]) -> None:
        self._count([root.grad_fn for root in roots])
        for root, gradient in zip(roots, gradients, strict=True):
            gradient = torch.ones_like(root) if gradient is None else gradient
            self.arrived.setdefault(root.grad_fn, {})[root.output_nr] = gradient
            if not self.waiting.get(root.grad_fn):
                self._push(root.grad_fn)
        with torch.no_grad():
            while self.ready:
                node = heapq.heappop(self.ready)[-1]
                arrived = self.arrived.pop(node, {})
                if type(node).__name__ == "AccumulateGrad":
                    self._accumulate(node, arrived)
                else:
                    self._hand_on(node, arrived)

    def _count(self, nodes: list) -> None:
        seen = set()
        while nodes:
            node = nodes.pop()
            if node in seen:
                continue
            seen.add(node)
            for following, _ in node.next_functions:
                if following is not None:
                    self.waiting[following] = self.waiting.get(following, 0) + 1
                    nodes.append(following)

    def _push(self, node) -> None:
        self.pushed += 1
        leaf = type(node).__name__ == "AccumulateGrad"
        heapq.heappush(self.ready, (-math.inf if leaf else -node._sequence_nr(), self.pushed, node))

    def _accumulate(self, node, arrived: dict) -> None:
        if 0 in arrived:
            variable, gradient = node.variable, arrived.pop(0)
            if variable.grad is None:
                variable.grad = self.on_gradient(variable, gradient)
            else:
                variable.grad.add_(gradient)

    def _hand_on(self, node, arrived: dict) -> None:
        outputs = [None] * len(node.next_functions)
        if arrived:
            outputs = self._call(node, [arrived.pop(i, None) for i in range(len(node._input_metadata))])
        self.saved.release_what_was_read()
        for position, (following, index) in enumerate(node.next_functions):
            if following is None:
                continue
            gradient = outputs[position] if position < len(outputs) else None
            if gradient is not None:
                outputs[position] = None
                gradient = _as_expected(gradient, following._input_metadata[index], type(node).__name__)
                there = self.arrived.setdefault(following, {})
                there[index] = gradient if there.get(index) is None else there[index] + gradient
                del gradient
            self.waiting[following] -= 1
            if not self.waiting[following]:
                self._push(following)

    @staticmethod
    def _call(node, inputs: list) -> list:
        if isinstance(node, torch.autograd.function.BackwardCFunction):  # a Function of ours wants no None
            pairs = zip(inputs, node._input_metadata, strict=True)
            inputs = [
                torch.zeros(meta.shape, dtype=meta.dtype, device=meta.device) if gradient is None else gradient
                for gradient, meta in pairs
            ]
            outputs = node.apply(*inputs)
        else:
            outputs = node(*inputs)
        return list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]


def _as_expected(gradient: torch.Tensor, expected, name: str) -> torch.Tensor:
    """The gradient in the shape and type of what it is the gradient of, as the engine hands it on."""
    if gradient.device != expected.device:
        raise RuntimeError(f"{name} gives a gradient on {gradient.device}, expected {expected.device}")
    if tuple(gradient.shape) != tuple(expected.shape):
        gradient = gradient.sum_to_size(tuple(expected.shape))
    return gradient if gradient.dtype == expected.dtype else gradient.to(expected.dtype)
