"""A term of the whole step: once, whatever the accumulation and the number of processes, and nothing at weight 0."""

from __future__ import annotations

import json
import os
import socket
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from torch import Tensor, nn
from torch.nn import functional as F

from crossalign.cli import leave_group
from crossalign.config import LoopConfig, OptimConfig, TrackingConfig
from crossalign.data.batches import Step
from crossalign.training import checkpoint as ckpt
from crossalign.training.loop import Interrupted, Session, Stage, fit
from crossalign.training.session import make_accelerator
from crossalign.training.tracking import RunLog

SIZE, STEPS, EVERY = 12, 6, 2
LOOP = LoopConfig(device="cpu", precision="fp32", log_every=3, checkpoint_minutes=1e9)


def data() -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(7)
    return tuple(torch.randn(STEPS, SIZE, 4, generator=random) for _ in range(3))  # type: ignore[return-value]


def build() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))


def extra_of(weight: float, share: slice) -> Any:
    """Every second step, the mean square of what the model makes of other inputs: each process sees its share of them."""
    others = data()[2]

    def extra(model: nn.Module, position: int) -> tuple[Tensor, dict[str, Tensor]] | None:
        if position % EVERY or not weight:
            return None
        value = getattr(model, "module", model)(others[position % STEPS][share]).square().mean()
        return weight * value, {"score": value}

    return extra


def train(
    folder: Path,
    *,
    weight: float,
    accumulation: int = 1,
    epochs: int = 2,
    rank: int = 0,
    world: int = 1,
    stop: int = 0,
    clip: float = 0.0,
) -> dict[str, Tensor]:
    """Plain SGD-like steps on a regression, the batch cut over processes and micro-batches."""
    x, y, _ = data()
    model = build()
    mine = slice(rank * SIZE // world, (rank + 1) * SIZE // world)

    def steps(epoch: int, first: int) -> Any:
        for i in range(first, STEPS):
            if stop and epoch * STEPS + i == stop:
                raise Interrupted
            parts = zip(x[i, mine].chunk(accumulation), y[i, mine].chunk(accumulation), strict=True)
            yield Step([{"x": a, "y": b} for a, b in parts], SIZE)

    def loss(wrapped: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return F.mse_loss(wrapped(batch["x"]), batch["y"], reduction="sum"), {}

    stage = Stage(
        name="train",
        model=model,
        loss=loss,
        steps=steps,
        steps_per_epoch=STEPS,
        epochs=epochs,
        optim=OptimConfig(lr=0.01, clip=clip),
        state=model.state_dict,
        load=model.load_state_dict,
        extra=extra_of(weight, mine),
    )
    saved = ckpt.latest(folder / "checkpoints", rank=rank)
    with RunLog(folder, TrackingConfig(mlflow=False), "run", {}, saved.extra["rows"] if saved else 0) as log:
        run = Session(folder, make_accelerator(LOOP), LOOP, log, "", saved)
        fit(stage, run)
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def reference(weight: float, epochs: int = 2) -> dict[str, Tensor]:
    """The same by hand: one loss of the whole batch a step."""
    x, y, others = data()
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.01, betas=(0.9, 0.999))
    for position in range(epochs * STEPS):
        i = position % STEPS
        optimizer.zero_grad()
        loss = F.mse_loss(model(x[i]), y[i], reduction="sum") / SIZE
        if position % EVERY == 0:
            loss = loss + weight * model(others[i]).square().mean()
        loss.backward()
        optimizer.step()
    return model.state_dict()


def rows(folder: Path, split: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["split"] == split]


@pytest.fixture(autouse=True)
def constant_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crossalign.training.loop.lr_factor", lambda *_: 1.0)
    monkeypatch.setattr(
        "crossalign.training.loop.build_optimizer",
        lambda model, optim: torch.optim.AdamW(model.parameters(), lr=optim.lr, weight_decay=0.01),
    )


@pytest.mark.parametrize("accumulation", [1, 3, 4])
@pytest.mark.parametrize("weight", [0.0, 10.0])
def test_accumulation_leaves_the_weight_alone(tmp_path: Path, accumulation: int, weight: float) -> None:
    found = train(tmp_path, weight=weight, accumulation=accumulation)
    for name, tensor in reference(weight).items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6)


def test_weight_zero_is_bit_identical_to_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_zero = train(tmp_path / "zero", weight=0.0)
    monkeypatch.setattr(f"{__name__}.extra_of", lambda *_: None)
    without = train(tmp_path / "none", weight=0.0)
    assert all(torch.equal(with_zero[name], without[name]) for name in without)


def test_the_term_is_computed_in_the_runs_precision_though_its_model_is_unwrapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def extra(model: nn.Module, position: int) -> tuple[Tensor, dict[str, Tensor]]:
        inner = build()  # no wrapper of accelerate's round it, as inside of a compiled model
        out = inner(data()[2][0])
        seen.append(out.dtype)
        return model(data()[2][0]).float().square().mean(), {}

    monkeypatch.setattr(f"{__name__}.extra_of", lambda *_: extra)
    monkeypatch.setattr(f"{__name__}.LOOP", replace(LOOP, precision="bf16"))
    train(tmp_path, weight=1.0, epochs=1)
    assert set(seen) == {torch.bfloat16}


def test_the_terms_share_of_the_gradient_is_logged_without_clipping_too(tmp_path: Path) -> None:
    train(tmp_path, weight=2.0, epochs=1)  # clip 0
    assert all(0 < row["extra_grad_ratio"] < 10 for row in rows(tmp_path, "extra"))


def test_its_numbers_are_logged_at_its_steps(tmp_path: Path) -> None:
    train(tmp_path, weight=2.0, epochs=1)
    logged = rows(tmp_path, "extra")
    assert [row["step"] for row in logged] == [1, 3, 5]
    model, other = build(), data()[2][0]
    value = model(other).square().mean()
    (2.0 * value).backward()
    value = value.detach()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    assert logged[0]["score"] == pytest.approx(float(value)) and logged[0]["extra_grad_norm"] == pytest.approx(float(norm))


@pytest.mark.parametrize("log_every", [1, 3])
def test_examples_are_counted_over_the_time_that_they_took(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log_every: int
) -> None:
    monkeypatch.setattr(f"{__name__}.extra_of", lambda *_: lambda model, position: time.sleep(0.02))
    monkeypatch.setattr(f"{__name__}.LOOP", replace(LOOP, log_every=log_every))
    train(tmp_path, weight=1.0)
    rates = [row["examples_per_second"] for row in rows(tmp_path, "train_step")]
    assert len(rates) == 2 * STEPS // log_every
    assert all(SIZE / 1.0 < rate <= SIZE / 0.02 for rate in rates)


def test_resume_is_exact(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", weight=10.0, epochs=3)
    with pytest.raises(Interrupted):
        train(tmp_path / "cut", weight=10.0, epochs=3, stop=STEPS + 3)
    resumed = train(tmp_path / "cut", weight=10.0, epochs=3)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    clock = {"seconds", "examples_per_second"}
    one, two = ([{k: v for k, v in r.items() if k not in clock} for r in rows(tmp_path / n, "extra")] for n in ("whole", "cut"))
    assert one == two


def _process(rank: int, folder: str, port: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    import crossalign.training.loop as loop

    loop.lr_factor = lambda *_: 1.0
    loop.build_optimizer = lambda model, optim: torch.optim.AdamW(model.parameters(), lr=optim.lr, weight_decay=0.01)
    found = train(Path(folder) / str(rank), weight=10.0, accumulation=2, rank=rank, world=2)
    torch.save(found, Path(folder) / f"{rank}.pt")
    leave_group(0)


def test_two_processes_leave_the_weight_alone(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    torch.multiprocessing.spawn(_process, (str(tmp_path), port), nprocs=2)
    expected = reference(10.0)
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weight,clip,says", [(1e5, 1.0, True), (1e5, 0.0, False), (1e-3, 1.0, False)])
def test_a_clipped_step_of_the_term_alone_is_told_once(
    weight: float, clip: float, says: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path, weight=weight, clip=clip)
    said = capsys.readouterr().err
    assert said.count("the alignment term makes 100% of the gradient (extra_grad_ratio), and clipping at 1 leaves") == says
