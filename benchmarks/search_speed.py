"""What a search costs beside its training, and what a second worker brings.

    python benchmarks/search_speed.py [--trials 16] [--epochs 16] [--repeats 1] [--set backbone.ref=FOLDER …] [--out FILE.md]

The recipe is small-fpt on scikit-learn's digits, one thread a worker. Rates are of the whole command, Python's
start included. Overhead is what a trial costs beside its epochs with their validation and checkpoints, in a worker's seconds:

- in a job: after the search every trial is given to the same number of warm workers once more, to be trained as far as it is
  already. Such a job opens data, model and checkpoint, and pauses; it is timed, times the jobs that a trial had on average.
- between jobs: the search's wall clock times its workers, less the time of its jobs: the rule, the journal, MLflow, passing
  jobs to and fro, a worker that is still starting, and one that has nothing left to do at the end.

Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from crossalign.config import AdaptConfig, update
from crossalign.core.machine import environment
from crossalign.runs.names import SearchFolder
from crossalign.studies.search.jobs import Work, train
from crossalign.studies.workers import Workers


def search(workers: int, options: argparse.Namespace, folder: Path) -> float:
    """Seconds of one call."""
    command = [sys.executable, "-m", "crossalign.cli", "tune", "small-fpt", "--trials", str(options.trials), "--seeds", "0"]
    command += ["--threads", "1", "--workers", str(workers), "--output", str(folder), "--keep-checkpoints"]
    command += ["--set", f"loop.epochs={options.epochs}", "loop.precision=fp32", *options.set]
    started = time.perf_counter()
    ended = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, check=False)
    if ended.returncode:
        raise SystemExit(ended.stderr.decode()[-2000:])
    return time.perf_counter() - started


def seconds_of_a_job(workers: int, folder: Path) -> float:
    """What a job takes that has nothing to train, with ``workers`` of them side by side."""
    works = []
    for trial in json.loads((folder / "search.json").read_text())["trials"]:
        config = update(
            AdaptConfig(), yaml.safe_load((folder / "trials" / f"{trial['number']:04d}" / "config.yaml").read_text())
        )
        config = dataclasses.replace(config, tracking=dataclasses.replace(config.tracking, mlflow=False))
        works.append(Work(config, "small-fpt", len(trial["curve"]), folder, SearchFolder(folder).token.read_text()))
    pool, taken = Workers(workers, 1), list[float]()
    try:
        for round_of in (works[:workers], works):  # the first warms them up
            for start in range(0, len(round_of), workers):
                futures = [pool.submit(train, work) for work in round_of[start : start + workers]]
                outcomes = [future.result() for future in futures]
                assert all(len(done.curve) == work.until for done, work in zip(outcomes, round_of[start:], strict=False))
                taken += [done.seconds for done in outcomes] if round_of is works else []
    finally:
        pool.shutdown()
    return sum(taken) / len(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--set", nargs="*", default=[], help="settings of every run, as key=value")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    lines = [
        f"{options.trials} trials of small-fpt on the digits, {options.epochs} epochs; {environment()['cpu']}.",
        "",
        "| workers | epochs | search, s | trials an hour | jobs a trial | in jobs, s a trial | between jobs, s a trial |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    rates: dict[int, list[float]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as name:
        for repeat in range(options.repeats):
            for workers in (1, 2) if repeat % 2 else (2, 1):
                folder = Path(name) / f"search-{workers}-{repeat}"
                wall = search(workers, options, folder)
                record = json.loads((folder / "search.json").read_text())
                in_jobs = [rung["seconds"] for trial in record["trials"] for rung in trial["rungs"]]
                jobs, between = len(in_jobs) / options.trials, (record["seconds"] * workers - sum(in_jobs)) / options.trials
                rates[workers].append(options.trials / wall * 3600)
                cells = [f"{workers}", f"{record['epochs']}", f"{wall:.1f}", f"{rates[workers][-1]:.0f}", f"{jobs:.2f}"]
                cells += [f"{seconds_of_a_job(workers, folder) * jobs:.2f}", f"{between:.2f}"]
                lines.append(f"| {' | '.join(cells)} |")
    ratios = [two / one for one, two in zip(rates[1], rates[2], strict=True)]
    lines += ["", f"Two workers against one, trials an hour: {', '.join(f'{ratio:.2f}' for ratio in ratios)} times as many."]
    text = "\n".join(lines) + "\n"
    print(text)
    if options.out:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
