"""Tables of contrasts: a line a contrast, a column a number of it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from crossalign.report.blocks import Table
from crossalign.report.words import (
    UNKNOWN,
    difference_text,
    interval_text,
    number,
    p_text,
    p_values,
    plus_minus,
    seeds_text,
    value_text,
)
from crossalign.results.contrasts import LEVEL, By
from crossalign.results.frame import Results
from crossalign.results.outcomes import Outcome
from crossalign.results.questions import IMAGE_QUESTIONS, QUESTIONS

if TYPE_CHECKING:
    from pandas import DataFrame

ONE_SEED = "† One seed: the ± is the standard error over test images and says nothing of other seeds."
STARS = ((0.001, "***"), (0.01, "**"), (LEVEL, "*"))
SEEDS = ["Row", "In", "Seeds", "Difference", "95 % interval", "p (Holm)", "g_z (95 %)", "Visible", "Seeds needed (Holm)"]
ITEMS = ["Row", "In", "Items", "Difference", "95 % interval", "p, bootstrap (Holm)", "Right alone, row : reference"]
ITEMS += ["p, McNemar (Holm)"]
IMAGES = ["Row − reference", "Seeds", "Difference", "95 % interval", "p, seeds (Holm)", "p, images (Holm)"]
IMAGES += ["p, images, each seed", "Smallest visible", "Seeds needed"]
TEXTS = ["Row − reference", "Measure", "Seeds", "Difference", "95 % interval", "p (Holm)", "Smallest visible", "Seeds needed"]
APART = ["Row − reference", "Asked", "Also differ in", "Measure", "Seeds", "Difference", "95 % interval"]


def line(results: Results, one: Any, heads: Sequence[str], over: str = "") -> list[str]:
    """The cells of a contrast under column heads; of one that could not be paired, why.

    ``over``: of ``seeds`` or ``items`` difference and interval are; empty: of what decides, with † where it is over items.
    """
    outcome, t = results.outcome[one.outcome], one.t
    names = {
        "Row": one.other,
        "Row − reference": f"{one.other} − {one.reference}",
        "In": outcome.label,
        "Measure": outcome.label,
        "Asked": QUESTIONS[one.question].title if one.question in QUESTIONS else "",
        "Also differ in": ", ".join(one.also),
    }
    if t is None:
        known = [names[head] for head in heads if head in names] + ["0", f"not paired: {one.reason}"]
        return known + [UNKNOWN] * (len(heads) - len(known))
    error, interval = one.error, None if one.low is None else (one.low, one.high)
    if over:
        error, interval = (t.error, t.interval) if over == "seeds" else one.over_items or (None, None)
    mark = "†" if not over and one.over == "items" and interval else ""
    difference = difference_text(outcome, t.difference, error) + mark
    if over and interval is None:
        difference = t.reason if over == "seeds" else one.bootstrap.reason
    visible = UNKNOWN if one.detectable is None else value_text(outcome, one.detectable)
    needed = seeds_text(one.needed) if t.sd else UNKNOWN
    p_seeds, p_mcnemar = p_values(one.p_seeds, one.p_seeds_holm), p_values(one.p_mcnemar, one.p_mcnemar_holm)
    size, exact = one.effect, one.mcnemar or ()
    cells = names | {
        "Seeds": str(t.n),
        "Items": f"{one.bootstrap.n:,}" if one.bootstrap else UNKNOWN,
        "Difference": difference,
        "95 % interval": interval_text(outcome, interval) + mark if interval else UNKNOWN,
        "p (Holm)": p_seeds,
        "p, seeds (Holm)": p_seeds,
        "p, images (Holm)": p_mcnemar,
        "p, McNemar (Holm)": p_mcnemar,
        "p, images, each seed": ", ".join(p_text(test.p_value) for test in exact) or UNKNOWN,
        "p, bootstrap (Holm)": p_values(one.p_bootstrap, one.p_bootstrap_holm),
        "Right alone, row : reference": ", ".join(f"{test.only_b:,} : {test.only_a:,}" for test in exact) or UNKNOWN,
        "g_z (95 %)": f"{number(size.g)} ({number(size.interval[0])} to {number(size.interval[1])})" if size else UNKNOWN,
        "Visible": visible,
        "Smallest visible": visible,
        "Seeds needed": needed,
        "Seeds needed (Holm)": f"{needed} ({seeds_text(one.needed_corrected)})" if t.sd else UNKNOWN,
    }
    return [cells[head] for head in heads]


def strong(tests: Iterable[Any]) -> frozenset[int]:
    """The lines whose difference is shown."""
    return frozenset(i for i, one in enumerate(tests) if one.verdict in ("gain", "loss"))


def question_tables(results: Results, contrasts: DataFrame) -> list[Table]:
    """Contrasts of image classifiers, a table a question, corrected over all of them together."""
    tables = []
    for question in IMAGE_QUESTIONS:
        tests = [one for one in contrasts.itertuples() if one.question == question.name]
        shown = [line(results, one, IMAGES) for one in tests]
        tables += [Table(question.title, IMAGES, shown, strong=strong(tests))] if tests else []
    if tables:
        tables[-1].notes += _question_notes(len(contrasts), any(one.t and one.t.n == 1 for one in contrasts.itertuples()))
    return tables


def _question_notes(count: int, one_seed: bool) -> list[str]:
    together = f"all {count} comparisons" if count > 1 else "the one comparison"
    return [
        "Difference, interval and smallest visible are in percentage points; ± standard error.",
        "p, seeds: paired t-test, one difference a seed; it speaks of the method. p, images: exact McNemar test of "
        "two trained models on the same test images; it speaks of these models only.",
        "p, images, over seeds: they share one test set, so neither their counts nor their p-values may be pooled as "
        "if independent; half of the seeds (rounded up) must agree on a direction (Rüger's rule, valid under any "
        "dependence).",
        f"In brackets: after Holm's correction over {together} of this report, apart for each kind of test. Bold: at "
        "most 0.05 after it, over seeds where there are several, else over images.",
        "Smallest visible: the true difference that the t-test would have found with 80 % power at α = 0.05 "
        "(uncorrected), at the spread seen. Seeds needed: for a true difference as large as the one seen. Both rest on "
        "a spread estimated from few seeds.",
    ] + [ONE_SEED] * one_seed


def apart_tables(results: Results, contrasts: DataFrame) -> list[Table]:
    """A table of the contrasts of rows that differ in more than what is asked; none where there are no such."""
    shown = [line(results, one, APART) for one in contrasts.itertuples()]
    if not shown:
        return []
    notes = [
        "What differs beside what is asked may be why these differ. So none of them has a verdict, is counted, or is among "
        "those that are corrected for each other. Accuracies in percentage points; ± standard error; intervals are not "
        "corrected."
    ]
    return [Table("Rows that differ in more than what is asked", APART, shown, notes, frozenset({1, 2, 3}))]


def text_table(results: Results, contrasts: DataFrame) -> Table:
    """Contrasts of language models."""
    tests = list(contrasts.itertuples())
    notes = [
        "Paired t-test over seeds; losses in nats a token. In brackets: after Holm's correction, made apart for each "
        "model and over losses beside the row without the term, losses beside controls, and alignments. Bold: at most 0.05 "
        "after it.",
        "Smallest visible: the true difference that the test would have found with 80 % power at α = 0.05 (uncorrected), at "
        "the spread seen. Seeds needed: for a true difference as large as the one seen.",
    ]
    shown = [line(results, one, TEXTS) for one in tests]
    return Table("With and without the term", TEXTS, shown, notes, frozenset({1}), strong(tests))


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
    shown_here = frozenset(i for i, one in enumerate(tests) if one.p_seeds_holm is not None and one.p_seeds_holm <= LEVEL)
    notes = [
        "Row minus reference, paired by seed; ± standard error. Accuracies in percentage points. p: paired t-test; in "
        f"brackets, Holm's correction over {_families(tests)}. Intervals are not corrected.",
        "g_z: mean of the differences over their standard deviation (Cohen's d_z), corrected for few seeds (Hedges). "
        "Visible: the true difference that the test would have found with 80 % power at α = 0.05, not corrected; seeds "
        "needed: as many for a true difference as large as the one seen; in brackets, at the level of Holm's first step. All "
        "rest on the spread seen in these few seeds.",
    ]
    shown = [line(results, one, SEEDS, "seeds") for one in tests]
    return _without_single(Table("Over seeds: the methods", SEEDS, shown, notes, frozenset({1}), shown_here))


def items_table(results: Results, contrasts: DataFrame, resamples: int) -> Table | None:
    """Paired bootstrap and exact McNemar tests over items: they speak of the trained models only."""
    tests = [one for one in contrasts.itertuples() if one.bootstrap is not None]
    if not tests:
        return None
    items = " or ".join(dict.fromkeys(results.outcome[one.outcome].items for one in tests))
    p_items = [one.p_bootstrap_holm if one.p_mcnemar is None else one.p_mcnemar_holm for one in tests]
    shown_here = frozenset(i for i, p in enumerate(p_items) if p is not None and p <= LEVEL)
    notes = [
        f"These trained models on other {items} like these; it says nothing of other seeds. Difference on average over the "
        f"seeds. Paired bootstrap-t over {items}, {resamples:,} resamples. McNemar's exact test of each "
        "seed, combined by Rüger's rule (half of the seeds, rounded up, must agree on a direction). In brackets: Holm's "
        f"correction over {_families(tests)}.",
    ]
    columns = [items.capitalize() if name == "Items" else name for name in ITEMS]
    shown = [line(results, one, ITEMS, "items") for one in tests]
    return _without_single(Table(f"Over {items}: these trained models", columns, shown, notes, frozenset({1}), shown_here))


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
