"""GPU paths without a GPU: torch's fake tensors on "cuda" have no values, so that a tensor on another device, a shape that
depends on data, or a value that the host reads is an error. Backward passes need a device; a measure computes its gradient in
its forward pass."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from crossalign import ImageClassifier
from crossalign.alignment import OtddTarget, divergences, health, penalties, similarities
from crossalign.config import EmbedderConfig, TuneConfig
from crossalign.features.regularizer import AlignmentRegularizer

sys.path += [str(Path(__file__).parent / "integrations"), str(Path(__file__).parent)]
import one_step
from models.conftest import TINY

LABELS = torch.arange(40) % 3  # on the host, as in training
FEWER = LABELS[:30]
PAIRS = one_step.make_pairs()
BATCH = PAIRS.batch(0)  # drawn on the host


@pytest.fixture
def cuda() -> Iterator[torch.device]:
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield torch.device("cuda:0")


@pytest.mark.parametrize("rows", [40, 12])
@pytest.mark.parametrize("name", similarities.names())
def test_similarities(name: str, rows: int, cuda: torch.device) -> None:
    """More rows than features and fewer."""
    x, y = torch.randn(rows, 16, device=cuda, requires_grad=True), torch.randn(rows, 6, device=cuda)
    value = similarities[name](x, y)
    assert value.shape == () and value.device == cuda
    assert value.requires_grad == similarities[name].differentiable


@pytest.mark.parametrize("name", divergences.names())
def test_divergences(name: str, cuda: torch.device) -> None:
    labelled = divergences[name].needs_labels  # its gradient is taken by autograd, which needs a device
    x, y = torch.randn(40, 16, device=cuda, requires_grad=not labelled), torch.randn(30, 16, device=cuda)
    value = divergences[name](x, LABELS, y, FEWER) if labelled else divergences[name](x, y)
    assert value.shape == () and value.device == cuda and value.requires_grad != labelled


def test_a_target_kept_and_health(cuda: torch.device) -> None:
    x, y = torch.randn(40, 16, device=cuda), torch.randn(30, 16, device=cuda)
    assert OtddTarget(y, FEWER)(x, LABELS).device == cuda
    assert all(value.device == cuda for value in health(x, y).values())


@pytest.mark.parametrize("name", penalties.names())
def test_penalties(name: str, cuda: torch.device) -> None:
    x = torch.randn(40, 16, device=cuda, requires_grad=True)
    value = penalties[name](x)
    assert value.device == cuda and value.requires_grad


@pytest.mark.parametrize("metric", [name for name in similarities.names() if similarities[name].differentiable])
def test_the_term_of_a_text_model(metric: str, monkeypatch: pytest.MonkeyPatch, cuda: torch.device) -> None:
    monkeypatch.setattr(PAIRS, "batch", lambda *args, **kwargs: BATCH)
    with torch.device(cuda):
        model = one_step.make_model()
    value = AlignmentRegularizer(metric, pairs=PAIRS).loss(model)
    assert value.device == cuda and value.requires_grad


@pytest.mark.parametrize("method", ["fpt", "full"])
@pytest.mark.parametrize("family", TINY)
def test_classifiers(family: str, method: str, tmp_path: Path, cuda: torch.device) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family, **TINY[family]}))
    model = ImageClassifier.from_backbone(
        f"random:{tmp_path}",
        classes=["a", "b"],
        image_size=8,
        tune=TuneConfig(method=method),
        embedder=EmbedderConfig(patch=4),
    )
    for module in model.modules():  # torch moves no fake tensor in place
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                moved = tensor.detach().to(cuda)
                trains = isinstance(tensor, torch.nn.Parameter)
                new = torch.nn.Parameter(moved, tensor.requires_grad) if trains else moved
                (module._parameters if trains else module._buffers)[name] = new
    scores = model.train()(torch.zeros(2, 3, 8, 8, dtype=torch.uint8, device=cuda))
    assert scores.shape == (2, 2) and scores.device == cuda and scores.requires_grad
