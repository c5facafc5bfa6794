"""The freeze plan: which parameters train, decided by module type, shown as a table, failing where nothing matches.

Substring rules such as ``'ln' in name`` freeze nothing on one architecture and everything on the next; a module's type
and its place (backbone, new part, LoRA layer) mean the same on all of them.
"""

from dataclasses import dataclass
from typing import Any

from crossalign.models.language.families import is_norm

UNUSED = "unused (never in the graph)"
GROUPS = ("patch embedding", "positions", "head", "lora", "norms", "blocks", UNUSED)
TRAINED = {
    "fpt": ("patch embedding", "positions", "head", "norms"),
    "lora": ("patch embedding", "positions", "head", "lora"),
    "full": ("patch embedding", "positions", "head", "norms", "blocks"),
}


@dataclass(frozen=True)
class FreezePlan:
    """What trains and what does not, by group."""

    parameters: dict[str, int]
    """How many each group has."""
    trained: tuple[str, ...]
    """The groups that train."""

    @property
    def trainable(self) -> int:
        """Parameters that train."""
        return sum(self.groups().values())

    @property
    def total(self) -> int:
        """All parameters, the unused token table included."""
        return sum(self.parameters.values())

    def groups(self) -> dict[str, int]:
        """Trainable parameters by group."""
        return {group: count for group, count in self.parameters.items() if group in self.trained}

    def __str__(self) -> str:
        lines = [f"{'group':<28}{'parameters':>14}  trains"]
        lines += [f"{g:<28}{n:>14,}  {'yes' if g in self.trained else 'no'}" for g, n in self.parameters.items()]
        share = self.trainable / max(self.total, 1)
        return "\n".join([*lines, f"{'trainable':<28}{self.trainable:>14,}  of {self.total:,} ({share:.2%})"])


def apply_freeze_plan(model: Any) -> FreezePlan:
    """Set ``requires_grad`` throughout an ``ImageClassifier`` for its method and return the plan.

    Raises:
        RuntimeError: a group that the method trains matches no parameter, though the model must have it.
    """
    unused, method = model.backbone.unused_parameters(), model.settings.tune.method
    counts: dict[str, int] = {}
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            full_name = f"{module_name}.{name}" if module_name else name
            if full_name.startswith("embedding."):
                group = "positions" if full_name == "embedding.positions" else "patch embedding"
            elif full_name.startswith("head."):
                group = "head"
            elif full_name.removeprefix("backbone.") in unused:
                group = UNUSED
            elif ".lora_A." in full_name or ".lora_B." in full_name:  # PEFT's own names; its layers have no other mark
                group = "lora"
            else:
                group = "norms" if is_norm(module) else "blocks"
            parameter.requires_grad_(group in TRAINED[method])
            counts[group] = counts.get(group, 0) + parameter.numel()
    optional = {"positions"} if model.embedding.positions is None else set()
    if model.backbone.family.attention == "none":
        optional |= {"norms", "lora", "blocks"}
    for group in TRAINED[method]:
        if group not in counts and group not in optional:
            raise RuntimeError(f"method '{method}' trains the group '{group}', but no parameter is in it")
    return FreezePlan({group: counts[group] for group in GROUPS if group in counts}, TRAINED[method])
