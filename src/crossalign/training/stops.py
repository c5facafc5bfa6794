"""How a stage of training ends: what it leaves behind, or what stopped it, a signal among that. Nothing heavy is imported."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from crossalign.core.errors import UserError

_thread = threading.local()


@dataclass
class StageResult:
    """What a stage leaves behind."""

    best_epoch: int
    best: dict[str, float]
    """Validation numbers of that epoch."""
    seconds: float
    """Time in training steps, without evaluation and checkpoints."""
    examples: int
    """Examples trained on in that time."""
    history: list[dict[str, float]] = field(default_factory=list)


class Interrupted(RuntimeError):
    """Ctrl-C, SIGTERM or SIGHUP: the run was saved and can be resumed."""


class Diverged(RuntimeError):
    """The loss or a weight is no longer a number, or a term of the loss cannot be computed any more."""


class DiskFull(RuntimeError):
    """The disk filled up while a checkpoint was written; the one before it is whole."""


class NoRoom(UserError):
    """Too little room on the disk for the checkpoints of a run that is about to begin."""


class Paused(RuntimeError):
    """The stage has reached the epoch that it was to be trained to; the run is saved and goes on when it is called again."""

    def __init__(self, result: StageResult) -> None:
        super().__init__(f"paused after epoch {len(result.history)}")
        self.result = result


@contextmanager
def catch_signals() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C, SIGTERM or SIGHUP into an event to stop at the next step; a second Ctrl-C stops at once.

    A signal that the process was started to ignore, as by nohup, stays ignored. Signals reach the main thread alone. In
    another, the event is the one of :func:`stopped_by`, if there is one.
    """
    if threading.current_thread() is not threading.main_thread():
        yield getattr(_thread, "stop", None) or threading.Event()
        return
    stopped = threading.Event()

    def handle(number: int, frame: object) -> None:
        if stopped.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stopped.set()

    caught = (
        number
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) not in (signal.SIG_IGN, None)
    )
    before = {number: signal.signal(number, handle) for number in caught}
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
