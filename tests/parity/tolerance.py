"""How far an output may be from what is expected: numbers and words of the manifests.

They are given for all outputs, for each precision, for each output, or in words, and all of these inside each other.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

NUMBER = r"(?<![\w.*^-])\d+(?:\.\d+)?(?:e-?\d+)?(?![\w-]|\.\d|\s*\*)"
NAMED = rf"\b(rtol|atol|rel|abs)\s+({NUMBER})"
KINDS = {"rtol": "rtol", "rel": "rtol", "atol": "atol", "abs": "atol"}
REMARKS = {"note", "across_versions"}


class Tolerance(NamedTuple):
    """|actual - expected| <= atol + rtol * |expected|, in all elements but this share of them."""

    rtol: float = 0.0
    atol: float = 0.0
    share: float = 0.0


EXACT = Tolerance()


def named_tolerance(given: dict | str | float, output: str, precision: str) -> Tolerance:
    """What ``given``, a manifest's ``tolerance``, says of an output computed in ``float32`` or ``float64``.

    An output that it does not name has what holds for all, or else the strictest of what it does name.
    """
    if isinstance(given, str):
        return _choose(dict(_clauses(given)), output)
    if not isinstance(given, dict):
        return Tolerance(atol=given)
    precisions = {key.split()[0]: key for key in given if re.match(r"float(32|64)\b", key)}
    if precisions or "any" in given:
        key = "any" if "any" in given else precisions.get(precision, next(iter(precisions.values())))
        return named_tolerance(given[key], output, precision)
    if given.get("exact") is True:
        return EXACT
    named = {
        name: named_tolerance(value, output, precision)
        for name, value in given.items()
        if name not in KINDS and name not in REMARKS
    }
    if given.keys() & KINDS.keys():
        named[""] = Tolerance(*(given.get(kind, 0.0) for kind in ("rtol", "atol")))
    return _choose(named, output)


def _choose(named: dict[str, Tolerance], output: str) -> Tolerance:
    for name, tolerance in named.items():
        if name and _is_about(name, output):
            return tolerance
    return named[""] if "" in named else min(named.values(), key=sum)


def _is_about(name: str, output: str) -> bool:
    """Whether a name (``losses and components``, ``exact ops (Invert, Solarize*)``) is that of an output."""
    words = _words(output)
    words |= {
        word.rstrip("0123456789") for word in words
    }  # "acc" is what "acc1" is about, but "top1" not what "top5" is
    parts = (_words(part) for part in re.split(r"\band\b|[/,()]", name))
    return any(bool(part) and part <= words for part in parts)


def _words(text: str) -> set[str]:
    """Its words in the singular: ``out.loss_total`` -> out, loss, total; ``losses`` -> loss."""
    return {re.sub(r"(?<=ss)es$|(?<=[^s])s$", "", word) for word in re.findall(r"[A-Za-z0-9]+", text)}


def _clauses(text: str) -> Iterator[tuple[str, Tolerance]]:
    """(what it is about, '' for everything; tolerance) of each part of a sentence.

    ``atol 1e-9, rtol 1e-8`` is one part, ``loss rtol 1e-8, tensors rtol 1e-6`` are two. Of ``atol 1e-7*max(1,L2)`` the
    number is kept: never more than was given.
    """
    plain = re.sub(r"\([^()]*\)", "", re.sub(r"\*max\([^()]*\)", "", text))
    kinds = "|".join(KINDS)
    parts = re.split(rf";|,(?!\s*(?:{kinds})\b)(?=[^,;]*\s(?:{kinds})\s)", plain)
    for part in parts:
        if named := re.search(NAMED, part):
            found = {KINDS[kind]: float(number) for kind, number in reversed(re.findall(NAMED, part))}
            yield part[: named.start()].strip(), Tolerance(**found)
        elif share := re.search(r">= ([\d.]+) ?% equal|at most ([\d.]+) ?%", part):
            yield "", Tolerance(share=round(1 - float(share[1]) / 100 if share[1] else float(share[2]) / 100, 9))
        elif exact := re.search(r"\bexact\b", part):  # "exact percentages (1e-9)": as far as they are written out
            remark = re.search(rf"\bexact\b[\w ]*\((?:[a-z ]* )?({NUMBER})\)", text) if len(parts) == 1 else None
            yield part[: exact.start()].strip(), Tolerance(atol=float(remark[1]) if remark else 0.0)
        else:
            number = re.search(rf"\bmax(?: <=)? (?P<n>{NUMBER})", part) or re.search(rf"(?P<n>{NUMBER})", part)
            about = part[: number.start()].strip() if number else ""
            number = number or (re.search(rf"(?P<n>{NUMBER})", text) if len(parts) == 1 else None)
            yield about, Tolerance(atol=float(number["n"])) if number else EXACT
