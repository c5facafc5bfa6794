"""Reading search.json, the record of a search over settings: finished, running or damaged."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from crossalign.core.errors import UserError
from crossalign.runs.promotion import end_game, promotable

STATES = ("complete", "paused", "training", "failed")
RATES = ("lr", "learning_rate")
"""How the last part of a learning rate's key is called."""
AS_WRITTEN: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("title", "row", "score", "unit"), str),
    **dict.fromkeys(("epochs", "epochs_in_full", "seconds"), float),
    **{"larger_is_better": bool, "factor": int},
}
"""What search.json and a search call alike."""


@dataclass(frozen=True)
class Field:
    """A setting that was searched over: a range, or a list of choices."""

    name: str
    low: float
    high: float
    log: bool
    choices: tuple[Any, ...]
    """Empty for a range."""
    when: str
    """The condition under which a trial has this setting at all; empty where every trial has it."""


@dataclass(frozen=True)
class Rung:
    """One trial at the end of a rung; ``score`` is NaN where it was no number."""

    epochs: float
    score: float
    seconds: float


@dataclass(frozen=True)
class Trial:
    """One configuration, with the rungs whose end it reached and its validation number after each unit of training."""

    number: int
    settings: dict[str, Any]
    state: str
    reason: str
    rungs: tuple[Rung, ...]
    curve: tuple[float, ...]

    @property
    def score(self) -> float:
        """At the highest rung reached; NaN where none was."""
        return self.rungs[-1].score if self.rungs else math.nan


@dataclass(frozen=True)
class Search:
    """One search. Rungs are counted from 0 here, and from 1 where a reader meets them."""

    folder: Path
    title: str
    row: str
    score: str
    larger_is_better: bool
    unit: str
    rungs: tuple[float, ...]
    factor: int
    asked: int
    space: tuple[Field, ...]
    trials: tuple[Trial, ...]
    winner: Trial | None
    scored: tuple[int, ...]
    """Trials that were a winner and were trained again to be scored on test data; the last one's runs are in ``winner/``."""
    epochs: float
    epochs_in_full: float
    alignment_epochs: float
    """Before training, in all trials: no rung counts them."""
    seconds: float

    def worth(self, score: float) -> float:
        """A score as a number of which more is better; -inf where it is none."""
        return -math.inf if math.isnan(score) else score if self.larger_is_better else -score

    def reached(self, rung: int) -> list[Trial]:
        """Trials that were trained to the end of a rung."""
        return [trial for trial in self.trials if len(trial.rungs) > rung]

    def stopped_in(self, rung: int, state: str) -> list[Trial]:
        """Trials that failed, or are being trained, on their way to the end of a rung."""
        last = len(self.rungs) - 1
        return [trial for trial in self.trials if trial.state == state and min(len(trial.rungs), last) == rung]

    def begun(self, rung: int) -> list[Trial]:
        """Trials that were ever given work in a rung."""
        on_the_way = [*self.stopped_in(rung, "failed"), *self.stopped_in(rung, "training")]
        return [trial for trial in self.trials if len(trial.rungs) > rung or trial in on_the_way]

    def scores(self, rung: int) -> list[tuple[Trial, float]]:
        """Trials with their score at the end of a rung, those that have one."""
        return [(t, t.rungs[rung].score) for t in self.reached(rung) if not math.isnan(t.rungs[rung].score)]

    @property
    def failed(self) -> list[Trial]:
        return [trial for trial in self.trials if trial.state == "failed"]

    @property
    def saved(self) -> float:
        """The share of training that was not spent; NaN where no trial is stopped early."""
        return 1 - self.epochs / self.epochs_in_full if self.epochs_in_full and len(self.rungs) > 1 else math.nan

    @cached_property
    def ranked(self) -> list[Trial]:
        """Trials by highest rung reached, then by their score there, then as they were drawn."""
        return sorted(self.trials, key=lambda t: (-len(t.rungs), -self.worth(t.score), t.number))

    @cached_property
    def over(self) -> bool:
        """Whether none is in training and the rule of promotion has nothing left to do.

        A search that is stopped leaves some in training: one with a winner that leaves none, and drew fewer than it was asked
        for, found no more in its space.
        """
        drawn = len(self.trials) >= self.asked or self.winner is not None
        if not drawn or any(trial.state == "training" for trial in self.trials):
            return False
        begun = [{trial.number for trial in self.begun(rung)} for rung in range(len(self.rungs))]
        scores = [{t.number: self.worth(t.rungs[rung].score) for t in self.reached(rung)} for rung in range(len(self.rungs))]
        for rung, known in enumerate(scores):
            known |= {trial.number: -math.inf for trial in self.stopped_in(rung, "failed")}
        return promotable(scores, begun, self.factor) is None and end_game(scores, begun) is None

    @property
    def rate(self) -> str:
        """The searched field that is the learning rate; empty where it was not searched."""
        rates = [field.name for field in self.space if field.name.rsplit(".", 1)[-1] in RATES]
        return "optim.lr" if "optim.lr" in rates else rates[0] if rates else ""

    @property
    def overtaken(self) -> bool:
        """Whether the runs in ``winner/`` are those of an earlier winner, as of a longer search that isn't over."""
        return self.winner is not None and bool(self.scored) and self.scored[-1] != self.winner.number

    def trained(self, run: Path) -> bool:
        """Whether the run in that folder is one of the winner's."""
        return (self.folder / "winner").resolve() in run.resolve().parents


def read_search(path: Path) -> Search:
    """One search.json.

    Raises:
        UserError: a file that is damaged, or that is no record of a search.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); restore it, or run the search again") from error
    try:
        return _search(path.parent, record)
    except KeyError as error:
        raise UserError(f"{path} has no {error}; it isn't the record of a search, restore or delete it") from error
    except (AttributeError, OverflowError, TypeError, ValueError) as error:
        raise UserError(f"{path} isn't the record of a search ({error}); restore or delete it") from error


def _search(folder: Path, record: dict[str, Any]) -> Search:
    if not isinstance(record, dict):
        raise TypeError(f"it holds a {type(record).__name__}")
    rungs = tuple(float(end) for end in record["rungs"])
    if not rungs or list(rungs) != sorted(set(rungs)) or rungs[0] <= 0:
        raise ValueError(f"rungs that do not rise: {record['rungs']}")
    if int(record["factor"]) < 2:
        raise ValueError(f"factor {record['factor']}")
    trials = {trial.number: trial for trial in (_trial(entry, len(rungs)) for entry in record["trials"])}
    if len(trials) < len(record["trials"]):
        raise ValueError("two trials of one number")
    winner = record["winner"]
    if winner is not None and not (winner in trials and trials[winner].rungs):
        raise ValueError(f"winner {winner} is none of its trials with a score")
    return Search(
        folder=folder,
        rungs=rungs,
        asked=int(record["trials_asked"]),
        space=tuple(_field(str(name), entry) for name, entry in record["space"].items()),
        trials=tuple(trials.values()),
        winner=None if winner is None else trials[winner],
        scored=tuple(int(number) for number in record.get("scored", ())),
        alignment_epochs=float(record.get("alignment_epochs", 0)),
        **{name: kind(record[name]) for name, kind in AS_WRITTEN.items()},
    )


def _field(name: str, entry: dict[str, Any]) -> Field:
    choices = tuple(entry["choices"]) if "choices" in entry else ()
    low, high = (math.nan, math.nan) if "choices" in entry else (float(entry["low"]), float(entry["high"]))
    log = bool(entry.get("log", False))
    if low > high or (log and low <= 0):
        raise ValueError(f"the range of {name}, {low:g} to {high:g}")
    return Field(name, low, high, log, choices, str(entry.get("when") or ""))


def _trial(entry: dict[str, Any], rungs: int) -> Trial:
    number, state = int(entry["number"]), str(entry["state"])
    if state not in STATES:
        raise ValueError(f"trial {number} is {state!r}, which is none of {', '.join(STATES)}")
    reached = tuple(Rung(float(r["epochs"]), _number(r["score"]), float(r["seconds"])) for r in entry["rungs"])
    if len(reached) > rungs:
        raise ValueError(f"trial {number} reached {len(reached)} rungs of {rungs}")
    curve = tuple(map(_number, entry["curve"]))
    return Trial(number, dict(entry["settings"]), state, str(entry.get("reason") or ""), reached, curve)


def _number(value: float | None) -> float:
    """A validation number; NaN for null and for what is not finite, as of a run that diverged."""
    return float(value) if value is not None and math.isfinite(value) else math.nan
