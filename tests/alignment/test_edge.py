"""What comes in from outside: arguments that are refused by name, and values far from 1, whose result is right or refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from crossalign.alignment import (
    OtddTarget,
    cka,
    coral,
    dot_product,
    effective_rank,
    get_divergence,
    get_penalty,
    get_similarity,
    health,
    koleo,
    l1,
    l2,
    mmd,
    mse,
    mutual_knn,
    otdd,
    participation_ratio,
    sinkhorn,
    soft_mutual_knn,
    svcca,
)
from crossalign.alignment.registry import divergences, penalties, similarities

LABELS = torch.arange(40) % 3
PAIRED: dict[str, Callable[..., Tensor]] = {
    **{name: get_similarity(name) for name in similarities.names()},
    "mutual-knn-euclidean": partial(mutual_knn, distance="euclidean"),
    "soft-mutual-knn-euclidean": partial(soft_mutual_knn, distance="euclidean"),
    "dot-product-plain": partial(dot_product, normalize=False),
}
UNPAIRED: dict[str, Callable[..., Tensor]] = {
    **{name: get_divergence(name) for name in divergences.names() if name != "otdd"},
    "sinkhorn-1": partial(sinkhorn, p=1),
    "otdd": lambda x, y: otdd(x, LABELS, y, LABELS),
    "otdd-target": lambda x, y: OtddTarget(y, LABELS)(x, LABELS),
}
LONE: dict[str, Callable[..., Tensor]] = {
    **{name: get_penalty(name) for name in penalties.names()},
    "effective_rank": effective_rank,
    "participation_ratio": participation_ratio,
}
GROWS = {
    "mse": 2,
    "coral": 4,
    "sinkhorn": 2,
    "sinkhorn-1": 1,
    "otdd": 2,
    "otdd-target": 2,
    "dot-product-plain": 2,
    "l1": 1,
    "l2": 2,
}
"""The power of the data's unit that a value grows with; no other one depends on it."""


def calls(name: str, x: Tensor, y: Tensor) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    return (LONE[name], (x,)) if name in LONE else ((PAIRED | UNPAIRED)[name], (x, y))


@pytest.mark.parametrize("name", [*PAIRED, *UNPAIRED, *LONE])
@pytest.mark.parametrize("unit", [1e-20, 1e-15, 1e15, 1e20])
def test_values_of_any_size_give_the_right_value_or_an_error(name: str, unit: float) -> None:
    """float32 holds them, but not their squares; the gradient is right too."""
    torch.manual_seed(0)
    x, y = torch.randn(40, 6) + 1, torch.randn(40, 6)
    function, sides = calls(name, x, y)
    sides = (sides[0].requires_grad_(), *sides[1:])
    expected = function(*sides)
    right = float(expected.detach()) * unit ** GROWS.get(name, 0)
    large = [(side.detach() * unit).requires_grad_(side.requires_grad) for side in sides]
    if not 1e-38 < abs(right) < 3e38:
        try:
            assert float(function(*large).detach()) == pytest.approx(right, rel=1e-3, abs=0)
        except ValueError as error:
            assert "in another unit, or as float64" in str(error)
        return
    value = function(*large)
    assert float(value.detach()) == pytest.approx(right, rel=1e-4)
    if value.requires_grad and abs(unit ** (GROWS.get(name, 0) - 1)) < 1e30:
        expected.backward()
        value.backward()
        scale = unit ** (GROWS.get(name, 0) - 1)
        assert sides[0].grad is not None and large[0].grad is not None
        torch.testing.assert_close(large[0].grad.double() / scale, sides[0].grad.double(), rtol=1e-3, atol=1e-5)


def test_sides_of_very_different_units() -> None:
    x, y = torch.randn(40, 6), torch.randn(40, 5)
    for name in similarities.names():
        assert float(PAIRED[name](1e20 * x, 1e-20 * y)) == pytest.approx(float(PAIRED[name](x, y)), rel=1e-4)
    assert float(mmd(1e20 * x, x)) == pytest.approx(float(mmd(1e20 * x, 0 * x + x)), rel=1e-6)
    batch = torch.stack([x, 1e20 * x, 1e-20 * x])
    torch.testing.assert_close(cka(batch, torch.stack([y, y, 1e20 * y])), cka(x, y).expand(3), rtol=1e-4, atol=0)


def test_a_length_of_ones_own_is_in_the_datas_unit() -> None:
    x, y = torch.randn(40, 6), torch.randn(40, 6) + 1
    for unit in (1e-18, 1e18):
        assert float(mmd(unit * x, unit * y, scale=2 * unit)) == pytest.approx(float(mmd(x, y, scale=2.0)), rel=1e-4)
        for width in (2 * unit, torch.tensor(2 * unit)):
            rbf = float(cka(unit * x, unit * y, kernel="rbf", bandwidth=width))
            assert rbf == pytest.approx(float(cka(x, y, kernel="rbf", bandwidth=2.0)), rel=1e-4)
        assert float(sinkhorn(unit * x, unit * y, p=1, scale=unit)) == pytest.approx(
            unit * float(sinkhorn(x, y, p=1, scale=1.0)), rel=1e-4
        )
    with pytest.raises(ValueError, match=r"cka is 0 / 0 with a bandwidth of 1e\+20"):
        cka(x, y, kernel="rbf", bandwidth=1e20)


def test_health_of_values_of_any_size() -> None:
    x, y = torch.randn(40, 6), torch.randn(40, 6) + 1
    plain = health(x, y)
    for unit in (1e-20, 1e20):
        for name, value in health(unit * x, unit * y).items():
            assert float(value) == pytest.approx(float(plain[name]) * (unit if name in ("std", "std_text") else 1), rel=1e-4)


@pytest.mark.parametrize("name", [*PAIRED, *UNPAIRED])
@pytest.mark.parametrize(
    "wrong", [[[1.0, 2.0]] * 40, np.zeros((40, 6)), None, "features"], ids=["list", "array", "None", "text"]
)
def test_what_is_no_tensor_is_refused_by_name(name: str, wrong: Any) -> None:
    x = torch.randn(40, 6)
    with pytest.raises(ValueError, match=r"x must be a tensor of shape .*; got a \w+: torch.as_tensor makes one"):
        (PAIRED | UNPAIRED)[name](wrong, x)
    with pytest.raises(ValueError, match="y must be a tensor"):
        (PAIRED | UNPAIRED)[name](x, wrong)


@pytest.mark.parametrize("wrong", [[[1.0, 2.0]] * 40, np.zeros((40, 6)), None, 1.0], ids=type)
def test_penalties_and_health_take_tensors(wrong: Any) -> None:
    for function in (koleo, l1, l2, effective_rank, participation_ratio):
        with pytest.raises(ValueError, match="must be a tensor"):
            function(wrong)
    with pytest.raises(ValueError, match="x must be a tensor"):
        health(wrong, torch.randn(40, 6))
    with pytest.raises(ValueError, match="x_labels must be a tensor"):
        otdd(torch.randn(3, 2), wrong, torch.randn(3, 2), LABELS[:3])


NUMBERS = [0, -1, float("nan"), float("inf"), "2", None, True, [1.0]]
ABOVE_0: dict[str, Callable[[Any], Tensor]] = {
    "scale": lambda value: mmd(X, X, scale=value),
    "bandwidths": lambda value: mmd(X, X, bandwidths=(1.0, value)),
    "bandwidth": lambda value: cka(X, X, kernel="rbf", bandwidth=value),
    "temperature": lambda value: soft_mutual_knn(X, X, temperature=value),
    "blur": lambda value: sinkhorn(X, X, blur=value),
    "variance": lambda value: svcca(X, X, variance=value),
}
WHOLE: dict[str, Callable[[Any], Tensor]] = {
    "k": lambda value: mutual_knn(X, X, k=value),
    "iterations": lambda value: sinkhorn(X, X, iterations=value),
}
X = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("value", NUMBERS, ids=str)
@pytest.mark.parametrize("setting", ABOVE_0)
def test_numbers_that_are_not_above_0_are_refused_by_name(setting: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{setting} must be|unknown (scale|bandwidth) '2'"):
        ABOVE_0[setting](value)
    if isinstance(value, int | float) and value != 1:
        with pytest.raises(ValueError, match=f"{setting} must be"):
            ABOVE_0[setting](torch.tensor(float(value)))


@pytest.mark.parametrize("value", [*NUMBERS, 1.5], ids=str)
@pytest.mark.parametrize("setting", WHOLE)
def test_counts_that_are_not_whole_are_refused_by_name(setting: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{setting} must be a whole number, at least 1"):
        WHOLE[setting](value)


@pytest.mark.parametrize("registry", [get_similarity, get_divergence, get_penalty])
@pytest.mark.parametrize("name", [5, None, ["cka"]], ids=str)
def test_names_are_text(registry: Callable[[Any], Any], name: Any) -> None:
    with pytest.raises(ValueError, match="give its name"):
        registry(name)


ROWS = torch.randn(12, 4, generator=torch.Generator().manual_seed(5))
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "an empty batch": (lambda: sinkhorn(ROWS[:0, None], ROWS[:0, None]), "must not be empty"),
    "batches of two sizes": (lambda: mmd(ROWS.expand(2, -1, -1), ROWS.expand(3, -1, -1)), "must agree, or be 1 on one side"),
    "a tiny scale": (lambda: sinkhorn(ROWS, ROWS + 1, scale=1e-30), "blur times scale"),
    "a tiny blur": (lambda: otdd(ROWS, LABELS[:12], ROWS + 1, LABELS[:12], blur=1e-30), "blur times scale"),
    "a tiny bandwidth": (lambda: cka(ROWS * 1e24, ROWS, kernel="rbf", bandwidth=1e-30), "the square of a bandwidth"),
    "a huge scale": (lambda: mmd(ROWS, ROWS, scale=1e30), "the square of scale"),
    "a gradient beyond the type": (lambda: mse((ROWS * 1e26).requires_grad_(), ROWS * 1e26), "beyond the range"),
    "an array without a dimension": (lambda: l2(np.float32(1) + np.zeros(())), "must be a tensor"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_number_is_refused_in_a_sentence(case: str) -> None:
    call, words = REFUSED[case]
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_no_number_is_never_scored(value: float) -> None:
    rows = ROWS.clone()
    rows[3, 0] = value
    assert koleo(rows[3:4]).isnan() and mutual_knn(rows, rows, k=1).isnan()


def test_ranks_are_0_for_rows_that_agree_and_have_slopes_where_columns_are_empty() -> None:
    equal = ROWS[:1].expand(40, -1) * 3
    assert effective_rank(equal) == participation_ratio(equal) == 0
    empty = ROWS.clone()
    empty[:, 0] = 0
    effective_rank(empty.requires_grad_()).backward()
    assert empty.grad is not None and empty.grad.isfinite().all()


def test_labels_weights_are_numbers_from_0() -> None:
    for value in (-1, float("nan"), "1"):
        with pytest.raises(ValueError, match="label_weight must be"):
            otdd(X, LABELS, X, LABELS, label_weight=value)
    with pytest.raises(ValueError, match="bandwidths must be a sequence"):
        mmd(X, X, bandwidths=5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="x lies on meta and y on cpu"):
        coral(X.to("meta"), X)
