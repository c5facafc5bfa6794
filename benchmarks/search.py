"""Does ASHA find what training every configuration in full finds, and for how many epochs? Replays of recorded curves.

    python benchmarks/search.py --curves docs/results/search-curves.json [--orders 200] [--budget EPOCHS] [--out FILE.md]

The curves are the search.json of `crossalign tune` with one rung: every configuration trained in full. They are replayed in a
simulated clock with --workers workers and in random orders, beside a random search that has the same epochs, rounded up to
whole trainings, and beside all in full. A configuration's score at the end of a rung is its best accuracy so far, as `adapt`
keeps its best epoch, or its loss there, as a text run keeps its last weights. Regret is what a search misses of the best
configuration that it could draw.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from crossalign.core.errors import UserError
from crossalign.core.progress import progress
from crossalign.runs.promotion import Job, end_game, promotable, resources
from crossalign.stats import Mean, mean_and_error

SUBSETS = 50
"""Of three quarters of the configurations: how far a result hangs on which configurations there were."""


class Search(Protocol):
    """Hands out work and learns how it went; ``idle``: nobody is training."""

    def next(self, idle: bool) -> Job | None: ...

    def done(self, job: Job, score: float) -> None: ...


class Asha:
    """ASHA over a number of trials, drawn in the order of their numbers. Once ``stopped`` it only sees one to the end."""

    def __init__(self, trials: int, rungs: int, factor: int = 2) -> None:
        self.trials, self.factor, self.stopped = trials, factor, False
        self.scores: list[dict[int, float]] = [{} for _ in range(rungs)]
        self.begun: list[set[int]] = [set() for _ in range(rungs)]

    def next(self, idle: bool) -> Job | None:
        job = None
        if not self.stopped:
            job = promotable(self.scores, self.begun, self.factor)
            if job is None and len(self.begun[0]) < self.trials:
                job = Job(len(self.begun[0]), 0)
        if job is None and idle:
            job = end_game(self.scores, self.begun)
        if job is not None:
            self.begun[job.rung].add(job.trial)
        return job

    def done(self, job: Job, score: float) -> None:
        self.scores[job.rung][job.trial] = score


def simulate(search: Search, run: Callable[[Job], tuple[float, float]], workers: int) -> tuple[list[Job], float]:
    """The jobs in the order they were handed out, and when the last one ended; ``run`` tells a job's duration and score.

    What ends at the same time is all told before more is handed out: only so can several trials be promotable at once.
    """
    clock, jobs = 0.0, list[Job]()
    running: list[tuple[float, int, Job, float]] = []
    while True:
        while len(running) < workers and (job := search.next(idle=not running)) is not None:
            duration, score = run(job)
            heapq.heappush(running, (clock + duration, len(jobs), job, score))  # of equal ends the one handed out first
            jobs.append(job)
        if not running:
            return jobs, clock
        clock = running[0][0]
        while running and running[0][0] == clock:
            _, _, job, score = heapq.heappop(running)
            search.done(job, score)


@dataclass(frozen=True)
class Curves:
    """Configurations trained in full.

    ``best``: (configurations, epochs), the score of a training that ends there, larger is better; -inf from where one failed.
    ``epochs``: (configurations,), those trained, fewer where one failed. ``seconds``: (configurations,), of an epoch.
    """

    best: np.ndarray
    epochs: np.ndarray
    seconds: np.ndarray
    points: float = 100.0
    """What a score is multiplied with in tables; negative for a loss."""

    def of(self, order: np.ndarray) -> Curves:
        return Curves(self.best[order], self.epochs[order], self.seconds[order], self.points)


def read_curves(file: Path) -> Curves:
    record = json.loads(file.read_text())
    trials, full = record["trials"], record["rungs"][-1]
    sign = 1 if record["larger_is_better"] else -1
    best = np.full((len(trials), full), -np.inf)
    for row, trial in zip(best, trials, strict=True):
        if trial["state"] != "failed" and len(trial["curve"]) != full:
            raise UserError(
                f"{file}: trial {trial['number']} has {len(trial['curve'])} of {full} {record['unit']}s; "
                "a replay needs every trial trained in full, so finish a search with --rungs 1"
            )
        curve = np.array(trial["curve"], dtype=float)
        scores = np.where(np.isfinite(curve), sign * curve, -np.inf)
        row[: len(curve)] = np.maximum.accumulate(scores) if sign > 0 else scores
        if trial["state"] == "failed":
            row[-1] = -np.inf
    if not np.isfinite(best[:, -1]).any():
        raise UserError(f"{file}: none of its {len(trials)} trials was trained in full; there is nothing to replay")
    epochs = np.array([len(trial["curve"]) for trial in trials])
    told = np.array([sum(rung["seconds"] for rung in trial["rungs"]) for trial in trials])
    seconds = told / np.maximum(epochs, 1)
    seconds[told == 0] = np.median(seconds[told > 0]) if told.any() else 1.0  # one that failed before its rung's end
    return Curves(best, epochs, seconds, points=100.0 if sign > 0 else -1.0)


@dataclass(frozen=True)
class Replay:
    """One order: the score and epochs of ASHA, of random search at these epochs, and of all in full; ASHA's time."""

    asha: float
    asha_epochs: int
    random: float
    random_epochs: int
    full: float
    full_epochs: int
    time: float


def replay(
    curves: Curves, rungs: list[int], factor: int = 2, workers: int = 2, budget: float = math.inf, clock: str = "epochs"
) -> Replay:
    """Search the configurations in the order in which they stand. After ``budget`` epochs nothing new begins, except that one
    is trained to the end where none was."""
    search, spent = Asha(len(curves.best), len(rungs), factor), 0

    def run(job: Job) -> tuple[float, float]:
        nonlocal spent
        begin, end = (rungs[job.rung - 1] if job.rung else 0), rungs[job.rung]
        trained = int(min(end, curves.epochs[job.trial]) - min(begin, curves.epochs[job.trial]))
        spent += trained
        search.stopped = spent >= budget
        duration = trained * (curves.seconds[job.trial] if clock == "seconds" else 1.0)
        return duration, float(curves.best[job.trial, end - 1])

    _, time = simulate(search, run, workers)
    ends, final = np.cumsum(curves.epochs), curves.best[:, -1]
    drawn = min(int(np.searchsorted(ends, spent)) + 1, len(ends))
    return Replay(
        asha=max(search.scores[-1].values(), default=-math.inf),
        asha_epochs=spent,
        random=float(final[:drawn].max()),
        random_epochs=int(ends[drawn - 1]),
        full=float(final.max()),
        full_epochs=int(ends[-1]),
        time=time,
    )


def difference_over_configurations(
    curves: Curves, once: Callable[[Curves], Replay], orders: int, draw: np.random.Generator
) -> tuple[int, Mean]:
    """ASHA minus random search for three quarters of the configurations, with the standard error that stems from which
    configurations there were, by the delete-d jackknife (Shao & Wu 1989): the variance over subsets of r of n, times
    r / (n - r). What the orders add to that variance is taken off; where it hides the rest, the error is None."""
    n = len(curves.best)
    kept = n - n // 4
    subsets = []
    with progress(SUBSETS, "subsets", unit="subset") as bar:
        for _ in range(SUBSETS):
            subset = draw.permutation(n)[:kept]
            runs = [once(curves.of(draw.permutation(subset))) for _ in range(orders)]
            subsets.append(mean_and_error([run.asha - run.random for run in runs]))
            bar.update(1)
    means, errors = np.array([one.mean for one in subsets]), np.array([one.error or 0.0 for one in subsets])
    variance = float(means.var(ddof=1) - np.mean(errors**2))
    error = math.sqrt(variance * kept / (n - kept)) if variance > 0 else None
    return kept, Mean(float(means.mean()), error, SUBSETS)


def table(runs: list[Replay], points: float, within: float) -> list[str]:
    """Markdown: a line a search, means ± standard errors over the orders; then the paired difference."""

    def told(values: np.ndarray, digits: int) -> str:
        found = mean_and_error(values)
        return f"{found.mean:.{digits}f}" + (f" ± {found.error:.{digits}f}" if found.error else "")

    lines = ["| search | score | epochs | of all | regret | within |", "| --- | ---: | ---: | ---: | ---: | ---: |"]
    lines[0] = lines[0].replace("within", f"within {within:g}")
    full, all_epochs = np.array([run.full for run in runs]), np.array([run.full_epochs for run in runs])
    for name, field in (("ASHA", "asha"), ("random search", "random"), ("all in full", "full")):
        score = np.array([getattr(run, field) for run in runs])
        epochs = np.array([getattr(run, f"{field}_epochs") for run in runs])
        regret = (full - score) * abs(points)
        cells = [told(score * points, 2), told(epochs, 0), f"{(epochs / all_epochs).mean():.1%}", told(regret, 2)]
        lines.append(f"| {name} | {' | '.join(cells)} | {(regret <= within + 1e-9).mean():.0%} |")
    difference = np.array([run.asha - run.random for run in runs]) * abs(points)
    lines += ["", f"ASHA − random search, larger is better for ASHA, same order and epochs: {told(difference, 2)}; "]
    lines[-1] += f"better in {(difference > 0).mean():.0%}, equal in {(difference == 0).mean():.0%} of {len(runs)} orders."
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--curves", type=Path, default=Path("docs/results/search-curves.json"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--orders", type=int, default=200)
    parser.add_argument("--rungs", type=int, default=4)
    parser.add_argument("--factor", type=int, default=2)
    parser.add_argument("--trials", type=int, help="how many configurations a search draws (default: all)")
    parser.add_argument("--budget", type=float, default=math.inf, help="ASHA begins nothing new after this many epochs")
    parser.add_argument("--clock", choices=("epochs", "seconds"), default="epochs", help="what takes time in the replay")
    parser.add_argument("--within", type=float, default=0.5, help="regret that is good enough: points, or units of a loss")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()

    if not options.curves.is_file():
        raise SystemExit(f"no curves at {options.curves}; name the search.json of a search with --rungs 1 by --curves")
    try:
        curves = read_curves(options.curves)
        trials, full = options.trials or len(curves.best), curves.best.shape[1]
        rungs = resources(full, options.rungs, options.factor)
    except UserError as error:
        raise SystemExit(str(error)) from error

    def once(drawn: Curves) -> Replay:
        return replay(drawn, rungs, options.factor, options.workers, options.budget, options.clock)

    draw, runs = np.random.default_rng(options.seed), []
    with progress(options.orders, "orders", unit="order") as bar:
        for _ in range(options.orders):
            runs.append(once(curves.of(draw.permutation(len(curves.best))[:trials])))
            bar.update(1)
    lines = [
        f"{trials} of {len(curves.best)} configurations, rungs {', '.join(map(str, rungs))}, factor {options.factor}, "
        f"{options.workers} workers, {options.orders} orders"
        + (f", stopped after {options.budget:.0f} epochs" if options.budget < math.inf else "")
        + f"; ASHA ends at {np.mean([run.time for run in runs]):.0f} {options.clock} of the clock.",
        "",
        *table(runs, curves.points, options.within),
        "",
        "Every replay uses the same curves: ± above speaks of the order alone.",
    ]
    if len(curves.best) >= 8 and options.trials is None:
        kept, found = difference_over_configurations(curves, once, max(2, options.orders // 5), draw)
        scale = abs(curves.points)
        told = "unknown, lost in that of the orders" if found.error is None else f"{found.error * scale:.2f}"
        lines[-1] += f" Searches of {kept} of them: difference {found.mean * scale:.2f}, with a standard error over which "
        lines[-1] += f"configurations there were of {told} (jackknife, {SUBSETS} subsets)."
    text = "\n".join(lines) + "\n"
    print(text)
    if options.out:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
