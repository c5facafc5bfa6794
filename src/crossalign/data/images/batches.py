"""Batches of images, and their random changes in training: one draw an image, on the device that holds it (CMDA §3.1.1).

The order of changes is CMDA's: flip, crop out of a padded image, rotate. All three are one gather; the result equals
``torchvision.transforms.v2.functional`` applied image by image, bit for bit.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import NotRequired, TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from crossalign.config import AugmentConfig
from crossalign.data.batches import Turn
from crossalign.data.images.load import ImageSet

CPU = torch.device("cpu")
CHUNK_PIXELS = 1 << 18
"""Of one channel, that a processor moves together in augmentation."""


@dataclass(frozen=True)
class Draw:
    """One batch's random choices, on the CPU so that they do not depend on the device. B is the batch."""

    flip: Tensor
    """bool (B,): mirror left to right."""
    top: Tensor
    """int64 (B,): first row of the crop in the padded image, 0 to twice the padding."""
    left: Tensor
    """int64 (B,): first column of the crop in the padded image."""
    angle: Tensor
    """float64 (B,): degrees, counter-clockwise."""

    def rows(self, index: Tensor | slice) -> Draw:
        """The choices of some of the images: a process's share of a global batch."""
        return Draw(self.flip[index], self.top[index], self.left[index], self.angle[index])


def draw(batch: int, config: AugmentConfig, generator: torch.Generator) -> Draw:
    """Draw the changes of ``batch`` images with a CPU ``generator``; each image has its own.

    Every kind is drawn whether it is in use or not, so that turning one off leaves the others as they were.
    """
    flip = torch.rand(batch, generator=generator) < config.flip
    top, left = torch.randint(2 * config.crop_padding + 1, (2, batch), generator=generator)
    angle = torch.rand(batch, generator=generator, dtype=torch.float64).mul_(2).sub_(1).mul_(config.rotation_degrees)
    return Draw(flip, top, left, angle)


def augment(images_u8: Tensor, drawn: Draw | None, config: AugmentConfig) -> Tensor:
    """Flip, crop and rotate (nearest pixel) uint8 images (B, C, H, W), on any device, by what was drawn for each.

    What a crop or a rotation uncovers becomes ``config.fill``. Settings that change nothing, or no draws, return the
    images themselves.
    """
    turned, moved = config.rotation_degrees > 0, config.crop_padding > 0
    if drawn is None or not (turned or moved or config.flip > 0) or not len(images_u8):
        return images_u8
    # On a processor a few images at a time, so that what is computed of them stays in its cache.
    size = max(1, CHUNK_PIXELS // images_u8[0, 0].numel()) if images_u8.device.type == "cpu" else len(images_u8)
    moved_u8 = torch.empty_like(images_u8, memory_format=torch.contiguous_format)
    for start in range(0, len(images_u8), size):
        part = slice(start, start + size)
        _move(images_u8[part], drawn.rows(part), config, moved_u8[part])
    return moved_u8


def _move(images_u8: Tensor, drawn: Draw, config: AugmentConfig, moved_u8: Tensor) -> None:
    """The changes of :func:`augment` as one gather: where each pixel comes from is found once for all channels."""
    batch, channels, height, width = images_u8.shape
    device, border = images_u8.device, config.crop_padding + 1
    padded = F.pad(images_u8, (border,) * 4, value=config.fill)  # so its pixel 0 is always the border's
    wide = width + 2 * border
    rows = drawn.top.to(device, non_blocking=True).view(-1, 1) + torch.arange(1, height + 1, device=device)
    columns = drawn.left.to(device, non_blocking=True).view(-1, 1) + torch.arange(1, width + 1, device=device)
    columns = torch.where(drawn.flip.to(device, non_blocking=True).view(-1, 1), wide - 1 - columns, columns)
    turned, kind = config.rotation_degrees > 0, torch.int64
    if turned:  # the sampler takes fractions, in which whole numbers must stay exact
        kind = torch.float32 if padded[0, 0].numel() < 1 << 24 else torch.float64
    index = (rows * wide).to(kind).unsqueeze(2) + columns.to(kind).unsqueeze(1)
    if turned:
        places = _rotation_places(drawn.angle, height, width, device).to(kind)
        index = F.grid_sample(index.unsqueeze(1), places, mode="nearest", padding_mode="zeros", align_corners=False)
        index = index.long()  # 0, a pixel of the border, outside the picture
    torch.gather(
        padded.flatten(2), 2, index.view(batch, 1, -1).expand(-1, channels, -1), out=moved_u8.view(batch, channels, -1)
    )


def _rotation_places(angles: Tensor, height: int, width: int, device: torch.device) -> Tensor:
    """float32 (B, H, W, 2): where in the picture, on the sampler's scale of -1 to 1, each rotated pixel comes from.

    The same arithmetic as torchvision's, so that the rounding at pixel borders is the same too: a product of matrices,
    which a sum of a row and a column replaces where it gives the same bits, as it takes a tenth of the time.
    """
    turn = [math.radians(-angle) for angle in angles.tolist()]
    theta = torch.tensor([[[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]] for a in turn])
    theta = (theta / torch.tensor([0.5 * width, 0.5 * height])).to(device, non_blocking=True)
    if device.type == "cpu" and _sum_is_product(height, width):
        return _places_by_sum(theta, height, width)
    return _places_by_product(theta, height, width)


def _places_by_product(theta: Tensor, height: int, width: int) -> Tensor:
    columns, rows = _centred(width, theta.device), _centred(height, theta.device)
    grid = torch.ones(height, width, 3, device=theta.device)
    grid[..., 0], grid[..., 1] = columns, rows.view(-1, 1)
    return grid.view(1, -1, 3).expand(len(theta), -1, -1).bmm(F.pad(theta, (0, 0, 0, 1))).view(-1, height, width, 2)


def _places_by_sum(theta: Tensor, height: int, width: int) -> Tensor:
    """Both coordinates one after the other in memory, as the sampler reads them fastest."""
    by_column = theta[:, 0].view(-1, 2, 1, 1) * _centred(width, theta.device)
    by_row = theta[:, 1].view(-1, 2, 1, 1) * _centred(height, theta.device).view(-1, 1)
    return (by_column + by_row).permute(0, 2, 3, 1)


def _centred(side: int, device: torch.device) -> Tensor:
    return torch.linspace((1.0 - side) * 0.5, (side - 1.0) * 0.5, side, device=device)


@functools.lru_cache
def _sum_is_product(height: int, width: int) -> bool:
    """Whether this machine's product of matrices rounds each product before it adds; some processors do both in one step."""
    turned = torch.tensor([[[0.8, -0.6], [0.6, 0.8]], [[-0.28, 0.96], [-0.96, -0.28]]]) / torch.tensor(
        [0.5 * width, 0.5 * height]
    )
    return torch.equal(_places_by_sum(turned, height, width), _places_by_product(turned, height, width))


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
    device: torch.device = CPU
    """Where the batches go: to a GPU they are copied beside the step, from memory that it can read by itself."""
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
        images, labels = torch.from_numpy(self.images.pixels[rows]), self.images.labels[index]
        if self.device.type == "cuda" and torch.cuda.is_available():
            with torch.cuda.device(self.device):  # a thread begins with the first of all
                images = images.pin_memory()
        return {"images": images, "labels": labels, "index": index}
