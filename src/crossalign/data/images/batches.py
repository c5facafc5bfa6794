"""Batches of images, which are augmented for training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NotRequired, TypedDict

import numpy as np
import torch
from torch import Tensor

from crossalign.config import AugmentConfig
from crossalign.data.batches import Turn
from crossalign.data.images.augment import Draw, draw
from crossalign.data.images.load import ImageSet


class ImageBatch(TypedDict):
    """b images that go through the model together."""

    images: Tensor
    """uint8 (b, C, H, W)"""
    labels: Tensor
    """int64 (b,); ``IGNORED`` where the image only fills a place."""
    draw: NotRequired[Draw | None]
    """The augmentation of these rows in training, drawn but not applied."""
    index: NotRequired[Tensor]
    """int64 (b,): their places in the set, to put results back in order; (0,) where the images only fill a place."""


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

    def tensors(self, turn: Turn) -> tuple[tuple[ImageBatch, ...], int]:
        """Pixels and labels of a turn, with the augmentation drawn."""
        drawn = None
        if self.augment is not None:
            state = int(turn.sequence(turn.step).generate_state(1, np.uint64)[0])
            drawn = draw(len(turn.rows), self.augment, torch.Generator().manual_seed(state >> 1))
        micro_batches = tuple(self.gather(turn.rows[part]) for part in turn.micro_batches)
        for batch, part in zip(micro_batches, turn.micro_batches, strict=True):
            batch["draw"] = drawn.rows(torch.from_numpy(part)) if drawn else None
        return micro_batches, len(turn.rows)

    def gather(self, rows: np.ndarray) -> ImageBatch:
        """Pixels and labels of some images, as they are."""
        index = torch.from_numpy(rows)
        return {"images": torch.from_numpy(self.images.pixels[rows]), "labels": self.images.labels[index], "index": index}
