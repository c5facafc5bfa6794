"""Do the same rows lie next to each other in two sets of features?"""

import torch
from torch import Tensor

from ._common import (
    counted,
    direction,
    full_precision,
    in_a_unit,
    one_if_zero,
    one_of,
    pair_gradient,
    positive,
    wants_gradient,
    with_gradient,
)
from ._features import centre, readable, squared_distances_within
from .registry import register_similarity

# Distances that differ by fewer roundings than this of the mean distance are tied.
ROUNDINGS = 16


@register_similarity("mutual-knn", differentiable=False, ranks_rows=True)
def mutual_knn(x: Tensor, y: Tensor, k: int = 10, distance: str = "cosine") -> Tensor:
    """The part of a row's k nearest neighbours in x that are among its k nearest in y, averaged over rows; 0 to 1.

    x: (..., n, p), y: (..., n, q) -> (...), rows paired. Not differentiable: a count has no slope, so the result has no
    graph and a loss refuses it; `soft_mutual_knn` has one. `distance` is "cosine" (rows scaled to length 1, as the
    paper does) or "euclidean". A row is no neighbour of itself. Rows tied for the last places, as duplicates are, share
    them: each counts in part, so that no order of the rows matters, equal features score 1, and features whose rows are
    all equal score chance, k / (n - 1). Independent of each side's unit and, "euclidean" only, of translations.

    Raises ValueError unless 1 <= k < n. Huh et al. 2024, "The platonic representation hypothesis", eq. 11.
    """
    with torch.no_grad(), full_precision(x, y, paired=True) as (x, y):
        _check(x, k, 1, distance)
        distances, mean = _apart((_points(x, distance), _points(y, distance)))
        return _shared(distances, mean, k).mean(-1) / k + 0 * mean.sum(0).squeeze((-2, -1))  # NaN where a distance is


@register_similarity("soft-mutual-knn", ranks_rows=True)
def soft_mutual_knn(x: Tensor, y: Tensor, k: int = 10, temperature: float = 0.02, distance: str = "cosine") -> Tensor:
    """`mutual_knn` with a soft border, differentiable in both; from 0 to 1.

    x: (..., n, p), y: (..., n, q) -> (...), rows paired. Row j is a neighbour of row i to the degree
    sigmoid((b_i - d_ij) / (temperature * m)): d is the squared distance, b_i lies half-way between the k-th and the next
    smallest of row i, m is the mean of all, detached. The score is the cosine of the two sides' degrees: 1 for equal
    features, and as the temperature goes to 0 the score of `mutual_knn` without ties. This form is ours.

    Raises ValueError unless 1 <= k < n - 1 and the temperature is positive.
    """
    positive(temperature=temperature)
    with full_precision(x, y, paired=True) as (x, y):
        _check(x, k, 2, distance)
        points = _points(x, distance), _points(y, distance)
        wanted = [wants_gradient(side) for side in points]
        with torch.no_grad():
            distances, mean = _apart(points)
            width = temperature * one_if_zero(mean)
            nearest = distances.topk(k + 1, largest=False)
            border, ends = nearest.values[..., -2:].mean(-1, keepdim=True), nearest.indices[..., -2:]
            degree = torch.sigmoid((border - distances) / width)
            own = degree.square().sum((-2, -1))
            both, root = degree.prod(0).sum((-2, -1)), own.sqrt().prod(0)

            def gradient(side: int) -> Tensor:
                share = (both / own[side])[..., None, None]
                slope = torch.addcmul(degree[1 - side], degree[side], share, value=-1) / root[..., None, None]
                weights = slope * (degree[side] * (degree[side] - 1) / width[side])
                # The border moves with the two rows that it lies between.
                moved = -weights.sum(-1, keepdim=True) / 2
                weights = weights.scatter_add(-1, ends[side], moved.expand_as(ends[side]))
                return pair_gradient(2 * (weights + weights.mT), points[side], points[side])

            gradients = [gradient(side) if want else None for side, want in enumerate(wanted)]
        return with_gradient(both / root, (points[0], gradients[0]), (points[1], gradients[1]))


def neighbour_shares(x: Tensor, k: int = 10, distance: str = "cosine") -> Tensor:
    """To what part each row of x (n, p) is among the k nearest of each row, (n, n), as `mutual_knn` counts it."""
    with torch.no_grad(), full_precision(x, x) as (x, _):
        _check(x, k, 1, distance)
        return _members(*_apart((_points(x, distance),)), k)[0]


def _check(x: Tensor, k: int, more: int, distance: str) -> None:
    """Raise ValueError unless there are k rows and some ``more``."""
    counted(k=k)
    n, least = x.shape[-2], k + more
    if n < least:
        raise ValueError(
            f"{k} nearest neighbours need at least {least} rows; got {n}: take a batch size of {least} or more, or a smaller k"
        )
    one_of("distance", distance, ("cosine", "euclidean"))


def _points(x: Tensor, distance: str) -> Tensor:
    """Rows whose Euclidean distances are the wanted ones."""
    return direction(x) if distance == "cosine" else in_a_unit(x)[0]


def _apart(points: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Squared distances (2, ..., n, n) within each side, a row infinitely far from itself; and their means (2, ..., 1, 1)."""
    distances, squares = squared_distances_within(tuple(map(centre, points)))
    distances.diagonal(dim1=-2, dim2=-1).fill_(torch.inf)
    return distances, squares.mean(-1)[..., None, None] * (2 / (1 - 1 / squares.shape[-1]))


def _shared(distances: Tensor, mean: Tensor, k: int) -> Tensor:
    """How many of each row's k nearest both sides have, (..., n).

    By index where no last place is tied, without another pass over the distances, and by share in the other rows. Many
    neighbours would make too many pairs of indices, and a device would wait for the answer which rows are tied.
    """
    if not readable(distances) or k * k > distances.shape[-1]:
        return _shares(distances, mean, k)
    nearest = distances.topk(k + 1, largest=False)
    of_x, of_y = nearest.indices[..., :k]
    shared: Tensor = (of_x[..., :, None] == of_y[..., None, :]).sum((-2, -1)).to(distances)
    gap = nearest.values[..., k] - nearest.values[..., k - 1]
    tied = (gap <= _slack(distances, mean)[..., 0]).any(0)
    if bool(tied.any()):
        of_tied = mean.expand_as(distances[..., :1])[:, tied]
        shared[tied] = _shares(distances[:, tied], of_tied, k)
    return shared


def _shares(distances: Tensor, mean: Tensor, k: int) -> Tensor:
    """:func:`_shared` from the shares of all rows, ties among them."""
    member = _members(distances, mean, k)
    return torch.minimum(member[0], member[1]).sum(-1)


def _slack(distances: Tensor, mean: Tensor) -> Tensor:
    """What equal distances, as those of equal rows, may differ by (2, ..., 1, 1): the rounding of a matrix product."""
    return ROUNDINGS * torch.finfo(distances.dtype).eps * mean


def _members(distances: Tensor, mean: Tensor, k: int) -> Tensor:
    """To what part each row is among the k nearest of each row, (..., n, n): 1, 0, or a share of the last places."""
    last = distances.topk(k, largest=False).values[..., -1:]
    slack = _slack(distances, mean)
    nearer = (distances < last - slack).to(distances)
    tied = (distances <= last + slack).to(distances).sub_(nearer)
    share = (k - nearer.sum(-1, keepdim=True)) / tied.sum(-1, keepdim=True)
    return nearer.addcmul_(tied, share)
