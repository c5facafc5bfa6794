"""Which trial to train next: ASHA in the promotion form (Li et al. 2020, "A system for massively parallel hyperparameter
tuning", Algorithm 2), as functions of what has happened so far, without a clock and without state.

Rungs are counted from 0. A trial is its number; it stands in rung k once it was trained to that rung's resource.
"""

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

from crossalign.core.errors import UserError


@dataclass(frozen=True)
class Job:
    """Train ``trial`` to the end of ``rung``."""

    trial: int
    rung: int


def resources(most: int, rungs: int = 4, factor: int = 2) -> list[int]:
    """The resource at the end of each rung, rising to ``most``: 50 gives 7, 13, 25, 50, which is 50 / 2^k rounded up.

    Raises:
        UserError: so little resource that two rungs would end at the same place.
    """
    ends = [-(-most // factor**k) for k in reversed(range(rungs))]
    if len(set(ends)) < rungs:
        raise UserError(
            f"{most} epochs (evaluations, of a text run) cannot be cut into {rungs} rungs, each {factor} times the one before: "
            f"they would end at {', '.join(map(str, ends))}; train longer, or lower --rungs or --factor"
        )
    return ends


def promotable(scores: Sequence[Mapping[int, float]], begun: Sequence[Set[int]], factor: int = 2) -> Job | None:
    """The next promotion, from the highest rung that has one, or None.

    Args:
        scores: for each rung, the trials that reached its end with their score, larger is better; -inf for one that failed
            in it, which keeps its place in the count and is never promoted.
        begun: for each rung, the trials that were ever given a job in it.
        factor: of each rung, one in ``factor`` is promoted.
    """
    for rung in reversed(range(len(scores) - 1)):
        ranked = _ranked(scores[rung])
        for trial in ranked[: len(ranked) // factor]:
            if trial not in begun[rung + 1] and scores[rung][trial] > -math.inf:
                return Job(trial, rung + 1)
    return None


def end_game(scores: Sequence[Mapping[int, float]], begun: Sequence[Set[int]]) -> Job | None:
    """What to do when all trials were drawn, none is training and none is promotable: if nobody has reached the last rung,
    the best of the highest rung goes on; else None, the search is over."""
    last = len(scores) - 1
    if any(score > -math.inf for score in scores[last].values()):
        return None
    for rung in reversed(range(last)):
        for trial in _ranked(scores[rung]):
            if scores[rung][trial] > -math.inf and trial not in begun[rung + 1]:
                return Job(trial, rung + 1)
    return None


def _ranked(scores: Mapping[int, float]) -> list[int]:
    """Best first; of equal scores the trial drawn first, so that nothing hangs on the order of completion."""
    return sorted(scores, key=lambda trial: (-scores[trial], trial))
