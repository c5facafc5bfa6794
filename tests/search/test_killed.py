"""Whole searches that are killed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

CALL = [sys.executable, "-m", "crossalign.cli", "tune", "small-fpt", "--tracking.no-mlflow", "--seeds", "1"]
SPACE = "optim.lr: {low: 1.0e-4, high: 1.0e-2, log: true}\noptim.weight_decay: [0.0, 0.1]\n"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


def call(folder: Path, tiny: tuple[str, ...], *more: str) -> list[str]:
    space = folder.parent / "space.yaml"
    space.write_text(SPACE)
    return [*CALL, "--output", str(folder), "--space", str(space), "--rungs", "3", *more, "--set", *tiny]


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "search.json").read_text())  # type: ignore[no-any-return]


def told(folder: Path) -> list[tuple[Any, ...]]:
    """What must be the same: settings, curves and states of all trials."""
    return [(t["settings"], t["curve"], t["state"], [r["score"] for r in t["rungs"]]) for t in record(folder)["trials"]]


def size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def children(pid: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False).stdout.split()
    return [int(child) for child in found]


def test_a_search_killed_five_times_ends_as_if_it_had_not_been(tiny: tuple[str, ...], tmp_path: Path) -> None:
    digits = (*(key for key in tiny if "data." not in key and "batch_size" not in key), "data.source=sklearn:digits")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    args = ("--trials", "16", "--keep-checkpoints")
    started = time.monotonic()
    subprocess.run(call(whole, digits, *args), check=True, capture_output=True)
    seconds = time.monotonic() - started
    draw, kills = random.Random(), 0
    for _ in range(5):
        search = subprocess.Popen(call(killed, digits, *args), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        journal, before = killed / "journal.log", size(killed / "journal.log")
        while search.poll() is None and size(journal) == before:
            time.sleep(0.1)  # until it has gone on
        time.sleep(draw.uniform(0.0, 0.15) * seconds)
        workers = children(search.pid)
        if search.poll() is None:
            os.kill(search.pid, signal.SIGKILL)
            kills += 1
        search.wait()
        until = time.monotonic() + 70
        while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < until:
            time.sleep(0.2)  # they save, and die with their parent
        assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    subprocess.run(call(killed, digits, *args), check=True, capture_output=True)
    assert kills == 5, "the search was over before it could be killed as often"
    assert told(killed) == told(whole) and record(killed)["winner"] == record(whole)["winner"]
    for trial in record(killed)["trials"]:  # no epoch twice in the log, none lost
        rows = (killed / "trials" / f"{trial['number']:04d}" / "metrics.jsonl").read_text().splitlines()
        epochs = [json.loads(row)["epoch"] for row in rows if json.loads(row)["split"] == "validation"]
        assert epochs == list(range(1, len(trial["curve"]) + 1))


def test_ctrl_c_saves_and_tells_and_the_same_command_goes_on(tiny: tuple[str, ...], tmp_path: Path) -> None:
    folder = tmp_path / "stopped"
    args = call(folder, tiny, "--trials", "12", "--workers", "2", "--threads", "1")
    search = subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not (folder / "journal.log").exists() or (folder / "journal.log").read_text().count("scores") < 3:
        assert search.poll() is None
        time.sleep(0.1)
    os.killpg(search.pid, signal.SIGINT)  # as a terminal does: to the workers too
    out, err = search.communicate(timeout=40)  # not as long as the patience with a worker that does not save
    assert search.returncode == 130 and "the same command goes on" in err
    assert "Traceback" not in err and "leaked" not in err
    assert "The search is not over" in out
    subprocess.run(args, check=True, capture_output=True)
    assert len(record(folder)["trials"]) == 12 and len(list(folder.glob("winner/*/result.json"))) == 1
