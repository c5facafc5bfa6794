"""Batches of images for training, the same whatever the number of processes, and in order for evaluation.

No worker processes: pixels lie decoded in memory or in a memory map, and gathering a batch costs less than handing it
over from another process.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor

from crossalign.config import AugmentConfig
from crossalign.data.images.augment import Draw, draw
from crossalign.data.images.load import ImageSet
from crossalign.data.order import Order

IGNORED = -100
"""A label that torch's cross-entropy passes over: no loss, no gradient, and never a correct answer."""


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
class TrainStep:
    """One optimiser step, as one process sees it."""

    micro_batches: tuple[MicroBatch, ...]
    """This process's rows."""
    count: int
    """Images of the step over all processes."""
    step: int
    """Place in the epoch, from 0."""


class TrainBatches:
    """Epochs over an image set, sampled without replacement.

    The order of an epoch depends on (seed, epoch) alone and the augmentation of a step on (seed, epoch, step), both for
    the global batch, of which a process takes the rows ``rank::world``. So any step can be made without those before
    it, and its images are the same for any number of processes and micro-batches. The last batch of an epoch holds
    what is left.
    """

    def __init__(
        self,
        images: ImageSet,
        *,
        batch_size: int,
        seed: int,
        augment: AugmentConfig | None = None,
        accumulation: int = 1,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        """
        Args:
            images: what to go through.
            batch_size: images a step, over all processes and micro-batches.
            seed: not negative.
            augment: settings to draw augmentation for; None draws nothing.
            accumulation: micro-batches a step.
            rank: this process.
            world: number of processes.

        Raises:
            UserError: a batch larger than the set, or too small to be shared out; a negative seed.
        """
        self.images, self.augment = images, augment
        self.order = Order(
            len(images),
            batch_size=batch_size,
            seed=seed,
            accumulation=accumulation,
            rank=rank,
            world=world,
            what="training images",
            each="an image",
        )

    def __len__(self) -> int:
        """Steps an epoch."""
        return len(self.order)

    def epoch(self, epoch: int, first: int = 0) -> Iterator[TrainStep]:
        """The steps of ``epoch`` from step ``first`` on.

        Where the last one has fewer images than there are processes, those without one get the first image with the label
        ``IGNORED``, since many models cannot take a batch of none.
        """
        for turn in self.order.epoch(epoch, first):
            drawn = None
            if self.augment is not None:
                state = int(self.order.sequence(epoch, turn.step).generate_state(1, np.uint64)[0])
                drawn = draw(len(turn.rows), self.augment, torch.Generator().manual_seed(state >> 1))
            micro = tuple(self._gather(turn.rows, part, drawn) for part in turn.micro_batches)
            if turn.filler:
                micro[0]["labels"].fill_(IGNORED)
            yield TrainStep(micro, len(turn.rows), turn.step)

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
