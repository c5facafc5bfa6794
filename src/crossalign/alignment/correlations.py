"""Canonical correlations and linear regression: how well does a linear map take one set of features to the other?

All of these look at nothing but the spaces that the centred features span. Below n = rank of x + rank of y two such
spaces meet by counting alone, so that unrelated features score 1: that is refused. Arithmetic is float64 inside, since
the covariance's condition is the square of the features'; ranks are numbers, so that the host waits for the device.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._common import full_precision, one_if_zero, one_of, wants_gradient, with_gradient
from ._features import ROUNDINGS, centre, nonconstant
from .registry import register_similarity

# Directions shorter than this part of the longest are no directions: rounding of float32 features reaches 1e-7.
RANK = 1e-6
# Cholesky's factor is used where no feature has less than this part of its variance to itself.
PIVOT = 1e-9
# Directions whose variances differ by less than this part of the largest are not told apart in a gradient.
GAP = 1e-9


@register_similarity("cca", centred=True)
def cca(x: Tensor, y: Tensor, summary: str = "mean", on_degenerate: str = "raise") -> Tensor:
    """Mean canonical correlation of two sets of features, from 0 to 1.

    x: (n, p), y: (n, q) -> scalar, rows paired; differentiable in both, also where correlations repeat. The mean is over
    as many correlations as the smaller rank. `summary` is "mean" for the mean of rho (as SVCCA's authors take it,
    Pillai's trace in some packages) or "mean_squared" for that of rho^2 (Yanai's measure). Independent of any
    invertible affine map of either side; features that repeat others change nothing.

    Raises ValueError where n <= rank of x + rank of y (`on_degenerate="warn"`: a warning), and where a side's rows are
    all equal. What is not finite gives NaN. Hotelling 1936, "Relations between two sets of variates".
    """
    one_of("summary", summary, ("mean", "mean_squared"))
    return _scored("cca", x, y, on_degenerate, _spanned, partial(_correlation, squared=summary == "mean_squared"))


@register_similarity("svcca", centred=True)
def svcca(x: Tensor, y: Tensor, variance: float = 0.99, summary: str = "mean", on_degenerate: str = "raise") -> Tensor:
    """Mean canonical correlation of the leading principal directions, which hold `variance` of each side's variance.

    x: (n, p), y: (n, q) -> scalar from 0 to 1, rows paired; differentiable in both with the number of directions held
    fixed, through their turning too. As few directions are kept as hold at least that part of the sum of the squared
    singular values. `summary` is that of `cca`. Independent of each side's unit, rotations and translations.

    Raises ValueError where n <= directions kept of x + of y (`on_degenerate="warn"`: a warning), and where a side's rows
    are all equal. What is not finite gives NaN. Raghu et al. 2017, "SVCCA", section 2; "Cross-modal alignment
    regularization" A.7.
    """
    one_of("summary", summary, ("mean", "mean_squared"))
    if not 0 < variance <= 1:
        raise ValueError(f"variance is a part of the whole, above 0 and at most 1; got {variance}")

    def leading(x: _Rows, y: _Rows) -> tuple[_Basis, _Basis]:
        return _principal(x, variance), _principal(y, variance)

    score = partial(_correlation, squared=summary == "mean_squared")
    return _scored("svcca", x, y, on_degenerate, leading, score, standard=False)


@register_similarity("pwcca", centred=True)
def pwcca(x: Tensor, y: Tensor, weight_by: str | None = None, on_degenerate: str = "raise") -> Tensor:
    """Canonical correlations, each weighted by how much of one side's features lies along its direction.

    x: (n, p), y: (n, q) -> scalar from 0 to 1, rows paired. The weight of direction h is sum_j |<h, feature j>|, over
    the features of the side `weight_by`, "x" or "y"; by default the side of lower rank, x if equal. Differentiable in
    both with the weights held fixed: where correlations repeat, their directions and so the weights have no derivative.
    Independent of each side's unit and of translations.

    Raises ValueError where n <= rank of x + rank of y (`on_degenerate="warn"`: a warning), and where a side's rows are
    all equal. What is not finite gives NaN. Morcos et al. 2018, "Insights on representational similarity in neural
    networks with canonical correlation", eq. 3.
    """
    if weight_by is not None:
        one_of("weight_by", weight_by, ("x", "y"))
    return _scored("pwcca", x, y, on_degenerate, _spanned, partial(_weighted_correlation, weight_by=weight_by))


@register_similarity("linear-regression", centred=True)
def linear_regression(x: Tensor, y: Tensor, average: str = "uniform", on_degenerate: str = "raise") -> Tensor:
    """R^2 of predicting y from x by least squares with an intercept, from 0 to 1; not symmetric.

    x: (n, p), y: (n, q) -> scalar, rows paired; differentiable in both. `average` is over the features of y: "uniform"
    counts each the same, those without variance left out; "variance" counts each by its variance. It is scored on the
    rows that it was fitted to. Independent of any invertible affine map of x and of y's unit.

    Raises ValueError where n <= rank of x + rank of y (`on_degenerate="warn"`: a warning), and where a side's rows are
    all equal. What is not finite gives NaN. "Cross-modal alignment regularization" A.7, "average R^2": uniform.
    """
    one_of("average", average, ("uniform", "variance"))

    def predicting(x: _Rows, y: _Rows) -> tuple[_Basis, _Rows]:
        basis, rank = _spanning(x), min(y.rows.shape)
        if basis.rank + rank >= len(x.rows):
            # Only here does it matter whether some features of y repeat others.
            rank = _principal(y, 1.0).rank
        return basis, y._replace(rank=rank)

    score = partial(_explained, uniform=average == "uniform")
    return _scored("linear_regression", x, y, on_degenerate, predicting, score)


def _scored(
    name: str,
    x: Tensor,
    y: Tensor,
    on_degenerate: str,
    bases: Callable[[_Rows, _Rows], tuple[_Basis, Any]],
    score: Callable[[Tensor, Tensor, _Basis, Any], Tensor],
    standard: bool = True,
) -> Tensor:
    """A score of both sides' bases, of more rows than both ranks together; NaN with NaN gradients where one is not finite.

    What is not finite must not become a number, nor an error in a solver.
    """
    one_of("on_degenerate", on_degenerate, ("raise", "warn"))
    with full_precision(x, y, paired=True) as (x, y):
        sides = _sides(name, x, y, standard)
        if sides is None:
            pairs = [(side, torch.full_like(side, torch.nan) if wants_gradient(side) else None) for side in (x, y)]
            return with_gradient(x.new_full((), torch.nan), *pairs)
        left, right = bases(*sides)
        if len(x) <= left.rank + right.rank:
            message = (
                f"{name} of {len(x)} rows with ranks {left.rank} and {right.rank} is high for unrelated features too, 1 where "
                "the ranks fill the rows: it needs more rows than both ranks together; take a larger batch of pairs, or fewer "
                "directions of each side first, or 'cka-linear-debiased' (cka with debiased=True)"
            )
            if on_degenerate == "raise":
                raise ValueError(message)
            warnings.warn(message, stacklevel=3)
        return score(x, y, left, right)


class _Rows(NamedTuple):
    """Centred features in float64, rows (n, p); the features are unit (1, 1) or (1, p) times these."""

    rows: Tensor
    unit: Tensor
    rank: int = 0
    """Number of independent columns; 0 where nobody counted them."""


class _Basis(NamedTuple):
    """Orthonormal columns rows @ turn (n, r) that span the features, or their leading directions.

    turn is (p, r), and loads (p, r) are the products of the features with those columns. Of principal directions,
    `dropped` (p, k) are those left out, and `gaps` (k, r) one over the differences of the kept variances and theirs.
    """

    rows: Tensor
    unit: Tensor
    turn: Tensor
    loads: Tensor
    dropped: Tensor | None = None
    gaps: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.turn.shape[1]


@torch.no_grad()
def _sides(name: str, x: Tensor, y: Tensor, standard: bool) -> tuple[_Rows, _Rows] | None:
    """Both sides centred, with columns of length 1 if `standard`; None where one is not finite."""
    if x.ndim != 2 or y.ndim != 2:
        raise ValueError(f"{name} takes features of shapes (n, p) and (n, q); got {tuple(x.shape)} and {tuple(y.shape)}")
    centred = [centre(side.double()) for side in (x, y)]
    squares = nonconstant(name, torch.stack([rows.square().sum() for rows in centred]), x, y)
    if not bool(squares.isfinite().all()):
        return None
    sides = []
    for features, rows, square in zip((x, y), centred, squares, strict=True):
        unit = square.sqrt().expand(1, 1)
        rows.div_(unit)
        if standard:
            length = torch.linalg.vector_norm(rows, dim=0, keepdim=True)
            least = ROUNDINGS * torch.finfo(features.dtype).eps * torch.linalg.vector_norm(features, dim=0, keepdim=True)
            # A column that is constant up to rounding has no direction: as zeros it is left out.
            rows, length = rows * (length * unit > least), one_if_zero(length)
            rows, unit = rows.div_(length), unit * length
        sides.append(_Rows(rows, unit))
    return sides[0], sides[1]


@torch.no_grad()
def _spanning(side: _Rows) -> _Basis:
    """A basis of the space that the features span."""
    n, p = side.rows.shape
    if n > p:
        factor, failed = torch.linalg.cholesky_ex(side.rows.mT @ side.rows)
        # The square on the diagonal is what a feature has to itself, of its variance 1, beside those before it.
        if not bool(failed) and bool((factor.diagonal() ** 2 > PIVOT).all()):
            turn = torch.linalg.solve_triangular(factor.mT, torch.eye(p, dtype=factor.dtype, device=factor.device), upper=True)
            return _Basis(side.rows, side.unit, turn, factor)
    return _principal(side, 1.0)


def _spanned(x: _Rows, y: _Rows) -> tuple[_Basis, _Basis]:
    return _spanning(x), _spanning(y)


@torch.no_grad()
def _principal(side: _Rows, variance: float) -> _Basis:
    """The leading principal directions, as few as hold that part of the variance; all that there are for 1."""
    rows = side.rows
    wide = rows.shape[1] > rows.shape[0]
    values, vectors = torch.linalg.eigh(rows @ rows.mT if wide else rows.mT @ rows)
    values, vectors = values.flip(-1), vectors.flip(-1)
    rank = int((values > RANK**2 * values[0]).sum())
    share = values[:rank].cumsum(0) / values[:rank].sum()
    leading = rank if variance == 1 else min(int((share < variance).sum()) + 1, rank)
    root = values[:rank].sqrt()
    if wide:
        vectors = rows.mT @ vectors[:, :rank] / root
    turn, loads = vectors[:, :leading] / root[:leading], vectors[:, :leading] * root[:leading]
    if leading == rank:
        return _Basis(rows, side.unit, turn, loads)
    rest = values[leading : vectors.shape[1]].clamp_min(0)
    gaps = values[:leading] - rest[:, None]
    # Equal variances on both sides of the cut: which of them is kept is arbitrary, and has no derivative.
    gaps = torch.where(gaps > GAP * values[0], 1 / gaps, 0.0)
    return _Basis(rows, side.unit, turn, loads, vectors[:, leading:], gaps)


def _correlation(x: Tensor, y: Tensor, left: _Basis, right: _Basis, squared: bool) -> Tensor:
    """The mean of the correlations of two bases, or of their squares."""
    graph = wants_gradient(x) or wants_gradient(y)
    with torch.no_grad():
        cross = left.rows.mT @ right.rows
        # The singular values of the products (r, s) of the bases' vectors are the correlations.
        overlap, count = left.turn.mT @ cross @ right.turn, min(left.rank, right.rank)
        if squared:
            value, slope = overlap.square().sum() / count, 2 * overlap / count
        elif not graph:
            value, slope = torch.linalg.svdvals(overlap).sum() / count, overlap
        else:
            # The gradient of the sum of the singular values is U V': the same whichever vectors stand for repeated ones.
            u, values, v = torch.linalg.svd(overlap, full_matrices=False)
            value, slope = values.sum() / count, u @ v / count
    return _attach(x, y, left, right, cross, overlap, value, slope)


def _weighted_correlation(x: Tensor, y: Tensor, left: _Basis, right: _Basis, weight_by: str | None) -> Tensor:
    by_x = weight_by == "x" or (weight_by is None and left.rank <= right.rank)
    with torch.no_grad():
        cross = left.rows.mT @ right.rows
        overlap = left.turn.mT @ cross @ right.turn
        u, values, v = torch.linalg.svd(overlap, full_matrices=False)
        side, directions = (left, u) if by_x else (right, v.mT)
        weights = (side.unit.mT * (side.loads @ directions)).abs().sum(0)
        weights = weights / weights.sum()
        value, slope = (weights * values).sum(), (u * weights) @ v
    return _attach(x, y, left, right, cross, overlap, value, slope)


def _attach(
    x: Tensor, y: Tensor, left: _Basis, right: _Basis, cross: Tensor, overlap: Tensor, value: Tensor, slope: Tensor
) -> Tensor:
    """The value in the input's type, with the gradients that follow from its slope (r, s) in the overlap."""
    for_x, for_y = wants_gradient(x), wants_gradient(y)
    with torch.no_grad():
        gradient_x = gradient_y = None
        if for_x:
            gradient_x = _pull(left, right.rows, right.turn, cross, overlap, slope).to(x.dtype)
        if for_y:
            gradient_y = _pull(right, left.rows, left.turn, cross.mT, overlap.mT, slope.mT).to(y.dtype)
    return with_gradient(value.to(x.dtype), (x, gradient_x), (y, gradient_y))


def _pull(basis: _Basis, rows: Tensor, turn: Tensor | None, cross: Tensor, overlap: Tensor, slope: Tensor) -> Tensor:
    """The gradient (n, p) in the features of a basis, from a slope (r, s) in its overlap with rows @ turn (n, s).

    A change of the features counts by what lies outside the space that they span: within it the basis only turns, which
    leaves the score as it is. Principal directions also turn towards those left out, by perturbation theory.
    """
    step = slope.mT @ basis.turn.mT
    within = -basis.turn @ (overlap @ step)
    if basis.dropped is not None and basis.gaps is not None and turn is not None:
        tilt = (basis.dropped.mT @ (cross @ (turn @ slope.mT))) * basis.gaps
        lean = basis.dropped @ (tilt @ basis.turn.mT)
        within = within + lean + lean.mT
    across = step if turn is None else turn @ step
    return (rows @ across + basis.rows @ within) / basis.unit


def _explained(x: Tensor, y: Tensor, basis: _Basis, target: _Rows, uniform: bool) -> Tensor:
    """The part of the variance of each column of the target that the basis holds, averaged."""
    for_x, for_y = wants_gradient(x), wants_gradient(y)
    with torch.no_grad():
        cross = basis.rows.mT @ target.rows
        overlap = basis.turn.mT @ cross
        parts, length = overlap.square().sum(0), target.rows.square().sum(0)
        weights = length if uniform else length * target.unit[0] ** 2
        weights = weights / weights.sum()
        value = (weights * parts).sum()
        gradient_x = gradient_y = None
        if for_x:
            gradient_x = _pull(basis, target.rows, None, cross, overlap, 2 * overlap * weights).to(x.dtype)
        if for_y:
            fitted = basis.rows @ (basis.turn @ overlap)
            gradient_y = (fitted - target.rows * (parts if uniform else value)) * (2 * weights / target.unit)
            gradient_y = gradient_y.to(y.dtype)
    return with_gradient(value.to(x.dtype), (x, gradient_x), (y, gradient_y))
