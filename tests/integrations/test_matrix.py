"""The regulariser's gradient is the same in every trainer, whatever the accumulation, the processes, compiling, checkpointing.

One term a step: trap 18 measured weights of 4, 0.25 and 0 times the right one where it is added in the wrong place.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from together import together

from crossalign.core.errors import UserError

sys.path.insert(0, str(Path(__file__).parent))
import one_step

Cell = tuple[str, int, str, bool, str]
ENGINES = ("plain", "trainer", "sft", "lightning")
ALL: list[Cell] = [
    cell
    for cell in itertools.product(ENGINES, (1, 4), ("one", "ddp", "fsdp"), (False, True), ("", "plain"))
    if cell[2] != "fsdp" or cell[0] == "plain"  # accelerate and Lightning shard on accelerators alone
]
# Every pair of values of any two axes is in one of these.
PAIRWISE: list[Cell] = [
    ("plain", 1, "one", True, "plain"),
    ("plain", 4, "ddp", False, ""),
    ("plain", 4, "fsdp", False, "plain"),
    ("plain", 1, "fsdp", True, ""),
    ("trainer", 4, "one", False, "plain"),
    ("trainer", 1, "ddp", True, ""),
    ("trainer", 4, "ddp", False, "plain"),
    ("sft", 4, "one", True, ""),
    ("sft", 1, "ddp", False, "plain"),
    ("lightning", 4, "ddp", True, "plain"),
    ("lightning", 1, "one", False, ""),
]
PACKAGES = {"sft": "trl", "lightning": "lightning"}


@pytest.fixture(scope="module")
def reference() -> dict[str, torch.Tensor]:
    """λ (1 - CKA), by transformers' own hidden states, a masked mean and a centred linear CKA written out."""
    model, batch = one_step.make_model(), one_step.make_pairs().batch(0)
    out = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True)
    mask = batch.attention_mask[..., None].double()
    x = (out.hidden_states[2].double() * mask).sum(1) / mask.sum(1)
    y = batch.features.double()
    x, y = x - x.mean(0), y - y.mean(0)
    score = (x.T @ y).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm())
    (10 * (1 - score)).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def check(cell: Cell, reference: dict[str, torch.Tensor], out: Path, *more: str) -> None:
    engine, accumulation, spread, compiled, checkpointing = cell
    if engine in PACKAGES:
        pytest.importorskip(PACKAGES[engine])
    options = [engine, "--accumulation", str(accumulation), "--spread", spread, "--out", str(out), *more]
    options += ["--compile"] * compiled + ["--checkpointing", checkpointing] * bool(checkpointing)
    together(one_step.main, options, processes=1 if spread == "one" else 2)
    found = load_file(out)
    for name, expected in reference.items():
        torch.testing.assert_close(found.pop(name), expected, rtol=2e-3, atol=2e-5)
    for name, tensor in found.items():  # above the tap: no part in it
        assert float(tensor.abs().max()) < 2e-6, name


@pytest.mark.parametrize("cell", PAIRWISE, ids=lambda cell: "-".join(map(str, cell)))
def test_the_gradient_is_the_terms(cell: Cell, reference: dict[str, torch.Tensor], tmp_path: Path) -> None:
    check(cell, reference, tmp_path / "out.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("cell", [cell for cell in ALL if cell not in PAIRWISE], ids=lambda cell: "-".join(map(str, cell)))
def test_the_whole_matrix(cell: Cell, reference: dict[str, torch.Tensor], tmp_path: Path) -> None:
    check(cell, reference, tmp_path / "out.safetensors")


MIXIN: list[Cell] = [
    ("trainer", 4, "one", False, "reentrant"),
    ("trainer", 4, "ddp", False, ""),
    ("sft", 4, "one", False, ""),
]


@pytest.mark.parametrize("cell", MIXIN, ids=lambda cell: "-".join(map(str, cell)))
def test_the_mixin(cell: Cell, reference: dict[str, torch.Tensor], tmp_path: Path) -> None:
    check(cell, reference, tmp_path / "out.safetensors", "--mixin")


def test_reentrant_checkpointing_in_lightning(reference: dict[str, torch.Tensor], tmp_path: Path) -> None:
    check(("lightning", 4, "ddp", False, "reentrant"), reference, tmp_path / "out.safetensors")


def test_every_pair_of_values_is_covered() -> None:
    for a, b in itertools.combinations(range(5), 2):
        wanted = {(cell[a], cell[b]) for cell in ALL}
        assert wanted <= {(cell[a], cell[b]) for cell in PAIRWISE}, (a, b)


def test_unsupported_engines_are_refused_in_a_sentence() -> None:
    from crossalign.integrations.hf_trainer import AlignmentCallback

    callback = AlignmentCallback(one_step.make_regularizer(10.0))
    state = SimpleNamespace(global_step=0)
    for settings, says in (
        ({"fp16": True}, "AlignedTrainerMixin"),
        ({"deepspeed": "zero.json"}, "DeepSpeed"),
        ({"fsdp": "full_shard"}, "--loop.shard"),
    ):
        args: Any = SimpleNamespace(**{"fp16": False, "deepspeed": None, "fsdp": "", "output_dir": ".", **settings})
        with pytest.raises(UserError, match=says):
            callback.on_train_begin(args, state, SimpleNamespace())  # type: ignore[arg-type]


def test_lightning_refuses_other_strategies() -> None:
    pytest.importorskip("lightning")
    from crossalign.integrations.lightning import LightningAlignmentCallback as AlignmentCallback

    class FSDPStrategy:
        pass

    class DDPStrategy:
        pass

    callback = AlignmentCallback(one_step.make_regularizer(10.0))
    module = SimpleNamespace(automatic_optimization=True)
    with pytest.raises(UserError, match="not with FSDPStrategy"):
        callback.on_fit_start(SimpleNamespace(strategy=FSDPStrategy()), module)
    scaled = SimpleNamespace(strategy=DDPStrategy(), precision_plugin=SimpleNamespace(scaler=object()))
    with pytest.raises(UserError, match="16-mixed"):
        callback.on_fit_start(scaled, module)


def test_trainer_logs_the_score_and_resumes_the_queue(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    from crossalign.features.regularizer import AlignmentRegularizer
    from crossalign.integrations.hf_trainer import AlignmentCallback

    def train(steps: int, resume: bool) -> tuple[Any, AlignmentRegularizer]:
        regularizer = AlignmentRegularizer("cka-linear", every=1, queue=16, pairs=one_step.make_pairs(8))
        args = TrainingArguments(
            str(tmp_path),
            max_steps=steps,
            save_steps=2,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            lr_scheduler_type="constant",
        )
        data = [{"input_ids": row, "labels": row} for row in one_step.rows()]
        trainer = Trainer(one_step.make_model(), args, train_dataset=data, callbacks=[AlignmentCallback(regularizer)])
        trainer.train(resume_from_checkpoint=resume)
        return trainer, regularizer

    _, first = train(2, resume=False)
    trainer, second = train(3, resume=True)
    assert "align_score" in trainer.state.log_history[0] and "align_null_score" in trainer.state.log_history[0]
    assert len(first.state_dict()["queue"][0]) == len(second.state_dict()["queue"][0]) == 16
    # The third batch stands at the head of the queue, then the second one, which the checkpoint brought.
    assert torch.equal(second.state_dict()["queue"][1][8:], first.state_dict()["queue"][1][:8])
