"""Hyper-parameters that are searched for on part of the training images: drawn at random, or by optuna's estimator.

t-ReX (2206.15369) searches with optuna's TPE. Its first ten trials are drawn as ``Drawn`` draws all of them: uniformly
on a logarithmic scale, with numpy's generator and the same seed.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from utils import UsageError

INSTALL = "pip install -r requirements-eval.txt, or pass --search random"


class Range(NamedTuple):
    """On a logarithmic scale."""

    low: float
    high: float


class Drawn:
    """Every trial by itself, whatever the others found."""

    def __init__(self, ranges: Mapping[str, Range], seed: int):
        self.ranges, self._random = dict(ranges), np.random.RandomState(seed)

    def ask(self, trials: int) -> list[dict[str, float]]:
        low, high = np.log(np.array(list(self.ranges.values()))).T
        drawn = np.exp(self._random.uniform(low, high, (trials, len(low))))
        return [dict(zip(self.ranges, row, strict=True)) for row in drawn.tolist()]

    def tell(self, accuracies: Sequence[float]) -> None:
        pass


class Tpe:
    """optuna's TPE, seeded; several ranges are one multivariate estimate, as t-ReX has it.

    Trials that are asked for together are drawn from what is known before all of them.
    """

    def __init__(self, ranges: Mapping[str, Range], seed: int):
        try:
            import optuna
        except ImportError:
            raise UsageError(f"--search tpe: optuna is not installed; {INSTALL}") from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        several = {"multivariate": True, "group": True} if len(ranges) > 1 else {}
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            sampler = optuna.samplers.TPESampler(seed=seed, **several)
        self.ranges = dict(ranges)
        self.study, self._asked = optuna.create_study(direction="maximize", sampler=sampler), []

    def ask(self, trials: int) -> list[dict[str, float]]:
        self._asked = [self.study.ask() for _ in range(trials)]
        return [
            {name: trial.suggest_float(name, *range_, log=True) for name, range_ in self.ranges.items()}
            for trial in self._asked
        ]

    def tell(self, accuracies: Sequence[float]) -> None:
        for trial, accuracy in zip(self._asked, accuracies, strict=True):
            self.study.tell(trial, accuracy)


SEARCHES = {"tpe": Tpe, "random": Drawn}


def best_trial(accuracies: Sequence[float]) -> int:
    """The first of the trials with the highest accuracy, as optuna counts."""
    return max(range(len(accuracies)), key=lambda trial: (accuracies[trial], -trial))
