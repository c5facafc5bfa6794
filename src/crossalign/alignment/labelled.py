"""The distance of two labelled data sets by optimal transport (OTDD), with labels that count on both sides."""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import one_hot

from ._common import (
    full_precision,
    in_a_unit,
    in_units,
    need_tensor,
    pair_gradient,
    squared_distances,
    wants_gradient,
    with_gradient,
)
from ._features import refuse
from .registry import register_divergence
from .transport import check_settings, length_scale, solve, solve_self


@register_divergence("otdd", needs_labels=True)
def otdd(
    x: Tensor,
    x_labels: Tensor,
    y: Tensor,
    y_labels: Tensor,
    blur: float = 0.05,
    label_weight: float = 1.0,
    debiased: bool = True,
    scale: float | Tensor | None = None,
    iterations: int = 80,
) -> Tensor:
    """Optimal transport data-set distance: the transport cost |a - b|^2 + label_weight * W(label of a, label of b)^2.

    x: (n, d), x_labels: (n,) integers, y: (m, d), y_labels: (m,) integers -> scalar; differentiable in x and y, through
    the points and through the labels' distances. W is the 2-Wasserstein distance of the Gaussians with the mean and
    the covariance of each label's points; classes of fewer points than dimensions, even of one, need no special care.
    What labels are called doesn't matter, nor whether a name occurs on both sides. Grows as the square of the data's
    unit.

    `blur`, `debiased`, `scale` and `iterations` are those of `sinkhorn` with p = 2. The value tends to the paper's,
    which doesn't halve the cost. With one label on a side the label term shifts the cost but moves no mass: text
    targets get labels by clustering or from their corpus. Labels on the CPU never make the host wait for another
    device, though the eigenvalues behind W do. Where y stays the same over many calls, `OtddTarget` keeps what depends
    on y alone.

    Raises ValueError for shapes that don't fit. Alvarez-Melis and Fusi 2020, "Geometric dataset distances via optimal
    transport", with labels as Gaussians.
    """
    _check(blur, iterations, scale, label_weight)
    with full_precision(x, y) as (x, y):
        x, y, unit = in_a_unit(x, y)
        temperature = (blur * length_scale(x, y, scale, unit)) ** 2
        source, target = _Labelled(x, x_labels, "x"), _Labelled(y, y_labels, "y")
        across = _term(source, target, temperature, label_weight, iterations)
        own = [_term(side, side, temperature, label_weight) for side in (source, target)] if debiased else []
        return in_units(_combine(source, target, across, own), unit, 2)


def _check(blur: float, iterations: int, scale: float | Tensor | None, label_weight: float) -> None:
    check_settings(blur, iterations, scale)
    if isinstance(label_weight, bool) or not isinstance(label_weight, int | float) or not 0 <= label_weight < math.inf:
        raise ValueError(f"label_weight must be a finite number, 0 or more; got {label_weight!r}")


class OtddTarget:
    """One side of `otdd`, such as the text targets, with all that depends on it alone computed once.

    y: (m, d), y_labels: (m,). Called with x (n, d) and x_labels (n,), it gives the scalar of `otdd(x, x_labels, y,
    y_labels, scale=target.scale)`, differentiable in x. `scale` is a length, by default the root mean squared distance
    of two points of y: it stays the same while x moves.
    """

    def __init__(
        self,
        y: Tensor,
        y_labels: Tensor,
        blur: float = 0.05,
        label_weight: float = 1.0,
        debiased: bool = True,
        scale: float | Tensor | None = None,
        iterations: int = 80,
    ) -> None:
        _check(blur, iterations, scale, label_weight)
        need_tensor("y", y)
        self.label_weight, self.debiased, self.iterations = label_weight, debiased, iterations
        with torch.no_grad(), full_precision(y, y) as (y, _):
            y, self._unit = in_a_unit(y)
            length = length_scale(y, y, scale, self._unit)
            self.scale = length * self._unit
            self._temperature = (blur * length) ** 2
            self._side = _Labelled(y, y_labels, "y")
            self._own = [_term(self._side, self._side, self._temperature, label_weight)] if debiased else []

    def __call__(self, x: Tensor, x_labels: Tensor) -> Tensor:
        """The distance of x (n, d) with x_labels (n,) from this target, a scalar."""
        target = self._side
        need_tensor("x", x)
        if x.dtype == torch.float64 != target.points.dtype:
            raise ValueError("x is float64 but this target is not: build the target from float64 too")
        with full_precision(x, target.points) as (x, _):
            finite = x.detach().isfinite().all()
            x = x / self._unit
            source = _Labelled(x, x_labels, "x")
            across = _term(source, target, self._temperature, self.label_weight, self.iterations)
            own = [_term(source, source, self._temperature, self.label_weight), *self._own] if self.debiased else []
            value = _combine(source, target, across, own)
            refuse(finite & ~value.detach().isfinite(), "x and the target are so far apart that their distance is no number")
            return in_units(value, self._unit, 2)


otdd.prepare = OtddTarget  # type: ignore[attr-defined]  # how a caller keeps the side that stays constant


class _Labelled:
    """A labelled sample (n, d) with the Gaussian of each of its k labels.

    `label` (n,) numbers each point's label, `means` is (k, d), `factors` (k, r, d) has the covariances as F^T F. Their
    graph starts at `leaf`, which stands for the sample, so that their gradient can be taken inside the forward pass.
    """

    def __init__(self, sample: Tensor, labels: Tensor, name: str) -> None:
        if sample.ndim != 2:
            raise ValueError(f"otdd takes samples of shape (n, d); {name} is {tuple(sample.shape)}")
        need_tensor(f"{name}_labels", labels, shape="(n,)")
        if labels.shape != sample.shape[:1] or labels.is_floating_point():
            raise ValueError(
                f"{name}_labels must be {sample.shape[0]} integers, one for each row of {name}; "
                f"got {tuple(labels.shape)} of {labels.dtype}"
            )
        self.sample, self.points = sample, sample.detach()
        self.leaf = self.points.clone().requires_grad_() if wants_gradient(sample) else self.points
        # On the host: how many labels there are, and how often the most frequent one occurs, are shapes.
        _, label, count = np.unique(labels.cpu().numpy(), return_inverse=True, return_counts=True)
        # The points of each label as rows (k, r), filled up with -1.
        order = np.argsort(label, kind="stable")
        column = np.arange(len(label)) - (count.cumsum() - count)[label[order]]
        grouped = np.full((len(count), count.max()), -1)
        grouped[label[order], column] = order
        self.label, rows = (torch.from_numpy(a).to(sample.device, non_blocking=True) for a in (label, grouped))
        counts = torch.from_numpy(count).to(sample, non_blocking=True)
        with torch.enable_grad():
            present = (rows >= 0).to(self.leaf)[..., None]
            members = self.leaf[rows.clamp_min(0)] * present
            self.means: Tensor = members.sum(1) / counts[:, None]
            free = (counts - 1).clamp_min(1)[:, None, None]
            factors = (members - self.means[:, None]) * present / free.sqrt()
            if factors.shape[1] > factors.shape[2]:
                # Q^T F has the same F^T F, on which alone all depends; so its gradient with Q constant is right.
                factors = torch.linalg.qr(factors.detach()).Q.mT @ factors
            self.factors: Tensor = factors


def _label_distances(a: _Labelled, b: _Labelled) -> Tensor:
    """Squared 2-Wasserstein distances (k_a, k_b) of the labels' Gaussians, differentiable in both leaves.

    |mu_a - mu_b|^2 + tr A + tr B - 2 tr (A^1/2 B A^1/2)^1/2 (Bures), whose last trace is the nuclear norm of F_a F_b^T:
    it needs neither an inverse nor the root of a covariance, so low rank does no harm.
    """
    ka, kb = len(a.means), len(b.means)
    # Within one sample the matrix is symmetric with a zero diagonal: the pairs above it are enough.
    i, j = torch.triu_indices(ka, ka, 1) if a is b else torch.cartesian_prod(torch.arange(ka), torch.arange(kb)).T
    i, j = i.to(a.means.device, non_blocking=True), j.to(a.means.device, non_blocking=True)
    with torch.enable_grad():
        means = (a.means[i] - b.means[j]).square().sum(-1)
        spread = a.factors.square().sum((1, 2))[i] + b.factors.square().sum((1, 2))[j]
        overlap: Tensor = _NuclearNorm.apply(a.factors[i] @ b.factors[j].mT)
        pairs = means + (spread - 2 * overlap).clamp_min(0)
        table = pairs.new_zeros(ka, kb).index_put((i, j), pairs)
        return table + table.T if a is b else table


class _NuclearNorm(torch.autograd.Function):
    """The sum of singular values (k,) of matrices (k, r, s); its gradient U V^T leaves out directions without mass.

    By the eigenvalues of the smaller Gram matrix, in float64 since squaring halves the digits.
    """

    @staticmethod
    def forward(ctx: Any, matrices: Tensor) -> Tensor:
        finite = matrices.isfinite().all()
        # The eigensolver refuses what is not finite: let it through as NaN, for the training loop to diagnose.
        wide = torch.where(finite, matrices, 0.0).double()
        transposed = wide.shape[-2] < wide.shape[-1]
        tall = wide.mT if transposed else wide
        squares, vectors = torch.linalg.eigh(tall.mT @ tall)
        values = squares.clamp_min(0).sqrt()
        noise = 1e-7 if matrices.dtype == torch.float64 else 1e-5
        large = values > noise * values[..., -1:]
        values = torch.where(large, values, 0.0)
        if ctx.needs_input_grad[0]:
            inverse = torch.where(large, values.reciprocal(), 0.0)
            polar = tall @ (vectors * inverse[..., None, :]) @ vectors.mT
            ctx.save_for_backward((polar.mT if transposed else polar).to(matrices.dtype))
        return torch.where(finite, values.sum(-1), torch.nan).to(matrices.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        (polar,) = ctx.saved_tensors
        gradient: Tensor = upstream[:, None, None] * polar
        return gradient


class _Term(NamedTuple):
    """A transport: its cost, its plan, and the share of the cost that the labels' distances make, with their graph."""

    cost: Tensor
    plan: Tensor
    labels: Tensor


def _term(a: _Labelled, b: _Labelled, temperature: Tensor, label_weight: float, iterations: int = 0) -> _Term:
    """The transport of one sample to another, or to itself: twice the solved cost, which was halved, and the cost of the
    labels by the mass that the plan moves between each two.

    ``iterations`` are of a transport to another sample; one to itself takes a fixed number of steps.
    """
    distances = _label_distances(a, b)
    with torch.no_grad():
        label_a, label_b = (one_hot(side.label, len(side.means)).to(side.points) for side in (a, b))
        # A product with one-hot rows looks the distances up, and is several times faster than indexing.
        by_label = label_a @ (label_weight * distances.detach())
        cost = squared_distances(a.points, b.points).addmm_(by_label, label_b.T).div_(2)
        solved = solve_self(cost, temperature) if a is b else solve(cost, temperature, iterations)
        mass = label_a.T @ solved.plan @ label_b
    with torch.enable_grad():
        return _Term(2 * solved.cost, solved.plan, label_weight * (mass * distances).sum())


def _combine(source: _Labelled, target: _Labelled, across: _Term, own: list[_Term]) -> Tensor:
    """The debiased cost with its gradients: through the points with the plans held fixed, and through the labels."""
    value, labels = across.cost, across.labels
    for term in own:
        value, labels = value - term.cost / 2, labels - term.labels / 2
    sides = [side for side in (source, target) if side.leaf.requires_grad]
    through_labels = torch.autograd.grad(labels, [side.leaf for side in sides]) if sides else ()
    pairs: list[tuple[Tensor, Tensor | None]] = []
    with torch.no_grad():
        for side, gradient in zip(sides, through_labels, strict=True):
            first = side is source
            plan, other = (across.plan, target) if first else (across.plan.mT, source)
            gradient = gradient + 2 * pair_gradient(plan, side.points, other.points)
            if own:
                within = own[0] if first else own[-1]
                gradient = gradient - 2 * pair_gradient(within.plan, side.points, side.points)
            pairs.append((side.sample, gradient))
    return with_gradient(value, *pairs)
