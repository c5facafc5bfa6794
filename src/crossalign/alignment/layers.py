"""All layers of one model against all of another at once, with the rows of one side in other orders, or without some rows.

A permutation test asks for each score hundreds of times. What a score needs of each side is the same in every order of its
rows: of CKA the kernel, of mutual k-NN who is whose neighbour. So these are made once a layer, and an order only looks them
up elsewhere; for CKA, all pairs of layers are then one matrix product.

Shapes: n rows, I layers of x, J of y, each layer (n, p) of a width of its own; P orders, G groups.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .kernels import kernel_matrix, unit_kernel
from .neighbours import neighbour_shares

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
    held = torch.stack([_unit(x, kernel, debiased)[above, across] * twice for x in xs])
    table = torch.stack([_unit(y, kernel, debiased).flatten() for y in ys], dim=1)  # (n², J): a pair's J values in a row
    scores = held.new_zeros(len(orders), len(xs), len(ys))
    for score, order in zip(scores, orders, strict=True):
        pairs = order[above] * n + order[across]
        for some, places in zip(held.split(CHUNK, dim=1), pairs.split(CHUNK), strict=True):
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
    found = []
    for group in range(int(groups.max()) + 1):
        gone, stay = (groups == group).nonzero().flatten(), (groups != group).nonzero().flatten()
        rows = x[:, gone], y[:, gone]
        parts = zip(whole, _products(*rows), _products(rows[0][:, :, gone], rows[1][:, :, gone]), strict=True)
        kept = [all_rows - 2 * some + both for all_rows, some, both in parts]  # rows and columns that go, their corner once
        row_x, row_y = (total[:, stay] - side.sum(1)[:, stay] for total, side in zip(sums, rows, strict=True))
        whole_x, whole_y = row_x.sum(1), row_y.sum(1)
        if kernel != "plain":
            n = len(stay)
            single, total = (2 / (n - 2), 1 / ((n - 1) * (n - 2))) if debiased else (2 / n, 1 / n**2)
            kept[0] += total * torch.outer(whole_x, whole_y) - single * row_x @ row_y.T
            kept[1] += total * whole_x.square() - single * row_x.square().sum(1)
            kept[2] += total * whole_y.square() - single * row_y.square().sum(1)
        found.append(kept[0] / torch.outer(kept[1], kept[2]).sqrt())
        tick()
    return torch.stack(found)


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
    held = [(*shares.nonzero(as_tuple=True), shares[shares > 0][:, None]) for shares in neighbours]
    scores = table.new_zeros(len(orders), len(xs), len(ys))
    for score, order in zip(scores, orders, strict=True):
        place = order.argsort()  # where a row of y comes to stand
        for j, (rows, others, shares) in enumerate(held):
            score[:, j] = torch.minimum(table[place[rows] * n + place[others]], shares).sum(0) / (n * k)
        tick()
    return scores
