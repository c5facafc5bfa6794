"""The device that stands in for a GPU notes what makes the host wait, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from a_device import NAME, Device
from torch import Tensor

WAITS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool(x.sum() > 0),
    "float": lambda x: float(x[0]),
    "cpu": lambda x: x.cpu(),
    "numpy": lambda x: x.cpu().numpy(),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 1],
    "mask set": lambda x: x.index_put((x > 1,), x[:2]),
    "unique": lambda x: x.unique(),
    "equal": lambda x: torch.equal(x, x),
    "blocking copy": lambda x: x + torch.ones(3).to(x.device),
    "index of the host": lambda x: x[torch.tensor([0, 1])],
}
FREE: dict[str, Callable[[Tensor], Any]] = {
    "arithmetic": lambda x: (x * 2 + 1).softmax(-1),
    "copy": lambda x: x + torch.ones(3).to(x.device, non_blocking=True),
    "gather": lambda x: x[torch.zeros(2, dtype=torch.long, device=x.device)],
    "where": lambda x: torch.where(x > 1, x, 0.0),
    "number of the host": lambda x: x * torch.tensor(2.0),
    "shape": lambda x: x.view(1, -1).expand(2, -1).shape[0],
    "in place": lambda x: x.clone().add_(1).masked_fill_(x > 1, 0.0),
}


@pytest.mark.parametrize("name", [*WAITS, *FREE])
def test_what_waits_is_noted(name: str) -> None:
    with Device() as device:
        x = torch.tensor([1.0, 2.0, 3.0]).to(NAME)
        with device.watching(True):
            (WAITS | FREE)[name](x)
    assert bool(device.waits) == (name in WAITS)


def test_values_and_gradients_are_those_of_the_host() -> None:
    here = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    (here.softmax(0) ** 2).sum().backward()
    with Device():
        there = torch.tensor([1.0, 2.0, 3.0]).to(NAME).requires_grad_()
        (there.softmax(0) ** 2).sum().backward()
        assert there.grad is not None and there.grad.device == NAME
        assert here.grad is not None and torch.equal(there.grad.cpu(), here.grad)


def test_tensors_of_two_devices_do_not_mix() -> None:
    with Device(), pytest.raises(RuntimeError, match="of the host beside those of the device"):
        torch.ones(3).to(NAME) + torch.ones(3)
