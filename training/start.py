"""Where a run begins: where the run that is found stands, else with what another run has learnt, else from nothing.

A run that begins with another one (--init_from) takes its networks; with --init_progress also its epoch, the moments of
the optimiser and the state of the loss. What begins fresh is said. The start is recorded in every checkpoint, so that a
run that is continued goes on as it was and is not begun anew by mistake (training/checkpointing.py).
"""

from pathlib import Path

from methods.base import Method
from methods.parts import module_of, own_names
from models.safe_load import load_file
from training.checkpointing import parameter_names, resume, unwrapped
from training.optim import MOMENTS
from utils import UsageError, escape, log

State = dict[str, dict]  # key of a checkpoint -> the part of a method that stands there
WITHOUT = "pass --init_progress false to take its networks alone"


def begin(run) -> tuple[int, int]:
    """(epoch, step) to begin with. Raises UsageError for a file or folder that this run cannot go on from."""
    args = run.args
    found = resume(run)
    if found is not None and args.init_from:
        names = (escape(args.init_from), escape(args.output_dir))
        log.info("--init_from %s: not read, since the run in %s goes on", *names)
    if found is not None or not args.init_from:
        return found or (0, 0)
    return begin_from(run, Path(args.init_from), args.init_progress)


def begin_from(run, path: Path, progress: bool) -> tuple[int, int]:
    """Begin with the run whose checkpoint ``path`` is, with or without its ``progress``. Returns (epoch, step)."""
    where = f"--init_from {escape(path)}"
    file = load_file(path)
    ours = file.get("tutelage", {})
    state = _parts_of(run.method, where, file, ours)
    position = _position(run, where, file, ours) if progress else (0, 0)
    try:
        fresh = run.method.adopt(state if progress else {key: state[key] for key in run.method.inherited})
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None
    if progress:
        fresh += [f"moments of {name}" for name in adopt_moments(run, where, file, state)]
        if run.scaler is not None and "fp16_scaler" in file:
            run.scaler.load_state_dict(file["fp16_scaler"])
    else:
        fresh += ["epoch", "optimizer"]
    run.start = {"file": str(path.resolve()), "progress": progress, "epoch": file["epoch"], "step": ours.get("step", 0)}
    log.info("beginning with %s; fresh: %s", escape(path), ", ".join(grouped(fresh)) or "nothing")
    if progress:
        log.info("going on with its epoch %d, step %d of %d", *position, run.niter)
    return position


def _parts_of(method: Method, where: str, file: dict, ours: dict) -> State:
    """The method's parts in a file. Raises UsageError when it is no checkpoint of a run of this method."""
    if ours.get("method", method.name) != method.name:
        raise UsageError(f"{where} belongs to a {escape(str(ours['method']))} run, this is {method.name}")
    parts = method.checkpoint_parts()
    missing = [key for key in parts if not isinstance(file.get(key), dict)]
    missing += [] if isinstance(file.get("epoch"), int) else ["epoch"]
    if missing:
        raise UsageError(
            f"{where} is not a checkpoint of a {method.name} run: no {', '.join(missing)}; pass the "
            "checkpoint.pth that such a run wrote"
        )
    return {key: unwrapped(file[key]) for key in parts}


def _position(run, where: str, file: dict, ours: dict) -> tuple[int, int]:
    """Where the other run stands. Raises UsageError where this run cannot go on from there."""
    optimizer = file.get("optimizer")
    if not isinstance(optimizer, dict) or not {"state", "param_groups"} <= optimizer.keys():
        raise UsageError(f"{where} has no optimizer, and its progress was asked for; {WITHOUT}")
    epoch, step = file["epoch"], ours.get("step", 0)
    if step and step == ours["niter"]:
        epoch, step = epoch + 1, 0
    if step and (ours["niter"], ours["global_batch"]) != (run.niter, run.global_batch):
        raise UsageError(
            f"{where} stands in the middle of an epoch of {ours['niter']} steps, this run has {run.niter}; "
            f"pass a checkpoint between two epochs, or {WITHOUT.removeprefix('pass ')}"
        )
    if epoch >= run.args.epochs:
        raise UsageError(
            f"{where} has {epoch} epochs behind it and --epochs is {run.args.epochs}: nothing is left to "
            f"train; raise --epochs, or {WITHOUT}"
        )
    return epoch, step


# ---------------------------------------------------------------------------------------------------------------------
# Moments: the optimiser's state numbers its parameters, so they are found by name
# ---------------------------------------------------------------------------------------------------------------------


def adopt_moments(run, where: str, file: dict, state: State) -> list[str]:
    """Give every parameter the moments that it has in ``file``; returns the names of those that begin without."""
    there = _numbered(run, where, file, state)
    if any(moments and not moments.keys() >= MOMENTS[run.args.optimizer] for moments in there.values()):
        raise UsageError(f"{where}: its optimiser is not --optimizer {run.args.optimizer}; pass its own")
    shapes = {name: parameter.shape for name, parameter in run.method.named_parameters()}
    names = [name for group in parameter_names(run.method, run.optimizer) for name in group]
    own, fresh = run.optimizer.state_dict(), []
    for number, name in enumerate(names):
        moments = there.get(name)
        if moments is None or any(getattr(value, "shape", ()) not in ((), shapes[name]) for value in moments.values()):
            fresh.append(name)
        elif moments:
            own["state"][number] = moments
    run.optimizer.load_state_dict(own)
    return fresh


def _numbered(run, where: str, file: dict, state: State) -> dict[str, dict]:
    """The moments in ``file`` by the names of their parameters; {} of one that has not moved yet.

    A file that does not say the names, as those of the originals, has what it shares with this run, in the same order.
    """
    names = file.get("tutelage", {}).get("parameters")
    if names is None:
        shared = _shared(run.method, state)
        names = [[name for name in group if name in shared] for group in parameter_names(run.method, run.optimizer)]
    groups, moments = file["optimizer"]["param_groups"], file["optimizer"]["state"]
    there, here = ([len(group) for group in of] for of in ([group["params"] for group in groups], names))
    if there != here:
        raise UsageError(
            f"{where}: its optimiser has {' + '.join(map(str, there))} tensors where this run looks for "
            f"{' + '.join(map(str, here))}, so whose moments they are cannot be told; {WITHOUT}"
        )
    pairs = [pair for group, own in zip(groups, names, strict=True) for pair in zip(group["params"], own, strict=True)]
    return {name: moments.get(number, {}) for number, name in pairs}


def _shared(method: Method, state: State) -> set[str]:
    """Names of the method's parameters that stand in another run's parts as well."""
    parts = {key: part for key, part in method.checkpoint_parts().items() if module_of(part) is not None}
    held = {
        id(parameter)
        for key, part in parts.items()
        for name, parameter in module_of(part).named_parameters(remove_duplicate=False)
        if name in own_names(part, state[key])
    }
    return {name for name, parameter in method.named_parameters() if id(parameter) in held}


def grouped(names: list[str]) -> list[str]:
    """Names for one line: those of one layer are one."""
    layers: dict[str, list[str]] = {}
    for name in names:
        layers.setdefault(name.rpartition(".")[0], []).append(name)
    return [
        part for layer, own in layers.items() for part in ([f"{layer}.* ({len(own)})"] if layer and own[1:] else own)
    ]
