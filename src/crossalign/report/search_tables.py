"""What a search over settings found, in words and tables: what it chose among, what it spent, what was tried and failed."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from crossalign.report.blocks import Figure, Table
from crossalign.report.tables import plain, plus_minus
from crossalign.report.wording import UNKNOWN, counted, duration, number, percent
from crossalign.runs.records import Run
from crossalign.runs.search import Field, Search, Trial, short_names
from crossalign.stats import Mean, mean_and_error

SHOWN = 10
"""Trials in the table of the best ones."""
MOST_FAILURES = 30
UNEQUAL = 1.1
"""Budgets further apart than this factor are pointed out."""
WHY_SHORT = 60
CHOSE = ("validation", "answers")
"""What a text run's held-out text is called among its scores; the others are of texts that chose nothing."""


@dataclass
class Section:
    """One search with its winner's complete runs; ``name`` tells it from the others of the report."""

    search: Search
    name: str
    runs: list[Run]
    suffix: str = ""
    """Of its figures' names, where there are several searches."""

    @property
    def headline(self) -> str:
        return headline(self.search)

    @property
    def remarks(self) -> list[str]:
        return remarks(self.search, self.runs)

    @property
    def facts(self) -> list[tuple[str, str]]:
        """A few numbers to meet first, as (name, value)."""
        search, winner = self.search, self.search.winner
        asked = f" of {search.asked}" if len(search.trials) < search.asked else ""
        held = [(f"best {search.score}", with_unit(search, winner.score))] if winner else []
        for name, test in winner_tests(search, self.runs).items():
            what = f"the winner's loss on {name}" if name else "the winner on test data"
            spread = f", ± {score_text(search, test.error)}" if test.error is not None else ""
            held.append((what + spread, with_unit(search, test.mean)))
        held += [("trials", f"{len(search.trials)}{asked}"), ("failed", str(len(search.failed)))]
        held += [(f"{search.unit}s spent, of {number(search.epochs_in_full, 0)} in full", number(search.epochs, 0))]
        held += [("of training saved", f"{percent(search.saved, 0)} %")] if winner and not math.isnan(search.saved) else []
        return [*held, ("wall time", duration(search.seconds))]

    @cached_property
    def before(self) -> list[Table]:
        """Tables before the figures."""
        return [rung_table(self.search), *([trial_table(self.search)] if any(t.rungs for t in self.search.trials) else [])]

    @cached_property
    def after(self) -> list[Table]:
        """Tables after them."""
        return [failure_table(self.search)] if self.search.failed else []

    @cached_property
    def drawn(self) -> tuple[list[Figure], list[str]]:
        """Figures, and a sentence for each that could not be drawn."""
        from crossalign.report.figures.search import draw_search

        return draw_search(self.search, self.suffix, f" of “{self.name}”" if self.suffix else "")


@dataclass
class Lead:
    """What a report opens with."""

    title: str
    headline: str
    remarks: list[str] = field(default_factory=list)
    facts: list[tuple[str, str]] = field(default_factory=list)


def sections_of(searches: list[Search], runs: list[Run]) -> list[Section]:
    """A section a search, under its row's name, and its folder's where two rows are called alike."""
    names = [search.row for search in searches]
    made = []
    for place, search in enumerate(searches, 1):
        name = search.row if names.count(search.row) == 1 else f"{search.row} ({search.folder.name})"
        mine = [run for run in runs if search.holds(run)]  # of a row's runs: another search's may be called alike
        made.append(Section(search, name, mine, f"-{place}" if len(searches) > 1 else ""))
    return made


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
        (only,) = sections
        return Lead(only.search.title, only.headline, [*only.remarks, *own], only.facts)
    searches = [section.search for section in sections]
    told = "; ".join(f"{s.name} {with_unit(s.search, s.search.winner.score) if s.search.winner else 'none'}" for s in sections)
    units = " and ".join(dict.fromkeys(f"{search.unit}s" for search in searches))
    facts = [
        ("searches", str(len(searches))),
        ("trials", str(sum(len(search.trials) for search in searches))),
        ("failed", str(sum(len(search.failed) for search in searches))),
        (f"{units} spent", number(sum(search.epochs for search in searches), 0)),
        ("wall time of all", duration(sum(search.seconds for search in searches))),
    ]
    said = f"{len(searches)} searches, each for the settings of one row. Best {searches[0].score}: {told}."
    counts = sorted({len(search.trials) for search in searches})
    among = " to ".join(dict.fromkeys((str(counts[0]), str(counts[-1]))))
    chose = f"Validation chose, in each search among {among} configurations: the best validation scores are optimistic. "
    chose += "Test data are scored only for runs of the winners."
    return Lead(f"Comparison of {len(searches)} searches", said, [chose, *own], facts)


def headline(search: Search) -> str:
    """The best score, what it took, and what is still open."""
    winner, count = search.winner, len(search.trials)
    spent = f"It spent {number(search.epochs, 0)} of the {number(search.epochs_in_full, 0)} {search.unit}s"
    cost = f"{spent} that training {'every' if count > 1 else 'the'} configuration in full would take"
    cost += f", {percent(search.saved, 0)} % less." if winner and search.saved > 0.005 else "."
    if winner:
        at = f"after {counted(int(winner.rungs[-1].epochs), search.unit)}: {with_unit(search, winner.score)}"
        so_far = "" if search.over else " so far"
        return f"Of {counted(count, 'configuration')}, trial {winner.number} has the best {search.score}{so_far}, {at}. {cost}"
    if count and len(search.failed) == count and search.over:
        return f"{_all(count)} failed: there is no winner. {cost}"
    if not count:
        return f"No configuration of {search.asked} is begun yet."
    return f"None of {counted(count, 'configuration')} has reached the last rung yet: there is no winner. {cost}"


def _all(count: int) -> str:
    return "The one configuration" if count == 1 else f"All {count} configurations"


def remarks(search: Search, runs: list[Run]) -> list[str]:
    """The winner's settings, the failures, what is not finished, and what chose."""
    said = []
    if search.winner:
        said.append(f"Settings of trial {search.winner.number}: {settings_text(search, search.winner)}.")
    if not search.over:
        training = sum(trial.state == "training" for trial in search.trials)
        said.append(
            f"The search is not over: {len(search.trials)} of {counted(search.asked, 'configuration')} begun, "
            f"{training} in training when this was written."
        )
    elif len(search.trials) < search.asked:
        said.append(f"{search.asked} were asked for: the space seems to hold no more.")
    if search.alignment_epochs:
        spent = counted(int(search.alignment_epochs), "epoch")
        said.append(f"Before training the trials spent {spent} of alignment, which no rung counts: none of them is saved.")
    if search.failed:
        saved = " What they did not train counts as saved." if search.winner and not math.isnan(search.saved) else ""
        said.append(f"Failed: {reasons(search)}.{saved}")
    if search.winner:
        test = "Test data are scored only for runs of the winner, none of which is finished here."
        if runs:
            seeds = counted(len(runs), "seed")
            test = f"Test data were scored only for the winner's runs ({seeds})."
            test = test if winner_tests(search, runs) else f"The winner's runs ({seeds}) scored no test data."
        if earlier := [str(number) for number in search.scored if number != search.winner.number]:
            test += f" They were looked at before: trial {' and trial '.join(earlier)} was the winner of a shorter search."
        said.append(f"{_optimism(len(search.trials))}{_again(search, runs)} {test}")
    return said


def _optimism(count: int) -> str:
    return (
        f"Validation chose, among {counted(count, 'configuration')}: the best validation score of so many is optimistic."
        if count > 1
        else "Validation chose, among one configuration."
    )


def _again(search: Search, runs: list[Run]) -> str:
    """What the score that chose becomes where nothing was chosen."""
    places = [("validation", "accuracy")] if in_percent(search) else [("scores", place, "loss") for place in CHOSE]
    found = [mean for keys in places if (mean := mean_and_error([run.number(*keys) for run in runs])).n]
    if not found or not search.winner:
        return ""
    fresh, chosen = with_unit(search, found[0].mean), with_unit(search, search.winner.score)
    return f" With fresh seeds the winner's is {fresh} in place of {chosen}."


def reasons(search: Search) -> str:
    """Why trials failed, the commonest first: ``3 of 64 (2: the loss is not finite; 1: out of memory)``."""
    held = Counter(_short(trial.reason) for trial in search.failed).most_common()
    if len(held) == 1:
        return f"{len(search.failed)} of {len(search.trials)}: {held[0][0]}"
    shown = "; ".join(f"{count}: {reason}" for reason, count in held[:3])
    return f"{len(search.failed)} of {len(search.trials)} ({shown}{'; other reasons below' if len(held) > 3 else ''})"


def _short(reason: str) -> str:
    reason = reason.strip().rstrip(".") or "no reason recorded"
    return reason if len(reason) <= WHY_SHORT else reason[: WHY_SHORT - 1] + "…"


def with_unit(search: Search, score: float) -> str:
    """A score as text: an accuracy in percent."""
    text = score_text(search, score)
    return f"{text} %" if in_percent(search) and text != UNKNOWN else text


def score_text(search: Search, score: float) -> str:
    """A score for a column."""
    return percent(score) if in_percent(search) else number(score, 4)


def in_percent(search: Search) -> bool:
    """Whether the score is a share."""
    return "accuracy" in search.score


def score_name(search: Search) -> str:
    """The score with its unit, for a column's head or an axis."""
    return f"{search.score} (%)" if in_percent(search) else search.score


def _rounded(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else plain(value)


def settings_text(search: Search, trial: Trial) -> str:
    """A trial's settings in the order of the space."""
    known = [one.name for one in search.space]
    keys = [*(name for name in known if name in trial.settings), *(name for name in trial.settings if name not in known)]
    return ", ".join(f"{key} = {_rounded(trial.settings[key])}" for key in keys) or "the recipe's own"


def winner_tests(search: Search, runs: list[Run]) -> dict[str, Mean]:
    """The winner's scores on data that chose nothing: test accuracy under no name, or the loss on each text by its name."""
    if in_percent(search):
        held = {"": mean_and_error([run.number("test", "accuracy") for run in runs])}
    else:
        names = dict.fromkeys(name for run in runs for name in (run.result or {}).get("scores") or {} if name not in CHOSE)
        held = {name: mean_and_error([run.number("scores", name, "loss") for run in runs]) for name in names}
    return {name: mean for name, mean in held.items() if mean.n}


def winner_text(search: Search, runs: list[Run]) -> str:
    """The winner's test score, mean ± standard error over seeds; a dash where there is none."""
    told = []
    for name, test in winner_tests(search, runs).items():
        if in_percent(search):
            told.append(plus_minus(100 * test.mean, None if test.error is None else 100 * test.error) + " %")
        else:
            told.append(f"loss {plus_minus(test.mean, test.error, 4)} on {name}")
    return "; ".join(told) or UNKNOWN


def rung_table(search: Search) -> Table:
    """How many trials each rung saw, kept and lost, and their scores."""
    shown, last = [], len(search.rungs) - 1
    for rung, end in enumerate(search.rungs):
        reached = search.reached(rung)
        scores = [score for _, score in search.scores(rung)]
        best = (max if search.larger_is_better else min)(scores) if scores else math.nan
        promoted = [trial for trial in reached if trial in search.begun(rung + 1)] if rung < last else []
        shown.append(
            [
                str(rung + 1),
                number(end, 0),
                str(len(search.begun(rung))),
                str(len(search.stopped_in(rung, "failed"))),
                str(len(search.stopped_in(rung, "training"))),
                str(len(reached)),
                str(len(promoted)) if rung < last else UNKNOWN,
                score_text(search, best),
                score_text(search, float(np.median(scores)) if scores else math.nan),
                duration(sum(trial.rungs[rung].seconds for trial in reached)),
            ]
        )
    columns = ["Rung", f"Ends at {search.unit}", "Begun", "Failed", "In training", "Reached its end", "Promoted"]
    columns += [f"Best {score_name(search)}", "Median", "Time of all"]
    rule = (
        f"Of the trials at the end of a rung, one in {search.factor} is promoted to the next, by {search.score} there. It "
        "waits for no other (ASHA), so that somewhat more may be promoted than of all at once."
    )
    if not last:
        rule = "One rung: every trial is trained in full, and none is stopped early."
    return Table("Rungs", columns, shown, [f"{rule} Failed: on the way to the rung's end. Median: of those that reached it."])


def trial_table(search: Search) -> Table:
    """The best trials by highest rung, then score, with their settings."""
    best = [trial for trial in search.ranked if trial.rungs][:SHOWN]
    short = {key: name.replace("_", " ") for key, name in short_names([one.name for one in search.space]).items()}
    shown = [
        [
            str(trial.number),
            str(len(trial.rungs)),
            score_text(search, trial.score),
            *(_cell(trial, one) for one in search.space),
            trial.state,
        ]
        for trial in best
    ]
    columns = ["Trial", "Rung", score_name(search).capitalize(), *short.values(), "State"]
    notes = ["By the highest rung reached, then by the score at its end; scores of different rungs are not comparable."]
    absent = [one for one in search.space if any(one.name not in trial.settings for trial in best)]
    if absent:
        told = "; ".join(short[one.name] + (f", when {one.when}" if one.when else "") for one in absent)
        notes.append(f"{UNKNOWN}: a setting that the trial doesn't have ({told}).")
    if search.winner:
        notes.append("Bold: the winner.")
    title = f"The best {len(best)} of {len(search.trials)} trials" if len(search.trials) > len(best) else "Trials"
    strong = frozenset(place for place, trial in enumerate(best) if trial is search.winner)
    texts = {3 + place for place, one in enumerate(search.space) if any(isinstance(choice, str) for choice in one.choices)}
    return Table(title, columns, shown, notes, frozenset(texts | {len(columns) - 1}), strong)


def _cell(trial: Trial, one: Field) -> str:
    return _rounded(trial.settings[one.name]) if one.name in trial.settings else UNKNOWN


def failure_table(search: Search) -> Table:
    """Every trial that failed, where, why, and with which settings."""
    shown = [
        [
            str(trial.number),
            str(min(len(trial.rungs), len(search.rungs) - 1) + 1),
            number(len(trial.curve), 0),
            trial.reason or "no reason recorded",
            settings_text(search, trial),
        ]
        for trial in search.failed[:MOST_FAILURES]
    ]
    left = len(search.failed) - len(shown)
    notes = [f"{counted(left, 'more trial')} failed; search.json has {'it' if left == 1 else 'them'}."] if left else []
    notes.append("A failed trial keeps its place in the count of its rung and is never promoted.")
    columns = ["Trial", "In rung", f"{search.unit.capitalize()}s trained", "Reason", "Settings"]
    return Table("Failed trials", columns, shown, notes, frozenset({3, 4}))


def method_table(sections: list[Section]) -> Table | None:
    """Searches beside each other: what each spent, what it found, and what the winner does on the test set."""
    if len(sections) < 2:
        return None
    shown = []
    for section in sections:
        search, winner = section.search, section.search.winner
        beside = f" and {number(search.alignment_epochs, 0)} of alignment" if search.alignment_epochs else ""
        shown.append(
            [
                section.name,
                str(len(search.trials)),
                str(len(search.failed)),
                f"{number(search.epochs, 0)} {search.unit}s" + beside,
                duration(search.seconds),
                _rounded(winner.settings.get(search.rate, UNKNOWN)) if winner else UNKNOWN,
                f"{search.score} {with_unit(search, winner.score)}" if winner else UNKNOWN,
                winner_text(search, section.runs),
                str(len(section.runs)) if section.runs else UNKNOWN,
            ]
        )
    columns = ["Row", "Trials", "Failed", "Spent", "Wall time", "Best learning rate", "Best score of the search"]
    notes = [
        "Each row's settings were searched for on their own. Validation chose, so the best score of a search is optimistic, "
        "the more so the more trials; test scores are the winner's, retrained, mean ± standard error over seeds, which does "
        "not tell what another search would have found."
    ]
    return Table("Searches", [*columns, "Winner's test score", "Seeds"], shown, notes + budgets(sections))


def budgets(sections: list[Section]) -> list[str]:
    """A sentence where the searches were not given the same chance."""
    spent = [(section.search.epochs, section.name) for section in sections]
    asked = {section.search.asked for section in sections}
    (low, least), (high, most) = min(spent), max(spent)
    said = []
    if high > UNEQUAL * low:
        unit = sections[0].search.unit
        said.append(
            f"The budgets are not equal: “{least}” spent {number(low, 0)} {unit}s and “{most}” {number(high, 0)}; a longer "
            "search tends to find more."
        )
    if len(asked) > 1:
        said.append(f"Not every search was asked for as many trials: {', '.join(map(str, sorted(asked)))}.")
    return said
