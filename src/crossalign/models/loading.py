"""What opening a language model and opening a vision model have in common."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from crossalign.core.errors import UserError

T = TypeVar("T")

CONSTANTS = re.compile(r"(position_ids|token_type_ids|inv_freq|attn\.(masked_)?bias|attention\.(masked_)?bias)$")
"""Names of constants that old versions used to save with the weights."""


def built(build: Callable[[], T], seed: int, meta: bool) -> T:
    """``build()`` with the initial weights of ``seed``, leaving the caller's random state alone; or without any memory."""
    with torch.random.fork_rng(devices=[]), torch.device("meta" if meta else "cpu"):
        torch.manual_seed(seed)
        return build()


@torch.no_grad()
def shuffle_weights(model: nn.Module, seed: int) -> None:
    """Permute the entries of each parameter, embeddings and norms included: its values stay, their places go."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        order = torch.randperm(parameter.numel(), generator=generator)
        parameter.copy_(parameter.flatten()[order].view_as(parameter))


def check_keys(ref: str, info: dict[str, Any], heads: re.Pattern[str]) -> None:
    """Refuse what transformers' loading report calls missing, mismatched or unexpected.

    A tensor that was not loaded would be left at random without a word; one left over shows a wrong architecture.

    Args:
        ref: for the message.
        info: transformers' loading report.
        heads: names of tensors that published checkpoints hold beside the base model.

    Raises:
        UserError: naming the first three.
    """
    extra = [key for key in info["unexpected_keys"] if not heads.search(key) and not CONSTANTS.search(key)]
    resized = [f"{key} {tuple(theirs)}, not {tuple(ours)}" for key, theirs, ours in info["mismatched_keys"]]
    for names, fault in (
        (resized, "do not fit its config.json"),
        (info["missing_keys"], "lack tensors of the model"),
        (extra, "hold tensors that the model has no place for"),
    ):
        if names:
            some = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise UserError(f"the weights of '{ref}' {fault}: {some}")


def read_weights(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or UserError where it cannot be read."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"the weights {file} cannot be read ({error}); copy the whole model/ folder again") from error
