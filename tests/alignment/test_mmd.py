"""MMD: the statistics' expectations, the bandwidths, and agreement with independent computations."""

from __future__ import annotations

from typing import Any

import geomloss
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from crossalign.alignment import mmd, mmd_orca
from crossalign.alignment.divergence import MEDIAN_ROWS


def naive_orca(x: Tensor, y: Tensor) -> Tensor:
    """ORCA's formula written out over the pooled sample, pair by pair, for equally many points."""
    n = len(x)
    pooled = torch.cat([x, y])
    squared = (pooled[:, None] - pooled[None]).square().sum(-1)
    base = squared.sum() / (len(pooled) ** 2 - len(pooled)) / 4
    kernel = torch.stack([torch.exp(-squared / (base * 2**i)) for i in range(5)]).sum(0)
    return (kernel[:n, :n] + kernel[n:, n:] - kernel[:n, n:] - kernel[n:, :n]).mean()


def naive_mmd(x: Tensor, y: Tensor, squared_widths: list[float], unbiased: bool) -> Tensor:
    """Sum over kernels exp(-d^2 / width) of the U- or V-statistic, with loops over the pairs."""

    def mean(a: Tensor, b: Tensor, skip_diagonal: bool) -> Tensor:
        values = [
            sum(torch.exp(-(p - q).square().sum() / width) for width in squared_widths)
            for i, p in enumerate(a)
            for j, q in enumerate(b)
            if not (skip_diagonal and i == j)
        ]
        return torch.stack([torch.as_tensor(v) for v in values]).mean()

    return mean(x, x, unbiased) + mean(y, y, unbiased) - 2 * mean(x, y, False)


@pytest.mark.parametrize("n", [1, 8, 33])
def test_orca_form_is_orcas(n: int, samples: Any) -> None:
    x, y = samples(n, n, 16)
    torch.testing.assert_close(mmd_orca(x, y), naive_orca(x, y))
    x, y = x.float(), y.float()
    torch.testing.assert_close(mmd_orca(x, y), naive_orca(x, y), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("widths", [(0.25, 0.5, 1.0, 2.0, 4.0), (2.0, 0.3, 0.5)])
def test_agrees_with_the_definition(unbiased: bool, widths: tuple[float, ...], samples: Any) -> None:
    x, y = samples(7, 9, 3)
    ours = mmd(x, y, bandwidths=widths, unbiased=unbiased, scale=1.7)
    torch.testing.assert_close(ours, naive_mmd(x, y, [w * 1.7**2 for w in widths], unbiased))


@pytest.mark.parametrize("width", [0.25, 1.0, 4.0])
def test_v_statistic_is_twice_geomloss(width: float, samples: Any) -> None:
    x, y = samples(60, 40, 8)
    sigma = 2.5 * (width / 2) ** 0.5
    reference = 2 * geomloss.SamplesLoss("gaussian", blur=sigma, backend="tensorized")(x, y)
    ours = mmd(x, y, bandwidths=(width,), unbiased=False, scale=2.5)
    torch.testing.assert_close(ours, reference, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("n", "m"), [(4, 4), (4, 16), (16, 4), (32, 8)])
def test_unbiased_whatever_the_batch_sizes(n: int, m: int) -> None:
    """Many draws of equal distributions: the mean is within 3 of its standard errors of 0, the V-statistic's is not."""
    generator = torch.Generator().manual_seed(n * 100 + m)
    x, y = (torch.randn(3000, k, 5, generator=generator) for k in (n, m))
    values = mmd(x, y, scale=5**0.5)
    assert abs(float(values.mean())) < 3 * float(values.std()) / 3000**0.5
    biased = mmd(x, y, scale=5**0.5, unbiased=False)
    assert float(biased.mean()) > 50 * float(biased.std()) / 3000**0.5


def test_batch_sizes_do_not_change_the_expectation_of_different_samples() -> None:
    """Here the scale follows the data: it must weigh both samples equally, or the larger one would set it."""
    generator = torch.Generator().manual_seed(0)
    means = []
    for n, m in ((32, 32), (32, 128), (128, 32)):
        x = torch.randn(400, n, 8, generator=generator)
        y = 3 * torch.randn(400, m, 8, generator=generator)
        means.append(float(mmd(x, y).mean()))
    assert max(means) - min(means) < 0.03 * means[0], means


@pytest.mark.parametrize(("n", "bias"), [(8, 0.77), (32, 0.19), (128, 0.05)])
def test_the_published_form_is_biased_in_768_dimensions(n: int, bias: float) -> None:
    x, y = torch.randn(2, 8, n, 768, generator=torch.Generator().manual_seed(n))
    assert float(mmd_orca(x, y).mean()) == pytest.approx(bias, rel=0.05)
    assert abs(float(mmd(x, y).mean())) < 0.05 * bias


class Operations(TorchDispatchMode):
    """Counts exponentials and finds the largest tensor that is made."""

    exponentials, largest = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.exponentials += func.overloadpacket in (torch.ops.aten.exp, torch.ops.aten.exp_)
        for tensor in result if isinstance(result, tuple | list) else (result,):
            self.largest = max(self.largest, tensor.numel() if isinstance(tensor, Tensor) else 0)
        return result


@pytest.mark.parametrize(("widths", "exponentials"), [((0.25, 0.5, 1.0, 2.0, 4.0), 1), ((2.0, 0.3, 0.5), 3)])
def test_no_tensor_of_all_differences_and_few_exponentials(widths: tuple[float, ...], exponentials: int) -> None:
    """Of each of the three blocks of distances; a kernel of half the bandwidth is a square."""
    x, y = torch.randn(512, 32, requires_grad=True), torch.randn(512, 32)
    with Operations() as operations:
        mmd(x, y, bandwidths=widths).backward()
    assert operations.largest == 512 * 512 and operations.exponentials == 3 * exponentials


def test_median_scale_is_the_weighted_median_of_pairs(samples: Any) -> None:
    x, y = samples(30, 11, 5)
    pairs: list[tuple[float, float]] = []
    for within in (x, y):
        distances = torch.pdist(within)
        pairs += [(float(d), 0.25 / len(distances)) for d in distances]
    pairs += [(float(d), 0.5 / (30 * 11)) for d in torch.cdist(x, y).flatten()]
    reached, median = 0.0, 0.0
    for distance, weight in sorted(pairs):
        reached += weight
        median = distance
        if reached >= 0.5:
            break
    torch.testing.assert_close(mmd(x, y), mmd(x, y, scale=median), rtol=1e-6, atol=1e-9)


def test_median_of_large_samples_is_estimated_from_rows_spread_evenly(samples: Any) -> None:
    x, y = samples(MEDIAN_ROWS * 3 + 5, MEDIAN_ROWS + 1, 8)
    order = x[:, 0].argsort()  # sorted rows: the first ones alone would mislead
    distances = torch.cat([torch.pdist(x).median()[None], torch.pdist(y).median()[None]])
    assert float(distances[0]) < float(distances[1])
    torch.testing.assert_close(mmd(x[order], y), mmd(x, y), rtol=0.02, atol=0)


def test_median_of_mostly_duplicates_falls_back_on_the_mean() -> None:
    x = torch.zeros(20, 3)
    x[0] = 1.0
    y = torch.zeros(20, 3)
    torch.testing.assert_close(mmd(x, y), mmd(x, y, scale="mean"))
    assert float(mmd(x, y, unbiased=False)) > 0


def test_bandwidth_is_detached(samples: Any) -> None:
    x, y = samples(20, 20, 4)
    ours, fixed = x.clone().requires_grad_(), x.clone().requires_grad_()
    pooled = (torch.pdist(x).square().mean() + torch.pdist(y).square().mean()) / 4
    scale = (pooled + torch.cdist(x, y).square().mean() / 2).sqrt()
    mmd(ours, y, scale="mean").backward()
    mmd(fixed, y, scale=scale).backward()
    torch.testing.assert_close(ours.grad, fixed.grad)


def test_gradient_descent_matches_the_spread_that_the_means_do_not_show() -> None:
    generator = torch.Generator().manual_seed(0)
    x = (0.2 * torch.randn(64, 8, generator=generator)).requires_grad_()
    y = torch.randn(64, 8, generator=generator)
    optimizer = torch.optim.Adam([x], lr=0.05)
    for _ in range(100):
        optimizer.zero_grad()
        mmd(x, y).backward()
        optimizer.step()
    assert 0.8 < float(x.detach().std() / y.std()) < 1.2


@pytest.mark.parametrize("bandwidths", [(), (1.0, 0.0), (-1.0,)])
def test_bandwidths_must_be_positive(bandwidths: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="bandwidths must be"):
        mmd(torch.randn(3, 2), torch.randn(3, 2), bandwidths=bandwidths)


def test_unknown_scale_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown scale 'mode'"):
        mmd(torch.randn(3, 2), torch.randn(3, 2), scale="mode")
