"""Is a score more than chance, also when it is the best of many layers, and how sure is it?

Chance is told by permutations: with the rows of one side in a random order no row belongs to its pair, and nothing else has
changed, neither width nor spectrum nor number of rows. How sure a score is, is told by leaving out rows. Drawing rows with
replacement is not here: a row drawn twice is its own nearest neighbour and stands off the diagonal of a debiased kernel,
so both scores would rise by it.

That takes each score hundreds of times. What a score needs of each side is the same in every order of its rows: of CKA the
kernel, of mutual k-NN who is whose neighbour. So these are made once a layer, and an order only looks them up elsewhere; for
CKA, all pairs of layers are then one matrix product.

Shapes: n rows, I layers of x, J of y, each layer (n, p) of a width of its own; P orders, G groups.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .kernels import kernel_matrix, unit_kernel
from .neighbours import neighbour_shares
from .registry import get_similarity

Layers = Sequence[Tensor]
Tick = Callable[[], object]
CHUNK = 1 << 15  # pairs of rows a matrix product: what is looked up of J layers then stays in the processor's cache


def kernel_scores(
    xs: Layers, ys: Layers, orders: Tensor, tick: Tick, *, kernel: str = "linear", debiased: bool = False
) -> Tensor:
    """CKA, or kernel alignment with the "plain" kernel, (P, I, J), the rows of ys taken in each of the orders (P, n).

    With both sides' kernels centred and of length 1 the score is the sum over pairs of rows of their products (Kornblith
    et al. 2019, eq. 3), and the kernel of rows in another order is the kernel with rows and columns in that order. Kernels
    are symmetric: the half above the diagonal is enough, and the diagonal where it counts.
    """
    n = orders.shape[1]
    above, across = torch.triu_indices(n, n, offset=1 if debiased else 0)
    twice = torch.where(above == across, 1.0, 2.0)
    values = torch.stack([_unit(x, kernel, debiased)[above, across] * twice for x in xs])
    table = torch.stack([_unit(y, kernel, debiased).flatten() for y in ys], dim=1)  # (n², J): a pair's J values in a row
    scores = values.new_zeros(len(orders), len(xs), len(ys))
    for score, order in zip(scores, orders, strict=True):
        pairs = order[above] * n + order[across]
        for some, places in zip(values.split(CHUNK, dim=1), pairs.split(CHUNK), strict=True):
            score.addmm_(some, table[places])
        tick()
    return scores


def _unit(x: Tensor, kernel: str, debiased: bool) -> Tensor:
    return unit_kernel(kernel_matrix(x, kernel), debiased, centred=kernel != "plain").float()


def kernel_scores_without(
    xs: Layers, ys: Layers, groups: Tensor, tick: Tick, *, kernel: str = "linear", debiased: bool = False
) -> Tensor:
    """The scores of :func:`kernel_scores` (G, I, J) without the rows of each group in turn; groups (n,) holds 0 to G - 1.

    A centred product of kernels is a sum over pairs of rows, less what their row sums say (Song et al. 2012, eq. 5). So the
    rows that stay need only what the rows that go had a part in, which over all groups is one product of the whole kernels.
    The median of distances in an RBF kernel stays that of all rows.
    """
    x, y = (torch.stack([kernel_matrix(layer, kernel).float() for layer in side]) for side in (xs, ys))
    if debiased:
        for side in (x, y):
            side.diagonal(dim1=1, dim2=2).zero_()
    whole, sums = _products(x, y), (x.sum(2), y.sum(2))
    scores = []
    for group in range(int(groups.max()) + 1):
        gone, stay = (groups == group).nonzero().flatten(), (groups != group).nonzero().flatten()
        rows = x[:, gone], y[:, gone]
        parts = zip(whole, _products(*rows), _products(rows[0][:, :, gone], rows[1][:, :, gone]), strict=True)
        rest = [all_rows - 2 * some + both for all_rows, some, both in parts]  # rows and columns that go, their corner once
        row_x, row_y = (total[:, stay] - side.sum(1)[:, stay] for total, side in zip(sums, rows, strict=True))
        whole_x, whole_y = row_x.sum(1), row_y.sum(1)
        if kernel != "plain":
            n = len(stay)
            single, total = (2 / (n - 2), 1 / ((n - 1) * (n - 2))) if debiased else (2 / n, 1 / n**2)
            rest[0] += total * torch.outer(whole_x, whole_y) - single * row_x @ row_y.T
            rest[1] += total * whole_x.square() - single * row_x.square().sum(1)
            rest[2] += total * whole_y.square() - single * row_y.square().sum(1)
        scores.append(rest[0] / torch.outer(rest[1], rest[2]).sqrt())
        tick()
    return torch.stack(scores)


def _products(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """<K, L> (I, J), <K, K> (I) and <L, L> (J) of parts of kernels x (I, a, b) and y (J, a, b)."""
    return x.flatten(1) @ y.flatten(1).T, x.square().sum((1, 2)), y.square().sum((1, 2))


def neighbour_scores(xs: Layers, ys: Layers, orders: Tensor, tick: Tick, *, k: int = 10, distance: str = "cosine") -> Tensor:
    """Mutual k-NN (P, I, J), the rows of ys taken in each of the orders (P, n).

    Only the n k neighbours of each layer of y are looked up in x, ties with their shares.
    """
    n = orders.shape[1]
    table = torch.stack([neighbour_shares(x, k, distance).float().flatten() for x in xs], dim=1)  # (n², I)
    neighbours = [neighbour_shares(y, k, distance).float() for y in ys]
    near = [(*shares.nonzero(as_tuple=True), shares[shares > 0][:, None]) for shares in neighbours]
    scores = table.new_zeros(len(orders), len(xs), len(ys))
    for score, order in zip(scores, orders, strict=True):
        position = order.argsort()  # where a row of y comes to stand
        for j, (rows, others, shares) in enumerate(near):
            score[:, j] = torch.minimum(table[position[rows] * n + position[others]], shares).sum(0) / (n * k)
        tick()
    return scores


KERNELS: dict[str, dict[str, Any]] = {
    "cka-linear": {"kernel": "linear"},
    "cka-linear-debiased": {"kernel": "linear", "debiased": True},
    "cka-rbf": {"kernel": "rbf"},
    "cka-rbf-debiased": {"kernel": "rbf", "debiased": True},
    "kernel-alignment": {"kernel": "plain"},
}
FAST: dict[str, Callable[..., Tensor]] = {
    **{name: partial(kernel_scores, **settings) for name, settings in KERNELS.items()},
    "mutual-knn": neighbour_scores,
}
"""Similarities with a faster way than calling them for each order and pair of layers; the numbers are the same."""
FAST_WITHOUT: dict[str, Callable[..., Tensor]] = {
    name: partial(kernel_scores_without, **settings) for name, settings in KERNELS.items()
}


def random_orders(n: int, count: int, seed: int = 0) -> Tensor:
    """Orders of n rows (count, n), drawn evenly; the caller's random state is left alone."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(n, generator=generator) for _ in range(count)])


def ordered_scores(xs: Layers, ys: Layers, metric: str, orders: Tensor, tick: Tick = lambda: None, **options: Any) -> Tensor:
    """Scores (P, I, J) of layers xs and ys by a registered similarity, the rows of ys taken in each of the orders (P, n).

    The order 0 to n - 1 gives the scores themselves, random ones their distribution under chance. `options` are the
    metric's; `tick` is called after each order.

    Raises ValueError for an order that holds a row twice, and where the metric does.
    """
    if not torch.equal(orders.sort(1).values, torch.arange(orders.shape[1]).expand_as(orders)):
        raise ValueError("each order must hold every row once: rows drawn with replacement inflate a similarity")
    if metric in FAST:
        return FAST[metric](xs, ys, orders, tick, **options)
    function = get_similarity(metric)
    scores = torch.zeros(len(orders), len(xs), len(ys))
    for score, order in zip(scores, orders, strict=True):
        for j, y in enumerate(ys):
            moved = y[order]
            for i, x in enumerate(xs):
                score[i, j] = function(x, moved, **options)
        tick()
    return scores


def scores_without(xs: Layers, ys: Layers, metric: str, groups: Tensor, tick: Tick = lambda: None, **options: Any) -> Tensor:
    """Scores (G, I, J) without the rows of each group in turn: the replicates of a delete-group jackknife.

    groups (n,) holds the numbers 0 to G - 1, see `random_groups`; `tick` is called after each.
    """
    if metric in FAST_WITHOUT:
        return FAST_WITHOUT[metric](xs, ys, groups, tick, **options)
    scores = []
    for group in range(int(groups.max()) + 1):
        stay = groups != group
        order = torch.arange(int(stay.sum()))[None]
        scores.append(ordered_scores([x[stay] for x in xs], [y[stay] for y in ys], metric, order, **options)[0])
        tick()
    return torch.stack(scores)


def random_groups(n: int, count: int, seed: int = 0) -> Tensor:
    """Numbers 0 to count - 1 of n rows (n,), in random places, each as often as any other, give or take one."""
    return torch.arange(n)[torch.randperm(n, generator=torch.Generator().manual_seed(seed))] % count


def jackknife_error(replicates: Tensor) -> Tensor:
    """Standard error (...) from the replicates (G, ...) of a delete-group jackknife: √((G - 1) / G · Σ (θ_g - mean)²).

    Shao and Wu 1989, "A general theory for jackknife variance estimation". It has about G - 1 degrees of freedom, and is
    sound for scores that are no smooth function of the rows, such as mutual k-NN, where a group has more than √n rows.
    """
    count = len(replicates)
    return ((count - 1) / count * (replicates - replicates.mean(0)).square().sum(0)).sqrt()


def p_values(observed: Tensor, null: Tensor) -> Tensor:
    """(1 + how many of the null (P, ...) are at least the observed (...)) / (1 + P): never zero (Phipson and Smyth 2010).

    For the best of all layers give the largest score as the observed one and, as the null, the largest within each order
    (Westfall and Young 1993): this holds the family-wise error whatever the layers have in common.
    """
    return (1 + (null < observed).logical_not().sum(0)) / (1 + len(null))  # so that a NaN is no evidence


def critical_value(observed: Tensor, null: Tensor, level: float = 0.05) -> Tensor:
    """What a score (...) must exceed to be more than chance at `level`: an order statistic of it and the null (P, ...).

    The smallest value that a share 1 - level of these P + 1 does not exceed; a score above it has a p-value of at most `level`.
    """
    together = torch.cat([null, observed[None]]).sort(0).values
    rank = math.ceil((1 - level) * len(together) - 1e-9)
    return together[rank - 1]


def calibrate(score: Tensor, critical: Tensor, largest: float = 1.0) -> Tensor:
    """The score (...) on a scale from the critical value, 0, to the largest possible, 1; 0 below the critical value.

    Gröger, Wen and Brbić 2026, "Revisiting the Platonic Representation Hypothesis: an Aristotelian view", whose null for the
    best of all layers is the best within each order, too.
    """
    return ((score - critical) / (largest - critical)).clamp(min=0)
