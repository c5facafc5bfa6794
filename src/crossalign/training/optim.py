"""Optimisers and learning-rate schedules: torch's own, with the field's rule for what decays; and gradients over processes."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from crossalign.config import OptimConfig
from crossalign.features.regularizer import rank_and_world


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """Adam or AdamW, fused where the device has it, over the parameters of ``model`` that train.

    Matrices decay; norms, biases, positions and class tokens do not, unless ``config.decay_all``.
    """
    decaying: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_matrix = parameter.ndim >= 2 and not name.endswith(("embedding.positions", "embedding.cls"))
            (decaying if is_matrix or config.decay_all else rest).append(parameter)
    groups: list[dict[str, Any]] = [{"params": decaying, "weight_decay": config.weight_decay}]
    if rest:
        groups.append({"params": rest, "weight_decay": 0.0})
    cls = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    fused = all(p.device.type in ("cpu", "cuda", "mps") and p.is_floating_point() for p in (*decaying, *rest))
    return cls(groups, lr=config.lr, betas=config.betas, fused=fused)


def lr_factor(config: OptimConfig, step: int, total: int) -> float:
    """The share of the peak learning rate at ``step`` (0-based) of ``total``: linear warm-up, then decay to its last share.

    A function of the step alone, so that a resumed run needs no scheduler state.
    """
    warmup = int(config.warmup_fraction * total)
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    shapes = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}
    return config.final_lr_fraction + (1 - config.final_lr_fraction) * shapes[config.schedule]


def average(gradient: Tensor) -> Tensor:
    """The mean over processes, in place."""
    world = rank_and_world()[1]
    if world > 1:
        torch.distributed.all_reduce(gradient)
        gradient /= world
    return gradient


def norm_of(gradients: Iterable[Tensor]) -> Tensor:
    """The norm of all of them together; nothing waits for the device."""
    return torch.nn.utils.get_total_norm([torch.linalg.vector_norm(gradient) for gradient in gradients])


@contextmanager
def laid_aside(model: nn.Module) -> Iterator[None]:
    """Gradients of the block alone within it; afterwards they are added to those that were there."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    before = [p.grad for p in parameters]
    for parameter in parameters:
        parameter.grad = None
    yield
    for parameter, gradient in zip(parameters, before, strict=True):
        if gradient is not None:
            parameter.grad = gradient if parameter.grad is None else gradient.add_(parameter.grad)


def gradients_of(model: nn.Module) -> list[Tensor]:
    """Those that its parameters have."""
    return [p.grad for p in model.parameters() if p.grad is not None]
