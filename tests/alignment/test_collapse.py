"""Health numbers and the warning, on samples whose rank and spread are known."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from crossalign.alignment import collapse_warning, effective_rank, health, mse, participation_ratio


def isotropic(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def test_effective_rank_of_known_spectra() -> None:
    basis = torch.linalg.qr(isotropic(64, 9).double() - isotropic(64, 9).double().mean(0)).Q[:, :8]
    equal = basis @ torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q
    assert float(effective_rank(equal)) == pytest.approx(8, rel=1e-6)
    assert float(participation_ratio(equal)) == pytest.approx(8, rel=1e-6)
    values = torch.tensor([4.0, 2.0, 1.0, 1.0], dtype=torch.float64)
    uneven = basis[:, :4] * values
    shares = values / values.sum()
    assert float(effective_rank(uneven)) == pytest.approx(math.exp(-float((shares * shares.log()).sum())), rel=1e-6)
    assert float(participation_ratio(uneven)) == pytest.approx(22**2 / (256 + 16 + 2), rel=1e-6)


@pytest.mark.parametrize("rank", [effective_rank, participation_ratio])
def test_ranks_ignore_unit_and_origin_and_stand_degenerate_samples(rank: Any) -> None:
    x = isotropic(50, 12)
    for other in (x * 1e-4, x * 1e4, x + 100):
        torch.testing.assert_close(rank(other), rank(x), rtol=1e-3, atol=0)
    assert float(rank(torch.ones(5, 3))) == 0
    assert rank(torch.full((5, 3), float("nan"))).isnan()
    torch.testing.assert_close(rank(torch.stack([x, 2 * x])), rank(x).expand(2))


def test_equal_distributions_are_healthy() -> None:
    numbers = health(isotropic(200, 16), isotropic(300, 16, seed=1))
    expected = {"std", "std_text", "effective_rank", "effective_rank_text", "norm_ratio", "heldout_mmd"}
    assert set(numbers) == expected
    assert float(numbers["std"]) == pytest.approx(1, abs=0.05)
    assert float(numbers["norm_ratio"]) == pytest.approx(1, abs=0.05)
    assert abs(float(numbers["heldout_mmd"])) < 0.02
    assert collapse_warning(numbers) is None


def test_ranks_are_compared_on_equally_many_rows() -> None:
    """Ten points have rank 9 at most: beside 500 of the very same distribution they are healthy."""
    numbers = health(isotropic(10, 64), isotropic(500, 64, seed=1))
    assert float(numbers["effective_rank_text"]) == pytest.approx(float(numbers["effective_rank"]), rel=0.05)
    assert collapse_warning(numbers) is None


def test_matching_means_collapses_and_the_warning_says_so() -> None:
    """Points pulled to the text's mean score ever better by mse, and that is what the warning is for."""
    text = isotropic(200, 16)
    collapsed = text.mean(0) + 0.1 * isotropic(200, 16, seed=1)
    assert float(mse(collapsed, text)) < 1e-3
    warning = collapse_warning(health(collapsed, text))
    assert warning is not None and "std 0.1" in warning and "against 1" in warning and "norm" in warning


def test_a_line_has_spread_but_no_rank() -> None:
    text = isotropic(200, 16)
    line = 4 * isotropic(200, 1, seed=1) * torch.eye(16)[0] + 1e-3 * isotropic(200, 16, seed=2)
    warning = collapse_warning(health(line, text))
    assert warning is not None and "effective rank" in warning and "std" not in warning


def test_broken_embeddings_are_named() -> None:
    x = isotropic(20, 4)
    x[3, 2] = float("nan")
    warning = collapse_warning(health(x, isotropic(20, 4)))
    assert warning is not None and warning.startswith("the embeddings are broken: std, effective_rank")


def test_numbers_read_back_from_a_log_do_as_well() -> None:
    text = isotropic(100, 8)
    logged = {key: float(value) for key, value in health(0.01 * text, text).items()}
    assert collapse_warning(logged) == collapse_warning(health(0.01 * text, text))
    assert collapse_warning(logged, threshold=0.001) is None


def test_no_gradient_and_full_precision() -> None:
    x = isotropic(30, 8).bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        numbers = health(x, isotropic(30, 8, seed=1))
    assert all(value.dtype == torch.float32 and not value.requires_grad for value in numbers.values())


def test_one_point_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 points"):
        health(torch.ones(1, 3), torch.ones(5, 3))
