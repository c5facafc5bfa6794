"""How far a search is: a bar over the epochs that it is going to train, and one for each rung."""

from __future__ import annotations

import time
from collections.abc import Callable, Set
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from crossalign.progress import progress
from crossalign.search.journal import Journal
from crossalign.search.work import validations

LOOK_SECONDS = 5.0  # between two looks into the folders of the trials in training


class Board:
    """Bars on a terminal, and a line now and then in a log file.

    Args:
        journal: what has happened.
        asked: trials to be drawn.
        folder: trial → its run folder.
    """

    def __init__(self, journal: Journal, asked: int, folder: Callable[[int], Path]) -> None:
        self.journal, self.folder = journal, folder
        ends, factor = journal.ends, journal.factor
        self.expected = [max(1, asked // factor**rung) for rung in range(len(ends))]
        steps = [end - before for end, before in zip(ends, [0, *ends[:-1]], strict=True)]
        total = sum(count * step for count, step in zip(self.expected, steps, strict=True))
        self._bar = progress(total, "epochs", initial=min(total, journal.epochs()), unit="epoch")
        self._rungs = [
            progress(count, f"rung of {end}", initial=len(scores), unit="trial", place=place)
            for place, (count, end, scores) in enumerate(zip(self.expected, ends, journal.rungs()[0], strict=True), start=1)
        ]
        self._looked, self._live = 0.0, 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for bar in (*self._rungs[::-1], self._bar):
            bar.close()

    def show(self, flying: Set[int]) -> None:
        """Bring the bars up to date; ``flying`` are the trials in training."""
        if time.monotonic() - self._looked > LOOK_SECONDS:
            self._looked = time.monotonic()
            trials = self.journal.trials
            self._live = sum(max(0, len(validations(self.folder(t))) - len(trials[t].curve)) for t in flying)
        _move(self._bar, self.journal.epochs() + self._live)
        for bar, scores in zip(self._rungs, self.journal.rungs()[0], strict=True):
            _move(bar, len(scores))
        best, there = self.journal.best(), "·".join(str(len(scores)) for scores in self.journal.rungs()[0])
        if best is not None:
            told = f"{there} at the rungs, best {abs(best.scores[-1]):.4g} of trial {best.number}"
            self._bar.set_postfix_str(told, refresh=False)


def _move(bar: Any, done: int) -> None:
    bar.total = max(bar.total, done)  # promotions may be more than one in every factor
    bar.update(max(0, done - bar.n))
