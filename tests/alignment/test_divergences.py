"""What every divergence of two samples must hold: gradients, symmetries, scaling, precision, clear refusals."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from crossalign.alignment import coral, cosine, mmd, mmd_orca, mse, sinkhorn
from crossalign.alignment._common import squared_distances

ALL: dict[str, Callable[..., Tensor]] = {
    "mse": mse,
    "cosine": cosine,
    "mmd": mmd,
    "mmd-mean": partial(mmd, scale="mean"),
    "mmd-v": partial(mmd, unbiased=False),
    "mmd-orca": mmd_orca,
    "coral": coral,
    "sinkhorn": sinkhorn,
    "sinkhorn-1": partial(sinkhorn, p=1),
    "sinkhorn-biased": partial(sinkhorn, debiased=False),
}
# Of the same, with a scale that doesn't follow the data: a numeric derivative would see the detached scale move.
FIXED: dict[str, Callable[..., Tensor]] = {
    **{name: ALL[name] for name in ("mse", "cosine", "coral")},
    "mmd": partial(mmd, scale=2.0),
    "mmd-v": partial(mmd, scale=2.0, unbiased=False, bandwidths=(0.3, 1.0, 2.0)),
    "sinkhorn": partial(sinkhorn, scale=2.0, blur=0.2, iterations=100),
    "sinkhorn-1": partial(sinkhorn, scale=2.0, blur=0.2, p=1, iterations=100),
    "sinkhorn-biased": partial(sinkhorn, scale=2.0, blur=0.2, debiased=False, iterations=100),
}
# How a divergence grows when the unit of length shrinks: its power.
POWER = {"mse": 2, "coral": 4, "sinkhorn": 2, "sinkhorn-1": 1, "sinkhorn-biased": 2}
# Those that see translations of both samples together: the directions of means.
ORIGIN_MATTERS = {"cosine"}


@pytest.mark.parametrize("name", FIXED)
def test_gradient_is_the_derivative_in_both_samples(name: str, samples: Any) -> None:
    x, y = samples(6, 5, 3)
    assert torch.autograd.gradcheck(FIXED[name], (x.requires_grad_(), y.requires_grad_()), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", FIXED)
def test_gradient_of_one_side_is_that_of_both(name: str, samples: Any) -> None:
    x, y = samples(6, 5, 3)
    both = [t.clone().requires_grad_() for t in (x, y)]
    FIXED[name](*both).backward()
    for side in (0, 1):
        alone = [t.clone().requires_grad_(side == k) for k, t in enumerate((x, y))]
        FIXED[name](*alone).backward()
        torch.testing.assert_close(alone[side].grad, both[side].grad)


def test_orca_gradient_holds_its_bandwidth_fixed(samples: Any) -> None:
    x, y = samples(6, 6, 3)
    pooled = torch.cat([x, y])
    scale = (torch.cdist(pooled, pooled).square().sum() / (12**2 - 12)).sqrt()
    ours, reference = x.clone().requires_grad_(), x.clone().requires_grad_()
    mmd_orca(ours, y).backward()
    mmd(reference, y, scale=scale, unbiased=False).backward()
    torch.testing.assert_close(ours.grad, reference.grad)


@pytest.mark.parametrize("name", ALL)
def test_order_of_points_and_of_samples_is_irrelevant(name: str, samples: Any) -> None:
    x, y = samples(40, 25, 8)
    value = ALL[name](x, y)
    torch.testing.assert_close(ALL[name](x.flip(0), y[torch.randperm(25)]), value, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(ALL[name](y, x), value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_rotation_and_translation_of_both(name: str, samples: Any) -> None:
    x, y = samples(40, 25, 8)
    value = ALL[name](x, y)
    rotation = torch.linalg.qr(torch.randn(8, 8, dtype=x.dtype)).Q
    torch.testing.assert_close(ALL[name](x @ rotation, y @ rotation), value, rtol=1e-5, atol=1e-7)
    if name not in ORIGIN_MATTERS:
        torch.testing.assert_close(ALL[name](x + 5, y + 5), value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("unit", [1e-4, 1e4])
@pytest.mark.parametrize("name", ALL)
def test_unit_of_length(name: str, unit: float, samples: Any) -> None:
    x, y = samples(40, 25, 8, dtype=torch.float32)
    value, gradient = _value_and_gradient(ALL[name], x, y)
    scaled, scaled_gradient = _value_and_gradient(ALL[name], x * unit, y * unit)
    power = POWER.get(name, 0)
    torch.testing.assert_close(scaled / unit**power, value, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(scaled_gradient * unit ** (1 - power), gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_float32_far_from_the_origin_agrees_with_float64(name: str, samples: Any) -> None:
    """Language models have coordinates with means in the thousands."""
    x, y = samples(64, 48, 16)
    offset = torch.zeros(16, dtype=x.dtype)
    offset[3] = 3000
    x, y = (x + offset).float(), (y + offset).float()
    reference, reference_gradient = _value_and_gradient(ALL[name], x.double(), y.double())
    value, gradient = _value_and_gradient(ALL[name], x, y)
    torch.testing.assert_close(value.double(), reference, rtol=2e-3, atol=1e-6)
    torch.testing.assert_close(gradient.double(), reference_gradient, rtol=1e-2, atol=1e-2 * float(gradient.abs().max()))


@pytest.mark.parametrize("name", ALL)
def test_float32_agrees_with_float64(name: str, samples: Any) -> None:
    x, y = samples(64, 48, 32)
    reference = ALL[name](x, y)
    assert reference.dtype == torch.float64
    torch.testing.assert_close(ALL[name](x.float(), y.float()).double(), reference, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_autocast_and_bfloat16_change_nothing_but_the_rounding_of_the_input(name: str, samples: Any) -> None:
    x, y = (t.bfloat16() for t in samples(64, 48, 32))
    reference, reference_gradient = _value_and_gradient(ALL[name], x.float(), y.float())
    x.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = ALL[name](x, y)
        value.backward()  # inside the block on purpose: a product left for the backward pass would be rounded
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, reference, rtol=1e-6, atol=1e-7)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, reference_gradient.bfloat16())


@pytest.mark.parametrize("name", ALL)
def test_batches_are_the_single_results(name: str, samples: Any) -> None:
    pairs = [samples(12, 9, 4, seed=seed) for seed in range(3)]
    x, y = torch.stack([p[0] for p in pairs]).requires_grad_(), torch.stack([p[1] for p in pairs])
    values = ALL[name](x, y)
    assert values.shape == (3,)
    values.sum().backward()
    for k, (one, other) in enumerate(pairs):
        value, gradient = _value_and_gradient(ALL[name], one, other)
        torch.testing.assert_close(values[k], value)
        assert x.grad is not None
        torch.testing.assert_close(x.grad[k], gradient, rtol=1e-5, atol=1e-8)
    shared = ALL[name](x.detach(), pairs[0][1])
    torch.testing.assert_close(shared[0], values[0].detach())


@pytest.mark.parametrize("name", ALL)
def test_identical_points_give_finite_values_and_gradients(name: str) -> None:
    x = torch.ones(6, 4, requires_grad=True)
    for y in (torch.ones(5, 4), torch.ones(5, 4) * 2, torch.zeros(5, 4)):
        value = ALL[name](x, y)
        (gradient,) = torch.autograd.grad(value, x)
        assert value.isfinite() and gradient.isfinite().all()
        if torch.equal(y, x[:5]) and name != "cosine":
            assert abs(float(value.detach())) < 1e-6


@pytest.mark.parametrize("name", sorted(set(ALL) - {"mmd", "mmd-mean", "sinkhorn-biased"}))
def test_a_sample_against_itself_scores_zero(name: str, samples: Any) -> None:
    x, _ = samples(50, 1, 8, dtype=torch.float32)
    assert abs(float(ALL[name](x, x.clone()))) < 1e-5


@pytest.mark.parametrize("name", ALL)
def test_duplicates_are_points_like_others(name: str, samples: Any) -> None:
    x, y = samples(20, 15, 4, dtype=torch.float32)
    x = torch.cat([x, x[:10]])
    value, gradient = _value_and_gradient(ALL[name], x, y)
    reference, reference_gradient = _value_and_gradient(ALL[name], x.double(), y.double())
    torch.testing.assert_close(value.double(), reference, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(gradient.double(), reference_gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_one_point(name: str) -> None:
    x, y = torch.tensor([[1.0, 2.0]]), torch.tensor([[4.0, 6.0]])
    if name in ("mmd", "mmd-mean", "mmd-v", "coral"):
        with pytest.raises(ValueError, match="at least 2 points"):
            ALL[name](x, y)
    else:
        assert float(ALL[name](x, y)) > 0


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (torch.zeros(3), torch.zeros(3, 2), r"shape \(n, d\)"),
        (torch.zeros(3, 2), torch.zeros(3, 4), "one width; got 2 and 4"),
        (torch.zeros(0, 2), torch.zeros(3, 2), "must not be empty"),
        (torch.zeros(3, 2).long(), torch.zeros(3, 2), "must be floating point"),
    ],
)
@pytest.mark.parametrize("name", ["mse", "mmd", "sinkhorn"])
def test_samples_that_do_not_fit_are_refused(name: str, x: Tensor, y: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ALL[name](x, y)


@pytest.mark.parametrize("name", ALL)
def test_nothing_waits_for_the_device(name: str) -> None:
    """A fake tensor has no values: whatever reads one on the host, or branches on it, fails here."""
    with FakeTensorMode():
        value = ALL[name](torch.randn(300, 8, requires_grad=True), torch.randn(20, 8))
        value.backward()
    assert value.shape == ()


def test_second_derivatives_are_refused_not_wrong(samples: Any) -> None:
    x, y = samples(6, 5, 3)
    x.requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(mmd(x, y) + x.square().sum(), x, create_graph=True)


def test_a_point_has_no_distance_from_itself(samples: Any) -> None:
    x, y = samples(30, 20, 8, dtype=torch.float32)
    x, y = x + 1000, y + 1000
    assert not squared_distances(x, x).diagonal().any()
    torch.testing.assert_close(squared_distances(x, y).sqrt(), torch.cdist(x.double(), y.double()).float())


def test_mse_is_the_squared_distance_of_the_means_over_the_width(samples: Any) -> None:
    x, y = samples(6, 5, 3)
    torch.testing.assert_close(3 * mse(x, y), (x.mean(0) - y.mean(0)).norm() ** 2)


def test_cosine_agrees_with_torch_and_sees_only_directions(samples: Any) -> None:
    x, y = samples(6, 5, 3)
    torch.testing.assert_close(cosine(x, y), 1 - torch.cosine_similarity(x.mean(0), y.mean(0), dim=0))
    torch.testing.assert_close(cosine(x, 1e-30 * x), torch.zeros((), dtype=x.dtype))
    torch.testing.assert_close(cosine(x, -3 * x), torch.tensor(2.0, dtype=x.dtype))


def test_coral_agrees_with_the_definition(samples: Any) -> None:
    x, y = samples(20, 15, 4)
    definition = (torch.cov(x.T) - torch.cov(y.T)).square().sum() / (4 * 4**2)
    torch.testing.assert_close(coral(x, y), definition)


def _value_and_gradient(divergence: Callable[..., Tensor], x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    value = divergence(x, y)
    (gradient,) = torch.autograd.grad(value, x)
    return value.detach(), gradient
