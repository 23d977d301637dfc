"""Checkpoints of a run: DINO's layout with plain types, written atomically, and a resumption that cannot go wrong.

    student, teacher, dino_loss   the method's parts (``Method.checkpoint_parts``); names start with "module." in those
                                  that ``Method.wrapped`` lists
    optimizer, fp16_scaler        as torch gives them
    epoch                         the epoch to continue with
    args                          the options, as a dict
    tutelage                      what this repository adds: method, step within the epoch, identity of the data and of
                                  teachers from files, names of what the optimiser moves, the run that this one began
                                  with, if any, and what the unfinished epoch's line of log.txt will be made of

Nothing random is stored: order, crops and stochastic depth are functions of the seed and of where training stands.
"""

import argparse
import os
import shutil
from pathlib import Path

import torch

from methods.base import Method
from models.safe_load import CheckpointError, load_file
from training.optim import complete_moments
from training.options import parse_options, trajectory_options
from utils import UsageError, log, save_torch

FORMAT = 1
LATEST, PREVIOUS = "checkpoint.pth", "checkpoint.previous.pth"
COMPUTED_BY = ("fused", "foreach", "capturable", "differentiable")  # what groups say of how torch takes a step


def save_checkpoint(run, epoch: int, step: int, numbered: bool = False) -> None:
    """Write checkpoint.pth, keeping the one before it as checkpoint.previous.pth. Raises UsageError on a full disk.

    All processes take part, the first one writes.
    """
    measures = {
        "meters": run.monitor.state_dict(),
        "epoch_state": run.method.epoch_state(),
        "pseudo_labels": run.pseudo_labels.state_dict(),
        "bad_images": run.blackbox.state_dict(),
    }
    if run.world.rank:
        return
    folder = Path(run.args.output_dir)
    wrapper = dict.fromkeys(run.method.wrapped, "module.")
    state = {
        key: {f"{wrapper.get(key, '')}{name}": value for name, value in part.state_dict().items()}
        for key, part in run.method.checkpoint_parts().items()
    }
    state |= {
        "optimizer": run.optimizer.state_dict(),
        "epoch": epoch,
        "args": {key: list(value) if isinstance(value, tuple) else value for key, value in vars(run.args).items()},
        "tutelage": {
            "format": FORMAT,
            "method": run.method.name,
            "arch": run.args.arch,
            "image_size": run.method.image_size(run.args),
            "step": step,
            "iteration": epoch * run.niter + step,
            "niter": run.niter,
            "global_batch": run.global_batch,
            "images": len(run.source),
            "data": run.source.fingerprint,
            "parameters": parameter_names(run.method, run.optimizer),
            "identity": run.method.identity(),
            "start": run.start,
            **measures,
        },
    }
    if run.scaler is not None:
        state["fp16_scaler"] = run.scaler.state_dict()
    try:
        if (folder / LATEST).exists():
            _keep_as(folder / LATEST, folder / PREVIOUS)
        save_torch(state, folder / LATEST)
        if numbered:
            _keep_as(folder / LATEST, folder / f"checkpoint{epoch - 1:04}.pth")
    except OSError as error:
        raise UsageError(
            f"cannot save {folder / LATEST}: {error.strerror or error}; the checkpoint before it is untouched, "
            "free some space and start the same command again"
        ) from None


def _keep_as(path: Path, name: Path) -> None:
    """Give a complete file a second name, replacing what had it; a hard link where the file system has them."""
    if name.exists() and name.samefile(path):
        return  # renaming one name of a file over another would leave both
    temporary = name.with_name(f"{name.name}.tmp{os.getpid()}")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:
        shutil.copyfile(path, temporary)
    os.replace(temporary, name)


def find_checkpoint(folder: Path, name: str | None = None) -> tuple[Path, dict] | None:
    """The file ``name`` of a run, or else its newest readable checkpoint; damaged ones are passed over with a warning.

    Raises CheckpointError when there are checkpoints and none can be read.
    """
    paths = [folder / name for name in ([name] if name else (LATEST, PREVIOUS)) if (folder / name).exists()]
    for path in paths:
        try:
            return path, load_file(path)
        except CheckpointError as error:
            log.warning("warning: %s", error)
            damaged = error
    if paths:
        raise damaged
    return None


def parameter_names(method: Method, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    """Names of every group's parameters, in the order in which the optimiser's state numbers them."""
    names = {id(parameter): name for name, parameter in method.named_parameters()}
    return [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]


def unwrapped(state: dict) -> dict:
    """A part of a file without what wrapped networks put before their names."""
    return {name.removeprefix("module."): value for name, value in state.items()}


def resume(run) -> tuple[int, int] | None:
    """Continue the run in --output_dir, or its --load_from. Returns (epoch, step) to begin with; None without a run.

    Raises UsageError when what is there belongs to another run, naming every difference.
    """
    found = find_checkpoint(Path(run.args.output_dir), run.args.load_from)
    if found is None:
        return None
    path, state = found
    parts = run.method.checkpoint_parts()
    ours = state.get("tutelage", {})
    _refuse_another_run(run, path, state, ours)
    for key, part in parts.items():
        try:
            part.load_state_dict(unwrapped(state[key]))
        except (RuntimeError, KeyError, ValueError) as error:
            detail = " ".join(str(error).split("\n\t")[1:2]) or str(error)
            raise UsageError(f"{path}: its {key} does not fit this network: {detail[:200]}") from None
    _load_optimizer(run.optimizer, state["optimizer"], path)
    if run.scaler is not None and "fp16_scaler" in state:
        run.scaler.load_state_dict(state["fp16_scaler"])
    _load_measures(run, ours)
    run.start = ours.get("start")
    epoch, step = state["epoch"], ours.get("step", 0)
    log.info("continuing %s: epoch %d, step %d of %d", path, epoch, step, run.niter)
    return epoch, step


def _load_measures(run, ours: dict) -> None:
    """What older files lack begins anew in the middle of the epoch."""
    run.monitor.load_state_dict(ours.get("meters", []))
    run.blackbox.load_state_dict(ours.get("bad_images", {}))
    if "epoch_state" in ours:
        run.method.load_epoch_state(ours["epoch_state"])
    if ours.get("data") == run.source.fingerprint:  # images are known by their numbers
        run.pseudo_labels.load_state_dict(ours.get("pseudo_labels", {}))


def _refuse_another_run(run, path: Path, state: dict, ours: dict) -> None:
    parts = run.method.checkpoint_parts()
    elsewhere = "choose another --output_dir, or move that file away"
    if ours.get("method", run.method.name) != run.method.name:  # a file of an evaluation has none
        raise UsageError(f"{path} belongs to a {ours['method']} run, this is {run.method.name}; {elsewhere}")
    if ours.get("arch", run.args.arch) != run.args.arch:
        raise UsageError(f"{path} holds {ours['arch']}, this run trains {run.args.arch}; {elsewhere}")
    missing = {*parts, "optimizer", "epoch"} - set(state)
    if missing:
        raise UsageError(f"{path} is not a checkpoint of a {run.method.name} run: no {', '.join(missing)}; {elsewhere}")
    if not ours:
        log.warning("warning: %s was written by the original code; its options and data are not checked", path)
        return
    differences = _differing_options(run.args, state["args"]) + _differing_start(run.args, ours.get("start"))
    differences += _differing_identity(ours.get("identity", {}), run.method.identity())
    for name, theirs, mine in (
        ("images per step", ours["global_batch"], run.global_batch),
        ("images", ours["images"], len(run.source)),
        ("list of images", ours["data"], run.source.fingerprint),
    ):
        if theirs != mine:
            differences.append(f"{name}: {theirs} there, {mine} here")
    if not differences:
        return
    if not run.args.accept_changes:
        raise UsageError(
            f"{path} belongs to another run ({'; '.join(differences)}); {elsewhere}, "
            "or continue it nevertheless with --accept_changes"
        )
    if ours["step"] and (ours["niter"] != run.niter or ours["global_batch"] != run.global_batch):
        raise UsageError(f"{path} stands in the middle of an epoch of {ours['niter']} steps, this run has {run.niter}")
    log.warning("warning: continuing with changes: %s", "; ".join(differences))


def _differing_options(args: argparse.Namespace, saved: dict) -> list[str]:
    """An option that did not exist when the checkpoint was written had what is its default now."""
    theirs = trajectory_options(parse_options(["--method", args.method, "--arch", args.arch])) | saved
    return [f"--{k}: {theirs[k]} there, {v} here" for k, v in trajectory_options(args).items() if theirs[k] != v]


def _differing_start(args: argparse.Namespace, start: dict | None) -> list[str]:
    """--init_from decided what a run is, but it is not read again: it may be left out, and names no other start."""
    if not args.init_from:
        return []
    here = f"{Path(args.init_from).resolve()} {'with' if args.init_progress else 'without'} progress"
    there = f"{start['file']} {'with' if start['progress'] else 'without'} progress" if start else "nothing"
    return [] if here == there else [f"--init_from: {there} there, {here} here"]


def _differing_identity(theirs: dict[str, str], mine: dict[str, str]) -> list[str]:
    names = [name for name in {**theirs, **mine} if theirs.get(name) != mine.get(name)]
    return [f"{name}: {theirs.get(name, 'none')} there, {mine.get(name, 'none')} here" for name in names]


def _load_optimizer(optimizer: torch.optim.Optimizer, state: dict, path: Path) -> None:
    """Moments and counters from the file. The groups' multipliers stay those of this run, and so does how a step is
    computed: a file of the original code, or of another device, says ``fused: None``, which takes no gate.
    """
    groups = [
        group | {name: value for name, value in own.items() if name in COMPUTED_BY or name.endswith("_multiplier")}
        for group, own in zip(state.get("param_groups", ()), optimizer.param_groups, strict=False)
    ]
    try:
        if len(groups) != len(state["param_groups"]):
            raise ValueError(f"{len(state['param_groups'])} groups there, {len(groups)} here")
        optimizer.load_state_dict(state | {"param_groups": groups})
        complete_moments(optimizer)
    except (ValueError, KeyError) as error:
        raise UsageError(f"{path}: its optimiser does not fit this run: {error}") from None
