"""Tiny runs of every verb that trains, through public names alone, so that the inside may be rewritten."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MEASURED = ("seconds", "images_per_second", "tokens_per_second", "examples_per_second", "peak_memory_bytes", "device")
SETTINGS = {"loop": {"precision": "fp32", "device": "cpu", "compile": False, "log_every": 1}, "tracking": {"mlflow": False}}

ADAPT = {
    "backbone": {"ref": "llama"},
    "head": {"dropout": 0.1},
    "loop": {"batch_size": 16},
    "align": {"batch_size": 16, "sequences": 200, "sequence_length": 8, "max_tokens": 128},
}
DIGITS = {"source": "sklearn:digits", "channels": "gray", "limit_train": 80, "limit_validation": 40, "limit_test": 40}
TERM = {"every": 3, "batch_size": 16, "max_length": 12, "held_out": 16}
PAIRS = {
    "teacher": {"ref": "file:features.npy"},
    "pairs": {"source": "pairs.parquet"},
    "align": TERM | {"held_out_teacher": "file:held_out.npy"},
}
PRETRAIN = {
    "block": 24,
    "corpus": {"source": ("text.txt",), "vocabulary": 300, "validation_fraction": 0.1},
    "score": ("score.txt",),
    "gpt": {"layers": 2, "heads": 2, "width": 16, "dropout": 0.1},
    "optim": {"lr": 1e-2},
    "loop": {"batch_size": 6, "eval_batch_size": 16},
    **PAIRS,
}
FINETUNE = {
    "model": "llama",
    "score": ("score.txt",),
    "data": {"source": ("tasks.json",), "block": 64},
    "optim": {"lr": 1e-2},
    "loop": {"batch_size": 6, "eval_batch_size": 16},
    "align": TERM,
    "teacher": {"ref": "dino"},
    "pairs": {"source": "pairs.parquet"},
}
SHORT = {"loop": {"steps": 8, "evaluate_every": 4}}
RUNS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "adapt-fpt": (
        "AdaptConfig",
        [
            ADAPT,
            {
                "data": DIGITS | {"limit_train": 160, "augment": {"flip": 0.0, "crop_padding": 1}},
                "embedder": {"patch": 2},
                "optim": {"lr": 3e-3},
                "loop": {"epochs": 4},
            },
        ],
    ),
    "adapt-lora-mmd": (
        "AdaptConfig",
        [
            ADAPT,
            {
                "data": {"source": "pictures", "augment": {"crop_padding": 1}},
                "tune": {"method": "lora", "lora_rank": 4},
                "align": {"metric": "mmd", "epochs": 2},
                "optim": {"lr": 3e-3},
                "loop": {"epochs": 5},
            },
        ],
    ),
    "pretrain": ("PretrainConfig", [PRETRAIN, SHORT]),
    "pretrain-aligned": ("PretrainConfig", [PRETRAIN, SHORT, {"align": {"metric": "cka-linear-debiased", "queue": 8}}]),
    "finetune-lora": (
        "FinetuneConfig",
        [
            FINETUNE,
            SHORT,
            {"tune": {"method": "lora", "lora_rank": 4}, "align": {"metric": "cka-rbf", "log_every": 2}},
        ],
    ),
}
"""Class of configuration, and the settings, later ones over earlier ones."""
EPOCHS = {"loop": {"epochs": 4}, "data": DIGITS, "embedder": {"patch": 4}}
STEPS = {"loop": {"steps": 20, "evaluate_every": 20, "batch_size": 6}}
RECIPES: dict[str, list[dict[str, Any]]] = {
    "small-fpt": [ADAPT, EPOCHS],
    "small-lora": [ADAPT, EPOCHS],
    "small-full": [ADAPT, EPOCHS],
    "small-pretrain": [PRETRAIN, STEPS],
    "small-pretrain-l2": [PRETRAIN, STEPS],
    "small-finetune-baseline": [FINETUNE, STEPS, {"align": {"held_out": 0}}],
}
"""Settings over those of the recipe: 20 steps of small models."""


def configured(config: Any, *settings: dict[str, Any]) -> Any:
    """``config`` with nested ``settings`` put in."""
    for values in settings:
        for key, value in values.items():
            old = getattr(config, key)  # raises for a name that does not exist
            if isinstance(value, dict):
                configured(old, value)
            else:
                setattr(config, key, value)
    return config


def golden_run(name: str) -> dict[str, Any]:
    """One run's result, its log and its answers, without what a clock or a machine decides."""
    import crossalign

    kind, settings = RUNS[name]
    folder = train(name, configured(getattr(crossalign, kind)(), *settings))
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    numbers = {"result": unmeasured(result), "metrics": unmeasured(metrics(folder)), "weights": weights(folder / "model")}
    return numbers | ({"predictions": predictions(folder)} if kind == "AdaptConfig" else {})


def recipe_losses(name: str) -> list[float]:
    """The loss of each step of a recipe with tiny models."""
    import crossalign

    folder = train(f"recipe-{name}", configured(crossalign.get_recipe(name).make(), *RECIPES[name]))
    return [row["loss"] for row in metrics(folder) if row["split"] == "train_step" and row["stage"] == "train"]


def train(name: str, config: Any) -> Path:
    """Run ``config`` in a folder of its own and return that."""
    import crossalign

    verb = getattr(crossalign, type(config).__name__.removesuffix("Config").lower())
    config = configured(config, SETTINGS)
    config.output = Path("runs") / name
    verb(config, quiet=True)
    return config.output


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def unmeasured(value: Any) -> Any:
    """``value`` without times, speeds, memory and device, at any depth."""
    if isinstance(value, dict):
        return {key: unmeasured(item) for key, item in value.items() if key not in MEASURED}
    return [unmeasured(item) for item in value] if isinstance(value, list) else value


def weights(folder: Path) -> dict[str, Any]:
    """What the saved weights add up to, so that one that moves is seen."""
    from safetensors.numpy import load_file

    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    squares = sum(float((tensors[name].astype("float64") ** 2).sum()) for name in sorted(tensors))
    return {"file": file.name, "tensors": len(tensors), "values": sum(t.size for t in tensors.values()), "squares": squares}


def predictions(folder: Path) -> list[dict[str, Any]]:
    """What predictions.parquet says of each test image."""
    import pyarrow.parquet as pq

    return pq.read_table(folder / "predictions.parquet").to_pylist()  # type: ignore[no-any-return]


def golden_measurement() -> dict[str, Any]:
    """What ``crossalign.measure`` says of small models; it leaves features of language models in the cache."""
    import crossalign

    settings = {
        "language": ("llama", "random:llama", "package:minilm"),
        "vision": ("dino", "package:efficientnet_lite0"),
        "pairs": {"source": "pairs.parquet", "split": "train"},
        "text": "score.txt",
        "max_length": 24,
        "permutations": 20,
        "groups": 5,
        "device": "cpu",
        "output": Path("runs/measure"),
    }
    crossalign.measure(configured(crossalign.MeasureConfig(), settings))
    return unmeasured(json.loads(Path("runs/measure/measure.json").read_text(encoding="utf-8")))  # type: ignore[no-any-return]
