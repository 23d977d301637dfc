"""What is kept of a step that was not finite, and how it is run again under a magnifying glass.

The step is skipped by all processes, so the weights at the time of writing are those it started from. Order, crops and
stochastic depth being functions of the seed, the file needs no images: the step is rebuilt from its number.
"""

import argparse
import math
from pathlib import Path

import torch

from data.datasets import open_training
from data.decode import reading_from
from data.device import to_device_ahead
from data.loader import TrainLoader, steps_per_epoch
from data.published import place_from
from methods import method_class
from methods.base import Clock, Method
from models.batch_norm import batch_norm_of_the_batch
from models.safe_load import load_file
from training.consensus import Verdict
from training.options import parse_options, resolve_precision
from utils import UsageError, World, autocast, batch_dtype, half_dtype, log, save_torch

SCALE_FALLS = 16  # halvings from torch's first scale of an fp16 loss, 65536, to 1: that a run begins so is by design


class BlackBox:
    """Counts steps that were skipped and images that were unreadable; writes the first step of every bad series."""

    def __init__(self, args: argparse.Namespace, images: int, world: World):
        self.args, self.images, self.world = args, images, world
        self.skipped_in_a_row = self.overflowed_in_a_row = 0
        self.bad_images = {"epoch": 0, "run": 0}  # over all processes
        self.forgiven = 0  # those of this epoch from before a restart: they may have been mended since

    def record(self, method: Method, verdict: Verdict) -> None:
        """Called before the weights move after the step the verdict is about."""
        self.bad_images = {span: count + verdict.bad_images for span, count in self.bad_images.items()}
        self.overflowed_in_a_row = self.overflowed_in_a_row + 1 if verdict.overflowed else 0
        if not verdict.skipped:
            self.skipped_in_a_row = 0
            return
        self.skipped_in_a_row += 1
        clock, indices = verdict.tag
        if self.world.rank or self.skipped_in_a_row > 1:
            return
        path = Path(self.args.output_dir) / f"nonfinite_{clock.iteration:07}.pth"
        state = {
            "nonfinite": {"epoch": clock.epoch, "iteration": clock.iteration, "momentum": clock.momentum},
            "args": {key: list(value) if isinstance(value, tuple) else value for key, value in vars(self.args).items()},
            "world_size": self.world.size,
            "indices": torch.cat(indices),
            **{key: part.state_dict() for key, part in method.checkpoint_parts().items()},
        }
        try:
            save_torch(state, path)
        except OSError as error:
            log.warning("warning: cannot write %s: %s", path, error)
        log.warning(
            "warning: loss or gradient not finite at iteration %d: no process took the step. To look at it: "
            "python main_pretrain.py --replay %s",
            clock.iteration,
            path,
        )

    def begin_epoch(self) -> None:
        self.bad_images["epoch"] = self.forgiven = 0

    def summary(self) -> str:
        count = self.bad_images["run"]
        return (
            f"{count} times an image was unreadable and another one took its place" if count else "no unreadable images"
        )

    def state_dict(self) -> dict:
        return self.bad_images

    def load_state_dict(self, state: dict) -> None:
        self.bad_images |= state
        self.forgiven = self.bad_images["epoch"]

    def reason_to_stop(self) -> str | None:
        if self.skipped_in_a_row >= self.args.max_skipped:
            return (
                f"{self.skipped_in_a_row} steps in a row were not finite (--max_skipped); weights, teacher and centres "
                f"are those before the first of them. Look at it with --replay {self.args.output_dir}/nonfinite_*.pth; "
                "a lower --lr, a smaller --clip_grad or --precision fp32 have helped others"
            )
        if self.overflowed_in_a_row >= SCALE_FALLS + self.args.max_skipped:
            return (
                f"the gradients of {self.overflowed_in_a_row} steps in a row overflowed in fp16 "
                f"({SCALE_FALLS} may until a scale of the loss is found, --max_skipped after these); pass --precision "
                "bf16 or fp32, which have the range that is missing"
            )
        bad_images = self.bad_images["epoch"] - self.forgiven
        if bad_images > self.args.max_bad_images * self.images:
            return (
                f"{bad_images} of {self.images} images were unreadable in this epoch, more than --max_bad_images "
                f"{self.args.max_bad_images}; their names are above. Mend or remove them, or raise the limit"
            )
        return None


def replay(path: Path, overrides: dict, world: World) -> int:
    """Run the step a black box describes, forward and backward on one device, and print where it breaks.

    ``overrides``: options given on the command line together with --replay (where the images are, precision).
    """
    state = load_file(path)
    if "nonfinite" not in state:
        raise UsageError(f"--replay {path}: not a file of a step that was not finite")
    defaults = vars(parse_options(["--method", state["args"]["method"]]))  # of options younger than the file
    args = argparse.Namespace(**{**defaults, **state["args"], "use_fp16": None, **overrides})
    resolve_precision(args, world.device)
    source = open_training(place_from(args), args.subset, args.split).read_as(reading_from(args))
    cls = method_class(args.method)
    method = cls.build(args).place(world.device, batch_dtype(args.precision), half_dtype(args.precision))
    for key, part in method.checkpoint_parts().items():
        part.load_state_dict(state[key])

    # batch norm saw the whole batch of all processes at once, everything else a piece
    pieces = 1 if batch_norm_of_the_batch(method) else state["world_size"] * args.accum_iter
    batch = args.batch_size_per_gpu * state["world_size"]
    niter = steps_per_epoch(len(source), batch)
    epoch, iteration = state["nonfinite"]["epoch"], state["nonfinite"]["iteration"]
    loader = TrainLoader(
        source,
        cls.views(args),
        batch_size=batch,
        pieces=pieces,
        world=World(0, 1, 0, world.device),
        seed=args.seed,
        epochs=args.epochs,
        num_workers=0,
        start_epoch=epoch,
        start_step=iteration - epoch * niter,
    )
    ahead = to_device_ahead(loader, world.device, batch_dtype(args.precision))
    log.info("iteration %d (epoch %d): %d images in %d pieces", iteration, epoch, batch, pieces)
    largest: dict[str, float] = {}
    seen: list[torch.Tensor] = []
    broken = watch_modules(method, largest)
    for number in range(pieces):
        piece = next(ahead)
        seen.append(piece["indices"].cpu())
        clock = Clock(epoch, iteration, seed=args.seed, first_sample=piece["first_sample"], global_batch=batch)
        with autocast(args.precision, world.device):
            losses = method(piece, clock)
        log.info("piece %d: %s", number, ", ".join(f"{name} {value.item():.6g}" for name, value in losses.items()))
        if not losses["loss"].isfinite():
            log.info("  its images: %s", "; ".join(source.image_name(int(i)) for i in piece["indices"]))
        losses["loss"].backward()
    if not torch.equal(torch.cat(seen)[: len(state["indices"])], state["indices"].cpu()):
        log.warning("warning: %s gives other images than those of the run: the list of images has changed", source.name)
    print_findings(method, largest, broken)
    return 0


def watch_modules(method: torch.nn.Module, largest: dict[str, float]) -> list[str]:
    """Hooks that keep every module's largest output in ``largest`` and list those whose output is not finite."""
    broken: list[str] = []

    def hook(name: str):
        def see(_module, _inputs, output) -> None:
            if isinstance(output, torch.Tensor) and output.is_floating_point():
                value = output.detach().abs().max().item()
                largest[name] = max(largest.get(name, 0.0), value) if math.isfinite(value) else value
                if not math.isfinite(value) and name not in broken:
                    broken.append(name)

        return see

    for name, module in method.named_modules():
        if not list(module.children()):
            module.register_forward_hook(hook(name))
    return broken


def print_findings(method: Method, largest: dict[str, float], broken: list[str]) -> None:
    log.info("largest output of every layer, in the order they ran:")
    for name, value in largest.items():
        log.info("  %-56s %12.4g%s", name, value, "   <- not finite" if name in broken else "")
    for name, parameter in method.named_parameters():
        if parameter.grad is not None and not parameter.grad.isfinite().all():
            log.info("  gradient of %-44s not finite", name)
    log.info("first broken layer: %s", broken[0] if broken else "none, every output is finite on this device")
