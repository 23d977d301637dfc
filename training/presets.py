"""Presets: one YAML file per published row, with the options that differ from the defaults and its result.

The argument file of an original's run (JSON, which is YAML) is read as well. What it says of its machine, and what no
option here is called, is left out and listed.
"""

import argparse
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from utils import UsageError, nearest

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
PLACES = {
    "config",
    "cfg",
    "data_path",
    "output_dir",
    "dist_url",
    "local_rank",
    "device",
    "backend",
    "load_from",
    "init_from",
}


@dataclass
class Preset:
    """A preset file: its options with their lines, and what the published run reached on which hardware."""

    path: Path
    method: str | None = None
    expected: dict = field(default_factory=dict)
    options: dict[str, tuple[object, int]] = field(default_factory=dict)  # name -> (value, line)

    @property
    def foreign(self) -> bool:
        """Whether it is the argument file of an original's run."""
        return self.path.suffix == ".json"

    def argv(self, parser: argparse.ArgumentParser) -> list[str]:
        """The options as a command line. Raises UsageError naming file, line, key and the nearest valid name."""
        actions, argv = self.actions(parser), []
        left_out = self.left_out(parser)
        for name, (value, line) in self.options.items():
            if name in left_out:
                continue
            if name not in actions:
                raise UsageError(f"{self.path}, line {line}: unknown option {name!r}{nearest(name, actions)}")
            words = _words(f"--{name}", value, actions[name])
            try:
                parser.parse_known_args(words)
            except UsageError as error:
                raise UsageError(f"{self.path}, line {line}: {error}") from None
            argv += words
        return argv

    def actions(self, parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
        """What a name of the file stands for: presets keep to one for each option, originals have their own."""
        actions = [action for action in parser._actions if action.dest != "help"]
        if not self.foreign:
            return {action.dest: action for action in actions}
        return {string.lstrip("-"): action for action in actions for string in action.option_strings}

    def left_out(self, parser: argparse.ArgumentParser) -> list[str]:
        """Names in an original's argument file that mean nothing here."""
        actions = self.actions(parser)
        return [n for n in self.options if self.foreign and (n not in actions or actions[n].dest in PLACES)]

    def result(self) -> str:
        """The published result in one line."""
        return ", ".join(f"{key} {value}" for key, value in self.expected.items()) or "no published result"


def _words(option: str, value: object, action: argparse.Action) -> list[str]:
    """``option`` with ``value`` on a command line; a list for an option of one value is written with commas."""
    if action.nargs == 0:
        return [option] * bool(value)
    values = [str(v) for v in (value if isinstance(value, list) else [value])]
    return [option, *values] if action.nargs else [option, ",".join(values)]


class _Loader(yaml.SafeLoader):
    """1e-6 is a number, as in JSON and YAML 1.2; YAML 1.1 wants a point in it."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+e[-+]?\d+$", re.I), [*"-+0123456789"])


def read_preset(path: Path) -> Preset:
    """Read one file. Raises UsageError when it is missing or not a mapping of options."""
    try:
        node = yaml.compose(path.read_text(), Loader=_Loader)
    except OSError as error:
        raise UsageError(f"--config {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path}: not YAML ({' '.join(str(error).split())[:160]})") from None
    if not isinstance(node, yaml.MappingNode):
        raise UsageError(f"--config {path}: expected lines of the form 'option: value'")
    constructor = yaml.SafeLoader("")
    preset = Preset(path)
    for key, value in node.value:
        content = constructor.construct_object(value, deep=True)
        if key.value == "expected":
            preset.expected = content
        elif key.value == "method":
            preset.method = content
        elif content is not None:
            preset.options[key.value] = (content, key.start_mark.line + 1)
    return preset


def nearest_preset(
    args: argparse.Namespace, parse: Callable[[list[str]], argparse.Namespace], world_size: int, ignored: set[str]
) -> list[str]:
    """Lines that say which preset of the method is nearest, what it reached, and every option that differs from it.

    ``parse``: a command line -> options, as those of the run were made.
    """
    best: tuple[int, Preset, list[str]] | None = None
    given = Path(args.config).resolve() if args.config else None  # of presets that differ in their data alone, this one
    for path in sorted((CONFIGS / args.method).glob("*.yaml"), key=lambda path: (path != given, path)):
        preset = read_preset(path)
        theirs = vars(parse(["--method", args.method, "--config", str(path)]))
        differences = [
            f"{name}: {_plain(getattr(args, name))} (preset {_plain(value)})"
            for name, value in theirs.items()
            if name not in ignored and _plain(value) != _plain(getattr(args, name))
        ]
        batch = args.batch_size_per_gpu * world_size
        if preset.expected.get("global_batch") not in (None, batch):
            differences.append(f"images per step: {batch} (preset {preset.expected['global_batch']})")
        if best is None or len(differences) < best[0]:
            best = (len(differences), preset, differences)
    if best is None:
        return []
    _, preset, differences = best
    lines = [f"nearest preset: configs/{args.method}/{preset.path.name} ({preset.result()})"]
    return lines + [f"  {difference}" for difference in differences or ["no option differs"]]


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value
