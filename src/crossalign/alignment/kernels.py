"""Centred kernel alignment: do two sets of features find the same points alike?"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ._common import full_precision, in_a_unit, need_points, one_if_zero, one_of, positive, wants_gradient, with_gradient
from ._features import centre, nonconstant, refuse, squared_distances_within
from .registry import Similarity, register_similarity

Pair = tuple[Tensor, Tensor]
Gradients = list[Tensor | None]


def cka(
    x: Tensor,
    y: Tensor,
    kernel: str = "linear",
    debiased: bool = False,
    bandwidth: str | float | Tensor = "median",
) -> Tensor:
    """Centred kernel alignment, HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)): 1 for equal kernels up to a factor.

    x: (..., n, p), y: (..., n, q) -> (...), rows paired. Differentiable in both. `kernel` is "linear" or "rbf", the
    latter exp(-d^2 / (2 s^2)) with s the `bandwidth`: the "median" of the distances of different rows, of each side its
    own and detached (of an even number the lower middle one, as torch has it; their root mean square where it is zero),
    or a number for both sides. Independent of each side's unit, unless the bandwidth is a number, and of rotations and
    translations.

    Biased (the V-statistic, from 0 to 1), n rows of unrelated features in many dimensions score near 1 unless n is far
    larger than p and q. `debiased` takes the U-statistic in numerator and denominator: unrelated features score 0 on
    average whatever n is, single values may be negative (nothing is clamped), and equal features still score 1.

    Raises ValueError for fewer than 3 rows, since two always score 1 (4 if debiased), a bandwidth that is not above 0 and,
    on the CPU, for a side whose rows are all equal, or equal beside the bandwidth; elsewhere the result is NaN then.
    Kornblith et al. 2019, "Similarity of neural network representations revisited", eq. 4; Song et al. 2012, "Feature
    selection via dependence maximization", eq. 5.
    "Cross-modal alignment regularization" §4 and A.7.
    """
    one_of("kernel", kernel, ("linear", "rbf"))
    if not isinstance(bandwidth, str):
        positive(bandwidth=bandwidth)
    elif bandwidth != "median":
        raise ValueError(f"unknown bandwidth '{bandwidth}' for cka: use 'median' or a number")
    with full_precision(x, y, paired=True) as (x, y):
        need_points("debiased cka" if debiased else "cka", 4 if debiased else 3, x, y)
        (x, unit_x), (y, unit_y) = in_a_unit(x), in_a_unit(y)
        if kernel == "linear":
            return _linear(x, y, centred=True, debiased=debiased)
        return _rbf(x, y, debiased, bandwidth, (unit_x, unit_y))


for _kernel in ("linear", "rbf"):
    register_similarity(f"cka-{_kernel}", centred=True)(partial(cka, kernel=_kernel))
    register_similarity(f"cka-{_kernel}-debiased", centred=True, comparable_across_batch_sizes=True)(
        partial(cka, kernel=_kernel, debiased=True)
    )
cast(Similarity, cka).centred = True  # it has no name of its own, but is given as a function too


@register_similarity("kernel-alignment")
def kernel_alignment(x: Tensor, y: Tensor) -> Tensor:
    """Alignment of the linear kernels without centring: <K, L> / (|K| |L|), K = x x^T and L = y y^T.

    x: (..., n, p), y: (..., n, q) -> (...), from 0 to 1, rows paired. Differentiable in both; independent of each
    side's unit and of rotations, but not of translations: a mean far from zero outweighs all else and the score nears 1.
    So it is no measure of alignment; it is what is defined where all rows of y are one vector, as they are when every
    text is pulled towards the mean image.

    Zero features raise ValueError on the CPU and give NaN elsewhere. Cristianini et al. 2001, "On kernel-target
    alignment", definition 1.
    """
    with full_precision(x, y, paired=True) as (x, y):
        return _linear(in_a_unit(x)[0], in_a_unit(y)[0], centred=False, debiased=False)


def kernel_matrix(x: Tensor, kernel: str = "linear") -> Tensor:
    """The kernel (n, n) that `cka` ("linear" or "rbf") or `kernel_alignment` ("plain", not centred) makes of x (n, p).

    Scaled so that its squares have the mean 1, since no score depends on the scale. Not differentiable.
    """
    with torch.no_grad(), full_precision(x, x) as (x, _):
        x = in_a_unit(x)[0]
        if kernel == "plain":
            matrix = x @ x.mT
        elif kernel == "linear":
            nonconstant("cka", centre(x).square().sum((-2, -1)).expand(2), x, x)
            matrix = centre(x) @ centre(x).mT
        else:
            distances, squares = squared_distances_within((centre(x),))
            size = nonconstant("cka", squares.sum(-1).expand(2), x, x)
            matrix = distances.div_(-2 * _median_width(distances, size[:1])[..., None, None]).exp_()[0]
        matrix.div_(one_if_zero(torch.linalg.vector_norm(matrix, torch.inf)))  # first, so that no square over- or underflows
        scale = matrix.square().mean().sqrt()
        refuse(scale == 0, "kernel_alignment is 0 / 0 where all of a side is zero: x or y is")
        return matrix.div_(scale)


def unit_kernel(matrix: Tensor, debiased: bool, centred: bool = True) -> Tensor:
    """A kernel (n, n) centred and of length 1: the score of two sides is the sum of the products of two such matrices.

    `debiased` takes the diagonal off and centres so that the sum of products is the U-statistic of `cka` (Székely and Rizzo
    2014, "Partial distance correlation with methods for dissimilarities", eq. 3.2). The order of the rows may change later.
    """
    matrix = matrix.clone()
    if centred:
        _centre_kernels(matrix, debiased)
    own = matrix.square().sum()
    if debiased:
        own = _nonzero(own, torch.finfo(own.dtype).eps * matrix.shape[-1])
    return matrix / own.sqrt()


class _Ratio(NamedTuple):
    """<K, L> / (|K| |L|), with the two denominators that its gradients need: <K, K>, <L, L> (2, ...) and |K| |L| (...)."""

    cross: Tensor
    own: Tensor
    root: Tensor

    @classmethod
    def of(cls, cross: Tensor, own: Tensor) -> _Ratio:
        return cls(cross, own, own.sqrt().prod(0))

    def value(self) -> Tensor:
        return self.cross / self.root

    def share(self, side: int) -> Tensor:
        """<K, L> over <K, K> or <L, L>, (..., 1, 1): how much of the one kernel's slope the other's takes back."""
        return (self.cross / self.own[side])[..., None, None]


def _linear(x: Tensor, y: Tensor, centred: bool, debiased: bool) -> Tensor:
    """The ratio for linear kernels, from products of the features or of the rows, whichever takes fewer multiplications.

    It has no unit: it is computed for sides of size 1, and their sizes count as constants in the gradients.
    """
    wanted = (wants_gradient(x), wants_gradient(y))
    with torch.no_grad():
        rows = (centre(x), centre(y)) if centred else (x, y)
        n, p, q = *x.shape[-2:], y.shape[-1]
        by_features = p * p + q * q + p * q + (wanted[0] * p + wanted[1] * q) * (p + q)
        by_rows = n * (p + q + wanted[0] * p + wanted[1] * q)
        form = _of_features if by_features < by_rows else _of_rows
        value, gradients = form(rows, (x, y), centred, debiased, wanted)
    return with_gradient(value, (x, gradients[0]), (y, gradients[1]))


def _of_rows(rows: Pair, raw: Pair, centred: bool, debiased: bool, wanted: tuple[bool, bool]) -> tuple[Tensor, Gradients]:
    """From K = XX' and L = YY', both (..., n, n)."""
    kernels = [side @ side.mT for side in rows]
    size = _squared_size(kernels, raw, centred)
    for kernel, square in zip(kernels, size, strict=True):
        kernel.div_(square[..., None, None])
    diagonals = torch.stack([kernel.diagonal(dim1=-2, dim2=-1) for kernel in kernels]) if debiased else None
    own = torch.stack([kernel.square().sum((-2, -1)) for kernel in kernels])
    ratio = _debiased((kernels[0] * kernels[1]).sum((-2, -1)), own, diagonals)

    def gradient(side: int) -> Tensor:
        slope = torch.addcmul(kernels[1 - side], kernels[side], ratio.share(side), value=-1)
        if diagonals is not None:
            slope.diagonal(dim1=-2, dim2=-1).add_(_diagonal_slope(diagonals, ratio, side))
            # The kernel is one of centred features: this is the part of the gradient through their mean.
            slope.sub_(slope.mean(-2, keepdim=True))
        return slope.mul_(2 / (ratio.root * size[side])[..., None, None]) @ rows[side]

    return ratio.value(), [gradient(side) if want else None for side, want in enumerate(wanted)]


def _of_features(rows: Pair, raw: Pair, centred: bool, debiased: bool, wanted: tuple[bool, bool]) -> tuple[Tensor, Gradients]:
    """From X'X (..., p, p), Y'Y (..., q, q) and X'Y (..., p, q)."""
    products = [side.mT @ side for side in rows]
    size = _squared_size(products, raw, centred)
    for product, square in zip(products, size, strict=True):
        product.div_(square[..., None, None])
    cross = (rows[0].mT @ rows[1]).div_(size.sqrt().prod(0)[..., None, None])
    diagonals = None
    if debiased:
        diagonals = torch.stack([side.square().sum(-1) for side in rows]) / size[..., None]
    own = torch.stack([product.square().sum((-2, -1)) for product in products])
    ratio = _debiased(cross.square().sum((-2, -1)), own, diagonals)

    def gradient(side: int) -> Tensor:
        # 2 (L - share K) X over the denominator and over the size of X.
        scale = 2 / (ratio.root * size[side])[..., None, None]
        sizes = (size[side] / size[1 - side]).sqrt()[..., None, None]
        pulled = rows[1 - side] @ ((cross.mT if side == 0 else cross) * (scale * sizes))
        pulled.sub_(rows[side] @ (products[side] * (scale * ratio.share(side))))
        if diagonals is not None:
            pulled.addcmul_(rows[side], _diagonal_slope(diagonals, ratio, side)[..., None] * scale)
            pulled.sub_(pulled.mean(-2, keepdim=True))
        return pulled

    return ratio.value(), [gradient(side) if want else None for side, want in enumerate(wanted)]


def _squared_size(products: list[Tensor], raw: Pair, centred: bool) -> Tensor:
    """The squared sizes (2, ...) of both sides: the traces of their products."""
    size = torch.stack([product.diagonal(dim1=-2, dim2=-1).sum(-1) for product in products])
    if centred:
        return nonconstant("cka", size, *raw)
    refuse(size == 0, "kernel_alignment is 0 / 0 where all of a side is zero: x or y is")
    return size


def _debiased(cross: Tensor, own: Tensor, diagonals: Tensor | None) -> _Ratio:
    """The ratio as it is, or with each inner product (...) of kernels n (n - 3) times its U-statistic.

    Rows of a centred kernel sum to zero, so that without its diagonal (..., n) they sum to minus that: all of the sums in
    the statistic are sums of the diagonals.
    """
    if diagonals is None:
        return _Ratio.of(cross, own)
    n, total = diagonals.shape[-1], diagonals.sum(-1)
    alone, both = n / (n - 2), 1 / ((n - 1) * (n - 2))
    rounding = torch.finfo(own.dtype).eps * own
    own = own - alone * diagonals.square().sum(-1) + both * total.square()
    cross = cross - alone * diagonals.prod(0).sum(-1) + both * total.prod(0)
    return _Ratio.of(cross, _nonzero(own, rounding))


def _diagonal_slope(diagonals: Tensor, ratio: _Ratio, side: int) -> Tensor:
    """What debiasing adds on the diagonal (..., n) of L - share K."""
    n = diagonals.shape[-1]
    mixed = diagonals[1 - side] - ratio.share(side)[..., 0] * diagonals[side]
    return mixed.sum(-1, keepdim=True) / ((n - 1) * (n - 2)) - n / (n - 2) * mixed


def _nonzero(own: Tensor, rounding: Tensor | float, why: str = "") -> Tensor:
    """<K, K> and <L, L> (2, ...) without their diagonals, which are squares, unless they are nothing but rounding."""
    bad = own <= 10 * rounding
    why = why or "debiased cka is 0 / 0 here: all rows of x, or all of y, are equally far from each other"
    read = refuse(bad, why)
    return own if read else own.masked_fill(bad, torch.nan)


def _rbf(x: Tensor, y: Tensor, debiased: bool, bandwidth: str | float | Tensor, units: tuple[Any, Any]) -> Tensor:
    wanted = (wants_gradient(x), wants_gradient(y))
    with torch.no_grad():
        rows = (centre(x), centre(y))
        kernels, squares = squared_distances_within(rows)
        size = nonconstant("cka", squares.sum(-1), x, y)
        if isinstance(bandwidth, str):
            squared_width = _median_width(kernels, size)
        else:
            width = torch.as_tensor(bandwidth, dtype=size.dtype, device=size.device).detach()
            scale = torch.stack([torch.as_tensor(unit, dtype=size.dtype).expand(size.shape[1:]) for unit in units])
            squared_width = (width / scale.to(size.device)).square() + 0 * size  # NaN where constant features were not refused
            refuse(squared_width == 0, f"the square of a bandwidth of {bandwidth}, in the features' unit, is 0 in {x.dtype}")
        rate = 1 / (2 * squared_width)[..., None, None]
        kernels.mul_(-rate).exp_()
        plain = [kernel.clone() if want else None for kernel, want in zip(kernels, wanted, strict=True)]
        _centre_kernels(kernels, debiased)
        own = kernels.square().sum((-2, -1))
        # n^2 values between -1 and 1, each rounded.
        rounding = (x.shape[-2] * torch.finfo(x.dtype).eps) ** 2
        if not isinstance(bandwidth, str):
            own = _nonzero(
                own, rounding, f"cka is 0 / 0 with a bandwidth of {bandwidth}: beside it all rows of a side are equal"
            )
        elif debiased:
            own = _nonzero(own, rounding)
        ratio = _Ratio.of(kernels.prod(0).sum((-2, -1)), own)
        gradients: Gradients = []
        for side, kernel in enumerate(plain):
            if kernel is None:
                gradients.append(None)
                continue
            # A kernel value falls by itself times the rate per squared distance, and each pair stands in the sum twice.
            slope = torch.addcmul(kernels[1 - side], kernels[side], ratio.share(side), value=-1)
            slope.mul_(kernel).mul_(-4 * rate[side] / ratio.root[..., None, None])
            gradients.append((slope.sum(-1, keepdim=True) * rows[side]).sub_(slope @ rows[side]))
    return with_gradient(ratio.value(), (x, gradients[0]), (y, gradients[1]))


def _median_width(distances: Tensor, size: Tensor) -> Tensor:
    """s^2 (2, ...) from squared distances (2, ..., n, n) and the squared sizes of the sides (2, ...)."""
    median = _upper(distances).median(-1).values
    # The mean squared distance of two rows follows from the size.
    return torch.where(median == 0, 2 * size / (distances.shape[-1] - 1), median)


def _centre_kernels(kernels: Tensor, debiased: bool) -> None:
    """Make rows and columns of kernels (..., n, n) sum to zero, in their place; without the diagonal if debiased."""
    n = kernels.shape[-1]
    if debiased:
        kernels.diagonal(dim1=-2, dim2=-1).zero_()
    rows = kernels.sum(-1, keepdim=True).div_(n - 2 if debiased else n)
    rows.sub_(rows.sum(-2, keepdim=True) / (2 * (n - 1) if debiased else 2 * n))
    kernels.sub_(rows).sub_(rows.mT)
    if debiased:
        kernels.diagonal(dim1=-2, dim2=-1).zero_()


def _upper(square: Tensor) -> Tensor:
    """What stands above the diagonal of (..., n, n), in some order: (..., n (n - 1) / 2).

    Row i and the i-th row from below together fill one row: two whole copies of half the matrix, no index of each pair.
    """
    n = square.shape[-1]
    half = n // 2
    upper = torch.ones(half, n - 1, dtype=torch.bool, device=square.device).triu()
    below = square[..., n - half :, 1:].flip(-2, -1)
    folded = torch.where(upper, square[..., :half, 1:], below).flatten(-2)
    return torch.cat([folded, square[..., half, half + 1 :]], -1) if n % 2 else folded
