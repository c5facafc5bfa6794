"""What a language model forgot when it became a classifier (CMDA §4.1): scores of text tasks before and after, by row."""

from __future__ import annotations

import math
from typing import Any

from crossalign.report.blocks import Table
from crossalign.report.words import number, plus_minus
from crossalign.results.contrasts import contrasts
from crossalign.results.frame import Results
from crossalign.results.questions import before_and_after
from crossalign.stats import mean_and_error

ONE_SEED = "† One seed: the ± is the standard error over documents and says nothing of other seeds."


def forgetting_tables(results: Results) -> list[Table]:
    """One table of the rows whose runs were scored before and after; none where there are no such."""
    lines = [_line(results, one) for one in contrasts(results, before_and_after(results)).itertuples() if one.t is not None]
    if not lines:
        return []
    notes = ["`crossalign evaluate` of the backbone under its own language head. Mean ± standard error over seeds."]
    notes += [ONE_SEED] * any("†" in cell for line in lines for cell in line)
    columns = ["Method", "Task", "Before", "After", "Difference", "Seeds"]
    return [Table("What the language model forgot", columns, lines, notes, frozenset({1}))]


def _line(results: Results, one: Any) -> list[str]:
    outcome, error, mark = results.outcome[one.outcome], one.t.error, ""
    if one.t.n == 1 and one.change is not None and not math.isnan(one.change.error):
        error, mark = one.change.error, "†"
    scale, digits = (100, 2) if outcome.share else (1, 3)
    before, after = mean_and_error(one.reference_values), mean_and_error(one.other_values)
    told = "(no ±)" if error is None else f"± {number(scale * error, digits)}{mark}"
    metric = outcome.name.rpartition(".")[2]
    return [
        one.other,
        f"{outcome.label.removesuffix(f' {metric}')} ({'acc, %' if outcome.share else outcome.unit})",
        number(scale * before.mean, digits),
        plus_minus(scale * after.mean, None if after.error is None else scale * after.error, digits),
        f"{scale * one.t.difference:+.{digits}f} {told}",
        str(one.t.n),
    ]
