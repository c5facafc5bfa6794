"""Mistakes that other implementations of these scores make, each with data that shows it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from crossalign.alignment import (
    cca,
    cka,
    dot_product,
    get_similarity,
    kernel_alignment,
    kernels,
    linear_regression,
    mutual_knn,
    neighbours,
    participation_ratio,
    pwcca,
    soft_mutual_knn,
    svcca,
)

SPACES: dict[str, Callable[..., Tensor]] = {
    "cca": cca,
    "cca-squared": partial(cca, summary="mean_squared"),
    "svcca": svcca,
    "pwcca": pwcca,
    "linear-regression": linear_regression,
}


@pytest.mark.parametrize(("n", "biased", "spread"), [(8, 0.99, 0.23), (32, 0.96, 0.04), (64, 0.92, 0.02), (512, 0.60, 0.002)])
def test_few_rows_of_unrelated_features_score_near_one_unless_debiased(n: int, biased: float, spread: float) -> None:
    """Tiny batches lie: 768 dimensions. The score is averaged over draws, since a single one scatters by `spread`."""
    draws = 2 if n == 512 else 60
    pairs = [(torch.randn(n, 768), torch.randn(n, 768)) for _ in range(draws)]
    assert sum(float(cka(x, y)) for x, y in pairs) / draws == pytest.approx(biased, abs=0.01)
    values = torch.tensor([float(cka(x, y, debiased=True)) for x, y in pairs])
    assert abs(float(values.mean())) < 4 * spread / draws**0.5
    if draws > 2:
        assert float(values.std()) == pytest.approx(spread, rel=0.4)


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_debiased_cka_is_the_same_whatever_the_number_of_rows(kernel: str, paired: Any) -> None:
    """Batches of 16 average to what 4,000 rows score; biased, they come nowhere near it."""
    x, y = paired(4000, 24, 20, hidden=8, dtype=torch.float32)
    batches = (x[:3840].unflatten(0, (240, 16)), y[:3840].unflatten(0, (240, 16)))
    whole = float(cka(x, y, kernel=kernel, debiased=True))
    assert float(cka(*batches, kernel=kernel, debiased=True).mean()) == pytest.approx(whole, abs=0.01)
    assert float(cka(*batches, kernel=kernel).mean()) > whole + 0.08


def test_debiased_cka_is_not_clamped_so_that_a_negative_score_has_a_gradient() -> None:
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        x, y = torch.randn(12, 30, generator=generator), torch.randn(12, 30, generator=generator)
        value = cka(x.requires_grad_(), y, debiased=True)
        if float(value.detach()) < -0.05:
            (gradient,) = torch.autograd.grad(value, x)
            assert gradient.abs().max() > 1e-4
            return
    pytest.fail("no draw scored below 0")


def test_debiased_cka_refuses_rows_that_are_all_equally_far_apart() -> None:
    """Nothing is left of such a kernel without its diagonal: 0 / 0, not rounding over rounding."""
    x = torch.randn(12, 4)
    for kernel in ("linear", "rbf"):
        with pytest.raises(ValueError, match="debiased cka is 0 / 0 here: all rows of x, or all of y, are equally far"):
            cka(x, torch.eye(12), kernel=kernel, debiased=True)
        assert cka(x, torch.eye(12), kernel=kernel).isfinite()
    with pytest.raises(ValueError, match="debiased cka needs at least 4 points"):
        cka(x[:3], x[:3], debiased=True)


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_cka_of_two_rows_is_refused_since_it_is_1_whatever_they_are(kernel: str) -> None:
    x = torch.randn(3, 4)
    with pytest.raises(ValueError, match="cka needs at least 3 points"):
        cka(x[:2], torch.randn(2, 5), kernel=kernel)
    assert cka(x, torch.randn(3, 5), kernel=kernel) < 0.9999


def test_an_offset_hides_the_rest_from_what_does_not_centre_and_not_from_cka(paired: Any) -> None:
    x, y = paired(256, 48, 40, hidden=8, dtype=torch.float32)
    shifted = torch.nn.functional.pad(x, (0, 1), value=3000.0)
    for debiased in (False, True):
        torch.testing.assert_close(cka(shifted, y, debiased=debiased), cka(x, y, debiased=debiased), rtol=1e-5, atol=0)
    assert float(kernel_alignment(shifted, y + 3000)) > 0.999 > 0.85 > float(cka(shifted, y + 3000))


@pytest.mark.parametrize("n", [59, 64])
def test_rbf_bandwidth_is_the_median_of_that_sides_distances_and_constant(n: int, paired: Any) -> None:
    """Of the 2,016 distances of 64 rows it is the lower middle one, as torch has it, not the mean of both."""
    x, y = paired(n, 5, 4)
    y = 100 * y
    medians = [torch.pdist(z).median() for z in (x, y)]
    torch.testing.assert_close(cka(x, y, kernel="rbf"), cka(x / medians[0], y / medians[1], kernel="rbf", bandwidth=1.0))
    assert abs(float(cka(x, y, kernel="rbf") - cka(x, y, kernel="rbf", bandwidth=1.0))) > 0.1
    moved = x.clone().requires_grad_(), x.clone().requires_grad_()
    cka(moved[0], y, kernel="rbf").backward()
    cka(moved[1], y * (medians[0] / medians[1]), kernel="rbf", bandwidth=medians[0]).backward()
    torch.testing.assert_close(moved[0].grad, moved[1].grad)


def test_rbf_with_more_than_half_of_the_distances_zero_stays_finite() -> None:
    x = torch.cat([torch.zeros(20, 3), torch.randn(4, 3)]).requires_grad_()
    value = cka(x, torch.randn(24, 5), kernel="rbf")
    value.backward()
    assert 0 < float(value.detach()) < 1 and x.grad is not None and x.grad.isfinite().all()


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
def test_biased_cka_of_unrelated_features_follows_from_how_many_directions_they_fill(decay: float) -> None:
    """About [(1 + (n - 1) / PR_x) (1 + (n - 1) / PR_y)]^(-1/2), also where the directions are of uneven size."""
    n, expected, sides = 32, 1.0, []
    for width in (300, 200):
        scale = torch.arange(1.0, width + 1) ** -decay
        ratio = float(scale.square().sum() ** 2 / scale.pow(4).sum())
        expected *= (1 + (n - 1) / ratio) ** -0.5
        sides.append(torch.randn(100, n, width) * scale)
    assert float(cka(*sides).mean()) == pytest.approx(expected, abs=0.02)


def test_biased_cka_is_gamed_by_filling_more_directions() -> None:
    """A map trained against noise, 16 rows at a time, raises the score of its batches by whitening and learns nothing."""
    torch.manual_seed(0)
    start = torch.diag(torch.arange(1.0, 65) ** -1)
    turn = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([turn], lr=0.03)
    for _ in range(150):
        optimizer.zero_grad()
        (-cka(torch.randn(16, 64) @ turn, torch.randn(16, 64))).backward()
        optimizer.step()
    rows, other = torch.randn(100, 16, 64), torch.randn(100, 16, 64)
    before, after = (rows @ z for z in (start, turn.detach()))
    assert float(cka(after, other).mean()) > float(cka(before, other).mean()) + 0.3
    assert float(participation_ratio(after.flatten(0, 1))) > 4 * float(participation_ratio(before.flatten(0, 1)))
    assert abs(float(cka(after.flatten(0, 1), other.flatten(0, 1), debiased=True))) < 0.02


def test_defaults_are_the_papers_mean_of_the_correlations_and_uniform_average(paired: Any) -> None:
    """SVCCA's authors take the mean of rho, not of its square; "average R^2" counts each feature the same."""
    x, y = paired(60, 5, 4)
    y = y * torch.tensor([1.0, 3.0, 9.0, 27.0], dtype=y.dtype)
    for name, default, other in (
        ("cca", {"summary": "mean"}, {"summary": "mean_squared"}),
        ("svcca", {"summary": "mean"}, {"summary": "mean_squared"}),
        ("svcca", {"variance": 0.99}, {"variance": 0.9}),
        ("linear-regression", {"average": "uniform"}, {"average": "variance"}),
    ):
        score = get_similarity(name)
        assert float(score(x, y)) == float(score(x, y, **default))
        assert abs(float(score(x, y) - score(x, y, **other))) > 0.002


@pytest.mark.parametrize("name", SPACES)
def test_spaces_that_meet_by_counting_alone_are_refused(name: str) -> None:
    """Of unrelated features, n <= d: exactly 1, and no gradient. It warns only if asked to."""
    x, y = torch.randn(40, 30), torch.randn(40, 60)
    with pytest.raises(ValueError, match=r"of 40 rows with ranks \d+ and \d+ is high for unrelated features.* debiased=True"):
        SPACES[name](x, y)
    if name != "svcca":  # it keeps fewer directions than features
        with pytest.raises(ValueError, match="is high for unrelated"):
            SPACES[name](x[:, :20], y[:, :20])
    x.requires_grad_()
    with pytest.warns(UserWarning, match="is high for unrelated"):
        value = SPACES[name](torch.cat([x, x], 1), y, on_degenerate="warn")
    assert float(value.detach()) > (0.7 if name == "linear-regression" else 0.92)
    value.backward()
    assert x.grad is not None and x.grad.isfinite().all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert 0 < float(SPACES[name](x[:, :20].detach(), y[:, :19])) < 1


@pytest.mark.parametrize("name", SPACES)
def test_the_rank_decides_not_the_width(name: str) -> None:
    """100 features of rank 6 in 60 rows have a score, and the same as the 6 that they are made of."""
    base, y = torch.randn(60, 6, dtype=torch.float64), torch.randn(60, 5, dtype=torch.float64)
    mixed = base @ torch.linalg.qr(torch.randn(100, 6, dtype=torch.float64))[0].T
    if name == "pwcca":
        value, expected = pwcca(mixed, y, weight_by="y"), pwcca(base, y, weight_by="y")
    else:
        value, expected = SPACES[name](mixed, y), SPACES[name](base, y)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(SPACES[name](mixed.float(), y.float()), expected.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SPACES)
def test_gradients_where_singular_values_repeat_exactly(name: str) -> None:
    """The backward pass of an SVD divides by differences of singular values. Here variances or correlations repeat."""
    q = torch.randn(60, 12, dtype=torch.float64)
    q = torch.linalg.qr(q - q.mean(0))[0]
    a, b, c = q[:, :4], q[:, 4:8], q[:, 8:]
    cases = {
        "equal": (a, a.clone()),
        "turned": (a, a @ torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]),
        "unrelated": (a, b),
        "all correlations 0.6": (a, 0.6 * a + 0.8 * b),
        "two at 0.6, two at 0": (a, torch.cat([0.6 * a[:, :2] + 0.8 * b[:, :2], c[:, :2]], 1)),
        "repeated features": (torch.cat([a, a], 1), 0.6 * a + 0.8 * b),
    }
    for case, (x, y) in cases.items():
        x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
        SPACES[name](x, y).backward()
        for side in (x, y):
            assert side.grad is not None and side.grad.isfinite().all(), case
            assert float(side.grad.norm()) < 10, case
    x, y = cases["all correlations 0.6"]
    x = x.clone().requires_grad_()
    value = SPACES[name](x, y)
    value.backward()
    with torch.no_grad():
        assert x.grad is not None
        assert float(SPACES[name](x + 0.01 * x.grad / x.grad.norm(), y)) > float(value)


def test_gradient_of_svcca_where_the_cut_goes_through_equal_variances() -> None:
    """Half of ten equal variances: which five directions are kept is arbitrary, and how they turn has no derivative."""
    q = torch.randn(60, 14, dtype=torch.float64)
    q = torch.linalg.qr(q - q.mean(0))[0]
    x = q[:, :10].clone().requires_grad_()
    svcca(x, 0.6 * q[:, :4] + 0.8 * q[:, 10:], variance=0.5).backward()
    assert x.grad is not None and x.grad.any() and float(x.grad.norm()) < 10


def test_gradient_of_cca_where_correlations_repeat_is_that_of_the_sum_of_squares(paired: Any) -> None:
    """All at 0.6, the mean of rho moves as the mean of rho^2 over 1.2: traces, in which no vector is chosen."""
    q = torch.randn(60, 8, dtype=torch.float64)
    q = torch.linalg.qr(q - q.mean(0))[0]
    x, y = q[:, :4], 0.6 * q[:, :4] + 0.8 * q[:, 4:]
    gradients = []
    for summary in ("mean", "mean_squared"):
        moved = x.clone().requires_grad_()
        cca(moved, y, summary=summary).backward()
        gradients.append(moved.grad)
    torch.testing.assert_close(gradients[0], gradients[1] / 1.2)


def test_svcca_keeps_a_part_of_the_variance_and_not_of_the_singular_values() -> None:
    """Squared singular values 90, 9, 1: two directions hold 99 %, of the singular values all three are needed."""
    q = torch.randn(50, 6, dtype=torch.float64)
    q = torch.linalg.qr(q - q.mean(0))[0]
    x = q[:, :3] * torch.tensor([90.0, 9.0, 1.0], dtype=torch.float64).sqrt()
    y = torch.stack([q[:, 0], q[:, 3]], 1)
    assert float(svcca(x, y, variance=0.98)) == pytest.approx(0.5)
    assert float(svcca(x, q[:, 2:3], variance=0.98)) == pytest.approx(0)
    assert float(svcca(x, q[:, 2:3], variance=0.995)) == pytest.approx(1)


def test_pwcca_weighs_by_the_side_with_fewer_directions() -> None:
    x = torch.randn(200, 3, dtype=torch.float64) * torch.tensor([10.0, 1.0, 0.1], dtype=torch.float64)
    y = torch.cat([x[:, :1], 10 * torch.randn(200, 5, dtype=torch.float64)], 1)
    assert float(pwcca(x, y)) == float(pwcca(x, y, weight_by="x")) == pytest.approx(float(pwcca(y, x)))
    assert float(pwcca(x, y)) > 0.85 > 0.6 > float(pwcca(x, y, weight_by="y"))


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("batch", [(), (3,)])
def test_neighbours_counted_by_index_are_those_counted_by_distance(
    twice: bool, batch: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = torch.randn(*batch, 60, 8), torch.randn(*batch, 60, 5)
    y = y + x[..., :5]
    if twice:  # ties for the last place in one side: indices would choose among them
        y[..., 30:, :] = y[..., :30, :]
    counted = [mutual_knn(x, y, k=k, distance="euclidean") for k in (1, 4, 7)]
    monkeypatch.setattr(neighbours, "_shared", neighbours._shares)
    torch.testing.assert_close(counted, [mutual_knn(x, y, k=k, distance="euclidean") for k in (1, 4, 7)])


def test_mutual_knn_is_no_loss_and_its_soft_form_is_one(paired: Any) -> None:
    x, y = paired(40, 5, 4)
    x.requires_grad_()
    assert not get_similarity("mutual-knn").differentiable
    with pytest.raises(RuntimeError, match="does not require grad"):
        (1 - mutual_knn(x, y)).backward()
    loss = 1 - soft_mutual_knn(x, y)
    (gradient,) = torch.autograd.grad(loss, x)
    with torch.no_grad():
        assert float(1 - soft_mutual_knn(x - 1e-3 * gradient / gradient.norm(), y)) < float(loss.detach())
        for k in (1, 5):
            torch.testing.assert_close(soft_mutual_knn(x, y, k=k, temperature=1e-9), mutual_knn(x, y, k=k))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_neighbours_that_tie_share_the_last_places(dtype: torch.dtype) -> None:
    """Whatever the order of the rows: `topk` alone would choose among duplicates by their number."""
    x = torch.tensor([[0.0], [1.0], [1.0], [1.0], [-3.0]], dtype=dtype)
    y = torch.tensor([[0.0], [1.0], [4.0], [9.0], [-3.0]], dtype=dtype)
    # Row 0 of x has three rows at distance 1, a third each; its neighbour in y is row 1. Rows 1 to 3 of x have two
    # duplicates each: row 1's neighbour in y is row 0, row 2's is row 1 (a half), row 3's is row 2 (a half). Row 4: row 0.
    expected = torch.tensor((1 / 3 + 0 + 1 / 2 + 1 / 2 + 1) / 5, dtype=dtype)
    for order in (torch.arange(5), torch.tensor([4, 2, 0, 3, 1]), torch.arange(5).flip(0)):
        torch.testing.assert_close(mutual_knn(x[order], y[order], k=1, distance="euclidean"), expected)
    doubled = torch.randn(20, 6, dtype=dtype).repeat(3, 1)
    for k in (1, 2, 5, 10):
        assert float(mutual_knn(doubled, doubled, k=k)) == pytest.approx(1, abs=1e-6)
        constant = mutual_knn(torch.randn(30, 4, dtype=dtype), torch.ones(30, 4, dtype=dtype), k=k)
        assert float(constant) == pytest.approx(k / 29, abs=1e-6)
    x = doubled.clone().requires_grad_()
    soft_mutual_knn(x, torch.randn(60, 4, dtype=dtype)).backward()
    assert x.grad is not None and x.grad.isfinite().all()


def test_dot_product_compares_common_coordinates_of_whole_rows() -> None:
    x, y = torch.randn(9, 5, dtype=torch.float64), torch.randn(9, 3, dtype=torch.float64)
    padded = torch.nn.functional.pad(y, (0, 2))
    torch.testing.assert_close(dot_product(x, y), torch.cosine_similarity(x, padded).mean())
    torch.testing.assert_close(dot_product(x, y, normalize=False), (x[:, :3] * y).mean())
    zero = torch.zeros(9, 3, dtype=torch.float64, requires_grad=True)
    value = dot_product(zero, y)
    value.backward()
    assert float(value.detach()) == 0 and zero.grad is not None and zero.grad.isfinite().all()


@pytest.mark.parametrize(
    ("shape", "frozen", "form"),
    [
        ((4096, 384, 384), False, "_of_features"),
        ((64, 384, 384), False, "_of_rows"),
        # Multiplications over n: p^2 + (p + q)^2 of features and n (2 p + q) of rows, equal at n = 159.06.
        ((159, 80, 112), True, "_of_rows"),
        ((160, 80, 112), True, "_of_features"),
        # Without any gradient p^2 + q^2 + p q and n (p + q).
        ((145, 80, 112), None, "_of_rows"),
        ((146, 80, 112), None, "_of_features"),
    ],
)
def test_linear_cka_takes_the_form_with_fewer_multiplications(
    shape: tuple[int, int, int], frozen: bool | None, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = []

    def stand_in(name: str, *_: Any) -> tuple[Tensor, list[None]]:
        taken.append(name)
        return torch.zeros(()), [None, None]

    for name in ("_of_rows", "_of_features"):
        monkeypatch.setattr(kernels, name, partial(stand_in, name))
    n, p, q = shape
    cka(torch.zeros(n, p, requires_grad=frozen is not None), torch.zeros(n, q, requires_grad=frozen is False))
    assert taken == [form]


def test_linear_cka_takes_the_cheaper_form_and_keeps_no_square_of_the_rows() -> None:
    """Both forms give one value; with the gradient known, nothing of size n x n waits for the backward pass."""
    x, y = torch.randn(300, 10), torch.randn(300, 12)
    forms = []
    for n, p in ((300, 10), (12, 10)):
        a, b = x[:n, :p].double(), y[:n].double()
        k, l = (z - z.mean(0) for z in (a, b))  # noqa: E741
        forms.append((cka(a, b), (k.T @ l).norm() ** 2 / ((k.T @ k).norm() * (l.T @ l).norm())))
    torch.testing.assert_close(*zip(*forms, strict=True))
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        for kernel in ("linear", "rbf"):
            cka(x.requires_grad_(), y, kernel=kernel, debiased=True)
    assert saved and max(saved) <= x.numel()
