"""What a worker does: train one trial's run folder to the end of a rung, and tell what came of it.

A worker that sees the search's folder trains there. One that does not, on a host of a cluster that shares no disk, keeps a copy
of the trial's folder of its own; checkpoints then travel with the jobs and their outcomes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import os
import shutil
import tarfile
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from crossalign.cache import cache_dir
from crossalign.config import AdaptConfig, FinetuneConfig, PretrainConfig
from crossalign.errors import UserError
from crossalign.progress import silence
from crossalign.training.run import InUse
from crossalign.training.stops import DiskFull, Diverged, Interrupted, Paused
from crossalign.training.tracking import METRICS_FILE
from crossalign.workers import ORPHAN_SECONDS, orphaned, run_verb

Config = AdaptConfig | PretrainConfig | FinetuneConfig
TOKEN = "search.id"
NOT_SHIPPED = (".lock", "mlflow.db", "mlartifacts")
_alone = threading.Lock()  # a Dask worker may have several threads, and a process trains one model at a time


@dataclasses.dataclass(frozen=True)
class Work:
    """Train ``config`` to the end of epoch ``until``, or to its end and result."""

    config: Config
    recipe: str
    until: int | None
    home: Path
    """The search's folder."""
    token: str
    """What ``search.id`` holds there."""
    files: bytes | None = None
    """The run's folder, for a worker that shares no disk with the search and has asked for it."""
    done: int = 0
    """Epochs that the search has of the run: a worker's own copy that holds fewer will not do."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of a job."""

    curve: list[float] = dataclasses.field(default_factory=list)
    """The validation number after each epoch from the first on."""
    score: float = 0.0
    """Larger is better."""
    seconds: float = 0.0
    """Wall clock of this job."""
    reason: str = ""
    """Why the trial failed; empty if it did not."""
    bad_input: bool = False
    """Whether it failed by a sentence about the settings."""
    died: str = ""
    """How the worker itself came to an end."""
    stopped: str = ""
    """Why the whole search must stop: the worker was told to, or the disk is full."""
    wants_files: bool = False
    """The worker shares no disk with the search, and lacks the trial's folder."""
    files: bytes | None = None
    """The run's folder, from such a worker."""


def watched(config: Config) -> tuple[str, bool]:
    """The validation number that a search looks at, and whether larger is better: accuracy, or the loss of a text run."""
    return ("accuracy", True) if isinstance(config, AdaptConfig) else ("loss", False)


def train(work: Work) -> Outcome:
    """Do a job. It raises nothing: an exception of the future then means that the worker itself came to an end."""
    if orphaned.is_set():  # what was queued for this worker is not to begin
        os._exit(1)
    silence()
    started = time.monotonic()
    with _alone:
        if _shares(work):
            done = _patiently(work)
        else:
            mine = cache_dir("search") / work.token / work.config.output.relative_to(work.home)
            if work.files is None and len(validations(mine)) < work.done:
                return Outcome(wants_files=True)
            if work.files is not None:
                unpack(work.files, mine)
            tracking = dataclasses.replace(work.config.tracking, mlflow=False)
            config = dataclasses.replace(work.config, output=mine, tracking=tracking)
            done = dataclasses.replace(_patiently(dataclasses.replace(work, config=config)), files=pack(mine))
    return dataclasses.replace(done, seconds=time.monotonic() - started)


def pack(folder: Path) -> bytes:
    """A folder's content as one archive."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
            if path.is_file() and not set(path.relative_to(folder).parts) & set(NOT_SHIPPED):
                archive.add(path, str(path.relative_to(folder)))
    return buffer.getvalue()


def unpack(files: bytes, folder: Path) -> None:
    """Put what :func:`pack` made in the place of ``folder``."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with tarfile.open(fileobj=io.BytesIO(files)) as archive:
        archive.extractall(folder, filter="data")


def _shares(work: Work) -> bool:
    """Whether this process sees the very folder of the search, not another host's of the same name."""
    try:
        return (work.home / TOKEN).read_text(encoding="utf-8") == work.token
    except OSError:
        return False


def _patiently(work: Work) -> Outcome:
    """The outcome, once a worker of a search that was killed has saved and let go of the folder."""
    until = time.monotonic() + 2 * ORPHAN_SECONDS
    while True:
        try:
            return _outcome(work)
        except InUse as error:
            if time.monotonic() > until:
                return Outcome(stopped=str(error))
            time.sleep(0.5)


def _outcome(work: Work) -> Outcome:
    name, larger = watched(work.config)
    try:
        run_verb(work.config, work.recipe, work.until)
    except Paused as paused:
        curve = [numbers[name] for numbers in paused.result.history]
        if not curve:
            return Outcome()
        score = max(curve) if larger else -curve[-1]  # adapt keeps its best epoch, a text run its last weights
        return Outcome(curve, score) if math.isfinite(score) else Outcome(reason=f"the validation {name} is {score}")
    except InUse:
        raise
    except (Interrupted, DiskFull) as error:
        return Outcome(stopped=str(error))
    except UserError as error:
        return Outcome(reason=str(error), bad_input=True)
    except Diverged as error:
        return Outcome(_curve(work.config.output, name), reason=str(error))
    except Exception as error:
        trace = work.config.output.with_suffix(".error.txt")
        trace.write_text(traceback.format_exc(), encoding="utf-8")
        told = "out of memory" if _is_memory(error) else type(error).__name__
        return Outcome(_curve(work.config.output, name), reason=f"{told}: {' '.join(str(error).split())[:300]}")
    return Outcome()


def _is_memory(error: Exception) -> bool:
    import torch

    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _curve(folder: Path, name: str) -> list[float]:
    return [row[name] for row in validations(folder) if isinstance(row.get(name), float)]


def validations(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl that hold the validation of its training stage, one an epoch."""
    found: dict[int, dict[str, Any]] = {}
    with contextlib.suppress(FileNotFoundError), (folder / METRICS_FILE).open(encoding="utf-8") as lines:
        for line in lines:
            if line.endswith("\n") and (row := json.loads(line))["stage"] == "train" and row["split"] == "validation":
                found[row["epoch"]] = row
    return [found[epoch] for epoch in sorted(found)]
