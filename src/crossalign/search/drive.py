"""The loop of a search: whenever a worker is free, the promotion rule says what it trains next."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import FIRST_COMPLETED, CancelledError, Executor, Future, wait
from pathlib import Path
from typing import Any

from crossalign.config import SearchConfig, update
from crossalign.errors import UserError
from crossalign.search.board import Board
from crossalign.search.journal import Journal
from crossalign.search.promotion import Job
from crossalign.search.space import Space, nested
from crossalign.search.work import Config, Outcome, Work, pack, train, unpack
from crossalign.training.signals import catch_signals
from crossalign.training.stops import Interrupted

POLL_SECONDS = 1.0
SUSPECTS = 3  # trials that fail one after the other as if for something that is not theirs, before the base is tried again
DEATHS = 2  # workers that a trial may cost


@dataclasses.dataclass(frozen=True)
class Pool:
    """Who does the work: an executor, and how many jobs it can have in training now."""

    executor: Executor
    free: Callable[[], int]


@dataclasses.dataclass(frozen=True)
class Search:
    """One search: its base configuration, its space, its record and its folder."""

    config: SearchConfig
    recipe: str
    base: Config
    """Device, number format and compiling are resolved: they are the same for all trials."""
    space: Space
    journal: Journal
    home: Path
    token: str

    def draw(self, number: int, attempt: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """Settings of a trial, which hang on the seed, its number and the attempt alone, and their distributions."""
        import numpy as np

        seed = int(np.random.SeedSequence([self.config.seed, number, attempt]).generate_state(1)[0])
        drawn = self.space.draw(self.base, seed)
        return drawn, self.space.distributions(drawn)

    def folder(self, trial: int) -> Path:
        """The run folder of a trial."""
        return self.home / "trials" / f"{trial:04d}"

    def settled(self, trial: int) -> Config:
        """The configuration of a trial."""
        config = update(self.base, nested(self.journal.trials[trial].settings))
        return dataclasses.replace(config, output=self.folder(trial))

    def work(self, job: Job) -> Work:
        """``job`` for a worker."""
        done = len(self.journal.trials[job.trial].curve)
        until, threads = self.journal.ends[job.rung], self.config.threads
        return Work(self.settled(job.trial), self.recipe, until, self.home, self.token, done=done, threads=threads)


def outcomes(
    pool: Pool, more: Callable[[Collection[Work]], Work | None], look: Callable[[Collection[Work]], None]
) -> Iterator[tuple[Work, Outcome]]:
    """Hand out work while there is any, and give what comes of it as it comes.

    Args:
        more: the work in training → what to begin beside it, or None.
        look: called about once a second with the work in training, while no worker waits.

    Raises:
        Interrupted: a signal came, or a worker was told to stop or found the disk full.
    """
    flying: dict[Future[Outcome], Work] = {}
    with catch_signals() as stopped:
        while True:
            while len(flying) < pool.free() and (work := more(flying.values())) is not None:
                flying[pool.executor.submit(train, work)] = work
            if not flying:
                return
            look(flying.values())
            done, _ = wait(flying, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
            if stopped.is_set():
                raise Interrupted("stopped by a signal")
            for future in done:
                work, outcome = flying.pop(future), _outcome(future)
                if outcome.wants_files:
                    again = dataclasses.replace(work, files=pack(work.config.output))
                    flying[pool.executor.submit(train, again)] = work
                    continue
                if outcome.files is not None:
                    unpack(outcome.files, work.config.output)
                if outcome.stopped:
                    raise Interrupted(outcome.stopped)
                yield work, outcome


def _outcome(future: Future[Outcome]) -> Outcome:
    try:
        return future.result()
    except CancelledError as error:  # Dask cancels all jobs of whoever loses the scheduler, even for a moment
        raise Interrupted("the cluster's scheduler has gone away, and the jobs with it") from error
    except Exception as error:  # the worker came to an end, not the training
        told = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if type(error).__name__ == "KilledWorker":  # Dask has given the job to other workers already: no second death
            return Outcome(reason=f"every worker that trained it was killed, out of memory perhaps ({told})", bad_input=True)
        return Outcome(died=told)


def drive(search: Search, pool: Pool, follow: Callable[[int], None]) -> None:
    """Train until the rule has nothing more to do; ``follow`` is called with each trial that ended a job.

    Raises:
        Interrupted: see :func:`outcomes`.
        UserError: the base's settings cannot be trained any more, as where a disk or a device is gone. No trial has failed
            for it: the same command goes on.
    """
    journal, jobs, ended = search.journal, dict[Path, Job](), list[int]()
    base = base_work(search.base, search.recipe, search.home, search.token)
    suspects = dict[int, tuple[Job, str]]()  # their faults may be the machine's, so that nothing is written down yet
    trusted = not journal.trials  # a new search has just tried its base

    def in_training(flying: Collection[Work]) -> set[int]:
        return {jobs[work.config.output].trial for work in flying if work is not base}

    def more(flying: Collection[Work]) -> Work | None:
        if base in flying:
            return None
        job = None
        if len(suspects) < SUSPECTS:
            job = journal.next_job(search.config.trials, in_training(flying) | set(suspects), search.draw)
        if not trusted if job else suspects:
            return None if flying else base
        if job is None:
            return None
        journal.begin(job)
        work = search.work(job)
        jobs[work.config.output] = job
        return work

    def convict() -> None:
        """The machine can train: what failed was the trials' own fault."""
        for job, reason in suspects.values():
            _fail(search, job, reason, [])
            ended.append(job.trial)
        suspects.clear()

    with Board(journal, search.config.trials, search.folder) as board:

        def look(flying: Collection[Work]) -> None:
            board.show(in_training(flying))
            while ended:
                follow(ended.pop())

        for work, outcome in outcomes(pool, more, look):
            if work is base:
                check_base(work, outcome)
                trusted = True
                convict()
                continue
            job = jobs[work.config.output]
            if outcome.died:  # the job stays open, so that the rule gives it out again
                deaths = journal.died(job)
                if deaths >= DEATHS:
                    told = f"its worker was killed {deaths} times, out of memory perhaps ({outcome.died})"
                    suspects[job.trial] = job, told
                continue
            if outcome.bad_input:
                suspects[job.trial] = job, outcome.reason
                continue
            if outcome.reason:
                _fail(search, job, outcome.reason, outcome.curve)
            else:
                journal.end(job, outcome.score, outcome.curve, outcome.seconds)
                convict()
                if job.rung == len(journal.ends) - 1:
                    _drop_checkpoints(search, job.trial)
            ended.append(job.trial)
        look([])


def base_work(base: Config, recipe: str, home: Path, token: str) -> Work:
    """A run of the base's settings that trains nothing: it fails by whatever no trial's settings can mend."""
    return Work(dataclasses.replace(base, output=home / "trials" / "base"), recipe, 0, home, token)


def check_base(work: Work, outcome: Outcome) -> None:
    """Raise what is wrong with the base's settings, if anything is, after its run; else delete that run."""
    if outcome.reason or outcome.died:
        trace = work.config.output.with_suffix(".error.txt")
        told = f"; see {trace}" if trace.is_file() and not outcome.bad_input else ""
        raise UserError((outcome.reason or f"the worker came to an end: {outcome.died}") + told)
    shutil.rmtree(work.config.output)


def _fail(search: Search, job: Job, reason: str, curve: list[float]) -> None:
    search.journal.fail(job, reason, curve)
    _drop_checkpoints(search, job.trial)


def _drop_checkpoints(search: Search, trial: int) -> None:
    """Of a trial that goes no further."""
    if not search.config.keep_checkpoints:
        shutil.rmtree(search.folder(trial) / "checkpoints", ignore_errors=True)
