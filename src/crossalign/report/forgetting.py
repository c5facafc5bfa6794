"""What a language model forgot when it became a classifier (CMDA §4.1): scores of text tasks before and after, by row."""

from __future__ import annotations

import math
from collections.abc import Iterator

from crossalign.report.blocks import Table
from crossalign.report.tables import plus_minus
from crossalign.report.wording import number
from crossalign.results.rows import Row
from crossalign.runs.evaluations import BITS_PER_BYTE, Answers, Evaluation, is_likelihood
from crossalign.stats import mean_and_error

ONE_SEED = "† One seed: the ± is the standard error over documents and says nothing of other seeds."


def forgetting_tables(rows: list[Row]) -> list[Table]:
    """One table of the rows whose runs were scored before and after; none where there are no such."""
    shown = [line for row in rows for line in _lines(row)]
    if not shown:
        return []
    notes = ["`crossalign evaluate` of the backbone under its own language head. Mean ± standard error over seeds."]
    notes += [ONE_SEED] * any("†" in cell for line in shown for cell in line)
    columns = ["Method", "Task", "Before", "After", "Difference", "Seeds"]
    return [Table("What the language model forgot", columns, shown, notes, frozenset({1}))]


def _lines(row: Row) -> Iterator[list[str]]:
    held = [run.evaluation for run in row.runs if run.evaluation is not None]
    for task in dict.fromkeys(task for evaluation in held for task in evaluation.forgetting):
        mine = [evaluation for evaluation in held if task in evaluation.forgetting]
        metric = next((m for m in (BITS_PER_BYTE, "acc") if m in mine[0].forgetting[task]), "")
        pairs = [evaluation.forgetting[task].get(metric) for evaluation in mine]
        if not metric or None in pairs:
            continue
        before, after = ([float(pair[side]) for pair in pairs if pair] for side in ("before", "after"))
        change = mean_and_error([b - a for a, b in zip(before, after, strict=True)])
        error, mark = change.error, ""
        if change.n == 1:
            error, mark = _over_documents(mine[0], task, metric), "†"
        scale, digits = (1, 3) if is_likelihood(metric) else (100, 2)
        told = f"± {number(scale * error, digits)}{mark}" if error is not None else "(no ±)"
        unit = {BITS_PER_BYTE: "bits a byte", "acc": "acc, %"}[metric]
        yield [
            row.label,
            f"{mine[0].tasks[task].get('label', task)} ({unit})",
            number(scale * mean_and_error(before).mean, digits),
            plus_minus(scale * (m := mean_and_error(after)).mean, None if m.error is None else scale * m.error, digits),
            f"{scale * change.mean:+.{digits}f} {told}",
            str(change.n),
        ]


def _over_documents(evaluation: Evaluation, task: str, metric: str) -> float | None:
    """Standard error of the difference over documents, each scored before and after; None where they were not kept."""
    after, before = evaluation.answers(task, metric), evaluation.before.answers(task, metric) if evaluation.before else None
    if isinstance(after, str) or before is None or isinstance(before, str) or set(after.ids) != set(before.ids):
        return None
    error = Answers(after.ids, after.amount - before.only(after.ids).amount, after.size).error
    return None if math.isnan(error) else error
