"""Gradients of a model, and of a term alone, over processes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from crossalign.features.regularizer import place


def average(gradient: Tensor) -> Tensor:
    """The mean over processes, in place."""
    world = place()[1]
    if world > 1:
        torch.distributed.all_reduce(gradient)
        gradient /= world
    return gradient


def norm(gradients: Iterable[Tensor]) -> Tensor:
    """The norm of all of them together; nothing waits for the device."""
    return torch.nn.utils.get_total_norm([torch.linalg.vector_norm(gradient) for gradient in gradients])


def of(model: nn.Module) -> list[Tensor]:
    """What the parameters have."""
    return [p.grad for p in model.parameters() if p.grad is not None]
