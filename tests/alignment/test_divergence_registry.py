"""Divergences by name."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from crossalign.alignment import divergences, get_divergence, mmd, otdd, register_divergence


def test_every_divergence_has_a_name_and_says_whether_it_needs_labels() -> None:
    assert divergences.names() == ("coral", "cosine", "mmd", "mmd-orca", "mse", "otdd", "sinkhorn")
    assert get_divergence("mmd") is mmd and get_divergence("otdd") is otdd
    assert [name for name in divergences.names() if get_divergence(name).needs_labels] == ["otdd"]


def test_unknown_name_gives_the_nearest() -> None:
    with pytest.raises(ValueError, match="unknown divergence 'mdd'; did you mean 'mmd'"):
        get_divergence("mdd")
    with pytest.raises(ValueError, match=r"unknown divergence 'xyzzy' \(known: coral, cosine, "):
        get_divergence("xyzzy")


def test_ones_own_divergence_is_found_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divergences, "_entries", dict(divergences._entries))

    @register_divergence("mean-distance")
    def mean_distance(x: Tensor, y: Tensor) -> Tensor:
        return (x.mean(0) - y.mean(0)).norm()

    found = get_divergence("mean-distance")
    assert found is mean_distance and not found.needs_labels
    assert float(found(torch.zeros(2, 4), torch.ones(3, 4))) == 2.0
    register_divergence("mean-distance")(mean_distance)  # a notebook's cell, run again


def test_a_taken_name_is_refused() -> None:
    def other(x: Tensor, y: Tensor) -> Tensor:
        return x.sum() - y.sum()

    with pytest.raises(ValueError, match="'mmd' is registered already"):
        register_divergence("mmd")(other)
    assert get_divergence("mmd") is mmd
