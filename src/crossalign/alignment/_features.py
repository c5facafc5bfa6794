"""What the similarities share: features centred, and a refusal of those that don't vary."""

import torch
from torch import Tensor

# Features whose spread is less than this many roundings of their size are constant: what is left is noise. The rounding of
# a mean is among it: 2 of these for some thousand rows, 8 for a million.
ROUNDINGS = 16


def centre(x: Tensor) -> Tensor:
    """x (..., n, p) less its mean over rows: before any product, which of coordinates far from zero keeps few digits."""
    return x - x.mean(-2, keepdim=True)


def nonconstant(name: str, size: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The squared sizes (2, ...) of the centred features of x and y, unless one is nothing but rounding.

    Where all rows agree a centred similarity is 0 / 0. On the CPU this raises ValueError; elsewhere, where reading a
    value would make the host wait, the size becomes NaN.
    """
    rounding = ROUNDINGS * torch.finfo(x.dtype).eps
    # Rows that agree are as long as the first.
    first = torch.stack([torch.linalg.vector_norm(side[..., 0, :], dim=-1) for side in (x, y)])
    constant = size <= (x.shape[-2] ** 0.5 * rounding * first).square_()
    read = refuse(
        constant,
        f"{name} centres its features, and the rows of x, or those of y, are all equal: its value would be 0 / 0; "
        "use kernel_alignment ('kernel-alignment'), which doesn't centre",
    )
    return size if read else size.masked_fill(constant, torch.nan)


def squared_distances_within(rows: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Squared distances (2, ..., n, n) of the rows of each of two centred sides, and the rows' squared lengths (2, ..., n).

    Both sides in one tensor: what follows takes half as many steps, of which the time of small batches is made. One side
    alone gives (1, ..., n, n). Not differentiable.
    """
    distances = rows[0].new_empty(len(rows), *rows[0].shape[:-1], rows[0].shape[-2])
    for side, products in zip(rows, distances, strict=True):
        torch.matmul(side, side.mT, out=products)
    squares = distances.diagonal(dim1=-2, dim2=-1).clone()
    torch.add(squares[..., :, None], distances, alpha=-2, out=distances).add_(squares[..., None, :]).clamp_min_(0)
    distances.diagonal(dim1=-2, dim2=-1).zero_()
    return distances, squares


def refuse(bad: Tensor, message: str) -> bool:
    """Raise ValueError where any of `bad` is true, if that is readable; whether it was."""
    if readable(bad) and bool(bad.any()):
        raise ValueError(message)
    return readable(bad)


def readable(x: Tensor) -> bool:
    """Whether the host can look at values without waiting for a device; a subclass of tensors may have none."""
    return x.device.type == "cpu" and type(x) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()
