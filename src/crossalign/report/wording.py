"""Numbers and findings as a reader wants them: percent, points, durations, and one plain sentence a comparison."""

from __future__ import annotations

import math

from crossalign.core.refs import Ref
from crossalign.results.rows import Row
from crossalign.runs.records import Run
from crossalign.stats import wilson

MINUS = "\N{MINUS SIGN}"
UNKNOWN = "–"


def number(value: float, digits: int = 2, sign: bool = False) -> str:
    """A number with a true minus sign; a dash where it is unknown."""
    if math.isnan(value):
        return UNKNOWN
    value = round(value, digits) + 0.0  # no negative zero
    text = f"{value:{'+' if sign else ''},.{digits}f}"
    return text.replace("-", MINUS)


def percent(value: float, digits: int = 2) -> str:
    """A share as percent, without the sign: 0.4251 is ``42.51``."""
    return number(100 * value, digits)


def points(value: float, digits: int = 2) -> str:
    """A difference of shares in percentage points, always signed."""
    return number(100 * value, digits, sign=True)


def p_text(p: float | None) -> str:
    """``0.45``, ``0.013``, ``<0.001``; a dash where there is no p-value."""
    if p is None or math.isnan(p):
        return UNKNOWN
    if p < 0.001:
        return "<0.001"
    return f"{p:.2f}" if p >= 0.1 else f"{p:.3f}"


def p_equals(p: float | None) -> str:
    """``p = 0.45``, ``p < 0.001``."""
    text = p_text(p)
    return f"p < {text[1:]}" if text.startswith("<") else f"p = {text}"


def duration(seconds: float) -> str:
    """``45 s``, ``12.5 min``, ``3.2 h``."""
    if math.isnan(seconds):
        return UNKNOWN
    if seconds < 90:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def size(count: float) -> str:
    """Bytes as MB or GB (powers of ten, as in CMDA's Table 2)."""
    if math.isnan(count):
        return UNKNOWN
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def counted(n: int, noun: str) -> str:
    """``1 seed``, ``3 seeds``."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def headline(rows: list[Row], top: Row) -> str:
    """The page's first sentence."""
    if len(rows) == 1 and len(top.runs) == 1:
        return single_run(top)
    if top.mean("test", "accuracy").n == 0:
        return unscored(top)
    accuracy = top.mean("test", "accuracy")
    where = f" with {Ref(top.model).short_name}" if top.model else ""
    error, over = accuracy.error, ""
    if error is None and image_error(top.first) == image_error(top.first):
        error, over = image_error(top.first), ", ± over test images"
    spread = f" ± {percent(error)}" if error is not None else ""
    chosen = f"; of {len(rows)} rows it has the highest validation accuracy" if len(rows) > 1 else ""
    return (
        f"“{top.label}”{where} classified {percent(accuracy.mean)}{spread} % of the test images correctly "
        f"({counted(accuracy.n, 'seed')}{over}{chosen})."
    )


def unscored(row: Row) -> str:
    """What can be said where no test image was scored, as in a sweep."""
    validation = row.mean("validation", "accuracy")
    told = f"“{row.label}” classified {percent(validation.mean)} % of the validation images correctly"
    return f"{told} ({counted(len(row.runs), 'seed')}); no test image was scored."


def single_run(row: Row) -> str:
    """One run: accuracy with its interval over test images."""
    run = row.first
    accuracy, n = run.number("test", "accuracy"), run.number("test", "n")
    if math.isnan(accuracy):
        return unscored(row)
    where = f" with {Ref(row.model).short_name}" if row.model else ""
    told = f"“{run.name}”{where} classified {percent(accuracy)} % of the test images correctly"
    if not n > 0:
        return f"{told} (seed {run.seed})."
    low, high = wilson(round(accuracy * n), int(n))
    return f"{told} ({counted(int(n), 'image')}, 95 % interval {percent(low, 1)} to {percent(high, 1)}; seed {run.seed})."


def image_error(run: Run) -> float:
    """Standard error of one run's accuracy over its test images; NaN where their number is unknown."""
    accuracy, n = run.number("test", "accuracy"), run.number("test", "n")
    return math.sqrt(accuracy * (1 - accuracy) / n) if n > 0 else math.nan


def chance(run: Run) -> str:
    """What answering without looking would give; empty where predictions are absent."""
    predictions = run.predictions
    if predictions is None or not len(predictions.label):
        return ""
    import numpy as np

    counts = np.unique(predictions.label, return_counts=True)[1]
    share = float(counts.max() / counts.sum())
    return f"Always answering the commonest class would give {percent(share, 1)} %."


def calibration(run: Run) -> str:
    """Over- or underconfidence in one sentence; empty where predictions are absent."""
    predictions = run.predictions
    if predictions is None or not len(predictions.label):
        return ""
    confidence, accuracy = float(predictions.confidence.mean()), float(predictions.correct.mean())
    gap = confidence - accuracy
    kind = "well calibrated on average" if abs(gap) < 0.01 else "overconfident" if gap > 0 else "underconfident"
    return f"It is {kind}: mean confidence {percent(confidence, 1)} % against {percent(accuracy, 1)} % correct."
