"""The alignment term in Lightning: ``Trainer(callbacks=[LightningAlignmentCallback(regularizer)])``.

Lightning clears gradients between the forward and the backward pass, and DDP waits for the backward pass from the forward
pass on: so the term's gradient is computed apart, averaged over the processes, and added before the optimiser steps. It
counts once whatever the accumulation, and clipping sees it.
"""

from typing import Any

import torch
from torch import nn

from crossalign.core.errors import UserError
from crossalign.features.regularizer import NAME, AlignmentRegularizer, check_name
from crossalign.training.optim import average, gradients_of, laid_aside, norm_of

try:
    import lightning.pytorch as pl
except ImportError as error:
    raise UserError("crossalign.integrations.lightning needs the package 'lightning': pip install lightning") from error


class LightningAlignmentCallback(pl.Callback):
    """Adds the regulariser's gradient on the steps that are due, logs its numbers as ``align_*``, and saves its state.

    Args:
        regularizer: the term.
        model: name of the language model in the Lightning module, such as "model"; empty if it is the module itself.
        name: what its numbers begin with; several callbacks in one trainer have different ones.

    Raises:
        BadArgument: a name that is no word.
    """

    def __init__(self, regularizer: AlignmentRegularizer, model: str = "model", name: str = NAME) -> None:
        check_name(name)
        self.regularizer, self.model, self.name = regularizer, model, name

    @property
    def state_key(self) -> str:
        """What a checkpoint keeps the state under; Lightning refuses two of one key."""
        return super().state_key if self.name == NAME else f"{super().state_key}[{self.name}]"

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Refuse what would come out wrong."""
        strategy = type(trainer.strategy).__name__
        if strategy not in ("SingleDeviceStrategy", "DDPStrategy"):
            raise UserError(f"the alignment term is supported in Lightning on one device and with DDP, not with {strategy}")
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            raise UserError("the alignment term is not supported with 16-mixed, whose gradients are scaled: use bf16-mixed")
        if not pl_module.automatic_optimization:
            raise UserError("with manual optimisation add regularizer.loss(model) to the last micro-batch's loss yourself")
        try:
            pl_module.get_submodule(self.model)
        except AttributeError as error:
            names = ", ".join(name for name, _ in pl_module.named_children())
            raise UserError(
                f"{type(pl_module).__name__} has no module '{self.model}': give LightningAlignmentCallback the name of the "
                f"language model in it as model=, of {names}"
            ) from error

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """The gradient of the term, the mean over processes, added to what the step has: DDP's own hooks are at rest now."""
        if not self.regularizer.due(trainer.global_step):
            return
        model: nn.Module = pl_module.get_submodule(self.model)
        with torch.enable_grad(), trainer.precision_plugin.forward_context():
            value = self.regularizer.loss(model)
        with laid_aside(model):  # reentrant checkpointing knows ``backward`` alone, which adds to what is there
            value.backward()
            norm = norm_of(average(gradient) for gradient in gradients_of(model))
        numbers = {"loss": value.detach(), **self.regularizer.numbers}
        numbers["grad_ratio"] = norm / norm_of(gradients_of(pl_module))
        pl_module.log_dict({f"{self.name}_{name}": number for name, number in numbers.items()})

    def state_dict(self) -> dict[str, Any]:
        return self.regularizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.regularizer.load_state_dict(state_dict)
