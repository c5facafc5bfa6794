"""What a search over settings came to, in words: its best score, what it spent, what failed, and what chose."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from crossalign.report.tables import plain
from crossalign.report.words import UNKNOWN, counted, duration, mean_text, number, percent, value_text
from crossalign.results.outcomes import ACCURACY, Outcome, chosen_by, scores_of
from crossalign.runs.records import Run
from crossalign.runs.search import SearchRecord, TrialRecord
from crossalign.stats import Mean, mean_and_error

WHY_SHORT = 60
CHOSE = ("loss.validation", "loss.answers")
"""Of a text run's held-out text; the other losses are of texts that chose nothing."""


@dataclass(frozen=True)
class Section:
    """One search with its winner's complete runs; ``name`` tells it from the others of the report."""

    search: SearchRecord
    name: str
    runs: list[Run]


@dataclass(frozen=True)
class Lead:
    """What a page opens with."""

    title: str
    headline: str
    remarks: Sequence[str] = ()
    facts: Sequence[tuple[str, str]] = ()


def sections_of(searches: list[SearchRecord], runs: list[Run]) -> list[Section]:
    """A section a search, under its row's name, and its folder's where two rows are called alike."""
    rows = Counter(search.row for search in searches)
    sections = []
    for search in searches:
        own = [run for run in runs if search.trained(run.folder)]  # of a row's runs: another search's may be called alike
        sections.append(Section(search, search.row if rows[search.row] == 1 else f"{search.row} ({search.folder.name})", own))
    return sections


def lead(sections: list[Section], runs: Lead, of_searches: bool, any_run: bool) -> Lead:
    """The opening of a report with searches.

    Args:
        runs: the opening that the runs alone would have.
        of_searches: whether every run is one of a winner.
        any_run: whether there is a run at all.
    """
    if not of_searches:
        more = "A search over settings is" if len(sections) == 1 else f"{len(sections)} searches over settings are"
        return Lead(runs.title, runs.headline, [*runs.remarks, f"{more} reported below."], runs.facts)
    own = [runs.headline, *runs.remarks] if any_run else []
    if len(sections) == 1:
        search, winners = sections[0].search, sections[0].runs
        return Lead(search.title, headline(search), [*remarks(search, winners), *own], facts(search, winners))
    searches = [section.search for section in sections]
    bests = [with_unit(search, search.winner.score) if search.winner else "none" for search in searches]
    listed = "; ".join(f"{section.name} {best}" for section, best in zip(sections, bests, strict=True))
    spent = " and ".join(dict.fromkeys(f"{search.unit}s" for search in searches)) + " spent"
    counts = sorted({len(search.trials) for search in searches})
    among = " to ".join(dict.fromkeys((str(counts[0]), str(counts[-1]))))
    chose = f"Validation chose, in each search among {among} configurations: the best validation scores are optimistic. "
    chose += "Test data are scored only for runs of the winners."
    return Lead(
        f"Comparison of {len(searches)} searches",
        f"{len(searches)} searches, each for the settings of one row. Best {searches[0].score}: {listed}.",
        [chose, *own],
        [
            ("searches", str(len(searches))),
            ("trials", str(sum(len(search.trials) for search in searches))),
            ("failed", str(sum(len(search.failed) for search in searches))),
            (spent, number(sum(search.epochs for search in searches), 0)),
            ("wall time of all", duration(sum(search.seconds for search in searches))),
        ],
    )


def headline(search: SearchRecord) -> str:
    """The best score, what it took, and what is still open."""
    winner, count, failed = search.winner, len(search.trials), len(search.failed)
    cost = f"It spent {number(search.epochs, 0)} of the {number(search.epochs_in_full, 0)} {search.unit}s that training "
    cost += f"{'every' if count > 1 else 'the'} configuration in full would take"
    cost += f", {percent(search.saved, 0)} % less." if winner and search.saved > 0.005 else "."
    if winner:
        when = f"after {counted(search.ends[len(winner.scores) - 1], search.unit)}: {with_unit(search, winner.score)}"
        best = f"{search.score}{'' if search.over else ' so far'}"
        return f"Of {counted(count, 'configuration')}, trial {winner.number} has the best {best}, {when}. {cost}"
    if count and failed == count and search.over:
        every = "The one configuration" if count == 1 else f"All {count} configurations"
        return f"{every} failed: there is no winner. {cost}"
    if not count:
        return f"No configuration of {search.asked} is begun yet."
    return f"None of {counted(count, 'configuration')} has reached the last rung yet: there is no winner. {cost}"


def remarks(search: SearchRecord, runs: list[Run]) -> list[str]:
    """The winner's settings, the failures, what is not finished, and what chose; ``runs``: the winner's."""
    winner, count, lines = search.winner, len(search.trials), []
    if winner:
        lines.append(f"Settings of trial {winner.number}: {settings_text(search, winner)}.")
    if not search.over:
        training = sum(trial.open is not None for trial in search.trials)
        lines.append(
            f"The search is not over: {count} of {counted(search.asked, 'configuration')} begun, {training} in training when "
            "this was written."
        )
    elif count < search.asked:
        lines.append(f"{search.asked} were asked for: the space seems to hold no more.")
    if search.alignment_epochs:
        spent = counted(int(search.alignment_epochs), "epoch")
        lines.append(f"Before training the trials spent {spent} of alignment, which no rung counts: none of them is saved.")
    if search.failed:
        saved = " What they did not train counts as saved." if winner and not math.isnan(search.saved) else ""
        lines.append(f"Failed: {_reasons(search)}.{saved}")
    return [*lines, f"{_optimism(search, runs)} {_tests(search, runs)}"] if winner else lines


def _optimism(search: SearchRecord, runs: list[Run]) -> str:
    """How much was chosen from, and what the score that chose becomes where nothing was chosen."""
    count, winner = len(search.trials), search.winner
    more = "one configuration."
    if count > 1:
        more = f"{counted(count, 'configuration')}: the best validation score of so many is optimistic."
    fresh = mean_and_error([chosen_by(run).value for run in runs])
    if winner and fresh.n:
        again, chosen = with_unit(search, fresh.mean), with_unit(search, winner.score)
        more += f" With fresh seeds the winner's is {again} in place of {chosen}."
    return f"Validation chose, among {more}"


def _tests(search: SearchRecord, runs: list[Run]) -> str:
    """Which trials ever met the test data."""
    seeds = counted(len(runs), "seed")
    text = f"Test data were scored only for the winner's runs ({seeds})."
    if not runs:
        text = "Test data are scored only for runs of the winner, none of which is finished here."
    elif not winner_tests(runs):
        text = f"The winner's runs ({seeds}) scored no test data."
    earlier = [str(number) for number in search.scored if search.winner and number != search.winner.number]
    if earlier:
        text += f" They were looked at before: trial {' and trial '.join(earlier)} was the winner of a shorter search."
    return text


def _reasons(search: SearchRecord) -> str:
    """Why trials failed, the commonest first: ``3 of 64 (2: the loss is not finite; 1: out of memory)``."""
    reasons = (trial.reason.strip().rstrip(".") for trial in search.failed)
    counts = Counter(text if len(text) <= WHY_SHORT else text[: WHY_SHORT - 1] + "…" for text in reasons).most_common()
    total = f"{len(search.failed)} of {len(search.trials)}"
    if len(counts) == 1:
        return f"{total}: {counts[0][0]}"
    listed = "; ".join(f"{count}: {reason}" for reason, count in counts[:3])
    return f"{total} ({listed}{'; other reasons below' if len(counts) > 3 else ''})"


def facts(search: SearchRecord, runs: list[Run]) -> list[tuple[str, str]]:
    """A few numbers to meet first, as (name, value); ``runs``: the winner's."""
    winner, pairs = search.winner, []
    if winner:
        pairs.append((f"best {search.score}", with_unit(search, winner.score)))
    for outcome, test in winner_tests(runs).items():
        spread = f", ± {value_text(outcome, test.error)}" if test.error is not None else ""
        subject = "the winner on test data" if outcome == ACCURACY else f"the winner's {outcome.label}"
        pairs.append((subject + spread, value_text(outcome, test.mean) + " %" * outcome.share))
    asked = f" of {search.asked}" if len(search.trials) < search.asked else ""
    pairs += [("trials", f"{len(search.trials)}{asked}"), ("failed", str(len(search.failed)))]
    pairs += [(f"{search.unit}s spent, of {number(search.epochs_in_full, 0)} in full", number(search.epochs, 0))]
    pairs += [("of training saved", f"{percent(search.saved, 0)} %")] if winner and not math.isnan(search.saved) else []
    return [*pairs, ("wall time", duration(search.seconds))]


def in_percent(search: SearchRecord) -> bool:
    """Whether the score is a share."""
    return "accuracy" in search.score


def score_text(search: SearchRecord, score: float) -> str:
    """A score for a column."""
    return percent(score) if in_percent(search) else number(score, 4)


def with_unit(search: SearchRecord, score: float) -> str:
    """A score as text: an accuracy in percent."""
    text = score_text(search, score)
    return f"{text} %" if in_percent(search) and text != UNKNOWN else text


def score_name(search: SearchRecord) -> str:
    """The score with its unit, for a column's head or an axis."""
    return f"{search.score} (%)" if in_percent(search) else search.score


def setting_text(value: Any) -> str:
    """A setting's value, short."""
    return f"{value:.3g}" if isinstance(value, float) else plain(value)


def settings_text(search: SearchRecord, trial: TrialRecord) -> str:
    """A trial's settings in the order of the space."""
    order = [field.name for field in search.space if field.name in trial.settings]
    keys = dict.fromkeys([*order, *trial.settings])
    return ", ".join(f"{key} = {setting_text(trial.settings[key])}" for key in keys) or "the recipe's own"


def short_names(search: SearchRecord) -> dict[str, str]:
    """Of each setting the last part of its key, or the whole key where two end alike."""
    last = {field.name: field.name.rsplit(".", 1)[-1] for field in search.space}
    counts = Counter(last.values())
    return {name: (short if counts[short] == 1 else name).replace("_", " ") for name, short in last.items()}


def winner_tests(runs: list[Run]) -> dict[Outcome, Mean]:
    """The winner's means over seeds in outcomes that chose nothing: on test images, or on further texts."""
    values: dict[Outcome, list[float]] = {}
    for score in (score for run in runs for score in scores_of(run)):
        if score.outcome.family in (ACCURACY.family, "losses") and score.outcome.name not in CHOSE:
            values.setdefault(score.outcome, []).append(score.value)
    means = {outcome: mean_and_error(numbers) for outcome, numbers in values.items()}
    return {outcome: mean for outcome, mean in means.items() if mean.n}


def winner_text(runs: list[Run]) -> str:
    """The winner's test scores, mean ± standard error over seeds; a dash where there is none."""
    texts = []
    for outcome, test in winner_tests(runs).items():
        text = mean_text(test, outcome.digits, 100 if outcome.share else 1)
        texts.append(f"{text} %" if outcome.share else outcome.label.replace("loss", f"loss {text}", 1))
    return "; ".join(texts) or UNKNOWN
