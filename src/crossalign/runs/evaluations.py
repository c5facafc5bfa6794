"""Reading what an evaluation left in a run folder: scores of tasks, and what the model did on each document."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crossalign.core.errors import UserError
from crossalign.core.reading import read_json
from crossalign.runs.names import EvaluationFolder, RunFolder

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
        rows = order[np.searchsorted(self.ids, ids, sorter=order)]
        return Answers(ids, self.amount[rows], self.size[rows])


@dataclass
class Evaluation:
    """A run's folder ``evaluation``: ``results.json``, and ``samples/TASK.parquet`` with a line a document."""

    folder: Path
    tasks: dict[str, dict[str, Any]]
    """What results.json says of each; ``metrics`` are its scores by name."""
    forgetting: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    """Of a classifier: ``{task: {metric: {"before": …, "after": …}}}`` of the language model inside."""
    before: Evaluation | None = None
    """Of a classifier: the evaluation of the language model that it was made from."""

    def answers(self, task: str, metric: str) -> Answers | str:
        """What the model did on each document, or why that is not known or does not come to the metric.

        Raises:
            UserError: a samples file that cannot be read, lacks a number or its column of ids, or holds a document twice.
        """
        path = EvaluationFolder(self.folder).samples / f"{task}.parquet"
        run = self.folder.parent
        again = f"evaluate '{run}' again"
        bits = metric == BITS_PER_BYTE
        names = ("loglikelihood", "bytes") if bits else (metric,)
        try:
            columns = read_columns(path, ("doc_id", *(names if bits else ())))
        except UserError as error:
            raise UserError(f"{error}; {again}") from error
        if columns is None:
            return f"no {path} to pair documents by; crossalign evaluate {run} --tasks {task} makes it"
        if names[0] not in columns:
            return f"{path} has no column '{metric}' to pair documents by (columns: {', '.join(columns)})"
        ids = np.asarray(columns["doc_id"]).astype(str)
        try:
            numbers = [np.asarray(columns[name], np.float64) for name in names]
        except (TypeError, ValueError, OverflowError) as error:
            raise UserError(f"{path} has other values than numbers in its columns {', '.join(names)}; {again}") from error
        if len(np.unique(ids)) < len(ids):
            raise UserError(f"{path} holds a doc_id twice; {again}")
        for name, values in zip(names, numbers, strict=True):
            empty = int(np.sum(~np.isfinite(values)))
            if empty:
                raise UserError(f"{path} has no number for {empty} documents in column '{name}'; {again}")
        if bits:
            read = Answers(ids, -numbers[0] / math.log(2), numbers[1])
        else:
            read = Answers(ids, numbers[0], np.ones(len(ids)))
        stated = self.tasks.get(task, {}).get("metrics", {}).get(metric)
        if isinstance(stated, int | float) and math.isclose(read.score, stated, rel_tol=1e-3, abs_tol=1e-4):
            return read
        return f"{path} does not come to the {metric} of results.json, so its documents are not compared"


def read_columns(path: Path, wanted: Iterable[str]) -> dict[str, list[Any]] | None:
    """Every column of a parquet file, those ``wanted`` among them; None where it is absent.

    Raises:
        UserError: it is damaged, or lacks one.
    """
    import pyarrow.parquet

    if not path.is_file():
        return None
    try:
        table = pyarrow.parquet.read_table(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path} cannot be read ({type(error).__name__})") from error
    columns = {name: table.column(name).to_pylist() for name in table.column_names}
    for name in wanted:
        if name not in columns:
            raise UserError(f"{path} has no column '{name}' (columns: {', '.join(columns) or 'none'})")
    return columns


def read_evaluation(run: Path, folder: Path | None = None) -> Evaluation | None:
    """What was evaluated of the run in the folder ``run``, as ``folder`` in it has it; None where nothing was.

    Raises:
        UserError: a results.json that is damaged or has no tasks.
    """
    folder = folder or RunFolder(run).evaluation
    path = EvaluationFolder(folder).results
    if not path.is_file():
        return None
    try:
        facts = read_json(path)
        tasks, forgetting = facts["tasks"], dict(facts.get("forgetting") or {})
        whole = all(isinstance(task, dict) and isinstance(task.get("metrics"), dict) for task in tasks.values())
    except (UserError, ValueError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise UserError(f"{path} is damaged or has no tasks with metrics; evaluate '{run}' again")
    return Evaluation(folder, tasks, forgetting, read_evaluation(run, EvaluationFolder(folder).before) if forgetting else None)
