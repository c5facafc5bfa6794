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
from crossalign.data.augment import Draw, draw
from crossalign.data.images import ImageSet
from crossalign.errors import UserError

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
        if batch_size > len(images):
            raise UserError(f"a batch of {batch_size} is larger than the set of {len(images)} training images; lower it")
        if not 1 <= accumulation * world <= batch_size:
            raise UserError(
                f"a batch of {batch_size} cannot be cut into {accumulation} micro-batches for {world} processes; "
                "each needs an image"
            )
        if seed < 0:
            raise UserError(f"seed is {seed}; it must not be negative")
        self.images, self.batch_size, self.seed, self.augment = images, batch_size, seed, augment
        self.accumulation, self.rank, self.world = accumulation, rank, world

    def __len__(self) -> int:
        """Steps an epoch."""
        return -(-len(self.images) // self.batch_size)

    def epoch(self, epoch: int, first: int = 0) -> Iterator[TrainStep]:
        """The steps of ``epoch`` from step ``first`` on.

        All processes get the same number of micro-batches, so that their collective calls match; the last step may have
        fewer than the others. If it has fewer images than there are processes, those without one get the first image
        with the label ``IGNORED``, since many models cannot take a batch of none.
        """
        order = np.random.Generator(np.random.PCG64(self._seed(epoch))).permutation(len(self.images))
        for step in range(first, len(self)):
            rows = order[step * self.batch_size : (step + 1) * self.batch_size]
            drawn = None
            if self.augment is not None:
                state = int(self._seed(epoch, step).generate_state(1, np.uint64)[0])
                drawn = draw(len(rows), self.augment, torch.Generator().manual_seed(state >> 1))
            mine = np.arange(self.rank, len(rows), self.world)
            parts = min(self.accumulation, max(1, len(rows) // self.world))
            micro = tuple(self._gather(rows, part, drawn) for part in np.array_split(mine, parts))
            if not len(mine):
                micro = (self._gather(rows, np.zeros(1, dtype=np.int64), drawn),)
                micro[0]["labels"].fill_(IGNORED)
            yield TrainStep(micro, len(rows), step)

    def _seed(self, *place: int) -> np.random.SeedSequence:
        return np.random.SeedSequence(self.seed, spawn_key=place)

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
