"""Images that cannot be read: named, counted, and left out or refused, by one rule in every evaluation.

What is learnt from goes on without them. What is tested on must not shrink unseen: it is refused, all of it in one
message, unless the user says --skip_unreadable.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch

from data.source import Source
from utils import UsageError, escape, log

NAMED = 20  # images of one message; the rest is counted


class Unreadable(NamedTuple):
    """An image of a source that could not be read, and why."""

    index: int
    name: str
    reason: str


class UnreadableImages(UsageError):
    """Test images were refused, or nothing but unreadable images is there."""


def readable(images: int, unreadable: Sequence[Unreadable]) -> torch.Tensor:
    """Indices of those of a source's ``images`` that could be read, in order: (readable,) int64."""
    kept = torch.ones(images, dtype=torch.bool)
    kept[[image.index for image in unreadable]] = False
    return kept.nonzero().flatten()


def named(images: Iterable[tuple[str, str]], show: int = NAMED) -> str:
    """The first ``show`` of (name, reason) pairs, and how many more there are."""
    shown = [f"{escape(name)}: {escape(reason)}" for name, reason in images]
    more = len(shown) - show
    return "; ".join(shown[:show] + [f"and {more} more"] * (more > 0))


def leave_out(source: Source, unreadable: Sequence[Unreadable], told: Sequence[Unreadable] = ()) -> None:
    """Say what is left out of ``source``, but for what was ``told``. Raises UnreadableImages when nothing remains."""
    new = [image[1:] for image in unreadable if image not in told]
    if len(unreadable) == len(source):
        raise UnreadableImages(f"{source.name}: none of its images can be read: {named(new, 3)}")
    if new:
        many = f"{len(unreadable)} of its {len(source)} images"
        log.warning(f"warning: {source.name}: {many} left out as unreadable: {named(new)}")


def refuse(source: Source, unreadable: Sequence[Unreadable]) -> None:
    """Raise UnreadableImages, with the names, when there are unreadable test images."""
    if unreadable:
        raise UnreadableImages(
            f"{source.name}: {len(unreadable)} of its {len(source)} test images cannot be read: "
            f"{named(image[1:] for image in unreadable)}; mend them, or leave them out with --skip_unreadable"
        )


def remark(counts: Mapping[str, int]) -> str:
    """For a line with a result: how many images of "train" and "test" were unreadable; '' when none were."""
    words = {"train": "training", "test": "test"}
    parts = [f"{count} {words[part]} image{'s' * (count > 1)}" for part, count in counts.items() if count]
    return f" (unreadable: {', '.join(parts)})" if parts else ""
