"""What a worker does: train one trial's run folder to the end of a rung, and tell what came of it.

A worker that sees the search's folder trains there. One that does not, on a host of a cluster that shares no disk, keeps a copy
of the trial's folder of its own; checkpoints then travel with the jobs and their outcomes.
"""

import contextlib
import dataclasses
import gc
import io
import math
import os
import shutil
import socket
import tarfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from crossalign.core.errors import UserError
from crossalign.core.files import cache_dir, is_full, write_text
from crossalign.core.progress import silence
from crossalign.core.reading import read_word
from crossalign.recipes.space import Config
from crossalign.runs.folder import InUse, locked
from crossalign.runs.names import RunFolder, SearchFolder
from crossalign.runs.promotion import Job
from crossalign.runs.records import read_metrics
from crossalign.studies.search.cluster import stoppable
from crossalign.studies.workers import ORPHAN_SECONDS, run_verb
from crossalign.training.stops import DiskFull, Diverged, Interrupted, NoRoom, Paused

NOT_SHIPPED = (".lock", "mlflow.db", "mlartifacts")
END = 1024  # zeros at the end of an archive
TELL_SECONDS = 60.0
_broken = threading.Event()
"""Set when this process can compute no more on its GPU: the next job ends it, and is then given out again."""
_alone = threading.Lock()  # a Dask worker may have several threads, and a process trains one model at a time


@dataclasses.dataclass(frozen=True)
class Work:
    """Train ``config`` to the end of epoch ``until``, or to its end and result."""

    config: Config
    recipe: str
    until: int | None
    home: Path
    """The search's folder."""
    token: str
    """What ``search.id`` holds there."""
    job: Job | None = None
    """The rung's, where it is a trial's."""
    files: bytes | None = None
    """The run's folder, for a worker that shares no disk with the search and has asked for it."""
    done: int = 0
    """Epochs that the search has of the run: a worker's own copy that holds fewer will not do."""
    threads: int = 0
    """To compute with; 0 leaves them as the worker has them."""


@dataclasses.dataclass(frozen=True)
class JobResult:
    """What came of a job."""

    curve: list[float] = dataclasses.field(default_factory=list)
    """The validation number after each epoch from the first on."""
    score: float = 0.0
    """Of the weights that a run keeps at the rung's end: the best epoch's of a classifier, the last ones of a text run."""
    seconds: float = 0.0
    """Wall clock of this job."""
    reason: str = ""
    """Why the trial failed; empty if it did not."""
    bad_input: bool = False
    """Whether it failed by a sentence, which need not be about its settings: data or a device may be gone."""
    died: str = ""
    """How the worker itself came to an end, or was told to."""
    stopped: str = ""
    """Why the whole search must stop: the disk is full."""
    wants_files: bool = False
    """The worker shares no disk with the search, and lacks the trial's folder."""
    files: bytes | None = None
    """The run's folder, from such a worker."""


def train(work: Work) -> JobResult:
    """Do a job. It raises nothing: an exception of the future then means that the worker itself came to an end."""
    if _broken.is_set():
        os._exit(1)
    silence()
    started = time.monotonic()
    try:
        with stoppable(work.token) as stop, _alone, _computing_with(work.threads):
            done = _where_the_run_is(work, stop)
    except Exception as error:  # a disk perhaps; what goes wrong in training itself is told by _outcome
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        done = JobResult(stopped=f"the worker on {socket.gethostname()} cannot work in its folders ({reason})")
    import torch

    if torch.cuda.is_initialized() and not _broken.is_set():  # the next model may need the memory that this one held
        gc.collect()
        torch.cuda.empty_cache()
    return dataclasses.replace(done, seconds=time.monotonic() - started)


def _where_the_run_is(work: Work, stop: threading.Event | None) -> JobResult:
    """The outcome of a job in the search's folder, or in this host's copy of the run's."""
    if _shares(work):
        return _patiently(lambda: _outcome(work), stop)
    folder = cache_dir("search") / work.token / work.config.output.relative_to(work.home)
    if work.files is None and len(validations(folder)) < work.done:
        return JobResult(wants_files=True)
    tracking = dataclasses.replace(work.config.tracking, mlflow=False)
    here = dataclasses.replace(work, config=dataclasses.replace(work.config, output=folder, tracking=tracking))

    def job() -> JobResult:
        if work.files is not None:
            unpack(work.files, folder)
        return _outcome(here)

    return dataclasses.replace(_patiently(job, stop), files=pack(folder))


@contextlib.contextmanager
def _computing_with(threads: int) -> Iterator[None]:
    """So many threads, if any number is given, for one job: another search of the same worker may want others."""
    import torch

    before = torch.get_num_threads()
    if threads > 0:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        if threads > 0:
            torch.set_num_threads(before)


def pack(folder: Path) -> bytes:
    """A folder's content as one archive."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
            if path.is_file() and not set(path.relative_to(folder).parts) & set(NOT_SHIPPED):
                archive.add(path, str(path.relative_to(folder)))
    return buffer.getvalue()


def unpack(files: bytes, folder: Path) -> None:
    """Put what :func:`pack` made in the place of ``folder``, which stays as it is where the archive is not whole.

    Raises:
        InUse: a process is running in ``folder``. tarfile.ReadError: the archive is cut.
    """
    if len(files) < END or files[-END:].strip(b"\0"):
        raise tarfile.ReadError(f"the archive of {folder} has no end")
    new, old = folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")
    with locked(folder):
        for rest in (new, old):  # of a process that was killed
            shutil.rmtree(rest, ignore_errors=True)
        try:
            new.mkdir()
            with tarfile.open(fileobj=io.BytesIO(files)) as archive:
                archive.extractall(new, filter="data")
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)
            raise
        folder.rename(old)
        new.rename(folder)
        shutil.rmtree(old, ignore_errors=True)


def _shares(work: Work) -> bool:
    """Whether this process sees the very folder of the search, not another host's of the same name."""
    try:
        return read_word(SearchFolder(work.home).token) == work.token
    except UserError:
        return False


def _patiently(job: Callable[[], JobResult], stop: threading.Event | None) -> JobResult:
    """What ``job`` gives, once a worker of a search that was killed has saved and let go of the run's folder.

    Here such a worker is gone after a while; on a cluster, where there is ``stop``, this waits as long as there is one.
    """
    began = last_line = time.monotonic()
    while stop is None or not stop.is_set():
        try:
            return job()
        except InUse as error:
            now = time.monotonic()
            if stop is None and now - began > 2 * ORPHAN_SECONDS:
                return JobResult(stopped=str(error))
            if now - last_line > TELL_SECONDS:
                print(f"waiting since {now - began:.0f} s: {error}", flush=True)
                last_line = now
        time.sleep(0.5)
    return JobResult(died="told to end before it began")


def _outcome(work: Work) -> JobResult:
    name, folder = work.config.loop.watched.name, work.config.output
    try:
        run_verb(work.config, work.recipe, work.until)
    except Paused as paused:
        curve = [numbers[name] for numbers in paused.result.history]
        score = paused.result.best.get(name, 0.0)  # none where no epoch was asked for
        return JobResult(curve, score, reason="" if math.isfinite(score) else f"the validation {name} is {score}")
    except InUse:
        raise
    except Interrupted as error:  # somebody told this worker alone: the run is saved
        return JobResult(died=str(error))
    except (DiskFull, NoRoom) as error:
        return JobResult(stopped=str(error))
    except UserError as error:
        return JobResult(reason=str(error), bad_input=True)
    except Exception as error:
        curve = [row[name] for row in validations(folder) if isinstance(row.get(name), float)]
        if isinstance(error, Diverged):
            return JobResult(curve, reason=str(error))
        return _failure(error, folder.with_suffix(".error.txt"), curve)
    return JobResult()


def _failure(error: Exception, trace: Path, curve: list[float]) -> JobResult:
    """What comes of a job that ended by an exception that nobody foresaw; its trace is left beside the run's folder."""
    import torch

    text = " ".join(str(error).split())[:300]
    if is_full(error):
        return JobResult(stopped=text)
    with contextlib.suppress(OSError):
        write_text(trace, traceback.format_exc())
    memory = isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in text
    if torch.cuda.is_initialized() and not memory:
        try:
            torch.cuda.synchronize()
        except Exception:  # a failed kernel leaves a process in which every other call fails too
            _broken.set()
    return JobResult(curve, reason=f"{'out of memory' if memory else type(error).__name__}: {text}")


def validations(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl that hold the validation of its training stage, one an epoch."""
    rows = read_metrics(RunFolder(folder).metrics, [])
    by_epoch = {row["epoch"]: row for row in rows if (row.get("stage"), row.get("split")) == ("train", "validation")}
    return [by_epoch[epoch] for epoch in sorted(by_epoch)]
