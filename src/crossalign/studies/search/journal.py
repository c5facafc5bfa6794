"""The durable record of a search: one Optuna study in a journal file, written by the process that hands out the work.

A trial that waits to be promoted is "running" to Optuna, since it is not finished: what it has reached is in its attributes.
The file is read by Optuna's own tools, such as optuna-dashboard.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crossalign.runs.promotion import Job, end_game, promotable

Draw = Callable[[int, int], tuple[dict[str, Any], dict[str, Any]]]
"""(number of a trial, attempt) → its settings, and Optuna's distribution of each."""
REDRAWS = 200  # of a configuration that was drawn before; then the space is taken to hold no others


@dataclass
class Trial:
    """One configuration and what came of it."""

    number: int
    settings: dict[str, Any]
    begun: int = -1
    """The highest rung that it was given a job in."""
    scores: list[float] = field(default_factory=list)
    """At the end of each rung that it reached; larger is better."""
    seconds: list[float] = field(default_factory=list)
    """Of training in each rung."""
    curve: list[float] = field(default_factory=list)
    """The validation number after each epoch, as it was measured."""
    deaths: int = 0
    """Workers that were killed while they trained it."""
    again: int = 0
    """Epochs that were trained a second time, where the checkpoint was gone."""
    reason: str = ""
    """Why it failed; empty if it did not."""

    @property
    def open(self) -> Job | None:
        """The job that has not ended, or not begun though the trial was drawn."""
        rung = max(0, self.begun)
        return Job(self.number, rung) if rung >= len(self.scores) and not self.reason else None


class Journal:
    """All trials of a search, in memory and in ``file``; the caller has made sure that no other process writes there.

    Args:
        file: the journal, made if need be.
        name: of Optuna's study.
        larger_is_better: what the curves hold.
        ends: resource at the end of each rung.
        factor: of each rung one in this many goes on.
    """

    def __init__(self, file: Path, name: str, larger_is_better: bool, ends: list[int], factor: int) -> None:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        _drop_torn_line(file)
        self.ends, self.factor, self._sign = ends, factor, 1 if larger_is_better else -1
        self._storage = JournalStorage(JournalFileBackend(str(file), lock_obj=_HeldByCaller()))
        self._study = optuna.create_study(
            storage=self._storage,
            study_name=name,
            direction="maximize" if larger_is_better else "minimize",
            load_if_exists=True,
        )
        self._id = self._storage.get_study_id_from_name(name)
        frozen = self._study.get_trials(deepcopy=False)
        self.trials = [_trial(one) for one in frozen]
        for trial, one in zip(self.trials, frozen, strict=True):
            if not one.state.is_finished():  # killed between a job's end and this
                self._close(trial)

    def next_job(self, asked: int, flying: Set[int], draw: Draw) -> Job | None:
        """What to train next: what an earlier call left open, a promotion, a new trial of the ``asked`` ones, the end game.

        Args:
            asked: trials to draw in all.
            flying: trials that are in training now.
            draw: gives a new trial its settings.
        """
        for trial in self.trials:
            if trial.open and trial.number not in flying:
                return trial.open
        scores, begun = self.rungs()
        job = promotable(scores, begun, self.factor)
        if job is None and len(self.trials) < asked and self._draw_new(draw):
            job = Job(len(self.trials) - 1, 0)
        if job is None and not flying:
            job = end_game(scores, begun)
        return job

    def rungs(self) -> tuple[list[dict[int, float]], list[set[int]]]:
        """For each rung: the scores of the trials that ended in it, -inf for one that failed there; and who began it."""
        scores: list[dict[int, float]] = [{} for _ in self.ends]
        begun: list[set[int]] = [set() for _ in self.ends]
        for trial in self.trials:
            for rung in range(trial.begun + 1):
                begun[rung].add(trial.number)
            for rung, score in enumerate(trial.scores):
                scores[rung][trial.number] = score
            if trial.reason:
                scores[trial.begun][trial.number] = -math.inf
        return scores, begun

    def begin(self, job: Job) -> None:
        """``job`` is handed out."""
        self._attribute(job.trial, begun=job.rung)
        self.trials[job.trial].begun = job.rung

    def end(self, job: Job, score: float, curve: list[float], seconds: float) -> None:
        """``job`` was done: ``curve`` holds one number an epoch from the first on."""
        trial = self.trials[job.trial]
        trial.scores.append(score)
        trial.seconds.append(seconds)
        self._extend(job.trial, curve)
        self._attribute(job.trial, seconds=trial.seconds)
        self._attribute(job.trial, scores=trial.scores)  # last: until then the job is open
        self._close(trial)

    def fail(self, job: Job, reason: str, curve: list[float]) -> None:
        """``job`` came to nothing after the epochs in ``curve``, and its trial goes no further."""
        self._extend(job.trial, curve)
        self.trials[job.trial].reason = reason
        self._attribute(job.trial, reason=reason)
        self._close(self.trials[job.trial])

    def trained_again(self, number: int, epochs: int) -> None:
        """The checkpoint of a trial is gone, so that it trains so many epochs a second time."""
        self.trials[number].again += epochs
        self._attribute(number, again=self.trials[number].again)

    @property
    def scored(self) -> list[int]:
        """Trials that were a winner and were trained again for the data that chose nothing, in that order."""
        return list(self._study.user_attrs.get("scored", []))

    def mark_scored(self, number: int) -> None:
        """A winner is now trained again."""
        if number not in self.scored:
            self._study.set_user_attr("scored", [*self.scored, number])

    def died(self, job: Job) -> int:
        """A worker was killed while it did ``job``; how often that happened to the trial by now."""
        trial = self.trials[job.trial]
        trial.deaths += 1
        self._attribute(job.trial, deaths=trial.deaths)
        return trial.deaths

    def winner(self) -> Trial | None:
        """The best trial at the last rung; None while nobody is there."""
        best = self.best()
        return best if best and len(best.scores) == len(self.ends) else None

    def best(self) -> Trial | None:
        """The best trial at the highest rung that anybody has reached."""
        reached = [trial for trial in self.trials if trial.scores and not trial.reason]
        return max(reached, key=lambda trial: (len(trial.scores), trial.scores[-1], -trial.number), default=None)

    def epochs(self) -> int:
        """Epochs that were trained, in all trials."""
        return sum(len(trial.curve) + trial.again for trial in self.trials)

    def _draw_new(self, draw: Draw) -> bool:
        """Add a trial of settings that no other has; False if the space seems to hold no more."""
        import optuna

        number = len(self.trials)
        known = [trial.settings for trial in self.trials]
        for attempt in range(REDRAWS):
            drawn, distributions = draw(number, attempt)
            if drawn in known:
                continue
            running = optuna.trial.TrialState.RUNNING
            self._study.add_trial(optuna.trial.create_trial(state=running, params=drawn, distributions=distributions))
            self.trials.append(Trial(number, drawn))
            return True
        return False

    def _extend(self, number: int, curve: list[float]) -> None:
        known = len(self.trials[number].curve)
        if len(curve) > known:  # a trial that failed may tell less than is known of it
            self.trials[number].curve = curve
        for epoch, value in enumerate(curve[known:], start=known + 1):
            self._storage.set_trial_intermediate_value(self._key(number), epoch, value)

    def _key(self, number: int) -> int:
        return int(self._storage.get_trial_id_from_study_id_trial_number(self._id, number))

    def _attribute(self, number: int, **values: Any) -> None:
        for name, value in values.items():
            self._storage.set_trial_user_attr(self._key(number), name, value)

    def _close(self, trial: Trial) -> None:
        """To Optuna, if it is over."""
        from optuna.trial import TrialState

        if trial.reason:
            self._storage.set_trial_state_values(self._key(trial.number), TrialState.FAIL, None)
        elif len(trial.scores) == len(self.ends):
            values = [self._sign * trial.scores[-1]]
            self._storage.set_trial_state_values(self._key(trial.number), TrialState.COMPLETE, values)


class _HeldByCaller:
    """Optuna's lock of the journal, which a killed process would leave behind: the search folder's own lock stands for it."""

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        pass


def _trial(frozen: Any) -> Trial:
    """A trial as the file has it."""
    told = copy.deepcopy(frozen.user_attrs)  # begun, scores, seconds, deaths, again, reason: as far as they have happened
    curve = [value for _, value in sorted(frozen.intermediate_values.items())]
    trial = Trial(frozen.number, dict(frozen.params), curve=curve, **told)
    del trial.seconds[len(trial.scores) :]  # of a job whose score did not get there
    return trial


def _drop_torn_line(file: Path) -> None:
    """Cut off a last line that a killed process did not finish: Optuna would read no further, for good."""
    if file.is_file() and (content := file.read_bytes()) and not content.endswith(b"\n"):
        os.truncate(file, content.rfind(b"\n") + 1)
