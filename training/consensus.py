"""What all processes must agree on at every step, in one all-reduce of a few numbers.

A step whose loss or gradient is not finite on any process is taken by none; a request to stop, and a clock that says it
is time to save, reach all of them at the same step; unreadable images are counted over all. The device is never waited
for: on a GPU the verdict gates the step there (``agree`` returns the gate), and the host reads it one step later
(``verdict``), when it lies ready.
"""

import signal
from dataclasses import dataclass

import torch

from utils import all_reduce_sum


@dataclass(frozen=True)
class Verdict:
    """What the processes agreed on in one step; ``tag`` is whatever was handed to ``agree`` with it.

    ``overflowed``: a scaled gradient was too large for fp16, and the optimiser alone was left out.
    """

    skipped: bool
    stop: bool
    save: bool
    bad_images: int
    tag: object
    overflowed: bool = False


class Consensus:
    def __init__(self, device: torch.device):
        self._lags = device.type == "cuda"
        self._device = device
        self._waiting: list[tuple] = []
        self.stop_requested = False

    def listen(self) -> None:
        """Let SIGTERM and SIGUSR1 ask for a stop after the step."""
        for name in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(name, self._request_stop)

    def _request_stop(self, *_: object) -> None:
        self.stop_requested = True

    def agree(
        self,
        finite: torch.Tensor,
        bad_images: int,
        tag: object = None,
        save: bool = False,
        overflow: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        """``finite`` (0-dim bool, on the device): this process's view of its loss and gradients; ``overflow`` (0-dim, 0
        or 1, there too): what its scaler, if it has one, says of the gradients; ``save``: whether it finds that it is
        time to.

        Returns the gate, 0 or 1 as a float on the device; None when it is known here that the step is to be taken.
        """
        counts = torch.tensor([self.stop_requested, save, bad_images], dtype=torch.float32, pin_memory=self._lags)
        seen = [(~finite).float()] if overflow is None else [(~finite).float(), overflow]
        votes = torch.cat((counts.to(self._device, non_blocking=True), torch.stack(seen)))
        all_reduce_sum(votes)
        gate = (votes[len(counts)] == 0).float()
        if self._lags:
            host = torch.empty(votes.shape, pin_memory=True)
            host.copy_(votes, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
            self._waiting.append((host, arrived, tag))
            return gate
        self._waiting.append((votes, None, tag))
        return None if gate else gate

    def verdict(self, wait: bool = False) -> Verdict | None:
        """The verdict of this step on a CPU, of the step before on a GPU (of this one with ``wait``); None at first."""
        if len(self._waiting) < (2 if self._lags and not wait else 1):
            return None
        votes, arrived, tag = self._waiting.pop(0)
        if arrived is not None:
            arrived.synchronize()
        stop, save, bad_images, not_finite, *overflowed = votes.tolist()
        return Verdict(not_finite > 0, stop > 0, save > 0, int(bad_images), tag, any(overflowed))
