"""What every similarity must hold: gradients, invariances, precision, clear refusals; and what each is known to give."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from crossalign.alignment import (
    cca,
    cka,
    dot_product,
    get_similarity,
    kernel_alignment,
    linear_regression,
    mutual_knn,
    pwcca,
    register_similarity,
    similarities,
    soft_mutual_knn,
    svcca,
)

ALL: dict[str, Callable[..., Tensor]] = {name: get_similarity(name) for name in similarities.names()}
DIFFERENTIABLE = [name for name in ALL if get_similarity(name).differentiable]
CENTRED = [name for name in ALL if get_similarity(name).centred]
# Their number of directions is read from the data, so that the host waits and one call is one pair of matrices.
SPACES = ["cca", "svcca", "pwcca", "pwcca-fixed", "linear-regression"]
ROTATABLE = [name for name in ALL if name != "dot-product"]
# With whatever follows the data and is detached held fixed: a numeric derivative would see it move.
FIXED: dict[str, Callable[..., Tensor]] = {
    **{
        name: ALL[name]
        for name in DIFFERENTIABLE
        if name not in ("cka-rbf", "cka-rbf-debiased", "soft-mutual-knn", "pwcca-fixed")
    },
    "cka-rbf": partial(cka, kernel="rbf", bandwidth=3.0),
    "cka-rbf-debiased": partial(cka, kernel="rbf", bandwidth=3.0, debiased=True),
    "cca-squared": partial(cca, summary="mean_squared"),
    "pwcca-by-y": partial(pwcca, weight_by="y"),
    "svcca-few": partial(svcca, variance=0.8),
    "svcca-squared": partial(svcca, variance=0.7, summary="mean_squared"),
    "linear-regression-variance": partial(linear_regression, average="variance"),
    "dot-product-plain": partial(dot_product, normalize=False),
}


SHAPES = [(30, 5, 4), (30, 4, 6), (10, 12, 7)]
NEED_ROWS = ("cca", "cca-squared", "pwcca", "pwcca-by-y", "svcca", "linear-regression", "linear-regression-variance")


@pytest.mark.parametrize(
    ("name", "shape"), [(name, shape) for name in FIXED for shape in SHAPES if shape[0] > 10 or name not in NEED_ROWS]
)
def test_gradient_is_the_derivative_in_both_sides(name: str, shape: tuple[int, int, int], paired: Any) -> None:
    """More rows than features and fewer: each form of the products, and principal directions from both sides."""
    x, y = (side.requires_grad_() for side in paired(*shape))
    assert FIXED[name](x, y.detach()).requires_grad and FIXED[name](x.detach(), y).requires_grad
    assert torch.autograd.gradcheck(FIXED[name], (x, y), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("weight_by", ["x", "y"])
def test_gradient_of_pwcca_fixed_holds_its_weights(weight_by: str, side: int, paired: Any) -> None:
    pair = list(paired(40, 5, 4))
    centred = [z - z.mean(0) for z in pair]
    own = centred["xy".index(weight_by)]
    u, _, v = torch.linalg.svd(torch.linalg.qr(centred[0])[0].T @ torch.linalg.qr(centred[1])[0], full_matrices=False)
    directions = torch.linalg.qr(own)[0] @ (u if weight_by == "x" else v.T)
    weights = (own.T @ directions).abs().sum(0)

    def reference(*pair: Tensor) -> Tensor:
        bases = [torch.linalg.qr(z - z.mean(0))[0] for z in pair]
        return (torch.linalg.svdvals(bases[0].T @ bases[1]) * weights / weights.sum()).sum()

    for function in (reference, partial(pwcca, weight_by=weight_by, fixed_weights=True)):
        moved = [z.clone().requires_grad_(k == side) for k, z in enumerate(pair)]
        value = function(*moved)
        (gradient,) = torch.autograd.grad(value, moved[side])
        if function is reference:
            expected = value, gradient
        else:
            torch.testing.assert_close((value, gradient), expected)


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_gradient_of_the_soft_neighbours(distance: str, paired: Any) -> None:
    """Its width is detached: compared with autograd through the definition, with that width."""
    x, y = paired(20, 5, 4)
    ours, plain = x.clone().requires_grad_(), x.clone().requires_grad_()
    value = soft_mutual_knn(ours, y, k=3, temperature=0.3, distance=distance)

    def degree(z: Tensor) -> Tensor:
        z = torch.nn.functional.normalize(z) if distance == "cosine" else z
        square = (z[:, None] - z[None]).square().sum(-1)
        width = 0.3 * square.detach().sum() / (20 * 19)
        square = square + torch.diag(torch.full((20,), torch.inf, dtype=z.dtype))
        border = square.sort(-1).values[:, 2:4].mean(-1, keepdim=True)
        return torch.sigmoid((border - square) / width)

    a, b = degree(plain), degree(y)
    expected = (a * b).sum() / (a.norm() * b.norm())
    value.backward()
    expected.backward()
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(ours.grad, plain.grad)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradient_of_one_side_is_that_of_both(name: str, paired: Any) -> None:
    pair = paired(30, 5, 4)
    both = [z.clone().requires_grad_() for z in pair]
    ALL[name](*both).backward()
    for side in (0, 1):
        alone = [z.clone().requires_grad_(side == k) for k, z in enumerate(pair)]
        ALL[name](*alone).backward()
        torch.testing.assert_close(alone[side].grad, both[side].grad)
        assert both[side].grad is not None and both[side].grad.any()


@pytest.mark.parametrize("name", ALL)
def test_order_of_the_pairs_is_irrelevant_and_their_pairing_is_not(name: str, paired: Any) -> None:
    x, y = paired(60, 5, 4)
    order = torch.randperm(60)
    value = ALL[name](x, y)
    torch.testing.assert_close(ALL[name](x[order], y[order]), value)
    assert abs(float(ALL[name](x[order], y) - value)) > 0.02


@pytest.mark.parametrize("name", ROTATABLE)
def test_a_rotated_copy_scores_one(name: str, paired: Any) -> None:
    """So do centred scores of one that is moved too; a debiased one as well, which dividing by a biased norm would miss."""
    x, _ = paired(60, 8, 4)
    rotation = torch.linalg.qr(torch.randn(8, 8, dtype=x.dtype)).Q
    one = torch.ones((), dtype=x.dtype)
    torch.testing.assert_close(ALL[name](x, 3 * x @ rotation), one)
    torch.testing.assert_close(ALL[name](x.float(), x.float()), one.float(), rtol=0, atol=1e-5)
    if name in CENTRED:
        torch.testing.assert_close(ALL[name](x, x @ rotation + 7), one)


@pytest.mark.parametrize(("unit", "shape"), [(1e-4, (80, 8, 6)), (1e4, (80, 8, 6)), (1e-8, (24, 3, 3))])
@pytest.mark.parametrize("name", ALL)
def test_epsilons_are_relative_the_unit_changes_nothing(
    name: str, unit: float, shape: tuple[int, int, int], paired: Any
) -> None:
    x, y = paired(*shape, dtype=torch.float32)
    value = ALL[name](x, y)
    torch.testing.assert_close(ALL[name](x * unit, y), value, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ALL[name](x * unit, y / unit), value, rtol=1e-4, atol=1e-5)
    if name in DIFFERENTIABLE:
        _, gradient = _value_and_gradient(ALL[name], x, y)
        _, scaled = _value_and_gradient(ALL[name], x * unit, y / unit)
        torch.testing.assert_close(scaled * unit, gradient, rtol=1e-3, atol=1e-3 * float(gradient.abs().max()))


@pytest.mark.parametrize("name", ALL)
def test_a_coordinate_far_from_zero_costs_no_digits(name: str, paired: Any) -> None:
    """Language models have dimensions with means in the thousands: centred in the features first, they are harmless."""
    x, y = paired(64, 16, 12)
    x[:, 3] += 3000
    x, y = x.float(), y.float()
    value = ALL[name](x, y)
    torch.testing.assert_close(value.double(), ALL[name](x.double(), y.double()), rtol=1e-3, atol=1e-4)
    if name in CENTRED:
        without = x.double()
        without[:, 3] -= 3000
        torch.testing.assert_close(value.double(), ALL[name](without, y.double()), rtol=1e-3, atol=1e-4)
    if name in DIFFERENTIABLE:
        _, gradient = _value_and_gradient(ALL[name], x, y)
        _, reference = _value_and_gradient(ALL[name], x.double(), y.double())
        torch.testing.assert_close(gradient.double(), reference, rtol=1e-2, atol=1e-2 * float(reference.abs().max()))


@pytest.mark.parametrize("name", ALL)
def test_low_precision_input_is_computed_in_float32_with_autocast_off(name: str, paired: Any) -> None:
    x, y = (z.bfloat16() for z in paired(64, 12, 8))
    reference = ALL[name](x.float(), y.float())
    x.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = ALL[name](x, y)
        if name in DIFFERENTIABLE:
            value.backward()
    assert value.dtype == torch.float32 and ALL[name](x.double(), y).dtype == torch.float64
    torch.testing.assert_close(value.detach(), reference, rtol=1e-6, atol=1e-7)
    if name in DIFFERENTIABLE:
        _, gradient = _value_and_gradient(ALL[name], x.detach().float(), y.float())
        assert x.grad is not None
        torch.testing.assert_close(x.grad, gradient.bfloat16())


@pytest.mark.parametrize("name", [name for name in ALL if name not in SPACES])
def test_batches_are_the_single_results(name: str, paired: Any) -> None:
    pairs = [paired(13, 5, 4, seed=seed) for seed in range(3)]
    x, y = (torch.stack(sides) for sides in zip(*pairs, strict=True))
    x.requires_grad_()
    values = ALL[name](x, y)
    assert values.shape == (3,)
    for k, (one, other) in enumerate(pairs):
        torch.testing.assert_close(values[k].detach(), ALL[name](one, other))
    torch.testing.assert_close(ALL[name](x, pairs[0][1])[0], values[0])
    if name in DIFFERENTIABLE:
        values.sum().backward()
        for k, (one, other) in enumerate(pairs):
            assert x.grad is not None
            torch.testing.assert_close(x.grad[k], _value_and_gradient(ALL[name], one, other)[1])


@pytest.mark.parametrize("name", SPACES)
def test_scores_of_spaces_take_one_pair_of_matrices(name: str) -> None:
    with pytest.raises(ValueError, match=r"takes features of shapes \(n, p\) and \(n, q\); got \(2, 9, 3\)"):
        ALL[name](torch.randn(2, 9, 3), torch.randn(2, 9, 3))


@pytest.mark.parametrize("name", [name for name in ALL if name not in SPACES])
def test_nothing_waits_for_the_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fake tensor has no values: whatever reads one on the host, or branches on it, fails here.

    These are on the CPU, where constant features are looked for but for a graph that is being compiled.
    """
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with FakeTensorMode():
        value = ALL[name](torch.randn(40, 8, requires_grad=True), torch.randn(40, 6))
        if name in DIFFERENTIABLE:
            value.backward()
    assert value.shape == ()


@pytest.mark.parametrize("name", [name for name in CENTRED if name not in SPACES])
def test_a_constant_target_that_is_not_read_gives_no_number(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on an accelerator, where reading a value would make the host wait."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    x = torch.randn(40, 5)
    assert ALL[name](x, torch.full((40, 4), 0.1)).isnan() and ALL[name](torch.full((40, 4), 0.1), x).isnan()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ALL)
def test_what_is_not_finite_does_not_become_a_number(name: str, bad: float, paired: Any) -> None:
    for row in (0, 7):
        x, y = paired(40, 5, 4, dtype=torch.float32)
        x[row, 2] = bad
        assert ALL[name](x, y).isnan() and ALL[name](y, x).isnan()
        if name in DIFFERENTIABLE:
            assert not _value_and_gradient(ALL[name], x, y)[1].isfinite().all()


@pytest.mark.parametrize("name", ALL)
def test_a_constant_target_is_refused_where_it_would_be_zero_over_zero(name: str, paired: Any) -> None:
    """Not turned into a number by an epsilon: constant exactly, up to rounding, and on a device that is not read."""
    x, _ = paired(40, 5, 4, dtype=torch.float32)
    target = torch.full((40, 4), 0.1)
    noisy = 100 + 3e-5 * torch.randn(40, 4)
    assert len(noisy.unique(dim=0)) > 20
    assert (name in CENTRED) == get_similarity(name).centred
    for constant in (target, noisy):
        if name not in CENTRED:
            assert ALL[name](x, constant).isfinite()
            continue
        with pytest.raises(ValueError, match=r"those of y, are all equal.*kernel_alignment \('kernel-alignment'\)"):
            ALL[name](x, constant)
        with pytest.raises(ValueError, match=r"the rows of x, .* are all equal"):
            ALL[name](constant, x)


def test_a_constant_target_has_a_gradient_in_the_uncentred_alignment(paired: Any) -> None:
    x, _ = paired(40, 5, 4, dtype=torch.float32)
    value, gradient = _value_and_gradient(kernel_alignment, x, torch.full((40, 4), 0.1))
    expected = x.sum(0).square().sum() / (40 * (x @ x.T).norm())
    torch.testing.assert_close(value, expected)
    assert gradient.isfinite().all() and gradient.any()
    with pytest.raises(ValueError, match="kernel_alignment is 0 / 0 where all of a side is zero"):
        kernel_alignment(x, torch.zeros(40, 4))


@pytest.mark.parametrize("name", ALL)
def test_features_that_do_not_pair_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="as many rows of both; got 12 and 13"):
        ALL[name](torch.randn(12, 3), torch.randn(13, 3))
    with pytest.raises(ValueError, match="must be floating point"):
        ALL[name](torch.randn(12, 3), torch.ones(12, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="must not be empty"):
        ALL[name](torch.randn(12, 3), torch.randn(12, 0))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (partial(cka, kernel="cosine"), "unknown kernel 'cosine'"),
        (partial(cka, kernel="rbf", bandwidth="mean"), "unknown bandwidth 'mean'"),
        (partial(cca, summary="rho"), "unknown summary 'rho': use 'mean' or 'mean_squared'"),
        (partial(cca, on_degenerate="ignore"), "unknown on_degenerate"),
        (partial(svcca, variance=99), "variance is a part of the whole"),
        (partial(pwcca, weight_by="z"), "unknown weight_by 'z': use 'x' or 'y'"),
        (partial(linear_regression, average="mean"), "unknown average 'mean'"),
        (partial(mutual_knn, k=12), "12 nearest neighbours need at least 13 rows"),
        (partial(mutual_knn, k=0), "k must be a whole number, at least 1; got 0"),
        (partial(mutual_knn, distance="l1"), "unknown distance 'l1'"),
        (partial(soft_mutual_knn, k=3, temperature=0.0), "temperature must be a finite number above 0; got 0.0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(call: Callable[..., Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.randn(12, 3), torch.randn(12, 3))


def test_second_derivatives_are_refused_not_wrong(paired: Any) -> None:
    x, y = paired(12, 3, 3)
    x.requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(cka(x, y), x, create_graph=True)


def test_names_and_what_they_may_be_used_for() -> None:
    assert similarities.names() == (
        *("cca", "cka-linear", "cka-linear-debiased", "cka-rbf", "cka-rbf-debiased", "dot-product", "kernel-alignment"),
        *("linear-regression", "mutual-knn", "pwcca", "pwcca-fixed", "soft-mutual-knn", "svcca"),
    )
    assert [name for name in ALL if name not in DIFFERENTIABLE] == ["mutual-knn"]
    assert [name for name in ALL if get_similarity(name).ranks_rows] == ["mutual-knn", "soft-mutual-knn"]
    comparable = [name for name in ALL if get_similarity(name).comparable_across_batch_sizes]
    assert comparable == ["cka-linear-debiased", "cka-rbf-debiased", "dot-product"]
    with pytest.raises(ValueError, match="unknown similarity 'cka-linar'; did you mean 'cka-linear'"):
        get_similarity("cka-linar")
    with pytest.raises(ValueError, match="unknown similarity 'cka'; did you mean 'cka-rbf' or 'cka-linear'"):
        get_similarity("cka")


def test_ones_own_similarity_is_found_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(similarities, "_entries", dict(similarities._entries))

    @register_similarity("mean-cosine", comparable_across_batch_sizes=True)
    def mean_cosine(x: Tensor, y: Tensor) -> Tensor:
        return torch.cosine_similarity(x, y).mean()

    found = get_similarity("mean-cosine")
    assert found is mean_cosine and found.differentiable and not found.centred and found.comparable_across_batch_sizes
    with pytest.raises(ValueError, match="'cca' is registered already"):
        register_similarity("cca")(mean_cosine)


def _value_and_gradient(similarity: Callable[..., Tensor], x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    value = similarity(x, y)
    (gradient,) = torch.autograd.grad(value, x)
    return value.detach(), gradient
