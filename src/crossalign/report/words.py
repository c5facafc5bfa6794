"""Numbers and contrasts as a reader wants them: percent, points, durations, and one plain sentence a contrast."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from crossalign.results.contrasts import LEVEL
from crossalign.results.frame import Results
from crossalign.results.outcomes import ALIGNED, Outcome
from crossalign.results.questions import QUESTIONS
from crossalign.stats import Interval, Mean

if TYPE_CHECKING:
    from pandas import DataFrame

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


def mean_text(mean: Mean, digits: int = 2, scale: float = 1) -> str:
    """``1.23 ± 0.04``, or the mean alone where there is no error; 100 is the ``scale`` of percents."""
    return number(scale * mean.mean, digits) + (f" ± {number(scale * mean.error, digits)}" if mean.error is not None else "")


def value_text(outcome: Outcome, value: float, sign: bool = False) -> str:
    """A value or, signed, a difference in the outcome's unit; shares in percent or points."""
    return number(outcome.scale * value, outcome.digits, sign)


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


def sentence(results: Results, contrast: Any) -> str:
    """One contrast in plain language, with its uncertainty, null results included."""
    outcome = results.outcome[contrast.outcome]
    t, bootstrap = contrast.t, contrast.bootstrap
    subject = f"“{contrast.other}” against “{contrast.reference}”, {outcome.label}"
    unit = f" {outcome.unit}" if outcome.unit else ""
    if t is None:
        return f"{subject}: not compared, {contrast.reason}."
    if contrast.low is None:
        why = "; ".join(filter(None, [t.reason, bootstrap.reason if bootstrap else ""]))
        if contrast.over == "seeds" and contrast.over_items is not None:
            return f"{subject}: {why}; the table over {outcome.items} says more."
        return f"{subject}: nothing is known of the chance of a difference ({why})."
    better, worse = ("higher", "lower") if contrast.outcome == ALIGNED else ("better", "worse")
    kind = worse if contrast.verdict == "loss" else better
    besides = ""
    end = {"none": "no difference could be shown", "alone": "a hint at a difference, lost on correction"}.get(contrast.verdict)
    if end is None:
        end = f"shown to be {kind}" if contrast.over == "seeds" else f"these trained models differ, it has the {kind} ones"
    else:
        if contrast.over == "seeds" and contrast.p_items_holm is not None and contrast.p_items_holm <= LEVEL:
            besides = f", though these trained models differ on these {outcome.items} ({p_equals(contrast.p_items_holm)})"
        if contrast.detectable is not None:
            besides += f"; a true difference under {value_text(outcome, contrast.detectable)}{unit} would probably be missed"
    over = f", over {(bootstrap or contrast.mcnemar[0]).n:,} {outcome.items}" if contrast.over == "items" else ""
    tests = f"{counted(t.n, 'seed')}{over}, {p_equals(contrast.p)}, corrected {p_text(contrast.p_holm)}"
    difference = difference_text(outcome, contrast.difference, contrast.error)
    return f"{subject}: {difference}{unit} ({tests}): {end}{besides}. {needed_text(contrast)}"


def needed_text(contrast: Any) -> str:
    """How many seeds would show a true difference as large as the one seen, with 80 % power at α = 0.05.

    With the correction: at the level of Holm's first step, α over the number of tests in the family.
    """
    if not contrast.t.sd:
        why = "one seed" if contrast.t.n == 1 else "seeds that differ by the same amount"
        return f"How many seeds would be needed to see a difference of that size cannot be told from {why}."
    seeds, corrected = ("more than 1,000" if n is None else f"{n:,}" for n in (contrast.needed, contrast.needed_corrected))
    text = f"{seeds} seeds would be needed to see a difference of that size".capitalize()
    return f"{text}." if seeds == corrected else f"{text}, {corrected} with the correction."


def findings(results: Results, contrasts: DataFrame) -> tuple[tuple[str, str, tuple[tuple[str, str], ...]], ...]:
    """For each question that was asked: its title, its answer, and (verdict, sentence) of each contrast.

    A question that is asked of several models, each with a family of its own, has an answer for each, which names it.
    """
    several = contrasts.groupby("question").family.nunique().gt(1).any()
    answers = []
    for (question, _), asked in contrasts.groupby(["question", "family"], sort=False):
        tests = list(asked.itertuples())
        model = f"{results.row[tests[0].other].block}: " if several else ""
        sentences = tuple((contrast.verdict, sentence(results, contrast)) for contrast in tests)
        answers.append((QUESTIONS[question].title, model + answer(tests), sentences))
    return tuple(answers)


def answer(tests: list[Any]) -> str:
    """The findings on one question in one sentence."""
    if all(contrast.t is None for contrast in tests):
        which = "The one comparison could not" if len(tests) == 1 else f"None of {len(tests)} comparisons could"
        return f"{which} be made."
    if all(contrast.p is None for contrast in tests):
        which = "the one comparison" if len(tests) == 1 else f"these {len(tests)} comparisons"
        return f"Nothing is known of the chance of {which}."
    gains, losses, alone = (sum(contrast.verdict == verdict for contrast in tests) for verdict in ("gain", "loss", "alone"))
    if len(tests) == 1:
        text = f"The one comparison shows {'a gain' if gains else 'a loss' if losses else 'no difference'}"
    elif not gains and not losses:
        text = f"Of {len(tests)} comparisons, none shows a difference"
    else:
        verb = "shows" if gains == 1 else "show"
        text = f"Of {len(tests)} comparisons, {gains} {verb} a gain, {losses} a loss, the rest no difference"
    if alone:
        text += f" ({alone} would without correction for several tests)"
    if not any(contrast.t is not None and contrast.t.n > 1 for contrast in tests):
        text += "; with one seed this speaks of the trained models, not of the methods"
    return f"{text}."
