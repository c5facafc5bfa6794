"""What a comparison prints: means over seeds, both kinds of tests, and one sentence a difference."""

from __future__ import annotations

import math
from dataclasses import replace

from crossalign.report.tables import Table, plus_minus
from crossalign.report.wording import LEVEL, UNKNOWN, counted, number, p_equals, p_text, percent, points
from crossalign.results.contrasts import By, Contrast
from crossalign.results.outcomes import Outcome
from crossalign.results.rows import Row
from crossalign.stats import Interval, mean_and_error

STARS = ((0.001, "***"), (0.01, "**"), (LEVEL, "*"))


def value_text(outcome: Outcome, value: float, sign: bool = False) -> str:
    """A value or, signed, a difference in the outcome's unit; shares in percent or points."""
    if outcome.share:
        return points(value, outcome.digits) if sign else percent(value, outcome.digits)
    return number(value, outcome.digits, sign)


def means_table(rows: list[Row], outcomes: list[Outcome], contrasts: list[Contrast], by: By) -> Table:
    """CMAR's Table 3, mean ± standard error of every row in every outcome; of one outcome CMDA's Table 1, with Δ."""
    single = [one for one in outcomes if one.tested] if len(outcomes) == 1 else []
    stars = {(one.other.label, one.outcome.name): _stars(one, by) for one in contrasts}
    marks: set[str] = set()
    shown = []
    for row in rows:
        cells = [row.label]
        for outcome in outcomes:
            mean, mark = _mean(row, outcome)
            star = stars.get((row.label, outcome.name), "")
            marks.update(mark + star)
            cells.append(mean + mark + star)
        cells += [_difference(one) or UNKNOWN for one in contrasts if one.other is row and one.outcome in single]
        cells += [UNKNOWN for _ in single if row is rows[0]]
        shown.append([*cells, ", ".join(map(str, row.seeds))])
    heads = [f"{one.label}{' (%)' if one.share else ''} {'↓' if one.lower_is_better else '↑'}" for one in outcomes]
    delta = [f"Δ from {rows[0].label}" for _ in single]
    return Table("Means", ["Row", *heads, *delta, "Seeds"], shown, _mean_notes(marks, by, all(one.tested for one in outcomes)))


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


def _mean(row: Row, outcome: Outcome) -> tuple[str, str]:
    """Mean ± standard error, and † where that is over documents for want of seeds."""
    found = mean_and_error([outcome.value(run) for run in row.runs])
    error, mark = found.error, ""
    if found.n == 1 and (answers := outcome.answers(row.first)) is not None and not math.isnan(answers.error):
        error, mark = answers.error, "†"
    scale = 100 if outcome.share else 1
    return plus_minus(scale * found.mean, None if error is None else scale * error, outcome.digits), mark


def _stars(one: Contrast, by: By) -> str:
    p = one.decides(by)[0].holm
    return next((star for level, star in STARS if p is not None and p <= level), "")


def _difference(one: Contrast) -> str:
    """The difference with its standard error over seeds, or over documents (†); empty where it has neither."""
    t = one.t
    if t is None or uncertain(one):
        return ""
    if t.n > 1 and t.error is not None:
        return f"{value_text(one.outcome, t.difference, True)} ± {value_text(one.outcome, t.error)}"
    return f"{_document_difference(one)}†" if one.over_documents else ""


def uncertain(one: Contrast) -> bool:
    """Whether nothing is known of the spread of the difference over seeds, nor over documents."""
    return one.t is None or (one.t.interval is None and one.over_documents is None)


def _document_difference(one: Contrast) -> str:
    assert one.t is not None and one.over_documents is not None
    return f"{value_text(one.outcome, one.t.difference, True)} ± {value_text(one.outcome, one.over_documents[0])}"


def _interval(outcome: Outcome, interval: Interval) -> str:
    return f"{value_text(outcome, interval[0], True)} to {value_text(outcome, interval[1], True)}"


def seeds_table(contrasts: list[Contrast]) -> Table:
    """Paired t-tests over seeds: they speak of the methods."""
    shown = [[one.other.label, one.outcome.label, *_over_seeds(one)] for one in contrasts]
    columns = ["Row", "In", "Seeds", "Difference", "95 % interval", "p (Holm)", "g_z (95 %)", "Visible"]
    columns.append("Seeds needed (Holm)")
    strong = frozenset(i for i, one in enumerate(contrasts) if one.p_seeds.holm is not None and one.p_seeds.holm <= LEVEL)
    notes = [
        "Row minus reference, paired by seed; ± standard error. Accuracies in percentage points. p: paired t-test; in "
        f"brackets, Holm's correction over {_families(contrasts)}. Intervals are not corrected.",
        "g_z: mean of the differences over their standard deviation (Cohen's d_z), corrected for few seeds (Hedges). "
        "Visible: the true difference that the test would have found with 80 % power at α = 0.05, not corrected; seeds "
        "needed: as many for a true difference as large as the one seen; in brackets, at the level of Holm's first step. All "
        "rest on the spread seen in these few seeds.",
    ]
    return _without_single(Table("Over seeds: the methods", columns, shown, notes, frozenset({1}), strong), contrasts)


def _without_single(table: Table, contrasts: list[Contrast]) -> Table:
    """The table without the column that names the outcome, where there is one only; its title then does."""
    names = list(dict.fromkeys(one.outcome.label for one in contrasts))
    if len(names) != 1:
        return table
    columns, rows = table.columns[:1] + table.columns[2:], [row[:1] + row[2:] for row in table.rows]
    return replace(table, title=f"{table.title}, {names[0]}", columns=columns, rows=rows, texts=frozenset())


def _families(contrasts: list[Contrast]) -> str:
    sizes = {family: sum(one.outcome.family == family for one in contrasts) for family in _names(contrasts)}
    return ", apart for each kind of outcome: ".join(
        [f"all {len(contrasts)} lines"]
        if len(sizes) == 1
        else ["its family", ", ".join(f"{family} ({n})" for family, n in sizes.items())]
    )


def _names(contrasts: list[Contrast]) -> list[str]:
    return list(dict.fromkeys(one.outcome.family for one in contrasts))


def _over_seeds(one: Contrast) -> list[str]:
    t = one.t
    if t is None:
        return ["0", f"not paired: {one.pairing.reason}", *[UNKNOWN] * 5]
    if t.interval is None:
        return [str(t.n), t.reason, *[UNKNOWN] * 5]
    effect = one.effect
    needed, corrected = ("> 1,000" if n is None else str(n) for n in (one.needed, one.needed_corrected))
    return [
        str(t.n),
        f"{value_text(one.outcome, t.difference, True)} ± {value_text(one.outcome, t.error or 0.0)}",
        _interval(one.outcome, t.interval),
        _p_values(one.p_seeds.raw, one.p_seeds.holm),
        UNKNOWN if effect is None else f"{number(effect.g)} ({number(effect.interval[0])} to {number(effect.interval[1])})",
        UNKNOWN if one.detectable is None else value_text(one.outcome, one.detectable),
        f"{needed} ({corrected})" if t.sd else UNKNOWN,
    ]


def _p_values(raw: float | None, holm: float | None) -> str:
    return UNKNOWN if raw is None else f"{p_text(raw)} ({p_text(holm)})"


def documents_table(contrasts: list[Contrast], resamples: int) -> Table | None:
    """Paired bootstrap and exact McNemar tests over documents: they speak of the trained models only."""
    mine = [one for one in contrasts if one.bootstrap is not None]
    if not mine:
        return None
    shown = [[one.other.label, one.outcome.label, *_over_documents(one)] for one in mine]
    items = " or ".join(dict.fromkeys(one.outcome.items for one in mine))
    columns = ["Row", "In", items.capitalize(), "Difference", "95 % interval", "p, bootstrap (Holm)"]
    columns += ["Right alone, row : reference", "p, McNemar (Holm)"]
    p_values = [one.p_documents.holm for one in mine]
    strong = frozenset(i for i, p in enumerate(p_values) if p is not None and p <= LEVEL)
    notes = [
        f"These trained models on other {items} like these; it says nothing of other seeds. Difference on average over the "
        f"seeds. Paired bootstrap-t over {items}, {resamples:,} resamples. McNemar's exact test of each "
        "seed, combined by Rüger's rule (half of the seeds, rounded up, must agree on a direction). In brackets: Holm's "
        f"correction over {_families(mine)}.",
    ]
    return _without_single(Table(f"Over {items}: these trained models", columns, shown, notes, frozenset({1}), strong), mine)


def _over_documents(one: Contrast) -> list[str]:
    assert one.t is not None and one.bootstrap is not None
    if one.over_documents is None:
        difference, interval = one.bootstrap.reason, UNKNOWN
    else:
        difference, interval = _document_difference(one), _interval(one.outcome, one.over_documents[1])
    return [
        f"{one.bootstrap.n:,}",
        difference,
        interval,
        _p_values(one.p_bootstrap.raw, one.p_bootstrap.holm),
        ", ".join(f"{test.only_b:,} : {test.only_a:,}" for test in one.mcnemar) or UNKNOWN,
        _p_values(one.p_mcnemar.raw, one.p_mcnemar.holm),
    ]


def sentence(one: Contrast, by: By = "seed") -> str:
    """One difference in plain language, with its uncertainty and the seeds that it would take."""
    names = f"“{one.other.label}” against “{one.reference.label}”, {one.outcome.label}"
    t = one.t
    if t is None:
        return f"{names}: not compared, {one.pairing.reason}."
    p, over_documents = one.decides(by)
    if uncertain(one) or (over_documents and one.over_documents is None):
        why = t.reason if one.bootstrap is None or not one.bootstrap.reason else f"{t.reason}; {one.bootstrap.reason}"
        return f"{names}: no difference is stated, for nothing is known of its chance ({why})."
    if not over_documents and t.interval is None:
        return f"{names}: {t.reason}; the table over documents says more."
    unit = f" {one.outcome.unit}" if one.outcome.unit else ""
    difference = _document_difference(one) if over_documents else _difference(one)
    over = f"{counted(t.n, 'seed')}, over {one.bootstrap.n:,} {one.outcome.items}" if one.bootstrap else counted(t.n, "seed")
    over = over if over_documents else counted(t.n, "seed")
    told = f"{names}: {difference}{unit} ({over}, {p_equals(p.raw)}, corrected {p_text(p.holm)}): {_verdict(one, by)}"
    return f"{told}. {needed_sentence(one)}"


def _verdict(one: Contrast, by: By) -> str:
    p, over_documents = one.decides(by)
    assert one.t is not None
    if p.raw is None or p.holm is None:
        return "no test was possible"
    if p.holm > LEVEL:
        return "a hint at a difference, lost on correction" if p.raw <= LEVEL else "no difference could be shown"
    better = (one.t.difference < 0) is one.outcome.lower_is_better
    what = "better" if better else "worse"
    if one.outcome.name == "alignment":
        what = "higher" if one.t.difference > 0 else "lower"
    return f"these trained models differ, it has the {what} ones" if over_documents else f"shown to be {what}"


def needed_sentence(one: Contrast) -> str:
    """How many seeds would show a true difference as large as the one seen, with 80 % power at α = 0.05.

    With the correction: at the level of Holm's first step, α over the number of tests in the family.
    """
    assert one.t is not None
    if not one.t.sd:
        why = "one seed" if one.t.n == 1 else "seeds that differ by the same amount"
        return f"How many seeds would be needed to see a difference of that size cannot be told from {why}."
    seeds, corrected = ("more than 1,000" if n is None else f"{n:,}" for n in (one.needed, one.needed_corrected))
    told = f"{seeds} seeds would be needed to see a difference of that size".capitalize()
    return f"{told}." if seeds == corrected else f"{told}, {corrected} with the correction."
