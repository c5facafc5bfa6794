"""GPU paths without a GPU: torch's fake tensors on "cuda" have no values, so that a tensor on another device, a shape that
depends on data, or a value that the host reads is an error. Backward passes need a device: autograd asks CUDA for one
("hasPrimaryContext expects a valid device index"). A measure computes its gradient in its forward pass, and whole steps of
training go backward in ``training/test_waits.py``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode

from crossalign import ImageClassifier
from crossalign.alignment import OtddTarget, divergences, health, penalties, similarities
from crossalign.config import EmbedderConfig, TeacherConfig, TuneConfig
from crossalign.features.regularizer import WEIGHT_PENALTIES, AlignmentRegularizer
from crossalign.models.language.causal import choose_trained, nll_sum
from crossalign.models.language.inner import attend_with_mask, attend_without_mask
from crossalign.models.language.model import open_language_model
from crossalign.models.vision.teacher import open_teacher

sys.path += [str(Path(__file__).parent / "integrations"), str(Path(__file__).parent)]
import one_step
from models import test_vision
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


LOSSES = [name for name in similarities.names() if similarities[name].differentiable]


@pytest.mark.parametrize("metric", [*LOSSES, *penalties.names(), *WEIGHT_PENALTIES])
def test_the_term_of_a_text_model(metric: str, monkeypatch: pytest.MonkeyPatch, cuda: torch.device) -> None:
    monkeypatch.setattr(PAIRS, "batch", lambda *args, **kwargs: BATCH)
    with torch.device(cuda):
        model = one_step.make_model()
    value = AlignmentRegularizer(metric, pairs=PAIRS).loss(model)
    assert value.device == cuda and value.requires_grad


def on(cuda: torch.device, model: Any) -> Any:
    """``model`` there: torch moves no fake tensor in place."""
    new: dict[int, Any] = {}
    for module in model.modules():
        for kept in (module._parameters, module._buffers):
            for name, tensor in kept.items():
                if tensor is not None and id(tensor) not in new:
                    moved = tensor.detach().to(cuda)
                    trains = isinstance(tensor, torch.nn.Parameter)
                    new[id(tensor)] = torch.nn.Parameter(moved, tensor.requires_grad) if trains else moved
                    new[id(new[id(tensor)])] = new[id(tensor)]
                kept[name] = None if tensor is None else new[id(tensor)]
    return model


@pytest.mark.parametrize("method", ["fpt", "lora", "full"])
@pytest.mark.parametrize("family", TINY)
def test_classifiers(family: str, method: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family, **TINY[family]}))
    model = ImageClassifier.from_backbone(
        f"random:{tmp_path}",
        classes=["a", "b"],
        image_size=8,
        tune=TuneConfig(method=method),
        embedder=EmbedderConfig(patch=4),
    )
    with FakeTensorMode(allow_non_fake_inputs=True):
        cuda = torch.device("cuda:0")
        scores = on(cuda, model).train()(torch.zeros(2, 3, 8, 8, dtype=torch.uint8, device=cuda))
    assert scores.shape == (2, 2) and scores.device == cuda and scores.requires_grad


TEXT = torch.arange(24).view(2, 12)  # on the host, as batches are
ROWS = {
    "plain": {"input_ids": TEXT, "targets": TEXT},
    "padded": {"input_ids": TEXT, "targets": TEXT, "attention_mask": (TEXT % 12 > 3).long()},
    "packed": {"input_ids": TEXT, "targets": TEXT, "segment_ids": TEXT % 12 // 5, "position_ids": TEXT % 12 % 5},
}


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("family", [family for family in TINY if "bert" not in family])
def test_text_models(family: str, method: str, rows: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family, **TINY[family]}))
    model = open_language_model(f"random:{tmp_path}", head="causal").model
    choose_trained(model, TuneConfig(method=method), seed=0)
    (attend_without_mask if rows == "plain" else attend_with_mask)(model)
    # OPT draws on the host which blocks to leave out in training.
    with FakeTensorMode(allow_non_fake_inputs=True):
        cuda = torch.device("cuda:0")
        loss = nll_sum(on(cuda, model).train(family != "opt"), ROWS[rows], cuda)
    assert loss.shape == () and loss.device == cuda and loss.requires_grad


PACKAGED = ["random:package:efficientnet_lite0", "random:package:mobilenet_v2", "random:timm:resnet18"]


@pytest.mark.parametrize("name", [*test_vision.HF, *PACKAGED, "vit_small_patch14_reg4_dinov2"])
def test_teachers(name: str, tmp_path: Path) -> None:
    """Of transformers, timm and torchvision, at every layer."""
    if name in test_vision.HF:
        test_vision.save_hf(tmp_path, name)
    elif ":" not in name:
        test_vision.save_timm(tmp_path, name)
    teacher = open_teacher(name if ":" in name else str(tmp_path), settings=TeacherConfig(layers=("all", "penultimate")))
    pixels = teacher.preprocess([Image.new("RGB", (40, 30))])
    with FakeTensorMode(allow_non_fake_inputs=True):
        cuda = torch.device("cuda:0")
        features = on(cuda, teacher)(torch.zeros(2, *pixels.shape[1:], device=cuda))
    assert features.shape == (2, teacher.width) and features.device == cuda
