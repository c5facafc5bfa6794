"""Tables of contrasts: a line a contrast, a column a number of it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from crossalign.report.blocks import Table
from crossalign.report.tables import ONE_SEED, change_text
from crossalign.report.words import (
    UNKNOWN,
    difference_text,
    interval_text,
    mean_text,
    number,
    p_text,
    p_values,
    seeds_text,
    value_text,
)
from crossalign.results.contrasts import LEVEL, By
from crossalign.results.frame import Results
from crossalign.results.outcomes import Outcome
from crossalign.results.questions import QUESTIONS

if TYPE_CHECKING:
    from pandas import DataFrame

STARS = ((0.001, "***"), (0.01, "**"), (LEVEL, "*"))
ASKED = (
    "Row − reference; Outcome; Seeds; Difference; 95 % interval; p, seeds (Holm); p, McNemar (Holm); p, McNemar, each seed; "
)
ASKED += "Smallest visible; Seeds needed"
APART = "Row − reference; Asked; Also differ in; Outcome; Seeds; Difference; 95 % interval"
SEEDS = "Row; Outcome; Seeds; Difference; 95 % interval; p, seeds (Holm); g_z (95 %); Smallest visible; Seeds needed (Holm)"
ITEMS = "Row; Outcome; Items; Difference; 95 % interval; p, bootstrap (Holm); Right alone, row : reference; p, McNemar (Holm)"
NOTES = {
    "Difference": "Difference: row minus reference, paired by seed, ± standard error; accuracies in percentage points, losses "
    "in nats a token. Intervals are not corrected.",
    "p, seeds (Holm)": "p, seeds: paired t-test, one difference a seed; it speaks of the methods.",
    "p, bootstrap (Holm)": "p, bootstrap: paired bootstrap-t of the difference on average over the seeds; it speaks of these "
    "trained models on other items like these, and says nothing of other seeds.",
    "p, McNemar (Holm)": "p, McNemar: exact test of two trained models on the same items; it speaks of these models only. "
    "Seeds share one test set, so neither their counts nor their p-values may be pooled as if independent; half of the seeds "
    "(rounded up) must agree on a direction (Rüger's rule, valid under any dependence).",
    "g_z (95 %)": "g_z: mean of the differences over their standard deviation (Cohen's d_z), corrected for few seeds (Hedges).",
    "Smallest visible": "Smallest visible: the true difference that the t-test would have found with 80 % power at α = 0.05 "
    "(uncorrected), at the spread seen. Seeds needed: for a true difference as large as the one seen. Both rest on a spread "
    "estimated from few seeds.",
    "Seeds needed (Holm)": "Seeds needed, in brackets: at the level of Holm's first step.",
}
"""What is said of a column, wherever there is one."""


def contrast_table(title: str, results: Results, contrasts: DataFrame, heads: str, p: str = "p_holm", over: str = "") -> Table:
    """A line a contrast, set off where its corrected ``p`` shows a difference, with notes on its columns.

    There is no column of outcomes where there is but one, and none in which nothing is known.

    Args:
        over: what difference and interval are of: ``seeds``, ``items``, or empty for what decides, with † where it is items.
    """
    tests = list(contrasts.itertuples())
    lines = [_line(results, contrast, heads.split("; "), over) for contrast in tests]
    known = {head for line in lines for head, cell in line.items() if cell != UNKNOWN}
    known -= {"Outcome"} if contrasts.outcome.nunique() == 1 else set()
    lines = [{head: cell for head, cell in line.items() if head in known} for line in lines]
    strong = [i for i, contrast in enumerate(tests) if getattr(contrast, p) is not None and getattr(contrast, p) <= LEVEL]
    return Table.of(title, lines, _notes(known, _tested(contrasts)), ["Outcome", "Asked", "Also differ in"], strong)


def _tested(contrasts: DataFrame) -> list[str]:
    """The family of each contrast of which there is a p-value: it is those that Holm's correction counts."""
    return list(contrasts.family[contrasts[["p_seeds", "p_bootstrap", "p_mcnemar"]].notna().any(axis=1)])


def _notes(heads: Collection[str], families: Iterable[str], several: str = "") -> list[str]:
    """What is said of columns, and what Holm's correction is made over: ``several`` families, each listed where it is empty."""
    sizes = Counter(families)
    together = several or f"its family: {', '.join(f'{family} ({n})' for family, n in sizes.items())}"
    if len(sizes) < 2:
        together = f"all {sizes.total()} comparisons" if sizes.total() > 1 else "the one comparison"
    brackets = f"In brackets: Holm's correction over {together}, apart for each kind of test."
    corrected = any(head.endswith("(Holm)") for head in heads)
    return [note for head, note in NOTES.items() if head in heads] + [brackets] * corrected


def _line(results: Results, contrast: Any, heads: Sequence[str], over: str) -> dict[str, str]:
    """The cells of a contrast under column heads; of one that could not be paired, why."""
    outcome, t = results.outcome[contrast.outcome], contrast.t
    cells = dict.fromkeys(heads, UNKNOWN) | {
        "Row": contrast.other,
        "Row − reference": f"{contrast.other} − {contrast.reference}",
        "Outcome": outcome.label,
        "Asked": QUESTIONS[contrast.question].title if contrast.question in QUESTIONS else "",
        "Also differ in": ", ".join(contrast.also),
    }
    if t is None:
        cells |= {"Seeds": "0", "Items": "0", "Difference": f"not paired: {contrast.reason}"}
        return {head: cells[head] for head in heads}
    error, interval = contrast.error, None if contrast.low is None else (contrast.low, contrast.high)
    if over:
        error, interval = (t.error, t.interval) if over == "seeds" else contrast.over_items or (None, None)
    mark = "†" if not over and contrast.over == "items" and interval else ""
    cells |= {
        "Seeds": str(t.n),
        "Difference": difference_text(outcome, t.difference, error) + mark,
        "p, seeds (Holm)": p_values(contrast.p_seeds, contrast.p_seeds_holm),
        "p, McNemar (Holm)": p_values(contrast.p_mcnemar, contrast.p_mcnemar_holm),
        "p, bootstrap (Holm)": p_values(contrast.p_bootstrap, contrast.p_bootstrap_holm),
    }
    if interval:
        cells["95 % interval"] = interval_text(outcome, interval) + mark
    elif over:
        cells["Difference"] = t.reason if over == "seeds" else contrast.bootstrap.reason
    if contrast.bootstrap:
        cells["Items"] = f"{contrast.bootstrap.n:,}"
    if contrast.mcnemar:
        cells["p, McNemar, each seed"] = ", ".join(p_text(test.p_value) for test in contrast.mcnemar)
        cells["Right alone, row : reference"] = ", ".join(f"{test.only_b:,} : {test.only_a:,}" for test in contrast.mcnemar)
    if contrast.effect:
        low, high = contrast.effect.interval
        cells["g_z (95 %)"] = f"{number(contrast.effect.g)} ({number(low)} to {number(high)})"
    if contrast.detectable is not None:
        cells["Smallest visible"] = value_text(outcome, contrast.detectable)
    if t.sd:
        needed = seeds_text(contrast.needed)
        cells |= {"Seeds needed": needed, "Seeds needed (Holm)": f"{needed} ({seeds_text(contrast.needed_corrected)})"}
    return {head: cells[head] for head in heads}


def question_tables(results: Results, contrasts: DataFrame) -> list[Table]:
    """A table for each question that was asked, with notes under the last."""
    asked = [(question.title, contrasts[contrasts.question == name]) for name, question in QUESTIONS.items()]
    tables = [replace(contrast_table(title, results, tests, ASKED), notes=[]) for title, tests in asked if len(tests)]
    if tables:
        heads = {head for table in tables for head in table.columns}
        tests = list(contrasts.itertuples())
        notes = _notes(heads, _tested(contrasts), "the comparisons of one question and one model")
        if any(head.endswith("(Holm)") for head in heads):
            notes.append("Bold: at most 0.05 after it, over seeds where there are several, else over items.")
        items = dict.fromkeys(results.outcome[test.outcome].items for test in tests if test.error is not None and test.t.n == 1)
        if items:
            notes.append(ONE_SEED.format(f"test {' or '.join(items)}"))
        if any(test.t is not None and test.error is None for test in tests):
            notes.append("A difference without ± is of one seed, and nothing is known of its chance.")
        tables[-1].notes = notes
    return tables


def apart_table(results: Results, contrasts: DataFrame) -> Table:
    """Contrasts of rows that differ in more than what is asked."""
    table = contrast_table("Rows that differ in more than what is asked", results, contrasts, APART)
    why = "What differs beside what is asked may be why these differ. So none of them has a verdict, is counted, or is among "
    return replace(table, notes=[f"{why}those that are corrected for each other.", *table.notes])


def means_table(results: Results, labels: Sequence[str], outcomes: Sequence[Outcome], contrasts: DataFrame, by: By) -> Table:
    """CMAR's Table 3, mean ± standard error of every row in every outcome; of one outcome CMDA's Table 1, with Δ."""
    known = {(contrast.other, contrast.outcome): contrast for contrast in contrasts.itertuples()}
    single = len(outcomes) == 1 and outcomes[0].tested
    lines = []
    for label in labels:
        tests = [known.get((label, outcome.name)) for outcome in outcomes]
        levels = [1.0 if contrast is None or contrast.p_holm is None else contrast.p_holm for contrast in tests]
        stars = [next((star for level, star in STARS if p <= level), "") for p in levels]
        means = [_mean(results, label, outcome) + star for outcome, star in zip(outcomes, stars, strict=True)]
        change = [change_text(outcomes[0], tests[0])] if single else []
        lines.append([label, *means, *change, ", ".join(map(str, results.row[label].seeds))])
    heads = [
        f"{contrast.label}{' (%)' if contrast.share else ''} {'↓' if contrast.lower_is_better else '↑'}"
        for contrast in outcomes
    ]
    columns = ["Row", *heads, *([f"Δ from {labels[0]}"] if single else []), "Seeds"]
    notes = ["Mean ± standard error over seeds."]
    if not all(outcome.tested for outcome in outcomes):
        notes.append("A perplexity is the likelihood of the bits a byte in other units; the tests are of these.")
    over = "over documents" if by == "sample" else "over seeds, or over documents where there is one seed"
    one_seed = "† One seed: the ± is the standard error over test documents or images, and says nothing of other seeds."
    starred = f"* p ≤ 0.05, ** p ≤ 0.01, *** p ≤ 0.001 against the first row after Holm's correction, {over}."
    return Table("Means", columns, lines, notes).noting("†", one_seed).noting("*", starred)


def _mean(results: Results, label: str, outcome: Outcome) -> str:
    """Mean ± standard error, and † where that is over items for want of seeds."""
    mean, mark = results.mean(label, outcome.name), ""
    if mean.n == 1:
        values = results.values
        (scored,) = values.run[(values.row == label) & (values.outcome == outcome.name)]
        answers = results.answers(scored, outcome.name)
        if not isinstance(answers, str) and not math.isnan(answers.error):
            mean, mark = replace(mean, error=answers.error), "†"
    return mean_text(mean, outcome.digits, outcome.scale) + mark


def seeds_table(results: Results, contrasts: DataFrame) -> Table:
    """Paired t-tests over seeds: they speak of the methods."""
    title = _titled("Over seeds: the methods", results, contrasts)
    return contrast_table(title, results, contrasts, SEEDS, "p_seeds_holm", "seeds")


def items_table(results: Results, contrasts: DataFrame, resamples: int) -> Table:
    """Paired bootstrap and exact McNemar tests over items: they speak of the trained models only."""
    tests = contrasts[contrasts.bootstrap.notna()]
    items = " or ".join(dict.fromkeys(results.outcome[name].items for name in tests.outcome))
    title = _titled(f"Over {items}: these trained models", results, tests)
    table = contrast_table(title, results, tests, ITEMS, "p_items_holm", "items")
    columns = [items.capitalize() if head == "Items" else head for head in table.columns]
    return replace(table, columns=columns, notes=[*table.notes, f"Items are {items}; {resamples:,} resamples of them."])


def _titled(title: str, results: Results, contrasts: DataFrame) -> str:
    """The title, with the outcome where there is one only."""
    names = list(dict.fromkeys(contrasts.outcome))
    return f"{title}, {results.outcome[names[0]].label}" if len(names) == 1 else title
