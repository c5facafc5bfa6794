"""Tables of a search over settings: its rungs, its best trials, those that failed, and searches beside each other."""

from __future__ import annotations

import math
from statistics import median

from crossalign.report.blocks import Table
from crossalign.report.searches import (
    Section,
    score_name,
    score_text,
    setting_text,
    settings_text,
    short_names,
    winner_text,
    with_unit,
)
from crossalign.report.words import UNKNOWN, counted, duration, number
from crossalign.runs.search import SearchRecord

MOST_TRIALS = 10
"""In the table of the best ones."""
MOST_FAILURES = 30
UNEQUAL = 1.1
"""Budgets further apart than this factor are pointed out."""


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
                "Failed": str(len(search.failed_in(rung))),
                "In training": str(len(search.training_in(rung))),
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
    absent = [one for one in space if any(one.name not in trial.settings for trial in best)]
    if absent:
        listed = "; ".join(short[one.name] + (f", when {one.when}" if one.when else "") for one in absent)
        notes.append(f"{UNKNOWN}: a setting that the trial doesn't have ({listed}).")
    notes += ["Bold: the winner."] * (search.winner is not None)
    title = f"The best {len(best)} of {len(search.trials)} trials" if len(search.trials) > len(best) else "Trials"
    texts = [short[one.name] for one in space if any(isinstance(choice, str) for choice in one.choices)]
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
        lines.append(
            {
                "Row": section.name,
                "Trials": str(len(search.trials)),
                "Failed": str(len(search.failed)),
                "Spent": f"{number(search.epochs, 0)} {search.unit}s" + beside,
                "Wall time": duration(search.seconds),
                "Best learning rate": setting_text(winner.settings.get(search.rate, UNKNOWN)) if winner else UNKNOWN,
                "Best score of the search": f"{search.score} {with_unit(search, winner.score)}" if winner else UNKNOWN,
                "Winner's test score": winner_text(section.runs),
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
