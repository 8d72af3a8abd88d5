"""Streamed normal equations and their ridge solution, with the penalty chosen by cross-validation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import ranks
from ..device import half_sums

#: Ridges to choose from, relative to the mean square of an input: half decades.
RIDGES = tuple(10 ** (power / 2) for power in range(-8, 5))
#: Where the first search for a ridge starts.
FIRST_RIDGE = 0.1
#: Cross-validation folds; from so many inputs on two, because each fold keeps inputs^2 float64 (134 MB at 4,096).
FOLDS, WIDE, WIDE_FOLDS = 4, 2048, 2
#: A Gram matrix is symmetric: of blocks of so many inputs, those left of the diagonal are not computed.
BLOCK = 384
#: Channels that LayerScale multiplies by less than this, relative to the largest, are left alone: their weights would
#: have to be as many times larger.
LEAST_SCALE = 1e-3


@dataclass(frozen=True)
class RidgeSolution:
    """Attributes:
    coefficients: float64 [input, output], the constant's row last where there is one; None: leave all at zero.
    ridge: Relative to the mean diagonal; None with no coefficients.
    explained: Share of the squared error that goes away in cross-validation.
    nearest: The ridge of least error in cross-validation, whether or not it helps: where a search that is likely to end
        there starts; None: there was none.
    """

    coefficients: Tensor | None = None
    ridge: float | None = None
    explained: float = 0.0
    nearest: float | None = None

    def to_json(self) -> dict[str, float | None]:
        return {"ridge": self.ridge, "explained": round(self.explained, 6)}


class NormalEquations:
    """Ridge regression from rows that come in chunks, with the ridge chosen by cross-validation in closed form.

    The equations of every fold are kept apart. From their sums follow the solution without a fold and its squared error
    on that fold, without another look at the rows.

    Args:
        inputs, outputs: Columns of both sides.
        folds: How many; one alone cannot be cross-validated, and :meth:`solve` then leaves everything at zero.
        bias: Whether to fit a constant too, which the ridge does not draw toward zero.
        half: Whether factors of products are rounded to bfloat16, see :func:`~vpruner.prune.device.half_sums`.

    Attributes:
        grams: float64 [fold, input, input]; before :meth:`solve`, right of the diagonal and in blocks along it.
        crosses: float64 [fold, input, output].
        squares: float64 [fold], of the targets.
    """

    def __init__(
        self, inputs: int, outputs: int, folds: int, *, bias: bool = True, device: Any = "cpu", half: bool = False
    ):
        # Apple's GPUs have no float64.
        device = "cpu" if torch.device(device).type == "mps" else device
        size = inputs + bias
        self.bias, self.half = bias, half
        self.grams = torch.zeros(folds, size, size, dtype=torch.float64, device=device)
        self.crosses = torch.zeros(folds, size, outputs, dtype=torch.float64, device=device)
        self.squares = torch.zeros(folds, dtype=torch.float64, device=device)

    def add(self, fold: int, inputs: Tensor, targets: Tensor, row_weights: Tensor | None = None) -> None:
        """Products are taken in the dtype of the rows, at least float32, and summed in float64.

        Args:
            inputs: [..., row, input].
            targets: [..., row, output].
            row_weights: [row] or [..., row]: how often each counts; None: once.
        """
        if inputs.dtype not in (torch.float32, torch.float64):
            inputs = inputs.float()
        targets = targets.to(inputs)
        counts = inputs.new_ones(inputs.shape[:-1]) if row_weights is None else row_weights.to(inputs)
        root = counts.expand(inputs.shape[:-1]).flatten().sqrt()[:, None]
        if self.half:  # The products round it too: no Gram matrix has a negative eigenvalue so.
            root = root.bfloat16().to(root)
        inputs, targets = inputs.flatten(0, -2), targets.flatten(0, -2) * root
        inputs = inputs if row_weights is None else inputs * root
        gram, cross, size = self.grams[fold], self.crosses[fold], inputs.shape[1]

        def add(sums: Tensor, product: Tensor) -> None:
            sums += product.to(sums.device)

        with half_sums(self.half):
            for start in range(0, size, BLOCK):
                some = slice(start, min(start + BLOCK, size))
                add(gram[some, start:size], inputs[:, some].T @ inputs[:, start:])
            both = inputs.T @ torch.cat([targets, root], 1)
            add(cross[:size], both[:, :-1])
            add(self.squares[fold], targets.square().sum())
            if self.bias:
                add(gram[:size, size], both[:, -1])
                add(gram[size, size], root.square().sum())
                add(cross[size], (root * targets).sum(0))

    def _complete(self) -> None:
        """Fill in what :meth:`add` leaves out below the diagonal."""
        for gram in self.grams:
            gram.triu_().add_(gram.triu(1).T)

    def sum_up(self) -> NormalEquations:
        """Add the rows of the other processes, once all have added their own."""
        self.grams, self.crosses, self.squares = ranks.summed(self.grams, self.crosses, self.squares)
        return self

    def solve(self, start: float = FIRST_RIDGE) -> RidgeSolution:
        """Walk downhill through :data:`RIDGES` from ``start``: the error over the ridge has one valley."""
        if len(self.grams) < 2:
            return RidgeSolution()
        self._complete()
        gram, cross, total = self.grams.sum(0), self.crosses.sum(0), float(self.squares.sum())
        errors: dict[int, float] = {}

        def error(at: int) -> float:
            if not 0 <= at < len(RIDGES):
                return math.inf
            if at not in errors:
                errors[at] = self._cross_validated_error(gram, cross, RIDGES[at])
            return errors[at]

        at = min(range(len(RIDGES)), key=lambda index: abs(math.log(RIDGES[index] / start)))
        while error(min((at - 1, at + 1), key=error)) < error(at):
            at = min((at - 1, at + 1), key=error)
        # Also refuses errors that are not numbers.
        if not error(at) < total:
            return RidgeSolution(nearest=RIDGES[at])
        coefficients = self._solved(gram, cross, RIDGES[at])
        if coefficients is None:
            return RidgeSolution()
        return RidgeSolution(coefficients, RIDGES[at], 1 - error(at) / total, RIDGES[at])

    def _cross_validated_error(self, gram: Tensor, cross: Tensor, ridge: float) -> float:
        error = 0.0
        # Processes share the folds: else every one would solve them all.
        folds = map(ranks.share, (self.grams, self.crosses, self.squares))
        for fold_gram, fold_cross, squares in zip(*folds, strict=True):
            coefficients = self._solved(gram - fold_gram, cross - fold_cross, ridge)
            if coefficients is None:
                error = math.inf
                break
            error += float(squares + (coefficients * (fold_gram @ coefficients - 2 * fold_cross)).sum())
        error = float(ranks.summed(torch.tensor(error, dtype=torch.float64))[0])
        return error if math.isfinite(error) else math.inf

    def _solved(self, gram: Tensor, cross: Tensor, ridge: float) -> Tensor | None:
        """Cholesky, not an eigendecomposition for all ridges at once: at 1,536 inputs one takes as long as eighty."""
        penalised = gram.diagonal()[: len(gram) - self.bias]
        regular = gram.clone()
        regular.diagonal()[: len(gram) - self.bias] += ridge * penalised.mean()
        factor, failed = torch.linalg.cholesky_ex(regular)
        if failed:
            return None
        coefficients = torch.cholesky_solve(cross, factor)
        return coefficients if torch.isfinite(coefficients).all() else None


def added(tensor: Tensor, update: Tensor) -> Tensor:
    """The sum in float64, rounded once to the tensor's dtype, on its device."""
    return (tensor.to(update.device).to(update.dtype) + update).to(tensor.dtype).to(tensor.device)


def unscaled(coefficients: Tensor, scale: Tensor | None) -> Tensor:
    """Change of the residual stream [..., output] -> change of the layer before LayerScale; 0 where that is tiny."""
    if scale is None:
        return coefficients
    scale = scale.to(coefficients)
    usable = scale.abs() > LEAST_SCALE * scale.abs().max()
    return torch.where(usable, coefficients / torch.where(usable, scale, 1), 0)
