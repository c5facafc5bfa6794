"""How far apart two samples lie. Differentiable, to pull one modality's embeddings towards another's.

Everywhere x is (..., n, d) and y is (..., m, d); n and m may differ, leading dimensions broadcast, and the result has
one number per leading index. Arithmetic is float32 at least, whatever the input and the ambient autocast; float64
stays. Scales (bandwidths, blur) are relative to the data and detached, so that a result depends on the unit of length
in no other way than its docstring says.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ._common import (
    direction,
    full_precision,
    in_a_unit,
    in_units,
    need_points,
    one_if_zero,
    pair_gradient,
    positive,
    squared_distances,
    wants_gradient,
    with_gradient,
)
from ._features import refuse
from .registry import register_divergence

BANDWIDTHS = (0.25, 0.5, 1.0, 2.0, 4.0)

# Rows of each sample that the median looks at: it is exact up to here, an estimate from evenly spaced rows above.
MEDIAN_ROWS = 128


@register_divergence("mse")
def mse(x: Tensor, y: Tensor) -> Tensor:
    """Mean over coordinates of the squared difference of the means, |mu_x - mu_y|^2 / d.

    x: (..., n, d), y: (..., m, d) -> (...). Grows as the square of the data's unit. It looks at nothing but the means:
    a sample that collapses onto the other's mean scores 0. Used to align embeddings by "Cross-modal domain adaptation"
    §3.1.5, which writes |mu_x - mu_y|^2: d times this.
    """
    with full_precision(x, y) as (x, y):
        x, y, unit = in_a_unit(x, y)
        return in_units((x.mean(-2) - y.mean(-2)).square().mean(-1), unit, 2)


@register_divergence("cosine")
def cosine(x: Tensor, y: Tensor) -> Tensor:
    """One minus the cosine of the means, from 0 (same direction) to 2.

    x: (..., n, d), y: (..., m, d) -> (...). Independent of the data's unit; where a mean is zero the result is 1 and
    the gradient finite. The paper that `mse` cites names a cosine in §3.1.3 without defining it: that it compares the
    means is our choice.
    """
    with full_precision(x, y) as (x, y):
        unit_x, unit_y = direction(x.mean(-2)), direction(y.mean(-2))
        return 1 - (unit_x * unit_y).sum(-1)


@register_divergence("mmd")
def mmd(
    x: Tensor,
    y: Tensor,
    bandwidths: Sequence[float] = BANDWIDTHS,
    unbiased: bool = True,
    scale: str | float | Tensor = "median",
) -> Tensor:
    """Squared maximum mean discrepancy, with the sum of the Gaussian kernels exp(-|a - b|^2 / (bandwidth * scale^2)).

    x: (..., n, d), y: (..., m, d) -> (...), the sum over bandwidths. `unbiased` takes the U-statistic, whose
    expectation is 0 for equal distributions whatever n and m (single values may be negative); otherwise the
    V-statistic, biased upwards by about 6 / n for the five bandwidths in many dimensions. `scale` is a length: the root
    of the "median" or "mean" of the squared distances of different points (pairs within x, within y and across weigh
    1/4, 1/4, 1/2, whatever n and m), or a number. Independent of the data's unit, unless `scale` is a number.

    Raises ValueError for fewer than two points in a sample, and for bandwidths or a scale not above 0.
    Gretton et al. 2012, "A kernel two-sample test", eq. 3.
    """
    with full_precision(x, y) as (x, y):
        need_points("mmd", 2, x, y)
        x, y, unit = in_a_unit(x, y)
        with torch.no_grad():
            blocks = _blocks(x, y)
            squared_scale = _squared_scale(scale, unit, *blocks)
        return _mmd(x, y, blocks, squared_scale, bandwidths, unbiased)


@register_divergence("mmd-orca")
def mmd_orca(x: Tensor, y: Tensor) -> Tensor:
    """Squared maximum mean discrepancy exactly as ORCA's published code computes it (a V-statistic, biased upwards).

    x: (..., n, d), y: (..., m, d) -> (...). Kernels exp(-|a - b|^2 / b_i), b_i = 2^(i-2) * (sum of all squared pairwise
    distances of the pooled sample) / (N^2 - N) for i = 0..4 and N = n + m, detached; their sum is averaged as
    mean(XX) + mean(YY) - 2 mean(XY). ORCA itself always draws n = m. Independent of the data's unit. Use `mmd` unless
    you reproduce a published figure: at d = 768 equal distributions score 0.77 here at n = 8, and 0.05 at n = 128.

    Shen et al. 2023, "Cross-modal fine-tuning: align then refine"; github.com/sjunhongshen/ORCA, MMD_loss in
    src/utils.py.
    """
    with full_precision(x, y) as (x, y):
        x, y, _ = in_a_unit(x, y)
        with torch.no_grad():
            blocks = _blocks(x, y)
            within_x, within_y, across = (block.sum((-2, -1)) for block in blocks)
            points = x.shape[-2] + y.shape[-2]
            squared_scale = (within_x + within_y + 2 * across) / (points**2 - points)
        return _mmd(x, y, blocks, one_if_zero(squared_scale), BANDWIDTHS, unbiased=False)


def _blocks(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Squared distances within x (..., n, n), within y (..., m, m) and across (..., n, m)."""
    return squared_distances(x, x), squared_distances(y, y), squared_distances(x, y)


def _squared_scale(
    scale: str | float | Tensor, unit: Tensor | float, within_x: Tensor, within_y: Tensor, across: Tensor
) -> Tensor:
    if not isinstance(scale, str):
        positive(scale=scale)
        squared = (torch.as_tensor(scale, dtype=across.dtype, device=across.device).detach() / unit) ** 2
        refuse(~((squared > 0) & squared.isfinite()), f"the square of scale lies beyond the range of {across.dtype}")
        return squared
    if scale not in ("median", "mean"):
        raise ValueError(f"unknown scale '{scale}' for mmd: use 'median', 'mean' or a number")
    n, m = across.shape[-2:]
    mean_x = within_x.sum((-2, -1)) / (n * (n - 1))  # of different points: those on the diagonal are 0
    mean_y = within_y.sum((-2, -1)) / (m * (m - 1))
    mean = (mean_x + mean_y + 2 * across.mean((-2, -1))) / 4
    if scale == "mean":
        return one_if_zero(mean)
    median = _median(within_x, within_y, across)
    # More than half of the pairs may be duplicates: the median says nothing then.
    return one_if_zero(torch.where(median > 0, median, mean))


def _median(within_x: Tensor, within_y: Tensor, across: Tensor) -> Tensor:
    """The median (...) of the distances of different points, weights 1/4 within x, 1/4 within y and 1/2 across."""
    step_x, step_y = (-(-n // MEDIAN_ROWS) for n in across.shape[-2:])
    parts, weights = [], []
    for within, step in ((within_x, step_x), (within_y, step_y)):
        few = within[..., ::step, ::step]
        rows, columns = torch.triu_indices(few.shape[-1], few.shape[-1], offset=1, device=few.device)
        parts.append(few[..., rows, columns])
        weights.append(0.25)
    parts.append(across[..., ::step_x, ::step_y].flatten(-2))
    weights.append(0.5)
    counts = [part.shape[-1] for part in parts]
    weight = torch.cat([across.new_full((k,), w / k) for k, w in zip(counts, weights, strict=True)])
    values, order = torch.cat(parts, -1).sort(-1)
    reached = weight[order].cumsum(-1)
    middle = (reached < reached[..., -1:] / 2).sum(-1, keepdim=True)
    return values.gather(-1, middle).squeeze(-1)


def _mmd(
    x: Tensor,
    y: Tensor,
    blocks: tuple[Tensor, Tensor, Tensor],
    squared_scale: Tensor,
    bandwidths: Sequence[float],
    unbiased: bool,
) -> Tensor:
    if not isinstance(bandwidths, Sequence) or isinstance(bandwidths, str) or not bandwidths:
        raise ValueError(f"bandwidths must be a sequence of at least one number above 0; got {bandwidths!r}")
    for width in bandwidths:
        positive(bandwidths=width)
    n, m = x.shape[-2], y.shape[-2]
    within_x, within_y, across = blocks
    if unbiased:
        # A kernel is 0 at infinity: this leaves each point's distance to itself out.
        within_x.diagonal(dim1=-2, dim2=-1).fill_(torch.inf)
        within_y.diagonal(dim1=-2, dim2=-1).fill_(torch.inf)
    pairs_x, pairs_y, pairs_xy = (n * (n - 1), m * (m - 1), n * m) if unbiased else (n * n, m * m, n * m)
    for_x, for_y = wants_gradient(x), wants_gradient(y)
    with torch.no_grad():
        value_x, slope_x = _kernel_sum(within_x, squared_scale, bandwidths, for_x)
        value_y, slope_y = _kernel_sum(within_y, squared_scale, bandwidths, for_y)
        value_xy, slope_xy = _kernel_sum(across, squared_scale, bandwidths, for_x or for_y)
        value = value_x / pairs_x + value_y / pairs_y - 2 * value_xy / pairs_xy
        gradient_x = gradient_y = None
        # A squared distance moves by 2 (x_i - x_j); pairs within a sample count twice, and so do those across.
        if slope_x is not None and slope_xy is not None:
            inner, outer = pair_gradient(slope_x, x, x), pair_gradient(slope_xy, x, y)
            gradient_x = inner * (4 / pairs_x) - outer * (4 / pairs_xy)
        if slope_y is not None and slope_xy is not None:
            inner, outer = pair_gradient(slope_y, y, y), pair_gradient(slope_xy.mT, y, x)
            gradient_y = inner * (4 / pairs_y) - outer * (4 / pairs_xy)
    return with_gradient(value, (x, gradient_x), (y, gradient_y))


def _kernel_sum(
    distances: Tensor, squared_scale: Tensor, bandwidths: Sequence[float], slopes: bool
) -> tuple[Tensor, Tensor | None]:
    """The sum (...) of all kernel values, and (..., n, m) the slope of each pair's kernels in its squared distance.

    A kernel of half the bandwidth is the square of the kernel: one exponential serves a whole row of halvings.
    """
    unit = -1 / squared_scale[..., None, None]
    total, slope, kernel, wider = torch.zeros_like(squared_scale), None, None, 0.0
    for width in sorted(bandwidths, reverse=True):
        if kernel is not None and wider == 2 * width:
            kernel = kernel.square_()
        else:
            kernel = (distances * (unit / width)).exp_()
        wider = width
        total = total + kernel.sum((-2, -1))
        if slopes:
            slope = kernel / width if slope is None else slope.add_(kernel, alpha=1 / width)
    return total, None if slope is None else slope.mul_(unit)


@register_divergence("coral")
def coral(x: Tensor, y: Tensor) -> Tensor:
    """Squared distance of the covariances, |C_x - C_y|_F^2 / (4 d^2).

    x: (..., n, d), y: (..., m, d) -> (...). Grows as the fourth power of the data's unit and doesn't see the means.
    Raises ValueError for fewer than two points in a sample. Sun and Saenko 2016, "Deep CORAL", eq. 1.
    """
    with full_precision(x, y) as (x, y):
        need_points("coral", 2, x, y)
        x, y, unit = in_a_unit(x, y)
        for_x, for_y = wants_gradient(x), wants_gradient(y)
        with torch.no_grad():
            a, b = x - x.mean(-2, keepdim=True), y - y.mean(-2, keepdim=True)
            free_x, free_y, width = x.shape[-2] - 1, y.shape[-2] - 1, x.shape[-1]
            difference = a.mT @ a / free_x - b.mT @ b / free_y
            value = difference.square().sum((-2, -1)) / (4 * width**2)
            gradient_x = a @ difference / (free_x * width**2) if for_x else None
            gradient_y = b @ difference / (-free_y * width**2) if for_y else None
        return in_units(with_gradient(value, (x, gradient_x), (y, gradient_y)), unit, 4)
