"""Batches of texts with the features of their images: tokenised once, drawn without replacement, resumable by number.

Shapes: N pairs, B pairs a batch, T tokens, q features.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from numbers import Integral
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from crossalign.core.errors import BadArgument, UserError, unknown
from crossalign.core.progress import followed
from crossalign.data.batches import Order
from crossalign.data.text.tokenizer import padded, padding_of

Mode = Literal["paired", "unpaired", "mean"]
MODES = ("paired", "unpaired", "mean")


@dataclass(frozen=True)
class PairBatch:
    """Texts and the features of their images, row by row."""

    input_ids: Tensor
    """(B, T) long, padded on the right."""
    attention_mask: Tensor
    """(B, T) long: 1 for tokens, 0 for padding."""
    features: Tensor
    """(B, q)."""


class PairBatches:
    """``batches.batch(number)``: the number alone decides the batch, so a resumed run needs no state to draw the same.

    An epoch goes through all pairs once, in an order of its own; what is left over is too few for a batch of the same
    size and stays out of that epoch. Of an image with several texts each epoch draws one.

    Args:
        texts: one text an image, or several.
        features: (N, q), what a teacher made of the images, once, as a tensor or a NumPy array of floats; or a function of
            the images' indices (B,) that gives (B, q), for a teacher in memory.
        tokenizer: a tokenizer of transformers.
        batch_size: B, over all processes.
        seed: of the order, the texts drawn, and the unpaired set-up.
        max_length: tokens of a text; more are cut off.

    Raises:
        BadArgument: a value out of its range: fewer pairs than a batch, other numbers of texts and features, features that
            are no finite numbers. UserError: a text without tokens.
    """

    def __init__(
        self,
        texts: Sequence[str | Sequence[str]],
        features: Tensor | np.ndarray | Callable[[Tensor], Tensor],
        tokenizer: Any,
        *,
        batch_size: int = 256,
        seed: int = 0,
        max_length: int = 64,
    ) -> None:
        if isinstance(features, np.ndarray) and features.dtype.kind == "f":
            features = torch.from_numpy(features)
        self.features: Any = features
        self.batch_size, self.seed = batch_size, seed
        if isinstance(texts, str) or not hasattr(texts, "__len__"):
            raise BadArgument(f"texts must be a list, of a text or several for each image; got a {type(texts).__name__}")
        for name, value, least in (("batch_size", batch_size, 2), ("seed", seed, 0), ("max_length", max_length, 1)):
            if not isinstance(value, Integral) or int(value) < least:
                raise BadArgument(f"{name} must be a whole number, at least {least}; got {value!r}")
        if not callable(tokenizer):
            raise BadArgument(f"tokenizer must be a tokenizer of transformers; got {tokenizer!r}")
        if batch_size > len(texts):
            raise BadArgument(f"a batch of {batch_size} pairs from {len(texts)}: take at most as many as there are")
        if isinstance(features, Tensor) and features.is_floating_point():
            if features.ndim != 2 or 0 in features.shape:
                raise BadArgument(f"features of shape {tuple(features.shape)}: one row an image is wanted, (images, width)")
            if len(features) != len(texts):
                raise BadArgument(f"{len(texts)} texts and the features of {len(features)} images: they must belong together")
            bad = (~features.isfinite().all(1)).nonzero().flatten().tolist()
            if bad:
                raise BadArgument(f"features that are no finite numbers, first of image {bad[0]} ({len(bad)} in all)")
        elif not callable(features):
            given = f"{features.dtype} values" if hasattr(features, "dtype") else f"a {type(features).__name__}"
            raise BadArgument(f"features must be floats in a tensor or an array (images, width), or a function; got {given}")
        self.tokens = _tokenise(texts, tokenizer, max_length)
        self.padding = padding_of(tokenizer)
        self._drawn = lru_cache(maxsize=2)(self._draw)
        self.order = Order(len(texts), batch_size, lambda epoch: self._drawn(epoch)[0].numpy(), whole=True)

    def __len__(self) -> int:
        """Batches an epoch."""
        return len(self.order)

    def batch(self, number: int, *, mode: Mode = "paired", rank: int = 0, world: int = 1) -> PairBatch:
        """Batch ``number``, counted over all epochs; of ``world`` processes, the rows of process ``rank``.

        The shares of all processes, process 0's first, are the batch of one process.

        ``mode`` is a set-up of CMAR §4.4.2: "paired"; "unpaired", where each text is given the features of another image,
        always the same one; or "mean", where all are given the mean over all images.
        """
        _, drawn = self._drawn(number // len(self))
        rows = self.rows(number)[self.share(rank, world)]
        texts = [self.tokens[i][int(drawn[i] * len(self.tokens[i]))] for i in rows.tolist()]
        return PairBatch(*padded(texts, self.padding), self._features_of(rows, mode))

    @cached_property
    def extent(self) -> tuple[int, int]:
        """The largest token id, and the tokens of the longest text."""
        texts = [text for group in self.tokens for text in group]
        return max(max(text) for text in texts), max(len(text) for text in texts)

    def share(self, rank: int, world: int) -> slice:
        """Which rows of a batch process ``rank`` of ``world`` has."""
        return slice(rank * self.batch_size // world, (rank + 1) * self.batch_size // world)

    def rows(self, number: int) -> Tensor:
        """Which pairs are in batch ``number``: indices (B,), in its order."""
        return torch.from_numpy(self.order.rows(number))

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the texts as tokens, and of the features where they are held."""
        digest = hashlib.sha256(repr((self.tokens, self.batch_size, self.seed)).encode())
        if isinstance(self.features, Tensor):
            digest.update(self.features.detach().cpu().float().contiguous().numpy().tobytes())
        return digest.hexdigest()[:20]

    def _features_of(self, rows: Tensor, mode: Mode) -> Tensor:
        if mode not in MODES:
            raise unknown("set-up of pairs", mode, MODES)
        if mode == "mean":
            return self._mean.expand(len(rows), -1)
        return self._lookup(rows if mode == "paired" else self._partners[rows])

    def _lookup(self, rows: Tensor) -> Tensor:
        return self.features[rows.to(self.features.device)] if isinstance(self.features, Tensor) else self.features(rows)

    @cached_property
    def _mean(self) -> Tensor:
        parts = torch.arange(len(self.tokens)).split(self.batch_size)
        sums = [self._lookup(part).double().sum(0, keepdim=True) for part in parts]
        return (torch.cat(sums).sum(0, keepdim=True) / len(self.tokens)).float()

    @cached_property
    def _partners(self) -> Tensor:
        """(N,): another image for each: the next one in a circle through all of them in random order."""
        circle = torch.randperm(len(self.tokens), generator=torch.Generator().manual_seed(self.seed))
        partners = torch.empty_like(circle)
        partners[circle] = circle.roll(1)
        return partners

    def _draw(self, epoch: int) -> tuple[Tensor, Tensor]:
        """The order of the pairs (N,), and for each a number in [0, 1) that picks its text."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch + 1)
        count = len(self.tokens)
        return torch.randperm(count, generator=generator), torch.rand(count, generator=generator)


def _tokenise(texts: Sequence[str | Sequence[str]], tokenizer: Any, max_length: int) -> list[list[list[int]]]:
    """Token ids of each text of each image, a thousand texts in a call of the tokenizer."""
    groups: list[list[Any]] = [list(text) if isinstance(text, list | tuple) else [text] for text in texts]
    flat = [text for group in groups for text in group]
    for text in flat:
        if not isinstance(text, str):
            raise BadArgument(f"texts must be strings, or lists of several strings for an image; got {text!r}")
    starts = range(0, len(flat), 1000)
    settings: dict[str, Any] = {"truncation": True, "max_length": max_length, "add_special_tokens": True}
    calls = (tokenizer(flat[i : i + 1000], **settings)["input_ids"] for i in starts)
    encoded = iter([ids for call in followed(calls, len(starts), "tokenising captions", "thousand") for ids in call])
    tokens = [[list(next(encoded)) for _ in group] for group in groups]
    empty = [i for i, group in enumerate(groups) if not group or not all(text.strip() for text in group)]
    if empty or not all(all(group) for group in tokens):
        where = ", ".join(map(str, empty[:3])) or "some"
        raise UserError(f"empty texts at the pairs {where} ({len(empty)} in all): drop them, an empty text has no features")
    return tokens
