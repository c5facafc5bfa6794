"""Scores of paired features: how alike do two models see the same things?

Everywhere x is (n, p) and y is (n, q), row i of both being a pair; p and q may differ, and the result is a scalar,
larger for more alike, 1 for alike in all that the score sees. What works on batches of features says so by leading
dots in its shapes. Arithmetic is float32 at least, whatever the input and the ambient autocast; float64 stays.
"""

from torch import Tensor

from ._common import direction, full_precision, in_a_unit, in_units
from .registry import register_similarity


@register_similarity("dot-product", comparable_across_batch_sizes=True)
def dot_product(x: Tensor, y: Tensor, normalize: bool = True) -> Tensor:
    """Mean over pairs of the cosine of the two rows, from -1 to 1.

    x: (..., n, p), y: (..., n, q) -> (...). Differentiable in both. Of two widths the narrower side is filled up with
    zeros: nothing is learnt or drawn, and coordinate j of one side is compared with coordinate j of the other, whatever
    they stand for. Independent of each row's unit; a row of zeros counts 0, with a finite gradient. With
    `normalize=False` it is the mean over pairs and common coordinates of the products themselves, which grows with both
    units and has no bound.

    "Cross-modal alignment regularization" A.7 says "the average elementwise dot product between aligned features"; that
    the rows are scaled and how widths are reconciled is our choice.
    """
    with full_precision(x, y, paired=True) as (x, y):
        common = min(x.shape[-1], y.shape[-1])
        if normalize:
            return (direction(x)[..., :common] * direction(y)[..., :common]).sum(-1).mean(-1)
        (x, unit_x), (y, unit_y) = in_a_unit(x), in_a_unit(y)
        product = (x[..., :common] * y[..., :common]).mean((-2, -1))
        return in_units(in_units(product, unit_x, 1), unit_y, 1)
