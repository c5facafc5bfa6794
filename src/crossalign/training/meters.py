"""Sums that the loop keeps on the device between two rows of its log, and what becomes of them in a checkpoint."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Meter = dict[str, Tensor]
SAME = ("steps", "grad_norm")
"""Sums that are the same in every process; the others are shares, to be summed over the processes."""


def add(meter: Meter, **sums: Tensor) -> None:
    """Add scalars to a meter, each under its name."""
    for name, value in sums.items():
        meter[name] = meter[name] + value if name in meter else value


def means(meter: Meter, accelerator: Any, shared: bool) -> dict[str, float]:
    """Sums over all processes, divided by the examples: the one place where the host waits for the device.

    Args:
        meter: scalars, "examples" among them.
        accelerator: accelerate's.
        shared: whether each process holds a share; all of them call this then.
    """
    names = [name for name in meter if name not in ("examples", *SAME)]
    values = torch.stack([meter[name].cpu().double() for name in [*names, "examples"]])
    if shared:
        values = accelerator.reduce(values.float().to(accelerator.device), "sum").cpu().double()
    found = {name: float(value / values[-1]) for name, value in zip(names, values, strict=False)}
    if "steps" in meter:
        found["grad_norm"] = float(meter["grad_norm"].cpu() / meter["steps"].cpu())
    return found


def to_save(meter: Meter, accelerator: Any, shared: bool) -> Meter:
    """What the first process saves for all: sums over the processes, on the CPU."""
    if not shared:
        return {name: value.cpu() for name, value in meter.items()}
    device = accelerator.device
    return {n: (value if n in SAME else accelerator.reduce(value.to(device), "sum")).cpu() for n, value in meter.items()}


def from_saved(saved: Meter, accelerator: Any, shared: bool) -> Meter:
    """Put :func:`to_save` back: all of a sum in the first process, nothing in the others."""
    first = accelerator.is_main_process or not shared
    return {
        name: value.to(accelerator.device) if first or name in SAME else torch.zeros_like(value, device=accelerator.device)
        for name, value in saved.items()
    }
