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
        counts = [len(trials) for trials in (search.begun(rung), search.failed_in(rung), search.training_in(rung), reached)]
        lines.append(
            [
                str(rung + 1),
                number(end, 0),
                *map(str, counts),
                str(sum(trial.begun > rung for trial in reached)) if rung < last else UNKNOWN,
                score_text(search, (max if search.larger_is_better else min)(scores)),
                score_text(search, median(scores)),
                duration(sum(trial.seconds[rung] for trial in reached)),
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
    return Table("Rungs", columns, lines, [f"{rule} Failed: on the way to the rung's end. Median: of those that reached it."])


def trial_table(search: SearchRecord) -> Table:
    """The best trials by highest rung, then score, with their settings."""
    best, short, space = search.ranked[:MOST_TRIALS], short_names(search), search.space
    lines = []
    for trial in best:
        settings = [setting_text(trial.settings[one.name]) if one.name in trial.settings else UNKNOWN for one in space]
        lines.append(
            [
                str(trial.number),
                str(len(trial.scores)),
                score_text(search, trial.score),
                *settings,
                trial.state(len(search.ends)),
            ]
        )
    columns = ["Trial", "Rung", score_name(search).capitalize(), *short.values(), "State"]
    notes = ["By the highest rung reached, then by the score at its end; scores of different rungs are not comparable."]
    absent = [one for one in space if any(one.name not in trial.settings for trial in best)]
    if absent:
        listed = "; ".join(short[one.name] + (f", when {one.when}" if one.when else "") for one in absent)
        notes.append(f"{UNKNOWN}: a setting that the trial doesn't have ({listed}).")
    if search.winner:
        notes.append("Bold: the winner.")
    title = f"The best {len(best)} of {len(search.trials)} trials" if len(search.trials) > len(best) else "Trials"
    strong = frozenset(i for i, trial in enumerate(best) if trial is search.winner)
    texts = {i for i, one in enumerate(space, 3) if any(isinstance(choice, str) for choice in one.choices)}
    return Table(title, columns, lines, notes, frozenset(texts | {len(columns) - 1}), strong)


def failure_table(search: SearchRecord) -> Table:
    """Every trial that failed, where, why, and with which settings."""
    lines = []
    for trial in search.failed[:MOST_FAILURES]:
        rung = min(len(trial.scores) + 1, len(search.ends))
        lines.append([str(trial.number), str(rung), number(len(trial.curve), 0), trial.reason, settings_text(search, trial)])
    left = len(search.failed) - len(lines)
    notes = [f"{counted(left, 'more trial')} failed; search.json has {'it' if left == 1 else 'them'}."] if left else []
    notes.append("A failed trial keeps its place in the count of its rung and is never promoted.")
    columns = ["Trial", "In rung", f"{search.unit.capitalize()}s trained", "Reason", "Settings"]
    return Table("Failed trials", columns, lines, notes, frozenset({3, 4}))


def method_table(sections: list[Section]) -> Table | None:
    """Searches beside each other: what each spent, what it came to, and what the winner does on the test set."""
    if len(sections) < 2:
        return None
    lines = []
    for section in sections:
        search, winner = section.search, section.search.winner
        beside = f" and {number(search.alignment_epochs, 0)} of alignment" if search.alignment_epochs else ""
        lines.append(
            [
                section.name,
                str(len(search.trials)),
                str(len(search.failed)),
                f"{number(search.epochs, 0)} {search.unit}s" + beside,
                duration(search.seconds),
                setting_text(winner.settings.get(search.rate, UNKNOWN)) if winner else UNKNOWN,
                f"{search.score} {with_unit(search, winner.score)}" if winner else UNKNOWN,
                winner_text(search, section.runs),
                str(len(section.runs) or UNKNOWN),
            ]
        )
    columns = ["Row", "Trials", "Failed", "Spent", "Wall time", "Best learning rate", "Best score of the search"]
    notes = [
        "Each row's settings were searched for on their own. Validation chose, so the best score of a search is optimistic, "
        "the more so the more trials; test scores are the winner's, retrained, mean ± standard error over seeds, which does "
        "not tell what another search would have found."
    ]
    return Table("Searches", [*columns, "Winner's test score", "Seeds"], lines, notes + budgets(sections))


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
