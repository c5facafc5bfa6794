"""``evaluate``: a language model on benchmark tasks."""

from pathlib import Path

from crossalign.config import EvaluateConfig
from crossalign.core.registry import Registry
from crossalign.verbs import Verb

_FILES = {file.stem: file for file in Path(__file__).with_name("tasks").glob("*.yaml")}
TASKS: Registry[Path] = Registry("task", _FILES, group="crossalign.tasks")
"""Task files of lm-evaluation-harness by name."""


def run(config: EvaluateConfig, _: str) -> str | None:
    """Score, and tell what a classifier's language model forgot; the scores are printed as they come."""
    from crossalign.verbs.evaluate.job import evaluate

    results = evaluate(config)
    lines = []
    for name, metrics in results.get("forgetting", {}).items():
        changes = ", ".join(f"{metric} {value['before']:.4g} → {value['after']:.4g}" for metric, value in metrics.items())
        lines.append(f"before and after it learned images, {results['tasks'][name]['label']}: {changes}")
    return "\n".join(lines) or None


EVALUATE = Verb(EvaluateConfig, run)
