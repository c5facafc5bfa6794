"""Several steps in somebody's trainer: when the term is due, in which mode, what is logged, and how a run goes on."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from crossalign.core.errors import UserError
from crossalign.features.regularizer import AlignmentRegularizer

sys.path.insert(0, str(Path(__file__).parent))
import one_step

Weights = dict[str, Tensor]
ENGINES = ("callback", "mixin", "lightning")


class Spy(AlignmentRegularizer):
    """Notes on which steps, in which mode and with which pairs the term was computed."""

    def __init__(self, **changes: Any) -> None:
        super().__init__(**{"metric": "cka-linear", "every": 1, "pairs": one_step.make_pairs(8), **changes})
        self.seen: list[tuple[int, bool]] = []
        self.teacher: list[Tensor] = []

    def loss(self, model: Any) -> Tensor:
        self.seen.append((self._step, model.training))
        return super().loss(model)

    def _features(self, model: Any, alone: bool = False) -> tuple[Tensor, Tensor]:
        student, teacher = super()._features(model, alone)
        self.teacher.append(teacher)
        return student, teacher


def make_model(dropout: float = 0.0) -> Any:
    model = one_step.make_model().eval()  # as from_pretrained leaves it
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
    return model


def trainer(regularizer: Any, steps: int, *, mixin: bool = False, callbacks: Any = (), resume: Any = None, **more: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    from crossalign.integrations.hf_trainer import AlignedTrainerMixin, AlignmentCallback

    class Aligned(AlignedTrainerMixin, Trainer):  # type: ignore[misc]
        pass

    data = [{"input_ids": row, "labels": row} for row in one_step.rows()]
    settings = {"model": make_model(more.pop("dropout", 0.0)), "train_dataset": data, "eval_dataset": data}
    options = {"use_cpu": True, "report_to": [], "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True}
    more = {"per_device_train_batch_size": 2, "lr_scheduler_type": "constant", **options, **more}
    args = TrainingArguments(more.pop("output_dir", tempfile.mkdtemp()), max_steps=steps, **more)
    if mixin:
        made = Aligned(**settings, args=args, callbacks=[*callbacks], regularizer=regularizer)
    else:
        ours = [] if regularizer is None else [AlignmentCallback(regularizer)]
        made = Trainer(**settings, args=args, callbacks=[*callbacks, *ours])
    made.train(resume_from_checkpoint=resume)
    return made


def lightning(regularizer: Any, steps: int, *, dropout: float = 0.0, resume: Any = None, **more: Any) -> Any:
    pl = pytest.importorskip("lightning.pytorch")
    from crossalign.integrations.lightning import LightningAlignmentCallback as AlignmentCallback

    class Module(pl.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = make_model(dropout).train()

        def training_step(self, batch: Tensor, index: int) -> Tensor:
            return self.model(input_ids=batch, labels=batch).loss  # type: ignore[no-any-return]

        def validation_step(self, batch: Tensor, index: int) -> None:
            assert not self.training

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.model.parameters(), lr=0.1)

    torch.manual_seed(0)
    module = Module()
    loader = torch.utils.data.DataLoader(one_step.rows(), batch_size=2)  # type: ignore[arg-type]
    made = pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        callbacks=[*more.pop("callbacks", ()), *([] if regularizer is None else [AlignmentCallback(regularizer)])],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **more,
    )
    made.fit(module, loader, loader, ckpt_path=resume)
    return made


def run(engine: str, regularizer: Any, steps: int, accumulation: int = 1, **more: Any) -> Any:
    if engine == "lightning":
        return lightning(regularizer, steps, accumulate_grad_batches=accumulation, **more)
    return trainer(regularizer, steps, mixin=engine == "mixin", gradient_accumulation_steps=accumulation, **more)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_term_is_due_by_optimiser_steps(engine: str) -> None:
    regularizer = Spy(every=2)
    run(engine, regularizer, 5, accumulation=2)
    assert [step for step, _ in regularizer.seen] == [0, 2, 4]
    for number, teacher in enumerate(regularizer.teacher):
        assert torch.equal(teacher, regularizer.pairs.batch(number).features)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_term_is_computed_in_training_mode(engine: str) -> None:
    """Also on the first step, and after each evaluation."""
    regularizer = Spy()
    evaluated = {"val_check_interval": 1} if engine == "lightning" else {"eval_strategy": "steps", "eval_steps": 1}
    run(engine, regularizer, 3, dropout=0.5, **evaluated)
    assert regularizer.seen == [(0, True), (1, True), (2, True)]


@pytest.mark.parametrize("engine", ["callback", "lightning"])
def test_weight_zero_is_no_callback(engine: str) -> None:
    """To the bit, dropout's random numbers included."""
    found, without = (run(engine, regularizer, 3, dropout=0.1).model.state_dict() for regularizer in (Spy(weight=0.0), None))
    assert all(torch.equal(found[name], tensor) for name, tensor in without.items())
    aligned = run(engine, Spy(), 3, dropout=0.1).model.state_dict()
    assert not all(torch.equal(aligned[name], tensor) for name, tensor in without.items())


class Options:
    """Of ``one_step``: one process, accumulation 4."""

    compile, checkpointing, spread, accumulation = False, "", "one", 4


@pytest.fixture(scope="module")
def by_hand() -> tuple[Weights, Weights]:
    """A step's gradients, and the term's part in them."""
    whole, text = (one_step.plain(weight, Options()) for weight in (10.0, 0.0))
    return whole, {name: whole[name] - text[name] for name in whole}


def norm(gradients: Weights) -> float:
    return float(torch.cat([gradient.flatten() for gradient in gradients.values()]).norm())


@pytest.mark.parametrize("clip", [0.0, 0.01, 1e9])
@pytest.mark.parametrize("engine", ENGINES)
def test_reporters_see_the_score_and_the_gradients_ratio(engine: str, clip: float, by_hand: tuple[Weights, Weights]) -> None:
    """Those who log before the term's callback does, as W&B's and MLflow's do; the ratio is that before clipping."""
    from transformers import TrainerCallback

    rows: list[dict[str, float]] = []

    class Reporter(TrainerCallback):  # type: ignore[misc]
        def on_log(self, *args: Any, logs: Any = None, **kwargs: Any) -> None:
            rows.append(dict(logs))

    regularizer = one_step.make_regularizer(0.1)  # as strong as the text, about
    if engine == "lightning":
        made = lightning(regularizer, 1, accumulate_grad_batches=4, gradient_clip_val=clip or None)
        row = {name: float(value) for name, value in made.logged_metrics.items()}
    else:
        run(engine, regularizer, 1, accumulation=4, callbacks=[Reporter()], max_grad_norm=clip)
        row = rows[0]
    assert row["align_score"] == float(regularizer.numbers["score"])
    assert {"align_null_score", "align_loss"} <= row.keys()
    whole, ten = by_hand
    term = {name: gradient / 100 for name, gradient in ten.items()}
    whole = {name: whole[name] - ten[name] + term[name] for name in whole}
    # transformers scales GPT-2's loss by (T - 1) / T.
    assert row["align_grad_ratio"] == pytest.approx(norm(term) / norm(whole), rel=0.1)
    assert 0.1 < row["align_grad_ratio"] < 0.9


@pytest.mark.parametrize("engine", ["callback", "lightning"])
def test_a_resumed_run_goes_on_with_the_next_pairs_and_the_queue(engine: str, tmp_path: Path) -> None:
    unbroken, first, second = (Spy(queue=16) for _ in range(3))
    run(engine, unbroken, 3)
    if engine == "lightning":
        run(engine, first, 2).save_checkpoint(tmp_path / "saved.ckpt")
        run(engine, second, 3, resume=str(tmp_path / "saved.ckpt"))
    else:
        folder = {"output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 2}
        run(engine, first, 2, **folder)
        run(engine, second, 3, resume=True, **folder)
    assert [step for step, _ in second.seen] == [2]
    assert torch.equal(second.teacher[0], second.pairs.batch(2).features)
    for found, expected in zip(second.state_dict()["queue"], unbroken.state_dict()["queue"], strict=True):
        torch.testing.assert_close(found, expected)


def test_a_checkpoint_elsewhere_brings_its_own_queue(tmp_path: Path) -> None:
    folder = {"save_strategy": "steps", "save_steps": 2}
    elsewhere, here = tmp_path / "elsewhere", tmp_path / "here"
    first, other = Spy(queue=16), Spy(queue=16, weight=5.0)
    trainer(first, 2, output_dir=str(elsewhere), **folder)
    checkpoint = str(elsewhere / "checkpoint-2")
    for _ in range(2):  # once with no checkpoint of that step in the run's folder, once with another run's
        with pytest.raises(UserError, match=r"not .*here/checkpoint-2.*resume_from_checkpoint="):
            trainer(Spy(queue=16), 3, output_dir=str(here), resume=checkpoint, **folder)
        trainer(other, 2, output_dir=str(here), **folder)
    trainer(Spy(), 3, output_dir=str(tmp_path / "without a queue"), resume=checkpoint)
    second = Spy(queue=16)
    trainer(second, 3, output_dir=str(here), resume=checkpoint, resume_from_checkpoint=checkpoint)
    assert torch.equal(second.state_dict()["queue"][0][8:], first.state_dict()["queue"][0][:8])


def test_lightning_names_the_modules_that_could_be_meant() -> None:
    pytest.importorskip("lightning")
    from crossalign.integrations.lightning import LightningAlignmentCallback as AlignmentCallback

    callback = AlignmentCallback(Spy(), model="net")
    with pytest.raises(UserError, match=r"no module 'net'.* model=, of model$"):
        lightning(None, 1, callbacks=[callback])


def compute_loss_everywhere(regularizer: AlignmentRegularizer) -> Weights:
    """In ``compute_loss``, which is called for each micro-batch; the trainer then divides nothing, as the model knows."""
    from transformers import Trainer, TrainingArguments

    class Wrong(Trainer):  # type: ignore[misc]
        def compute_loss(self, model: Any, *args: Any, **kwargs: Any) -> Any:
            regularizer.due(self.state.global_step)
            return super().compute_loss(model, *args, **kwargs) + regularizer.loss(model)

    kept = one_step.capture()
    data = [{"input_ids": row, "labels": row} for row in one_step.rows()]
    args = TrainingArguments(**one_step.arguments(Options()))
    Wrong(one_step.make_model(), args, train_dataset=data, callbacks=[kept]).train()
    return kept.found  # type: ignore[no-any-return]


def in_accelerates_backward(regularizer: AlignmentRegularizer) -> Weights:
    """On one micro-batch's loss, which ``Accelerator.backward`` divides by the accumulation."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
    model = one_step.make_model().train()
    for i, ids in enumerate(one_step.rows().chunk(4)):
        loss = model(input_ids=ids, labels=ids).loss
        if i == 3 and regularizer.due(0):
            loss = loss + regularizer.loss(model)
        accelerator.backward(loss)
    return one_step.grads(model)


def before_lightnings_batch(regularizer: AlignmentRegularizer) -> Weights:
    """Before the batch: its gradients are cleared between the forward and the backward pass."""
    pl = pytest.importorskip("lightning.pytorch")

    class Wrong(pl.Callback):  # type: ignore[misc, name-defined]
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
            if index == 0 and regularizer.due(trainer.global_step):
                regularizer.loss(module.model).backward()

    return in_lightning(Wrong())


def in_lightning(callback: Any) -> Weights:
    pl = pytest.importorskip("lightning.pytorch")
    found: Weights = {}

    class Capture(pl.Callback):  # type: ignore[misc, name-defined]
        def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
            found.update(one_step.grads(module.model))

    lightning(None, 1, accumulate_grad_batches=4, callbacks=[callback, Capture()])
    return found


def ours_in_lightning(regularizer: AlignmentRegularizer) -> Weights:
    pytest.importorskip("lightning")
    from crossalign.integrations.lightning import LightningAlignmentCallback as AlignmentCallback

    return in_lightning(AlignmentCallback(regularizer))


def ours_in_trainer(regularizer: AlignmentRegularizer) -> Weights:
    from crossalign.integrations.hf_trainer import AlignmentCallback

    kept = one_step.capture()
    settings = {"callbacks": [AlignmentCallback(regularizer), kept], "gradient_accumulation_steps": 4, "max_grad_norm": 0.0}
    trainer(None, 1, **settings)
    return kept.found  # type: ignore[no-any-return]


WAYS: dict[str, tuple[float, Callable[[AlignmentRegularizer], Weights]]] = {
    "compute_loss": (4.0, compute_loss_everywhere),
    "accelerator.backward": (0.25, in_accelerates_backward),
    "on_train_batch_start": (0.0, before_lightnings_batch),
    "ours in Trainer": (1.0, ours_in_trainer),
    "ours in Lightning": (1.0, ours_in_lightning),
}


@pytest.mark.parametrize("way", WAYS)
def test_what_the_term_weighs_under_accumulation(way: str, by_hand: tuple[Weights, Weights]) -> None:
    """Trap 18's table, at accumulation 4."""
    weight, gradients = WAYS[way]
    found, without = gradients(one_step.make_regularizer(10.0)), gradients(one_step.make_regularizer(1e-9))
    for name, term in by_hand[1].items():
        torch.testing.assert_close(found[name] - without[name], weight * term, rtol=1e-3, atol=2e-5)


def test_numbers_are_logged_once_each_and_name_their_step() -> None:
    made = trainer(Spy(every=3), 8)
    rows = [row for row in made.state.log_history if "loss" in row]
    assert [(row["step"], row["align_step"]) for row in rows if "align_step" in row] == [(1, 0), (4, 3), (7, 6)]
    assert all("align_score" in row for row in rows if "align_step" in row)
    assert not any("align_score" in row for row in rows if "align_step" not in row)
    sparse = [row for row in trainer(Spy(every=3), 8, logging_steps=4).state.log_history if "loss" in row]
    assert [(row["step"], row["align_step"]) for row in sparse] == [(4, 3), (8, 6)]


@pytest.mark.parametrize("engine", ["callback", "lightning"])
def test_two_terms_in_one_trainer_have_names_files_and_ratios_of_their_own(engine: str, tmp_path: Path) -> None:
    if engine == "lightning":
        pytest.importorskip("lightning")
        from crossalign.integrations.lightning import LightningAlignmentCallback as AlignmentCallback
    else:
        from crossalign.integrations.hf_trainer import AlignmentCallback  # type: ignore[assignment]

    def both(first: Any, second: Any, **more: Any) -> Any:
        callbacks = [AlignmentCallback(first), AlignmentCallback(second, name="second")]
        return (
            lightning(None, callbacks=callbacks, **more)
            if engine == "lightning"
            else trainer(None, callbacks=callbacks, **more)
        )

    def make() -> tuple[Spy, Spy]:
        return Spy(queue=16), Spy(metric="cka-linear-debiased", queue=8, weight=0.1)

    whole, first, second = make(), make(), make()
    if engine == "lightning":
        numbers = {name: float(value) for name, value in both(*whole, steps=3).logged_metrics.items()}
        both(*first, steps=2).save_checkpoint(tmp_path / "saved.ckpt")
        both(*second, steps=3, resume=str(tmp_path / "saved.ckpt"))
    else:
        numbers = [row for row in both(*whole, steps=3).state.log_history if "loss" in row][-1]
        folder = {"output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 2}
        both(*first, steps=2, **folder)
        assert {file.name for file in (tmp_path / "checkpoint-2").glob("alignment*")} == {
            "alignment.safetensors",
            "alignment-second.safetensors",
        }
        both(*second, steps=3, resume=True, **folder)
    assert numbers["align_score"] != numbers["second_score"]
    assert numbers["align_grad_ratio"] > 10 * numbers["second_grad_ratio"] > 0
    for resumed, unbroken in zip(second, whole, strict=True):
        for found, expected in zip(resumed.state_dict()["queue"], unbroken.state_dict()["queue"], strict=True):
            torch.testing.assert_close(found, expected)
    with pytest.raises((UserError, RuntimeError), match=r"two AlignmentCallbacks are named 'align'|more than one"):
        twins = [AlignmentCallback(regularizer) for regularizer in make()]
        lightning(None, 1, callbacks=twins) if engine == "lightning" else trainer(None, 1, callbacks=twins)
    with pytest.raises(ValueError, match="name must be of letters"):
        AlignmentCallback(first[0], name="../x")
