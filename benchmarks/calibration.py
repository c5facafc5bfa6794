"""Do the tests of `compare` keep their level, and do their intervals cover? 2,000 draws of each where no difference is.

    python benchmarks/calibration.py [--draws 2000] [--out FILE.md]

Every draw is a comparison of two methods that are equal on average. A test keeps its level where P(p ≤ α) is at most α; an
interval of 95 % should hold the true difference, zero, in 95 % of the draws.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from crossalign.stats import Interval, combine_mcnemar, holm, mcnemar, paired_bootstrap, paired_t

ALPHAS = (0.01, 0.05, 0.1)
SEEDS, DOCUMENTS, TASKS, RESAMPLES = 5, 500, 6, 999
Drawn = tuple[float | None, Interval | None]


@dataclass(frozen=True)
class Calibration:
    """Shares of draws: of p-values at most each of ALPHAS, and of intervals that hold zero (None: it has no interval)."""

    test: str
    levels: tuple[float, ...]
    coverage: float | None

    @property
    def passes(self) -> bool:
        kept = all(found <= alpha + 0.015 for alpha, found in zip(ALPHAS, self.levels, strict=True))
        return kept and (self.coverage is None or abs(self.coverage - 0.95) <= 0.015)


def seeds_t(draw: np.random.Generator) -> Drawn:
    found = paired_t(draw.normal(size=SEEDS), draw.normal(size=SEEDS))
    return found.p_value, found.interval


def holm_t(draw: np.random.Generator) -> Drawn:
    """The smallest corrected p-value of tasks that share half of their luck: that any is ≤ α has probability α at most."""
    luck = draw.normal(size=(SEEDS, 1)) + draw.normal(size=(SEEDS, TASKS))
    p_values = holm([paired_t(np.zeros(SEEDS), task).p_value for task in luck.T])
    return min(p for p in p_values if p is not None), None


def _answers(draw: np.random.Generator, seeds: int = 1) -> np.ndarray:
    """(2, seeds, documents) right or wrong: documents are more or less hard for both, methods differ by luck."""
    hard = draw.normal(size=DOCUMENTS)
    return hard + draw.normal(scale=0.7, size=(2, seeds, DOCUMENTS)) > 0.3


def bootstrap_accuracy(draw: np.random.Generator) -> Drawn:
    a, b = _answers(draw)[:, 0]
    return _bootstrap(draw, b.astype(float) - a)


def bootstrap_seeds(draw: np.random.Generator) -> Drawn:
    a, b = _answers(draw, seeds=3).mean(axis=1)
    return _bootstrap(draw, b - a)


def bootstrap_skewed(draw: np.random.Generator) -> Drawn:
    return _bootstrap(draw, draw.lognormal(sigma=0.75, size=DOCUMENTS) - np.exp(0.75**2 / 2))


def bootstrap_bits(draw: np.random.Generator) -> Drawn:
    """Bits per byte: documents of very different length, whose difference has a part of its own for each document."""
    size = draw.lognormal(5, 0.8, size=DOCUMENTS).round() + 1
    return _bootstrap(draw, size * draw.normal(0, 0.1, DOCUMENTS) + np.sqrt(size) * draw.normal(size=DOCUMENTS), size)


def _bootstrap(draw: np.random.Generator, difference: np.ndarray, size: np.ndarray | None = None) -> Drawn:
    found = paired_bootstrap(difference, size, RESAMPLES, seed=int(draw.integers(2**31)))
    return found.p_value, found.interval


def exact_mcnemar(draw: np.random.Generator) -> Drawn:
    a, b = _answers(draw)[:, 0]
    found = mcnemar(a, b)
    return found.p_value, found.interval


def mcnemar_seeds(draw: np.random.Generator) -> Drawn:
    a, b = _answers(draw, seeds=3)
    return combine_mcnemar([mcnemar(left, right) for left, right in zip(a, b, strict=True)]), None


TESTS: dict[str, Callable[[np.random.Generator], Drawn]] = {
    f"paired t, {SEEDS} seeds": seeds_t,
    f"Holm over {TASKS} tasks of paired t, any of them": holm_t,
    f"paired bootstrap, {DOCUMENTS} documents right or wrong": bootstrap_accuracy,
    f"paired bootstrap, {DOCUMENTS} documents, mean of 3 seeds": bootstrap_seeds,
    f"paired bootstrap, {DOCUMENTS} documents, skewed differences": bootstrap_skewed,
    f"paired bootstrap, bits per byte of {DOCUMENTS} documents": bootstrap_bits,
    f"exact McNemar, {DOCUMENTS} documents": exact_mcnemar,
    f"exact McNemar, {DOCUMENTS} documents, 3 seeds combined": mcnemar_seeds,
}


def calibrate(test: str, draws: int) -> Calibration:
    """``draws`` null comparisons with one test."""
    draw = np.random.default_rng(0)
    found = [TESTS[test](draw) for _ in range(draws)]
    p_values = np.array([1.0 if p is None else p for p, _ in found])
    intervals = [interval for _, interval in found if interval is not None]
    coverage = float(np.mean([low <= 0 <= high for low, high in intervals])) if intervals else None
    return Calibration(test, tuple(float(np.mean(p_values <= alpha)) for alpha in ALPHAS), coverage)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=2000)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    lines = ["# How often the tests of `compare` err", "", "`python benchmarks/calibration.py --out FILE`", ""]
    lines += [
        f"{options.draws:,} draws of two methods that are equal on average. P(p ≤ α) should be at most α (tests of counts stay",
        f"below it), and 95 % intervals should hold zero in 95 % of the draws. Bootstrap: {RESAMPLES} resamples.",
        "",
        "| test | " + " | ".join(f"P(p ≤ {alpha})" for alpha in ALPHAS) + " | 95 % intervals cover |",
        "| --- |" + " ---: |" * (len(ALPHAS) + 1),
    ]
    passed = True
    for test in TESTS:
        found = calibrate(test, options.draws)
        passed &= found.passes
        covered = "" if found.coverage is None else f"{100 * found.coverage:.1f} %"
        lines.append(f"| {test} | " + " | ".join(f"{level:.3f}" for level in found.levels) + f" | {covered} |")
        print(lines[-1], flush=True)
    if options.out:
        options.out.write_text("\n".join(lines) + "\n")
    if not passed:
        raise SystemExit("a test rejects a true null more than 1.5 points too often, or its intervals miss by more")


if __name__ == "__main__":
    main()
