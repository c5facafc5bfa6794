"""The winner of a search, trained again."""

from __future__ import annotations

import dataclasses
import shutil
from collections import Counter
from collections.abc import Collection
from pathlib import Path

import yaml

from crossalign.config import AdaptConfig
from crossalign.core.progress import progress
from crossalign.runs.folder import differences
from crossalign.runs.names import RunFolder, SearchFolder
from crossalign.studies.search.drive import DEATHS, SearchSession, results_of
from crossalign.studies.search.jobs import Config, Work
from crossalign.studies.workers import WorkerPool


def train_winner(search: SearchSession, trial: int, pool: WorkerPool) -> list[str]:
    """Train a trial's settings with seeds that chose nothing, to the end; only these runs score the test set.

    Runs of an earlier winner, whom a longer search has overtaken, are deleted. Returns what failed, a sentence a run.

    Raises:
        Interrupted: see :func:`results_of`.
    """
    _drop_overtaken(search, trial)
    configs = [seeded(search, trial, seed) for seed in range(1, search.config.seeds + 1)]
    waiting = [_work(search, config) for config in configs if not RunFolder(config.output).result.is_file()]
    if configs:
        search.journal.mark_scored(trial)
    failed, deaths = [], Counter[Path]()

    def more(flying: Collection[Work]) -> Work | None:
        return waiting.pop(0) if waiting else None

    with progress(len(waiting), "winner's seeds", unit="run") as bar:
        for work, result in results_of(pool, more):
            deaths[work.config.output] += bool(result.died)
            if result.died and deaths[work.config.output] < DEATHS:
                waiting.append(work)
                continue
            if result.reason or result.died:
                failed.append(f"seed {work.config.seed} of the winner failed: {result.reason or result.died}")
            bar.update(1)
    return failed


def seeded(search: SearchSession, trial: int, seed: int) -> Config:
    """A trial's settings for one of the final runs; ``seed`` counts from 1, as the base's own is the one that chose."""
    config = search.settled(trial)
    seed += config.seed
    config = dataclasses.replace(config, seed=seed, output=SearchFolder(search.home).winner / f"seed-{seed}")
    return dataclasses.replace(config, score_test=True) if isinstance(config, AdaptConfig) else config


def _drop_overtaken(search: SearchSession, trial: int) -> None:
    for folder in sorted(SearchFolder(search.home).winner.glob("seed-*")):
        file, seed = RunFolder(folder).config, int(folder.name.removeprefix("seed-")) - search.config.seed
        if not file.is_file() or differences(seeded(search, trial, seed), yaml.safe_load(file.read_text(encoding="utf-8"))):
            shutil.rmtree(folder)


def _work(search: SearchSession, config: Config) -> Work:
    return Work(config, search.recipe, None, search.home, search.token, threads=search.config.threads)
