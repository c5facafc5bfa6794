"""ASHA's promotion rule: its parts, the paper's Algorithm 2 beside it, and what holds in every history."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from crossalign.core.errors import UserError
from crossalign.runs.promotion import Job, end_game, promotable, resources

FAILED = -math.inf

# The parts


def test_resources_are_the_most_over_powers_of_the_factor_rounded_up() -> None:
    assert resources(50) == [7, 13, 25, 50]
    assert resources(64) == [8, 16, 32, 64]
    assert resources(81, rungs=5, factor=3) == [1, 3, 9, 27, 81]
    assert resources(50, rungs=1) == [50]
    assert resources(5, rungs=4) == [1, 2, 3, 5]


def test_too_few_epochs_for_the_rungs_are_refused() -> None:
    with pytest.raises(UserError, match=r"^4 epochs .* 4 rungs, each 2 times .* 1, 1, 2, 4; .*lower --rungs"):
        resources(4)
    with pytest.raises(UserError, match=r"^6 epochs .* 4 rungs, each 3 times .* 1, 1, 2, 6; "):
        resources(6, rungs=4, factor=3)


def test_one_in_factor_of_what_a_rung_holds_is_promoted_best_first() -> None:
    rung = {0: 0.1, 1: 0.5, 2: 0.4, 3: 0.2, 4: 0.3}
    nobody: set[int] = set()
    assert promotable([{0: 0.1}, {}], [{0}, nobody]) is None  # floor(1 / 2)
    assert promotable([rung, {}], [set(rung), nobody]) == Job(1, 1)
    assert promotable([rung, {}], [set(rung), {1}]) == Job(2, 1)
    assert promotable([rung, {}], [set(rung), {1, 2}]) is None  # floor(5 / 2)
    assert promotable([rung, {}], [set(rung), {1}], factor=3) is None
    assert promotable([rung, {}], [set(rung), {0}]) == Job(1, 1)  # an early promotion takes nobody's place


def test_the_highest_rung_comes_first() -> None:
    scores = [{0: 0.1, 1: 0.5, 2: 0.6, 3: 0.7}, {0: 0.3, 1: 0.6}, {}]
    assert promotable(scores, [{0, 1, 2, 3}, {0, 1}, set()]) == Job(1, 2)
    assert promotable(scores, [{0, 1, 2, 3}, {0, 1}, {1}]) == Job(3, 1)


def test_nobody_is_promoted_from_the_last_rung() -> None:
    assert promotable([{0: 0.1, 1: 0.5, 2: 0.6}], [{0, 1, 2}]) is None
    assert promotable([{0: 0.1, 1: 0.5}, {0: 0.2, 1: 0.6}], [{0, 1}, {0, 1}]) is None


def test_a_failed_trial_counts_and_is_never_promoted() -> None:
    scores = [{0: FAILED, 1: 0.2, 2: FAILED, 3: 0.1}, {}]
    assert promotable([{1: 0.2}, {}], [{1}, set()]) is None
    assert promotable([{0: FAILED, 1: 0.2}, {}], [{0, 1}, set()]) == Job(1, 1)
    assert promotable(scores, [{0, 1, 2, 3}, {1}]) == Job(3, 1)
    scores[0][3] = FAILED  # its place among the best two is not given to anybody
    assert promotable(scores, [{0, 1, 2, 3}, {1}]) is None
    assert promotable([dict.fromkeys(range(8), FAILED), {}], [set(range(8)), set()]) is None


def test_a_failure_in_the_next_rung_takes_a_place_there() -> None:
    scores: list[dict[int, float]] = [{0: 0.4, 1: 0.3, 2: 0.2, 3: 0.1}, {0: FAILED, 1: 0.5}, {}]
    assert promotable(scores, [{0, 1, 2, 3}, {0, 1}, set()]) == Job(1, 2)
    assert promotable(scores, [{0, 1, 2, 3}, {0, 1}, {1}]) is None  # and nobody takes that of 0 in the first


def test_of_equal_scores_the_trial_drawn_first_whatever_the_order_of_completion() -> None:
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]):
        rung = dict.fromkeys(order, 0.5)
        assert promotable([rung, {}], [{0, 1, 2, 3}, set()]) == Job(0, 1)
        assert promotable([rung, {}], [{0, 1, 2, 3}, {0}]) == Job(1, 1)
        assert promotable([rung, {}], [{0, 1, 2, 3}, {0, 1}]) is None
        assert end_game([rung, {}], [{0, 1, 2, 3}, set()]) == Job(0, 1)


def test_a_trial_still_training_in_a_rung_has_no_place_in_it_and_is_not_promoted_again() -> None:
    scores: list[dict[int, float]] = [{0: 0.4, 1: 0.3, 2: 0.2, 3: 0.1}, {0: 0.4}, {}]
    assert promotable(scores, [{0, 1, 2, 3}, {0, 1}, set()]) is None
    scores[1][1] = 0.3
    assert promotable(scores, [{0, 1, 2, 3}, {0, 1}, set()]) == Job(0, 2)


def test_the_end_game_takes_the_best_of_the_highest_rung_until_the_last_is_reached() -> None:
    scores: list[dict[int, float]] = [{0: 0.1, 1: 0.9, 2: 0.2}, {2: 0.4}, {}]
    begun = [{0, 1, 2}, {2}, set[int]()]
    assert end_game(scores, begun) == Job(2, 2)  # the only one of the highest, not the best of all
    assert end_game([scores[0], {}, {}], [begun[0], set(), set()]) == Job(1, 1)
    scores[2][2], begun[2] = FAILED, {2}
    assert end_game(scores, begun) == Job(1, 1)  # it failed: one rung below, the best that did not go on
    scores[2][2] = 0.1
    assert end_game(scores, begun) is None  # a paused trial is not a finished one, yet somebody finished


def test_paused_trials_alone_do_not_end_the_search() -> None:
    scores: list[dict[int, float]] = [{0: 0.5, 1: 0.4}, {0: 0.6}, {}]
    begun = [{0, 1}, {0}, set[int]()]
    assert promotable(scores, begun) is None
    assert end_game(scores, begun) == Job(0, 2)


def test_with_one_rung_the_search_is_over_when_all_were_drawn() -> None:
    assert promotable([{0: 0.5, 1: 0.4}], [{0, 1}]) is None
    assert end_game([{0: 0.5, 1: 0.4}], [{0, 1}]) is None


@pytest.mark.parametrize("rungs", [1, 3])
def test_the_search_is_over_when_all_failed(rungs: int) -> None:
    scores: list[dict[int, float]] = [{0: FAILED, 1: FAILED}, *({} for _ in range(rungs - 1))]
    assert end_game(scores, [{0, 1}, *(set() for _ in range(rungs - 1))]) is None


# The paper's Algorithm 2


class Algorithm2:
    """ASHA as Li et al. (2020) print it, for losses and s = 0, over so many configurations; nothing of it is ours.

    The paper's supply of configurations does not end, and it says nothing of equal losses: top_k takes the one drawn first.
    """

    def __init__(self, configurations: int, r: float, R: float, eta: int) -> None:
        self.waiting = list(range(configurations))
        self.eta, self.top = eta, round(math.log(R / r, eta))
        self.rung: list[list[tuple[float, int]]] = [[] for _ in range(self.top + 1)]
        self.already_promoted: list[list[int]] = [[] for _ in range(self.top + 1)]

    def get_job(self) -> tuple[int, int] | None:
        for k in range(self.top - 1, -1, -1):
            candidates = self.top_k(self.rung[k], len(self.rung[k]) / self.eta)
            promotable = [t for t in candidates if t not in self.already_promoted[k]]
            if len(promotable) > 0:
                self.already_promoted[k].append(promotable[0])
                return promotable[0], k + 1
        return (self.waiting.pop(0), 0) if self.waiting else None

    @staticmethod
    def top_k(rung: list[tuple[float, int]], k: float) -> list[int]:
        left, best = list(rung), []
        while len(best) + 1 <= k:
            best.append(min(left))
            left.remove(best[-1])
        return [configuration for _, configuration in best]

    def next(self, idle: bool) -> Job | None:
        found = self.get_job()
        return None if found is None else Job(*found)

    def done(self, job: Job, score: float) -> None:
        self.rung[job.rung].append((-score, job.trial))


@pytest.mark.parametrize(("rungs", "factor"), [(4, 2), (3, 3)])
def test_the_same_jobs_in_the_same_order_as_the_papers_algorithm(
    bench: Any, curves: np.ndarray, rungs: int, factor: int
) -> None:
    most = curves.shape[1] if factor == 2 else curves.shape[1] // 9 * 9  # 50 or 45 epochs drawn, 16 or 9 recorded
    ends, draw, promoted = resources(most, rungs, factor), np.random.default_rng(1), 0
    for _ in range(200):
        order = draw.permutation(len(curves))[: draw.integers(1, len(curves) + 1)]
        took, workers = draw.exponential(size=(len(curves), rungs)), int(draw.integers(1, 9))
        if draw.random() < 0.5:
            took = np.ceil(took)  # many end together, so that several are promotable at once and the rungs' order matters

        def run(job: Job, order: np.ndarray = order, took: np.ndarray = took) -> tuple[float, float]:
            return took[job.trial, job.rung], curves[order[job.trial], ends[job.rung] - 1]

        ours, _ = bench.simulate(bench.Asha(len(order), rungs, factor), run, workers)
        theirs, _ = bench.simulate(Algorithm2(len(order), 1, factor ** (rungs - 1), factor), run, workers)
        assert ours[: len(theirs)] == theirs
        if ours[len(theirs) :]:  # the end game, which the paper does not need
            assert not any(job.rung == rungs - 1 for job in theirs)
        promoted += sum(job.rung > 0 for job in theirs)
    assert promoted > 2000


# What holds in every history


class Watched:
    """ASHA of the replay that looks at every job before it hands it out; ``early`` are the promotions of the rule itself."""

    def __init__(self, bench: Any, trials: int, rungs: int, factor: int) -> None:
        self.asha = bench.Asha(trials, rungs, factor)
        self.early: list[list[int]] = [[] for _ in range(rungs)]

    def next(self, idle: bool) -> Job | None:
        ours = self.asha
        begun = [set(rung) for rung in ours.begun]
        by_rule = promotable(ours.scores, ours.begun, ours.factor)
        job = ours.next(idle)
        if job is None:
            return None
        assert isinstance(job, Job)
        assert job.trial not in begun[job.rung]  # twice into no rung
        if job.rung > 0:
            before = ours.scores[job.rung - 1]
            assert before[job.trial] > FAILED  # one rung up, and alive
            if job == by_rule:
                better = sum(score > before[job.trial] for score in before.values())
                assert better < len(before) // ours.factor
                self.early[job.rung - 1].append(job.trial)
            else:
                assert idle and len(begun[0]) == ours.trials
        return job

    def done(self, job: Job, score: float) -> None:
        self.asha.done(job, score)


def outcomes(draw: np.random.Generator, trials: int, rungs: int, failing: float) -> Callable[[Job], tuple[float, float]]:
    """Of each job a duration, some of them 0 or equal, and a score with ties, or the failure of so large a share."""
    took = draw.integers(0, 4, size=(trials, rungs)) * draw.choice([1.0, 0.7], size=(trials, rungs))
    score = np.where(draw.random((trials, rungs)) < failing, FAILED, draw.integers(0, 12, size=(trials, rungs)) / 10)
    return lambda job: (float(took[job.trial, job.rung]), float(score[job.trial, job.rung]))


@pytest.mark.parametrize("seed", range(300))
def test_what_holds_in_every_history(bench: Any, seed: int) -> None:
    draw = np.random.default_rng(seed)
    trials, rungs, factor = int(draw.integers(1, 41)), int(draw.integers(1, 6)), int(draw.integers(2, 5))
    search = Watched(bench, trials, rungs, factor)
    run = outcomes(draw, trials, rungs, failing=draw.choice([0, 0.2, 0.6]))
    bench.simulate(search, run, workers=int(draw.integers(1, 5)))
    scores, begun = search.asha.scores, search.asha.begun

    assert [set(rung) for rung in scores] == begun  # nothing was begun and left
    assert begun[0] == set(range(trials))
    for rung, (held, above) in enumerate(zip(scores, begun[1:], strict=False)):
        # A rung that grew may have promoted more than one in factor: some were among the best of fewer. Of n, each past the
        # first factor - 1 can have let one more go. The best one in factor have all gone.
        best = [trial for trial in sorted(held, key=lambda one: (-held[one], one)) if held[trial] > FAILED]
        assert set(best[: len(held) // factor]) <= above
        assert len(search.early[rung]) <= max(0, len(held) - factor + 1)
    assert bool({one for one in scores[-1] if scores[-1][one] > FAILED}) or not _can_go_on(scores, begun)


def _can_go_on(scores: list[dict[int, float]], begun: list[set[int]]) -> bool:
    """Somebody alive stands in a rung from which he has not begun the next."""
    return any(held[one] > FAILED and one not in above for held, above in zip(scores, begun[1:], strict=False) for one in held)


@pytest.mark.parametrize("factor", [2, 3])
@pytest.mark.parametrize("n", [1, 2, 3, 8, 17])
def test_how_many_a_growing_rung_promotes_at_least_and_at_most(bench: Any, n: int, factor: int) -> None:
    """With one worker, which promotes as soon as it can: floor(n / factor) where each is worse than those before it, which is
    right, and all but factor - 1 where each is better. A random order is between the two."""
    for score, promoted in ((-1.0, n // factor), (1.0, max(0, n - factor + 1))):
        search = Watched(bench, n, 2, factor)
        bench.simulate(search, lambda job, score=score: (1.0, score * job.trial), workers=1)
        assert len(search.early[0]) == promoted


@pytest.mark.parametrize("seed", range(20))
def test_a_rung_that_no_longer_grows_promotes_its_best_and_no_more(seed: int) -> None:
    draw = np.random.default_rng(seed)
    n, factor = int(draw.integers(1, 30)), int(draw.integers(2, 5))
    held = {int(trial): float(score) for trial, score in zip(draw.permutation(n), draw.integers(0, 9, size=n), strict=True)}
    early = {int(trial) for trial in draw.permutation(n)[: draw.integers(0, n + 1)]}  # however many went before
    above, promoted = set(early), list[int]()
    while (job := promotable([held, {}], [set(held), above], factor)) is not None:
        above.add(job.trial)
        promoted.append(job.trial)
    best = sorted(held, key=lambda trial: (-held[trial], trial))[: n // factor]
    assert promoted == [trial for trial in best if trial not in early]


@pytest.mark.parametrize("trials", range(1, 21))
@pytest.mark.parametrize("workers", range(1, 5))
def test_a_search_ends_at_the_last_rung_if_any_trial_survives(bench: Any, trials: int, workers: int) -> None:
    reached = 0
    for seed in range(20):
        draw = np.random.default_rng([trials, workers, seed])
        run = outcomes(draw, trials, 4, failing=(0, 0.3, 0.6, 0.9)[seed % 4])
        search = Watched(bench, trials, 4, 2)
        jobs, _ = bench.simulate(search, run, workers)
        survivors = [one for one in range(trials) if all(run(Job(one, rung))[1] > FAILED for rung in range(4))]
        ended = any(score > FAILED for score in search.asha.scores[-1].values())
        assert ended == bool(survivors)
        assert len(jobs) <= trials * 4
        reached += ended
    assert reached >= 5
