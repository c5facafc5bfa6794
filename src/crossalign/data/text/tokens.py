"""Blocks of a token stream: for training each token once an epoch, for evaluation each token once.

A token file is nanoGPT's: flat uint16 or uint32, read through a memory map, of which a step copies its own blocks only.
"""

import math
from dataclasses import dataclass
from typing import Any, NotRequired, TypedDict

import numpy as np
import torch
from torch import Tensor

from crossalign.core.errors import UserError
from crossalign.data.batches import IGNORED, InOrder, Turn
from crossalign.data.text.tokenizer import ordinary_text


class TextBatch(TypedDict):
    """b sequences of t tokens that go through the model together."""

    input_ids: Tensor
    """int64 (b, t)"""
    targets: Tensor
    """int64 (b, t): the token after each input, already shifted; ``IGNORED`` where none is to be predicted."""
    attention_mask: NotRequired[Tensor]
    """int64 (b, t): 0 where there is padding."""
    position_ids: NotRequired[Tensor]
    """int64 (b, t): places in each sequence from 0, whatever the padding."""
    segment_ids: NotRequired[Tensor]
    """int64 (b, t): which sequence of the row a token is of, from 1; 0 is padding."""


def block_diagonal_mask(segments: Tensor) -> Tensor:
    """Who may see whom in packed rows: each token itself and those before it in its own example.

    Args:
        segments: int (b, t), as ``segment_ids``.

    Returns:
        bool (b, 1, t, t), True where the row's token sees the column's: what transformers' sdpa and eager attention take as
        ``attention_mask``. Padding sees padding, so that no row is empty, which would be NaN.
    """
    same = segments[:, :, None] == segments[:, None, :]
    return (same & torch.ones_like(same).tril())[:, None]


@dataclass(frozen=True)
class TokenFile:
    """One side of a corpus. A separator stands at the head of the stream and after each document."""

    tokens: np.ndarray
    """uint16 or uint32 (n,), a memory map."""
    documents: int
    bytes: int
    """UTF-8 bytes of the text, without separators."""

    def __len__(self) -> int:
        return len(self.tokens)


def as_stream(text: str, tokenizer: Any, separator: int) -> TokenFile:
    """A text as one document of tokens."""
    with ordinary_text(tokenizer) as backend:
        tokens = backend.encode(text, add_special_tokens=False).ids
    return TokenFile(np.array([separator, *tokens, separator]), 1, len(text.encode()))


class TokenRows:
    """Blocks of a token stream as batches of training; a step's ``count`` is its tokens.

    The stream is taken as a ring and cut into n // block windows from an offset that changes with the epoch; window i gives
    the inputs [i · block, (i + 1) · block) after the offset and, one token later, their targets. So in an epoch no token is
    an input twice or a target twice, fewer than a block are left out, and every epoch has the same number of steps. The
    offset depends on (seed, epoch) alone.

    The order is one permutation an epoch, the simplest that is uniform: 8 bytes a block, so the 9 billion tokens of
    OpenWebText in blocks of 1,024 take 70 MB and under a second. A cipher would save memory only beyond 10^12 tokens.
    """

    def __init__(self, tokens: np.ndarray, block: int) -> None:
        """
        Args:
            tokens: (n,), as ``TokenFile.tokens``.
            block: tokens a sequence.

        Raises:
            UserError: a corpus smaller than a block.
        """
        if len(tokens) < block + 1:
            raise UserError(
                f"the training text has {len(tokens):,} tokens, fewer than a block of {block:,} and the one after it: lower "
                "the block, or give more text"
            )
        self.tokens, self.block = tokens, block
        self.title = (f"blocks of {block} training tokens", "a sequence")

    def __len__(self) -> int:
        return len(self.tokens) // self.block

    def tensors(self, turn: Turn) -> tuple[tuple[TextBatch, ...], int]:
        """The windows of a turn, with their targets."""
        offset = int(np.random.Generator(np.random.PCG64(turn.sequence(0))).integers(len(self.tokens)))
        micro_batches = tuple(self._gather(turn.rows[places], offset) for places in turn.micro_batches)
        return micro_batches, len(turn.rows) * self.block

    def _gather(self, rows: np.ndarray, offset: int) -> TextBatch:
        windows = np.stack([self._window((offset + int(row) * self.block) % len(self.tokens)) for row in rows])
        both = torch.from_numpy(windows.astype(np.int64))
        return {"input_ids": both[:, :-1].contiguous(), "targets": both[:, 1:].contiguous()}

    def _window(self, start: int) -> np.ndarray:
        """block + 1 tokens from ``start`` on; behind the last token, which is a separator, comes the first."""
        window = self.tokens[start : start + self.block + 1]
        short = self.block + 1 - len(window)
        return np.concatenate([window, self.tokens[:short]]) if short else window


class EvaluationBlocks(InOrder[TextBatch]):
    """Blocks for an exact perplexity, in order: each token but the first, a separator, is predicted exactly once.

    The sum of the losses does not depend on ``batch_size`` (over all processes) or ``world``; it depends on ``block``, since
    the first tokens of a block see less before them.
    """

    def __init__(self, stream: TokenFile, block: int, batch_size: int, rank: int = 0, world: int = 1) -> None:
        """
        Raises:
            UserError: nothing to predict.
        """
        if len(stream) < 2:
            raise UserError(f"the validation text has {len(stream)} tokens, so none can be predicted: hold out more")
        self.stream, self.block = stream, block
        self.tokens = len(stream) - 1
        """That are predicted, over all processes: the text's and the separators after the documents."""
        super().__init__(-(-self.tokens // block), self._gather, batch_size, rank, world)

    def metrics(self, nats: float) -> dict[str, float]:
        """Loss a token, perplexity and bits a byte, from the sum of the losses over all processes."""
        loss = nats / self.tokens
        perplexity = math.exp(loss) if loss < 700 else math.inf
        return {"loss": loss, "perplexity": perplexity, "bits_per_byte": nats / math.log(2) / self.stream.bytes}

    def _gather(self, rows: np.ndarray) -> TextBatch:
        """Blocks (b, block); the last one of the stream is filled up on the right, which no earlier token sees."""
        inputs = torch.zeros(len(rows), self.block, dtype=torch.int64)
        targets = torch.full_like(inputs, IGNORED)
        for index, start in enumerate(rows * self.block):
            window = torch.from_numpy(self.stream.tokens[start : start + self.block + 1].astype(np.int64))
            inputs[index, : len(window) - 1] = window[:-1]
            targets[index, : len(window) - 1] = window[1:]
        return {"input_ids": inputs, "targets": targets}
