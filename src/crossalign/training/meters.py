"""Sums that the loop keeps on the device between two rows of its log, and what becomes of them in a checkpoint."""

from typing import Any

import torch
from torch import Tensor

SAME = ("steps", "grad_norm")
"""Sums that are the same in every process; the others are shares, to be summed over the processes."""

PRINTED = {"loss": "{:.3f}", "divergence": "{:.4g}", "heldout_mmd": "{:.4g}", "accuracy": "{:.1%}", "perplexity": "{:.2f}"}
"""Numbers that are printed while training goes on, and how."""


def shown(means: dict[str, float], title: str = "") -> str:
    """The numbers that are printed, in a row after ``title``; nothing where there are none."""
    numbers = ", ".join(f"{name} {form.format(means[name])}" for name, form in PRINTED.items() if name in means)
    return numbers and title + numbers


class Meter:
    """Scalars by name, "examples" among them.

    Args:
        accelerator: accelerate's.
        shared: whether each process holds a share of the sums; all of them then call together what sums them up.
    """

    def __init__(self, accelerator: Any, shared: bool) -> None:
        self._accelerator, self._shared = accelerator, shared
        self.sums: dict[str, Tensor] = {}

    def add(self, **sums: Tensor) -> None:
        """Add scalars, each under its name."""
        for name, value in sums.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def means(self) -> dict[str, float]:
        """Sums over all processes, divided by the examples: the one place where the host waits for the device."""
        if not self.sums:
            return {}
        names = [name for name in self.sums if name not in ("examples", *SAME)]
        values = torch.stack([self.sums[name].cpu().double() for name in [*names, "examples"]])
        if self._shared:
            values = self._accelerator.reduce(values.float().to(self._accelerator.device), "sum").cpu().double()
        numbers = {name: float(value / values[-1]) for name, value in zip(names, values, strict=False)}
        if "steps" in self.sums:
            numbers["grad_norm"] = float(self.sums["grad_norm"].cpu() / self.sums["steps"].cpu())
        return numbers

    def state(self) -> dict[str, Tensor]:
        """What the first process saves for all: sums over the processes, on the CPU."""

        def whole(value: Tensor) -> Tensor:
            return self._accelerator.reduce(value.to(self._accelerator.device), "sum")  # type: ignore[no-any-return]

        return {n: (whole(value) if self._shared and n not in SAME else value).cpu() for n, value in self.sums.items()}

    def load(self, saved: dict[str, Tensor]) -> None:
        """Put :meth:`state` back: all of a sum in the first process, nothing in the others."""
        has_all = self._accelerator.is_main_process or not self._shared
        values = {name: value if has_all or name in SAME else torch.zeros_like(value) for name, value in saved.items()}
        self.sums = {name: value.to(self._accelerator.device) for name, value in values.items()}
