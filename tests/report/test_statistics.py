"""The tests of the tests: references, null simulations, and what happens where there is nothing to test."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats

from crossalign.stats import (
    combine_mcnemar,
    detectable_difference,
    effect_size,
    holm,
    mcnemar,
    mean_and_error,
    paired_bootstrap,
    paired_t,
    paired_t_power,
    seeds_needed,
    wilson,
)

ALPHAS = (0.01, 0.05, 0.1)


def test_mean_and_standard_error() -> None:
    told = mean_and_error([1.0, 2.0, 4.0, math.nan])
    assert told.mean == pytest.approx(7 / 3)
    assert told.error == pytest.approx(scipy.stats.sem([1.0, 2.0, 4.0]))
    assert told.n == 3
    assert mean_and_error([5.0]).error is None
    assert math.isnan(mean_and_error([]).mean)


def test_paired_t_equals_scipy() -> None:
    draw = np.random.default_rng(0)
    for n in (2, 3, 10):
        a, b = draw.normal(size=n), draw.normal(0.3, size=n)
        reference = scipy.stats.ttest_rel(b, a)
        told = paired_t(a, b)
        low, high = reference.confidence_interval(0.95)
        assert told.difference == pytest.approx(np.mean(b - a))
        assert told.p_value == pytest.approx(reference.pvalue)
        assert told.interval == pytest.approx((low, high))


def test_paired_t_says_what_it_cannot_know() -> None:
    one = paired_t([0.5], [0.6])
    assert one.difference == pytest.approx(0.1) and one.p_value is None and one.interval is None
    assert "one seed" in one.reason
    same = paired_t([0.1, 0.2, 0.3], [0.2, 0.3, 0.4])  # differences equal but for rounding
    assert same.p_value is None and "undefined" in same.reason
    assert paired_t([0.1, 0.2], [0.1, 0.2]).p_value == 1.0
    with pytest.raises(ValueError, match="equally long"):
        paired_t([0.1], [0.1, 0.2])


@pytest.mark.parametrize("n", [3, 5])
def test_paired_t_under_the_null(n: int) -> None:
    draw = np.random.default_rng(n)
    told = [paired_t(np.zeros(n), draw.normal(size=n)) for _ in range(2000)]
    p = np.array([one.p_value for one in told])
    for alpha in ALPHAS:
        assert np.mean(p <= alpha) <= alpha + 0.015
    covered = np.mean([one.interval is not None and one.interval[0] <= 0 <= one.interval[1] for one in told])
    assert covered == pytest.approx(0.95, abs=0.015)


def pairs(both: int, only_a: int, only_b: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    cells = np.repeat([[1, 1], [1, 0], [0, 1], [0, 0]], [both, only_a, only_b, neither], axis=0).astype(bool)
    return cells[:, 0], cells[:, 1]


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (1, 0), (7, 2), (5, 5), (30, 60)])
def test_mcnemar_equals_the_binomial_test(only_a: int, only_b: int) -> None:
    told = mcnemar(*pairs(40, only_a, only_b, 20))
    assert (told.only_a, told.only_b, told.n) == (only_a, only_b, 60 + only_a + only_b)
    assert told.difference == pytest.approx((only_b - only_a) / told.n)
    count = only_a + only_b
    expected = scipy.stats.binomtest(only_b, count, 0.5).pvalue if count else 1.0
    assert told.p_value == pytest.approx(expected)
    assert combine_mcnemar([told]) == pytest.approx(expected)


def test_mcnemar_interval_covers() -> None:
    draw = np.random.default_rng(1)
    inside = []
    for _ in range(2000):
        kind = draw.choice(4, size=300, p=[0.5, 0.12, 0.08, 0.3])
        low, high = mcnemar(kind <= 1, (kind == 0) | (kind == 2)).interval
        inside.append(low <= -0.04 <= high)
    assert np.mean(inside) == pytest.approx(0.95, abs=0.015)


def test_mcnemar_refuses_other_images() -> None:
    with pytest.raises(ValueError, match="same images"):
        mcnemar([True], [True, False])


def _dependent_seeds(draw: np.random.Generator, shared: float) -> list:
    """Three seeds of two equally good methods; ``shared``: how much of its luck with an image all seeds share."""
    methods = draw.normal(size=(2, 1, 200))
    luck = math.sqrt(shared) * methods + math.sqrt(1 - shared) * draw.normal(size=(2, 3, 200))
    return [mcnemar(luck[0, seed] > 0, luck[1, seed] > 0) for seed in range(3)]


@pytest.mark.parametrize("shared", [0.0, 0.5, 1.0])
def test_combined_mcnemar_under_the_null(shared: float) -> None:
    draw = np.random.default_rng(2)
    p = np.array([combine_mcnemar(_dependent_seeds(draw, shared)) for _ in range(700)])
    for alpha in ALPHAS:
        assert np.mean(p <= alpha) <= alpha + 0.015


def test_pooling_the_seeds_would_claim_too_much() -> None:
    """Why the rule exists: added counts of dependent seeds reject a true null far too often."""
    draw = np.random.default_rng(3)
    rejected = 0
    for _ in range(300):
        tests = _dependent_seeds(draw, 1.0)
        b, n = sum(t.only_b for t in tests), sum(t.only_a + t.only_b for t in tests)
        rejected += scipy.stats.binomtest(b, n, 0.5).pvalue <= 0.05
    assert rejected / 300 > 0.15


def test_seeds_that_contradict_each_other_do_not_add_up() -> None:
    better, worse = mcnemar(*pairs(50, 5, 30, 50)), mcnemar(*pairs(50, 30, 5, 50))
    agreeing = combine_mcnemar([better, better, better])
    assert agreeing is not None and agreeing < 0.001
    assert combine_mcnemar([better, worse]) == pytest.approx(2 * 2 * better.p_value / 2)
    assert combine_mcnemar([]) is None


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([None, 0.02, None]) == [None, 0.02, None]
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize(("effect", "n"), [(0.5, 5), (1.0, 10), (3.0, 3), (0.0, 4)])
def test_power_equals_the_noncentral_t(effect: float, n: int) -> None:
    critical, shift = scipy.stats.t.ppf(0.975, n - 1), effect * math.sqrt(n)
    exact = scipy.stats.nct.sf(critical, n - 1, shift) + scipy.stats.nct.cdf(-critical, n - 1, shift)
    assert paired_t_power(effect, n) == pytest.approx(exact, abs=1e-4)


def test_smallest_difference_and_seeds_needed() -> None:
    smallest = detectable_difference(0.02, 3)
    assert smallest is not None
    assert smallest / 0.02 == pytest.approx(3.264, abs=0.002)  # three seeds see little
    draw = np.random.default_rng(4)
    found = [paired_t(np.zeros(3), draw.normal(smallest, 0.02, size=3)).p_value for _ in range(2000)]
    assert np.mean([p is not None and p <= 0.05 for p in found]) == pytest.approx(0.8, abs=0.03)
    assert seeds_needed(0.3, 1.0) == 90
    assert paired_t_power(0.3, 90) >= 0.8 > paired_t_power(0.3, 89)
    assert seeds_needed(-0.3, 1.0) == 90
    assert seeds_needed(100.0, 1.0) == 2


def test_no_spread_no_power() -> None:
    assert detectable_difference(None, 1) is None
    assert detectable_difference(0.0, 3) is None
    assert seeds_needed(0.1, None) is None
    assert seeds_needed(0.0, 1.0) is None
    assert seeds_needed(1e-4, 1.0) is None


def test_wilson() -> None:
    reference = scipy.stats.binomtest(83, 100).proportion_ci(method="wilson")
    assert wilson(83, 100) == pytest.approx((reference.low, reference.high))


def test_paired_bootstrap_is_its_definition() -> None:
    """The same draws, one resample at a time, for sums over sizes."""
    draw = np.random.default_rng(5)
    size = draw.integers(1, 9, 40).astype(float)
    d = size * draw.normal(0.05, 0.2, 40)
    told = paired_bootstrap(d, size, resamples=300, seed=7)
    theta = d.sum() / size.sum()
    error = math.sqrt(np.sum((d - theta * size) ** 2)) / size.sum()
    t = []
    for chosen in np.random.default_rng(7).integers(0, 40, (300, 40), dtype=np.int32):
        mine, bytes_ = d[chosen], size[chosen]
        again = mine.sum() / bytes_.sum()
        t.append(abs(again - theta) / (math.sqrt(np.sum((mine - again * bytes_) ** 2)) / bytes_.sum()))
    quantile = np.quantile(t, 0.95, method="higher")
    assert (told.difference, told.error) == pytest.approx((theta, error))
    assert told.interval == pytest.approx((theta - quantile * error, theta + quantile * error))
    assert told.p_value == pytest.approx((1 + sum(x >= abs(theta) / error for x in t)) / 301)


def test_paired_bootstrap_is_near_scipys_and_the_t_test() -> None:
    draw = np.random.default_rng(6)
    a, b = draw.normal(size=(2, 500))
    told = paired_bootstrap(b - a + 0.1, resamples=5000)
    scipys = scipy.stats.bootstrap((b - a + 0.1,), np.mean, n_resamples=5000, method="percentile", rng=draw)
    low, high = scipys.confidence_interval
    assert told.interval == pytest.approx((low, high), abs=0.01)
    assert told.error == pytest.approx(scipys.standard_error, rel=0.05)
    assert told.p_value == pytest.approx(scipy.stats.ttest_rel(b + 0.1, a).pvalue, abs=0.02)


def test_paired_bootstrap_does_not_depend_on_units_nor_order_of_the_rows() -> None:
    d = np.random.default_rng(8).normal(0.1, 1, 80)
    one, scaled, turned = paired_bootstrap(d), paired_bootstrap(1000 * d, np.full(80, 500.0)), paired_bootstrap(-d)
    assert one.interval is not None
    low, high = one.interval
    assert scaled.interval == pytest.approx((2 * low, 2 * high)) and turned.interval == pytest.approx((-high, -low))
    assert one.p_value == scaled.p_value == turned.p_value


def test_the_interval_of_the_bootstrap_holds_zero_where_p_is_large() -> None:
    draw = np.random.default_rng(9)
    for shift in np.linspace(0, 0.4, 30):
        told = paired_bootstrap(draw.normal(shift, 1, 100), resamples=999)
        assert told.interval is not None and told.p_value is not None
        assert (told.interval[0] <= 0 <= told.interval[1]) == (told.p_value > 0.05)


def test_paired_bootstrap_says_what_it_cannot_know() -> None:
    same = paired_bootstrap(np.zeros(10))
    assert (same.p_value, same.interval, same.reason) == (1.0, (0.0, 0.0), "no document differs")
    constant = paired_bootstrap(np.full(10, 0.3))
    assert constant.p_value is None and constant.interval is None and "same amount" in constant.reason
    few = paired_bootstrap(np.repeat([0.0, 1.0], [498, 2]))
    assert few.interval is None and "too few" in few.reason and few.p_value is not None and few.p_value > 0.1
    for d, size, resamples in (([], None, 200), ([1.0], [1.0, 2.0], 200), ([1.0, 2.0], None, 199)):
        with pytest.raises(ValueError, match="paired_bootstrap needs"):
            paired_bootstrap(d, size, resamples)


@pytest.mark.parametrize("n", [3, 5, 12])
def test_effect_size_equals_hedges_and_the_noncentral_t(n: int) -> None:
    t = paired_t(np.zeros(n), np.random.default_rng(n).normal(0.8, 1, n))
    told = effect_size(t)
    assert told is not None and t.sd is not None and t.error is not None
    assert told.d == pytest.approx(t.difference / t.sd)
    shrink = told.g / told.d
    assert shrink == pytest.approx(1 - 3 / (4 * (n - 1) - 1), abs=0.02)  # Hedges' own approximation
    for bound, tail in zip(told.interval, (0.025, 0.975), strict=True):
        shift = bound / shrink * math.sqrt(n)
        assert scipy.stats.nct.sf(t.difference / t.error, n - 1, shift) == pytest.approx(tail, abs=2e-4)


def test_the_correction_for_few_seeds_removes_the_bias_and_its_interval_covers() -> None:
    draw = np.random.default_rng(10)
    told = [effect_size(paired_t(np.zeros(5), draw.normal(1.0, 1, 5))) for _ in range(400)]
    assert np.mean([one.d for one in told if one]) > 1.15
    assert np.mean([one.g for one in told if one]) == pytest.approx(1.0, abs=0.1)
    shrink = 0.7979  # the interval is on the scale of g
    inside = [one.interval[0] <= shrink <= one.interval[1] for one in told if one]
    assert np.mean(inside) == pytest.approx(0.95, abs=0.03)


def test_no_effect_size_without_a_spread() -> None:
    assert effect_size(paired_t([0.1], [0.2])) is None
    assert effect_size(paired_t([0.1, 0.2], [0.2, 0.5])) is None  # its mean does not exist for two
    assert effect_size(paired_t([0.1, 0.2, 0.3], [0.2, 0.3, 0.4])) is None


def _calibration() -> Any:
    file = Path(__file__).resolve().parents[2] / "benchmarks" / "calibration.py"
    spec = importlib.util.spec_from_file_location("calibration", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["calibration"] = module
    spec.loader.exec_module(module)
    return module


def test_two_thousand_null_comparisons_over_seeds_and_by_mcnemar() -> None:
    calibration = _calibration()
    for test in list(calibration.TESTS)[:1] + list(calibration.TESTS)[-2:-1]:
        found = calibration.calibrate(test, 2000)
        assert found.passes and found.coverage is not None, found


@pytest.mark.slow
def test_two_thousand_null_comparisons_of_every_kind() -> None:
    calibration = _calibration()
    for test in calibration.TESTS:
        assert (found := calibration.calibrate(test, 2000)).passes, found
