"""The GPU that does not exist: what it refuses, what it sees, and what its bytes are."""

import pytest
import torch
import torch.nn as nn

from simulation.gpu import DEVICE, fake_gpu, obstacle
from simulation.watch import Record

MB = 2**20
pytestmark = pytest.mark.skipif(bool(obstacle()), reason=obstacle())


def test_two_devices_in_one_operation_are_refused():
    with fake_gpu(), pytest.raises(RuntimeError, match=r"[Dd]evice"):
        torch.ones(3, device=DEVICE) + torch.ones(3)


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: float(x.max()),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.cpu(),
        lambda x: x.to("cpu"),
        lambda x: bool((x > 0).all()),
        lambda x: x.repeat_interleave(x.long()),
        lambda x: torch.equal(x, x),
    ],
)
def test_a_host_that_reads_a_value_waits(read):
    with fake_gpu() as gpu:
        x = torch.ones(4, device=DEVICE)
        try:
            read(x)
        except Exception as error:  # torch has many names for "there is no value"
            assert "Data" in type(error).__name__ or "Dynamic" in type(error).__name__
        assert gpu.watch.record.waits


def test_copies_are_told_apart_by_the_memory_they_come_from():
    with fake_gpu() as gpu:
        torch.ones(4).to(DEVICE)
        torch.ones(4).to(DEVICE, non_blocking=True)
        torch.ones(4).pin_memory().to(DEVICE, non_blocking=True)
        torch.empty(4, pin_memory=True).copy_(torch.ones(4, device=DEVICE), non_blocking=True)
        record = gpu.watch.record
    assert sum(record.pageable.values()) == 2 and sum(record.waits.values()) == 1
    assert {direction for direction, _ in record.pinned} == {"to the device", "to the host"}


def test_an_event_costs_a_wait_in_its_own_step_only():
    with fake_gpu() as gpu:
        event = torch.cuda.Event()
        event.record()
        gpu.watch.record = Record()
        event.synchronize()
        assert not gpu.watch.record.waits
        event.record()
        event.synchronize()
        assert gpu.watch.record.waits
        with pytest.raises(RuntimeError, match="never recorded"):
            torch.cuda.Event().synchronize()


def test_bytes_are_booked_to_what_holds_them():
    """Weights, what the backward pass needs, gradients, moments: 1, then 2, 1 and 2 MB."""
    with fake_gpu() as gpu:
        with gpu.watch.holding("weights"):
            layer = gpu.build(lambda: nn.Linear(512, 512, bias=False), torch.float32)
            optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
        x = torch.ones(1024, 512, device=DEVICE)  # 2 MB
        loss = layer(x).square().mean()
        assert gpu.watch.living["weights"] == 1 * MB
        assert gpu.watch.living["activations"] == pytest.approx(4 * MB, abs=2048)
        loss.backward()
        assert gpu.watch.living["gradients"] == 1 * MB
        with gpu.watch.holding("optimiser"):
            optimizer.step()
        assert gpu.watch.living["optimiser"] == pytest.approx(2 * MB, abs=2048)
        assert gpu.watch.record.flops == 2 * 2 * 1024 * 512 * 512  # forward, and the gradient of the weight
        assert gpu.watch.record.peak >= 6 * MB
        del loss, x
        optimizer.zero_grad()
        assert gpu.watch.living["gradients"] == 0 and gpu.watch.living["activations"] < 4096
