"""What is set inside a model of transformers, whatever its architecture: attention, dropout, checkpointing, LoRA."""

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from crossalign.config import TuneConfig
from crossalign.models.language.families import family_of

UNMASKED, MASKED = "crossalign_unmasked", "crossalign_masked"


def attend_without_mask(model: Any) -> None:
    """Let ``is_causal`` alone decide the direction, on every architecture, so that torch's fast kernels always serve.

    transformers builds no mask for an attention function that it has no mask for. For its own "sdpa" it would look for
    packed sequences in each causal forward pass, which reads a value back from a GPU, and makes a mask when compiled.
    """
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> tuple[Tensor, None]:
        if query.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
            return sdpa_attention_forward(module, query, key, value, mask, **kwargs)  # type: ignore[no-any-return]
        # Torch's attention kernel for CPUs takes several times longer in bf16 than in fp32 (benchmarks/adapt.py).
        with torch.autocast("cpu", enabled=False):
            full = (query.float(), key.float(), value.float())
            output, weights = sdpa_attention_forward(module, *full, mask, **kwargs)
        return output.to(torch.get_autocast_dtype("cpu")), weights

    AttentionInterface.register(UNMASKED, attend)
    model.set_attn_implementation(UNMASKED)


def attend_with_mask(model: Any) -> None:
    """Torch's fast kernels with a mask that is always made on a GPU.

    transformers' own "sdpa" would look in each forward pass whether the mask is needed, which reads a value back.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def mask(*args: Any, allow_is_causal_skip: bool = True, **kwargs: Any) -> Tensor | None:
        given = kwargs.get("attention_mask")
        skips = allow_is_causal_skip and (given is None or given.device.type == "cpu")
        return sdpa_mask(*args, allow_is_causal_skip=skips, **kwargs)  # type: ignore[no-any-return]

    AttentionInterface.register(MASKED, sdpa_attention_forward)
    AttentionMaskInterface.register(MASKED, mask)
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(MASKED)


def checkpoint_gradients(model: Any) -> None:
    """Recompute activations in the backward pass."""
    new_name = getattr(model, "activation_checkpointing_enable", None)
    (new_name or model.gradient_checkpointing_enable)({"use_reentrant": False})


def set_dropout(model: nn.Module, probability: float) -> None:
    """One probability everywhere: dropout modules, and the numbers that attention and OPT's layers keep as attributes.

    By type and attribute, not by configuration, whose names differ: GPT-2 ignores ``hidden_dropout_prob``.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = probability
        for name, value in vars(module).items():
            if name == "layerdrop":
                setattr(module, name, 0.0)
            elif "dropout" in name and isinstance(value, float | int) and not isinstance(value, bool):
                setattr(module, name, probability)


def add_lora(model: nn.Module, config: TuneConfig) -> Any:
    """Put LoRA layers (Hu et al. 2021) into a Hugging Face ``model``, in place, on attention q, k, v, o and MLP up, down.

    Returns PEFT's wrapper, which merges and exports; ``model`` itself stays callable as before.
    """
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=list(family_of(model.config).lora_targets),
        bias="none",
    )
    with warnings.catch_warnings():  # about a property of transformers that PEFT still reads, and about Conv1D's layout
        warnings.simplefilter("ignore")
        return get_peft_model(model, lora)
