"""Multinomial logistic regression with a ridge, to its exact optimum: one problem for any number of ridges.

For every penalty l the weights W (classes, dim) are those that minimise

    1/n sum_i cross_entropy(W x_i, y_i) + l / 2 |W|^2,

a strongly convex function: whoever finds its optimum has the numbers of the solvers that the originals call (cyanure in
iBOT, Mugs and UDI; scikit-learn in t-ReX and UNIC, whose C is 1 / (l n), with an intercept that is not penalised).

Newton steps by preconditioned conjugate gradients (Nocedal and Wright, chapter 7): a product with the Hessian is two
products with the features, and those of all penalties are one. Every problem has its own step lengths and stops by
itself.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

WORKING_BYTES = 512 * 2**20  # of logits at a time, whatever the number of images
MAX_STEPS, MAX_PRODUCTS, MAX_HALVINGS = 200, 200, 40
ENOUGH = {torch.float64: 1e-10, torch.float32: 1e-5}  # norm of the gradient over that of the start


class Solution(NamedTuple):
    """Of every penalty: ``weight`` (penalties, classes, dim), ``bias`` (penalties, classes), ``objective``
    (penalties,); ``converged`` (penalties,) tells whose gradient has vanished.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    objective: torch.Tensor
    converged: torch.Tensor

    def predictions(self, features: torch.Tensor) -> torch.Tensor:
        """(images, dim) -> classes (penalties, images)."""
        found = [(features.to(w) @ w.T + b).argmax(dim=1) for w, b in zip(self.weight, self.bias, strict=True)]
        return torch.stack(found)


def ridge_regression(
    features: torch.Tensor,
    labels: torch.Tensor,
    num_classes: int,
    penalties: Sequence[float],
    intercept: bool = False,
    enough: float | None = None,
    products: float = math.inf,
    working_bytes: int = WORKING_BYTES,
) -> Solution:
    """The optimum for each of ``penalties``, in the precision of ``features`` (images, dim); labels (images,).

    ``enough``: the norm of the gradient, over that at the start, with which a problem counts as solved; left out: what
    the precision allows. ``products`` with the Hessian: where to give up, with what was reached.
    """
    middle = features.mean(dim=0) if intercept else torch.zeros_like(features[0])
    centred = features - middle  # changes nothing but the intercept
    spread, axes = torch.linalg.eigh(centred.T @ centred / len(features))
    problem = _Problem(centred @ axes, labels, num_classes, penalties, intercept, spread.clamp(min=0), working_bytes)
    weight = features.new_zeros(len(penalties), num_classes, problem.features.shape[1])
    objective, gradient = problem.value_and_gradient(weight)
    start = _norm(gradient)
    aim = start * (enough or ENOUGH[features.dtype])
    active = torch.ones_like(start, dtype=torch.bool)
    for _ in range(MAX_STEPS):
        active &= _norm(gradient) > aim
        if not active.any() or problem.products >= products:
            break
        direction = _newton_direction(problem, gradient, start, active)
        length = _step_length(problem, weight, direction, objective, gradient, active)
        active &= length > 0  # no step decreases what rounding has the last word on
        weight = weight + length[:, None, None] * direction
        objective, gradient = problem.value_and_gradient(weight)
    converged = _norm(gradient) <= aim.clamp(min=torch.finfo(features.dtype).eps * 1e3)
    found = weight[..., : len(spread)] @ axes.T
    bias = weight[..., -1] - found @ middle if intercept else weight.new_zeros(weight.shape[:2])
    bias = bias - bias.mean(dim=1, keepdim=True)  # which nothing else decides
    return Solution(found, bias, objective, converged)


class _Problem:
    """Objective of every penalty, gradient, and products with the Hessian, at weights (penalties, classes, dim).

    Features are given along their principal axes, of variances ``spread``: there the diagonal of the Hessian is most of
    it, and ``precondition`` divides by an estimate of it.
    """

    def __init__(self, features, labels, num_classes, penalties, intercept, spread, working_bytes):
        self.labels = labels
        penalties = torch.tensor(penalties, dtype=features.dtype, device=features.device)
        ridge = penalties[:, None, None].expand(-1, 1, features.shape[1])
        if intercept:
            features = torch.cat((features, torch.ones_like(features[:, :1])), dim=1)
            ridge, spread = F.pad(ridge, (0, 1)), F.pad(spread, (0, 1), value=1.0)
        self.features, self.ridge, self.spread = features, ridge, spread
        self.rows = max(1, working_bytes // (len(penalties) * num_classes * features.element_size()))
        self.probabilities: list[torch.Tensor] = []  # kept where all of them fit
        self.products = 0

    def _chunks(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for start in range(0, len(self.features), self.rows):
            part = slice(start, start + self.rows)
            yield self.features[part], self.labels[part]

    def _logits(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """(rows, penalties, classes)"""
        return (x @ weight.flatten(0, 1).T).view(-1, *weight.shape[:2])

    def _back(self, errors: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Errors (rows, penalties, classes) -> (penalties, classes, dim)"""
        return (errors.flatten(1).T @ x).view(*errors.shape[1:], -1) / len(self.features)

    def value(self, weight: torch.Tensor) -> torch.Tensor:
        total = (self.ridge * weight.square()).sum(dim=(1, 2)) / 2
        for x, y in self._chunks():
            logits = self._logits(x, weight)
            index = y[:, None, None].expand(-1, len(weight), 1)
            losses = logits.logsumexp(dim=2) - logits.gather(2, index)[..., 0]
            total = total + losses.sum(dim=0) / len(self.features)
        return total

    def value_and_gradient(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Remembers the probabilities, for ``curvature`` and ``precondition`` at these weights."""
        self.weight, self.probabilities, variance = weight, [], 0.0
        total, gradient = (self.ridge * weight.square()).sum(dim=(1, 2)) / 2, self.ridge * weight
        for x, y in self._chunks():
            logits = self._logits(x, weight)
            index = y[:, None, None].expand(-1, len(weight), 1)
            normaliser = logits.logsumexp(dim=2, keepdim=True)
            total = total + (normaliser - logits.gather(2, index)).sum(dim=(0, 2)) / len(self.features)
            probabilities = (logits - normaliser).exp()
            variance = variance + (probabilities * (1 - probabilities)).sum(dim=0) / len(self.features)
            if self.rows >= len(self.features):
                self.probabilities = [probabilities]
            errors = probabilities.scatter_add(2, index, torch.full_like(probabilities[..., :1], -1.0))
            gradient = gradient + self._back(errors, x)
        diagonal = variance[..., None] * self.spread + self.ridge
        self._inverse = 1 / diagonal.clamp(min=torch.finfo(weight.dtype).tiny ** 0.5)
        return total, gradient

    def curvature(self, direction: torch.Tensor) -> torch.Tensor:
        """The Hessian's product with ``direction``: (penalties, classes, dim)."""
        product, self.products = self.ridge * direction, self.products + 1
        for x, _ in self._chunks():
            p = self.probabilities[0] if self.probabilities else self._logits(x, self.weight).softmax(dim=2)
            change = self._logits(x, direction)
            product = product + self._back(p * (change - (p * change).sum(dim=2, keepdim=True)), x)
        return product

    def precondition(self, residual: torch.Tensor) -> torch.Tensor:
        return residual * self._inverse


def _dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a * b).sum(dim=(1, 2))


def _norm(a: torch.Tensor) -> torch.Tensor:
    return a.flatten(1).norm(dim=1)


def _newton_direction(problem: _Problem, gradient, start, active) -> torch.Tensor:
    """Hessian * direction = -gradient, solved the closer the nearer the optimum, all ``active`` problems at once."""
    norm = _norm(gradient)
    tolerance = norm * (norm / start).sqrt().clamp(max=0.5)
    direction, residual = torch.zeros_like(gradient), -gradient
    search = problem.precondition(residual)
    squared = _dot(residual, search)
    working = active.clone()
    for _ in range(MAX_PRODUCTS):
        product = problem.curvature(search)
        bend = _dot(search, product)
        working &= bend > 0
        length = torch.where(working, squared / bend, 0.0)[:, None, None]
        direction, residual = direction + length * search, residual - length * product
        better = problem.precondition(residual)
        before, squared = squared, _dot(residual, better)
        working &= _norm(residual) > tolerance
        if not working.any():
            break
        search = better + torch.where(before > 0, squared / before, 0.0)[:, None, None] * search
    return direction


def _step_length(problem: _Problem, weight, direction, objective, gradient, active) -> torch.Tensor:
    """Of 1, 1/2, 1/4, ... the first that decreases each objective as its slope promises; 0 where none does."""
    slope = _dot(gradient, direction)
    length, waiting = torch.where(active, 1.0, 0.0).to(objective), active & (slope < 0)
    length = torch.where(waiting, length, 0.0)
    for _ in range(MAX_HALVINGS):
        found = problem.value(weight + length[:, None, None] * direction)
        waiting &= ~(found <= objective + 1e-4 * length * slope)
        if not waiting.any():
            return length
        length = torch.where(waiting, length / 2, length)
    return torch.where(waiting, 0.0, length)
