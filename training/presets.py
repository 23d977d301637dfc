"""Presets: one YAML file per published row, with the options that differ from the defaults and its result."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from utils import UsageError, nearest

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


@dataclass
class Preset:
    """A preset file: its options with their lines, and what the published run reached on which hardware."""

    path: Path
    method: str | None = None
    expected: dict = field(default_factory=dict)
    options: dict[str, tuple[object, int]] = field(default_factory=dict)  # name -> (value, line)

    def argv(self, parser: argparse.ArgumentParser) -> list[str]:
        """The options as a command line. Raises UsageError naming file, line, key and the nearest valid name."""
        valid = {action.dest for action in parser._actions}
        argv = []
        for name, (value, line) in self.options.items():
            if name not in valid:
                raise UsageError(f"{self.path}, line {line}: unknown option {name!r}{nearest(name, valid)}")
            values = [str(v) for v in (value if isinstance(value, list) else [value])]
            try:
                parser.parse_known_args([f"--{name}", *values])
            except UsageError as error:
                raise UsageError(f"{self.path}, line {line}: {error}") from None
            argv += [f"--{name}", *values]
        return argv

    def result(self) -> str:
        """The published result in one line."""
        return ", ".join(f"{key} {value}" for key, value in self.expected.items()) or "no published result"


def read_preset(path: Path) -> Preset:
    """Read one file. Raises UsageError when it is missing or not a mapping of options."""
    try:
        node = yaml.compose(path.read_text(), Loader=yaml.SafeLoader)
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
    for path in sorted((CONFIGS / args.method).glob("*.yaml")):
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
