"""`crossalign evaluate` beside lm-evaluation-harness called directly, on the same documents, with the time of each.

    python benchmarks/evaluation.py --model MODEL --data-dir FOLDER --output FOLDER [--limit 200] [--max-length 1024]

The harness gets its own task files and its own adapter, filled with our rows, and batches of a fixed size. Both sides keep
each task as soon as it is scored, so that the same command goes on where it was stopped. The largest difference is that of any
metric, relative to its value.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import lm_eval
import torch
from datasets import Dataset
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks._yaml_loader import load_yaml

from crossalign.config import EvaluateConfig, TrackingConfig
from crossalign.core.files import write_json
from crossalign.data.text.evals import local_rows
from crossalign.verbs.evaluate.harness import VERSION, quietly
from crossalign.verbs.evaluate.job import evaluate
from crossalign.verbs.evaluate.model import Scored, open_scored

SHIPPED = {
    "arc_easy": "arc/arc_easy",
    "arc_challenge": "arc/arc_challenge",
    "copa": "super_glue/copa/default",
    "lambada_openai": "lambada/lambada_openai",
    "commonsense_qa": "commonsense_qa/default",
    "wikitext": "wikitext/wikitext",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", choices=SHIPPED, default=list(SHIPPED))
    parser.add_argument("--limit", type=int)
    parser.add_argument("--max-length", type=int)
    parser.add_argument("--batch-size", type=int, default=16, help="of the harness called directly")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--ours-only", action="store_true", help="leave the harness called directly out")
    parser.add_argument("--out", type=Path, help="write the table to this file too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    config = EvaluateConfig(
        model=options.model, tasks=tuple(options.tasks), data_dir=options.data_dir, output=options.output, device="cpu",
        limit=options.limit, max_length=options.max_length, too_long="cut", tracking=TrackingConfig(mlflow=False),
    )  # fmt: skip
    ours = evaluate(config)["tasks"]
    opened = open_scored(options.model)
    theirs = {} if options.ours_only else {name: direct(opened, name, options) for name in options.tasks}
    lines = [
        f"lm-eval {VERSION}, torch {torch.__version__}; {platform.machine()} CPU, {options.threads} thread(s), fp32.",
        "",
        "| task | documents | scores | seconds | harness called directly, seconds | largest relative difference |",
        "| --- | ---: | --- | ---: | ---: | ---: |",
        *(row(ours[name], theirs.get(name)) for name in options.tasks),
    ]
    print("\n".join(lines))
    if options.out:
        options.out.write_text("\n".join(lines) + "\n")


def direct(opened: Scored, name: str, options: argparse.Namespace) -> dict[str, Any]:
    """The harness called as anybody would, or what it gave in an earlier call."""
    file: Path = options.output / "direct" / f"{name}.json"
    if file.is_file():
        kept: dict[str, Any] = json.loads(file.read_text())
        return kept
    split = "test" if "test" in (found := rows_of(name, options.data_dir)) else "validation"
    bos = opened.bos and name != "wikitext"  # its first token follows the prefix token, which is BOS already
    with quietly(name):
        config = load_yaml(Path(lm_eval.__file__).parent / "tasks" / f"{SHIPPED[name]}.yaml")
        for key in ("tag", "dataset_path", "dataset_name", "dataset_kwargs"):
            config.pop(key, None)
        rows = dict.fromkeys(("train", "validation", "test"), found[split]) | found
        task = ConfigurableTask(config={**config, "custom_dataset": lambda **_: rows})
        model = HFLM(
            pretrained=opened.model, tokenizer=opened.tokenizer, add_bos_token=bos, batch_size=options.batch_size,
            max_length=options.max_length,
        )  # fmt: skip
        started = time.monotonic()
        told = lm_eval.evaluate(model, {"tasks": {name: task}}, limit=options.limit, bootstrap_iters=0)["results"][name]
    metrics = {key.partition(",")[0]: value for key, value in told.items() if key.endswith(",none") and "stderr" not in key}
    made = {"metrics": metrics, "n": told["sample_len"], "seconds": round(time.monotonic() - started, 3)}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, made)
    return made


def rows_of(name: str, folder: Path) -> dict[str, Dataset]:
    found = {split: local_rows(name, split, folder) for split in ("train", "validation", "test")}
    return {split: Dataset.from_list(part.rows) for split, part in found.items() if part}


def row(ours: dict[str, Any], theirs: dict[str, Any] | None) -> str:
    scores = ", ".join(
        f"{metric} {value:.4g}" + (f" ± {ours['stderr'][metric]:.2g}" if ours["stderr"].get(metric) is not None else "")
        for metric, value in ours["metrics"].items()
    )
    cut = f", {ours['cut']} cut" if ours["cut"] else ""
    told = f"| {ours['label']} | {ours['n']:,}{cut} | {scores} | {ours['seconds']:.0f} |"
    if theirs is None:
        return f"{told} | |"
    if theirs["n"] != ours["n"]:
        raise SystemExit(f"{ours['label']}: {ours['n']} documents here, {theirs['n']} there")
    both = ours["metrics"].keys() & theirs["metrics"].keys()
    largest = max(
        abs(ours["metrics"][metric] - theirs["metrics"][metric]) / (abs(theirs["metrics"][metric]) or 1) for metric in both
    )
    return f"{told} {theirs['seconds']:.0f} | {largest:.1e} |"


if __name__ == "__main__":
    main()
