"""The commands that wrote what is stored in artefacts/, and what of its answers is compared."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import torch

from crossalign import ImageClassifier, open_language_model

FOLDER = Path(__file__).parent / "artefacts"
IDS = [[0, 40, 72, 5, 260, 90, 13, 280], [7, 7, 299, 120, 33, 0, 64, 2]]
"""Tokens (2, 8) whose next ones are predicted."""
OWN = ("seconds", "images_per_second", "tokens_per_second", "peak_memory_bytes", "device")
"""What a result says of the machine."""
SMALL = {
    "backbone.ref": "llama", "data.limit_train": "120", "data.limit_validation": "60", "data.limit_test": "60",
    "loop.epochs": "2", "loop.batch_size": "8", "loop.precision": "fp32", "loop.log_every": "10", "loop.device": "cpu",
    "data.augment.crop_padding": "0", "tracking.mlflow": "false",
}  # fmt: skip
SETTINGS = tuple(f"{key}={value}" for key, value in SMALL.items())
OPTIONS = [
    text
    for key, value in SMALL.items()
    for text in ([f"--{key.replace('_', '-')}", value] if value != "false" else ["--tracking.no-mlflow"])
]
LONG = ("--loop.epochs", "8", "--optim.lr", "0.03")
CLASSIFIERS = {
    "fpt": ("adapt", "small-fpt", *OPTIONS, *LONG),
    "lora": ("adapt", "small-lora", *OPTIONS, *LONG, "--tune.lora-rank", "2"),
    "full": ("adapt", "small-full", *OPTIONS, *LONG),
    "none": ("adapt", "small-none", *OPTIONS, *LONG, "--backbone.ref", "none:llama"),
    "vit": ("adapt", "small-vit", *OPTIONS, *LONG, "--backbone.ref", "vit:llama"),
}
SELF_CONTAINED = ("full", "none", "vit")
"""Classifiers whose folder holds all that they are made of."""
PAIRS = ("--pairs.source", "pairs.parquet")
FEATURES = ("features", "--teacher.ref", "vit", "--teacher.layers", "1", "penultimate", *PAIRS,
            "--output", "features.safetensors")  # fmt: skip
PREPARE = ("data", "prepare", "--source", "text.txt", "--vocabulary", "300", "--validation-fraction", "0.1",
           "--output", "corpus")  # fmt: skip
TERM = ("--align.metric", "cka-linear-debiased", "--align.every", "2", "--align.batch-size", "12", "--align.max-length", "8",
        "--align.layers", "last", "--teacher.ref", "file:features.safetensors", *PAIRS)  # fmt: skip
STEPS = ("--loop.steps", "6", "--loop.evaluate-every", "2", "--loop.batch-size", "4", "--loop.precision", "fp32",
         "--loop.device", "cpu", "--loop.log-every", "1", "--optim.lr", "0.01", "--tracking.no-mlflow")  # fmt: skip
CONTINUED = {
    "adapt": ("adapt", "small-fpt-mmd", *OPTIONS, "--loop.epochs", "3", "--optim.lr", "0.03", "--align.epochs", "1",
              "--align.batch-size", "16", "--align.sequences", "60", "--align.sequence-length", "8"),
    "pretrain": ("pretrain", "--prepared", "corpus", "--block", "48", "--gpt.layers", "1", "--gpt.heads", "2",
                 "--gpt.width", "4", *TERM, "--align.held-out", "8", "--align.held-out-teacher", "vit", *STEPS,
                 "--loop.keep-every", "6", "--score", "text.txt"),
    "finetune": ("finetune", "--model", "runs/pretrain/model", "--tune.method", "lora", "--tune.lora-rank", "2",
                 "--data.source", "tasks.jsonl", "--data.block", "48", *TERM, "--align.held-out", "0", *STEPS),
}  # fmt: skip
"""Runs that were made whole, and stopped after the first of three epochs or evaluations. A checkpoint knows the very bits of
the teacher's features, which hang on the processor that computed them: so they come from a file."""
EVALUATE = ("evaluate", "runs/finetune", "--tasks", "copa", "--data-dir", "evals", "--device", "cpu", "--tracking.no-mlflow")
MEASURE = ("measure", "--language", "runs/pretrain", "--vision", "file:features.safetensors", *PAIRS, "--pairs.split", "train",
           "--permutations", "39", "--groups", "8", "--max-length", "8", "--text", "text.txt", "--text-kilobytes", "1",
           "--block", "16", "--device", "cpu", "--output", "measured")  # fmt: skip
SEARCH = ("tune", "small-fpt", "--trials", "5", "--rungs", "3", "--seeds", "1", "--threads", "1", "--space", "space.yaml",
          "--tracking.no-mlflow", "--set", *SETTINGS, "loop.epochs=4")  # fmt: skip
STUDY = ("reproduce", "cmda-table1", "--rows", "fpt", "none", "--seeds", "2", "--lrs", "1e-3", "3e-2", "--sweep-epochs", "4",
         "--output", "study", "--set", *SETTINGS)  # fmt: skip


def unpack(folder: Path) -> None:
    """Put everything stored below ``folder``."""
    for archive in sorted(FOLDER.glob("*.tar.xz")):
        with tarfile.open(archive) as whole:
            whole.extractall(folder, filter="data")


def answers(model: str, backbone: str | None = None) -> list[dict[str, float]]:
    """The probability of each class, best first, for each picture in images/."""
    files = sorted(Path("images").glob("*.png"))
    classifier = ImageClassifier.from_pretrained(model, backbone=backbone)
    return [{entry["label"]: entry["score"] for entry in classes} for classes in classifier.predict(files, top_k=10)]


@torch.no_grad()
def language_logits(folder: str) -> list[Any]:
    """Logits (2, 8, 6) of every fiftieth token after ``IDS``, of the model in a folder or of the one below its LoRA adapter."""
    if (Path(folder) / "adapter_config.json").is_file():
        from peft import PeftConfig, PeftModel

        base = open_language_model(str(PeftConfig.from_pretrained(folder).base_model_name_or_path), head="causal").model
        model = PeftModel.from_pretrained(base, folder).eval()
    else:
        model = open_language_model(folder, head="causal").model
    return model(torch.tensor(IDS)).logits[..., ::50].tolist()  # type: ignore[no-any-return]


def plain_result(run: Path) -> dict[str, Any]:
    """result.json but for what it says of the machine."""
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    result.get("alignment", {}).pop("seconds", None)
    return {key: value for key, value in result.items() if key not in OWN}
