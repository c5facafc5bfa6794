"""The winner of a search, trained again."""

from __future__ import annotations

import dataclasses
import shutil
from collections import Counter
from pathlib import Path

import yaml

from crossalign.core.progress import progress
from crossalign.recipes.space import Config
from crossalign.runs.folder import differences
from crossalign.runs.names import RunFolder, SearchFolder
from crossalign.studies.search.drive import DEATHS, results_of
from crossalign.studies.search.session import SearchSession
from crossalign.studies.workers import WorkerPool


def train_winner(search: SearchSession, trial: int, pool: WorkerPool) -> list[str]:
    """Train a trial's settings with seeds that chose nothing, to the end; only these runs score the test set.

    Runs of an earlier winner, whom a longer search has overtaken, are deleted. Returns what failed, a sentence a run.

    Raises:
        Interrupted: see :func:`results_of`.
    """
    for folder in sorted(SearchFolder(search.home).winner.glob("seed-*")):
        file, config = RunFolder(folder).config, seeded(search, trial, int(folder.name.removeprefix("seed-")))
        if not file.is_file() or differences(config, yaml.safe_load(file.read_text(encoding="utf-8"))):
            shutil.rmtree(folder)
    chose = search.base.seed
    configs = [seeded(search, trial, seed) for seed in range(chose + 1, chose + 1 + search.config.seeds)]
    waiting = [search.work(config) for config in configs if not RunFolder(config.output).result.is_file()]
    if configs:
        search.journal.mark_scored(trial)
    failed, deaths = [], Counter[Path]()
    with progress(len(waiting), "winner's seeds", unit="run") as bar:
        for work, result in results_of(pool, lambda flying: waiting.pop(0) if waiting else None):
            deaths[work.config.output] += bool(result.died)
            if result.died and deaths[work.config.output] < DEATHS:
                waiting.append(work)
                continue
            if result.reason or result.died:
                failed.append(f"seed {work.config.seed} of the winner failed: {result.reason or result.died}")
            bar.update(1)
    return failed


def seeded(search: SearchSession, trial: int, seed: int) -> Config:
    """A trial's settings for one of the final runs."""
    return dataclasses.replace(search.settled(trial), seed=seed, output=SearchFolder(search.home).winner / f"seed-{seed}")
