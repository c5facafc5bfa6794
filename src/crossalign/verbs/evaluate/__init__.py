"""``evaluate``: a language model on benchmark tasks."""

from __future__ import annotations

from pathlib import Path

from crossalign.config import EvaluateConfig
from crossalign.core.registry import Registry
from crossalign.verbs import Verb

_FILES = {file.stem: file for file in Path(__file__).with_name("tasks").glob("*.yaml")}
TASKS: Registry[Path] = Registry("task", _FILES, group="crossalign.tasks")
"""Task files of lm-evaluation-harness by name."""


def run(config: EvaluateConfig, _: str) -> None:
    """Score, and print what a classifier's language model forgot; the scores are printed as they come."""
    from crossalign.core.machine import is_main_process
    from crossalign.verbs.evaluate.job import evaluate

    results = evaluate(config)
    for name, metrics in results.get("forgetting", {}).items() if is_main_process() else ():
        changes = ", ".join(f"{metric} {value['before']:.4g} → {value['after']:.4g}" for metric, value in metrics.items())
        print(f"before and after it learned images, {results['tasks'][name]['label']}: {changes}")


EVALUATE = Verb(EvaluateConfig, run)
