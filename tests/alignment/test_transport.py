"""Sinkhorn divergences beside geomloss and exact optimal transport."""

from __future__ import annotations

from typing import Any

import geomloss
import ot
import pytest
import torch

from crossalign.alignment import sinkhorn
from crossalign.alignment._common import mean_squared_distance


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("debiased", [True, False])
@pytest.mark.parametrize(("n", "m", "d"), [(30, 30, 2), (40, 25, 16), (5, 60, 64)])
def test_agrees_with_geomloss(p: int, debiased: bool, n: int, m: int, d: int, samples: Any) -> None:
    """geomloss stops with its annealing, which must be slow for it to get this close."""
    x, y = samples(n, m, d)
    blur = 0.1 * float(mean_squared_distance(x, y).sqrt())
    reference = geomloss.SamplesLoss("sinkhorn", p=p, blur=blur, scaling=0.999, debias=debiased, backend="tensorized")
    torch.testing.assert_close(sinkhorn(x, y, blur=0.1, p=p, debiased=debiased), reference(x, y), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize(("n", "m", "d"), [(30, 30, 2), (40, 25, 16)])
def test_plan_and_gradient_agree_with_pot(p: int, n: int, m: int, d: int, samples: Any) -> None:
    x, y = samples(n, m, d)
    temperature = (0.1 * float(mean_squared_distance(x, y).sqrt())) ** p
    distances = torch.cdist(x, y)
    cost = distances**p / p
    plan = ot.sinkhorn([], [], cost.numpy(), temperature, method="sinkhorn_log", numItermax=20_000, stopThr=1e-12)
    slopes = torch.from_numpy(plan) * distances ** (p - 2)
    expected = slopes.sum(1, keepdim=True) * x - slopes @ y
    (gradient,) = torch.autograd.grad(sinkhorn(x.requires_grad_(), y, blur=0.1, p=p, debiased=False), x)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=5e-4 * float(expected.norm(dim=1).max()))


@pytest.mark.parametrize("p", [1, 2])
def test_tends_to_exact_transport(p: int, samples: Any) -> None:
    x, y = samples(25, 25, 4)
    weights = [1 / 25] * 25
    cost = torch.cdist(x, y) ** p
    exact = float(ot.emd2(weights, weights, cost.numpy())) / p
    assert float(sinkhorn(x, y, blur=0.01 ** (2 / p), p=p, iterations=2000)) == pytest.approx(exact, rel=1e-4)


def test_default_settings_have_converged(samples: Any) -> None:
    x, y = samples(160, 120, 32)
    torch.testing.assert_close(sinkhorn(x, y), sinkhorn(x, y, iterations=3000), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["outlier", "far apart", "collapsed", "clusters"])
def test_difficult_samples_converge_too(kind: str, samples: Any) -> None:
    x, y = samples(40, 30, 6)
    if kind == "outlier":
        x[0] *= 300
    elif kind == "far apart":
        y = y + 1000
    elif kind == "collapsed":
        x = x * 1e-3
    else:
        x, y = x + 30 * x[torch.arange(40) % 3], y + 30 * x[torch.arange(30) % 4]
    scale = float(mean_squared_distance(x, y).sqrt())
    converged = sinkhorn(x, y, iterations=3000)
    torch.testing.assert_close(sinkhorn(x, y), converged, rtol=0, atol=2e-5 * scale**2)
    torch.testing.assert_close(sinkhorn(x.float(), y.float()).double(), converged, rtol=1e-4, atol=5e-5 * scale**2)


def test_never_negative_beyond_rounding_and_zero_only_for_equals(samples: Any) -> None:
    x, y = samples(50, 50, 8)
    assert float(sinkhorn(x, x.flip(0))) == pytest.approx(0, abs=1e-6)
    assert float(sinkhorn(x, y)) > 0.1
    assert float(sinkhorn(x, x + 1e-2)) > 1e-6


def test_descending_it_moves_the_points_onto_the_target(samples: Any) -> None:
    x, y = samples(20, 20, 2)
    before = float(sinkhorn(x, y))
    for _ in range(30):
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(sinkhorn(x, y), x)
        x = x - 0.5 * 20 * gradient  # one n-th of a displacement is a point's gradient
    assert float(sinkhorn(x.detach(), y)) < 1e-3 * before


@pytest.mark.parametrize(
    ("settings", "message"), [({"p": 3}, "p = 1 and p = 2"), ({"blur": 0.0}, "blur must be a finite number above 0")]
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sinkhorn(torch.randn(3, 2), torch.randn(3, 2), **settings)
    with pytest.raises(ValueError, match="iterations must be a whole number, at least 1; got 0"):
        sinkhorn(torch.randn(3, 2), torch.randn(3, 2), iterations=0)
