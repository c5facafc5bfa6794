"""Causal language models: GPT-2 from scratch, what trains of an opened one, how likely they find text, and their folder.

Shapes: B sequences, T tokens, V vocabulary.
"""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crossalign.config import GPTConfig, TuneConfig, validate
from crossalign.core.errors import UserError
from crossalign.core.files import atomic_path
from crossalign.data.batches import IGNORED
from crossalign.data.model_files import quiet
from crossalign.data.text.tokens import block_diagonal_mask
from crossalign.models.language.inner import add_lora, attend_without_mask, checkpoint_gradients
from crossalign.models.language.model import LanguageModel, save_base
from crossalign.models.loading import built

INPUTS = ("input_ids", "attention_mask", "position_ids")


def new_gpt2(config: GPTConfig, *, vocabulary: int, block: int, separator: int, seed: int, meta: bool = False) -> Any:
    """GPT-2 (``GPT2LMHeadModel``) with initial weights as in nanoGPT: normal with deviation 0.02, output projections of the
    blocks 0.02 / √(2L), biases 0, the head tied to the token table.

    Args:
        config: its size.
        vocabulary: entries of the tokenizer.
        block: positions.
        separator: the token that starts and ends a document.
        seed: of the weights; the caller's random state is left alone.
        meta: build it without memory.

    Raises:
        UserError: a setting out of its bounds, or a width that the heads do not divide.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    validate(config, "gpt.")
    if config.width % config.heads:
        raise UserError(f"--gpt.width {config.width} is not a multiple of --gpt.heads {config.heads}")
    settings = GPT2Config(
        vocab_size=vocabulary,
        n_positions=block,
        n_embd=config.width,
        n_layer=config.layers,
        n_head=config.heads,
        activation_function="gelu_pytorch_tanh",  # GPT-2's own function in one kernel; "gelu_new" spells it out in six
        resid_pdrop=config.dropout,
        embd_pdrop=config.dropout,
        attn_pdrop=config.dropout,
        bos_token_id=separator,
        eos_token_id=separator,
        use_cache=False,
        attn_implementation="sdpa",
    )
    model: Any = built(lambda: GPT2LMHeadModel(settings), seed, meta)
    attend_without_mask(model)
    if config.gradient_checkpointing:
        checkpoint_gradients(model)
    return model


def choose_trained(model: Any, tune: TuneConfig, seed: int) -> Any | None:
    """Set what trains of a causal model: everything, or LoRA updates alone, whose PEFT model is returned.

    Raises:
        UserError: a method that is for images.
    """
    if tune.method == "full":
        model.requires_grad_(True)
        return None
    if tune.method != "lora":
        raise UserError("a language model is fine-tuned with --tune.method full or lora; fpt is for images")
    return built(lambda: add_lora(model, tune), seed, meta=False)


def nll_sum(model: Any, batch: Mapping[str, Any], device: torch.device) -> Tensor:
    """Sum of the negative log-likelihoods, fp32, of the targets (B, T) of ``batch`` that are not ``IGNORED``."""
    inputs = {name: batch[name].to(device, non_blocking=True) for name in INPUTS if name in batch}
    if "segment_ids" in batch:  # packed rows
        inputs["attention_mask"] = block_diagonal_mask(batch["segment_ids"].to(device, non_blocking=True))
    targets_BT = batch["targets"].to(device, non_blocking=True)
    logits_BTV = model(**inputs, use_cache=False).logits
    return F.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten(), ignore_index=IGNORED, reduction="sum")


@torch.no_grad()
def total_nll(model: nn.Module, batches: Iterable[Mapping[str, Any]], device: torch.device, accelerator: Any = None) -> float:
    """Sum of the negative log-likelihoods of all targets, in nats, over all processes of accelerate's ``accelerator``."""
    parts = [nll_sum(model, batch, device) for batch in batches]
    total = torch.stack(parts) if parts else torch.zeros(1, device=device)
    if total.device.type != "mps":  # which has no float64
        total = total.double()
    return float(total.sum() if accelerator is None else accelerator.reduce(total.sum(), "sum"))


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that is too large for a float."""
    return math.exp(loss) if loss < 700 else math.inf


def save_causal(
    model: Any,
    peft: Any | None,
    tokenizer: Any,
    folder: Path,
    state: dict[str, Tensor] | None = None,
    base: LanguageModel | None = None,
) -> None:
    """Write a folder for ``from_pretrained``, whole or not at all: the model, or its LoRA adapter in PEFT's format, and the
    tokenizer.

    ``state`` holds the whole tensors of a model whose own are shares; ``base`` is what an adapter belongs to.
    """
    given: dict[str, Any] = {}
    if state is not None:
        given["state_dict"] = {f"base_model.model.{name}": t for name, t in state.items()} if peft is not None else state
    with quiet(), atomic_path(folder) as temporary:
        if peft is not None:
            peft.save_pretrained(str(temporary), safe_serialization=True, **given)
            if base is not None:
                save_base(base, temporary)
        else:
            model.save_pretrained(str(temporary), **given)
        tokenizer.save_pretrained(str(temporary))
