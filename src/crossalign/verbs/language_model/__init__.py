"""``pretrain`` and ``finetune``: a language model learns the next token, pulled towards a vision model or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from crossalign.config import FinetuneConfig, PretrainConfig
from crossalign.verbs import Verb


def run_pretrain(config: PretrainConfig, recipe: str) -> None:
    """Train, and print the scores in a line."""
    from crossalign.verbs.pretrain import pretrain

    _print_scores(pretrain(config, recipe=recipe), config.output)


def run_finetune(config: FinetuneConfig, recipe: str) -> None:
    """Train, and print the scores in a line."""
    from crossalign.verbs.finetune import finetune

    _print_scores(finetune(config, recipe=recipe), config.output)


def _print_scores(result: dict[str, Any], output: Path) -> None:
    from crossalign.core.machine import is_main_process

    if not is_main_process():
        return
    parts = [f"{text} perplexity {scores['perplexity']:.2f}" for text, scores in result["scores"].items()]
    aligned = result["held_out"].get("held_out_cka-linear-debiased")
    parts += [] if aligned is None else [f"alignment of held-out pairs {aligned:.3f}"]
    print(f"{result['row']}: {', '.join(parts)}; {output}")


PRETRAIN = Verb(PretrainConfig, run_pretrain, {PretrainConfig: PretrainConfig})
FINETUNE = Verb(FinetuneConfig, run_finetune, {FinetuneConfig: FinetuneConfig})
