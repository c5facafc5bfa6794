"""Run folders with known numbers, in the format that training writes."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def png_bytes(colour: tuple[int, int, int], size: int = 32) -> bytes:
    held = io.BytesIO()
    ramp = np.linspace(0.3, 1, size)[:, None, None] * np.linspace(0.5, 1, size)[None, :, None] * np.array(colour)
    Image.fromarray(ramp.astype(np.uint8)).save(held, format="PNG")
    return held.getvalue()


def make_run(
    folder: Path,
    row: str = "FPT",
    *,
    method: str = "fpt",
    align: str = "none",
    weights: str = "pretrained",
    backbone: str = "../models/stories260K",
    seed: int = 0,
    skill: float = 0.5,
    correct: np.ndarray | None = None,
    images: int = 500,
    classes: list[str] = CLASSES,
    data: str = "CIFAR-10 (JPEG), 10,000 training images",
    precision: str = "fp32",
    epochs: int = 6,
    complete: bool = True,
    config: dict[str, Any] | None = None,
) -> Path:
    """A run of ``skill``: each test image has its own difficulty, shared by all runs, plus this run's luck."""
    folder.mkdir(parents=True)
    draw = np.random.default_rng([seed, sum(map(ord, row + weights + backbone))])
    labels = np.arange(images) % len(classes)
    if correct is None:
        difficulty = np.random.default_rng(7).random(images)
        correct = difficulty * 0.8 + draw.random(images) * 0.2 < skill + draw.normal(0, 0.01)
    predicted = np.where(correct, labels, (labels + 1 + draw.integers(0, 3, images)) % len(classes))
    confidence = np.clip(np.where(correct, 0.75, 0.5) + draw.normal(0, 0.12, images), 0.11, 0.99).astype(np.float32)
    confusion = np.zeros((len(classes), len(classes)), int)
    np.add.at(confusion, (labels, predicted), 1)
    accuracy = float(correct.mean())
    settings = {
        "output": str(folder),
        "seed": seed,
        "row": row,
        "data": {"source": "images", "limit_train": 10000},
        "backbone": {"ref": backbone if weights == "pretrained" else f"{weights}:{backbone}"},
        "tune": {"method": method},
        "align": {"metric": align, "epochs": 4},
        "optim": {"lr": 0.001},
        "loop": {"epochs": epochs, "batch_size": 64},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings | (config or {}), sort_keys=False))
    environment = {
        "python": "3.11.9",
        "packages": {"torch": "2.14.1"},
        "cpu": "some CPU",
        "cores": 2,
        "memory_bytes": 8_000_000_000,
        "threads": 2,
        "gpus": [],
        "git_changed": seed == 1,
        "command": f"crossalign adapt cifar10 --seed {seed} --output {folder.name}",
        "git_commit": "0123abc",
        "started": f"2025-01-0{1 + seed % 9}T10:00:00",
    }
    (folder / "environment.json").write_text(json.dumps(environment))
    (folder / "metrics.jsonl").write_text("\n".join(json.dumps(line) for line in _curves(draw, align, accuracy, epochs)) + "\n")
    if not complete:
        return folder
    (folder / "result.json").write_text(
        json.dumps(
            {
                "verb": "adapt",
                "recipe": "cifar10-stories-fpt",
                "row": row,
                "method": method,
                "align": align,
                "backbone": backbone if method not in ("none", "vit") else "",
                "weights": weights,
                "seed": seed,
                "data": data,
                "classes": classes,
                "best_epoch": epochs - 1,
                "epochs": epochs,
                "validation": {"accuracy": accuracy + 0.01, "loss": 1.2, "ece": 0.03},
                "test": {"accuracy": accuracy, "loss": 1.25, "ece": 0.04, "n": images, "confusion": confusion.tolist()},
                "parameters": {"trainable": 6000, "total": 260_000, "groups": {"patch embedding": 3136, "norms": 2864}},
                "learning_rate": 0.001,
                "alignment": {"before": {"std": 1.4, "effective_rank": 44.0}, "warning": ""} if align != "none" else {},
                "seconds": {"align": 60.0 if align != "none" else 0.0, "train": 600.0},
                "images_per_second": 310.0,
                "peak_memory_bytes": 1_200_000_000,
                "precision": precision,
                "device": "cpu (2 threads)",
            }
        )
    )
    table: dict[str, np.ndarray] = {"index": np.arange(images, dtype=np.int32), "label": labels.astype(np.int16)}
    table |= {"predicted": predicted.astype(np.int16), "confidence": confidence}
    shuffled = draw.permutation(images)
    pq.write_table(pa.table({key: value[shuffled] for key, value in table.items()}), folder / "predictions.parquet")
    shown = range(12)
    samples = {
        "png": [png_bytes((40 + 17 * i, 230 - 15 * i, 90 + 10 * i)) for i in shown],
        "label": [classes[labels[i]] for i in shown],
        "predicted": [classes[predicted[i]] for i in shown],
        "confidence": confidence[:12],
    }
    pq.write_table(pa.table(samples), folder / "samples.parquet")
    return folder


def _curves(draw: np.random.Generator, align: str, accuracy: float, epochs: int) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for epoch in range(1, 5 if align != "none" else 1):
        shrink = 0.3 if align == "mse" else 0.8
        lines.append({"stage": "align", "split": "train", "epoch": epoch, "step": 10 * epoch, "divergence": 2.0 / epoch**2})
        health = {"heldout_mmd": 0.5 / epoch, "std": 1 - shrink * (1 - 1 / epoch), "std_text": 1.0}
        health |= {"effective_rank": 40.0 - shrink * 8 * epoch, "effective_rank_text": 45.0, "norm_ratio": 0.9}
        lines.append({"stage": "align", "split": "validation", "epoch": epoch, "step": 10 * epoch, **health})
    for epoch in range(1, epochs + 1):
        reached = accuracy * (1 - np.exp(-epoch)) + draw.normal(0, 0.005)
        for step in (0, 1):
            row = {"stage": "train", "split": "train", "epoch": epoch, "step": 100 * epoch + step, "lr": 1e-3}
            lines.append(row | {"loss": 2.3 - 2.2 * reached - 0.03 * epoch, "accuracy": reached + 0.012 * epoch})
        row = {"stage": "train", "split": "validation", "epoch": epoch, "step": 100 * epoch + 1}
        lines.append(row | {"loss": 2.3 - 2 * reached, "accuracy": reached, "ece": 0.03})
    return lines


def make_study(root: Path, seeds: int = 3) -> Path:
    """Table 1's nine rows and five controls, over seeds, with a sweep and one run that was stopped."""
    names = {"fpt": "FPT", "lora": "LoRA", "full": "Full fine-tuning"}
    skills = {"fpt": 0.42, "lora": 0.55, "full": 0.62}
    rows = [
        (names[m] if a == "none" else f"{names[m]} + alignment ({a.upper()})", m, a, "pretrained", skills[m] + gain)
        for m in names
        for a, gain in (("none", 0.0), ("mse", 0.004), ("mmd", 0.0 if m == "fpt" else 0.03))
    ]
    rows += [
        ("FPT, random weights", "fpt", "none", "random", 0.33),
        ("FPT, shuffled weights", "fpt", "none", "shuffled", 0.35),
        ("Full, random weights", "full", "none", "random", 0.61),
        ("No backbone", "none", "none", "none", 0.31),
        ("Small ViT from scratch", "vit", "none", "none", 0.57),
    ]
    sweep = []
    for place, (name, method, align, weights, skill) in enumerate(rows):
        for seed in range(seeds):
            folder = root / f"{place:02d}" / f"seed{seed}"
            make_run(folder, name, method=method, align=align, weights=weights, seed=seed, skill=skill)
        for rate in (3e-4, 1e-3, 3e-3):
            value = skill - 0.05 * abs(np.log10(rate / 1e-3))
            sweep.append(
                {"row": name, "learning_rate": rate, "validation_accuracy": value, "epochs": 3, "chosen": rate == 1e-3}
            )
    make_run(root / "stopped", "LoRA", method="lora", seed=7, complete=False, epochs=3)
    (root / "sweep.json").write_text(json.dumps(sweep))
    told = {
        "title": "CIFAR-10 with stories260K",
        "note": "10,000 training images, 6 epochs.",
        "rows": [row[0] for row in rows],
    }
    (root / "study.json").write_text(json.dumps(told | {"commands": ["crossalign reproduce cmda-table1 --small"]}))
    return root


@pytest.fixture(scope="session")
def study_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of 14 rows × 3 seeds; read only."""
    return make_study(tmp_path_factory.mktemp("study") / "cifar")


@pytest.fixture
def new_run() -> Callable[..., Path]:
    """The builder of one run folder."""
    return make_run
