"""Samples to compare, in float64 so that tests measure the method and not rounding."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

Samples = tuple[Tensor, Tensor]


@pytest.fixture
def samples() -> Callable[..., Samples]:
    """A function that draws x (n, d) and a shifted, stretched y (m, d)."""

    def draw(n: int, m: int, d: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Samples:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(n, d, generator=generator, dtype=torch.float64)
        y = 1.5 * torch.randn(m, d, generator=generator, dtype=torch.float64) + 0.7
        return x.to(dtype), y.to(dtype)

    return draw


@pytest.fixture
def paired() -> Callable[..., Samples]:
    """A function that draws x (n, p) and y (n, q): noise around two linear maps of the same few hidden numbers."""

    def draw(n: int, p: int, q: int, hidden: int = 3, seed: int = 0, dtype: torch.dtype = torch.float64) -> Samples:
        generator = torch.Generator().manual_seed(seed)
        cause = torch.randn(n, hidden, generator=generator, dtype=torch.float64)
        sides = []
        for width, mean in ((p, 1.0), (q, -2.0)):
            seen = cause @ torch.randn(hidden, width, generator=generator, dtype=torch.float64)
            sides.append((seen + torch.randn(n, width, generator=generator, dtype=torch.float64) + mean).to(dtype))
        return sides[0], sides[1]

    return draw


@pytest.fixture
def labelled() -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]:
    """A function that draws x, its labels, y and its labels: clusters, in shuffled order."""

    def draw(n: int, m: int, d: int, classes: int = 4, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        result: list[Tensor] = []
        for count, shift in ((n, 0.0), (m, 0.5)):
            label = torch.randperm(count, generator=generator) % classes
            centres = 2 * torch.randn(classes, d, generator=generator, dtype=torch.float64) + shift
            widths = 0.5 + torch.rand(classes, d, generator=generator, dtype=torch.float64)
            noise = torch.randn(count, d, generator=generator, dtype=torch.float64)
            result += [centres[label] + widths[label] * noise, label]
        return result[0], result[1], result[2], result[3]

    return draw
