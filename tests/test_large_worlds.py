"""Processes by the thousand: a run is built and takes steps as one of them, in a group that never sends anything."""

import pytest
import torch
from torch.distributed.utils import _recursive_to

import main_pretrain
from data.device import to_device_ahead
from data.loader import TrainLoader
from methods import METHODS
from simulation.gpu import fake_world
from tests.fake_cuda import RECIPES, SMALL
from training.options import check_options, parse_options
from training.planner import Noise
from utils import World

CPU = torch.device("cpu")


def not_exchanged(_: object, bucket: torch.distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """A hook of DistributedDataParallel that leaves gradients as they are."""
    future = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


@pytest.mark.parametrize("size", [8, 1024])
@pytest.mark.parametrize("method", METHODS)
def test_one_of_many_processes_takes_steps_in_pieces(method, size, tmp_path):
    words = ["--method", method, *RECIPES[method], *SMALL[method], "--batch_size_per_gpu", "4", "--accum_iter", "2"]
    if method == "mugs":  # its queues have to hold a step's images
        words += ["--instance_queue_size", str(8 * size), "--local_group_queue_size", str(8 * size)]
    args = parse_options([*words, "--precision", "fp32", "--knn_every", "0", "--output_dir", str(tmp_path)])
    world = World(0, size, 0, CPU)
    with fake_world(size):
        check_options(args, world)
        run = main_pretrain.build(args, world, Noise(3 * 4 * size))
        assert (run.niter, run.global_batch) == (3, 4 * size)
        assert type(run.model).__name__ == "DistributedDataParallel"
        run.model.register_comm_hook(None, not_exchanged)
        run.monitor.world = World(1, size, 0, CPU)  # which writes nothing
        trained = [parameter for parameter in run.method.student.parameters() if parameter.requires_grad]
        before = [parameter.detach().clone() for parameter in trained]
        loader = TrainLoader(Noise(12), METHODS[method].views(args), batch_size=4, pieces=2, world=World(0, 1, 0, CPU),
                             seed=0, epochs=1, num_workers=0)  # fmt: skip
        pieces = [loader.piece(0, step, piece) for step in range(3) for piece in range(2)]
        main_pretrain.train_one_epoch(run, 1, to_device_ahead(pieces, CPU))
    assert not [old for old, new in zip(before, trained, strict=True) if torch.equal(old, new)]


def test_what_is_handed_to_a_gpu_by_its_wrapper_is_what_was_given():
    """DistributedDataParallel with device ids moves arguments: pieces and clocks have to come out as they are."""
    piece = {"crops": [torch.zeros(2, 3, 8, 8)], "indices": torch.arange(2), "first_sample": 4, "bad": [("a", "b")]}
    clock = main_pretrain.Clock(epoch=1, iteration=2, lr=0.1)
    ((moved, same),) = _recursive_to((piece, clock), CPU, False)
    assert same is clock and moved.keys() == piece.keys() and moved["bad"] == [("a", "b")]
