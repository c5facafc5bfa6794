"""Permutations, the best of many layers, and the jackknife: equal to the plain way, and right as often as they say."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from crossalign.alignment import cka, get_similarity
from crossalign.alignment.resampling import (
    FAST,
    calibrate,
    critical_value,
    jackknife_error,
    ordered_scores,
    p_values,
    random_groups,
    random_orders,
    scores_without,
)

N = 48


def related(n: int, widths: tuple[int, ...], seed: int, noise: float = 1.0) -> list[Tensor]:
    """Layers that see the same five hidden things, each with noise of its own; far from zero, as hidden states are."""
    hidden = torch.randn(n, 5, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    return [
        hidden @ torch.randn(5, p, generator=generator) + noise * torch.randn(n, p, generator=generator) + 3 for p in widths
    ]


@pytest.mark.parametrize("metric", [*FAST, "dot-product"])
@pytest.mark.parametrize("ties", [False, True])
def test_the_fast_way_gives_what_the_function_gives(metric: str, ties: bool) -> None:
    xs, ys = related(N, (7, 90), 1), related(N, (9, 3, 60), 2)
    if ties:  # rows that are equal on both sides: neighbours then share places
        for layer in (*xs, *ys):
            layer[10:14] = layer[3]
    orders = torch.cat([torch.arange(N)[None], random_orders(N, 3)])
    function = get_similarity(metric)
    plain = [[[float(function(x, y[order])) for y in ys] for x in xs] for order in orders]
    fast = ordered_scores(xs, ys, metric, orders)
    assert torch.allclose(fast, torch.tensor(plain), atol=1e-5)
    assert fast[0].std() > 1e-3 and not torch.allclose(fast[0], fast[1], atol=1e-3)


@pytest.mark.parametrize("metric", [*FAST, "dot-product"])
def test_leaving_out_groups_is_scoring_the_other_rows(metric: str) -> None:
    xs, ys = related(N, (7, 90), 1), related(N, (9, 3), 2)
    groups = random_groups(N, 5)

    def score(x: Tensor, y: Tensor, stay: Tensor) -> float:
        if "rbf" not in metric:
            return float(get_similarity(metric)(x[stay], y[stay]))
        widths = torch.stack([torch.pdist(x).median(), torch.pdist(y).median()])  # the fast way keeps those of all rows
        return float(cka(x[stay], y[stay], kernel="rbf", debiased="debiased" in metric, bandwidth=widths))

    plain = torch.tensor([[[score(x, y, groups != g) for y in ys] for x in xs] for g in range(5)])
    assert torch.allclose(scores_without(xs, ys, metric, groups), plain, atol=1e-5)


@pytest.mark.parametrize("metric", [name for name in FAST if name != "mutual-knn"])
@pytest.mark.parametrize("size", [1e9, 1e-12])
def test_the_unit_of_features_does_not_matter_to_the_fast_way(metric: str, size: float) -> None:
    xs, ys = related(N, (7,), 1), related(N, (9,), 2)
    expected = get_similarity(metric)(xs[0] * size, ys[0])
    (found,) = ordered_scores([xs[0] * size], ys, metric, torch.arange(N)[None]).flatten()
    assert found == pytest.approx(float(expected), abs=1e-5)
    groups = random_groups(N, 5)
    assert torch.allclose(
        scores_without([xs[0] * size], ys, metric, groups), scores_without(xs, ys, metric, groups), rtol=1e-4, atol=1e-5
    )


def test_a_score_that_is_no_number_is_no_evidence() -> None:
    null, nan = torch.linspace(0, 1, 19), torch.tensor(torch.nan)
    assert p_values(nan, null) == 1 and p_values(torch.tensor(2.0), null) == pytest.approx(0.05)
    assert p_values(torch.tensor(2.0), torch.cat([null, nan[None]])) == pytest.approx(2 / 21)


@pytest.mark.parametrize("options", [{"k": 3}, {"k": 5, "distance": "euclidean"}])
def test_options_reach_the_metric(options: dict[str, Any]) -> None:
    xs, ys = related(N, (7,), 1), related(N, (9,), 2)
    expected = float(get_similarity("mutual-knn")(xs[0], ys[0], **options))
    assert ordered_scores(xs, ys, "mutual-knn", torch.arange(N)[None], **options).item() == pytest.approx(expected, abs=1e-6)


def test_groups_and_orders_hold_every_row_once() -> None:
    groups = random_groups(103, 20)
    assert sorted(torch.bincount(groups).tolist()) == [5] * 17 + [6] * 3
    orders = random_orders(50, 4)
    assert all(sorted(order.tolist()) == list(range(50)) for order in orders) and len({tuple(o.tolist()) for o in orders}) == 4
    assert torch.equal(random_orders(50, 4), orders)


def test_rows_drawn_with_replacement_are_refused() -> None:
    x, y = torch.randn(N, 30), torch.randn(N, 30)
    drawn = torch.randint(N, (N,))
    assert cka(x[drawn], y[drawn], debiased=True) > 0.2 + cka(x, y, debiased=True)  # why
    with pytest.raises(ValueError, match="every row once"):
        ordered_scores([x], [y], "cka-linear-debiased", drawn[None])


@cache
def unrelated(trials: int = 400) -> tuple[Tensor, Tensor]:
    """(trials, 1 + P, I, J): scores of layers that have nothing to do with each other, and of their permutations."""
    found = []
    for trial in range(trials):
        generator = torch.Generator().manual_seed(trial)
        base = torch.randn(24, 10, generator=generator)
        xs = [base + 2 * torch.randn(24, 10, generator=generator) for _ in range(6)]  # layers of one model resemble each other
        ys = [torch.randn(24, 8, generator=generator) for _ in range(5)]
        orders = torch.cat([torch.arange(24)[None], random_orders(24, 39, seed=trial)])
        found.append(ordered_scores(xs, ys, "cka-linear-debiased", orders))
    scores = torch.stack(found)
    return scores[:, 0], scores[:, 1:]


def test_p_values_are_uniform_under_chance() -> None:
    observed, null = unrelated()
    p = p_values(observed[:, 0, 0], null[:, :, 0, 0].T).float()
    assert p.min() == pytest.approx(1 / 40)
    for level in (0.05, 0.1, 0.25, 0.5, 0.75):
        assert abs((p <= level).float().mean() - level) < 3.5 * math.sqrt(level * (1 - level) / len(p)), level


def test_the_best_of_all_layers_is_found_as_seldom_as_the_level_says() -> None:
    observed, null = unrelated()
    best = p_values(observed.amax((1, 2)), null.amax((2, 3)).T)
    naive = torch.stack([p_values(o, n).amin() for o, n in zip(observed, null, strict=True)])
    assert (best <= 0.05).float().mean() < 0.05 + 3 * math.sqrt(0.05 * 0.95 / len(best))
    assert (best <= 0.05).float().mean() > 0.015  # nor does it never find anything
    assert (naive <= 0.05).float().mean() > 0.3  # what taking the best without correction does


def test_each_layers_corrected_p_value_holds_the_family_wise_error() -> None:
    observed, null = unrelated()
    each = torch.stack([p_values(o, n.amax((1, 2))[:, None, None]) for o, n in zip(observed, null, strict=True)])
    assert ((each <= 0.05).flatten(1).any(1)).float().mean() < 0.05 + 3 * math.sqrt(0.05 * 0.95 / len(each))


def test_a_real_relation_is_found() -> None:
    scores = ordered_scores(
        related(N, (20, 30), 1), related(N, (25,), 2), "mutual-knn", torch.cat([torch.arange(N)[None], random_orders(N, 99)])
    )
    assert p_values(scores[0].amax(), scores[1:].amax((1, 2))) == pytest.approx(0.01)


def test_calibrated_is_zero_unless_the_p_value_is_small() -> None:
    observed, null = unrelated()
    for one, chance in zip(observed[:100, 0, 0], null[:100, :, 0, 0], strict=True):
        score = calibrate(one, critical_value(one, chance, 0.1))
        assert (score > 0) == (p_values(one, chance) <= 0.1)
    assert calibrate(torch.tensor(1.0), torch.tensor(0.25)) == 1
    assert calibrate(torch.tensor(0.4375), torch.tensor(0.25)) == pytest.approx(0.25)
    assert calibrate(torch.tensor(0.1), torch.tensor(0.25)) == 0


# Of mutual k-NN, which is no smooth function of the rows, the jackknife takes the error for a third larger than it is.
@pytest.mark.parametrize(("metric", "widest"), [("cka-linear-debiased", 1.25), ("mutual-knn", 1.6)])
def test_jackknife_intervals_cover_what_they_should(metric: str, widest: float) -> None:
    """The score that images of the same kind would give on average: of each sample's own size, as mutual k-NN depends on it."""
    generator = torch.Generator().manual_seed(5)
    to_x, to_y = torch.randn(4, 12, generator=generator), torch.randn(4, 15, generator=generator)
    found, errors = [], []
    for _ in range(150):
        hidden = torch.randn(120, 4, generator=generator)
        x = hidden @ to_x + 2 * torch.randn(120, 12, generator=generator)
        y = hidden @ to_y + 2 * torch.randn(120, 15, generator=generator)
        found.append(float(ordered_scores([x], [y], metric, torch.arange(120)[None])))
        errors.append(float(jackknife_error(scores_without([x], [y], metric, random_groups(120, 10)))))
    scores, error = torch.tensor(found), torch.tensor(errors)
    covered = ((scores - scores.mean()).abs() < 2.262 * error).float().mean()  # Student's t with 9 degrees of freedom
    assert covered >= 0.90
    assert 0.8 < error.square().mean().sqrt() / scores.std() < widest
