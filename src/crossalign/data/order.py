"""The order of an epoch and who gets what of a step, from numbers alone: the same for any number of processes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from crossalign.core.errors import UserError


@dataclass(frozen=True)
class Turn:
    """The items of one step."""

    step: int
    rows: np.ndarray
    """int64 (b,): items of the whole step."""
    micro_batches: tuple[np.ndarray, ...]
    """Places in ``rows`` of this process's share, by micro-batch."""
    filler: bool
    """Whether the share is empty, and the one item in it only fills a place."""


class Order:
    """Epochs over numbered items without replacement.

    The order depends on (seed, epoch) alone, so any step can be made without those before it; a process takes
    ``rank::world`` of a step; the last step of an epoch holds what is left. Every process gets the same number of
    micro-batches, so that their collective calls match; the last step may have fewer than the others.
    """

    def __init__(
        self, items: int, *, batch_size: int, seed: int, accumulation: int, rank: int, world: int, what: str, each: str
    ) -> None:
        """
        Raises:
            UserError: a batch larger than the set, or too small to be shared out; a negative seed.
        """
        if batch_size > items:
            raise UserError(f"a batch of {batch_size} is larger than the set of {items:,} {what}; lower it")
        if not 1 <= accumulation * world <= batch_size:
            raise UserError(
                f"a batch of {batch_size} cannot be cut into {accumulation} micro-batches for {world} processes; each needs "
                f"{each}"
            )
        if seed < 0:
            raise UserError(f"seed is {seed}; it must not be negative")
        self.items, self.batch_size, self.seed = items, batch_size, seed
        self.accumulation, self.rank, self.world = accumulation, rank, world

    def __len__(self) -> int:
        """Steps an epoch."""
        return -(-self.items // self.batch_size)

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Turn]:
        """The steps of ``epoch`` from step ``first`` on."""
        order = self.random(epoch).permutation(self.items)
        for step in range(first, len(self)):
            rows = order[step * self.batch_size : (step + 1) * self.batch_size]
            mine = np.arange(self.rank, len(rows), self.world)
            parts = min(self.accumulation, max(1, len(rows) // self.world))
            places = tuple(np.array_split(mine, parts)) if len(mine) else (np.zeros(1, dtype=np.int64),)
            yield Turn(step, rows, places, not len(mine))

    def random(self, *place: int) -> np.random.Generator:
        """A generator for one place: an epoch, or an epoch and one more number."""
        return np.random.Generator(np.random.PCG64(self.sequence(*place)))

    def sequence(self, *place: int) -> np.random.SeedSequence:
        """What seeds :meth:`random`."""
        return np.random.SeedSequence(self.seed, spawn_key=place)
