"""Batches of images: shuffled and augmented for training, in order for evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor

from crossalign.config import AugmentConfig
from crossalign.data.batches import Turn
from crossalign.data.images.augment import Draw, draw
from crossalign.data.images.load import ImageSet


class MicroBatch(TypedDict):
    """b images that go through the model together."""

    images: Tensor
    """uint8 (b, C, H, W)"""
    labels: Tensor
    """int64 (b,); ``IGNORED`` where the image only fills a place."""
    draw: Draw | None
    """The augmentation of these rows, drawn but not applied."""


class EvalBatch(TypedDict):
    """Images with their places in the set, to put gathered results back in order."""

    index: Tensor
    """int64 (b,)"""
    images: Tensor
    """uint8 (b, C, H, W)"""
    labels: Tensor
    """int64 (b,)"""


@dataclass(frozen=True)
class ImageRows:
    """The images of a set as batches of training; a step's ``count`` is its images.

    The augmentation of a step depends on (seed, epoch, step) alone and is drawn for the global batch, so that an image is
    changed the same way whatever the number of processes and micro-batches.
    """

    images: ImageSet
    augment: AugmentConfig | None = None
    """Settings to draw augmentation for; None draws nothing."""
    title = ("training images", "an image")

    def __len__(self) -> int:
        return len(self.images)

    def tensors(self, turn: Turn) -> tuple[tuple[MicroBatch, ...], int]:
        """Pixels and labels of a turn, with the augmentation drawn."""
        drawn = None
        if self.augment is not None:
            state = int(turn.sequence(turn.step).generate_state(1, np.uint64)[0])
            drawn = draw(len(turn.rows), self.augment, torch.Generator().manual_seed(state >> 1))
        return tuple(self._gather(turn.rows, part, drawn) for part in turn.micro_batches), len(turn.rows)

    def _gather(self, rows: np.ndarray, part: np.ndarray, drawn: Draw | None) -> MicroBatch:
        images, labels = _take(self.images, rows[part])
        return {"images": images, "labels": labels, "draw": drawn.rows(torch.from_numpy(part)) if drawn else None}


def eval_batches(images: ImageSet, batch_size: int, rank: int = 0, world: int = 1) -> Iterator[EvalBatch]:
    """Each image exactly once over all processes, in order; ``batch_size`` is over all processes.

    Every process gets the same number of batches, so that collective calls in a model match; a last batch too small to
    be shared out is joined to the one before it.
    """
    batch_size = max(batch_size, world)
    steps = max(1, (len(images) + batch_size - world) // batch_size)
    for step in range(steps):
        stop = len(images) if step == steps - 1 else (step + 1) * batch_size
        rows = np.arange(step * batch_size + rank, stop, world)
        pixels, labels = _take(images, rows)
        yield {"index": torch.from_numpy(rows), "images": pixels, "labels": labels}


def _take(images: ImageSet, rows: np.ndarray) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(images.pixels[rows]), images.labels[torch.from_numpy(rows)]
