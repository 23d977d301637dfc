"""Everything that was found about several checkpoints: a table for programs, and one page for people.

The page needs nothing beside itself: no script, no font, no file; charts are SVG, pictures stand in it as JPEG.
"""

import base64
import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from html import escape
from pathlib import Path
from string import Template

import cv2
import numpy as np

from evaluation.charts import bar_chart, colour, line_chart
from utils import UsageError, save_atomically
from utils import escape as printable

HEADLINES = ("top1", "acc1", "J&F-Mean", "mIoU", "miou", "mAP", "accuracy")  # what stands for a result
PLAIN = ("top1", "acc1", "accuracy")  # of these, what else would one say
USUAL_K = 20  # neighbours that k-NN is quoted with
PICTURE_BYTES = 6_000_000  # of all pictures of a page together; base64 makes a third more of them
SIDES = (1100, 800, 560, 400)  # of a picture, the largest that leaves room for the others
QUALITY = 84
NOTE = (
    "Scores in percent; of several on the same images the best is bold. Published is what the row of the run's preset "
    "reached, on ImageNet-1k where it does not say otherwise. Weights and data: the first characters of a hash; "
    "table.csv has all of it."
)
CURVES = 8  # charts of log.txt, at most


@dataclass(frozen=True)
class Row:
    """One result. ``score`` and ``published`` in percent; a result that failed says why in ``error``."""

    checkpoint: str
    method: str
    preset: str
    epoch: int | None
    weights: str  # hashes
    data: str
    protocol: str
    tokens: str
    score: float | None
    published: str = ""
    error: str = ""


@dataclass
class Report:
    rows: list[Row] = field(default_factory=list)
    curves: dict[str, list[dict]] = field(default_factory=dict)  # lines of log.txt by checkpoint
    pictures: dict[str, list[tuple[str, Path]]] = field(default_factory=dict)  # (caption, file) by heading


# ---------------------------------------------------------------------------------------------------------------------
# Numbers
# ---------------------------------------------------------------------------------------------------------------------


def scores(protocol: str, numbers: Mapping) -> list[tuple[str, float, bool]]:
    """(protocol, score in percent, whether it is the one that is quoted) of what an evaluation wrote.

    A number of neighbours each is a result, and so is a data set of several; else the first of HEADLINES is, or the
    first number there is.
    """
    neighbours = [(int(k), row["top1"]) for k, row in numbers.items() if k.isdecimal() and isinstance(row, Mapping)]
    if neighbours:
        counts = [k for k, _ in neighbours]
        quoted = USUAL_K if USUAL_K in counts else counts[0]
        return [(f"{protocol}, k = {k}", float(value), k == quoted) for k, value in neighbours]
    if isinstance(numbers.get("sets"), Mapping):
        found = [(f"{protocol}, {name}", float(row["top1"]), False) for name, row in numbers["sets"].items()]
        mean = numbers.get("mean_accuracy")
        return found + ([] if mean is None else [(f"{protocol}, mean of the sets", float(mean), True)])
    flat = dict(_leaves(numbers))
    name = next((name for name in HEADLINES if name in flat), next(iter(flat), None))
    if name is None:
        return []
    return [(protocol if name in PLAIN else f"{protocol}, {name}", flat[name], True)]


def _leaves(numbers: Mapping, prefix: str = "") -> Iterable[tuple[str, float]]:
    for name, value in numbers.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name} ")
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            yield f"{prefix}{name}", float(value)


def read_log(path: Path) -> list[dict]:
    """The lines of a log.txt; [] where there is none. Lines that are no JSON objects are passed over."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("epoch"), (int, float)):
            found.append(record)
    return found


def curve_charts(curves: Mapping[str, Sequence[Mapping]], names: Sequence[str]) -> list[str]:
    """A chart for every number in the logs, of those that most runs have first: k-NN and losses before the rest."""
    counts: dict[str, int] = {}
    for lines in curves.values():
        for key in {key for line in lines for key, value in line.items() if isinstance(value, (int, float))}:
            counts[key] = counts.get(key, 0) + (key != "epoch")
    words = ("knn", "top1", "acc", "loss", "entropy", "rank", "kl")

    def place(key: str) -> tuple:
        return next((n for n, word in enumerate(words) if word in key), len(words)), -counts[key], key

    charts = []
    for key in sorted((key for key, count in counts.items() if count), key=place)[:CURVES]:
        lines = {
            names.index(name): [(line["epoch"], float(line[key])) for line in log if _is_number(line.get(key))]
            for name, log in curves.items()
        }
        charts.append(line_chart(key, {n: points for n, points in lines.items() if points}))
    return [chart for chart in charts if chart]


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def relative_bars(rows: Sequence[Row], names: Sequence[str]) -> str:
    """How much better every checkpoint is than the first one, in percent of what that reached, protocol by protocol."""
    groups = []
    for protocol, data in dict.fromkeys((row.protocol, row.data) for row in rows):
        found = {
            r.checkpoint: r.score for r in rows if (r.protocol, r.data) == (protocol, data) and r.score is not None
        }
        first = found.get(names[0])
        if first:
            bars = [(names.index(n), 100 * (score / first - 1)) for n, score in found.items() if n != names[0]]
            groups += [(protocol, bars)] * bool(bars)
    return bar_chart(f"difference from {names[0]}, in percent of what it reached", groups)


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def write_report(report: Report, folder: Path) -> None:
    """table.csv and report.html. Raises UsageError."""
    for name, text in (("table.csv", table(report.rows)), ("report.html", page(report))):
        try:
            save_atomically(folder / name, lambda temporary, text=text: temporary.write_text(text, encoding="utf-8"))
        except OSError as error:
            raise UsageError(f"--output_dir {folder}: {name} cannot be written: {error}") from error


def table(rows: Sequence[Row]) -> str:
    """CSV with a row for every result. What a spreadsheet would take for a formula begins with an apostrophe."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([field.name for field in fields(Row)])
    for row in rows:
        values = ["" if value is None else value for value in asdict(row).values()]
        writer.writerow([f"'{v}" if isinstance(v, str) and v.startswith(("=", "+", "-", "@")) else v for v in values])
    return text.getvalue()


def inline_picture(path: Path, most: int) -> str:
    """A picture as the address of an <img>, a JPEG of at most ``most`` bytes if one of SIDES is small enough; '' where
    it cannot be read.
    """
    picture = cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_COLOR) if path.is_file() else None
    if picture is None:
        return ""
    for side in SIDES:
        scale = min(1.0, side / max(picture.shape[:2]))
        size = [max(1, round(length * scale)) for length in picture.shape[1::-1]]
        smaller = picture if scale == 1 else cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
        data = cv2.imencode(".jpg", smaller, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1].tobytes()
        if len(data) <= most:
            break
    return "data:image/jpeg;base64," + base64.b64encode(data).decode()


# ---------------------------------------------------------------------------------------------------------------------
# The page
# ---------------------------------------------------------------------------------------------------------------------


def page(report: Report) -> str:
    names = list(dict.fromkeys([row.checkpoint for row in report.rows] + list(report.curves)))
    sections = {"Results": table_of_results(report.rows, names)}
    if len(names) > 1:
        sections["Relative"] = relative_bars(report.rows, names)
    charts = curve_charts(report.curves, names)
    sections["Training"] = f'<div class="charts">{"".join(charts)}</div>' if charts else ""
    count = sum(map(len, report.pictures.values()))
    for heading, pictures in report.pictures.items():
        sections[heading] = gallery(pictures, PICTURE_BYTES // max(1, count))
    sections = {heading: body for heading, body in sections.items() if body}
    links = "".join(f'<a href="#s{number}">{_text(heading)}</a>' for number, heading in enumerate(sections))
    body = "".join(
        f'<section id="s{number}"><h2>{_text(heading)}</h2>{part}</section>'
        for number, (heading, part) in enumerate(sections.items())
    )
    results = sum(row.score is not None for row in report.rows)
    said = f"{results} result{'s' * (results != 1)} of {len(names)} checkpoint{'s' * (len(names) != 1)}"
    legend = "".join(f'<span class="key">{_dot(number)}{_text(name)}</span>' for number, name in enumerate(names))
    return Template(PAGE).substitute(said=said, links=links, legend=legend, body=body)


def table_of_results(rows: Sequence[Row], names: Sequence[str]) -> str:
    """A row for every result, by protocol and feature; the best of several on the same images is bold."""
    if not rows:
        return ""
    columns = ("checkpoint", "score", "published", "method", "preset", "epoch", "weights", "data")
    head = "".join(f'<th class="{_align(column)}">{column}</th>' for column in columns)
    parts = []
    for protocol, tokens in dict.fromkeys((row.protocol, row.tokens) for row in rows):
        group = [row for row in rows if (row.protocol, row.tokens) == (protocol, tokens)]
        title = f'{_text(protocol)}<span class="tokens">{_text(tokens)}</span>'
        parts.append(f'<tbody><tr class="group"><th colspan="{len(columns)}" scope="rowgroup">{title}</th></tr>')
        for row in group:
            rivals = [r.score for r in group if r.data == row.data and r.score is not None]
            best = row.score is not None and len(rivals) > 1 and row.score == max(rivals)
            parts.append(_table_row(row, names.index(row.checkpoint), best, len(columns)))
        parts.append("</tbody>")
    body = f'<div class="scroll"><table><thead><tr>{head}</tr></thead>{"".join(parts)}</table></div>'
    return body + f'<p class="note">{NOTE}</p>'


def _table_row(row: Row, number: int, best: bool, columns: int) -> str:
    name = f"<td>{_dot(number)}{_text(row.checkpoint)}</td>"
    if row.error:
        return f'<tr>{name}<td class="error" colspan="{columns - 1}">{_text(row.error)}</td></tr>'
    score = f"{row.score:.2f}" if row.score is not None else ""
    cells = [
        ("score", f"<strong>{score}</strong>" if best else score),
        ("published", _text(row.published)),
        ("method", _text(row.method)),
        ("preset", _text(row.preset)),
        ("epoch", "" if row.epoch is None else str(row.epoch)),
        ("weights", f"<code>{_text(row.weights[:8])}</code>"),
        ("data", f"<code>{_text(row.data[:8])}</code>"),
    ]
    return "<tr>" + name + "".join(f'<td class="{_align(c)}">{text}</td>' for c, text in cells) + "</tr>"


def _align(column: str) -> str:
    return "number" if column in ("epoch", "score") else column


def gallery(pictures: Sequence[tuple[str, Path]], most: int) -> str:
    parts = []
    for caption, path in pictures:
        address = inline_picture(path, most)
        if address:
            said = _text(caption)
            parts.append(
                f'<figure><img src="{address}" alt="{said}" loading="lazy"><figcaption>{said}</figcaption></figure>'
            )
    return f'<div class="pictures">{"".join(parts)}</div>' if parts else ""


def _text(text: str) -> str:
    return escape(printable(text))


def _dot(number: int) -> str:
    return f'<i style="background:{colour(number)}"></i>'


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>Evaluation: $said</title>
<style>
:root { --paper: #f6f7f9; --card: #fff; --ink: #1d2430; --soft: #667082; --line: #e3e6ec; --accent: #2f6fb5; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14181f; --card: #1c222c; --ink: #e6eaf1; --soft: #97a1b3; --line: #2e3644; --accent: #7db3ea; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", Roboto,
  "Helvetica Neue", Arial, sans-serif; }
header, main { max-width: 1180px; margin: 0 auto; padding: 0 24px; }
header { padding-top: 36px; }
h1 { margin: 0 0 4px; font-size: 26px; font-weight: 650; letter-spacing: -.01em; }
h2 { margin: 0 0 16px; font-size: 18px; font-weight: 620; }
header p { margin: 0 0 14px; color: var(--soft); }
nav { display: flex; flex-wrap: wrap; gap: 6px 18px; margin-bottom: 12px; }
nav a { color: var(--accent); text-decoration: none; }
nav a:hover { text-decoration: underline; }
.key { display: inline-flex; align-items: center; margin: 0 18px 4px 0; overflow-wrap: anywhere; }
i { display: inline-block; flex: none; width: 10px; height: 10px; margin-right: 8px; border-radius: 50%; }
section { margin: 20px 0; padding: 22px 24px; background: var(--card); border: 1px solid var(--line);
  border-radius: 12px; scroll-margin-top: 12px; }
.scroll { overflow-x: auto; }
table { width: 100%; border-collapse: collapse; font-size: 14px; }
th, td { padding: 7px 10px; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top; }
td:first-child { white-space: nowrap; }
thead th { color: var(--soft); font-weight: 550; white-space: nowrap; }
.group th { padding-top: 18px; font-weight: 620; border-bottom-color: var(--soft); }
tbody tr:not(.group):hover td { background: color-mix(in srgb, var(--accent) 7%, transparent); }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.published, th.published { text-align: right; font-variant-numeric: tabular-nums; }
td.published { min-width: 150px; }
.tokens { margin-left: 12px; color: var(--soft); font-weight: 400; }
code { font: 12px/1.4 ui-monospace, "SF Mono", Menlo, Consolas, monospace; color: var(--soft); }
.note { margin: 12px 0 0; color: var(--soft); font-size: 13px; }
.error { color: #c0392b; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(330px, 1fr)); gap: 22px; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(480px, 100%), 1fr)); gap: 22px; }
figure { margin: 0; min-width: 0; }
figcaption { margin-bottom: 6px; color: var(--soft); font-size: 13px; overflow-wrap: anywhere; }
img { display: block; width: 100%; height: auto; border: 1px solid var(--line); border-radius: 8px; background: #fff; }
.pictures figcaption { margin: 6px 0 0; }
svg { display: block; width: 100%; height: auto; }
.wide { overflow-x: auto; } .wide svg { min-width: 640px; }
.grid { stroke: var(--line); } .axis { stroke: var(--soft); }
.tick { font-size: 11px; fill: var(--soft); } .name { font-size: 13px; fill: var(--ink); }
@media print { body { background: #fff; } section { border: 0; padding: 0; } figure, tr { break-inside: avoid; }
  nav { display: none; } }
</style>
</head>
<body>
<header><h1>Evaluation</h1><p>$said</p><nav>$links</nav><div>$legend</div></header>
<main>$body</main>
</body>
</html>
"""
