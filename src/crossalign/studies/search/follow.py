"""How a search is followed: by bars on a terminal, and in MLflow."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from crossalign.config import flatten, to_dict
from crossalign.core.errors import UserError
from crossalign.core.progress import progress
from crossalign.runs.names import RunFolder, SearchFolder
from crossalign.runs.schema import read_result
from crossalign.studies.search.jobs import validations
from crossalign.studies.search.journal import Journal
from crossalign.studies.search.session import RESUMED, SearchSession
from crossalign.training.tracking import RETRY_SECONDS, SEND_SECONDS, Status, log_results, summary

LOOK_SECONDS = 5.0  # between two looks into the folders of the trials in training


class Board(AbstractContextManager["Board"]):
    """Bars over the epochs that a search is going to train and over each rung, or now and then a line in a log file.

    Args:
        journal: what has happened.
        asked: trials to be drawn.
        folder: trial → its run folder.
    """

    def __init__(self, journal: Journal, asked: int, folder: Callable[[int], Path]) -> None:
        self.journal, self.asked, self.folder = journal, asked, folder
        self._bar = progress(1, "epochs", initial=journal.epochs(), unit="epoch")
        self._rungs = [
            progress(1, f"rung of {end}", initial=len(scores), unit="trial", line=line)
            for line, (end, scores) in enumerate(zip(journal.ends, journal.scores_and_begun()[0], strict=True), start=1)
        ]
        self._looked, self._seen = 0.0, dict[int, int]()

    def __exit__(self, *error: object) -> None:
        for bar in (*self._rungs[::-1], self._bar):
            bar.close()

    def show(self, flying: Set[int]) -> None:
        """Bring the bars up to date; ``flying`` are the trials in training."""
        if time.monotonic() - self._looked > LOOK_SECONDS:
            self._looked, self._seen = time.monotonic(), {trial: len(validations(self.folder(trial))) for trial in flying}
        live = sum(max(0, self._seen.get(trial, 0) - len(self.journal.trials[trial].curve)) for trial in flying)
        scores, begun = self.journal.scores_and_begun()
        reached = [len(of_rung) for of_rung in scores]
        expected = forecast(reached, [len(trials) for trials in begun], self.asked, self.journal.factor)
        ends = self.journal.ends
        steps = [end - before for end, before in zip(ends, [0, *ends[:-1]], strict=True)]
        total = sum(count * step for count, step in zip(expected, steps, strict=True))
        total += sum(trial.again for trial in self.journal.trials)
        total -= sum(ends[trial.begun] - len(trial.curve) for trial in self.journal.trials if trial.reason)
        _move(self._bar, self.journal.epochs() + live, total)
        for bar, count, expected_count in zip(self._rungs, reached, expected, strict=True):
            _move(bar, count, expected_count)
        best = self.journal.best()
        if best is not None:
            text = f"{'·'.join(map(str, reached))} at the rungs, best {best.score:.4g} of trial {best.number}"
            self._bar.set_postfix_str(text, refresh=False)


def forecast(reached: Sequence[int], begun: Sequence[int], asked: int, factor: int) -> list[int]:
    """How many trials will have begun each rung in the end, if those to come are as good as those that came.

    Args:
        reached: trials that are at the end of each rung.
        begun: trials that were given work in it.
        asked: trials to be drawn.
    """
    counts = [float(max(asked, begun[0]))]
    for ended, promoted in zip(reached, begun[1:], strict=False):
        more = _promoted(counts[-1], factor) - _promoted(ended, factor)
        counts.append(max(1.0, promoted + max(0.0, more)))  # 1: the end game sees to it
    return [round(count) for count in counts]


def _promoted(count: float, factor: int) -> float:
    """Trials that a rung has promoted once it holds ``count`` in random order: one in ``factor``, and those that were among
    the best for a while only, about √count / 2 (500 and fewer, counted for factors of 2 to 4)."""
    return max(0.0, count / factor + math.sqrt(count) / 2 - 1)


def _move(bar: Any, done: int, total: int) -> None:
    bar.total = max(total, done)
    bar.update(max(0, done - bar.n))


class Follower:
    """Keeps MLflow up to date with ``search``: a run for it, and a child for each trial and each of the winner's seeds.

    The process that hands out the work does so from the run folders; workers need no store. Without MLflow this does nothing.
    """

    def __init__(self, search: SearchSession) -> None:
        self.search = search
        tracking = search.config.tracking
        store = tracking.mlflow_uri or f"sqlite:///{search.config.output.resolve().parent / 'mlflow.db'}"
        self._tracking = dataclasses.replace(tracking, mlflow_uri=store)
        self._parent = ""
        self._away_until = self._next = 0.0

    def trial(self, number: int, over: bool = False) -> None:
        """Trial ``number`` has ended a job; ``over``: and gets no other."""
        trial = self.search.journal.trials[number]
        over = over or len(trial.scores) == len(self.search.journal.ends)
        ended: Status = "FAILED" if trial.reason else "FINISHED" if over else "SCHEDULED"
        parent = self._parent if time.monotonic() < self._next else self.parent()
        self._send(self.search.folder(number), f"trial {number}", trial.settings, {"rung": len(trial.scores)}, ended, parent)

    def parent(self, status: Status = "RUNNING") -> str:
        """The run of the search, brought up to date."""
        self._next = time.monotonic() + SEND_SECONDS
        search, best = self.search, self.search.journal.best()
        values = {"epochs": float(search.journal.epochs()), "trials": float(len(search.journal.trials))}
        values |= {f"best/{search.base.loop.watched.name}": best.score} if best else {}
        lasting = {key: value for key, value in to_dict(search.config).items() if key not in RESUMED}
        params = flatten(lasting) | {"recipe": search.recipe, "set": " ".join(search.config.set)}
        self._parent = self._send(search.home, f"search {search.recipe}", params, values, status, "") or self._parent
        return self._parent

    def end(self, status: Status) -> None:
        """The search has ended; trials that nobody promoted have too, and what was not sent in time is sent now."""
        self._away_until = 0.0
        parent = self.parent(status)
        if status != "FINISHED":
            return
        self._next = math.inf  # the parent stays ended
        for trial in self.search.journal.trials:
            self.trial(trial.number, over=True)
        for file in sorted(SearchFolder(self.search.home).winner.glob(f"*/{RunFolder.result.name}")):
            with contextlib.suppress(UserError):  # damaged: the run's own page tells
                result = read_result(file)
                name = f"{self.search.base.row}, seed {result['seed']}"
                self._send(file.parent, name, {"seed": result["seed"]}, summary(result), "FINISHED", parent)

    def _send(
        self, folder: Path, name: str, params: Mapping[str, Any], values: Mapping[str, float], status: Status, parent: str
    ) -> str:
        if time.monotonic() < self._away_until or not folder.is_dir():
            return ""
        sent = log_results(folder, self._tracking, name, params, values, status, parent)
        if not sent:
            self._away_until = time.monotonic() + RETRY_SECONDS
        return sent
