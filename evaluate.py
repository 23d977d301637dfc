"""Chosen evaluations of one or several checkpoints: a table of all results, and one page with pictures.

    python evaluate.py --checkpoints out/checkpoint.pth --protocols knn attention          on the bundled photographs
    torchrun --nproc_per_node=8 evaluate.py --checkpoints ours=out/checkpoint.pth dino=dino_vits16.pth \\
        --protocols knn linear video attention tsne --data_path /imagenet --output_dir report \\
        --with linear "--epochs 100 --lr 0.001 0.01" --with video "--data_path /DAVIS"

Every protocol is the script of its name (eval_<protocol>/, visualize_<protocol>.py), with that script's options behind
--with. ``table.csv`` and ``report.html`` in --output_dir are written anew after every result; what is there already for
the same weights, data and options is not computed again.
"""

import argparse
import contextlib
import hashlib
import importlib
import itertools
import json
import shlex
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType

from data.bundled import BundledTiles
from evaluation.features import Feature
from evaluation.network import parse_network_args
from evaluation.report import Report, Row, read_log, scores, write_report
from lock import hold
from models.reading import Info, read_backbone
from training.presets import CONFIGS, read_preset
from utils import (
    Parser,
    RunStopped,
    UsageError,
    World,
    barrier,
    check_writable,
    escape,
    init_world,
    log,
    make_folder,
    nearest,
    run_cli,
    save_atomically,
)

ROOT = Path(__file__).resolve().parent
PICTURES = {"attention": "Attention", "tsne": "Features in the plane (t-SNE)"}  # protocols without a number
SHEETS = {"attention": "sheet.png", "tsne": "tsne.png"}
DONE = "rows.json"  # in the folder of a result, written last
SHOWN = 8  # pictures of one checkpoint and protocol on the page


@dataclass
class Checkpoint:
    name: str
    path: Path
    weights: str  # hash of the file
    info: Info


@dataclass
class Job:
    """One protocol on one checkpoint; ``folder`` is named by what decides its numbers."""

    checkpoint: Checkpoint
    protocol: str
    script: ModuleType
    words: list[str]
    options: argparse.Namespace
    data: str  # hash
    folder: Path


# ---------------------------------------------------------------------------------------------------------------------
# What is asked for
# ---------------------------------------------------------------------------------------------------------------------


def protocols() -> dict[str, str]:
    """The scripts that there are: protocol -> module."""
    found = sorted(path.stem for path in ROOT.glob("eval_*/eval_*.py") if path.stem == path.parent.name)
    modules = {name.removeprefix("eval_"): f"{name}.{name}" for name in found}
    return modules | {name: f"visualize_{name}" for name in PICTURES}


def get_args_parser() -> Parser:
    parser = Parser(prog="evaluate.py", description="Chosen evaluations of several checkpoints, in one report.")
    add = parser.add_argument
    what = "files, each with the name it has in the report if wanted; the first is what others are compared with"
    add("--checkpoints", required=True, nargs="+", metavar="[NAME=]FILE", help=what)
    names = ", ".join(protocols())
    add("--protocols", default=["knn"], nargs="+", metavar="NAME", help=f"of {names}")
    add("--data_path", default=None, help="for protocols that read train and test images; left out: bundled tiles")
    what = "options of this protocol's script, in quotes; they go before everything else"
    add("--with", dest="extra", default=[], nargs=2, action="append", metavar=("PROTOCOL", "OPTIONS"), help=what)
    add("--checkpoint_key", default="teacher", help="which network of the files")
    add("--output_dir", default="report", help="for table.csv, report.html and a folder for every result")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: the GPU if there is one")
    return parser


def scripts(args: argparse.Namespace) -> dict[str, ModuleType]:
    """The modules of the protocols. Raises UsageError for one that is not there."""
    known = protocols()
    for name in (*args.protocols, *(protocol for protocol, _ in args.extra)):
        if name not in known:
            raise UsageError(f"--protocols {escape(name)}: there are {', '.join(known)}{nearest(name, known)}")
    for name, _ in args.extra:
        if name not in args.protocols:
            raise UsageError(f"--with {name}: not among --protocols {' '.join(args.protocols)}")
    return {name: importlib.import_module(known[name]) for name in dict.fromkeys(args.protocols)}


def checkpoints(args: argparse.Namespace) -> list[Checkpoint]:
    """Every file, opened and hashed. Raises UsageError, before anything is computed."""
    found: dict[str, Checkpoint] = {}
    for text in args.checkpoints:
        name, equals, place = text.partition("=")
        is_path = not equals or Path(text).exists()
        name, path = (_name_of(Path(text)), Path(text)) if is_path else (name, Path(place))
        if not name or name in found:
            raise UsageError(f"--checkpoints {escape(text)}: a name twice, or none; write NAME={escape(path)}")
        _, info = read_backbone(path, args.checkpoint_key)
        with open(path, "rb") as file:
            weights = hashlib.file_digest(file, "sha256").hexdigest()
        found[name] = Checkpoint(name, path, weights, info)
    return list(found.values())


def _name_of(path: Path) -> str:
    """A run's checkpoint.pth is called as its folder is."""
    path = path.absolute()
    return path.parent.name if path.stem.startswith("checkpoint") else path.stem


def jobs(args: argparse.Namespace) -> list[Job]:
    """All of them, their options read by the scripts' own parsers. Raises UsageError for those that cannot work."""
    modules, files, extra = scripts(args), checkpoints(args), {}
    for name, text in args.extra:
        try:
            extra[name] = [*extra.get(name, ()), *shlex.split(text)]
        except ValueError as error:
            raise UsageError(f"--with {name} {escape(text)}: {error}") from None
    made = []
    for name, module in modules.items():
        for checkpoint in files:
            words = [*extra.get(name, ()), *_common_words(args, module, checkpoint, extra.get(name, ()))]
            try:
                options = parse_network_args(module.get_args_parser(), words)
            except UsageError as error:
                raise UsageError(f"--with {name}: {error}") from None
            data = hash_of_data(getattr(options, "data_path", None) or getattr(options, "image_path", None))
            decides = json.dumps([checkpoint.weights, data, name, _without_places(words)])
            mark = hashlib.sha256(decides.encode(errors="surrogateescape")).hexdigest()[:12]
            folder = Path(args.output_dir) / "results" / f"{name}-{mark}"
            words += ["--output_dir", str(folder)]
            made.append(Job(checkpoint, name, module, words, options, data, folder))
    return made


def _common_words(args: argparse.Namespace, module: ModuleType, checkpoint: Checkpoint, own: list[str]) -> list[str]:
    known = module.get_args_parser()._option_string_actions
    words = ["--pretrained_weights" if "--pretrained_weights" in known else "--finetune", str(checkpoint.path)]
    words += ["--checkpoint_key", args.checkpoint_key] if "--checkpoint_key" in known else []
    words += ["--device", args.device]
    if (
        "--feature_cache" in known and "--feature_cache" not in own
    ):  # what one protocol extracted is there for the others
        words += ["--feature_cache", str(Path(args.output_dir) / "features")]
    reads_it = "--subset" in known or module.__name__ == "visualize_tsne"  # train and test images, or classes of them
    if args.data_path is not None and reads_it and "--data_path" not in own:
        words += ["--data_path", args.data_path]
    return words


def _without_places(words: list[str]) -> list[str]:
    """Options but for where files lie: their contents count."""
    places = {"--pretrained_weights", "--finetune", "--data_path", "--device", "--feature_cache"}
    return [word for before, word in zip(["", *words], words, strict=False) if not {before, word} & places]


def hash_of_data(path: str | None) -> str:
    """Of the names, sizes and times of what lies in a folder, and in its folders, or of the bundled photographs."""
    if path is None:
        told = "".join(BundledTiles(split).fingerprint for split in ("train", "test"))
        return hashlib.sha256(told.encode()).hexdigest()
    root, told = Path(path), []
    try:
        for place in [root, *sorted(root.glob("*")), *sorted(root.glob("*/*"))]:
            status = place.stat()
            told.append(f"{place.relative_to(root)} {status.st_size} {status.st_mtime_ns}")
    except OSError as error:
        raise UsageError(f"--data_path {escape(path)}: cannot be read ({error.strerror})") from None
    return hashlib.sha256("\n".join(told).encode(errors="surrogateescape")).hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# What is found
# ---------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def command_line(words: list[str]) -> Iterator[None]:
    before, sys.argv = sys.argv, words
    try:
        yield
    finally:
        sys.argv = before


def finish(job: Job, world: World) -> list[Row]:
    """The rows of a job, from an earlier start if they are there. Of a process alone a UsageError becomes a row."""
    said = f"{job.protocol} of {escape(job.checkpoint.name)}"
    if (rows := _rows_there(job)) is not None:
        log.info(f"== {said}: done before")
        return rows
    log.info(f"== {said}")
    try:
        with command_line([job.script.__name__, *job.words]):
            job.script.main()
    except UsageError as error:
        if world.size > 1:  # it may be of one process alone, and the others wait for it
            raise
        log.error(f"{said}: {error}")
        return [_row(job, job.protocol, None, error=str(error))]
    barrier()
    rows = _rows_of(job)
    if world.rank == 0:
        make_folder(job.folder)
        text = json.dumps([asdict(row) for row in rows])
        save_atomically(job.folder / DONE, lambda temporary: temporary.write_text(text))
    barrier()
    return rows


def _rows_there(job: Job) -> list[Row] | None:
    """With the name that the checkpoint has now."""
    try:
        rows = [Row(**row) for row in json.loads((job.folder / DONE).read_text())]
    except (OSError, ValueError, TypeError):
        return None
    return [Row(**asdict(row) | {"checkpoint": job.checkpoint.name}) for row in rows]


def _rows_of(job: Job) -> list[Row]:
    """Of what the script wrote; pictures have no row."""
    path = job.folder / f"eval_{job.protocol}.json"
    if job.protocol in PICTURES:
        return []
    record = json.loads(path.read_text().splitlines()[-1])
    found = scores(job.protocol, record["numbers"])
    tokens = _tokens(job, record["numbers"])
    return [_row(job, name, value, tokens, job.protocol if quoted else "") for name, value, quoted in found]


def _tokens(job: Job, numbers: dict) -> str:
    """What the score is of, as the script says it, or as its options do."""
    said = numbers.get("tokens") or numbers.get("feature")
    if isinstance(said, str):
        return said
    names = {"n_last_blocks": "n_last_blocks", "avgpool_patchtokens": "avgpool", "class_token": "token"}
    source = {**vars(job.options), **(numbers["head"] if isinstance(numbers.get("head"), dict) else {})}
    chosen = {ours: source[theirs] for theirs, ours in names.items() if theirs in source}
    chosen = {name: value[0] if isinstance(value, list) else value for name, value in chosen.items()}
    return str(Feature(**chosen)) if chosen else ""


def _row(job: Job, protocol: str, score: float | None, tokens: str = "", quoted: str = "", error: str = "") -> Row:
    info = job.checkpoint.info
    preset, expected = _preset_of(info)
    return Row(
        checkpoint=job.checkpoint.name,
        method=_method_of(info) or info.layout.name,
        preset=preset,
        epoch=info.epoch,
        weights=job.checkpoint.weights,
        data=job.data,
        protocol=protocol,
        tokens=tokens,
        score=score,
        published=str(expected.get(quoted, "")),
        error=error,
    )


def _preset_of(info: Info) -> tuple[str, dict]:
    """The preset that a run was started with, and what its published row reached."""
    config = Path(str(info.arguments.get("config"))).name
    there = {path.name: path for path in (CONFIGS / _method_of(info)).glob("*.yaml")} if _method_of(info) else {}
    return (there[config].stem, read_preset(there[config]).expected) if config in there else ("", {})


def _method_of(info: Info) -> str:
    """As its file says it, if we know it; '' where nothing does."""
    known = {path.name for path in CONFIGS.iterdir() if path.is_dir()}
    return next((m for m in (info.method, info.arguments.get("method")) if m in known), info.method or "")


def pictures_of(job: Job) -> list[tuple[str, Path]]:
    """What a protocol without a number has drawn, with a caption each."""
    files = sorted(job.folder.rglob(SHEETS[job.protocol]))[:SHOWN]
    name = job.checkpoint.name
    return [(name if f.parent == job.folder else f"{name}: {f.parent.name}", f) for f in files]


def beside_each_other(lists: list[list]) -> list:
    """The first of all lists, then the second of all, and so on: the same image of every checkpoint in a row."""
    return [item for row in itertools.zip_longest(*lists) for item in row if item is not None]


def main() -> None:
    args = get_args_parser().parse_args()
    check_writable(Path(args.output_dir))
    todo = jobs(args)
    world = init_world(args.device)
    folder, report, drawn = Path(args.output_dir), Report(), {}
    logs = {job.checkpoint.name: read_log(job.checkpoint.path.parent / "log.txt") for job in todo}
    report.curves = {name: lines for name, lines in logs.items() if lines}
    with hold(folder, world):
        for job in todo:
            report.rows += finish(job, world)
            if job.protocol in PICTURES:
                drawn.setdefault(PICTURES[job.protocol], []).append(pictures_of(job))
                report.pictures = {heading: beside_each_other(lists) for heading, lists in drawn.items()}
            if world.rank == 0:
                write_report(report, folder)
        log.info(f"written to {escape(folder)}: report.html, table.csv")
    failed = [f"{row.protocol} of {row.checkpoint}" for row in report.rows if row.error]
    if failed:
        raise RunStopped(f"{len(failed)} of {len(todo)} results are missing: {', '.join(failed)}; see the lines above")


if __name__ == "__main__":
    run_cli(main)
