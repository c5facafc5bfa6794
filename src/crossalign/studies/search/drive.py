"""The loop of a search: whenever a worker is free, the promotion rule says what it trains next."""

import dataclasses
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import CancelledError, Future
from contextlib import closing
from pathlib import Path

from crossalign.core.errors import UserError
from crossalign.core.files import remove
from crossalign.recipes.space import Config
from crossalign.runs.names import RunFolder, SearchFolder
from crossalign.runs.promotion import Job
from crossalign.studies.search.follow import Board
from crossalign.studies.search.jobs import JobResult, Work, pack, train, unpack
from crossalign.studies.search.session import SearchSession
from crossalign.studies.workers import WorkerPool, hand_out
from crossalign.training.stops import Interrupted

SUSPECTS = 3  # trials that fail one after the other as if for something that is not theirs, before the base is tried again
DEATHS = 2  # workers that a trial may cost


def results_of(
    pool: WorkerPool,
    more: Callable[[Collection[Work]], Work | None],
    look: Callable[[Collection[Work]], None] = lambda flying: None,
) -> Iterator[tuple[Work, JobResult]]:
    """Hand out work while there is any, and give what comes of it as it comes; see :func:`crossalign.studies.workers.hand_out`.

    Raises:
        Interrupted: a signal came, a worker found the disk full, or the cluster is gone.
    """
    again: list[Work] = []
    with closing(hand_out(pool, train, lambda flying: again.pop() if again else more(flying), look)) as done:
        for work, future in done:
            result = _result(future)
            if result.wants_files:
                again.append(dataclasses.replace(work, files=pack(work.config.output)))
                continue
            if result.files is not None:
                unpack(result.files, work.config.output)
            if result.stopped:
                raise Interrupted(result.stopped)
            yield work, result


def _result(future: Future[JobResult]) -> JobResult:
    try:
        return future.result()
    except CancelledError as error:  # Dask cancels all jobs of whoever loses the scheduler, even for a moment
        raise Interrupted("the cluster's scheduler has gone away, and the jobs with it") from error
    except Exception as error:  # the worker came to an end, not the training
        cause = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if type(error).__name__ == "KilledWorker":  # Dask has given the job to other workers already: no second death
            return JobResult(reason=f"every worker that trained it was killed, out of memory perhaps ({cause})", bad_input=True)
        return JobResult(died=cause)


def drive(search: SearchSession, pool: WorkerPool, follow: Callable[[list[int]], None]) -> None:
    """Train until the rule has nothing more to do; ``follow`` is called about once a second, with trials that ended a job.

    Raises:
        Interrupted: see :func:`results_of`.
        UserError: the base's settings cannot be trained any more, as where a disk or a device is gone. No trial has failed
            for it: the same command goes on.
    """
    state = _Drive(search)
    with Board(search.journal, search.config.trials, search.folder) as board:

        def look(flying: Collection[Work]) -> None:
            board.show(state.in_training(flying))
            ended, state.ended = state.ended, []
            follow(ended)

        for work, result in results_of(pool, state.more, look):
            state.take(work, result)
        look([])


class _Drive:
    """What is in training, and what is to be said of trials whose fault may be the machine's.

    Those stay open while they are suspects. When there are some, and nothing else to do or three of them, the base is tried:
    if it fails too, the search stops; else, or when any trial succeeds, the fault was theirs.
    """

    def __init__(self, search: SearchSession) -> None:
        self.search, self.journal = search, search.journal
        self.base = base_work(search.base, search.recipe, search.home, search.token)
        self.trusted = not search.journal.trials  # a new search has just tried its base
        self.suspects: dict[int, tuple[Job, str]] = {}
        self.ended: list[int] = []
        """Trials that ended a job since somebody looked."""

    def in_training(self, flying: Collection[Work]) -> set[int]:
        """Numbers of trials."""
        return {work.job.trial for work in flying if work.job}

    def more(self, flying: Collection[Work]) -> Work | None:
        """What to begin beside ``flying``."""
        if any(work.job is None for work in flying):  # the base
            return None
        job = None
        if len(self.suspects) < SUSPECTS:
            busy = self.in_training(flying) | set(self.suspects)
            job = self.journal.next_job(self.search.config.trials, busy, self.search.draw)
        if not self.trusted if job else self.suspects:
            return None if flying else self.base
        if job is None:
            return None
        self.journal.begin(job)
        work = self.search.work(self.search.settled(job.trial), job)
        if work.done and not any(RunFolder(work.config.output).checkpoints.glob("*")):
            self.journal.trained_again(job.trial, work.done)
        return work

    def take(self, work: Work, result: JobResult) -> None:
        """What came of ``work``."""
        job = work.job
        if job is None:
            check_base(work, result)
            self.trusted = True
            self._convict()
        elif result.died:  # the job stays open, so that the rule gives it out again
            deaths = self.journal.died(job)
            if deaths >= DEATHS:
                reason = f"its worker was killed {deaths} times, out of memory perhaps ({result.died})"
                self.suspects[job.trial] = job, reason
        elif result.bad_input:
            self.suspects[job.trial] = job, result.reason
        elif result.reason:
            self._fail(job, result.reason, result.curve)
        else:
            self.journal.end(job, result.score, result.curve, result.seconds)
            self._convict()
            if job.rung == len(self.journal.ends) - 1:
                self._drop_checkpoints(job.trial)
            self.ended.append(job.trial)

    def _convict(self) -> None:
        for job, reason in self.suspects.values():
            self._fail(job, reason, [])
        self.suspects.clear()

    def _fail(self, job: Job, reason: str, curve: list[float]) -> None:
        self.journal.fail(job, reason, curve)
        self._drop_checkpoints(job.trial)
        self.ended.append(job.trial)

    def _drop_checkpoints(self, trial: int) -> None:
        """Of a trial that goes no further."""
        if not self.search.config.keep_checkpoints:
            remove(RunFolder(self.search.folder(trial)).checkpoints)


def base_work(base: Config, recipe: str, home: Path, token: str) -> Work:
    """A run of the base's settings that trains nothing: it fails by whatever no trial's settings can mend."""
    return Work(dataclasses.replace(base, output=SearchFolder(home).trials / "base"), recipe, 0, home, token)


def check_base(work: Work, result: JobResult) -> None:
    """Raise what is wrong with the base's settings, if anything is, after its run; else delete that run."""
    if result.reason or result.died:
        trace = work.config.output.with_suffix(".error.txt")
        hint = f"; see {trace}" if trace.is_file() and not result.bad_input else ""
        raise UserError((result.reason or f"the worker came to an end: {result.died}") + hint)
    remove(work.config.output)
