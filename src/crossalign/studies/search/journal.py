"""The durable record of a search: one Optuna study in a journal file, written by the process that hands out the work.

A trial that waits to be promoted is "running" to Optuna, since it is not finished: what it has reached is in its attributes.
The file is read by Optuna's own tools, such as optuna-dashboard.
"""

import os
from collections.abc import Callable, Set
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from crossalign.core.errors import UserError, first_line
from crossalign.core.reading import parse_json, read_bytes
from crossalign.runs.promotion import Job, end_game, promotable
from crossalign.runs.search import Ladder, TrialRecord

Draw = Callable[[int, int], tuple[dict[str, Any], dict[str, Any]]]
"""(number of a trial, attempt) → its settings, and Optuna's distribution of each."""
REDRAWS = 200  # of a configuration that was drawn before; then the space is taken to hold no others


class Journal(Ladder):
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

        super().__init__(ends, factor, larger_is_better, [])
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        # A last line that a killed process did not finish: Optuna would read no further, for good.
        if file.exists() and (content := read_bytes(file)) and not content.endswith(b"\n"):
            os.truncate(file, content.rfind(b"\n") + 1)
        for number, line in enumerate(read_bytes(file).splitlines() if file.exists() else (), start=1):
            parse_json(line, f"'{file}' line {number}", "restore the file, or search into another --output", dict)
        # Optuna's own lock is left behind by a killed process: that of the search's folder stands for it.
        lock: Any = SimpleNamespace(acquire=lambda: True, release=lambda: None)
        direction = "maximize" if larger_is_better else "minimize"
        try:
            self._storage = JournalStorage(JournalFileBackend(str(file), lock_obj=lock))
            self._study = optuna.create_study(storage=self._storage, study_name=name, direction=direction, load_if_exists=True)
            self._id = self._storage.get_study_id_from_name(name)
            self._read_trials()
        except OSError:  # of the disk
            raise
        except Exception as error:  # Optuna replays the lines as they come
            raise UserError(
                f"'{file}' is damaged ({first_line(error)}): restore it, or search into another --output"
            ) from error

    def _read_trials(self) -> None:
        for frozen in self._study.get_trials():
            curve = [value for _, value in sorted(frozen.intermediate_values.items())]
            trial = TrialRecord(frozen.number, dict(frozen.params), curve=curve, **frozen.user_attrs)
            trial.scores = [self.worth(score) for score in trial.scores]  # turned round when written, and here back
            del trial.seconds[len(trial.scores) :]  # of a job whose score did not get there
            self.trials.append(trial)
            if not frozen.state.is_finished():  # killed between a job's end and this
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
        scores, begun = self.scores_and_begun()
        job = promotable(scores, begun, self.factor)
        if job is None and len(self.trials) < asked and self._draw_new(draw):
            job = self.trials[-1].open
        if job is None and not flying:
            job = end_game(scores, begun)
        return job

    def begin(self, job: Job) -> None:
        """``job`` is handed out."""
        self._set(job.trial, begun=job.rung)

    def end(self, job: Job, score: float, curve: list[float], seconds: float) -> None:
        """``job`` was done: ``curve`` holds one number an epoch from the first on."""
        trial = self.trials[job.trial]
        self._extend(job.trial, curve)
        # The score last: until then the job is open.
        self._set(job.trial, seconds=[*trial.seconds, seconds], scores=[*trial.scores, score])
        self._close(trial)

    def fail(self, job: Job, reason: str, curve: list[float]) -> None:
        """``job`` came to nothing after the epochs in ``curve``, and its trial goes no further."""
        self._extend(job.trial, curve)
        self._set(job.trial, reason=reason)
        self._close(self.trials[job.trial])

    def trained_again(self, number: int, epochs: int) -> None:
        """The checkpoint of a trial is gone, so that it trains so many epochs a second time."""
        self._set(number, again=self.trials[number].again + epochs)

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
        self._set(job.trial, deaths=self.trials[job.trial].deaths + 1)
        return self.trials[job.trial].deaths

    def winner(self) -> TrialRecord | None:
        """The best trial at the last rung; None while nobody is there."""
        best = self.best()
        return best if best and len(best.scores) == len(self.ends) else None

    def best(self) -> TrialRecord | None:
        """The best trial at the highest rung that anybody has reached."""
        reached = [trial for trial in self.reached(0) if not trial.reason]
        return max(reached, key=lambda trial: (len(trial.scores), self.worth(trial.score), -trial.number), default=None)

    def epochs(self) -> int:
        """Epochs that were trained, in all trials."""
        return sum(len(trial.curve) + trial.again for trial in self.trials)

    def _draw_new(self, draw: Draw) -> bool:
        """Add a trial of settings that no other has; False if the space seems to hold no more."""
        import optuna

        number = len(self.trials)
        known = [trial.settings for trial in self.trials]
        for attempt in range(REDRAWS):
            settings, distributions = draw(number, attempt)
            if settings in known:
                continue
            running = optuna.trial.TrialState.RUNNING
            self._study.add_trial(optuna.trial.create_trial(state=running, params=settings, distributions=distributions))
            self.trials.append(TrialRecord(number, settings))
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

    def _set(self, number: int, **values: Any) -> None:
        """What a trial is from now on, in this order; the file has scores of which more is better."""
        for name, value in values.items():
            setattr(self.trials[number], name, value)
            written = [self.worth(score) for score in value] if name == "scores" else value
            self._storage.set_trial_user_attr(self._key(number), name, written)

    def _close(self, trial: TrialRecord) -> None:
        """To Optuna, if it is over."""
        from optuna.trial import TrialState

        if trial.reason:
            self._study.tell(trial.number, state=TrialState.FAIL)
        elif len(trial.scores) == len(self.ends):
            self._study.tell(trial.number, trial.score)
