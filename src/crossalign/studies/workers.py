"""Processes that train side by side: started with their share of the cores, gone when whoever started them is gone."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor
from typing import Any

ORPHAN_SECONDS = 60.0  # for the step and the checkpoint of a worker that nobody waits for any more

orphaned = threading.Event()
"""Set in a worker whose parent is gone: what was queued for it is not to begin."""


def start_worker(threads: int, device: str = "") -> None:
    """What a new worker does first: its share of the cores, its GPU where there are several, and an eye on its parent."""
    if device:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    threading.Thread(target=_die_with_parent, daemon=True).start()  # first: the parent may be killed during the import
    import torch

    torch.set_num_threads(threads)


def start_quiet_worker(threads: int, device: str = "") -> None:
    """The same for a worker without bars of its own, that Ctrl-C reaches through the process that started it."""
    from crossalign.core.progress import silence

    silence()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    start_worker(threads, device)


def run_verb(config: Any, recipe: str, until: int | None = None) -> dict[str, Any]:
    """What the verb of ``config`` returns; with ``until`` it is paused at the end of that epoch, see ``training.loop``."""
    from crossalign import adapt, finetune, pretrain
    from crossalign.config import FinetuneConfig, PretrainConfig

    verb = pretrain if isinstance(config, PretrainConfig) else finetune if isinstance(config, FinetuneConfig) else adapt
    return verb(config, recipe=recipe, quiet=True, until=until)


def warm_up() -> None:
    """Import what training needs, while others still have something to do before there is work for this process."""
    from crossalign import adapt, finetune, pretrain  # noqa: F401


def _die_with_parent() -> None:
    """Stop, and save, when the process that hands out the runs is gone; nobody would read the results."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    orphaned.set()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(ORPHAN_SECONDS)  # then whatever still goes on is stopped
    os._exit(1)


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
        self._pools = [self._new(place) for place in range(count)]
        self._idle: queue.SimpleQueue[int] = queue.SimpleQueue()  # a future is done a moment before its callbacks run
        for place in range(count):
            self._idle.put(place)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        place = self._idle.get(timeout=ORPHAN_SECONDS)
        try:
            future = self._pools[place].submit(fn, *args, **kwargs)
        except BrokenExecutor:  # killed while it was idle
            self._replace(place)
            future = self._pools[place].submit(fn, *args, **kwargs)
        future.add_done_callback(lambda done: self._back(place, done))
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

    def _back(self, place: int, done: Future[Any]) -> None:
        if not self._over and not done.cancelled() and isinstance(done.exception(), BrokenExecutor):
            self._replace(place)
        self._idle.put(place)

    def _replace(self, place: int) -> None:
        self._pools[place].shutdown(wait=False)
        self._pools[place] = self._new(place)

    def _new(self, place: int) -> ProcessPoolExecutor:
        device = self._devices[place % len(self._devices)] if self._devices else ""
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(1, context, initializer=start_quiet_worker, initargs=(self._threads, device))
        pool.submit(warm_up)
        return pool


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them, where there are several."""
    import torch

    count = torch.cuda.device_count()
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return (named or [str(number) for number in range(count)]) if count > 1 else []
