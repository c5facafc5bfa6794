"""What a report says of image classifiers: accuracy, its difference from the baseline, chance and calibration."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from crossalign.core.refs import Ref
from crossalign.report.blocks import Table
from crossalign.report.contrasts import ONE_SEED
from crossalign.report.tables import number_text
from crossalign.report.words import UNKNOWN, counted, number, percent, plus_minus, points
from crossalign.results.contrasts import contrasts
from crossalign.results.frame import Results
from crossalign.results.questions import beside_baseline
from crossalign.results.rows import Row, best, blocks
from crossalign.runs.records import Run
from crossalign.stats import wilson


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


def results_table(results: Results) -> Table:
    """CMDA's Table 1: test accuracy and its difference from the FPT row without alignment, each ± standard error."""
    rows = list(results.row.values())
    many = len({row.backbone for row in rows if row.backbone}) > 1
    beside = {one.other: one for one in contrasts(results, beside_baseline(results)).itertuples()}
    shown = []
    for row in rows:
        loss, rates = row.mean("test", "loss"), {number_text(run.number("learning_rate")) for run in row.runs}
        cells = [
            row.label,
            _accuracy(row),
            _delta(beside.get(row.label)),
            plus_minus(loss.mean, loss.error, 3),
            percent(row.mean("test", "ece").mean),
            percent(row.mean("validation", "accuracy").mean),
            ", ".join(sorted(rates)),
            str(len(row.runs)),
        ]
        shown.append(cells[:1] + [Ref(row.model).short_name or UNKNOWN] * many + cells[1:])
    head = ["Method", "Test accuracy (%)", "Δ from FPT baseline", "Test loss", "ECE (%)", "Validation accuracy (%)"]
    columns = head[:1] + ["Backbone"] * many + head[1:] + ["Learning rate", "Seeds"]
    strong = frozenset(rows.index(best(block)) for block in blocks(rows)) if len(rows) > 1 else frozenset()
    notes = ["Mean ± standard error over seeds. Δ in percentage points, paired by seed. ECE: expected calibration error."]
    notes += ["Bold: the highest validation accuracy; the test set chose nothing."] * bool(strong)
    notes += [ONE_SEED] * any("†" in cell for line in shown for cell in line[1:])
    return Table("Test results", columns, shown, notes, frozenset({1} if many else ()), strong)


def _accuracy(row: Row) -> str:
    """Accuracy in percent with its standard error, over images (†) where there is one seed."""
    accuracy = row.mean("test", "accuracy")
    error = image_error(row.first)
    if accuracy.n != 1 or math.isnan(error):
        return plus_minus(100 * accuracy.mean, 100 * accuracy.error if accuracy.error is not None else None)
    return plus_minus(100 * accuracy.mean, 100 * error) + "†"


def _delta(one: Any) -> str:
    """The difference from the baseline with its standard error, over images (†) where there is one seed."""
    if one is None or one.t is None:
        return UNKNOWN if one is None else f"{UNKNOWN} ({one.reason})"
    if one.error is None:
        return f"{points(one.difference)} (one seed, no ±)"
    mark = "†" if one.over == "items" else ""
    return f"{points(one.difference)} ± {number(100 * one.error)}{mark}"
