"""How likely a language model finds text.

Shapes: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crossalign.data.batches import IGNORED
from crossalign.data.text.tokens import block_diagonal_mask

INPUTS = ("input_ids", "attention_mask", "position_ids")


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
