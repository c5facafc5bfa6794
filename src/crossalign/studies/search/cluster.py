"""A Dask cluster in the place of processes here, and what a job on it knows of the search that it works for."""

import contextlib
import logging
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from crossalign.core.errors import UserError, needed
from crossalign.core.files import cache_dir
from crossalign.core.reading import read_word
from crossalign.runs.names import SearchFolder
from crossalign.studies.workers import STOP_SECONDS, WorkerPool
from crossalign.training.stops import Interrupted, stopped_by

CONNECT_SECONDS = 20
LOOK_SECONDS = 1.0  # how often a job looks whether its search is still there
WORKER = "dask worker {} --nthreads 1 --memory-limit 0"
_jobs: dict[threading.Event, str] = {}
"""What stops each job of this process, and the token of the search that it works for."""


@contextmanager
def cluster_pool(address: str, most: int, home: Path) -> Iterator[WorkerPool]:
    """The workers connected to the scheduler at ``address``, ``most`` of them at the most (0: all); they may come and go.

    When the block ends by an exception, the workers are told to save and end what they train for the searches in the folder
    ``home``; when it ends well, they delete their copies of the trials.

    Raises:
        UserError: no Dask here, or no scheduler there. Interrupted: ``WorkerPool.free`` finds that the scheduler has gone away.
    """
    distributed = needed("distributed", "cluster", "a search on a cluster")
    try:
        client = distributed.Client(address, timeout=CONNECT_SECONDS)
    except (OSError, ValueError) as error:
        raise UserError(
            f"--cluster {address}: no scheduler answers ({' '.join(str(error).split())[:200]}); start one with 'dask "
            f"scheduler' and workers with '{WORKER.format('ADDRESS')}'"
        ) from error
    gone = f"the Dask scheduler at {address} has gone away, and the search stopped: start it and its workers again"
    last_line = time.monotonic()

    def free() -> int:
        nonlocal last_line
        try:  # whoever lost the connection has lost its jobs too, so that there is no waiting for the scheduler
            connected = len(client.scheduler_info(n_workers=-1)["workers"]) if client.status == "running" else -1
        except (KeyError, OSError):
            connected = -1
        if connected < 0:
            raise Interrupted(gone)
        if not connected and time.monotonic() - last_line > 30:
            print(f"waiting for workers: {WORKER.format(address)}", flush=True)
            last_line = time.monotonic()
        return max(1, min(connected, most) if most else connected)  # the scheduler keeps one job for the first that comes

    executor = client.get_executor(pure=False)
    try:
        yield WorkerPool(executor, free)
    except BaseException as error:
        if client.status == "running":
            with contextlib.suppress(Exception):  # what brought us here is to be told
                executor.shutdown(wait=False)  # what waits is not to begin
                tokens, until = _tokens(home), time.monotonic() + STOP_SECONDS
                while any(client.run(halt, tokens, on_error="ignore").values()) and time.monotonic() < until:
                    time.sleep(0.5)
            raise
        logging.getLogger("distributed.client").setLevel(logging.CRITICAL)  # its traceback of a connection that it lost
        if isinstance(error, Interrupted):
            raise Interrupted(gone) from error
        raise
    else:
        with contextlib.suppress(Exception):  # the search is whole without it
            client.run(forget, _tokens(home), on_error="ignore")
    finally:
        client.close()


def _tokens(home: Path) -> set[str]:
    """The tokens of the search in the folder ``home``, and of those of its methods below it."""
    token = SearchFolder.token.name
    return {read_word(file) for file in (*home.glob(token), *home.glob(f"*/{token}"))} - {""}


def halt(tokens: set[str]) -> bool:
    """Tell the jobs of this process that work for these searches to save and end; whether there are any."""
    stops = [stop for stop, token in list(_jobs.items()) if token in tokens]
    for stop in stops:
        stop.set()
    return bool(stops)


def forget(tokens: set[str]) -> None:
    """Delete this host's copies of the trials of these searches."""
    for token in tokens:
        shutil.rmtree(cache_dir("search") / token, ignore_errors=True)


@contextmanager
def stoppable(token: str) -> Iterator[threading.Event | None]:
    """In a Dask task, an event that stops what this thread trains: it is set by :func:`halt`, or when the task is dropped.

    None where no Dask task runs. Signals do not reach such a thread.
    """
    dropped = _dropped()
    if dropped is None:
        yield None
        return
    stop, ended = threading.Event(), threading.Event()
    _jobs[stop] = token

    def watch() -> None:
        while not ended.wait(LOOK_SECONDS):
            if dropped():
                stop.set()

    threading.Thread(target=watch, daemon=True).start()
    try:
        with stopped_by(stop):
            yield stop
    finally:
        ended.set()
        del _jobs[stop]


def _dropped() -> Callable[[], bool] | None:
    """What tells whether nobody waits for this thread's Dask task any more; None where no such task runs.

    Dask cancels the tasks of a driver that is gone, also of one that was killed; and a worker that loses its scheduler, or
    is told to end, closes.
    """
    if "distributed" not in sys.modules:
        return None
    from distributed import Status, get_worker

    try:
        worker = get_worker()
    except ValueError:
        return None
    key = worker.get_current_task()

    def dropped() -> bool:
        task = worker.state.tasks.get(key)
        return task is None or task.state == "cancelled" or worker.status in (Status.closing, Status.closed)

    return dropped
