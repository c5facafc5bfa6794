"""The similarities beside independent implementations, in float64 to 1e-12: 20 drawn inputs and 5 degenerate ones.

What a package is known to get wrong is compared with the definition in NumPy instead, and said here.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from crossalign.alignment import (
    cca,
    cka,
    dot_product,
    kernel_alignment,
    koleo,
    l1,
    l2,
    linear_regression,
    mutual_knn,
    pwcca,
    soft_mutual_knn,
    svcca,
)

repsim = pytest.importorskip("repsim")
# Numbers of rows with an odd number of pairs: of an even one, NumPy and torch have different medians.
DRAWN = [
    (n, p, q, seed) for seed, (n, p, q) in enumerate([(42, 5, 4), (63, 12, 9), (66, 3, 20), (50, 8, 1), (122, 30, 25)] * 4)
]
DEGENERATE = ["rows repeated", "features repeated", "a feature constant", "one feature", "units far apart"]
Inputs = list[tuple[str, np.ndarray, np.ndarray]]
WORST: dict[str, tuple[int, float]] = {}
"""By test: on how many inputs, and the largest difference; ``benchmarks/agreement.py`` makes a table of it."""


def _draw(n: int, p: int, q: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    cause = random.normal(size=(n, 3))
    x = cause @ random.normal(size=(3, p)) + random.normal(size=(n, p)) + 1
    return x, cause @ random.normal(size=(3, q)) + random.normal(size=(n, q)) - 2


def _degenerate(kind: str) -> tuple[np.ndarray, np.ndarray]:
    x, y = _draw(62, 6, 5, 99)
    match kind:
        case "rows repeated":
            return np.concatenate([x[:31], x[:31]]), np.concatenate([y[:31], y[:31]])
        case "features repeated":
            return np.concatenate([x, x[:, :3] * 2, x[:, :1] + x[:, 1:2]], 1), y
        case "a feature constant":
            return np.concatenate([x, np.full((62, 1), 0.1)], 1), np.concatenate([np.full((62, 1), 5.0), y], 1)
        case "one feature":
            return x[:, :1], y
    return x * np.array([1e-3, 1, 1, 1, 1, 1e2]) + np.array([0, 0, 0, 0, 0, 3000.0]), y


def _inputs() -> Inputs:
    drawn = [(f"{n} x {p}, {n} x {q}, seed {seed}", *_draw(n, p, q, seed)) for n, p, q, seed in DRAWN]
    return [*drawn, *((kind, *_degenerate(kind)) for kind in DEGENERATE)]


def _agree(ours: Callable[..., Tensor], peer: Callable[..., Any], inputs: Inputs) -> None:
    for name, x, y in inputs:
        value, theirs = float(ours(torch.from_numpy(x), torch.from_numpy(y))), float(peer(x, y))
        test = os.environ["PYTEST_CURRENT_TEST"].partition("::")[2].removesuffix(" (call)")
        count, worst = WORST.get(test, (0, 0.0))
        WORST[test] = count + 1, max(worst, abs(value - theirs))
        assert value == pytest.approx(theirs, rel=0, abs=1e-12), name


def test_biased_linear_cka() -> None:
    _agree(cka, lambda x, y: repsim.cka([x, y], "linear", "gretton")[0, 1], _inputs())


def test_biased_linear_cka_is_the_whitened_cosine_of_distances() -> None:
    toolbox = pytest.importorskip("rsatoolbox")

    def peer(x: np.ndarray, y: np.ndarray) -> float:
        rdms = [toolbox.rdm.calc_rdm(toolbox.data.Dataset(z - z.mean(0)), method="euclidean") for z in (x, y)]
        return float(toolbox.rdm.compare(*rdms, method="cosine_cov").item())

    _agree(cka, peer, _inputs())


@pytest.mark.parametrize("unbiased", [False, True])
def test_linear_cka_of_ckatorch(unbiased: bool) -> None:
    peer = pytest.importorskip("ckatorch").cka_base

    def tensors(x: np.ndarray, y: np.ndarray) -> Tensor:
        return peer(torch.from_numpy(x), torch.from_numpy(y), unbiased=unbiased, method="fro_norm")

    _agree(partial(cka, debiased=unbiased), tensors, _inputs())


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_debiased_cka_is_a_ratio_of_unbiased_hsics(kernel: str) -> None:
    """Of three calls of repsim's HSIC: its own debiased CKA divides by the biased one, so that a copy scores below 1."""

    def peer(x: np.ndarray, y: np.ndarray) -> float:
        hsic = repsim.hsic([x - x.mean(0), y - y.mean(0)], kernel, "song")
        return float(hsic[0, 1] / np.sqrt(hsic[0, 0] * hsic[1, 1]))

    _agree(partial(cka, kernel=kernel, debiased=True), peer, _inputs())


def test_rbf_cka_has_the_median_of_the_distances_of_different_rows() -> None:
    _agree(partial(cka, kernel="rbf"), lambda x, y: repsim.cka([x, y], "rbf", "gretton")[0, 1], _inputs())


def test_rbf_cka_with_a_given_bandwidth() -> None:
    """ckatorch takes the median of all n^2 distances, zeros included: with that given, the rest is the same."""
    peer = pytest.importorskip("ckatorch").cka_base

    def ours(x: Tensor, y: Tensor) -> Tensor:
        medians = [torch.cdist(z, z).median() for z in (x, y)]
        return cka(x / medians[0], y / medians[1], kernel="rbf", bandwidth=1.0)

    _agree(ours, lambda x, y: peer(torch.from_numpy(x), torch.from_numpy(y), kernel="rbf"), _inputs())


@pytest.mark.parametrize(("ours", "theirs"), [("mean", "pillai"), ("mean_squared", "yanai")])
def test_cca_of_repsim(ours: str, theirs: str) -> None:
    """Not where a feature is constant: it counts that as a direction, with a correlation of 0."""
    inputs = [entry for entry in _inputs() if entry[0] != "a feature constant"]
    _agree(partial(cca, summary=ours), lambda x, y: repsim.cca([x, y], theirs)[0, 1], inputs)


@pytest.mark.parametrize("summary", ["mean", "mean_squared"])
def test_cca_of_the_definition(summary: str) -> None:
    def peer(x: np.ndarray, y: np.ndarray) -> float:
        rho = _correlations(_leading(x, 1.0), _leading(y, 1.0))
        return float((rho if summary == "mean" else rho**2).mean())

    _agree(partial(cca, summary=summary), peer, _inputs())


@pytest.mark.parametrize("variance", [0.99, 0.8])
def test_svcca_of_the_definition(variance: float) -> None:
    """No package here is right: one keeps a single direction, one truncates after whitening."""

    def peer(x: np.ndarray, y: np.ndarray) -> float:
        return float(_correlations(_leading(x, variance), _leading(y, variance)).mean())

    _agree(partial(svcca, variance=variance), peer, _inputs())


def test_pwcca_of_repsim_is_the_mean_of_both_weightings() -> None:
    def both(x: Tensor, y: Tensor) -> Tensor:
        return (pwcca(x, y, weight_by="x") + pwcca(x, y, weight_by="y")) / 2

    _agree(both, lambda x, y: repsim.pwcca([x, y])[0, 1], _inputs())
    for _, x, y in _inputs()[: len(DRAWN)]:
        default = float(pwcca(torch.from_numpy(x), torch.from_numpy(y)))
        fewer = "x" if x.shape[1] <= y.shape[1] else "y"
        assert default == float(pwcca(torch.from_numpy(x), torch.from_numpy(y), weight_by=fewer))


@pytest.mark.parametrize(("ours", "theirs"), [("uniform", "uniform_average"), ("variance", "variance_weighted")])
def test_linear_regression_of_scikit_learn(ours: str, theirs: str) -> None:
    """It counts a constant output as predicted; we leave it out, as there is nothing to predict."""
    models, metrics = pytest.importorskip("sklearn.linear_model"), pytest.importorskip("sklearn.metrics")

    def peer(x: np.ndarray, y: np.ndarray) -> float:
        y = y[:, np.ptp(y, axis=0) > 0]
        predicted = models.LinearRegression().fit(x, y).predict(x)
        return float(metrics.r2_score(y, predicted, multioutput=theirs))

    _agree(partial(linear_regression, average=ours), peer, _inputs())


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_mutual_knn_of_repralign(distance: str) -> None:
    """It measures Euclidean distances: of rows of length 1, these have the order of cosines. Drawn inputs, without ties."""
    peer = pytest.importorskip("repralign.metrics.cknna").cknna

    def scaled(x: np.ndarray, y: np.ndarray) -> float:
        if distance == "cosine":
            x, y = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (x, y))
        return float(peer(torch.from_numpy(x), torch.from_numpy(y), k=7))

    # The cosines of a single feature are 1 and -1: all ties.
    inputs = [entry for entry in _inputs()[: len(DRAWN)] if entry[2].shape[1] > 1]
    _agree(partial(mutual_knn, k=7, distance=distance), scaled, inputs)


def _apart(x: np.ndarray, distance: str) -> np.ndarray:
    """Squared distances (n, n) of rows, infinite from a row to itself."""
    if distance == "cosine":
        x = x / np.linalg.norm(x, axis=1, keepdims=True)
    return ((x[:, None] - x[None]) ** 2).sum(-1) + np.diag(np.full(len(x), np.inf))


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_mutual_knn_of_the_definition(distance: str) -> None:
    """Ties included, which share the last places: repeated rows, and all the cosines of one feature."""

    def members(x: np.ndarray) -> np.ndarray:
        apart = _apart(x, distance)
        slack = 1e-12 * apart[np.isfinite(apart)].mean()
        last = np.sort(apart, 1)[:, 6:7]
        nearer, tied = apart < last - slack, abs(apart - last) <= slack
        return nearer + tied * (7 - nearer.sum(1, keepdims=True)) / tied.sum(1, keepdims=True)

    def peer(x: np.ndarray, y: np.ndarray) -> float:
        return float(np.minimum(members(x), members(y)).sum(1).mean() / 7)

    _agree(partial(mutual_knn, k=7, distance=distance), peer, _inputs())


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_soft_mutual_knn_of_the_definition(distance: str) -> None:
    def degrees(x: np.ndarray) -> np.ndarray:
        apart = _apart(x, distance)
        border = np.sort(apart, 1)[:, 6:8].mean(1, keepdims=True)
        width = 0.02 * apart[np.isfinite(apart)].mean()
        return 1 / (1 + np.exp(np.minimum((apart - border) / width, 700)))

    def peer(x: np.ndarray, y: np.ndarray) -> float:
        a, b = degrees(x), degrees(y)
        return float((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))

    _agree(partial(soft_mutual_knn, k=7, distance=distance), peer, _inputs())


@pytest.mark.parametrize("normalize", [True, False])
def test_dot_product_of_the_definition(normalize: bool) -> None:
    def peer(x: np.ndarray, y: np.ndarray) -> float:
        common = min(x.shape[1], y.shape[1])
        if normalize:
            x, y = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (x, y))
        products = x[:, :common] * y[:, :common]
        return float(products.sum(1).mean() if normalize else products.mean())

    _agree(partial(dot_product, normalize=normalize), peer, _inputs())


def test_koleo_of_the_definition() -> None:
    """DINOv2's code in NumPy; of one feature and of repeated rows all distances are zero."""

    def peer(x: np.ndarray, _: np.ndarray) -> float:
        return float(-np.log(np.sqrt(_apart(x, "cosine").min(1)) + 1e-8).mean())

    _agree(lambda x, _: koleo(x), peer, _inputs())


@pytest.mark.parametrize(("ours", "entry"), [(l1, np.abs), (l2, np.square)])
def test_penalty_of_the_definition(ours: Callable[..., Tensor], entry: Callable[..., Any]) -> None:
    """Over two tensors, as weights are: each entry counts once. Scaled, so that no square has fewer digits than is asked."""

    def peer(x: np.ndarray, y: np.ndarray) -> float:
        return float(entry(np.concatenate([x.ravel(), y.ravel()]) / 3000).mean())

    _agree(lambda x, y: ours([x / 3000, y / 3000]), peer, _inputs())


def test_kernel_alignment_of_the_definition() -> None:
    def peer(x: np.ndarray, y: np.ndarray) -> float:
        k, l = x @ x.T, y @ y.T  # noqa: E741
        return float((k * l).sum() / np.linalg.norm(k) / np.linalg.norm(l))

    _agree(kernel_alignment, peer, _inputs())


def _leading(x: np.ndarray, variance: float) -> np.ndarray:
    """Left singular vectors of the centred features that hold that part of the squared singular values."""
    u, s, _ = np.linalg.svd(x - x.mean(0), full_matrices=False)
    there = int((s > 1e-9 * s[0]).sum())
    held = np.cumsum(s[:there] ** 2) / (s[:there] ** 2).sum()
    kept = there if variance == 1 else int(np.argmax(held >= variance)) + 1
    return u[:, :kept]


def _correlations(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.linalg.svd(a.T @ b, compute_uv=False)
