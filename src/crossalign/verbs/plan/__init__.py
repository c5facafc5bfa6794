"""``plan``: what a run will cost."""

from __future__ import annotations

from dataclasses import dataclass

from crossalign.config import AdaptConfig, FinetuneConfig, PretrainConfig
from crossalign.verbs import Verb


@dataclass
class PlanArgs(AdaptConfig):
    """What a run will cost, from a model without memory: parameters by group, FLOPs, bytes, steps and hours."""

    train_images: int = 50_000
    """Training images before the validation split, where the data are not at hand."""
    classes: int = 10
    """Classes, where the data are not at hand."""
    hardware: str = "a100"
    """Device to estimate hours for."""
    utilization: float = 0.3
    """Share of the device's peak that training is assumed to reach."""


@dataclass
class PlanPretrainArgs(PretrainConfig):
    """What pre-training will cost, from a model without memory: parameters, tokens, FLOPs, bytes and hours."""

    hardware: str = "a100"
    """Device to estimate hours for."""
    utilization: float = 0.3
    """Share of the device's peak that training is assumed to reach."""


@dataclass
class PlanFinetuneArgs(FinetuneConfig):
    """What fine-tuning will cost, from a model without memory: parameters, tokens, FLOPs, bytes and hours."""

    hardware: str = "a100"
    """Device to estimate hours for."""
    utilization: float = 0.3
    """Share of the device's peak that training is assumed to reach."""


def run(args: PlanArgs | PlanPretrainArgs | PlanFinetuneArgs, recipe: str) -> None:
    """Print the plan."""
    if not isinstance(args, PlanArgs):
        from crossalign.verbs.plan.text import plan_text

        print(plan_text(args, recipe, args.hardware, args.utilization))
        return
    from crossalign.verbs.plan.images import plan

    print(plan(args, recipe, args.train_images, args.classes, args.hardware, args.utilization))


PLAN = Verb(PlanArgs, run, {AdaptConfig: PlanArgs, PretrainConfig: PlanPretrainArgs, FinetuneConfig: PlanFinetuneArgs})
