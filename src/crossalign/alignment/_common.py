"""What the measures share: checked samples in full precision, pairwise distances, gradients known in closed form."""

import math
import numbers
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ._features import readable, refuse

# Of samples whose size lies between these, fourth powers of values stay within float32; others are given another unit.
LEAST, LARGEST = 2.0**-24, 2.0**24


@contextmanager
def full_precision(x: Tensor, y: Tensor, *, paired: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
    """Give x (..., n, d) and y (..., m, d) in one dtype of at least float32, with autocast off inside the block.

    With `paired` it is the rows that belong together: x (..., n, p) and y (..., n, q). Leading dimensions are broadcast
    against each other. Raises ValueError for what is no tensor, and for shapes, dtypes or devices that don't fit.
    """
    need_tensor("x", x)
    need_tensor("y", y)
    if x.device != y.device:
        raise ValueError(f"x lies on {x.device} and y on {y.device}: move one of them")
    if x.ndim < 2 or y.ndim < 2:
        raise ValueError(f"samples need the shape (n, d); got {tuple(x.shape)} and {tuple(y.shape)}")
    if paired and x.shape[-2] != y.shape[-2]:
        raise ValueError(f"row i of x and row i of y are a pair: as many rows of both; got {x.shape[-2]} and {y.shape[-2]}")
    if not paired and x.shape[-1] != y.shape[-1]:
        raise ValueError(f"samples must have one width; got {x.shape[-1]} and {y.shape[-1]}")
    if 0 in (*x.shape, *y.shape):
        raise ValueError(f"samples must not be empty; got {tuple(x.shape)} and {tuple(y.shape)}")
    if not (x.is_floating_point() and y.is_floating_point()):
        raise ValueError(f"samples must be floating point; got {x.dtype} and {y.dtype}")
    dtype = torch.float64 if torch.float64 in (x.dtype, y.dtype) else torch.float32
    x, y = x.to(dtype), y.to(dtype)
    if x.shape[:-2] != y.shape[:-2]:
        try:
            lead = torch.broadcast_shapes(x.shape[:-2], y.shape[:-2])
        except RuntimeError as error:
            shapes = f"{tuple(x.shape)} and {tuple(y.shape)}"
            raise ValueError(f"the dimensions before the rows must agree, or be 1 on one side; got {shapes}") from error
        x, y = x.expand(*lead, -1, -1), y.expand(*lead, -1, -1)
    off = torch.autocast(x.device.type, enabled=False) if torch.is_autocast_enabled(x.device.type) else nullcontext()
    with off:
        yield x, y


def need_tensor(name: str, value: Any, *, shape: str = "(n, d)") -> None:
    """Raise ValueError for what is no tensor, such as a list or an array."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must be a tensor of shape {shape}; got a {type(value).__name__}: torch.as_tensor makes one")


def in_a_unit(*sides: Tensor) -> tuple[Any, ...]:
    """The sides (..., n, d), then their unit (...): divided by one power of two, unless they are of a size to compute with.

    Squares of float32 overflow above 1e19 and lose digits below 1e-19, though few results depend on the unit. Division by
    a power of two rounds nothing. On the CPU the unit is the number 1 for usual sizes, at the cost of a norm; elsewhere no
    value is read.
    """
    with torch.no_grad():
        if all(readable(side) and _of_usual_size(side) for side in sides):
            return *sides, 1.0
        largest = torch.stack([side.abs().amax((-2, -1)) for side in sides]).amax(0)
        unit = torch.exp2(torch.log2(largest).floor())
        unit = torch.where(largest.isfinite() & (largest > 0), unit, 1.0)
    return *(side / unit[..., None, None] for side in sides), unit


def _of_usual_size(x: Tensor) -> bool:
    smallest, largest = torch.linalg.vector_norm(x, dim=(-2, -1)).aminmax()
    return float(smallest) > LEAST and float(largest) < LARGEST


def in_units(value: Tensor, unit: Tensor | float, power: int) -> Tensor:
    """The value (...) of data divided by ``unit`` (...), times that to a power, as the data's own unit has it.

    Raises ValueError, where it can be read, if the type holds no such number, or none by which its gradient grows.
    """
    if isinstance(unit, float):
        return value
    result, slope = value, torch.ones_like(unit)
    for _ in range(power):
        result, slope = result * unit, slope * unit
    bad = value.isfinite() & (value != 0) & ~(result.isfinite() & (result != 0))
    bad = bad | slope.isinf() if wants_gradient(result) else bad
    refuse(bad, f"the value lies beyond the range of {value.dtype}: give the features in another unit, or as float64")
    return result


def positive(**settings: Any) -> None:
    """Raise ValueError for a setting that is no finite number above 0, or no tensor of such."""
    for name, value in settings.items():
        words = f"{name} must be a finite number above 0"
        if isinstance(value, Tensor):
            refuse(~((value > 0) & value.isfinite()), words)
        elif isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 < float(value) < math.inf:
            raise ValueError(f"{words}; got {value!r}")


def counted(**settings: Any) -> None:
    """Raise ValueError for a setting that is no whole number above 0."""
    for name, value in settings.items():
        if isinstance(value, bool) or not isinstance(value, numbers.Integral) or int(value) < 1:
            raise ValueError(f"{name} must be a whole number, at least 1; got {value!r}")


def one_of(setting: str, value: str, known: Sequence[str]) -> None:
    """Raise ValueError where a setting has a value that it doesn't know."""
    if value not in known:
        raise ValueError(f"unknown {setting} '{value}': use {' or '.join(repr(name) for name in known)}")


def need_points(name: str, least: int, x: Tensor, y: Tensor) -> None:
    """Raise ValueError where a sample has too few points for the measure to be defined."""
    fewest = min(x.shape[-2], y.shape[-2])
    if fewest < least:
        raise ValueError(f"{name} needs at least {least} points in each sample; got {x.shape[-2]} and {y.shape[-2]}")


def wants_gradient(x: Tensor) -> bool:
    """Whether a gradient for x will be asked for."""
    return x.requires_grad and torch.is_grad_enabled()


def pooled_centre(x: Tensor, y: Tensor) -> Tensor:
    """The point (..., 1, d) half-way between the means, detached."""
    return ((x.mean(-2, keepdim=True) + y.mean(-2, keepdim=True)) / 2).detach()


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """Squared distances (..., n, m) of the points of x (..., n, d) and y (..., m, d), by one matrix product.

    The pooled mean is taken off first: language models have coordinates far from zero, and |x|^2 + |y|^2 - 2xy of those
    loses every digit. Pass the same tensor twice for distances within a sample: its diagonal is then exactly zero.
    """
    centre = pooled_centre(x, y)
    a, b = x - centre, y - centre
    cross = a @ b.mT
    distances = cross.mul_(-2).add_(a.square().sum(-1)[..., :, None]).add_(b.square().sum(-1)[..., None, :])
    distances.clamp_min_(0)
    if x is y:
        distances.diagonal(dim1=-2, dim2=-1).zero_()
    return distances


def pair_gradient(weights: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The gradient in x of sum_ij weights_ij |x_i - y_j|^2 / 2 with constant weights (..., n, m)."""
    centre = pooled_centre(x, y)
    return weights.sum(-1, keepdim=True) * (x - centre) - weights @ (y - centre)


def mean_squared_distance(x: Tensor, y: Tensor) -> Tensor:
    """Mean squared distance (...) of two points drawn from x and y in equal parts, detached; 1 where all points agree.

    Equal parts, whatever n and m are: so unequal batch sizes don't change the length that it stands for.
    """
    x, y = x.detach(), y.detach()
    centre_x, centre_y = x.mean(-2, keepdim=True), y.mean(-2, keepdim=True)
    spread = (x - centre_x).square().sum(-1).mean(-1) + (y - centre_y).square().sum(-1).mean(-1)
    return one_if_zero(spread + (centre_x - centre_y).square().sum((-2, -1)) / 2)


def one_if_zero(value: Tensor) -> Tensor:
    """The value, with 1 in place of 0, so that identical points can be divided by their scale."""
    return torch.where(value == 0, torch.ones_like(value), value)


def direction(vector: Tensor) -> Tensor:
    """Vectors (..., d) over their length; zero, with a finite gradient, where they are zero."""
    # Divided by the largest coordinate first, so that no square under- or overflows and no absolute epsilon is needed.
    vector = vector / one_if_zero(vector.detach().abs().amax(-1, keepdim=True))
    return vector / one_if_zero(vector.square().sum(-1, keepdim=True)).sqrt()


class _KnownGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors[len(tensors) // 2 :])
        return value.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            # A constant second derivative would be taken for 0 in a sum with other losses.
            raise RuntimeError("measures have no second derivative: call backward without create_graph")
        gradients = ctx.saved_tensors
        return (None, *(upstream[..., None, None] * gradient for gradient in gradients), *(None for _ in gradients))


def with_gradient(value: Tensor, *pairs: tuple[Tensor, Tensor | None]) -> Tensor:
    """Attach gradients that are known already: pairs (tensor (..., n, d), gradient of the value (...) in it or None).

    Nothing of size n x m is then kept for the backward pass, which holds no matrix product that an ambient autocast
    could round. Asking for a second derivative raises RuntimeError.
    """
    known = [(tensor, gradient) for tensor, gradient in pairs if gradient is not None]
    if not known:
        return value
    result: Tensor = _KnownGradient.apply(value, *(t for t, _ in known), *(g for _, g in known))
    return result
