"""Times of the divergences beside other implementations, on this machine.

    python benchmarks/divergence.py [--threads 2] [--runs 5] [--out FILE.md]

Every figure is the median of several runs in one process, in milliseconds, after one warm-up run: the value alone, and
the value with its gradient in the adapted sample (the first one). The other sample is constant, as text targets are.
What takes longer than 20 s in all is run fewer times.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import geomloss
import torch
from torch import Tensor

from crossalign.alignment import OtddTarget, mmd, mmd_orca, otdd, sinkhorn
from crossalign.alignment._common import mean_squared_distance

Measure = Callable[[Tensor], Tensor]
PATIENCE = 20.0  # seconds for all runs of one figure
BANDWIDTHS = (0.25, 0.5, 1.0, 2.0, 4.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write the table to this file too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    lines = [
        f"torch {torch.__version__}, geomloss {geomloss.__version__}, {platform.machine()} CPU, "
        f"{options.threads} thread(s), float32, median of {options.runs} runs; "
        f"load average at the start {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores.",
        "",
        "| divergence | implementation | adapted x constant x width | value, ms | value and gradient, ms |",
        "| --- | --- | --- | ---: | ---: |",
    ]
    print("\n".join(lines), flush=True)
    for row in (*otdd_rows(options.runs), *mmd_rows(options.runs), *sinkhorn_rows(options.runs)):
        lines.append(row)
        print(row, flush=True)
    if options.out:
        options.out.write_text("\n".join(lines) + "\n")


def otdd_rows(runs: int) -> list[str]:
    """160 adapted points against 5,000 constant ones, labels of 10 classes on both sides."""
    x, x_labels = labelled_sample(160, 128, seed=0)
    y, y_labels = labelled_sample(5000, 128, seed=1)
    size = "160 x 5,000 x 128"
    target = OtddTarget(y, y_labels)
    build = median_ms(lambda: OtddTarget(y, y_labels), runs)
    rows = [
        row("otdd, 10 + 10 classes", "ours", size, lambda x: otdd(x, x_labels, y, y_labels), x, runs),
        row(f"otdd, target kept (built once, {build:,.0f} ms)", "ours", size, lambda x: target(x, x_labels), x, runs),
        row("sinkhorn, no labels", "ours", size, against(y, sinkhorn), x, runs),
    ]
    blur = 0.05 * float(mean_squared_distance(x, y).sqrt())
    peer = geomloss.SamplesLoss("sinkhorn", p=2, blur=blur, backend="tensorized")
    return [*rows, row("sinkhorn, no labels", "geomloss, 0.5 cooling", size, against(y, peer), x, runs)]


def mmd_rows(runs: int) -> list[str]:
    """Five bandwidths; the naive form holds every difference of two points at once."""
    rows = []
    for n in (512, 4096):
        x, y = sample(n, 384, seed=0), sample(n, 384, seed=1)
        size = f"{n:,} x {n:,} x 384"
        peer = partial(geomloss_mmd, scale=float(mean_squared_distance(x, y).sqrt()))
        rows += [
            row("mmd, unbiased", "ours", size, against(y, mmd), x, runs),
            row("mmd-orca", "ours", size, against(y, mmd_orca), x, runs),
            row("mmd, V-statistic", "geomloss, 5 calls", size, against(y, peer), x, runs),
        ]
        needed = 3 * (2 * n) ** 2 * 384 * 4
        if needed < free_memory():
            rows.append(row("mmd-orca", "naive, N x N x D", size, against(y, naive_mmd), x, runs))
        else:
            rows.append(f"| mmd-orca | naive, N x N x D | {size} | needs {needed / 2**30:,.0f} GiB | |")
    return rows


def sinkhorn_rows(runs: int) -> list[str]:
    """At the size of a batch; geomloss with its default cooling (less exact), and as exact as ours."""
    x, y = sample(512, 384, seed=0), sample(512, 384, seed=1)
    blur = 0.05 * float(mean_squared_distance(x, y).sqrt())
    size = "512 x 512 x 384"
    reference = sinkhorn(x.double(), y.double(), iterations=3000)

    def entry(name: str, measure: Measure) -> str:
        error = abs(float(measure(x) / reference - 1))
        return row("sinkhorn", f"{name} (relative error {error:.0e})", size, measure, x, runs)

    rows = [entry("ours", against(y, sinkhorn))]
    for cooling in (0.5, 0.9, 0.99):
        peer = geomloss.SamplesLoss("sinkhorn", p=2, blur=blur, scaling=cooling, backend="tensorized")
        rows.append(entry(f"geomloss, {cooling} cooling", against(y, peer)))
    return rows


def against(y: Tensor, divergence: Callable[[Tensor, Tensor], Tensor]) -> Measure:
    """The divergence from a constant sample."""
    return lambda x: divergence(x, y)


def row(divergence: str, implementation: str, size: str, measure: Measure, x: Tensor, runs: int) -> str:
    """One line of the table."""

    def value_and_gradient() -> None:
        adapted = x.clone().requires_grad_()
        measure(adapted).backward()

    value, both = median_ms(lambda: measure(x), runs), median_ms(value_and_gradient, runs)
    return f"| {divergence} | {implementation} | {size} | {value:,.1f} | {both:,.1f} |"


def median_ms(call: Callable[[], object], runs: int) -> float:
    """The median time of a call in milliseconds, after one call that doesn't count."""
    call()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
        if sum(times) > PATIENCE:
            break
    return statistics.median(times) * 1000


def geomloss_mmd(x: Tensor, y: Tensor, scale: float) -> Tensor:
    """The same sum of kernels by one call of geomloss a bandwidth."""
    losses = (geomloss.SamplesLoss("gaussian", blur=scale * (width / 2) ** 0.5, backend="tensorized") for width in BANDWIDTHS)
    return 2 * torch.stack([loss(x, y) for loss in losses]).sum()


def naive_mmd(x: Tensor, y: Tensor) -> Tensor:
    """The textbook form: all differences of the pooled sample, and a kernel matrix for each bandwidth."""
    n, pooled = len(x), torch.cat([x, y])
    squared = (pooled[None] - pooled[:, None]).square().sum(-1)
    base = squared.detach().sum() / (len(pooled) ** 2 - len(pooled))
    kernel = torch.stack([torch.exp(-squared / (base * width)) for width in BANDWIDTHS]).sum(0)
    return kernel[:n, :n].mean() + kernel[n:, n:].mean() - 2 * kernel[:n, n:].mean()


def sample(n: int, d: int, seed: int) -> Tensor:
    """Points of a standard normal distribution, shifted by the seed."""
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) + 0.1 * seed


def labelled_sample(n: int, d: int, seed: int) -> tuple[Tensor, Tensor]:
    """Ten clusters of points, and the number of each point's cluster."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 10, (n,), generator=generator)
    centres = torch.randn(10, d, generator=generator)
    return centres[labels] + torch.randn(n, d, generator=generator), labels


def free_memory() -> int:
    """Bytes of memory that are free on this machine."""
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
