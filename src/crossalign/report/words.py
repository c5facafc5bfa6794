"""Contrasts as a reader wants them: a difference in its unit, and one plain sentence."""

from __future__ import annotations

from typing import Any

from crossalign.report.wording import counted, number, p_equals, p_text, percent, points
from crossalign.results.frame import Results
from crossalign.results.outcomes import Outcome
from crossalign.stats import Interval

Phrases = dict[str, str]
"""How the contrasts of a question are told: a sentence for each case, and the end of one for each verdict, with fields."""

BESIDE: Phrases = {
    "subject": "“{other}” against “{reference}”, {measure}",
    "unpaired": "{subject}: not compared, {reason}.",
    "unknown": "{subject}: no difference is stated, for nothing is known of its chance ({why}).",
    "elsewhere": "{subject}: {why}; the table over documents says more.",
    "seeds": "{subject}: {difference}{unit} ({seeds}, {p}, corrected {corrected}): {end}. {needed}",
    "items": "{subject}: {difference}{unit} ({seeds}{over}, {p}, corrected {corrected}): {end}. {needed}",
    "none": "no difference could be shown",
    "alone": "a hint at a difference, lost on correction",
    "shown over seeds": "shown to be {better}",
    "shown over items": "these trained models differ, it has the {better} ones",
}
PHRASES: dict[str, Phrases] = {"beside": BESIDE}


def value_text(outcome: Outcome, value: float, sign: bool = False) -> str:
    """A value or, signed, a difference in the outcome's unit; shares in percent or points."""
    if outcome.share:
        return points(value, outcome.digits) if sign else percent(value, outcome.digits)
    return number(value, outcome.digits, sign)


def difference_text(outcome: Outcome, difference: float, error: float | None) -> str:
    """``+1.20 ± 0.30``, or the difference alone where it has no error."""
    return value_text(outcome, difference, True) + (f" ± {value_text(outcome, error)}" if error is not None else "")


def interval_text(outcome: Outcome, interval: Interval) -> str:
    """``+0.60 to +1.80``."""
    return f"{value_text(outcome, interval[0], True)} to {value_text(outcome, interval[1], True)}"


def p_values(raw: float | None, corrected: float | None) -> str:
    """``0.012 (0.047)``: a p-value, and in brackets the same after correction."""
    return p_text(None) if raw is None else f"{p_text(raw)} ({p_text(corrected)})"


def seeds_text(needed: int | None) -> str:
    """A number of seeds that was looked for up to 1,000."""
    return "> 1,000" if needed is None else str(needed)


def case(one: Any, phrases: Phrases) -> str:
    """Which of the sentences fits what is known of a contrast."""
    if one.t is None:
        return "unpaired"
    if one.low is not None:
        return str(one.over)
    return "elsewhere" if one.over == "seeds" and one.over_items is not None and "elsewhere" in phrases else "unknown"


def sentence(results: Results, one: Any) -> str:
    """One contrast in plain language, with its uncertainty, null results included."""
    phrases, outcome = PHRASES[one.question], results.outcome[one.outcome]
    told = case(one, phrases)
    fields = {"other": one.other, "reference": one.reference, "measure": outcome.label, "reason": one.reason}
    if one.t is not None:
        fields |= _numbers(one, outcome, phrases)
    fields["subject"] = phrases["subject"].format(**fields)
    return phrases[told].format(**fields)


def _numbers(one: Any, outcome: Outcome, phrases: Phrases) -> dict[str, str]:
    shown = one.verdict in ("gain", "loss")
    end = phrases.get(f"shown over {one.over}" if shown else one.verdict, "")
    kinds = ("better", "worse") if outcome.family != "held-out alignment" else ("higher", "lower")
    bootstrap = one.bootstrap
    return {
        "difference": difference_text(outcome, one.difference, one.error),
        "unit": f" {outcome.unit}" if outcome.unit else "",
        "seeds": counted(one.t.n, "seed"),
        "over": f", over {bootstrap.n:,} {outcome.items}" if bootstrap else "",
        "p": p_equals(one.p),
        "corrected": p_text(one.p_holm),
        "end": end.format(better=kinds[one.verdict == "loss"]),
        "why": "; ".join(filter(None, [one.t.reason, bootstrap.reason if bootstrap else ""])),
        "needed": needed_text(one),
    }


def needed_text(one: Any) -> str:
    """How many seeds would show a true difference as large as the one seen, with 80 % power at α = 0.05.

    With the correction: at the level of Holm's first step, α over the number of tests in the family.
    """
    if not one.t.sd:
        why = "one seed" if one.t.n == 1 else "seeds that differ by the same amount"
        return f"How many seeds would be needed to see a difference of that size cannot be told from {why}."
    seeds, corrected = ("more than 1,000" if n is None else f"{n:,}" for n in (one.needed, one.needed_corrected))
    told = f"{seeds} seeds would be needed to see a difference of that size".capitalize()
    return f"{told}." if seeds == corrected else f"{told}, {corrected} with the correction."
