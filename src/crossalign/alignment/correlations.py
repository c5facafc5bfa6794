"""Canonical correlations and linear regression: how well does a linear map take one set of features to the other?

All of these look at nothing but the spaces that the centred features span. Below n = rank of x + rank of y two such
spaces meet by counting alone, so that unrelated features score 1: that is refused. Arithmetic is float64 inside, since
the covariance's condition is the square of the features'.

On the CPU ranks are numbers, and bases as narrow as these. Elsewhere, where the host would wait for them, bases are as wide
as they could be, with zeros for the directions that are not there, and what would be refused is NaN. (Torch's own eigen- and
singular-value solvers wait for CUDA all the same.)
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._common import full_precision, in_a_unit, one_if_zero, one_of, positive, wants_gradient, with_gradient
from ._features import ROUNDINGS, centre, nonconstant, readable
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
    positive(variance=variance)
    if variance > 1:
        raise ValueError(f"variance is a part of the whole, above 0 and at most 1; got {variance}")

    def leading(x: _Rows, y: _Rows) -> tuple[_Basis, _Basis]:
        return _principal(x, variance), _principal(y, variance)

    score = partial(_correlation, squared=summary == "mean_squared")
    return _scored("svcca", x, y, on_degenerate, leading, score, standard=False)


@register_similarity("pwcca", centred=True)
def pwcca(
    x: Tensor, y: Tensor, weight_by: str | None = None, on_degenerate: str = "raise", fixed_weights: bool = False
) -> Tensor:
    """Canonical correlations, each weighted by how much of one side's features lies along its direction.

    x: (n, p), y: (n, q) -> scalar from 0 to 1, rows paired. The weight of direction h is sum_j |<h, feature j>|, over
    the features of the side `weight_by`, "x" or "y"; by default the side of lower rank, x if equal. Differentiable in
    both, the weights too; where correlations repeat, their directions have no derivative among themselves, and none is
    taken. With `fixed_weights` ("pwcca-fixed") the gradient is that of the correlations alone, for any correlations.
    Independent of each side's unit and of translations.

    Raises ValueError where n <= rank of x + rank of y (`on_degenerate="warn"`: a warning), and where a side's rows are
    all equal. What is not finite gives NaN. Morcos et al. 2018, "Insights on representational similarity in neural
    networks with canonical correlation", eq. 3.
    """
    if weight_by is not None:
        one_of("weight_by", weight_by, ("x", "y"))
    score = partial(_weighted_correlation, weight_by=weight_by, fixed=fixed_weights)
    return _scored("pwcca", x, y, on_degenerate, _spanned, score)


register_similarity("pwcca-fixed", centred=True)(partial(pwcca, fixed_weights=True))


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
        basis = _spanning(x)
        rank: int | Tensor = min(y.rows.shape)
        largest = basis.rank if isinstance(basis.rank, int) else min(x.rows.shape)
        if largest + rank >= len(x.rows):
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
        x, y = in_a_unit(x)[0], in_a_unit(y)[0]
        sides = _sides(name, x, y, standard)
        if sides is None:
            pairs = [(side, torch.full_like(side, torch.nan) if wants_gradient(side) else None) for side in (x, y)]
            return with_gradient(x.new_full((), torch.nan), *pairs)
        left, right = bases(*sides)
        few = len(x) <= left.rank + right.rank
        if isinstance(few, Tensor):
            bad = ~torch.isfinite(torch.stack([side.unit.sum() for side in sides])).all()
            bad = bad | few if on_degenerate == "raise" else bad
            return score(x, y, left, right) * torch.where(bad, torch.nan, 1.0).to(x.dtype)
        if few:
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
    rank: int | Tensor = 0
    """Number of independent columns; 0 where nobody counted them."""


class _Basis(NamedTuple):
    """Orthonormal columns rows @ turn (n, r) that span the features, or their leading directions.

    turn is (p, r), and loads (p, r) are the products of the features with those columns; the first `rank` of them count,
    and the others, where there are any, are zero. Of principal directions, `dropped` (p, k) are those left out, and `gaps`
    (k, r) one over the differences of the kept variances and theirs.
    """

    rows: Tensor
    unit: Tensor
    turn: Tensor
    loads: Tensor
    rank: int | Tensor
    dropped: Tensor | None = None
    gaps: Tensor | None = None


def _count(mask: Tensor) -> int | Tensor:
    """How many are true: a number, unless the host would wait for it."""
    return int(mask.sum()) if readable(mask) else mask.sum()


def _smaller(a: int | Tensor, b: int | Tensor) -> Any:
    return min(a, b) if isinstance(a, int) and isinstance(b, int) else torch.minimum(torch.as_tensor(a), torch.as_tensor(b))


@torch.no_grad()
def _sides(name: str, x: Tensor, y: Tensor, standard: bool) -> tuple[_Rows, _Rows] | None:
    """Both sides centred, with columns of length 1 if `standard`; None where one is not finite, or its unit NaN."""
    if x.ndim != 2 or y.ndim != 2:
        raise ValueError(f"{name} takes features of shapes (n, p) and (n, q); got {tuple(x.shape)} and {tuple(y.shape)}")
    centred = [centre(side.double()) for side in (x, y)]
    squares = nonconstant(name, torch.stack([rows.square().sum() for rows in centred]), x, y)
    finite = squares.isfinite()
    if readable(finite) and not bool(finite.all()):
        return None
    sides = []
    for features, rows, square in zip((x, y), centred, squares, strict=True):
        unit = square.sqrt().expand(1, 1)
        rows.div_(unit)
        if not readable(square):  # the solvers refuse what is not finite
            rows, unit = torch.where(square.isfinite(), rows, 0.0), torch.where(square.isfinite(), unit, torch.nan)
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
    if n > p and readable(side.rows):
        factor, failed = torch.linalg.cholesky_ex(side.rows.mT @ side.rows)
        # The square on the diagonal is what a feature has to itself, of its variance 1, beside those before it.
        if not bool(failed) and bool((factor.diagonal() ** 2 > PIVOT).all()):
            turn = torch.linalg.solve_triangular(factor.mT, torch.eye(p, dtype=factor.dtype, device=factor.device), upper=True)
            return _Basis(side.rows, side.unit, turn, factor, p)
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
    there = values > RANK**2 * values[0]
    rank = _count(there)
    if isinstance(rank, int):
        there = there[:rank]
    spread = torch.where(there, values[: len(there)], 0.0)
    share = spread.cumsum(0) / spread.sum()
    leading = rank if variance == 1 else _smaller(_count(share < variance) + 1, rank)
    width = leading if isinstance(leading, int) else len(values)
    kept = torch.arange(width, device=rows.device) < leading
    if wide:
        vectors = rows.mT @ vectors[:, : len(there)] / torch.where(there, spread, 1.0).sqrt() * there
    root, chosen = torch.where(kept, values[:width], 1.0).sqrt(), vectors[:, :width] * kept
    turn, loads = chosen / root, chosen * root
    if variance == 1 or (isinstance(rank, int) and leading == rank):
        return _Basis(rows, side.unit, turn, loads, leading)
    first = leading if isinstance(leading, int) else 0
    left_out = (torch.arange(first, vectors.shape[1], device=rows.device) >= leading) & (torch.as_tensor(leading) < rank)
    gaps = values[:width] - values[first : vectors.shape[1], None].clamp_min(0)
    # Equal variances on both sides of the cut: which of them is kept is arbitrary, and has no derivative.
    gaps = torch.where((gaps > GAP * values[0]) & left_out[:, None] & kept, 1 / gaps, 0.0)
    return _Basis(rows, side.unit, turn, loads, leading, vectors[:, first:], gaps)


def _correlation(x: Tensor, y: Tensor, left: _Basis, right: _Basis, squared: bool) -> Tensor:
    """The mean of the correlations of two bases, or of their squares."""
    graph = wants_gradient(x) or wants_gradient(y)
    with torch.no_grad():
        cross = left.rows.mT @ right.rows
        # The singular values of the products (r, s) of the bases' vectors are the correlations.
        overlap, count = left.turn.mT @ cross @ right.turn, _smaller(left.rank, right.rank)
        if squared:
            value, slope = overlap.square().sum() / count, 2 * overlap / count
        elif not graph:
            value, slope = torch.linalg.svdvals(overlap).sum() / count, overlap
        else:
            # The gradient of the sum of the singular values is U V': the same whichever vectors stand for repeated ones.
            u, values, v = torch.linalg.svd(overlap, full_matrices=False)
            value, slope = values.sum() / count, u @ v / count
    return _attach(x, y, left, right, cross, overlap, value, slope)


def _weighted_correlation(x: Tensor, y: Tensor, left: _Basis, right: _Basis, weight_by: str | None, fixed: bool) -> Tensor:
    """The mean of the correlations of two bases, weighted by the features of one side."""
    with torch.no_grad():
        cross = left.rows.mT @ right.rows
        overlap = left.turn.mT @ cross @ right.turn
        u, values, v = torch.linalg.svd(overlap, full_matrices=False)
        live = torch.arange(len(values), device=values.device) < _smaller(left.rank, right.rank)
        by_x = left.rank <= right.rank if weight_by is None else weight_by == "x"
        if isinstance(by_x, Tensor):  # nobody knows which it is
            of_x, of_y = _weighted(left, u, values, v, live, fixed), _weighted(right, v.mT, values, u.mT, live, fixed)
            value, slope = torch.where(by_x, of_x.value, of_y.value), torch.where(by_x, of_x.slope, of_y.slope.mT)
            moved = (of_x.moved * by_x, of_y.moved * ~by_x)
        elif by_x:
            value, slope, of_weights = _weighted(left, u, values, v, live, fixed)
            moved = (of_weights, torch.zeros_like(right.rows))
        else:
            value, slope, of_weights = _weighted(right, v.mT, values, u.mT, live, fixed)
            slope, moved = slope.mT, (torch.zeros_like(left.rows), of_weights)
    return _attach(x, y, left, right, cross, overlap, value, slope, moved)


class _Weighted(NamedTuple):
    """A score, its slope (r, s) in the overlap, and its gradient (n, p) through what the features weigh along directions."""

    value: Tensor
    slope: Tensor
    moved: Tensor


def _weighted(side: _Basis, own: Tensor, values: Tensor, others: Tensor, live: Tensor, fixed: bool) -> _Weighted:
    """Correlations (k,), of which those that are `live` count, weighted by the features of the `side` with directions
    `own` (r, k), where the other side has `others` (k, s); own * values @ others is the overlap."""
    loads = side.unit.mT * side.loads
    along = loads @ own
    weights = along.abs().sum(0) * live
    total = weights.sum()
    weights = weights / total
    value, slope = (weights * values).sum(), (own * weights) @ others
    if fixed:
        return _Weighted(value, slope, torch.zeros_like(side.rows))
    pull = along.sign() * ((values - value) * live / total)
    # The directions are singular vectors: each turns towards the others by one over the difference of their squared
    # correlations, and towards what is left of the side by one over its own.
    turned = loads.mT @ pull
    squares = values.square()
    among, apart = own.mT @ turned, squares - squares[:, None]
    among = torch.where(apart.abs() > GAP, among / apart, 0.0)
    beyond = torch.where(squares > GAP, (turned - own @ (own.mT @ turned)) / values, 0.0)
    slope = slope + (own @ ((among + among.mT) * values) + beyond) @ others
    return _Weighted(value, slope, side.rows @ (side.turn @ (own @ pull.mT)))


def _attach(
    x: Tensor,
    y: Tensor,
    left: _Basis,
    right: _Basis,
    cross: Tensor,
    overlap: Tensor,
    value: Tensor,
    slope: Tensor,
    moved: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The value in the input's type, with the gradients that follow from its slope (r, s) in the overlap, and those `moved`
    (n, p) and (n, q) that have another cause."""
    for_x, for_y = wants_gradient(x), wants_gradient(y)
    with torch.no_grad():
        gradient_x = gradient_y = None
        if for_x:
            gradient_x = _pull(left, right.rows, right.turn, cross, overlap, slope)
            gradient_x = (gradient_x if moved is None else gradient_x + moved[0]).to(x.dtype)
        if for_y:
            gradient_y = _pull(right, left.rows, left.turn, cross.mT, overlap.mT, slope.mT)
            gradient_y = (gradient_y if moved is None else gradient_y + moved[1]).to(y.dtype)
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
