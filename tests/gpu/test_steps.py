"""Steps on a real card: of every method, in every precision, against the processor, and without a wait.

python -m pytest tests/gpu        on a machine that has a card; benchmarks/gpu.sh runs them, too
"""

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import main_pretrain
from methods import METHODS
from tests.fake_cuda import RECIPES, SMALL
from tests.launch import make_images
from tests.test_gpu_paths import OPTIONS
from training.options import check_options, parse_options
from utils import World

if not torch.cuda.is_available():
    pytest.skip("no GPU: these tests run on a machine that has one", allow_module_level=True)

CARD, PROCESSOR = torch.device("cuda", 0), torch.device("cpu")
PRECISIONS = ("bf16", "fp16", "fp32")
# 40 images are five steps an epoch
SETTLED = [
    *("--warmup_epochs", "0", "--lr", "0.01", "--weight_decay", "0.0", "--weight_decay_end", "0.0"),
    *("--num_workers", "0"),
]
FOLLOWED = ["--momentum_teacher", "1.0", "--freeze_last_layer", "0"]
STANDARDISED = ["--tnorm_ema_momentum_start", "0.0", "--tnorm_ema_momentum_end", "0.0"]
EPOCHS = 6
# largest relative difference of the loss, and of all gradients together, from those in fp32 (fp64) on the processor
AGREEMENT = {"fp64": (1e-10, 1e-8), "fp32": (1e-5, 1e-3)}
# the same from those in fp32 on the card, TF32 off
HALF_AGREEMENT = {"fp16": (2e-3, 6e-2), "bf16": (2e-2, 3e-1)}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(autouse=True)
def exact_products():
    """TF32, which torch lets convolutions use, has three digits."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def run_on(device: torch.device, images: Path, method: str, *options: str) -> main_pretrain.Run:
    words = ["--method", method, "--data_path", str(images), "--output_dir", "out", "--device", device.type]
    settled = SETTLED + (STANDARDISED if method == "unic" else FOLLOWED)
    args = parse_options([*words, "--knn_every", "0", *RECIPES[method], *SMALL[method], *settled, *options])
    world = World(0, 1, 0, device)
    check_options(args, world)
    main_pretrain.prepare_device(args, world)
    run = main_pretrain.build(args, world)
    run.monitor.world = dataclasses.replace(world, rank=1)  # which writes nothing
    return run


def losses_of(run: main_pretrain.Run) -> list[float]:
    """Of the class tokens in the steps of the first epochs, on one batch again and again, of whose images a teacher and
    a centre that stay as they are say the same every time: something to be learnt in a few steps.
    """
    seen, note = [], run.monitor.step
    run.monitor.step = lambda losses, *rest: (seen.append(losses.get("cls", losses["loss"])), note(losses, *rest))
    if hasattr(run.method, "centres"):
        run.method.centres.momentum = 1.0
    batch = list(itertools.islice(main_pretrain.device_pieces(run, 0, 0), run.args.accum_iter))
    pieces = itertools.cycle(batch)
    for epoch in range(EPOCHS):
        main_pretrain.train_one_epoch(run, epoch, pieces)
    return [float(loss) for loss in seen]


def falls(losses: list[float]) -> bool:
    return sum(losses[-3:]) / 3 < losses[0]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("method", METHODS)
def test_the_loss_of_every_method_falls_in_every_precision(images, method, precision):
    run = run_on(CARD, images, method, "--precision", precision)
    losses = losses_of(run)
    assert all(torch.isfinite(torch.tensor(losses))) and falls(losses)
    assert all(tensor.isfinite().all() for tensor in run.method.state_dict().values())
    assert run.blackbox.skipped_in_a_row == 0


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_loss_falls_whatever_the_options(images, options):
    assert falls(losses_of(run_on(CARD, images, *options)))


# ---------------------------------------------------------------------------------------------------------------------
# Against the processor, and against fp32
# ---------------------------------------------------------------------------------------------------------------------


def first_gradients(run: main_pretrain.Run) -> tuple[float, dict[str, torch.Tensor]]:
    if run.scaler is not None:  # it would begin at 65536, and find out in some steps what is too much
        run.scaler.load_state_dict(run.scaler.state_dict() | {"scale": 128.0})
    losses, _ = main_pretrain.forward_backward(run, main_pretrain.device_pieces(run, 0, 0), 0, 0)
    if run.scaler is not None:
        run.scaler.unscale_(run.optimizer)
    named = run.method.named_parameters()
    return float(losses["loss"]), {name: p.grad.double().cpu() for name, p in named if p.grad is not None}


def differences(run: main_pretrain.Run, reference: main_pretrain.Run) -> tuple[float, float]:
    """Of the loss, and of all gradients as one vector; relative."""
    (loss, gradients), (expected_loss, expected) = first_gradients(run), first_gradients(reference)
    assert gradients.keys() == expected.keys()
    apart = sum((gradients[name] - expected[name]).square().sum() for name in expected)
    whole = sum(gradient.square().sum() for gradient in expected.values())
    return abs(loss - expected_loss) / abs(expected_loss), float((apart / whole).sqrt())


CASES = {**{method: (method,) for method in METHODS}, **OPTIONS}
EXACT = {name: case for name, case in CASES.items() if "--precision" not in case}


@pytest.mark.parametrize("precision", AGREEMENT)
@pytest.mark.parametrize("options", EXACT.values(), ids=EXACT)
def test_a_step_equals_that_of_the_processor(images, options, precision):
    card, processor = (run_on(device, images, *options, "--precision", precision) for device in (CARD, PROCESSOR))
    loss, gradient = differences(card, processor)
    assert loss <= AGREEMENT[precision][0] and gradient <= AGREEMENT[precision][1]


@pytest.mark.parametrize("precision", HALF_AGREEMENT)
@pytest.mark.parametrize("method", METHODS)
def test_half_precision_is_near_fp32(images, method, precision):
    half, full = (run_on(CARD, images, method, "--precision", name) for name in (precision, "fp32"))
    loss, gradient = differences(half, full)
    assert loss <= HALF_AGREEMENT[precision][0] and gradient <= HALF_AGREEMENT[precision][1]


# ---------------------------------------------------------------------------------------------------------------------
# Waiting
# ---------------------------------------------------------------------------------------------------------------------


def strict_after(pieces: Iterator[dict], count: int) -> Iterator[dict]:
    """From piece ``count`` on every wait of the host for the card is an error."""
    for number, piece in enumerate(pieces):
        if number == count:
            torch.cuda.set_sync_debug_mode("error")
        yield piece


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_no_step_after_the_first_waits_for_the_card(images, options):
    run = run_on(CARD, images, *options)
    ahead = list(zip(range(5 * run.args.accum_iter), main_pretrain.device_pieces(run, 0, 0), strict=False))
    try:
        main_pretrain.train_one_epoch(run, 0, strict_after((piece for _, piece in ahead), run.args.accum_iter))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    run.monitor.flush()
    assert run.monitor.meters["loss"].count == 5
