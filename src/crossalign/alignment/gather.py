"""Features of all processes in one place, so that a score that couples rows sees the whole batch."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._common import need_tensor


def gather_features(x: Tensor, rows: Sequence[int] | None = None) -> Tensor:
    """The rows of all processes' x (n, p), process 0's first: (N, p) on each of them, N the sum of their n.

    The shares may differ in their number of rows, which ``rows`` says of each process; without it they ask one another, for
    which the host waits. Every process calls this, on both sides of the pairs, and computes
    the same score of the gathered features. Without torch.distributed, or with one process, x comes back as it is.

    Convention: the gradient is summed over processes, since each of them has its copy of the score. Where gradients are
    then averaged over the W processes, as DDP and FSDP do, the result is exactly that of one process with all rows.
    Whoever sums gradients by hand divides the score by W. All processes run the backward pass, or none. The rows that a
    process keeps from others (`torch.distributed.all_gather` with the own share put back) would give 1/W of it.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return x
    need_tensor("x", x, shape="(n, p)")
    if x.ndim != 2:
        raise ValueError(f"gather_features takes features of shape (n, p); got {tuple(x.shape)}")
    gathered: Tensor = _Gather.apply(x, rows)
    return gathered


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Sequence[int] | None) -> Tensor:
        world, rank = dist.get_world_size(), dist.get_rank()
        if rows is None:
            counts = [torch.zeros(1, dtype=torch.long, device=x.device) for _ in range(world)]
            dist.all_gather(counts, torch.tensor([len(x)], device=x.device))
            rows = torch.cat(counts).tolist()
        # Shares of one size, which every backend can gather.
        share = x.new_zeros(max(rows), x.shape[1])
        share[: len(x)] = x
        shares = [torch.empty_like(share) for _ in range(world)]
        dist.all_gather(shares, share)
        ctx.begin, ctx.rows = sum(rows[:rank]), rows[rank]
        return torch.cat([part[:count] for part, count in zip(shares, rows, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        share: Tensor = total[ctx.begin : ctx.begin + ctx.rows]
        return share, None
