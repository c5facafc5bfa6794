"""A training step makes the host wait for the device at logging steps alone: the real loop of every verb, on a device that
notes each wait."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from a_device import NAME, Device, move
from accelerate import PartialState

import crossalign
from crossalign.training import loop, session
from crossalign.training.stops import Paused

sys.path.append(str(Path(__file__).parents[1] / "golden"))
import tiny_inputs
from tiny_runs import ADAPT, DIGITS, FINETUNE, PAIRS, PRETRAIN, configured

IMAGES: dict[str, Any] = {
    **ADAPT,
    "data": DIGITS | {"augment": {"flip": 0.5, "crop_padding": 1, "rotation_degrees": 10.0}},
    "embedder": {"patch": 4},
    "loop": {"batch_size": 16, "epochs": 2, "log_every": 100, "precision": "fp32"},
}
TEXT: dict[str, Any] = {"loop": {"steps": 8, "evaluate_every": 4, "batch_size": 6, "log_every": 100, "precision": "fp32"}}
TERM: dict[str, Any] = {"align": {"every": 2, "queue": 8, "log_every": 1}}
LORA: dict[str, Any] = {"tune": {"method": "lora", "lora_rank": 4}}


def aligned(metric: str, level: str = "token", **more: Any) -> dict[str, Any]:
    return {"align": {"metric": metric, "level": level, "epochs": 1, **more}}


CASES: dict[str, list[dict[str, Any]]] = {
    "adapt fpt": [IMAGES],
    "adapt lora": [IMAGES, LORA, {"optim": {"clip": 1.0}}],
    "adapt full": [IMAGES, {"tune": {"method": "full"}, "loop": {"accumulation": 2}}],
    "adapt mmd": [IMAGES, aligned("mmd")],
    "adapt mmd of sequences": [IMAGES, aligned("mmd", "sequence")],
    "adapt sinkhorn": [IMAGES, aligned("sinkhorn", max_tokens=32)],
    "adapt otdd": [IMAGES, aligned("otdd", "sequence", max_tokens=32)],
    "pretrain": [PRETRAIN, TEXT, {"align": {"held_out": 0}}],
    "pretrain term": [PRETRAIN, TEXT, TERM, {"align": {"metric": "cka-linear-debiased"}, "optim": {"clip": 1.0}}],
    "pretrain rbf": [PRETRAIN, TEXT, TERM, {"align": {"metric": "cka-rbf"}}],
    "pretrain captions": [PRETRAIN, TEXT, {"align": {"metric": "captions", "every": 2}}],
    "pretrain weights": [PRETRAIN, TEXT, {"align": {"metric": "l2-weights", "every": 2}}],
    "finetune": [FINETUNE, TEXT, PAIRS, {"tune": {"method": "full"}, "align": {"held_out": 0}}],
    "finetune lora": [FINETUNE, TEXT, PAIRS, LORA, TERM, {"align": {"metric": "cka-linear-debiased"}}],
    "finetune packed": [FINETUNE, TEXT, PAIRS, LORA, {"data": {"packing": True}, "align": {"held_out": 0}}],
    "finetune left": [FINETUNE, TEXT, PAIRS, LORA, TERM, {"data": {"padding": "left"}, "align": {"metric": "cka-rbf"}}],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    before = Path.cwd()
    os.chdir(folder)
    try:
        tiny_inputs.write_inputs(folder)
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    """It is entered when a run has its accelerator, which then has this device."""
    device, make = Device(), session.make_accelerator

    def make_there(settings: Any) -> Any:
        accelerator = make(settings)
        for state in (accelerator.state, PartialState()):
            state._shared_state["device"] = NAME
        device.entered = True
        device.__enter__()
        return accelerator

    monkeypatch.setattr(session, "make_accelerator", make_there)
    monkeypatch.setattr(torch.nn.Module, "to", move)
    autocast = torch.is_autocast_enabled  # which "meta" has none of
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind="cuda": kind != NAME.type and autocast(kind))
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())
    monkeypatch.setattr(loop._Fit, "run_all", device.inside(loop._Fit.run_all, True))
    for name in ("_flush_interval", "_end_epoch", "_save"):
        monkeypatch.setattr(loop._Fit, name, device.inside(getattr(loop._Fit, name), False))
    monkeypatch.setattr(loop.ckpt, "save", lambda *args, **kwargs: None)
    yield device
    if device.entered:
        device.__exit__(None, None, None)
        PartialState._reset_state()


@pytest.mark.parametrize("name", CASES)
def test_no_step_waits(name: str, folder: Path, device: Device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(folder)
    verb = name.split()[0]
    config = configured(getattr(crossalign, f"{verb.title()}Config")(), *CASES[name])
    configured(config, {"tracking": {"mlflow": False}, "loop": {"device": "cpu", "compile": False}})
    config.output = tmp_path / "run"
    with pytest.raises(Paused):
        getattr(crossalign, verb)(config, quiet=True, until=1)
    assert not device.waits, "\n".join(sorted(set(device.waits)))
    assert device.seen > 500
