"""The loop of a search: whenever a worker is free, the promotion rule says what it trains next."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
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
SAME_FAULT = 3  # trials that fail by the same sentence about the settings, before any that does not
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
        return Work(self.settled(job.trial), self.recipe, self.journal.ends[job.rung], self.home, self.token, done=done)


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
    except Exception as error:  # the worker came to an end, not the training
        return Outcome(died=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")


def drive(search: Search, pool: Pool, follow: Callable[[int], None]) -> None:
    """Train until the rule has nothing more to do; ``follow`` is called with each trial that ended a job.

    Raises:
        Interrupted: see :func:`outcomes`.
        UserError: the first trials all fail by the same sentence about the settings.
    """
    journal, jobs, ended = search.journal, dict[Path, Job](), list[int]()

    def more(flying: Collection[Work]) -> Work | None:
        busy = {jobs[work.config.output].trial for work in flying}
        job = journal.next_job(search.config.trials, busy, search.draw)
        if job is None:
            return None
        journal.begin(job)
        work = search.work(job)
        jobs[work.config.output] = job
        return work

    with Board(journal, search.config.trials, search.folder) as board:

        def look(flying: Collection[Work]) -> None:
            board.show({jobs[work.config.output].trial for work in flying})
            while ended:
                follow(ended.pop())

        for work, outcome in outcomes(pool, more, look):
            job = jobs[work.config.output]
            if outcome.died:  # the job stays open, so that the rule gives it out again
                deaths = journal.died(job)
                if deaths >= DEATHS:
                    journal.fail(job, f"its worker was killed {deaths} times, out of memory perhaps ({outcome.died})", [])
            elif outcome.reason:
                journal.fail(job, outcome.reason, outcome.curve)
                _give_up_on(journal, outcome)
            else:
                journal.end(job, outcome.score, outcome.curve, outcome.seconds)
            ended.append(job.trial)
        look([])


def _give_up_on(journal: Journal, outcome: Outcome) -> None:
    """Stop where no settings drawn can help."""
    failed = [trial.reason for trial in journal.trials if trial.reason]
    if outcome.bad_input and not any(trial.scores for trial in journal.trials) and failed.count(outcome.reason) >= SAME_FAULT:
        raise UserError(f"{len(failed)} trials failed and none did not: {outcome.reason}")
