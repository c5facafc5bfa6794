"""The alignment term in Hugging Face's ``Trainer`` and whatever is built on it, such as TRL's ``SFTTrainer``.

    trainer = Trainer(model=model, args=args, train_dataset=data, callbacks=[AlignmentCallback(regularizer)])

or, where gradients are scaled (fp16), as a mixin, which knows the trainer's accelerator:

    class AlignedTrainer(AlignedTrainerMixin, Trainer): ...
    trainer = AlignedTrainer(model=model, args=args, train_dataset=data, regularizer=regularizer)

The term has a backward pass of its own at the beginning of a step, before that of the first micro-batch: so it counts once
whatever the accumulation, and DDP averages its gradient with the others'.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from crossalign.errors import UserError
from crossalign.regularizer import AlignmentRegularizer

FILE = "alignment.safetensors"


class AlignmentCallback(TrainerCallback):
    """Adds the regulariser's gradient on the steps that are due, logs its numbers as ``align_*``, and saves its queue.

    Args:
        regularizer: the term.
        accelerator: the trainer's, where it has one to give: for scaled gradients.
    """

    def __init__(self, regularizer: AlignmentRegularizer, accelerator: Any = None) -> None:
        self.regularizer, self.accelerator = regularizer, accelerator
        self._numbers: dict[str, Tensor] = {}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Refuse what would come out wrong; on a resumed run, put the queue back."""
        if args.fp16 and self.accelerator is None:
            raise UserError("with fp16 gradients are scaled, which a callback cannot see: use AlignedTrainerMixin instead")
        if args.deepspeed:
            raise UserError("the alignment term is not supported under DeepSpeed, which owns the backward pass: use DDP")
        if args.fsdp:
            raise UserError(
                "the alignment term is not supported with Trainer's fsdp, which could not be tested: use DDP here, or "
                "crossalign finetune --loop.shard"
            )
        resumed = args.resume_from_checkpoint
        folder = Path(resumed) if isinstance(resumed, str) else Path(args.output_dir) / f"checkpoint-{state.global_step}"
        file = folder / FILE
        if state.global_step and file.is_file():
            self._load(file)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """One backward pass for the term."""
        if not self.regularizer.due(state.global_step):
            return
        accelerator = self.accelerator
        with accelerator.no_sync(model) if accelerator is not None else nullcontext():
            value = self.regularizer.loss(model)
            accelerator.backward(value) if accelerator is not None else value.backward()
        self._numbers = {"loss": value.detach(), **self.regularizer.numbers}

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """The latest numbers beside the trainer's own."""
        if logs is not None and "loss" in logs and self._numbers:
            told = {f"align_{name}": float(value) for name, value in self._numbers.items()}
            logs.update(told)
            if state.log_history:
                state.log_history[-1].update(told)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The queue, beside the trainer's checkpoint."""
        from safetensors.torch import save_file

        told = self.regularizer.state_dict()
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            queue = {str(i): tensor.contiguous().cpu() for i, tensor in enumerate(told["queue"])}
            save_file(queue, folder / FILE, metadata={"pairs": told["pairs"]})

    def _load(self, file: Path) -> None:
        from safetensors import safe_open

        with safe_open(file, "pt") as saved:
            queue = [saved.get_tensor(name) for name in sorted(saved.keys())]
            self.regularizer.load_state_dict({"pairs": saved.metadata()["pairs"], "queue": queue})


class AlignedTrainerMixin:
    """Before ``Trainer`` or ``SFTTrainer`` among the bases: takes ``regularizer=…`` beside the trainer's own arguments."""

    def __init__(self, *args: Any, regularizer: AlignmentRegularizer, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        trainer: Any = self
        trainer.add_callback(AlignmentCallback(regularizer, trainer.accelerator))
