"""Records of searches that the real rule of promotion made of synthetic curves."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from crossalign.runs.promotion import Job, end_game, promotable, resources

Record = dict[str, Any]
SPACE: dict[str, Any] = {
    "optim.lr": {"low": 1e-5, "high": 1e-2, "log": True},
    "optim.weight_decay": {"low": 0.0, "high": 0.1, "log": False},
    "loop.batch_size": {"choices": [16, 32, 64, 128]},
    "tune.method": {"choices": ["lora", "fpt"]},
    "tune.lora_rank": {"choices": [4, 8], "when": "tune.method == lora"},
}


def draw_settings(draw: np.random.Generator) -> Record:
    settings: Record = {"optim.lr": float(10 ** draw.uniform(-5, -2)), "optim.weight_decay": float(draw.uniform(0, 0.1))}
    settings |= {"loop.batch_size": int(draw.choice([16, 32, 64, 128])), "tune.method": str(draw.choice(["lora", "fpt"]))}
    return settings | ({"tune.lora_rank": int(draw.choice([4, 8]))} if settings["tune.method"] == "lora" else {})


def curve_of(settings: Record, epochs: int, draw: np.random.Generator, loss: bool) -> list[float]:
    """Best at a learning rate of 1e-3; larger batches are slower."""
    off = math.log10(settings["optim.lr"] / 1e-3)
    top, speed = 0.75 - 0.12 * off**2, 12 / settings["loop.batch_size"] ** 0.25
    values = [top * (1 - math.exp(-epoch / speed)) + float(draw.normal(0, 0.008)) for epoch in range(1, epochs + 1)]
    return [3.5 - 2 * value if loss else max(0.05, value) for value in values]


def make_search(
    folder: Path, trials: int = 64, *, rungs: int = 4, most: int = 50, stop_after: int = 10**6, loss: bool = False,
    fail: Callable[[int], int] = lambda number: 1 if number % 16 == 7 else 99, seed: int = 0, row: str = "LoRA",
    asked: int | None = None,
) -> Record:  # fmt: skip
    """A search by ASHA, one worker, as its record on disk. ``fail``: the rung, from 1, in which a trial fails."""
    draw = np.random.default_rng(seed)
    ends, sign = resources(most, rungs), -1 if loss else 1
    held, scores, begun = list[Record](), [dict[int, float]() for _ in ends], [set[int]() for _ in ends]
    for done in range(10**6):
        job = promotable(scores, begun)
        if job is None and len(held) < trials:
            settings = draw_settings(draw)
            new: Record = {"number": len(held), "settings": settings, "whole": curve_of(settings, most, draw, loss)}
            held.append(new | {"rungs": [], "curve": [], "state": "training", "reason": ""})
            job = Job(len(held) - 1, 0)
        job = job or end_game(scores, begun)
        if job is None:
            break
        begun[job.rung].add(job.trial)
        trial, end = held[job.trial], ends[job.rung]
        trial["state"] = "training"
        if done >= stop_after:
            break
        if fail(job.trial) == job.rung + 1:
            trial |= {"state": "failed", "reason": "the loss is not finite at step 120"}
            trial["curve"] = trial["whole"][: max(0, end - 5)]
            scores[job.rung][job.trial] = -math.inf
            continue
        trial["curve"] = trial["whole"][:end]
        score = trial["curve"][-1]
        scores[job.rung][job.trial] = sign * score
        trial["rungs"].append({"epochs": end, "score": score, "seconds": 1.5 * (end - (ends[job.rung - 1] if job.rung else 0))})
        trial["state"] = "complete" if job.rung == len(ends) - 1 else "paused"
    for trial in held:
        del trial["whole"]
    last, epochs = scores[-1], sum(len(trial["curve"]) for trial in held)
    record: Record = {
        "title": f"ASHA over {row}", "recipe": "small-lora", "row": row, "verb": "pretrain" if loss else "adapt",
        "score": "validation loss" if loss else "validation accuracy", "larger_is_better": not loss,
        "unit": "evaluation" if loss else "epoch", "rungs": ends, "factor": 2, "trials_asked": asked or trials,
        "seed": seed, "workers": 1, "threads": 1, "space": copy.deepcopy(SPACE), "trials": held,
        "winner": max(last, key=lambda n: (last[n], -n)) if last and max(last.values()) > -math.inf else None,
        "epochs": epochs, "epochs_in_full": most * len(held), "seconds": 1.5 * epochs,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "search.json").write_text(json.dumps(record))
    for trial in held[:5]:
        (unfinished := folder / "trials" / f"{trial['number']:04d}").mkdir(parents=True, exist_ok=True)
        (unfinished / "metrics.jsonl").write_text('{"stage": "train", "split": "validation", "epoch": 1, "accuracy": 0.1}\n')
        (unfinished / "config.yaml").write_text("seed: 0\n")
        (unfinished / "environment.json").write_text("{}")
    return record
