"""How far a search is: a bar over the epochs that it is going to train, and one for each rung."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence, Set
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from crossalign.core.progress import progress
from crossalign.studies.search.jobs import validations
from crossalign.studies.search.journal import Journal

LOOK_SECONDS = 5.0  # between two looks into the folders of the trials in training


class Board(AbstractContextManager["Board"]):
    """Bars on a terminal, and a line now and then in a log file.

    Args:
        journal: what has happened.
        asked: trials to be drawn.
        folder: trial → its run folder.
    """

    def __init__(self, journal: Journal, asked: int, folder: Callable[[int], Path]) -> None:
        self.journal, self.asked, self.folder = journal, asked, folder
        self._bar = progress(1, "epochs", initial=journal.epochs(), unit="epoch")
        self._rungs = [
            progress(1, f"rung of {end}", initial=len(scores), unit="trial", place=place)
            for place, (end, scores) in enumerate(zip(journal.ends, journal.standing()[0], strict=True), start=1)
        ]
        self._looked, self._seen = 0.0, dict[int, int]()

    def __exit__(self, *error: object) -> None:
        for bar in (*self._rungs[::-1], self._bar):
            bar.close()

    def show(self, flying: Set[int]) -> None:
        """Bring the bars up to date; ``flying`` are the trials in training."""
        if time.monotonic() - self._looked > LOOK_SECONDS:
            self._looked, self._seen = time.monotonic(), {trial: len(validations(self.folder(trial))) for trial in flying}
        live = sum(max(0, self._seen.get(trial, 0) - len(self.journal.trials[trial].curve)) for trial in flying)
        scores, begun = self.journal.standing()
        expected = forecast([len(held) for held in scores], [len(trials) for trials in begun], self.asked, self.journal.factor)
        ends = self.journal.ends
        steps = [end - before for end, before in zip(ends, [0, *ends[:-1]], strict=True)]
        total = sum(count * step for count, step in zip(expected, steps, strict=True))
        total += sum(trial.again for trial in self.journal.trials)
        total -= sum(ends[trial.begun] - len(trial.curve) for trial in self.journal.trials if trial.reason)
        _move(self._bar, self.journal.epochs() + live, total)
        for bar, held, count in zip(self._rungs, scores, expected, strict=True):
            _move(bar, len(held), count)
        best, there = self.journal.best(), "·".join(str(len(held)) for held in scores)
        if best is not None:
            told = f"{there} at the rungs, best {best.score:.4g} of trial {best.number}"
            self._bar.set_postfix_str(told, refresh=False)


def forecast(reached: Sequence[int], begun: Sequence[int], asked: int, factor: int) -> list[int]:
    """How many trials will have begun each rung in the end, if those to come are as good as those that came.

    Args:
        reached: trials that are at the end of each rung.
        begun: trials that were given work in it.
        asked: trials to be drawn.
    """
    counts = [float(max(asked, begun[0]))]
    for there, on in zip(reached, begun[1:], strict=False):
        more = _promoted(counts[-1], factor) - _promoted(there, factor)
        counts.append(max(1.0, on + max(0.0, more)))  # 1: the end game sees to it
    return [round(count) for count in counts]


def _promoted(count: float, factor: int) -> float:
    """Trials that a rung has promoted once it holds ``count`` in random order: one in ``factor``, and those that were among
    the best for a while only, about √count / 2 (500 and fewer, counted for factors of 2 to 4)."""
    return max(0.0, count / factor + math.sqrt(count) / 2 - 1)


def _move(bar: Any, done: int, total: int) -> None:
    bar.total = max(total, done)
    bar.update(max(0, done - bar.n))
