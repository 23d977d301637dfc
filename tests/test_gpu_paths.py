"""Steps of every method on a GPU that does not exist: whoever mixes devices fails, whoever waits is seen."""

import pytest
import torch

from methods import METHODS
from models import cvt
from simulation.gpu import obstacle
from tests.fake_cuda import FULL, RECIPES, Steps, take_steps

pytestmark = pytest.mark.skipif(bool(obstacle()), reason=obstacle())

# the two copies that are read one step late: the verdict of all processes, and what the monitor shows
LATE = {"training/consensus.py", "training/monitor.py"}
# what torch.use_deterministic_algorithms says of CUDA, as far as a step could come upon it
NOT_DETERMINISTIC = (
    *("upsample_bicubic2d_backward", "upsample_bilinear2d_backward", "upsample_linear1d_backward", "grid_sampler"),
    *("_adaptive_avg_pool2d_backward", "avg_pool3d_backward", "max_pool3d_with_indices_backward", "reflection_pad"),
    *("nll_loss2d", "_embedding_bag", "put_", "histc", "kthvalue", "median", "scatter_reduce", "bincount"),
    *("_ctc_loss", "fractional_max_pool", "max_unpool2d", "cumsum"),
)
AT_ONCE = 5  # copies of what the host decides in a piece: samples that are dropped, hidden patches; not block by block
PRECISIONS = ("bf16", "fp16", "fp32")
# operations of a step at full size, bf16; a loop over parameters or samples adds hundreds
OPERATIONS = {"dino": 3130, "ibot": 3600, "attmask": 3600, "udi": 4000, "unic": 4430, "esvit": 10600, "mugs": 4300}


def check(steps: Steps) -> None:
    """What holds in every step, the first one included."""
    for record in (steps.first, steps.second):
        assert not record.waits
        assert not record.pageable
        assert not record.in_half
        to_host = {
            where.split(":")[0]: count for (direction, where), count in record.pinned.items() if "host" in direction
        }
        assert set(to_host) == LATE and set(to_host.values()) == {1}
        made = sum(n for (direction, where), n in record.pinned.items() if "device" in direction and "utils" in where)
        assert made <= AT_ONCE * steps.run.args.accum_iter or record is steps.first
        names = {name.removeprefix("aten.") for name in record.operations}
        assert not [name for name in names if name.startswith(NOT_DETERMINISTIC)]
    assert all(value.dtype == torch.float32 for value in steps.losses.values())
    buffers = dict(steps.run.method.named_buffers())
    assert all(value.dtype == torch.float32 for value in buffers.values() if value.is_floating_point())


@pytest.mark.parametrize("method", METHODS)
def test_a_step_of_full_size_waits_for_nothing(method):
    steps = take_steps(method, "--precision", "bf16", sizes=FULL)
    check(steps)
    operations = sum(steps.second.operations.values())
    assert operations == pytest.approx(OPERATIONS[method], rel=0.1)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("method", METHODS)
def test_a_step_in_every_precision_waits_for_nothing(method, precision):
    check(take_steps(method, "--precision", precision))


SIZES = ("--patch_size", "4", "--global_crops_size", "64", "--local_crops_size", "32")
SMALL_VIL = "_".join(f"l{n},h1,d8,n1,s{int(n < 3)},g1,p{2 + 2 * (n == 1)},f3,a0" for n in (1, 2, 3))
SWIN = ("--arch", "swin_tiny", *SIZES)
OPTIONS = {
    "pieces": ("dino", "--accum_iter", "2"),
    "pieces of masks": ("ibot", "--accum_iter", "2", "--precision", "fp16"),
    "pieces of places": ("udi", "--accum_iter", "2"),
    "recomputed blocks": ("ibot", "--grad_checkpointing"),
    "batch norm in the head": ("dino", "--use_bn_in_head", "true"),
    "stochastic depth": ("dino", "--drop_path_rate", "0.3", "--precision", "fp16"),
    "Swin": ("dino", *SWIN),
    "Swin, masks": ("ibot", *SWIN),
    "ResNet": ("dino", "--arch", "resnet18", "--optimizer", "lars", "--use_bn_in_head", "true"),
    "CvT": ("dino", "--arch", "cvt_tiny", *SIZES, "--drop_path_rate", "0.3", "--grad_checkpointing"),
    "Vision Longformer": ("dino", "--arch", "vil_2262", "--vil_arch", SMALL_VIL, *SIZES, "--drop_path_rate", "0.3"),
    "SGD": ("dino", "--optimizer", "sgd"),
    "one class token": ("udi", "--number_cls_token", "1"),
    "pieces for several teachers": ("unic", "--accum_iter", "2"),
    "images by the original's floats": ("unic", "--augment", "pil"),
    "a ladder that is recomputed": ("unic", "--grad_checkpointing"),
    "norms in the ladder": ("unic", "--lp_args", "{'hidden_dim': 9, 'prenorm': True, 'midnorm': True}"),
    "regions of a Swin": ("esvit", *SWIN),
    "mixed images": ("esvit", "--use_dense_prediction", "false", "--use_mixup", "true"),
    "pieces for queues and memories": ("mugs", "--accum_iter", "2"),
    "hints": ("attmask", "--pred_shape", "attmask_hint", "--show_max", "0.1"),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_no_option_makes_a_step_wait(options, monkeypatch):
    small = tuple(stage._replace(dim=8, num_heads=1, depth=1, window=3) for stage in cvt.TINY)
    monkeypatch.setattr(cvt, "TINY", small)
    check(take_steps(*options))


@pytest.mark.parametrize(
    "options",
    [
        ("dino", "--use_bn_in_head", "true"),
        ("ibot", "--norm_in_head", "syncbn"),
        ("attmask",),
        ("udi",),
        ("unic",),
        ("mugs",),
    ],
    ids=lambda options: options[0],
)
def test_eight_processes_wait_for_nothing_either(options):
    steps = take_steps(*options, devices=8)
    check(steps)
    assert steps.second.collectives["allreduce"] > 0


def test_every_method_has_its_recipe():
    assert set(RECIPES) == set(METHODS) == set(OPERATIONS)
