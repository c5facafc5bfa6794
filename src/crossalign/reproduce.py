"""``reproduce``: run a whole table. Each row gets the same sweep of learning rates on validation, then its seeds.

Every run is a run folder of its own, so a study that was stopped goes on where it was, and ``report`` reads what is there.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import yaml

from crossalign.cache import write_json
from crossalign.config import AdaptConfig, update
from crossalign.environment import command_line, usable_cores
from crossalign.errors import UserError, unknown
from crossalign.recipes import get_recipe
from crossalign.recipes.cmda import CONTROLS, METHODS, METRICS
from crossalign.training.run import differences

TABLE1 = [m if a == "none" else f"{m}-{a}" for m in METHODS for a in METRICS] + list(CONTROLS)
STUDIES: dict[str, tuple[str, list[str]]] = {
    "cmda-table1": ("CMDA Table 1, with cosine and the controls", TABLE1),
    "quickstart": ("MiniLM learns to read digits", ["fpt", "fpt-random", "lora", "lora-mmd", "full", "full-random"]),
}


@dataclasses.dataclass(frozen=True)
class Job:
    """One run of a study."""

    name: str
    recipe: str
    config: AdaptConfig


def reproduce(
    study: str,
    output: Path,
    *,
    scale: str = "small",
    seeds: int = 3,
    lrs: tuple[float, ...] = (),
    sweep_epochs: int = 0,
    workers: int = 1,
    settings: tuple[str, ...] = (),
    only: tuple[str, ...] = (),
) -> int:
    """Run ``study`` into ``output`` and write its report; returns 0, or 1 if a run failed (the others still finish).

    Raises:
        UserError: unknown study, row or setting; all before the first run.
    """
    if study not in STUDIES:
        raise unknown("study", study, STUDIES)
    title, rows = STUDIES[study]
    for row in only:
        if row not in rows:
            raise unknown("row", row, rows)
    rows = [row for row in rows if not only or row in only]
    prefix = "small" if scale == "small" else "cmda"
    if prefix == "cmda" and study == "cmda-table1" and not only:
        rows.append("fpt-matched")
    base = {row: configured(f"{prefix}-{row}", settings) for row in rows}
    for row, config in base.items():
        if config.tracking.mlflow and not config.tracking.mlflow_uri:  # one store for all runs, which lie in many folders
            tracking = dataclasses.replace(config.tracking, mlflow_uri=f"sqlite:///{(output / 'mlflow.db').resolve()}")
            base[row] = dataclasses.replace(config, tracking=tracking)
    titles = [base[row].row for row in rows]
    from crossalign.data.images import open_images
    from crossalign.models.language import open_language_model

    for data in {repr(config.data): config.data for config in base.values()}.values():
        open_images(data)  # what is wrong with the data is said once, before any run, and no worker decodes them again
    for ref in {config.backbone.ref for config in base.values()}:
        open_language_model(ref, weights=False)
    _write_study(output, title, titles, settings)
    sweep = [
        Job(f"sweep/{row}/lr-{lr:g}", f"{prefix}-{row}", _sweep_config(base[row], output, row, lr, sweep_epochs))
        for lr in lrs
        for row in rows
    ]
    found, failed = _run_all(sweep, workers)
    best = _choose(rows, base, sweep, found, output)
    rows = [row for row in rows if row in best or not lrs]  # a row whose sweep failed has no learning rate of its own
    finals = []
    for seed in range(seeds):
        for row in rows:
            optim = dataclasses.replace(base[row].optim, lr=best.get(row, base[row].optim.lr))
            config = dataclasses.replace(base[row], seed=seed, optim=optim, output=output / row / f"seed-{seed}")
            config.overwrite = bool(lrs) and _differs_in_rate_alone(config)
            finals.append(Job(f"{row}/seed-{seed}", f"{prefix}-{row}", config))
    done, failed_finals = _run_all(finals, workers)
    for name, reason in (failed | failed_finals).items():
        print(f"failed: {name}: {reason}", file=sys.stderr)
    if done:
        _show(output)
    return 1 if failed or failed_finals else 0


def quickstart(output: Path) -> int:
    """The main job in minutes: six rows on digits, one seed, no hub; prints the table and the page's path."""
    print("MiniLM, a language model that never saw an image, learns to read 8 × 8 digits; controls have random weights.")
    return reproduce("quickstart", output, seeds=1, workers=1)


def configured(recipe: str, settings: tuple[str, ...]) -> AdaptConfig:
    """The recipe with ``key=value`` settings put in; raises UserError for a key that does not exist."""
    config = get_recipe(recipe).make()
    for setting in settings:
        key, sign, text = setting.partition("=")
        if not sign:
            raise UserError(f"--set {setting}: write key=value, such as loop.epochs=5")
        if key == "backbone.ref":  # a control keeps its kind of weights: random:REF and so on
            kind = config.backbone.ref.split(":")[0]
            if text.split(":")[0] in ("random", "shuffled", "none", "vit"):
                raise UserError(
                    f"--set {setting}: name the pretrained model; the control rows put '{text.split(':')[0]}:' to it"
                )
            text = f"{kind}:{text}" if kind in ("random", "shuffled", "none", "vit") else text
        value: Any = yaml.safe_load(text)
        for part in reversed(key.split(".")):
            value = {part: value}
        config = update(config, value)
    return config


def _sweep_config(config: AdaptConfig, output: Path, row: str, lr: float, epochs: int) -> AdaptConfig:
    return dataclasses.replace(
        config,
        output=output / "sweep" / row / f"lr-{lr:g}",
        optim=dataclasses.replace(config.optim, lr=lr),
        loop=dataclasses.replace(config.loop, epochs=epochs or config.loop.epochs),
        score_test=False,
    )


def _choose(
    rows: list[str], base: dict[str, AdaptConfig], sweep: list[Job], found: dict[str, dict[str, Any]], output: Path
) -> dict[str, float]:
    """The learning rate of each row with the best validation accuracy; the whole sweep goes into sweep.json."""
    best: dict[str, float] = {}
    table = []
    for row in rows:
        tried = [(found[j.name], j) for j in sweep if j.name in found and j.name.split("/")[1] == row]
        if not tried:
            continue
        top = max(tried, key=lambda pair: pair[0]["validation"]["accuracy"])[1]
        best[row] = top.config.optim.lr
        for result, job in tried:
            table.append(
                {
                    "row": base[row].row,
                    "learning_rate": job.config.optim.lr,
                    "validation_accuracy": result["validation"]["accuracy"],
                    "epochs": job.config.loop.epochs,
                    "chosen": job is top,
                }
            )
    if table:
        write_json(output / "sweep.json", table)
    return best


def _run_all(jobs: list[Job], workers: int) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Run every job; results and the reasons of failures, by name. A failed run costs no other."""
    from tqdm import tqdm

    found: dict[str, dict[str, Any]] = {}
    failed: dict[str, str] = {}
    if not jobs:
        return found, failed
    if workers == 1:
        for job in tqdm(jobs, desc="runs", unit="run", disable=len(jobs) == 1):
            _record(job, lambda job=job: _run_job(job), found, failed)
        return found, failed
    threads = max(1, usable_cores() // workers)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(threads,)) as pool:
        futures: dict[Future[dict[str, Any]], Job] = {pool.submit(_run_job, job): job for job in jobs}
        try:
            for future in tqdm(as_completed(futures), total=len(jobs), desc="runs", unit="run"):
                _record(futures[future], future.result, found, failed)
        except BaseException:  # Ctrl-C reaches the workers too, which save; nothing new is to begin
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return found, failed


def _record(job: Job, result: Any, found: dict[str, dict[str, Any]], failed: dict[str, str]) -> None:
    from crossalign.training.loop import Interrupted

    try:
        found[job.name] = result()
    except (Interrupted, KeyboardInterrupt):
        raise
    except Exception as error:
        failed[job.name] = f"{type(error).__name__}: {error}"


def _run_job(job: Job) -> dict[str, Any]:
    from crossalign.adapt import adapt

    return adapt(job.config, recipe=job.recipe, quiet=True)


def _start_worker(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    threading.Thread(target=_die_with_parent, args=(os.getppid(),), daemon=True).start()


def _die_with_parent(parent: int) -> None:
    """Stop, and save, when the process that hands out the runs is gone; nobody would read the results."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60.0)  # for the step and the checkpoint; then whatever still goes on is stopped
    os._exit(1)


def _write_study(output: Path, title: str, titles: list[str], settings: tuple[str, ...]) -> None:
    """study.json; rows and commands of earlier calls stay in it."""
    file = output / "study.json"
    old = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"rows": [], "commands": []}
    rows = titles + [row for row in old["rows"] if row not in titles]
    commands = [*old["commands"], *({command_line()} - set(old["commands"]))]
    note = "Settings of every row: " + ", ".join(settings) if settings else ""
    write_json(file, {"title": title, "rows": rows, "commands": commands, "note": note})


def _differs_in_rate_alone(config: AdaptConfig) -> bool:
    """Whether a run at another learning rate lies there: a wider sweep that finds a better one replaces it."""
    file = config.output / "config.yaml"
    if not file.is_file():
        return False
    saved = yaml.safe_load(file.read_text(encoding="utf-8"))
    return [key for key, _, _ in differences(config, saved)] == ["optim.lr"]


def _show(output: Path) -> None:
    from crossalign.report import report, summary_table

    print(summary_table([output]))
    print(f"report: {report([output], html=output / 'report.html', markdown=None)}")
