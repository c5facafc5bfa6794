"""How far a stage is: a bar with rate and time left on a terminal, a plain line now and then in a log file."""

from __future__ import annotations

import contextlib
import shutil
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NoReturn, TextIO, TypeVar

from tqdm import tqdm

from crossalign.core.machine import is_main_process

T = TypeVar("T")
QUIET_SECONDS = 2.0
STEP_SECONDS = 1.0
"""How long work without a bar goes on before it is named."""
_silent = False
LINE_SECONDS = 30.0


def progress(
    total: int, description: str, initial: int = 0, unit: str = "step", leave: bool = True, line: int | None = None
) -> tqdm[NoReturn]:
    """A bar over ``total`` steps of which ``initial`` are done; use it as a context manager and call ``update(1)``.

    It shows in the main process only, and only once two seconds have passed. Where stderr is no terminal it prints
    one plain line every 30 seconds at most, so that a log file holds no control characters. Bytes (unit "B") are told in
    thousands and millions. Without ``leave`` the bar is wiped when it is done. ``line`` is that of a bar under
    another one; a log file has none of these. Without a description there is no bar.
    """
    stream = sys.stderr  # None in a process that was started without
    plain = stream is None or not stream.isatty()
    return tqdm(
        total=total,
        initial=initial,
        desc=description,
        unit=unit,
        unit_scale=unit == "B",
        delay=QUIET_SECONDS,
        leave=leave,
        position=0 if plain else line,  # lines of a file need no cursor that goes up and down
        disable=not _shows(stream) or not description or (plain and line is not None),
        file=None if stream is None else _Lines(stream) if plain else _Stream(stream),
        mininterval=LINE_SECONDS if plain else 0.2,
        miniters=1,
        ncols=100 if plain else shutil.get_terminal_size().columns,
        ascii=plain,
    )


def announce(sentence: str) -> None:
    """Say on stderr what goes on, where bars are shown as well."""
    say(f"crossalign: {sentence}")


def say(line: str) -> None:
    """A line on stderr, above the bars; none in a process that shows no bars."""
    stream = sys.stderr
    if not _shows(stream):
        return
    with tqdm.get_lock():
        bars = [bar for bar in getattr(tqdm, "_instances", ()) if stream.isatty() and bar.last_print_t > bar.start_t]
        for bar in bars:
            bar.clear(nolock=True)
        _Stream(stream).write(f"{line}\n")
        _Stream(stream).flush()
        for bar in bars:
            bar.refresh(nolock=True)


@contextmanager
def doing(sentence: str) -> Iterator[None]:
    """Work without a bar: what it is stands on stderr as soon as it has taken a second, and on a terminal grows by a dot every
    two seconds."""
    stream, done = sys.stderr, threading.Event()
    if not _shows(stream):
        yield
        return

    def tell() -> None:
        if done.wait(STEP_SECONDS):
            return
        if not stream.isatty():
            say(f"crossalign: {sentence}")
            return
        text = f"crossalign: {sentence} "
        while True:
            _Stream(stream).write(text)
            _Stream(stream).flush()
            if done.wait(QUIET_SECONDS):
                break
            text = "."
        _Stream(stream).write("\n")

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        done.set()
        teller.join()


@contextmanager
def paused(bar: tqdm[NoReturn]) -> Iterator[None]:
    """Leave what is done meanwhile out of a bar's rate and of its times."""
    began = time.time()
    try:
        yield
    finally:
        if not bar.disable:
            spent = time.time() - began
            bar.start_t += spent
            bar.last_print_t += spent


def _shows(stream: TextIO | None) -> bool:
    return stream is not None and not _silent and is_main_process()


def silence() -> None:
    """Show no bar in this process from now on: one of several workers, whose parent shows how far all are."""
    global _silent
    _silent = True
    tqdm.set_lock(threading.RLock())  # its own is a semaphore, which a worker that is told to end would leave behind


def followed(items: Iterable[T], total: int, description: str, unit: str) -> Iterator[T]:
    """The items, with a bar over them that is wiped at the end; none where ``description`` is empty."""
    with progress(total, description, unit=unit, leave=False) as bar:
        for item in items:
            yield item
            bar.update(1)


class _Stream:
    """A text stream that may go away, as a terminal that is closed: what follows it is lost, and nobody fails for it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.encoding = stream.encoding

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()

    def fileno(self) -> int:
        return self._stream.fileno()


class _Lines(_Stream):
    """One that turns each redrawing of a bar into a line of its own."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self.encoding = "ascii"

    def write(self, text: str) -> int:
        line = text.strip()
        if line:
            super().write(line + "\n")
        return len(text)
