"""search.json: all that a report of a search needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from crossalign.config import AdaptConfig
from crossalign.core.files import write_json
from crossalign.runs.metrics import plain
from crossalign.runs.names import SearchFolder
from crossalign.studies.search.drive import SearchSession
from crossalign.studies.search.jobs import watched
from crossalign.studies.search.journal import Trial


def write_record(search: SearchSession, title: str, seconds: float) -> dict[str, Any]:
    """Write search.json and return what it holds; ``seconds`` is the wall clock of all calls."""
    journal, config = search.journal, search.config
    name, larger = watched(search.base)
    sign = 1 if larger else -1
    winner = journal.winner()

    def told(trial: Trial) -> dict[str, Any]:
        last = len(trial.scores) == len(journal.ends)
        state = "failed" if trial.reason else "complete" if last else "training" if trial.open else "paused"
        rungs = [
            {"epochs": end, "score": sign * score, "seconds": round(spent, 3)}
            for end, score, spent in zip(journal.ends, trial.scores, trial.seconds, strict=False)
        ]
        return {
            "number": trial.number, "settings": trial.settings, "state": state, "reason": trial.reason,
            "rungs": rungs, "curve": [plain(value) for value in trial.curve],
        }  # fmt: skip

    record = {
        "title": title,
        "recipe": search.recipe,
        "row": search.base.row,
        "verb": type(search.base).__name__.removesuffix("Config").lower(),
        "score": f"validation {name}",
        "larger_is_better": larger,
        "unit": "epoch" if larger else "evaluation",
        "rungs": journal.ends,
        "factor": config.factor,
        "trials_asked": config.trials,
        "seed": config.seed,
        "workers": config.workers,
        "threads": config.threads,
        "space": search.space.as_data(),
        "trials": [told(trial) for trial in journal.trials],
        "winner": None if winner is None else winner.number,
        "scored": journal.scored,
        "epochs": journal.epochs(),
        "epochs_in_full": len(journal.trials) * journal.ends[-1],
        "alignment_epochs": _alignment_epochs(search),
        "seconds": round(seconds, 1),
    }
    write_json(SearchFolder(search.home).record, record)
    return record


def _alignment_epochs(search: SearchSession) -> int:
    """Epochs of the stage before training, in all trials: no rung counts them, as in CMDA §3.1.4."""
    settled = [search.settled(trial.number) for trial in search.journal.trials if trial.curve]
    return sum(c.align.epochs for c in settled if isinstance(c, AdaptConfig) and c.align.metric != "none")


def seconds_so_far(home: Path) -> float:
    """Wall clock of earlier calls."""
    file = SearchFolder(home).record
    return float(json.loads(file.read_text(encoding="utf-8"))["seconds"]) if file.is_file() else 0.0
