"""A search over settings: its trials, as the journal keeps them and search.json records them, and reading that file."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from crossalign.core.errors import UserError
from crossalign.core.reading import read_json
from crossalign.runs.metrics import plain
from crossalign.runs.names import SearchFolder
from crossalign.runs.promotion import Job, end_game, promotable

STATES = ("complete", "paused", "training", "failed")
RATES = ("lr", "learning_rate")
"""How the last part of a learning rate's key is called."""
AS_WRITTEN: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("title", "row", "score", "unit"), str),
    **dict.fromkeys(("epochs", "epochs_in_full", "seconds"), float),
    **{"larger_is_better": bool, "factor": int},
}
"""What search.json and a search call alike."""


@dataclass
class TrialRecord:
    """One configuration and what came of it. Rungs are counted from 0."""

    number: int
    settings: dict[str, Any]
    begun: int = -1
    """The highest rung that it was given a job in."""
    scores: list[float] = field(default_factory=list)
    """At the end of each rung that it reached, as measured; NaN where it was no number."""
    seconds: list[float] = field(default_factory=list)
    """Of training in each rung."""
    curve: list[float] = field(default_factory=list)
    """The validation number after each unit of training, as measured."""
    deaths: int = 0
    """Workers that were killed while they trained it."""
    again: int = 0
    """Epochs that were trained a second time, where the checkpoint was gone."""
    reason: str = ""
    """Why it failed; empty if it did not."""

    @property
    def score(self) -> float:
        """At the highest rung reached; NaN where none was."""
        return self.scores[-1] if self.scores else math.nan

    @property
    def open(self) -> Job | None:
        """The job that has not ended, or not begun though the trial was drawn."""
        rung = max(0, self.begun)
        return Job(self.number, rung) if rung >= len(self.scores) and not self.reason else None

    def state(self, rungs: int) -> str:
        """One of ``STATES``, in a search of so many rungs."""
        if self.reason:
            return "failed"
        return "training" if self.open else "complete" if len(self.scores) == rungs else "paused"

    def as_data(self, ends: Sequence[int]) -> dict[str, Any]:
        """As search.json has it; ``ends`` are those of the rungs."""
        rungs = [
            {"epochs": end, "score": score, "seconds": round(spent, 3)}
            for end, score, spent in zip(ends, self.scores, self.seconds, strict=False)
        ]
        return {
            "number": self.number, "settings": self.settings, "state": self.state(len(ends)), "reason": self.reason,
            "rungs": rungs, "curve": [plain(value) for value in self.curve],
        }  # fmt: skip

    @classmethod
    def of_data(cls, entry: dict[str, Any], rungs: int) -> Self:
        """A trial of search.json; raises KeyError, TypeError or ValueError where it is none."""
        number, state = int(entry["number"]), str(entry["state"])
        if state not in STATES:
            raise ValueError(f"trial {number} is {state!r}, which is none of {', '.join(STATES)}")
        scores = [_number(rung["score"]) for rung in entry["rungs"]]
        if len(scores) > rungs:
            raise ValueError(f"trial {number} reached {len(scores)} rungs of {rungs}")
        begun = min(len(scores), rungs - 1) if state in ("failed", "training") else len(scores) - 1
        reason = str(entry.get("reason") or "no reason recorded") if state == "failed" else ""
        seconds = [float(rung["seconds"]) for rung in entry["rungs"]]
        curve = [_number(value) for value in entry["curve"]]
        return cls(number, dict(entry["settings"]), begun, scores, seconds, curve, reason=reason)


@dataclass
class Ladder:
    """Trials on the rungs of a search."""

    ends: Sequence[int]
    """Epochs, or evaluations, at the end of each rung."""
    factor: int
    """Of each rung one in this many goes on."""
    larger_is_better: bool
    trials: list[TrialRecord]

    def worth(self, score: float) -> float:
        """A score as a number of which more is better; -inf where it is none."""
        return -math.inf if math.isnan(score) else score if self.larger_is_better else -score

    def reached(self, rung: int) -> list[TrialRecord]:
        """Trials that were trained to the end of a rung."""
        return [trial for trial in self.trials if len(trial.scores) > rung]

    def scores_and_begun(self) -> tuple[list[dict[int, float]], list[set[int]]]:
        """For each rung, by number: what the scores of the trials that ended in it are worth, -inf for one that failed
        there; and who began it."""
        rungs = range(len(self.ends))
        begun = [{trial.number for trial in self.trials if trial.begun >= rung} for rung in rungs]
        scores = [{trial.number: self.worth(trial.scores[rung]) for trial in self.reached(rung)} for rung in rungs]
        for trial in self.trials:
            if trial.reason:
                scores[trial.begun][trial.number] = -math.inf
        return scores, begun


@dataclass(frozen=True)
class SearchedField:
    """A setting that was searched over: a range, or a list of choices."""

    name: str
    low: float
    high: float
    log: bool
    choices: tuple[Any, ...]
    """Empty for a range."""
    when: str
    """The condition under which a trial has this setting at all; empty where every trial has it."""


@dataclass
class SearchRecord(Ladder):
    """One search as search.json has it. Rungs are counted from 0 here, and from 1 where a reader meets them."""

    folder: Path
    title: str
    row: str
    score: str
    unit: str
    asked: int
    space: tuple[SearchedField, ...]
    winner: TrialRecord | None
    scored: tuple[int, ...]
    """Trials that were a winner and were trained again to be scored on test data; the last one's runs are in ``winner/``."""
    epochs: float
    epochs_in_full: float
    alignment_epochs: float
    """Before training, in all trials: no rung counts them."""
    seconds: float

    def scores(self, rung: int) -> list[tuple[TrialRecord, float]]:
        """Trials with their score at the end of a rung, those that have one."""
        return [(trial, trial.scores[rung]) for trial in self.reached(rung) if not math.isnan(trial.scores[rung])]

    @property
    def failed(self) -> list[TrialRecord]:
        return [trial for trial in self.trials if trial.reason]

    @property
    def training(self) -> list[TrialRecord]:
        return [trial for trial in self.trials if trial.open]

    @property
    def saved(self) -> float:
        """The share of training that was not spent; NaN where no trial is stopped early."""
        return 1 - self.epochs / self.epochs_in_full if self.epochs_in_full and len(self.ends) > 1 else math.nan

    @property
    def ranked(self) -> list[TrialRecord]:
        """Trials with a score, by the highest rung reached, then by their score there, then as they were drawn."""
        return sorted(self.reached(0), key=lambda t: (-len(t.scores), -self.worth(t.score), t.number))

    @cached_property
    def over(self) -> bool:
        """Whether none is in training and the rule of promotion has nothing left to do.

        A search that is stopped leaves some in training: one with a winner that leaves none, and drew fewer than it was asked
        for, found no more in its space.
        """
        drawn = len(self.trials) >= self.asked or self.winner is not None
        if not drawn or self.training:
            return False
        scores, begun = self.scores_and_begun()
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
        return SearchFolder(self.folder).winner.resolve() in run.resolve().parents


def read_search(path: Path) -> SearchRecord:
    """One search.json.

    Raises:
        UserError: a file that is damaged, or that is no record of a search.
    """
    record = read_json(path, object, "restore it, or run the search again")
    try:
        return _search(path.parent, record)
    except KeyError as error:
        raise UserError(f"{path} has no {error}; it isn't the record of a search, restore or delete it") from error
    except (AttributeError, OverflowError, TypeError, ValueError) as error:
        raise UserError(f"{path} isn't the record of a search ({error}); restore or delete it") from error


def _search(folder: Path, record: dict[str, Any]) -> SearchRecord:
    if not isinstance(record, dict):
        raise TypeError(f"it holds a {type(record).__name__}")
    rungs = tuple(int(end) for end in record["rungs"])
    if not rungs or list(rungs) != sorted(set(rungs)) or rungs[0] <= 0:
        raise ValueError(f"rungs that do not rise: {record['rungs']}")
    if int(record["factor"]) < 2:
        raise ValueError(f"factor {record['factor']}")
    trials = {trial.number: trial for trial in (TrialRecord.of_data(entry, len(rungs)) for entry in record["trials"])}
    if len(trials) < len(record["trials"]):
        raise ValueError("two trials of one number")
    winner = record["winner"]
    if winner is not None and not (winner in trials and trials[winner].scores):
        raise ValueError(f"winner {winner} is none of its trials with a score")
    return SearchRecord(
        folder=folder,
        ends=rungs,
        asked=int(record["trials_asked"]),
        space=tuple(_field(str(name), entry) for name, entry in record["space"].items()),
        trials=list(trials.values()),
        winner=None if winner is None else trials[winner],
        scored=tuple(int(number) for number in record.get("scored", ())),
        alignment_epochs=float(record.get("alignment_epochs", 0)),
        **{name: kind(record[name]) for name, kind in AS_WRITTEN.items()},
    )


def _field(name: str, entry: dict[str, Any]) -> SearchedField:
    choices = tuple(entry["choices"]) if "choices" in entry else ()
    low, high = (math.nan, math.nan) if "choices" in entry else (float(entry["low"]), float(entry["high"]))
    log = bool(entry.get("log", False))
    if low > high or (log and low <= 0):
        raise ValueError(f"the range of {name}, {low:g} to {high:g}")
    return SearchedField(name, low, high, log, choices, str(entry.get("when") or ""))


def _number(value: float | None) -> float:
    """A validation number; NaN for null and for what is not finite, as of a run that diverged."""
    return float(value) if value is not None and math.isfinite(value) else math.nan
