"""A causal model as lm-evaluation-harness wants it: its own adapter of transformers, with batches that fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from crossalign.core.machine import free_memory


class Scorer(HFLM):
    """The harness's adapter of transformers, round an opened model.

    Batches hold as many tokens as fit, those of running text too; several processes share the documents; log-likelihoods are
    summed in fp32 whatever the weights are in. A text that starts with BOS starts with one also where it is running text: the
    parent puts a second before it, as the token that predicts the first.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        bos: bool,
        batch_size: int = 0,
        max_length: int | None = None,
        accelerator: Any = None,
    ) -> None:
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            backend="causal",
            add_bos_token=bos,
            batch_size=batch_size or "auto",
            max_length=max_length,
            softmax_dtype="float32",
        )
        self._ends: dict[int, int] = {}
        if accelerator is not None and accelerator.num_processes > 1:
            self.accelerator = accelerator
            self._rank, self._world_size = accelerator.process_index, accelerator.num_processes

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, each in pieces of ``max_length`` tokens. The token before the first is the prefix
        token alone, so no BOS is added to it."""
        owners, pieces = [], []
        for i, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1):
                owners.append(i)
                pieces.append((None, *make_disjoint_window(window)))
        totals = [0.0] * len(requests)
        for owner, (found, _) in zip(owners, self._loglikelihood_tokens(pieces), strict=True):
            totals[owner] += found
        return totals

    def _batch_scheduler(self, pos: int, n_reordered_requests: Sequence[Any]) -> int:
        """The size of the batch that ends at ``pos``; 0, which no batch has, where none ends. Requests come longest first."""
        if pos == 0:
            lengths = [len(request[1]) + len(request[2]) for request in n_reordered_requests]
            self._ends = batch_ends(lengths, self.tokens_per_batch())
        return self._ends.get(pos, 0)

    def _detect_batch_size(self, requests: Sequence[Any] | None = None, pos: int = 0) -> int:
        """For tasks that generate; the parent would try sizes until memory runs out, which on a CPU takes the machine down."""
        return max(1, self.tokens_per_batch() // int(self.max_length))

    def tokens_per_batch(self) -> int:
        """Tokens whose logits, log-probabilities and their copy take a fifth of the memory that is free; few on a CPU, where
        more gain nothing."""
        free, most = free_memory() or 4 << 30, 4096
        if self.device.type == "cuda":
            free, most = torch.cuda.mem_get_info(self.device)[0], 65_536
        return int(max(1, min(most, free // 5 // (12 * self.model.config.vocab_size))))


def batch_ends(lengths: Sequence[int], tokens: int) -> dict[int, int]:
    """Cut requests, longest first, into batches of at most ``tokens`` with padding: last index of each → its size."""
    ends, first = {}, 0
    for i, _ in enumerate(lengths):
        if i + 1 == len(lengths) or (i + 2 - first) * lengths[first] > tokens:
            ends[i] = i + 1 - first
            first = i + 1
    return ends
