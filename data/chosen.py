"""Images of a few classes of a source."""

from collections.abc import Sequence

import numpy as np

from data.decode import Reading
from data.source import PartOfSource, Source
from utils import UsageError, escape, nearest

SHOWN = 6  # classes where none is named


class ChosenClasses(PartOfSource):
    """The first ``per_class`` images of every class in ``names``, class after class; labels count these names.

    Without names the first six classes are taken. A class with fewer images gives all it has. Raises UsageError for
    unknown names and for images without classes.
    """

    def __init__(self, source: Source, names: Sequence[str] | None, per_class: int):
        labels = np.asarray(source.labels)
        if not len(labels) or labels.min() < 0 or not source.class_names:
            raise UsageError(f"{source.name}: images without a class; needs one folder per class")
        self.source, self.names, self.per_class = source, names, per_class
        self.class_names = list(dict.fromkeys(names or source.class_names[:SHOWN]))
        numbers = {name: number for number, name in enumerate(source.class_names)}
        for name in self.class_names:
            if name not in numbers:
                raise UsageError(
                    f"--classes {escape(name)}: no class of {source.name}{nearest(name, source.class_names)}"
                )
        self.positions = np.concatenate(
            [np.flatnonzero(labels == numbers[name])[:per_class] for name in self.class_names]
        )
        new = {numbers[name]: number for number, name in enumerate(self.class_names)}
        self.labels = np.array([new[label] for label in labels[self.positions].tolist()], dtype=np.int64)
        self.name = f"{source.name}, of which {len(self)} images of {len(self.class_names)} classes"

    def read_as(self, reading: Reading) -> "ChosenClasses":
        return ChosenClasses(self.source.read_as(reading), self.names, self.per_class)
