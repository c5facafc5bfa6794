"""A search in MLflow: a run for the search, and a child for each trial and each of the winner's seeds.

The process that hands out the work brings them up to date from the run folders; workers need no store.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from crossalign.config import flatten, to_dict
from crossalign.runs.folder import read_json
from crossalign.runs.names import RunFolder, SearchFolder
from crossalign.studies.search.session import RESUMED, SearchSession
from crossalign.training.tracking import RETRY_SECONDS, SEND_SECONDS, Status, log_results, summary


class Follower:
    """Keeps MLflow up to date with ``search``; where there is no MLflow, does nothing."""

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
            result = read_json(file)
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
