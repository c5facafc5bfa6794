"""The data-set distance: labels must count, in the value and in the gradient, on both sides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import ot
import pytest
import torch
from torch import Tensor

from crossalign.alignment import OtddTarget, otdd, sinkhorn
from crossalign.alignment.labelled import _label_distances, _Labelled


def exact_label_distances(x: Tensor, x_labels: Tensor, y: Tensor, y_labels: Tensor) -> np.ndarray:
    """Squared Gaussian Wasserstein distances of every two labels, by POT."""
    return textbook_label_distances(x, x_labels, y, y_labels, lambda *g: ot.gaussian.bures_wasserstein_distance(*g) ** 2)


def textbook_label_distances(
    x: Tensor, x_labels: Tensor, y: Tensor, y_labels: Tensor, distance: Callable[..., float]
) -> np.ndarray:
    table = np.zeros((len(x_labels.unique()), len(y_labels.unique())))
    for i, a in enumerate(x_labels.unique()):
        for j, b in enumerate(y_labels.unique()):
            p, q = x[x_labels == a].numpy(), y[y_labels == b].numpy()
            table[i, j] = distance(p.mean(0), q.mean(0), np.cov(p.T), np.cov(q.T))
    return table


def bures_by_roots(mean_a: np.ndarray, mean_b: np.ndarray, a: np.ndarray, b: np.ndarray) -> float:
    """The definition with matrix roots, for covariances of low rank, which POT answers with NaN."""

    def root(matrix: np.ndarray) -> np.ndarray:
        values, vectors = np.linalg.eigh(matrix)
        return (vectors * np.sqrt(values.clip(0))) @ vectors.T

    cross = root(root(a) @ b @ root(a))
    return float(((mean_a - mean_b) ** 2).sum() + np.trace(a) + np.trace(b) - 2 * np.trace(cross))


@pytest.mark.parametrize(("n", "m", "d"), [(80, 60, 5), (400, 40, 5)])
def test_label_distances_agree_with_pot(n: int, m: int, d: int, labelled: Any) -> None:
    x, x_labels, y, y_labels = labelled(n, m, d)
    reference = exact_label_distances(x, x_labels, y, y_labels)
    ours = _label_distances(_Labelled(x, x_labels, "x"), _Labelled(y, y_labels, "y"))
    np.testing.assert_allclose(ours.numpy(), reference, rtol=1e-6)
    single = _label_distances(_Labelled(x.float(), x_labels, "x"), _Labelled(y.float(), y_labels, "y"))
    np.testing.assert_allclose(single.numpy(), reference, rtol=1e-4)


@pytest.mark.parametrize(("n", "m"), [(30, 24), (400, 24), (24, 400)])
def test_label_distances_with_fewer_points_than_dimensions(n: int, m: int, labelled: Any) -> None:
    x, x_labels, y, y_labels = labelled(n, m, 24)
    reference = textbook_label_distances(x, x_labels, y, y_labels, bures_by_roots)
    ours = _label_distances(_Labelled(x, x_labels, "x"), _Labelled(y, y_labels, "y"))
    np.testing.assert_allclose(ours.numpy(), reference, rtol=1e-5)
    single = _label_distances(_Labelled(x.float(), x_labels, "x"), _Labelled(y.float(), y_labels, "y"))
    np.testing.assert_allclose(single.numpy(), ours.numpy(), rtol=1e-4)


def test_tends_to_exact_transport_over_points_and_labels(labelled: Any) -> None:
    x, x_labels, y, y_labels = labelled(32, 32, 4)
    table = exact_label_distances(x, x_labels, y, y_labels)
    cost = torch.cdist(x, y).square().numpy() + 0.5 * table[x_labels.numpy()][:, y_labels.numpy()]
    weights = [1 / 32] * 32
    ours = otdd(x, x_labels, y, y_labels, blur=0.01, label_weight=0.5, iterations=2000)
    assert float(ours) == pytest.approx(float(ot.emd2(weights, weights, cost)), rel=1e-4)


@pytest.mark.parametrize("debiased", [True, False])
@pytest.mark.parametrize(("n", "m", "d", "classes"), [(12, 9, 2, 3), (8, 6, 4, 3), (7, 5, 3, 2)])
def test_gradient_is_the_derivative(n: int, m: int, d: int, classes: int, debiased: bool, labelled: Any) -> None:
    """With more points to a label than dimensions, fewer, and about as many."""
    x, x_labels, y, y_labels = labelled(n, m, d, classes)

    def distance(x: Tensor, y: Tensor) -> Tensor:
        return otdd(x, x_labels, y, y_labels, blur=0.2, scale=3.0, debiased=debiased, iterations=150)

    assert torch.autograd.gradcheck(distance, (x.requires_grad_(), y.requires_grad_()), atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("side", ["x", "y"])
def test_shuffling_labels_changes_value_and_gradient(side: str, labelled: Any) -> None:
    x, x_labels, y, y_labels = labelled(120, 60, 16)
    x.requires_grad_()
    shuffled = [x_labels, y_labels]
    shuffled[side == "y"] = shuffled[side == "y"][torch.randperm(len(shuffled[side == "y"]))]
    value, other = otdd(x, x_labels, y, y_labels), otdd(x, shuffled[0], y, shuffled[1])
    assert abs(float((value - other).detach())) > 0.01 * float(value.detach())
    gradients = [torch.autograd.grad(v, x)[0].flatten() for v in (value, other)]
    assert float(torch.cosine_similarity(*gradients, dim=0)) < 0.95


def test_label_distances_pull_even_where_the_plan_is_forced(labelled: Any) -> None:
    """A single point on one side leaves no choice of mass: the labels act through their distances alone."""
    x, x_labels, y, _ = labelled(40, 1, 6)
    x.requires_grad_()
    arguments = (x, x_labels, y, torch.zeros(1, dtype=torch.long))
    with_labels = torch.autograd.grad(otdd(*arguments, scale=1.0, debiased=False), x)[0]
    without = torch.autograd.grad(otdd(*arguments, scale=1.0, debiased=False, label_weight=0.0), x)[0]
    assert float((with_labels - without).norm()) > 0.1 * float(without.norm())


def test_renaming_labels_changes_nothing(labelled: Any) -> None:
    x, x_labels, y, y_labels = labelled(60, 40, 6)
    value = otdd(x, x_labels, y, y_labels)
    torch.testing.assert_close(otdd(x, (x_labels * 17 - 5) % 68, y, y_labels + 100), value)
    order = torch.randperm(60)
    torch.testing.assert_close(otdd(x[order], x_labels[order], y, y_labels), value, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(otdd(y, y_labels, x, x_labels), value, rtol=1e-5, atol=1e-4)


def test_distance_from_itself_is_zero(labelled: Any) -> None:
    x, x_labels, _, _ = labelled(200, 1, 16)
    for sample in (x, x.float()):
        own = sample.clone().requires_grad_()
        value = otdd(own, x_labels, sample, x_labels)
        (gradient,) = torch.autograd.grad(value, own)
        assert abs(float(value.detach())) < 1e-5 * float(sample.square().sum(1).mean())
        assert float(gradient.norm()) < 1e-2 * float(sample.norm()) / len(sample)


def test_without_label_weight_it_is_twice_the_sinkhorn_divergence(labelled: Any) -> None:
    x, x_labels, y, y_labels = labelled(60, 40, 6)
    torch.testing.assert_close(otdd(x, x_labels, y, y_labels, label_weight=0.0), 2 * sinkhorn(x, y))


@pytest.mark.parametrize("unit", [1e-4, 1e4])
def test_unit_of_length(unit: float, labelled: Any) -> None:
    x, x_labels, y, y_labels = labelled(60, 40, 6)
    x, y = x.float(), y.float()
    scaled = otdd(x * unit, x_labels, y * unit, y_labels) / unit**2
    torch.testing.assert_close(scaled, otdd(x, x_labels, y, y_labels), rtol=1e-4, atol=1e-5)


def test_rotation_translation_and_float32(labelled: Any) -> None:
    x, x_labels, y, y_labels = labelled(60, 40, 6)
    value = otdd(x, x_labels, y, y_labels)
    rotation = torch.linalg.qr(torch.randn(6, 6, dtype=x.dtype)).Q
    torch.testing.assert_close(otdd(x @ rotation + 9, x_labels, y @ rotation + 9, y_labels), value, rtol=1e-5, atol=0)
    torch.testing.assert_close(otdd(x.float(), x_labels, y.float(), y_labels).double(), value, rtol=1e-4, atol=0)


def test_target_computed_once_gives_the_same(labelled: Any) -> None:
    x, x_labels, y, y_labels = labelled(50, 90, 6)
    target = OtddTarget(y, y_labels)
    torch.testing.assert_close(target.scale, torch.pdist(y).square().mean().mul(89 / 90).sqrt())
    ours, plain = x.clone().requires_grad_(), x.clone().requires_grad_()
    value = target(ours, x_labels)
    reference = otdd(plain, x_labels, y, y_labels, scale=target.scale)
    torch.testing.assert_close(value, reference)
    value.backward()
    reference.backward()
    torch.testing.assert_close(ours.grad, plain.grad)
    with pytest.raises(ValueError, match="float64"):
        OtddTarget(y.float(), y_labels)(x, x_labels)


def test_autocast_and_bfloat16(labelled: Any) -> None:
    x, x_labels, y, y_labels = labelled(60, 40, 8)
    x, y = x.bfloat16(), y.bfloat16()
    plain = x.float().requires_grad_()
    reference = otdd(plain, x_labels, y.float(), y_labels)
    reference.backward()
    x.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = otdd(x, x_labels, y, y_labels)
        value.backward()
    assert value.dtype == torch.float32 and plain.grad is not None
    torch.testing.assert_close(value, reference, rtol=1e-6, atol=0)
    torch.testing.assert_close(x.grad, plain.grad.bfloat16())


@pytest.mark.parametrize("case", ["one point a class", "one class", "duplicates", "identical"])
def test_degenerate_classes_are_finite(case: str) -> None:
    x, y = torch.randn(12, 5, generator=torch.Generator().manual_seed(0)), torch.ones(8, 5)
    y[:4] = 2.0
    x_labels, y_labels = torch.arange(12) % 3, torch.arange(8) % 2
    if case == "one point a class":
        x_labels = torch.arange(12)
    elif case == "one class":
        x_labels = y_labels = torch.zeros(12, dtype=torch.long)
        y = x[:1].repeat(12, 1)
    elif case == "duplicates":
        x[6:] = x[:6]
    else:
        x = torch.ones(12, 5)
    x.requires_grad_()
    value = otdd(x, x_labels, y, y_labels)
    (gradient,) = torch.autograd.grad(value, x)
    assert value.isfinite() and gradient.isfinite().all()


def test_values_that_are_not_finite_come_out_as_nan(labelled: Any) -> None:
    x, x_labels, y, y_labels = labelled(20, 20, 4)
    x[0, 0] = float("nan")
    assert otdd(x, x_labels, y, y_labels).isnan()


@pytest.mark.parametrize("labels", [torch.zeros(5, dtype=torch.long), torch.zeros(6, 1, dtype=torch.long), torch.zeros(6)])
def test_labels_that_do_not_fit_are_refused(labels: Tensor) -> None:
    with pytest.raises(ValueError, match="x_labels must be 6 integers"):
        otdd(torch.randn(6, 2), labels, torch.randn(4, 2), torch.zeros(4, dtype=torch.long))
    with pytest.raises(ValueError, match=r"shape \(n, d\)"):
        otdd(torch.randn(2, 6, 2), labels, torch.randn(4, 2), torch.zeros(4, dtype=torch.long))
