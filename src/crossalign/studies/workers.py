"""Processes that train side by side: started with their share of the cores, gone when whoever started them is gone."""

import multiprocessing
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Collection, Generator, Iterator
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from crossalign.core.machine import usable_threads
from crossalign.core.progress import silence
from crossalign.training.stops import Interrupted, catch_signals

T = TypeVar("T")
R = TypeVar("R")
ORPHAN_SECONDS = 60.0  # for the step and the checkpoint of a worker that nobody waits for any more
STOP_SECONDS = 60.0  # for workers to save in
POLL_SECONDS = 1.0


def start_worker(threads: int, device: str = "") -> None:
    """What a new worker does first: its share of the cores, its GPU where there are several, and an eye on its parent.

    It has no bars of its own, and Ctrl-C reaches it through the process that started it.
    """
    silence()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if device:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    threading.Thread(target=_die_with_parent, daemon=True).start()  # first: the parent may be killed during the import
    import torch

    torch.set_num_threads(threads)


def run_verb(config: Any, recipe: str, until: int | None = None) -> dict[str, Any]:
    """What the verb of ``config`` returns; with ``until`` it is paused at the end of that epoch, see ``training.loop``."""
    import crossalign
    from crossalign.recipes import verb_of

    verb = getattr(crossalign, verb_of(type(config)))
    return verb(config, recipe=recipe, quiet=True, until=until)  # type: ignore[no-any-return]


def warm_up() -> None:
    """Import what training needs, while others still have something to do before there is work for this process."""
    from crossalign import adapt, finetune, pretrain  # noqa: F401


def _die_with_parent() -> None:
    """Stop, and save, when the process that hands out the runs is gone; nobody would read the results."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(ORPHAN_SECONDS)  # then whatever still goes on is stopped
    os._exit(1)


@dataclass(frozen=True)
class WorkerPool:
    """Who does the work: an executor, and how many jobs it can have in training now."""

    executor: Executor
    free: Callable[[], int]


@contextmanager
def process_pool(count: int, threads: int = 0) -> Iterator[WorkerPool]:
    """``count`` processes here that compute with ``threads`` each, or with an equal share of this process's threads.

    They are told to save and end when the block ends by an exception.
    """
    workers = Workers(count, threads or max(1, usable_threads() // count))
    try:
        yield WorkerPool(workers, lambda: count)
    except BaseException:
        workers.stop(STOP_SECONDS)
        raise
    finally:
        workers.shutdown(wait=False, cancel_futures=True)


def hand_out(
    pool: WorkerPool,
    function: Callable[[T], R],
    more: Callable[[Collection[T]], T | None],
    look: Callable[[Collection[T]], None] = lambda flying: None,
) -> Generator[tuple[T, Future[R]], None, None]:
    """Hand out jobs while there are any, and give each with its future when that is done; close it, as it catches signals.

    Args:
        function: does a job, in a worker.
        more: the jobs in training → what to begin beside them, or None.
        look: called about once a second with the jobs in training, while no worker waits.

    Raises:
        Interrupted: a signal came.
    """
    flying: dict[Future[R], T] = {}
    with catch_signals() as stopped:
        while True:
            while len(flying) < pool.free() and (job := more(flying.values())) is not None:
                flying[pool.executor.submit(function, job)] = job
            if not flying:
                return
            look(flying.values())
            done, _ = wait(flying, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
            if stopped.is_set():
                raise Interrupted("stopped by a signal")
            for future in done:
                yield flying.pop(future), future


class Workers(Executor):
    """``count`` processes, each in a pool of its own: one that is killed breaks its own pool alone, which is replaced.

    At most ``count`` jobs may be submitted before one of them is done.

    Args:
        count: processes.
        threads: that each computes with.
    """

    def __init__(self, count: int, threads: int) -> None:
        self._threads, self._devices = threads, visible_gpus() if count > 1 else []
        self._over = False
        self._pools = [self._new(slot) for slot in range(count)]
        self._idle: queue.SimpleQueue[int] = queue.SimpleQueue()  # a future is done a moment before its callbacks run
        for slot in range(count):
            self._idle.put(slot)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        slot = self._idle.get(timeout=ORPHAN_SECONDS)
        try:
            future = self._pools[slot].submit(fn, *args, **kwargs)
        except BrokenExecutor:  # killed while it was idle
            self._replace(slot)
            future = self._pools[slot].submit(fn, *args, **kwargs)
        future.add_done_callback(lambda done: self._back(slot, done))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._over = True
        for pool in self._pools:
            pool.shutdown(wait=wait, cancel_futures=cancel_futures)

    def stop(self, patience: float) -> None:
        """Tell all processes to save and end, and wait ``patience`` seconds at most."""
        children = [child for pool in self._pools for child in (pool._processes or {}).values()]
        self.shutdown(wait=False, cancel_futures=True)  # so that they end when they have saved, and wait for no other job
        for child in children:
            child.terminate()  # SIGTERM, which a run in training turns into a checkpoint
        until = time.monotonic() + patience
        for child in children:
            child.join(max(0.0, until - time.monotonic()))

    def _back(self, slot: int, done: Future[Any]) -> None:
        if not self._over and not done.cancelled() and isinstance(done.exception(), BrokenExecutor):
            self._replace(slot)
        self._idle.put(slot)

    def _replace(self, slot: int) -> None:
        self._pools[slot].shutdown(wait=False)
        self._pools[slot] = self._new(slot)

    def _new(self, slot: int) -> ProcessPoolExecutor:
        device = self._devices[slot % len(self._devices)] if self._devices else ""
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(1, context, initializer=start_worker, initargs=(self._threads, device))
        pool.submit(warm_up)
        return pool


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them, where there are several."""
    import torch

    count = torch.cuda.device_count()
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return (named or [str(number) for number in range(count)]) if count > 1 else []
