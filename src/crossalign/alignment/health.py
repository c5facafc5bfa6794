"""Is an alignment collapsing? Numbers to log beside a divergence, and a sentence when they look bad.

A divergence can fall because the embeddings lose what told them apart: matching means, for one, is done best by a
single point. So their spread, rank and norm are compared with those of the text embeddings they are pulled towards.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ._common import full_precision, in_a_unit, in_units, need_points, one_if_zero
from ._features import ROUNDINGS, centre
from .divergence import mmd

# Rows of each sample that the ranks are taken from.
RANK_ROWS = 1024


def effective_rank(x: Tensor) -> Tensor:
    """Entropy-based number of directions that x (..., n, d) fills: from 1 to min(n - 1, d); -> (...), no unit.

    exp of the entropy of the singular values of the centred sample, scaled to sum to 1; 0 for identical points, NaN
    where a value is not finite. Compare equal n only. Roy and Vetterli 2007, "The effective rank", definition 1.
    """
    with full_precision(x, x) as (x, _):
        x, _ = in_a_unit(x)
        centred = centre(x)
        # The solver refuses what is not finite.
        finite = centred.isfinite().all(-1).all(-1)
        values = torch.linalg.svdvals(torch.where(finite[..., None, None], centred, 0.0))
        share = values / one_if_zero(values.sum(-1, keepdim=True))
        share = torch.where(share > 0, share, 1.0)  # adds as little, and has a slope
        rank = torch.exp(-torch.xlogy(share, share).sum(-1))
        return torch.where(finite, torch.where(_varies(x, centred), rank, 0.0), torch.nan)


def participation_ratio(x: Tensor) -> Tensor:
    """Variance-based number of directions that x (..., n, d) fills: tr(C)^2 / tr(C^2) -> (...), no unit.

    Cheaper than `effective_rank` and stricter on small directions; 0 for identical points.
    """
    with full_precision(x, x) as (x, _):
        x, _ = in_a_unit(x)
        centred = centre(x)
        gram = centred @ centred.mT if x.shape[-2] < x.shape[-1] else centred.mT @ centred
        trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
        number = trace.square() / one_if_zero(gram.square().sum((-2, -1)))
        return torch.where(_varies(x, centred), number, 0.0)


@torch.no_grad()
def _varies(x: Tensor, centred: Tensor) -> Tensor:
    """Whether the rows of x (..., n, d) differ by more than the rounding of their mean; -> (...); not where they are NaN."""
    first = torch.linalg.vector_norm(x[..., 0, :], dim=-1)
    least = x.shape[-2] ** 0.5 * ROUNDINGS * torch.finfo(x.dtype).eps * first
    varies: Tensor = ~(torch.linalg.vector_norm(centred, dim=(-2, -1)) <= least)
    return varies


@torch.no_grad()
def health(x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Numbers that tell whether x (n, d), say image embeddings, collapses as it is aligned to text embeddings y (m, d).

    Give samples that the alignment was not trained on. Keys: "std" and "std_text" (root mean square over coordinates of the
    standard deviation, in the data's unit), "effective_rank" and "effective_rank_text" (on equally many rows, 1024 at most,
    since the rank of few points is low), "norm_ratio" (of the root mean square norms of points, no unit), "heldout_mmd"
    (`mmd`, unbiased: about 0 for equal distributions, negative by chance). Scalar tensors on x's device.

    Raises ValueError for fewer than two points in a sample.
    """
    with full_precision(x, y) as (full_x, full_y):
        need_points("health", 2, full_x, full_y)
        rows = min(x.shape[-2], y.shape[-2], RANK_ROWS)
        full_x, full_y, unit = in_a_unit(full_x, full_y)
        std, std_text = (in_units(centre(points).square().mean((-2, -1)).sqrt(), unit, 1) for points in (full_x, full_y))
        size, size_text = (points.square().sum(-1).mean(-1).sqrt() for points in (full_x, full_y))
    return {
        "std": std,
        "std_text": std_text,
        "effective_rank": effective_rank(_some_rows(x, rows)),
        "effective_rank_text": effective_rank(_some_rows(y, rows)),
        "norm_ratio": size / size_text,
        "heldout_mmd": mmd(x, y),
    }


def collapse_warning(health: Mapping[str, Tensor | float], threshold: float = 0.25) -> str | None:
    """A sentence where the numbers of `health` show a collapse, else None.

    Bad are values that are not finite, and a spread, an effective rank or a norm below `threshold` of the text's. This
    reads the numbers, and so waits for their device.
    """
    values = {key: float(value) for key, value in health.items()}
    broken = [key for key, value in values.items() if not math.isfinite(value)]
    if broken:
        return f"the embeddings are broken: {', '.join(broken)} not finite; lower the learning rate"
    compared = {
        "std": (values["std"], values["std_text"]),
        "effective rank": (values["effective_rank"], values["effective_rank_text"]),
        "norm": (values["norm_ratio"], 1.0),
    }
    low = [f"{name} {own:.3g} against {text:.3g}" for name, (own, text) in compared.items() if own < threshold * text]
    if not low:
        return None
    return (
        f"the embeddings are collapsing beside the text's: {', '.join(low)} (below {threshold:g} of it); "
        "align with mmd, which sees the spread, or for fewer epochs"
    )


def _some_rows(x: Tensor, rows: int) -> Tensor:
    """That many rows of x, spread evenly, since samples often come sorted."""
    n = x.shape[-2]
    return x if n == rows else x[..., torch.arange(rows, device=x.device) * n // rows, :]
