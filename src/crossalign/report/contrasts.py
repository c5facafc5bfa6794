"""Tables of contrasts: a line a contrast, a column a number of it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from crossalign.report.blocks import Table
from crossalign.report.tables import plus_minus
from crossalign.report.wording import UNKNOWN, number
from crossalign.report.words import difference_text, interval_text, p_values, seeds_text, value_text
from crossalign.results.contrasts import LEVEL, By
from crossalign.results.frame import Results
from crossalign.results.outcomes import Outcome

if TYPE_CHECKING:
    from pandas import DataFrame

STARS = ((0.001, "***"), (0.01, "**"), (LEVEL, "*"))
Column = Callable[[Any, Outcome], str]


def _effect(one: Any, outcome: Outcome) -> str:
    size = one.effect
    return UNKNOWN if size is None else f"{number(size.g)} ({number(size.interval[0])} to {number(size.interval[1])})"


def _right_alone(one: Any, outcome: Outcome) -> str:
    return ", ".join(f"{test.only_b:,} : {test.only_a:,}" for test in one.mcnemar or ()) or UNKNOWN


SEEDS: dict[str, Column] = {
    "Row": lambda one, outcome: one.other,
    "In": lambda one, outcome: outcome.label,
    "Seeds": lambda one, outcome: str(one.t.n),
    "Difference": lambda one, outcome: difference_text(outcome, one.t.difference, one.t.error),
    "95 % interval": lambda one, outcome: interval_text(outcome, one.t.interval),
    "p (Holm)": lambda one, outcome: p_values(one.p_seeds, one.p_seeds_holm),
    "g_z (95 %)": _effect,
    "Visible": lambda one, outcome: UNKNOWN if one.detectable is None else value_text(outcome, one.detectable),
    "Seeds needed (Holm)": lambda one, outcome: (
        f"{seeds_text(one.needed)} ({seeds_text(one.needed_corrected)})" if one.t.sd else UNKNOWN
    ),
}
ITEMS: dict[str, Column] = {
    "Row": lambda one, outcome: one.other,
    "In": lambda one, outcome: outcome.label,
    "Items": lambda one, outcome: f"{one.bootstrap.n:,}",
    "Difference": lambda one, outcome: (
        difference_text(outcome, one.t.difference, one.over_items[0]) if one.over_items else one.bootstrap.reason
    ),
    "95 % interval": lambda one, outcome: interval_text(outcome, one.over_items[1]) if one.over_items else UNKNOWN,
    "p, bootstrap (Holm)": lambda one, outcome: p_values(one.p_bootstrap, one.p_bootstrap_holm),
    "Right alone, row : reference": _right_alone,
    "p, McNemar (Holm)": lambda one, outcome: p_values(one.p_mcnemar, one.p_mcnemar_holm),
}


def cells(results: Results, one: Any, columns: dict[str, Column]) -> list[str]:
    """The line of a contrast; of one without a test, why there is none."""
    outcome, names = results.outcome[one.outcome], list(columns)
    if one.t is None or (columns is SEEDS and one.t.interval is None):
        names = names[: names.index("Seeds")]
    line = [columns[name](one, outcome) for name in names]
    if len(line) < len(columns):
        line += ["0", f"not paired: {one.reason}"] if one.t is None else [str(one.t.n), one.t.reason]
    return line + [UNKNOWN] * (len(columns) - len(line))


def means_table(results: Results, labels: Sequence[str], outcomes: Sequence[Outcome], contrasts: DataFrame, by: By) -> Table:
    """CMAR's Table 3, mean ± standard error of every row in every outcome; of one outcome CMDA's Table 1, with Δ."""
    single = len(outcomes) == 1 and outcomes[0].tested
    known = {(one.other, one.outcome): one for one in contrasts.itertuples()}
    marks: set[str] = set()
    shown = []
    for label in labels:
        line = [label]
        for outcome in outcomes:
            mean, mark = mean_text(results, label, outcome)
            one = known.get((label, outcome.name))
            stars = next((star for level, star in STARS if one and one.p_holm is not None and one.p_holm <= level), "")
            marks.update(mark + stars)
            line.append(mean + mark + stars)
        if single:
            line.append(_change(known.get((label, outcomes[0].name)), outcomes[0]))
        shown.append([*line, ", ".join(map(str, results.row[label].seeds))])
    heads = [f"{one.label}{' (%)' if one.share else ''} {'↓' if one.lower_is_better else '↑'}" for one in outcomes]
    columns = ["Row", *heads, *([f"Δ from {labels[0]}"] if single else []), "Seeds"]
    return Table("Means", columns, shown, _mean_notes(marks, by, all(one.tested for one in outcomes)))


def _mean_notes(marks: set[str], by: By, tested: bool) -> list[str]:
    notes = ["Mean ± standard error over seeds."]
    if not tested:
        notes.append("A perplexity is the likelihood of the bits a byte in other units; the tests are of these.")
    if "†" in marks:
        notes.append("† One seed: the ± is the standard error over test documents or images, and says nothing of other seeds.")
    if "*" in marks:
        over = "over documents" if by == "sample" else "over seeds, or over documents where there is one seed"
        notes.append(f"* p ≤ 0.05, ** p ≤ 0.01, *** p ≤ 0.001 against the first row after Holm's correction, {over}.")
    return notes


def mean_text(results: Results, label: str, outcome: Outcome) -> tuple[str, str]:
    """Mean ± standard error, and † where that is over items for want of seeds."""
    mean = results.mean(label, outcome.name)
    error, mark = mean.error, ""
    if mean.n == 1:
        answers = results.answers(str(results.row[label].first.folder), outcome.name)
        if not isinstance(answers, str) and not math.isnan(answers.error):
            error, mark = answers.error, "†"
    scale = 100 if outcome.share else 1
    return plus_minus(scale * mean.mean, None if error is None else scale * error, outcome.digits), mark


def _change(one: Any, outcome: Outcome) -> str:
    """The difference with its standard error over seeds, or over items (†); a dash where it has neither."""
    if one is None or one.t is None or (one.t.interval is None and one.over_items is None):
        return UNKNOWN
    if one.t.n > 1 and one.t.error is not None:
        return difference_text(outcome, one.t.difference, one.t.error)
    return f"{difference_text(outcome, one.t.difference, one.over_items[0])}†" if one.over_items else UNKNOWN


def seeds_table(results: Results, contrasts: DataFrame) -> Table:
    """Paired t-tests over seeds: they speak of the methods."""
    tests = list(contrasts.itertuples())
    strong = frozenset(i for i, one in enumerate(tests) if one.p_seeds_holm is not None and one.p_seeds_holm <= LEVEL)
    notes = [
        "Row minus reference, paired by seed; ± standard error. Accuracies in percentage points. p: paired t-test; in "
        f"brackets, Holm's correction over {_families(tests)}. Intervals are not corrected.",
        "g_z: mean of the differences over their standard deviation (Cohen's d_z), corrected for few seeds (Hedges). "
        "Visible: the true difference that the test would have found with 80 % power at α = 0.05, not corrected; seeds "
        "needed: as many for a true difference as large as the one seen; in brackets, at the level of Holm's first step. All "
        "rest on the spread seen in these few seeds.",
    ]
    shown = [cells(results, one, SEEDS) for one in tests]
    return _without_single(Table("Over seeds: the methods", list(SEEDS), shown, notes, frozenset({1}), strong))


def items_table(results: Results, contrasts: DataFrame, resamples: int) -> Table | None:
    """Paired bootstrap and exact McNemar tests over items: they speak of the trained models only."""
    tests = [one for one in contrasts.itertuples() if one.bootstrap is not None]
    if not tests:
        return None
    items = " or ".join(dict.fromkeys(results.outcome[one.outcome].items for one in tests))
    p_items = [one.p_bootstrap_holm if one.p_mcnemar is None else one.p_mcnemar_holm for one in tests]
    strong = frozenset(i for i, p in enumerate(p_items) if p is not None and p <= LEVEL)
    notes = [
        f"These trained models on other {items} like these; it says nothing of other seeds. Difference on average over the "
        f"seeds. Paired bootstrap-t over {items}, {resamples:,} resamples. McNemar's exact test of each "
        "seed, combined by Rüger's rule (half of the seeds, rounded up, must agree on a direction). In brackets: Holm's "
        f"correction over {_families(tests)}.",
    ]
    columns = [items.capitalize() if name == "Items" else name for name in ITEMS]
    shown = [cells(results, one, ITEMS) for one in tests]
    return _without_single(Table(f"Over {items}: these trained models", columns, shown, notes, frozenset({1}), strong))


def _without_single(table: Table) -> Table:
    """The table without the column that names the outcome, where there is one only; its title then does."""
    names = list(dict.fromkeys(line[1] for line in table.rows))
    if len(names) != 1:
        return table
    columns, rows = table.columns[:1] + table.columns[2:], [line[:1] + line[2:] for line in table.rows]
    return replace(table, title=f"{table.title}, {names[0]}", columns=columns, rows=rows, texts=frozenset())


def _families(tests: Iterable[Any]) -> str:
    """What Holm's correction is made over."""
    sizes = Counter(one.family for one in tests)
    if len(sizes) == 1:
        return f"all {sizes.total()} lines"
    listed = ", ".join(f"{family} ({n})" for family, n in sizes.items())
    return f"its family, apart for each kind of outcome: {listed}"
