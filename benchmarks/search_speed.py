"""What a search costs beside its training, and what a second worker brings.

    python benchmarks/search_speed.py [--trials 16] [--epochs 16] [--set backbone.ref=FOLDER …] [--out FILE.md]

The recipe is small-fpt on scikit-learn's digits, with one batch size, so that all epochs cost the same; one thread a worker.
An epoch's own cost, with its validation and its checkpoint, is measured by plain `crossalign adapt`: what a run of --epochs takes
more than one of a quarter of them, with as many such runs side by side as the search has workers. A search's overhead is the
wall clock of the whole command, times its workers, less its epochs at that cost: starting Python and the workers, opening data
and model for each job, pausing, the journal, MLflow, the page. Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from crossalign.environment import environment

CALL = [sys.executable, "-m", "crossalign.cli"]
FIXED = ["loop.batch_size=64", "loop.precision=fp32"]


def seconds(commands: list[list[str]], folder: Path) -> float:
    """Wall clock of commands side by side in ``folder``, one thread each."""
    started = time.perf_counter()
    running = [
        subprocess.Popen(c, cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for c in commands
    ]
    for process in running:
        _, errors = process.communicate()
        if process.returncode:
            raise SystemExit(errors.decode()[-2000:])
    return time.perf_counter() - started


def epoch_seconds(side_by_side: int, epochs: int, settings: list[str], folder: Path) -> float:
    """What one more epoch costs a run of small-fpt, with so many runs side by side."""
    options = [word for text in settings for word in (f"--{text.partition('=')[0]}", text.partition("=")[2])]

    def taken(count: int) -> float:
        place = [str(folder / f"straight-{side_by_side}-{count}-{i}") for i in range(side_by_side)]
        return seconds(
            [[*CALL, "adapt", "small-fpt", "--output", path, *options, "--loop.epochs", str(count)] for path in place], folder
        )

    return (taken(epochs) - taken(epochs // 4)) / (epochs - epochs // 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--set", nargs="*", default=[], help="settings of every run, as key=value")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    settings = [*FIXED, *options.set]
    lines = [
        f"{options.trials} trials of small-fpt on the digits, {options.epochs} epochs, {', '.join(settings)}; "
        f"{environment()['cpu']}, one thread a worker; one run each.",
        "",
        "| workers | s an epoch | epochs | search, s | trials an hour | overhead a trial, s |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    rates = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        epoch_seconds(1, 4, settings, folder)  # fills the caches
        for workers in (1, 2):
            epoch = epoch_seconds(workers, options.epochs, settings, folder)
            found = folder / f"search-{workers}"
            command = [*CALL, "tune", "small-fpt", "--trials", str(options.trials), "--seeds", "0", "--threads", "1"]
            command += ["--workers", str(workers), "--output", str(found), "--set", f"loop.epochs={options.epochs}", *settings]
            wall = seconds([command], folder)
            spent = json.loads((found / "search.json").read_text())["epochs"]
            rates.append(options.trials / wall * 3600)
            overhead = (wall * workers - spent * epoch) / options.trials
            lines.append(f"| {workers} | {epoch:.3f} | {spent} | {wall:.1f} | {rates[-1]:.0f} | {overhead:.2f} |")
    lines += ["", f"Two workers search {rates[1] / rates[0]:.2f} times as many trials an hour as one."]
    text = "\n".join(lines) + "\n"
    print(text)
    if options.out:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
