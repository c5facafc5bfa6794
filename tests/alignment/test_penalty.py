"""Penalties: what they give, and that they stay finite where their formulas don't."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from crossalign.alignment import get_penalty, koleo, l1, l2, penalties, register_penalty


def test_l1_and_l2_are_means_over_features_and_over_all_weights_of_a_model() -> None:
    x = torch.tensor([[1.0, -2.0], [3.0, 0.0]], requires_grad=True)
    assert float(l1(x).detach()) == 1.5 and float(l2(x).detach()) == 3.5
    (slope,) = torch.autograd.grad(l1(x), x)
    assert slope.tolist() == [[0.25, -0.25], [0.25, 0.0]]
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    entries = torch.cat([weight.flatten() for weight in model.parameters()])
    torch.testing.assert_close(l1(model.parameters()), entries.abs().mean())
    torch.testing.assert_close(l2(model.parameters()), entries.square().mean())
    l2(model.parameters()).backward()
    torch.testing.assert_close(model[1].weight.grad, 2 * model[1].weight.detach() / len(entries))
    assert l1(x.detach().bfloat16()).dtype == torch.float32 and l2(x.detach().double()).dtype == torch.float64
    for empty in ([], torch.zeros(0, 3)):
        with pytest.raises(ValueError, match="at least one number"):
            l1(empty)


def _koleo_reference(x: np.ndarray) -> float:
    """DINOv2's code in NumPy: the package that has it, lightly, comes with a trainer framework and a config system."""
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    distances = np.linalg.norm(x[:, None] - x[None], axis=-1) + np.diag(np.full(len(x), np.inf))
    return float(-np.log(distances.min(1) + 1e-8).mean())


@pytest.mark.parametrize("shape", [(2, 3), (17, 2), (64, 24), (10, 300)])
def test_koleo_is_the_definition_and_its_gradient_the_derivative(shape: tuple[int, int]) -> None:
    x = torch.randn(shape, dtype=torch.float64) + 0.3
    assert float(koleo(x)) == pytest.approx(_koleo_reference(x.numpy()), abs=1e-12)
    assert float(koleo(x.float())) == pytest.approx(_koleo_reference(x.numpy()), abs=1e-4)
    x = x[:20, :30].clone().requires_grad_()
    assert koleo(x).requires_grad
    assert torch.autograd.gradcheck(koleo, (x,), atol=1e-6)


@pytest.mark.parametrize("unit", [1e-4, 1e4])
def test_koleo_has_no_unit(unit: float) -> None:
    x = torch.randn(30, 8)
    for points in (x, x[:1].repeat(2, 1)):  # duplicates too: they push each other by the same angle
        torch.testing.assert_close(koleo(points * unit), koleo(points))
        gradients = []
        for scale in (1.0, unit):
            scaled = (points * scale).requires_grad_()
            koleo(scaled).backward()
            assert scaled.grad is not None and scaled.grad.isfinite().all()
            gradients.append(scaled.grad * scale)
        torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-3 * float(gradients[0].norm()))
    moved = points - 0.1 * gradients[1] / gradients[1].norm()
    assert float((moved[0] - moved[1]).norm()) > 0.1


@pytest.mark.parametrize("copies", [2, 3, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exact_duplicates_give_a_finite_koleo_that_repels(copies: int, dtype: torch.dtype) -> None:
    x = (torch.randn(1, 8).repeat(copies, 1) * 5).to(dtype).requires_grad_()
    value = koleo(x)
    value.backward()
    assert value.isfinite() and x.grad is not None and x.grad.isfinite().all()
    assert (x.grad.float().norm(dim=1) > 0).all()
    moved = x.detach().float() - 0.1 * x.grad.float() / x.grad.float().norm()
    apart = torch.pdist(moved)
    assert float(apart.min()) > 0 and float(koleo(moved)) < float(value.detach())


def test_near_duplicates_push_no_harder_than_at_the_least_distance() -> None:
    x = torch.randn(2, 8, dtype=torch.float64)
    x[1] = x[0] + 1e-7 * torch.randn(8, dtype=torch.float64)
    x.requires_grad_()
    koleo(x).backward()
    assert x.grad is not None and 0 < float(x.grad.norm()) < 3e4 / float(x[0].detach().norm())


def test_one_row_and_rows_of_zeros_are_finite() -> None:
    for x in (torch.randn(1, 4), torch.zeros(1, 4), torch.zeros(3, 4), torch.cat([torch.zeros(2, 4), torch.randn(2, 4)])):
        x.requires_grad_()
        value = koleo(x)
        value.backward()
        assert value.isfinite() and x.grad is not None and x.grad.isfinite().all()
        assert len(x) > 1 or (float(value.detach()) == 0 and not x.grad.any())


def test_koleo_is_computed_in_float32_and_spreads_what_it_is_minimised_on() -> None:
    x = (torch.randn(32, 4) * 0.05 + 1).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert koleo(x).dtype == torch.float32
        torch.testing.assert_close(koleo(x), koleo(x.detach()))
    before = float(koleo(x).detach())
    for _ in range(100):
        (gradient,) = torch.autograd.grad(koleo(x), x)
        with torch.no_grad():
            x -= 0.3 * gradient
    assert float(koleo(x).detach()) < before - 1
    with pytest.raises(ValueError, match=r"features of shape \(n, p\); got \(3,\)"):
        koleo(torch.zeros(3))
    x = torch.randn(5, 3)
    x[2, 1] = torch.nan
    assert koleo(x).isnan()


def test_penalties_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(penalties, "_entries", dict(penalties._entries))
    assert penalties.names() == ("koleo", "l1", "l2") and get_penalty("koleo") is koleo
    with pytest.raises(ValueError, match="unknown penalty 'kaleo'; did you mean 'koleo'"):
        get_penalty("kaleo")

    @register_penalty("norm")
    def norm(x: Tensor) -> Any:
        return x.norm()

    assert get_penalty("norm") is norm
