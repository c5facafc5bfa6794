"""Tables of contrasts: a line a contrast, a column a number of it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
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
from crossalign.results.questions import IMAGE_QUESTIONS, QUESTIONS

if TYPE_CHECKING:
    from pandas import DataFrame

STARS = ((0.001, "***"), (0.01, "**"), (LEVEL, "*"))
SEEDS = "Row; In; Seeds; Difference; 95 % interval; p (Holm); g_z (95 %); Visible; Seeds needed (Holm)"
ITEMS = "Row; In; Items; Difference; 95 % interval; p, bootstrap (Holm); Right alone, row : reference; p, McNemar (Holm)"
ASKED = "Row − reference; {}Seeds; Difference; 95 % interval; {}; Smallest visible; Seeds needed"
APART = "Row − reference; Asked; Also differ in; Measure; Seeds; Difference; 95 % interval"


def contrast_table(
    title: str, results: Results, tests: Iterable[Any], heads: str, notes: list[str], p: str = "p_holm", over: str = ""
) -> Table:
    """A line a contrast, set off where its corrected ``p`` shows a difference; outcomes have no column where there is one.

    Args:
        over: what difference and interval are of: ``seeds``, ``items``, or empty for what decides, with † where it is items.
    """
    tests = list(tests)
    lines = [_line(results, one, heads.split("; "), over) for one in tests]
    outcomes = {line["In"] for line in lines if "In" in line}
    if len(outcomes) == 1:
        title += f", {outcomes.pop()}"
        lines = [{head: cell for head, cell in line.items() if head != "In"} for line in lines]
    strong = [i for i, one in enumerate(tests) if getattr(one, p) is not None and getattr(one, p) <= LEVEL]
    return Table.of(title, lines, notes, ["In", "Measure", "Asked", "Also differ in"], strong)


def _line(results: Results, one: Any, heads: Sequence[str], over: str) -> dict[str, str]:
    """The cells of a contrast under column heads; of one that could not be paired, why."""
    outcome, t = results.outcome[one.outcome], one.t
    cells = dict.fromkeys(heads, UNKNOWN) | {
        "Row": one.other,
        "Row − reference": f"{one.other} − {one.reference}",
        "In": outcome.label,
        "Measure": outcome.label,
        "Asked": QUESTIONS[one.question].title if one.question in QUESTIONS else "",
        "Also differ in": ", ".join(one.also),
    }
    if t is None:
        cells |= {"Seeds": "0", "Items": "0", "Difference": f"not paired: {one.reason}"}
        return {head: cells[head] for head in heads}
    error, interval = one.error, None if one.low is None else (one.low, one.high)
    if over:
        error, interval = (t.error, t.interval) if over == "seeds" else one.over_items or (None, None)
    mark = "†" if not over and one.over == "items" and interval else ""
    difference = difference_text(outcome, t.difference, error) + mark
    if over and interval is None:
        difference = t.reason if over == "seeds" else one.bootstrap.reason
    size, exact, needed = one.effect, one.mcnemar or (), seeds_text(one.needed)
    p_seeds, p_mcnemar = p_values(one.p_seeds, one.p_seeds_holm), p_values(one.p_mcnemar, one.p_mcnemar_holm)
    cells |= {
        "Seeds": str(t.n),
        "Difference": difference,
        "p (Holm)": p_seeds,
        "p, seeds (Holm)": p_seeds,
        "p, images (Holm)": p_mcnemar,
        "p, McNemar (Holm)": p_mcnemar,
        "p, bootstrap (Holm)": p_values(one.p_bootstrap, one.p_bootstrap_holm),
    }
    if interval:
        cells["95 % interval"] = interval_text(outcome, interval) + mark
    if one.bootstrap:
        cells["Items"] = f"{one.bootstrap.n:,}"
    if exact:
        cells["p, images, each seed"] = ", ".join(p_text(test.p_value) for test in exact)
        cells["Right alone, row : reference"] = ", ".join(f"{test.only_b:,} : {test.only_a:,}" for test in exact)
    if size:
        cells["g_z (95 %)"] = f"{number(size.g)} ({number(size.interval[0])} to {number(size.interval[1])})"
    if one.detectable is not None:
        cells["Visible"] = cells["Smallest visible"] = value_text(outcome, one.detectable)
    if t.sd:
        cells |= {"Seeds needed": needed, "Seeds needed (Holm)": f"{needed} ({seeds_text(one.needed_corrected)})"}
    return {head: cells[head] for head in heads}


def question_tables(results: Results, contrasts: DataFrame) -> list[Table]:
    """Contrasts of image classifiers, a table a question, corrected over all of them together."""
    heads = ASKED.format("", "p, seeds (Holm); p, images (Holm); p, images, each seed")
    asked = [(question.title, contrasts[contrasts.question == question.name]) for question in IMAGE_QUESTIONS]
    tables = [contrast_table(title, results, tests.itertuples(), heads, []) for title, tests in asked if len(tests)]
    if tables:
        together = f"all {len(contrasts)} comparisons" if len(contrasts) > 1 else "the one comparison"
        tables[-1].notes = [
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
        ]
        tables[-1].notes += [ONE_SEED.format("test images")] * any(t is not None and t.n == 1 for t in contrasts.t)
    return tables


def text_table(results: Results, contrasts: DataFrame) -> Table:
    """Contrasts of language models."""
    notes = [
        "Paired t-test over seeds; losses in nats a token. In brackets: after Holm's correction, made apart for each "
        "model and over losses beside the row without the term, losses beside controls, and alignments. Bold: at most 0.05 "
        "after it.",
        "Smallest visible: the true difference that the test would have found with 80 % power at α = 0.05 (uncorrected), at "
        "the spread seen. Seeds needed: for a true difference as large as the one seen.",
    ]
    heads = ASKED.format("Measure; ", "p (Holm)")
    return contrast_table("With and without the term", results, contrasts.itertuples(), heads, notes)


def apart_table(results: Results, contrasts: DataFrame) -> Table:
    """Contrasts of rows that differ in more than what is asked."""
    notes = [
        "What differs beside what is asked may be why these differ. So none of them has a verdict, is counted, or is among "
        "those that are corrected for each other. Accuracies in percentage points; ± standard error; intervals are not "
        "corrected."
    ]
    return contrast_table("Rows that differ in more than what is asked", results, contrasts.itertuples(), APART, notes)


def means_table(results: Results, labels: Sequence[str], outcomes: Sequence[Outcome], contrasts: DataFrame, by: By) -> Table:
    """CMAR's Table 3, mean ± standard error of every row in every outcome; of one outcome CMDA's Table 1, with Δ."""
    known = {(one.other, one.outcome): one for one in contrasts.itertuples()}
    single = len(outcomes) == 1 and outcomes[0].tested
    lines = []
    for label in labels:
        tests = [known.get((label, outcome.name)) for outcome in outcomes]
        levels = [1.0 if one is None or one.p_holm is None else one.p_holm for one in tests]
        stars = [next((star for level, star in STARS if p <= level), "") for p in levels]
        means = [_mean(results, label, outcome) + star for outcome, star in zip(outcomes, stars, strict=True)]
        change = [_change(tests[0], outcomes[0])] if single else []
        lines.append([label, *means, *change, ", ".join(map(str, results.row[label].seeds))])
    heads = [f"{one.label}{' (%)' if one.share else ''} {'↓' if one.lower_is_better else '↑'}" for one in outcomes]
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
        answers = results.answers(str(results.row[label].first.folder), outcome.name)
        if not isinstance(answers, str) and not math.isnan(answers.error):
            mean, mark = replace(mean, error=answers.error), "†"
    return mean_text(mean, outcome.digits, outcome.scale) + mark


def _change(one: Any, outcome: Outcome) -> str:
    """The difference with its standard error over seeds, or over items (†); a dash where it has neither."""
    if one is None or one.t is None or (one.t.interval is None and one.over_items is None):
        return UNKNOWN
    error, mark = (one.t.error, "") if one.t.n > 1 else (one.over_items[0], "†")
    return change_text(outcome, one.t.difference, error, mark)


def seeds_table(results: Results, contrasts: DataFrame) -> Table:
    """Paired t-tests over seeds: they speak of the methods."""
    notes = [
        "Row minus reference, paired by seed; ± standard error. Accuracies in percentage points. p: paired t-test; in "
        f"brackets, Holm's correction over {_families(contrasts.family)}. Intervals are not corrected.",
        "g_z: mean of the differences over their standard deviation (Cohen's d_z), corrected for few seeds (Hedges). "
        "Visible: the true difference that the test would have found with 80 % power at α = 0.05, not corrected; seeds "
        "needed: as many for a true difference as large as the one seen; in brackets, at the level of Holm's first step. All "
        "rest on the spread seen in these few seeds.",
    ]
    tests = contrasts.itertuples()
    return contrast_table("Over seeds: the methods", results, tests, SEEDS, notes, "p_seeds_holm", "seeds")


def items_table(results: Results, contrasts: DataFrame, resamples: int) -> Table:
    """Paired bootstrap and exact McNemar tests over items: they speak of the trained models only."""
    tests = contrasts[contrasts.bootstrap.notna()]
    items = " or ".join(dict.fromkeys(results.outcome[name].items for name in tests.outcome))
    notes = [
        f"These trained models on other {items} like these; it says nothing of other seeds. Difference on average over the "
        f"seeds. Paired bootstrap-t over {items}, {resamples:,} resamples. McNemar's exact test of each "
        "seed, combined by Rüger's rule (half of the seeds, rounded up, must agree on a direction). In brackets: Holm's "
        f"correction over {_families(tests.family)}.",
    ]
    title = f"Over {items}: these trained models"
    table = contrast_table(title, results, tests.itertuples(), ITEMS, notes, "p_items_holm", "items")
    return replace(table, columns=[items.capitalize() if head == "Items" else head for head in table.columns])


def _families(families: Iterable[str]) -> str:
    """What Holm's correction is made over."""
    sizes = Counter(families)
    if len(sizes) == 1:
        return f"all {sizes.total()} lines"
    return f"its family, apart for each kind of outcome: {', '.join(f'{family} ({n})' for family, n in sizes.items())}"
