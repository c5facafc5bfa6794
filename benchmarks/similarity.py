"""Times of the similarities beside other implementations, on this machine.

    python benchmarks/similarity.py [--threads 2] [--runs 5] [--quick] [--out FILE.md]

Every figure is the median of several runs in one process, in milliseconds, after a pause and a warm-up run: the value alone,
and the value with its gradient in x, as y is a frozen teacher's. Features are float32, x and y both n x d, for all alike:
most packages convert them to float64 first. A ratio is their time over ours. What is short is run more often, for a fifth of
a second; what takes longer than 20 s in all fewer times, at least once. "Plain torch" is no package but what one would write
oneself, without checks, for its gradient.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ckatorch
import numpy as np
import repsim
import rsatoolbox
import torch
from repralign.metrics.cknna import cknna
from sklearn.linear_model import LinearRegression
from sklearn.metrics import r2_score
from torch import Tensor

from crossalign.alignment import cca, cka, linear_regression, mutual_knn, pwcca, svcca

Score = Callable[[Tensor, Tensor], Any]
PATIENCE = 20.0  # seconds for all runs of one figure
LEAST = 0.2  # seconds for all runs of one figure, of up to ten times as many
PAUSE = 0.2  # seconds before each figure: the threads of NumPy's BLAS and of OpenMP spin on when their work is done
ROWS, WIDTHS = (64, 512, 4096), (384, 768, 1024)
PACKAGES = ("repsim", "ckatorch", "rsatoolbox", "repralign", "scikit-learn")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="small sizes and two runs, to see that everything works")
    parser.add_argument("--out", type=Path, help="write the tables to this file too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows, widths, runs = ((64, 256), (48,), 2) if options.quick else (ROWS, WIDTHS, options.runs)
    lines: list[str] = []
    for line in report(rows, widths, runs, options.threads):
        lines.append(line)
        print(line, flush=True)
    if options.out:
        options.out.write_text("\n".join(lines) + "\n")


def report(rows: tuple[int, ...], widths: tuple[int, ...], runs: int, threads: int) -> Iterator[str]:
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", *PACKAGES))
    yield f"{packages}; {platform.machine()} CPU, {threads} thread(s), median of {runs} runs;"
    yield f"load average at the start {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores."
    yield ""
    yield "| similarity | n x d | other implementation | what | ours, ms | theirs, ms | ratio |"
    yield "| --- | --- | --- | --- | ---: | ---: | ---: |"
    for name, (ours, peers, differentiable) in ANY_ROWS.items():
        for n in rows:
            for d in widths:
                yield from cell(name, n, d, ours, peers, differentiable, runs)
    for name, (ours, peers, differentiable) in MANY_ROWS.items():
        for d in widths:
            yield from cell(name, max(rows), d, ours, peers, differentiable, runs)
    yield ""
    yield "Linear CKA beside nothing but the matrix products that it must do:"
    yield ""
    yield "| n x d | what | ours, ms | products, ms | ratio |"
    yield "| --- | --- | ---: | ---: | ---: |"
    for n in rows[1:]:
        for d in widths:
            yield from products(n, d, runs)


def cell(
    name: str, n: int, d: int, ours: Score, peers: dict[str, Score], differentiable: dict[str, Score], runs: int
) -> Iterator[str]:
    """The lines of one size: each other implementation against one measurement of ours."""
    x, y = features(n, d)
    for what, others, measure in (("value", peers, value), ("value, gradient", differentiable, value_and_gradient)):
        mine = median_ms(partial(measure, ours, x, y), runs) if others else 0.0
        for other, score in others.items():
            theirs = median_ms(partial(measure, score, x, y), runs)
            yield f"| {name} | {n:,} x {d} | {other} | {what} | {mine:,.2f} | {theirs:,.2f} | {theirs / mine:,.1f} |"


def products(n: int, d: int, runs: int) -> Iterator[str]:
    x, y = features(n, d)
    wide = d > n

    def forward() -> tuple[Tensor, ...]:
        return (x @ x.T, y @ y.T) if wide else (x.T @ x, y.T @ y, x.T @ y)

    def both() -> tuple[Tensor, ...]:
        made = forward()
        return (made[1] @ x,) if wide else (y @ made[2].T, x @ made[0])

    for what, call, measure in (("value", forward, value), ("value, gradient", both, value_and_gradient)):
        mine, least = median_ms(partial(measure, cka, x, y), runs), median_ms(call, runs)
        yield f"| {n:,} x {d} | {what} | {mine:,.2f} | {least:,.2f} | {mine / least:,.2f} |"


def value(score: Score, x: Tensor, y: Tensor) -> object:
    return score(x, y)


def value_and_gradient(score: Score, x: Tensor, y: Tensor) -> object:
    moved = x.clone().requires_grad_()
    score(moved, y).backward()
    return moved.grad


def median_ms(call: Callable[[], object], runs: int) -> float:
    """The median time of a call in milliseconds; the first call doesn't count unless it is the only one."""
    time.sleep(PAUSE)
    times: list[float] = []
    while len(times) <= runs or (sum(times) < LEAST and len(times) <= 10 * runs):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
        if sum(times) > PATIENCE:
            break
    return statistics.median(times[1:] or times) * 1000


def features(n: int, d: int) -> tuple[Tensor, Tensor]:
    """Two views of 16 hidden numbers, with noise."""
    generator = torch.Generator().manual_seed(0)
    cause = torch.randn(n, 16, generator=generator)
    x, y = (cause @ torch.randn(16, d, generator=generator) + torch.randn(n, d, generator=generator) for _ in range(2))
    return x, y


def of_arrays(score: Callable[[list[np.ndarray]], Any]) -> Score:
    return lambda x, y: score([x.numpy(), y.numpy()])


def rsa_cka(x: Tensor, y: Tensor) -> float:
    rdms = [rsatoolbox.rdm.calc_rdm(rsatoolbox.data.Dataset(z.numpy()), method="euclidean") for z in (x, y)]
    return float(rsatoolbox.rdm.compare(*rdms, method="cosine_cov").item())


def sklearn_r2(x: Tensor, y: Tensor) -> float:
    a, b = x.numpy(), y.numpy()
    return float(r2_score(b, LinearRegression().fit(a, b).predict(a)))


def plain_cka(x: Tensor, y: Tensor, kernel: str = "linear", debiased: bool = False) -> Tensor:
    """As it is usually written: two kernels, centred by the centring matrix's products, and autograd."""
    kernels = []
    for z in (x, y):
        if kernel == "linear":
            k = z @ z.T
        else:
            square = torch.cdist(z, z).square()
            k = torch.exp(-square / (2 * square.detach().median()))
        n = len(z)
        if debiased:
            k = k - torch.diag(k.diagonal())
            rows = k.sum(0) / (n - 2)
            k = k - rows[:, None] - rows[None] + k.sum() / ((n - 1) * (n - 2))
            k = k - torch.diag(k.diagonal())
        else:
            k = k - k.mean(0, keepdim=True) - k.mean(1, keepdim=True) + k.mean()
        kernels.append(k)
    k, l = kernels  # noqa: E741
    score: Tensor = (k * l).sum() / (k.norm() * l.norm())
    return score


def plain_cca(x: Tensor, y: Tensor) -> Tensor:
    bases = [torch.linalg.qr(z - z.mean(0))[0] for z in (x, y)]
    score: Tensor = torch.linalg.svdvals(bases[0].T @ bases[1]).mean()
    return score


def plain_svcca(x: Tensor, y: Tensor) -> Tensor:
    bases = []
    for z in (x, y):
        u, s, _ = torch.linalg.svd(z - z.mean(0), full_matrices=False)
        held = s.detach().square().cumsum(0) / s.detach().square().sum()
        bases.append(u[:, : int((held < 0.99).sum()) + 1])
    score: Tensor = torch.linalg.svdvals(bases[0].T @ bases[1]).mean()
    return score


def plain_r2(x: Tensor, y: Tensor) -> Tensor:
    basis, centred = torch.linalg.qr(x - x.mean(0))[0], y - y.mean(0)
    score: Tensor = ((basis.T @ centred).square().sum(0) / centred.square().sum(0)).mean()
    return score


PLAIN = "plain torch, autograd"
ckatorch_hsic = partial(ckatorch.cka_base, method="hsic")
# Ours, the packages that give the value, and what has a gradient. ckatorch's default form cuts the graph: its other has one.
ANY_ROWS: dict[str, tuple[Score, dict[str, Score], dict[str, Score]]] = {
    "cka-linear": (
        cka,
        {
            "repsim": of_arrays(lambda pair: repsim.cka(pair, "linear", "gretton")),
            "ckatorch": ckatorch.cka_base,
            "rsatoolbox": rsa_cka,
        },
        {"ckatorch hsic": ckatorch_hsic, PLAIN: plain_cka},
    ),
    "cka-linear-debiased": (
        partial(cka, debiased=True),
        {
            "repsim hsic": of_arrays(lambda pair: repsim.hsic(pair, "linear", "song")),
            "ckatorch": partial(ckatorch.cka_base, unbiased=True),
        },
        {PLAIN: partial(plain_cka, debiased=True)},
    ),
    "cka-rbf": (
        partial(cka, kernel="rbf"),
        {
            "repsim": of_arrays(lambda pair: repsim.cka(pair, "rbf", "gretton")),
            "ckatorch": partial(ckatorch.cka_base, kernel="rbf"),
        },
        {"ckatorch hsic": partial(ckatorch_hsic, kernel="rbf"), PLAIN: partial(plain_cka, kernel="rbf")},
    ),
    "cka-rbf-debiased": (
        partial(cka, kernel="rbf", debiased=True),
        {
            "repsim hsic": of_arrays(lambda pair: repsim.hsic(pair, "rbf", "song")),
            "ckatorch": partial(ckatorch.cka_base, kernel="rbf", unbiased=True),
        },
        {PLAIN: partial(plain_cka, kernel="rbf", debiased=True)},
    ),
    "mutual-knn": (partial(mutual_knn, distance="euclidean"), {"repralign": partial(cknna, k=10)}, {}),
}
# Those of spaces need more rows than both sides have features.
MANY_ROWS: dict[str, tuple[Score, dict[str, Score], dict[str, Score]]] = {
    "cca": (cca, {"repsim": of_arrays(lambda pair: repsim.cca(pair, "pillai"))}, {PLAIN: plain_cca}),
    "svcca": (svcca, {"repsim": of_arrays(lambda pair: repsim.svcca(pair, "pillai"))}, {PLAIN: plain_svcca}),
    "pwcca": (pwcca, {"repsim": of_arrays(repsim.pwcca)}, {}),
    "linear-regression": (linear_regression, {"scikit-learn": sklearn_r2}, {PLAIN: plain_r2}),
}


if __name__ == "__main__":
    main()
