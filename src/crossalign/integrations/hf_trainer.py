"""The alignment term in Hugging Face's ``Trainer`` and whatever is built on it, such as TRL's ``SFTTrainer``.

    trainer = Trainer(model=model, args=args, train_dataset=data, callbacks=[AlignmentCallback(regularizer)])

or, where gradients are scaled (fp16), as a mixin, which knows the trainer's accelerator:

    class AlignedTrainer(AlignedTrainerMixin, Trainer): ...
    trainer = AlignedTrainer(model=model, args=args, train_dataset=data, regularizer=regularizer)

The term has a backward pass of its own at the beginning of a step, before that of the first micro-batch: so it counts once
whatever the accumulation, and DDP averages its gradient with the others'.
"""

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer_callback import CallbackHandler

from crossalign.core.errors import BadArgument, UserError
from crossalign.features.regularizer import NAME, AlignmentRegularizer, check_name
from crossalign.models.loading import write_tensors
from crossalign.training.optim import average, gradients_of, laid_aside, norm_of


class AlignmentCallback(TrainerCallback):
    """Adds the regulariser's gradient on the steps that are due, logs its numbers as ``align_*``, and saves its queue.

    The numbers stand once in the log: in the next row after their step, which ``align_step`` names, counted from 0 as
    ``due`` counts. ``align_grad_ratio`` is the norm of the term's gradient over that of the whole step's before clipping.

    Args:
        regularizer: the term.
        accelerator: the trainer's, where it has one to give: for scaled gradients.
        name: what its numbers begin with; several callbacks in one trainer have different ones.

    Raises:
        BadArgument: a name that is no word.
    """

    def __init__(self, regularizer: AlignmentRegularizer, accelerator: Any = None, name: str = NAME) -> None:
        check_name(name)
        self.regularizer, self.accelerator, self.name = regularizer, accelerator, name
        self.file = "alignment.safetensors" if name == NAME else f"alignment-{name}.safetensors"
        self._numbers: dict[str, Tensor] = {}
        self._norm: Tensor | None = None  # of the term's gradient, until that of the whole step's is known
        self._whole: Tensor | None = None  # the norm of the last step's gradient before it was clipped

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse what would come out wrong; on a resumed run, put the queue back."""
        # Reporters log in the order of the handler's list, which no callback is given: stand before them.
        handler, trainer = _caller(CallbackHandler), _caller(Trainer)
        if handler is not None:
            ours = [callback for callback in handler.callbacks if isinstance(callback, AlignmentCallback)]
            if len({callback.name for callback in ours}) < len(ours):
                raise BadArgument(f"two AlignmentCallbacks are named '{self.name}': give each its own name=")
            handler.callbacks.sort(key=lambda callback: callback is not self)
        if trainer is not None:
            self._watch(trainer.accelerator)
        if args.fp16 and self.accelerator is None:
            raise UserError("with fp16 gradients are scaled, which a callback cannot see: use AlignedTrainerMixin instead")
        if args.deepspeed:
            raise UserError("the alignment term is not supported under DeepSpeed, which owns the backward pass: use DDP")
        if args.fsdp:
            raise UserError(
                "the alignment term is not supported with Trainer's fsdp, which could not be tested: use DDP here, or "
                "crossalign finetune --loop.shard"
            )
        if state.global_step:
            self._restore(args, state)

    def on_step_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """One backward pass for the term."""
        if not self.regularizer.due(state.global_step):
            return
        model.train()  # the trainer does so later, in its own forward pass: until then evaluation left it
        if callable(getattr(optimizer, "train", None)):
            optimizer.train()
        accelerator = self.accelerator
        with laid_aside(model), accelerator.no_sync(model) if accelerator is not None else nullcontext():
            value = self.regularizer.loss(model)
            accelerator.backward(value) if accelerator is not None else value.backward()
            self._norm = norm_of(average(gradient.clone()) for gradient in gradients_of(model))
        self._numbers = {"step": torch.tensor(state.global_step), "loss": value.detach(), **self.regularizer.numbers}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """The whole gradient, where the mixin did not see it before."""
        self.compare(model, self._whole)

    def compare(self, model: nn.Module, whole: Tensor | None = None) -> None:
        """Note the ratio of the term's gradient to the whole step's, whose norm is computed unless it is given."""
        if self._norm is not None:
            self._numbers["grad_ratio"] = self._norm / (norm_of(gradients_of(model)) if whole is None else whole)
            self._norm = None

    def _watch(self, accelerator: Any) -> None:
        """Note the norm of each step's gradient, which accelerate gives as it clips: afterwards nobody knows it."""
        clip = accelerator.clip_grad_norm_

        def watched(*args: Any, **kwargs: Any) -> Any:
            self._whole = clip(*args, **kwargs)
            return self._whole

        accelerator.clip_grad_norm_ = watched

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """The numbers of the latest step that was due, beside the trainer's own, once."""
        if logs is not None and "loss" in logs and self._numbers:
            numbers = {f"{self.name}_{name}": float(value) for name, value in self._numbers.items()}
            self._numbers = {}
            logs.update(numbers)
            if state.log_history:
                state.log_history[-1].update(numbers)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The queue, beside the trainer's checkpoint."""
        saved = self.regularizer.state_dict()
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            queue = {str(i): tensor.contiguous().cpu() for i, tensor in enumerate(saved["queue"])}
            write_tensors(folder / self.file, queue, metadata={"pairs": saved["pairs"]})

    def _restore(self, args: Any, state: Any) -> None:
        """Put the queue back from the checkpoint that the trainer goes on from, whose folder it does not tell."""
        resumed = args.resume_from_checkpoint
        folder = Path(resumed) if isinstance(resumed, str) else Path(args.output_dir) / f"checkpoint-{state.global_step}"
        file = folder / "trainer_state.json"
        saved_state = TrainerState.load_from_json(str(file)) if file.is_file() else TrainerState()
        histories = str(saved_state.log_history), str(state.log_history)  # as text, since NaN is not NaN
        if saved_state.global_step == state.global_step and histories[0] == histories[1]:  # it was saved there
            if (folder / self.file).is_file():
                with safe_open(folder / self.file, "pt") as saved:
                    queue = [saved.get_tensor(name) for name in sorted(saved.keys())]
                    self.regularizer.load_state_dict({"pairs": saved.metadata()["pairs"], "queue": queue})
        elif self.regularizer.queue:
            raise UserError(
                f"the run goes on from a checkpoint that is not {folder}, so its queue of features is not found: name the "
                "checkpoint in TrainingArguments(resume_from_checkpoint=…) too"
            )


def _caller(kind: type) -> Any:
    """The nearest object of a ``kind`` in whose methods we are; None where there is none."""
    frame = sys._getframe(1)
    while frame is not None and not isinstance(frame.f_locals.get("self"), kind):
        frame = frame.f_back  # type: ignore[assignment]
    return frame and frame.f_locals["self"]


class AlignedTrainerMixin:
    """Before ``Trainer`` or ``SFTTrainer`` among the bases: takes ``regularizer=…`` beside the trainer's own arguments."""

    def __init__(self, *args: Any, regularizer: AlignmentRegularizer, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        trainer: Any = self
        self._alignment = AlignmentCallback(regularizer, trainer.accelerator)
        trainer.add_callback(self._alignment)

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """The trainer's, after whose last micro-batch the whole gradient is there, not yet clipped."""
        loss: Tensor = super().training_step(model, *args, **kwargs)  # type: ignore[misc]
        trainer: Any = self
        if trainer.accelerator.sync_gradients:
            self._alignment.compare(model)
        return loss
