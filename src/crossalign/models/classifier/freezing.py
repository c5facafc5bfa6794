"""The freeze plan: which parameters train, decided by module type, shown as a table, failing where nothing matches.

Substring rules such as ``'ln' in name`` freeze nothing on one architecture and everything on the next; a module's type
and its place (backbone, new part, LoRA layer) mean the same on all of them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from torch import nn

from crossalign.config import TuneConfig
from crossalign.models.language.families import is_norm

TRAINED = {
    "fpt": ("patch embedding", "positions", "head", "norms"),
    "lora": ("patch embedding", "positions", "head", "lora"),
    "full": ("patch embedding", "positions", "head", "norms", "blocks"),
}


@dataclass(frozen=True)
class PlanRow:
    """One group of parameters: how many there are, and whether they train."""

    group: str
    parameters: int
    trainable: bool


@dataclass(frozen=True)
class FreezePlan:
    """What trains and what does not, by group."""

    rows: tuple[PlanRow, ...]

    @property
    def trainable(self) -> int:
        """Parameters that train."""
        return sum(row.parameters for row in self.rows if row.trainable)

    @property
    def total(self) -> int:
        """All parameters, the unused token table included."""
        return sum(row.parameters for row in self.rows)

    def groups(self) -> dict[str, int]:
        """Trainable parameters by group."""
        return {row.group: row.parameters for row in self.rows if row.trainable}

    def __str__(self) -> str:
        lines = [f"{'group':<28}{'parameters':>14}  trains"]
        lines += [f"{r.group:<28}{r.parameters:>14,}  {'yes' if r.trainable else 'no'}" for r in self.rows]
        share = self.trainable / max(self.total, 1)
        return "\n".join([*lines, f"{'trainable':<28}{self.trainable:>14,}  of {self.total:,} ({share:.2%})"])


def _grouped(model: nn.Module, unused: Collection[str]) -> Iterator[tuple[str, nn.Parameter]]:
    """Each parameter once, with the name of its group."""
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            full_name = f"{module_name}.{name}" if module_name else name
            if full_name.startswith("embedding."):
                yield ("positions" if full_name == "embedding.positions" else "patch embedding"), parameter
            elif full_name.startswith("head."):
                yield "head", parameter
            elif full_name.removeprefix("backbone.") in unused:
                yield "unused (never in the graph)", parameter
            elif ".lora_A." in full_name or ".lora_B." in full_name:  # PEFT's own names; its layers have no other mark
                yield "lora", parameter
            elif is_norm(module):
                yield "norms", parameter
            else:
                yield "blocks", parameter


def apply_freeze_plan(
    model: nn.Module, config: TuneConfig, *, unused: Collection[str] = (), optional: Collection[str] = ()
) -> FreezePlan:
    """Set ``requires_grad`` throughout ``model`` for ``config.method`` and return the plan.

    Args:
        model: with the parts ``embedding``, ``backbone`` and ``head``.
        config: ``method`` is used.
        unused: names, in the backbone, of parameters that no input meets.
        optional: groups that the model need not have.

    Raises:
        RuntimeError: another group that the method trains matches no parameter.
    """
    counts: dict[str, int] = {}
    wanted = TRAINED[config.method]
    for group, parameter in _grouped(model, unused):
        parameter.requires_grad_(group in wanted)
        counts[group] = counts.get(group, 0) + parameter.numel()
    for group in wanted:
        if group not in counts and group not in optional:
            raise RuntimeError(f"method '{config.method}' trains the group '{group}', but no parameter is in it")
    order = ("patch embedding", "positions", "head", "lora", "norms", "blocks", "unused (never in the graph)")
    return FreezePlan(tuple(PlanRow(g, counts[g], g in wanted) for g in order if g in counts))
