"""Is a difference real? Pure functions on arrays: NumPy, and SciPy where a distribution is needed.

Two kinds of chance hide in a difference of two trained models, and each needs its own test. Over *seeds* (initial
weights, batch order): the paired t-test, one number a seed. Over *test images* or documents, with the trained models held
fixed: the exact McNemar test within a seed, and the paired bootstrap. The first speaks of the method, the others of these
trained models.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from crossalign.core.errors import needed

Interval = tuple[float, float]


def _scipy_stats() -> Any:
    return needed("scipy.stats", "report", "comparing runs", "scipy")


def student_t(freedom: int, confidence: float = 0.95) -> float:
    """What half an interval is, in standard errors that have so many degrees of freedom."""
    return float(_scipy_stats().t.ppf(0.5 + confidence / 2, freedom))


@dataclass(frozen=True)
class Mean:
    """A mean over seeds; ``error`` is its standard error, None for fewer than two values."""

    mean: float
    error: float | None
    n: int


def mean_and_error(values: ArrayLike) -> Mean:
    """Mean and standard error (SD with n - 1, over the root of n) of ``values``: (n,); NaN values are left out."""
    x = np.asarray(values, dtype=np.float64).ravel()
    x = x[~np.isnan(x)]
    if len(x) == 0:
        return Mean(math.nan, None, 0)
    error = float(x.std(ddof=1) / math.sqrt(len(x))) if len(x) > 1 else None
    return Mean(float(x.mean()), error, len(x))


@dataclass(frozen=True)
class PairedT:
    """A paired t-test over seeds. What cannot be known is None, and ``reason`` says why."""

    difference: float
    n: int
    sd: float | None = None
    error: float | None = None
    interval: Interval | None = None
    p_value: float | None = None
    reason: str = ""


def paired_t(a: ArrayLike, b: ArrayLike, confidence: float = 0.95) -> PairedT:
    """Two-sided paired t-test of ``b - a``.

    Args:
        a: (n,) the reference, one value a seed.
        b: (n,) the same seeds in the same order.
        confidence: of the interval.

    One pair has no spread, and differences that are all the same (but not zero) put t at infinity: in both cases there
    is no p-value, and ``reason`` says so. Differences that are all zero have p = 1.

    Raises:
        ValueError: ``a`` and ``b`` differ in length, or are empty.
    """
    x, y = np.asarray(a, dtype=np.float64).ravel(), np.asarray(b, dtype=np.float64).ravel()
    if len(x) != len(y) or len(x) == 0:
        raise ValueError(f"paired_t needs two equally long, non-empty samples; got {len(x)} and {len(y)} values")
    d = y - x
    n, mean = len(d), float(d.mean())
    if n == 1:
        return PairedT(mean, 1, reason="one seed has no spread over seeds")
    sd = float(d.std(ddof=1))
    if sd <= 1e-12 * float(np.max(np.abs(np.concatenate([x, y]))) + 1e-300):  # rounding of equal differences
        if bool(np.all(d == 0)):
            return PairedT(0.0, n, 0.0, 0.0, (0.0, 0.0), 1.0, "no seed differs")
        return PairedT(mean, n, 0.0, 0.0, None, None, "all seeds differ by the same amount: t is undefined")
    stats = _scipy_stats()
    error = sd / math.sqrt(n)
    p_value = float(2 * stats.t.sf(abs(mean) / error, n - 1))
    half = float(stats.t.ppf(0.5 + confidence / 2, n - 1)) * error
    return PairedT(mean, n, sd, error, (mean - half, mean + half), p_value)


@dataclass(frozen=True)
class McNemar:
    """An exact McNemar test on one test set. ``only_a``: images that A alone has right; ``difference``: B minus A."""

    only_a: int
    only_b: int
    n: int
    difference: float
    error: float
    interval: Interval
    p_value: float
    p_b_better: float
    p_a_better: float


def mcnemar(correct_a: ArrayLike, correct_b: ArrayLike, confidence: float = 0.95) -> McNemar:
    """Exact McNemar test: of the images that one model alone has right, is each side's share one half?

    The two-sided binomial test, not its mid-p form.

    Args:
        correct_a: (n,) bool, whether A has each image right.
        correct_b: (n,) bool, the same images in the same order.
        confidence: of the interval of the difference in accuracy (Agresti and Min 2005: half an image more a cell).

    Raises:
        ValueError: the two differ in length, or are empty.
    """
    a, b = np.asarray(correct_a, dtype=bool).ravel(), np.asarray(correct_b, dtype=bool).ravel()
    if len(a) != len(b) or len(a) == 0:
        raise ValueError(f"mcnemar needs the same images for both models; got {len(a)} and {len(b)}")
    stats = _scipy_stats()
    n, only_a, only_b = len(a), int(np.sum(a & ~b)), int(np.sum(~a & b))
    discordant = only_a + only_b
    p_b = float(stats.binom.sf(only_b - 1, discordant, 0.5)) if discordant else 1.0
    p_a = float(stats.binom.sf(only_a - 1, discordant, 0.5)) if discordant else 1.0
    z = float(stats.norm.ppf(0.5 + confidence / 2))
    more_a, more_b, more_n = only_a + 0.5, only_b + 0.5, n + 2.0
    centre = (more_b - more_a) / more_n
    error = math.sqrt(more_a + more_b - (more_b - more_a) ** 2 / more_n) / more_n
    interval = (max(-1.0, centre - z * error), min(1.0, centre + z * error))
    return McNemar(only_a, only_b, n, (only_b - only_a) / n, error, interval, min(1.0, 2 * min(p_a, p_b)), p_b, p_a)


def combine_mcnemar(tests: Sequence[McNemar]) -> float | None:
    """One two-sided p-value for the McNemar tests of several seeds, valid however the seeds depend on each other.

    Seeds share one test set, so their tests are not independent: adding up the counts, Fisher's and Stouffer's methods
    would all claim too much. For each direction the one-sided p-values p(1) ≤ … ≤ p(K) give K/k · p(k) with k = ⌈K/2⌉,
    which is a valid p-value under any dependence (Rüger 1978; for large K twice the median); the smaller of the two
    directions, doubled, is returned. So half of the seeds must agree on a direction, and one seed gives the exact test
    itself. It is None for no test at all.
    """
    if not tests:
        return None
    count = len(tests)
    k = math.ceil(count / 2)
    sides = (sorted(test.p_b_better for test in tests), sorted(test.p_a_better for test in tests))
    return min(1.0, 2 * min(count / k * side[k - 1] for side in sides))


@dataclass(frozen=True)
class Bootstrap:
    """A paired bootstrap over ``n`` documents. What cannot be known is None, and ``reason`` says why."""

    difference: float
    n: int
    error: float
    interval: Interval | None
    p_value: float | None
    reason: str = ""


def paired_bootstrap(
    difference: ArrayLike, size: ArrayLike | None = None, resamples: int = 5000, confidence: float = 0.95, seed: int = 0
) -> Bootstrap:
    """Symmetric bootstrap-t of a mean of paired differences, or of a ratio of sums, over documents.

    Args:
        difference: (n,) what B has more than A on each document, such as bits.
        size: (n,) what the sum is a share of, such as bytes, the same for both; None: 1 a document, which gives the mean.
        resamples: draws of n documents with replacement.
        confidence: of the interval.
        seed: of the draws: the same documents give the same numbers.

    The statistic is θ = Σ difference / Σ size, with the linearised standard error √Σ(difference - θ size)² / Σ size. In
    each resample t* = (θ* - θ) / error*; the interval is θ ± error · the quantile of |t*|, and p is the share of |t*| that is
    at least |θ| / error (Davison and Hinkley 1997, §2.4 and §4.4.1), so that the two agree. Its coverage errs by O(n⁻²),
    where that of percentile and BCa intervals errs by O(n⁻¹) (Hall 1988, J. R. Stat. Soc. B 50). A resample without any
    spread counts as t* = ∞; where there are too many of them, no interval is given.

    Raises:
        ValueError: the arrays differ in length, or are empty, or fewer than 200 resamples.
    """
    d = np.asarray(difference, dtype=np.float64).ravel()
    s = np.ones_like(d) if size is None else np.asarray(size, dtype=np.float64).ravel()
    if len(d) != len(s) or len(d) == 0:
        raise ValueError(f"paired_bootstrap needs a size for each difference, and one at least; got {len(d)} and {len(s)}")
    if resamples < 200:
        raise ValueError(f"paired_bootstrap needs 200 resamples or more; got {resamples}")
    n, theta = len(d), float(d.sum() / s.sum())
    error = float(np.sqrt(np.sum((d - theta * s) ** 2)) / s.sum())
    negligible = 1e-9 * float(np.max(np.abs(d))) * math.sqrt(n) / float(s.sum())
    if error <= negligible:
        if bool(np.all(d == 0)):
            return Bootstrap(0.0, n, 0.0, (0.0, 0.0), 1.0, "no document differs")
        return Bootstrap(theta, n, 0.0, None, None, "all documents differ by the same amount")
    moments = np.stack([d, s, d * d, d * s, s * s], axis=1)
    draw, t = np.random.default_rng(seed), []
    most = max(1, 200_000 // n)  # at a time
    for start in range(0, resamples, most):
        count = min(most, resamples - start)
        drawn = draw.integers(0, n, (count, n), dtype=np.int32) + n * np.arange(count)[:, None]
        weights = np.bincount(drawn.ravel(), minlength=count * n).reshape(count, n)
        sd, ss, sdd, sds, sss = (weights @ moments).T
        thetas = sd / ss
        errors = np.sqrt(np.maximum(sdd - 2 * thetas * sds + thetas**2 * sss, 0.0)) / ss
        flat = errors <= negligible
        t.append(np.where(flat, np.inf, np.abs(thetas - theta) / np.where(flat, 1.0, errors)))
    absolute = np.concatenate(t)
    quantile = float(np.quantile(absolute, confidence, method="higher"))
    p_value = float((1 + np.sum(absolute >= abs(theta) / error)) / (resamples + 1))
    if math.isinf(quantile):
        return Bootstrap(theta, n, error, None, p_value, "too few documents differ for an interval")
    return Bootstrap(theta, n, error, (theta - quantile * error, theta + quantile * error), p_value)


@dataclass(frozen=True)
class EffectSize:
    """Cohen's d_z over seeds, and g_z, the same with Hedges' correction for few seeds; ``interval`` is that of g_z."""

    d: float
    g: float
    interval: Interval


def effect_size(t: PairedT, confidence: float = 0.95) -> EffectSize | None:
    """Standardised mean difference of paired values, the mean of the differences over their SD.

    None without a spread, and for two seeds, where the mean of d_z does not exist.

    d_z overstates the effect in few pairs; g_z = d_z · Γ(m/2) / (√(m/2) Γ((m-1)/2)) with m = n - 1 does not (Hedges 1981;
    Lakens 2013). The interval is that of the noncentral t, times the same factor.
    """
    if not t.sd or t.n < 3:
        return None
    m, d = t.n - 1, t.difference / t.sd
    shrink = math.exp(math.lgamma(m / 2) - math.lgamma((m - 1) / 2)) / math.sqrt(m / 2)
    low, high = (shrink * shift / math.sqrt(t.n) for shift in _noncentrality(d * math.sqrt(t.n), m, confidence))
    return EffectSize(d, shrink * d, (low, high))


def _noncentrality(t: float, m: int, confidence: float) -> Interval:
    """The shifts of a noncentral t with ``m`` degrees of freedom under which ``t`` is just not extreme."""
    from scipy.optimize import brentq

    tail, far = (1 - confidence) / 2, 10 + 10 * abs(t)
    low = brentq(lambda shift: _noncentral_sf(t, m, shift) - tail, -far, far, xtol=1e-6)
    high = brentq(lambda shift: _noncentral_sf(t, m, shift) - (1 - tail), -far, far, xtol=1e-6)
    return float(low), float(high)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down correction, in the order given; None (no test was possible) stays None and does not count."""
    known = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, i) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        adjusted[i] = largest
    return adjusted


def paired_t_power(effect: float, n: int, alpha: float = 0.05) -> float:
    """Power of the two-sided paired t-test with ``n`` pairs; ``effect`` = mean of the differences / their SD."""
    critical = float(_scipy_stats().t.ppf(1 - alpha / 2, n - 1))
    shift = effect * math.sqrt(n)
    return _noncentral_sf(critical, n - 1, shift) + _noncentral_sf(critical, n - 1, -shift)


def _noncentral_sf(t: float, m: int, shift: float) -> float:
    """P(T > t) of the noncentral t with ``m`` degrees of freedom."""
    # P((Z + δ) / S > t) as an average over S: SciPy's own nct gives NaN for some large δ.
    return float(np.mean(_scipy_stats().norm.sf(t * _spread(m) - shift)))


@lru_cache(maxsize=256)
def _spread(m: int) -> NDArray[np.float64]:
    """2,000 quantiles of S, the root of chi² over its ``m`` degrees of freedom."""
    quantiles: NDArray[np.float64] = _scipy_stats().chi2.ppf((np.arange(2000) + 0.5) / 2000, m)
    return np.sqrt(quantiles / m)


def detectable_difference(sd: float | None, n: int, alpha: float = 0.05, power: float = 0.8) -> float | None:
    """The smallest true difference that a paired t-test with ``n`` seeds would have found with probability ``power``.

    ``sd`` is the standard deviation of the differences over seeds, taken at its observed value, which is itself a rough
    estimate at few seeds. None where there is no spread to go by (fewer than two seeds, or sd = 0).
    """
    if not sd or n < 2:
        return None
    from scipy.optimize import brentq

    return sd * float(brentq(lambda effect: paired_t_power(effect, n, alpha) - power, 0.0, 100.0, xtol=1e-6))


def seeds_needed(difference: float, sd: float | None, alpha: float = 0.05, power: float = 0.8, limit: int = 1000) -> int | None:
    """How many seeds would show a true difference of this size with probability ``power``; None: more than ``limit``.

    None also where ``sd`` is unknown or zero.
    """
    if not sd or paired_t_power(difference / sd, limit, alpha) < power:
        return None
    low, high = 1, limit  # power grows with n: bisect between a count that is too small and one that is enough
    while high - low > 1:
        middle = (low + high) // 2
        if paired_t_power(difference / sd, middle, alpha) >= power:
            high = middle
        else:
            low = middle
    return high


def wilson(right: int, n: int, confidence: float = 0.95) -> Interval:
    """Wilson's interval for a share: ``right`` of ``n`` images."""
    z = float(_scipy_stats().norm.ppf(0.5 + confidence / 2))
    share, scale = right / n, 1 + z * z / n
    centre = (share + z * z / (2 * n)) / scale
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / scale
    return centre - half, centre + half
