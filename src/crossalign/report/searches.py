"""What a search over settings came to: its best score, what it spent, what failed and what chose, in words and in tables."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from crossalign.report.blocks import Table
from crossalign.report.tables import plain
from crossalign.report.words import UNKNOWN, counted, duration, mean_text, number, percent, value_text
from crossalign.results.outcomes import ACCURACY, Outcome, chosen_by, scores_of
from crossalign.runs.records import Run
from crossalign.runs.search import SearchRecord, TrialRecord
from crossalign.stats import Mean, mean_and_error

WHY_SHORT = 60
MOST_TRIALS = 10
"""In the table of the best ones."""
MOST_FAILURES = 30
UNEQUAL = 1.1
"""Budgets further apart than this factor are pointed out."""
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
        lines.append(
            f"The search is not over: {count} of {counted(search.asked, 'configuration')} begun, {len(search.training)} in "
            "training when this was written."
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


def rung_table(search: SearchRecord) -> Table:
    """How many trials each rung saw, kept and lost, and their scores."""
    lines, last = [], len(search.ends) - 1
    for rung, end in enumerate(search.ends):
        reached = search.reached(rung)
        scores = [score for _, score in search.scores(rung)] or [math.nan]
        lines.append(
            {
                "Rung": str(rung + 1),
                f"Ends at {search.unit}": number(end, 0),
                "Begun": str(sum(trial.begun >= rung for trial in search.trials)),
                "Failed": str(sum(trial.begun == rung for trial in search.failed)),
                "In training": str(sum(trial.begun == rung for trial in search.training)),
                "Reached its end": str(len(reached)),
                "Promoted": str(sum(trial.begun > rung for trial in reached)) if rung < last else UNKNOWN,
                f"Best {score_name(search)}": score_text(search, (max if search.larger_is_better else min)(scores)),
                "Median": score_text(search, median(scores)),
                "Time of all": duration(sum(trial.seconds[rung] for trial in reached)),
            }
        )
    rule = (
        f"Of the trials at the end of a rung, one in {search.factor} is promoted to the next, by {search.score} there. It "
        "waits for no other (ASHA), so that somewhat more may be promoted than of all at once."
    )
    if not last:
        rule = "One rung: every trial is trained in full, and none is stopped early."
    return Table.of("Rungs", lines, [f"{rule} Failed: on the way to the rung's end. Median: of those that reached it."])


def trial_table(search: SearchRecord) -> Table:
    """The best trials by highest rung, then score, with their settings."""
    best, short, space, lines = search.ranked[:MOST_TRIALS], short_names(search), search.space, []
    for trial in best:
        settings = {short[name]: setting_text(trial.settings[name]) if name in trial.settings else UNKNOWN for name in short}
        reached = {"Trial": str(trial.number), "Rung": str(len(trial.scores))}
        scored = {score_name(search).capitalize(): score_text(search, trial.score)}
        lines.append(reached | scored | settings | {"State": trial.state(len(search.ends))})
    notes = ["By the highest rung reached, then by the score at its end; scores of different rungs are not comparable."]
    absent = [field for field in space if any(field.name not in trial.settings for trial in best)]
    if absent:
        listed = "; ".join(short[field.name] + (f", when {field.when}" if field.when else "") for field in absent)
        notes.append(f"{UNKNOWN}: a setting that the trial doesn't have ({listed}).")
    notes += ["Bold: the winner."] * (search.winner is not None)
    title = f"The best {len(best)} of {len(search.trials)} trials" if len(search.trials) > len(best) else "Trials"
    texts = [short[field.name] for field in space if any(isinstance(choice, str) for choice in field.choices)]
    return Table.of(title, lines, notes, [*texts, "State"], [i for i, trial in enumerate(best) if trial is search.winner])


def failure_table(search: SearchRecord) -> Table:
    """Every trial that failed, where, why, and with which settings."""
    lines = [
        {
            "Trial": str(trial.number),
            "In rung": str(trial.begun + 1),
            f"{search.unit.capitalize()}s trained": number(len(trial.curve), 0),
            "Reason": trial.reason,
            "Settings": settings_text(search, trial),
        }
        for trial in search.failed[:MOST_FAILURES]
    ]
    left = len(search.failed) - len(lines)
    notes = [f"{counted(left, 'more trial')} failed; search.json has {'it' if left == 1 else 'them'}."] if left else []
    notes.append("A failed trial keeps its place in the count of its rung and is never promoted.")
    return Table.of("Failed trials", lines, notes, ["Reason", "Settings"])


def method_table(sections: list[Section]) -> Table | None:
    """Searches beside each other: what each spent, what it came to, and what the winner does on the test set."""
    if len(sections) < 2:
        return None
    lines = []
    for section in sections:
        search, winner = section.search, section.search.winner
        beside = f" and {number(search.alignment_epochs, 0)} of alignment" if search.alignment_epochs else ""
        tests = []
        for outcome, test in winner_tests(section.runs).items():
            text = mean_text(test, outcome.digits, 100 if outcome.share else 1)
            tests.append(f"{text} %" if outcome.share else outcome.label.replace("loss", f"loss {text}", 1))
        lines.append(
            {
                "Row": section.name,
                "Trials": str(len(search.trials)),
                "Failed": str(len(search.failed)),
                "Spent": f"{number(search.epochs, 0)} {search.unit}s" + beside,
                "Wall time": duration(search.seconds),
                "Best learning rate": setting_text(winner.settings.get(search.rate, UNKNOWN)) if winner else UNKNOWN,
                "Best score of the search": f"{search.score} {with_unit(search, winner.score)}" if winner else UNKNOWN,
                "Winner's test score": "; ".join(tests) or UNKNOWN,
                "Seeds": str(len(section.runs) or UNKNOWN),
            }
        )
    notes = [
        "Each row's settings were searched for on their own. Validation chose, so the best score of a search is optimistic, "
        "the more so the more trials; test scores are the winner's, retrained, mean ± standard error over seeds, which does "
        "not tell what another search would have found."
    ]
    return Table.of("Searches", lines, notes + budgets(sections))


def budgets(sections: list[Section]) -> list[str]:
    """A sentence where the searches were not given the same chance."""
    spent = [(section.search.epochs, section.name) for section in sections]
    asked = {section.search.asked for section in sections}
    (low, least), (high, most) = min(spent), max(spent)
    sentences = []
    if high > UNEQUAL * low:
        sentences.append(
            f"The budgets are not equal: “{least}” spent {number(low, 0)} {sections[0].search.unit}s and “{most}” "
            f"{number(high, 0)}; a longer search tends to find more."
        )
    if len(asked) > 1:
        sentences.append(f"Not every search was asked for as many trials: {', '.join(map(str, sorted(asked)))}.")
    return sentences
