"""Settings of ``evaluate``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from crossalign.config.bounds import Limit, Seed, Whole, at_least
from crossalign.config.common import TrackingConfig

PAPER_TASKS = ("arc_easy", "arc_challenge", "copa", "lambada_openai", "swag", "commonsense_qa", "wikitext")
"""What CMAR §4 evaluates on."""


@dataclass
class EvaluateConfig:
    """Score a causal language model on benchmark tasks, through lm-evaluation-harness; resumable task by task."""

    model: str
    """A run folder, its model/ folder, package:NAME, a local folder, a .gguf file or hf:ORG/NAME. For a run of `adapt`,
    what its backbone still knows of language."""
    tasks: tuple[str, ...] = PAPER_TASKS
    """Names, with commas or spaces between them, and .yaml task files of lm-evaluation-harness of your own."""
    data_dir: Path | None = None
    """Folder of local data, such as arc_easy_test.jsonl, for all tasks; without it each set is opened from the hub."""
    output: Path | None = None
    """Where results go; evaluation/ in the run's folder, or in runs/ for other models."""
    few_shot: Whole = 0
    """Answered examples in front of each question: of the training split, where there is none of the other questions."""
    limit: Limit = None
    """Only the first documents of each task."""
    max_length: Annotated[int | None, at_least(2)] = None
    """Tokens the model sees at most; None takes all that it can."""
    too_long: Literal["stop", "cut"] = "stop"
    """Questions longer than that: stop before scoring, or cut their beginning off and count them. Texts are read in pieces."""
    bos: Literal["auto", "yes", "no"] = "auto"
    """Whether each text starts with the BOS token; auto: as the model's family was trained."""
    batch_size: Whole = 0
    """Texts a forward pass; 0 takes as many as their length and the memory allow. It does not change the scores."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Number format of the weights."""
    before: bool = True
    """Of a run of `adapt`: also score the language model that it began with, for what was forgotten."""
    seed: Seed = 1234
    """Seed that draws the examples of `few_shot`."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
