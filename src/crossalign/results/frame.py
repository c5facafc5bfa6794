"""The numbers of a study's complete runs as tidy frames, which every table, figure, contrast and export reads."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from functools import cached_property
from typing import TYPE_CHECKING, Any

from crossalign.core.errors import UserError, needed
from crossalign.results.outcomes import FAMILIES, KINDS, Outcome, Score, scores_of
from crossalign.results.rows import Row, group_rows
from crossalign.runs.evaluations import Answers
from crossalign.runs.records import Study
from crossalign.stats import Mean, mean_and_error

if TYPE_CHECKING:
    from pandas import DataFrame


def tidy(records: Iterable[Any], columns: Iterable[str]) -> DataFrame:
    """A frame with a line a record. Its cells are Python's own, so that what is not known stays None.

    Raises:
        UserError: pandas is not installed.
    """
    pandas = needed("pandas", "report", "reading the numbers of runs")
    frame: DataFrame = pandas.DataFrame(list(records), columns=list(columns), dtype=object)
    return frame


class Results:
    """A study's rows and outcomes, and the frames made of them, each made once.

    ``strict``: rows are apart by every setting, whatever the runs are called.
    """

    def __init__(self, study: Study, strict: bool = False) -> None:
        self.study = study
        scores: dict[str, dict[str, Score]] = {}
        for run in study.complete:
            with study.leaving_out(run):
                scores[str(run.folder)] = {score.outcome.name: score for score in scores_of(run)}
        study.check()
        grouped, notes = group_rows(study, strict)
        self.notes = [*notes, *study.notes]
        self.row: dict[str, Row] = {row.label: row for row in grouped}
        """Every row by its label, in the order of the page."""
        runs = [run for row in grouped for run in row.runs]
        self._scores = {str(run.folder): scores[str(run.folder)] for run in runs}
        self._answers: dict[tuple[str, str], Answers | str] = {}
        last = {name: score.outcome for scores in self._scores.values() for name, score in scores.items()}
        known = {family: order for order, family in enumerate(FAMILIES)}
        self.outcome: dict[str, Outcome] = dict(sorted(last.items(), key=lambda item: known.get(item[1].family, len(known))))
        """Every outcome that a run has a number of, by name."""

    def kind(self, verb: str) -> str:
        """What the runs are of, such as image classifiers, by what they were measured in; empty where nothing tells.

        Raises:
            UserError: of several kinds, and ``verb`` says what to do with each apart.
        """
        families = {outcome.family for outcome in self.outcome.values()}
        kinds = [kind for family, kind in KINDS.items() if family in families]
        if len(kinds) > 1:
            raise UserError(f"these runs are of {' and of '.join(kinds)}: {verb} each kind apart")
        return "".join(kinds)

    @cached_property
    def values(self) -> DataFrame:
        """One line a number: run (its folder), row, seed, outcome, value, and the fingerprint of what it was measured on."""
        lines = [
            (str(run.folder), row.label, run.seed, name, score.value, score.fingerprint)
            for row in self.row.values()
            for run in row.runs
            for name, score in self._scores[str(run.folder)].items()
            if not math.isnan(score.value)
        ]
        return tidy(lines, ("run", "row", "seed", "outcome", "value", "fingerprint")).astype({"value": float, "seed": int})

    @cached_property
    def rows(self) -> DataFrame:
        """One line a row: what was trained, how, and on which data; ``block`` names the rows that it can be compared with."""
        facts = ("block", "verb", "method", "align", "mode", "teacher", "weights", "backbone", "model", "data", "control")
        lines = [(row.label, order, *(getattr(row, key) for key in facts)) for order, row in enumerate(self.row.values())]
        return tidy(lines, ("row", "order", *facts))

    @cached_property
    def outcomes(self) -> DataFrame:
        """One line an outcome: its name (``outcome``), label, family, unit, and how it is shown and tested."""
        names = ["outcome", *(field.name for field in dataclasses.fields(Outcome)[1:])]
        return tidy(map(dataclasses.astuple, self.outcome.values()), names)

    @cached_property
    def curves(self) -> DataFrame:
        """One line a number logged while training: run, row, seed, stage, split, epoch, step, key, value."""
        where = ("stage", "split", "epoch", "step")
        lines = [
            (str(run.folder), row.label, run.seed, *(line.get(key) for key in where), key, float(value))
            for row in self.row.values()
            for run in row.runs
            for line in run.metrics
            for key, value in line.items()
            if key not in where and isinstance(value, int | float)
        ]
        return tidy(lines, ("run", "row", "seed", *where, "key", "value")).astype({"value": float})

    def number(self, run: str, outcome: str) -> Score:
        """A run's number in an outcome; NaN where its record has none."""
        return self._scores[run].get(outcome) or Score(self.outcome[outcome], math.nan, (), str)

    def answers(self, run: str, outcome: str) -> Answers | str:
        """What a run did on each item of an outcome, or a sentence on why that is not known (empty where it never is)."""
        key = run, outcome
        if key not in self._answers:
            try:
                self._answers[key] = self._scores[run][outcome].answers()
            except UserError as error:  # damaged: the scores stand all the same
                self._answers[key] = str(error)
        return self._answers[key]

    def mean(self, row: str, outcome: str) -> Mean:
        """Mean and standard error of an outcome over a row's seeds."""
        values = self.values
        return mean_and_error(values.value[(values.row == row) & (values.outcome == outcome)])
