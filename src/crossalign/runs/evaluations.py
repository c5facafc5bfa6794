"""Reading what an evaluation left in a run folder: scores of tasks, and what the model did on each document."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crossalign.core.errors import UserError

BITS_PER_BYTE = "bits_per_byte"


@dataclass(frozen=True)
class Answers:
    """What a model did on each of n documents; a task's score is the sum of ``amount`` over the sum of ``size``."""

    ids: NDArray[Any]
    """(n,), each once."""
    amount: NDArray[np.float64]
    """(n,) such as 1 for a right answer, or the bits that a document took."""
    size: NDArray[np.float64]
    """(n,) 1, or a document's bytes."""

    @property
    def score(self) -> float:
        return float(self.amount.sum() / self.size.sum()) if self.size.sum() else math.nan

    @property
    def error(self) -> float:
        """Standard error of the score over documents, linearised where sizes differ."""
        residual = self.amount - self.score * self.size
        n = len(self.ids)
        return float(np.sqrt(np.sum(residual**2) * n / (n - 1)) / self.size.sum()) if n > 1 else math.nan

    @property
    def right_or_wrong(self) -> bool:
        """Whether each document is answered right or wrong, and nothing between."""
        return bool(np.all(self.size == 1) and np.all((self.amount == 0) | (self.amount == 1)))

    def only(self, ids: NDArray[Any]) -> Answers:
        """These documents alone, in this order; each must be there."""
        order = np.argsort(self.ids)
        place = order[np.searchsorted(self.ids, ids, sorter=order)]
        return Answers(ids, self.amount[place], self.size[place])


def is_likelihood(metric: str) -> bool:
    """Whether a metric is a likelihood in some unit: bits a byte, or a perplexity."""
    return metric == BITS_PER_BYTE or "perplexity" in metric


@dataclass
class Evaluation:
    """A run's folder ``evaluation``: ``results.json``, and ``samples/TASK.parquet`` with a line a document."""

    folder: Path
    tasks: dict[str, dict[str, Any]]
    forgetting: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    """Of a classifier: ``{task: {metric: {"before": …, "after": …}}}`` of the language model inside."""
    before: Evaluation | None = None
    """Of a classifier: the evaluation of the language model that it was made from."""
    _held: dict[str, dict[str, NDArray[Any]] | None] = field(default_factory=dict)

    def metrics(self, task: str) -> list[str]:
        return list(self.tasks.get(task, {}).get("metrics") or {})

    def score(self, task: str, metric: str) -> float:
        """A score in results.json; NaN where absent."""
        value = (self.tasks.get(task, {}).get("metrics") or {}).get(metric)
        return float(value) if isinstance(value, int | float) else math.nan

    def higher_is_better(self, task: str, metric: str) -> bool:
        """As the results say, or else by the metric's name."""
        told = (self.tasks[task].get("higher_is_better") or {}).get(metric)
        return told if isinstance(told, bool) else not is_likelihood(metric)

    def samples(self, task: str) -> Path:
        return self.folder / "samples" / f"{task}.parquet"

    def answers(self, task: str, metric: str) -> Answers | str:
        """What the model did on each document, or why that is not known or does not come to the metric.

        Raises:
            UserError: a samples file that cannot be read, lacks a number or its column of ids, or holds a document twice.
        """
        columns, path = self.columns(task), self.samples(task)
        if columns is None:
            run = self.folder.parent
            return f"no {path} to pair documents by; crossalign evaluate {run} --tasks {task} makes it"
        if metric not in columns and metric != BITS_PER_BYTE:
            return f"{path} has no column '{metric}' to pair documents by (columns: {', '.join(columns)})"
        read = self._answers(columns, task, metric)
        if math.isclose(read.score, self.score(task, metric), rel_tol=1e-3, abs_tol=1e-4):
            return read
        return f"{path} does not come to the {metric} of results.json, so its documents are not compared"

    def _answers(self, columns: dict[str, NDArray[Any]], task: str, metric: str) -> Answers:
        ids = self._column(columns, task, "doc_id").astype(str)
        if len(np.unique(ids)) < len(ids):
            raise UserError(f"{self.samples(task)} holds a doc_id twice; evaluate '{self.folder.parent}' again")
        if metric == BITS_PER_BYTE:
            bits = -self._numbers(columns, task, "loglikelihood") / math.log(2)
            return Answers(ids, bits, self._numbers(columns, task, "bytes"))
        return Answers(ids, self._numbers(columns, task, metric), np.ones(len(ids)))

    def _numbers(self, columns: dict[str, NDArray[Any]], task: str, name: str) -> NDArray[np.float64]:
        values = self._column(columns, task, name).astype(np.float64)
        if not np.all(np.isfinite(values)):
            empty, again = int(np.sum(~np.isfinite(values))), f"evaluate '{self.folder.parent}' again"
            raise UserError(f"{self.samples(task)} has no number for {empty} documents in column '{name}'; {again}")
        return values

    def _column(self, columns: dict[str, NDArray[Any]], task: str, name: str) -> NDArray[Any]:
        if name not in columns:
            listed = ", ".join(columns) or "none"
            again = f"evaluate '{self.folder.parent}' again"
            raise UserError(f"{self.samples(task)} has no column '{name}' (columns: {listed}); {again}")
        return columns[name]

    def columns(self, task: str) -> dict[str, NDArray[Any]] | None:
        """The samples of a task; None where none were kept."""
        if task not in self._held:
            self._held[task] = _read_columns(self.samples(task))
        return self._held[task]


def _read_columns(path: Path) -> dict[str, NDArray[Any]] | None:
    import pyarrow
    import pyarrow.parquet

    if not path.is_file():
        return None
    try:
        table = pyarrow.parquet.read_table(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path} cannot be read ({type(error).__name__}); evaluate '{path.parents[2]}' again") from error
    return {name: np.asarray(table.column(name).to_pylist()) for name in table.column_names}


def read_evaluation(run: Path) -> Evaluation | None:
    """What was evaluated of the run in the folder ``run``; None where nothing was.

    Raises:
        UserError: a results.json that is damaged or has no tasks.
    """
    return _read(run / "evaluation", run)


def _read(folder: Path, run: Path) -> Evaluation | None:
    path = folder / "results.json"
    if not path.is_file():
        return None
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        tasks, forgetting = told["tasks"], dict(told.get("forgetting") or {})
        whole = all(isinstance(task, dict) and isinstance(task.get("metrics"), dict) for task in tasks.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise UserError(f"{path} is damaged or has no tasks with metrics; evaluate '{run}' again")
    return Evaluation(folder, tasks, forgetting, _read(folder / "before", run) if forgetting else None)
