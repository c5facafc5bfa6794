"""Penalties: numbers to make small that look at one set of features, or at weights, and at no second modality."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ._common import direction, need_tensor, squared_distances, wants_gradient, with_gradient
from ._features import readable
from .registry import register_penalty

# Points on the unit sphere nearer than this push each other apart as if they were this far apart.
NEAREST = 1e-4
# What is added to a distance before its logarithm is taken, so that duplicates have one.
EPSILON = 1e-8


@register_penalty("l1")
def l1(values: Tensor | Iterable[Tensor]) -> Tensor:
    """Mean absolute value: of features (n, p), or over all entries of several tensors, such as `model.parameters()`.

    -> scalar, float32 at least; differentiable, 0 having the slope 0. A mean, so that a weight on it means the same for
    any number of rows and any size of model; times the number of entries it is the sum. Raises ValueError for no entry.
    "Cross-modal alignment regularization" §4.4.4 compares with L1 and L2 without saying of what.
    """
    return _mean(values, torch.abs)


@register_penalty("l2")
def l2(values: Tensor | Iterable[Tensor]) -> Tensor:
    """Mean square: of features (n, p), or over all entries of several tensors. Else as `l1`."""
    return _mean(values, torch.square)


def _mean(values: Tensor | Iterable[Tensor], of: Callable[[Tensor], Tensor]) -> Tensor:
    if not isinstance(values, Iterable) or getattr(values, "ndim", 1) == 0:  # an array of no dimension is none to go through
        need_tensor("values", values)
    tensors = [values] if isinstance(values, Tensor) else list(values)
    for tensor in tensors:
        need_tensor("values", tensor, shape="(n, p), or several tensors of weights")
    count = sum(tensor.numel() for tensor in tensors)
    if count == 0:
        raise ValueError("a penalty needs at least one number: features of shape (n, p), or tensors of weights")
    value = torch.stack([of(_full(tensor)).sum() for tensor in tensors]).sum() / count
    if readable(value) and bool(value.detach().isinf()) and all(bool(tensor.isfinite().all()) for tensor in tensors):
        raise ValueError(f"the penalty lies beyond the range of {value.dtype}: give the values in another unit, or as float64")
    return value


def _full(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


@register_penalty("koleo")
def koleo(x: Tensor) -> Tensor:
    """Differential entropy, negated: minus the mean logarithm of each row's distance from the nearest other row.

    x: (n, p) -> scalar, rows scaled to length 1 first, so that it is independent of the unit. It falls as the rows spread
    over the sphere. Rows nearer than 1e-4 push each other as if they were that far apart, and exact duplicates along
    directions that their numbers decide: the gradient is finite and never lets them be. One row alone scores 0.

    Sablayrolles et al. 2019, "Spreading vectors for similarity search", eq. 2; rows of length 1 and the 1e-8 beside the
    distance as in DINOv2's code.
    """
    need_tensor("x", x)
    if x.ndim != 2 or 0 in x.shape or not x.is_floating_point():
        raise ValueError(f"koleo takes floating-point features of shape (n, p); got {tuple(x.shape)} of {x.dtype}")
    with torch.autocast(x.device.type, enabled=False):
        points = direction(_full(x))
        with torch.no_grad():
            value, gradient = _crowding(points)
        return with_gradient(value, (points, gradient if wants_gradient(points) else None))


def _crowding(points: Tensor) -> tuple[Tensor, Tensor]:
    """The value of `koleo` for points (n, p) of length 1, and its gradient."""
    n = len(points)
    if n == 1:
        return 0 * points.sum(), torch.zeros_like(points)
    distances = squared_distances(points, points)
    distances.fill_diagonal_(torch.inf)
    nearest = distances.argmin(-1)
    # By their difference: one matrix product for all distances is too coarse for the smallest.
    apart = points - points[nearest]
    distance = torch.linalg.vector_norm(apart, dim=-1, keepdim=True)
    value = -(distance + EPSILON).log().mean()
    # No direction is theirs: each row has one drawn for its number, and both of a pair move along the difference.
    drawn = torch.randn(points.shape, generator=torch.Generator().manual_seed(0)).to(points, non_blocking=True)
    away = torch.where(distance > 0, apart / distance, direction(drawn - drawn[nearest]))
    push = away / -(n * (distance + EPSILON).clamp_min(NEAREST))
    return value, push.index_add(0, nearest, push, alpha=-1)
