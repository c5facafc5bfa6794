"""``compare``: which rows differ, in what, by how much, and how sure that is.

Runs that differ in their seed alone are one row. Every row is compared with one reference, in everything that both have a
number of: accuracy on test images, losses on texts, held-out alignment, scores of tasks. Two kinds of chance are kept apart.
Over seeds, the paired t-test speaks of the method. Over documents, with the trained models held fixed, the paired bootstrap
and McNemar's exact test speak of these trained models. All p-values are corrected by Holm's method, and no difference is
printed without its uncertainty.
"""

import fnmatch
from pathlib import Path

from crossalign.core.errors import UserError, unknown
from crossalign.report.words import counted
from crossalign.results.contrasts import By, contrasts
from crossalign.results.frame import Results
from crossalign.results.outcomes import BEFORE, Outcome
from crossalign.results.questions import beside
from crossalign.results.rows import Row
from crossalign.runs.records import open_study
from crossalign.verbs.compare.compared import Compared


def compare(
    runs: list[Path],
    by: By = "seed",
    reference: str = "",
    tasks: tuple[str, ...] = (),
    resamples: int = 5000,
) -> Compared:
    """Compare ``runs``: run folders, or folders that hold some at any depth, all of one job.

    Args:
        by: what a star stands for: ``seed``, the t-test over seeds; ``sample``, the test over documents.
        reference: name of the row that the others are compared with, or a folder that holds its runs; by default the row
            of the first folder, or of several in it the one without alignment.
        tasks: only these outcomes, by name; ``*`` stands for any letters.
        resamples: of the bootstrap.

    Raises:
        UserError: fewer than two rows, no run in a path, damaged files, an unknown row or task, both jobs at once.
    """
    if resamples < 200:
        raise UserError(f"{resamples} resamples are too few for an interval; take 200 or more, such as --resamples 5000")
    study = open_study(runs)
    results = Results(study, strict=True)
    rows = list(results.row.values())
    _check(results, rows)
    first = _reference(rows, reference, runs).label
    known = set(results.values.outcome)
    outcomes = _chosen(
        [outcome for outcome in results.outcome.values() if outcome.name in known and outcome.family != BEFORE], tasks
    )
    tests = contrasts(results, beside(results, first, outcomes), resamples, by)
    stopped = [f"{run.folder} is not finished and left out; the same command goes on with it." for run in study.incomplete]
    notes = results.notes + stopped + _no_answers(results, first, outcomes)
    notes += [note for line in tests.notes for note in line]
    notes += [note for run in study.complete for note in run.notes]
    labels = [first, *(label for label in results.row if label != first)]
    return Compared(results, labels, outcomes, tests, by, resamples, list(dict.fromkeys(notes)))


def _check(results: Results, rows: list[Row]) -> None:
    study = results.study
    if not study.runs:
        raise UserError(f"nothing to compare: '{study.searches[0].folder}' holds a search without any run of its winner")
    if not rows:
        count, first = counted(len(study.incomplete), "run"), study.incomplete[0].folder
        raise UserError(f"nothing to compare: {count} not finished, such as '{first}'; the same command goes on with it")
    results.kind("compare")
    if len(rows) < 2:
        seeds = ", ".join(map(str, rows[0].seeds))
        raise UserError(f"'{rows[0].label}' (seeds {seeds}) is the only row here; name runs of another setting as well")


def _reference(rows: list[Row], name: str, paths: list[Path]) -> Row:
    """The row of that name or in that folder; unnamed, that of the first path, or the one there without alignment."""
    if name:
        named = [row for row in rows if row.label == name] or _within(rows, Path(name))
        if not named:
            raise unknown("row", name, [row.label for row in rows])
        if len(named) > 1:
            listed = ", ".join(f"'{row.label}'" for row in named)
            raise UserError(f"'{name}' holds several rows ({listed}); name one of them, as in --reference '{named[0].label}'")
        return named[0]
    given = _within(rows, paths[0]) or rows
    plain = [row for row in given if row.align == "none"]
    trained = [row for row in plain if row.weights == "pretrained"]
    return (sorted(trained, key=lambda row: row.method != "fpt") or plain or given)[0]


def _within(rows: list[Row], folder: Path) -> list[Row]:
    inside = folder.resolve()
    return [row for row in rows if any(run.folder.resolve().is_relative_to(inside) for run in row.runs)]


def _chosen(outcomes: list[Outcome], patterns: tuple[str, ...]) -> list[Outcome]:
    if not outcomes:
        raise UserError("these runs have no number to compare: no test accuracy, no loss on a text and no evaluated task")
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(outcome.name, pattern) for outcome in outcomes):
            raise unknown("task", pattern, [outcome.name for outcome in outcomes])
    chosen = [outcome for outcome in outcomes if not patterns or any(fnmatch.fnmatchcase(outcome.name, p) for p in patterns)]
    if not any(outcome.tested for outcome in chosen):
        bits = chosen[0].name.rpartition(".")[0] + ".bits_per_byte"
        raise UserError(f"{chosen[0].name} is {bits} in other units, which is what is tested; name that one as well")
    return chosen


def _no_answers(results: Results, reference: str, outcomes: list[Outcome]) -> list[str]:
    """Where only losses are known, what would give answers by document."""
    if not any(outcome.family == "losses" for outcome in outcomes) or any(run.evaluation for run in results.study.complete):
        return []
    command = f"crossalign evaluate {results.row[reference].first.folder} --tasks arc_easy"
    return [f"Losses are known by run only; for answers by document, evaluate the runs on tasks, as with {command}"]
