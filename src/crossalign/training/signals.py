"""Ctrl-C and SIGTERM as an event, so that the step in hand can be finished and saved."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_thread = threading.local()


@contextmanager
def catch_signals() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C or SIGTERM into an event to stop at the next step; a second Ctrl-C stops at once.

    Signals reach the main thread alone. In another, the event is the one of :func:`stopped_by`, if there is one.
    """
    if threading.current_thread() is not threading.main_thread():
        yield getattr(_thread, "stop", None) or threading.Event()
        return
    stopped = threading.Event()

    def handle(number: int, frame: object) -> None:
        if stopped.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stopped.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextmanager
def stopped_by(stop: threading.Event) -> Iterator[None]:
    """Let ``stop`` end what this thread trains, where it is not the main thread: an event a thread, as each has its own job."""
    _thread.stop = stop
    try:
        yield
    finally:
        del _thread.stop
