"""Which items make up which step on which process, from numbers alone, and the steps as tensors.

The order of an epoch depends on (seed, epoch) alone, so that any step can be made without those before it, and its items are
the same for any number of processes and micro-batches. What is gathered lies in memory or in a memory map, so that a thread
is enough to make the next batch beside the step.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from crossalign.core.errors import UserError

IGNORED = -100
"""A label that torch's cross-entropy passes over: no loss, no gradient, and never a correct answer."""

T = TypeVar("T")
B = TypeVar("B")
"""A batch: a dictionary of tensors."""
B_co = TypeVar("B_co", covariant=True)


class Order:
    """Which of numbered items are in which step, epoch after epoch without replacement."""

    def __init__(self, items: int, batch_size: int, shuffle: Callable[[int], np.ndarray], *, whole: bool = False) -> None:
        """
        Args:
            items: how many there are.
            batch_size: items a step.
            shuffle: gives the order of an epoch, int64 (items,), from its number alone.
            whole: leave out of an epoch what is too little for a step; else its last step holds what is left.
        """
        self.items, self.batch_size, self.whole = items, batch_size, whole
        self._shuffled = lru_cache(maxsize=2)(shuffle)

    def __len__(self) -> int:
        """Steps an epoch."""
        return self.items // self.batch_size if self.whole else -(-self.items // self.batch_size)

    def rows(self, number: int) -> np.ndarray:
        """int64 (b,): the items of a step, counted over all epochs."""
        epoch, step = divmod(number, len(self))
        return self._shuffled(epoch)[step * self.batch_size : (step + 1) * self.batch_size]


@dataclass(frozen=True)
class Turn:
    """The items of one step, and this process's share."""

    seed: int
    epoch: int
    step: int
    """Place in the epoch, from 0."""
    rows: np.ndarray
    """int64 (b,): items of the whole step."""
    micro_batches: tuple[np.ndarray, ...]
    """Places in ``rows`` of this process's share, by micro-batch."""

    def sequence(self, *position: int) -> np.random.SeedSequence:
        """What seeds random choices of the epoch at ``position``."""
        return np.random.SeedSequence(self.seed, spawn_key=(self.epoch, *position))


@dataclass(frozen=True)
class Step(Generic[B]):
    """One optimiser step, as one process sees it."""

    micro_batches: Sequence[B]
    """This process's rows."""
    count: int
    """What the sum of losses is divided by: images, or tokens to predict, in the whole step over all processes."""
    step: int = 0
    """Place in the epoch, from 0."""


class Rows(Protocol[B_co]):
    """Numbered items of one kind, and how they become tensors."""

    @property
    def title(self) -> tuple[str, str]:
        """The items and one of them, in words."""
        ...

    def __len__(self) -> int: ...

    def tensors(self, turn: Turn) -> tuple[tuple[B_co, ...], int]:
        """The micro-batches of a turn, and the count of the whole step."""
        ...


class Batches(Generic[B]):
    """Epochs over ``rows`` without replacement, in steps of ``batch_size`` that any number of processes share.

    A process takes ``rank::world`` of a step; the last step of an epoch holds what is left. Every process gets the same
    number of micro-batches, so that their collective calls match; the last step may have fewer than the others. Where it has
    fewer items than there are processes, those without one get the first item with its labels ``IGNORED``, since many models
    cannot take a batch of none.
    """

    def __init__(
        self, rows: Rows[B], *, batch_size: int, seed: int, accumulation: int = 1, rank: int = 0, world: int = 1
    ) -> None:
        """
        Args:
            rows: what to go through.
            batch_size: items a step, over all processes and micro-batches.
            seed: not negative.
            accumulation: micro-batches a step.
            rank: this process.
            world: number of processes.

        Raises:
            UserError: a batch larger than the set, or too small to be shared out; a negative seed.
        """
        items, each = rows.title
        if batch_size > len(rows):
            raise UserError(f"a batch of {batch_size} is larger than the set of {len(rows):,} {items}; lower it")
        if not 1 <= accumulation * world <= batch_size:
            raise UserError(
                f"a batch of {batch_size} cannot be cut into {accumulation} micro-batches for {world} processes; each needs "
                f"{each}"
            )
        if seed < 0:
            raise UserError(f"seed is {seed}; it must not be negative")
        self.rows, self.seed = rows, seed
        self.accumulation, self.rank, self.world = accumulation, rank, world
        self.order = Order(len(rows), batch_size, self._shuffle)

    def __len__(self) -> int:
        """Steps an epoch."""
        return len(self.order)

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Step[B]]:
        """The steps of ``epoch`` from step ``first`` on."""
        return map(self.step, range(epoch * len(self) + first, (epoch + 1) * len(self)))

    def steps(self, first: int = 0) -> Iterator[Step[B]]:
        """Steps without end from the ``first`` of all on, epoch after epoch, for a run counted in steps."""
        return map(self.step, count(first))

    def step(self, number: int) -> Step[B]:
        """One step, counted over all epochs."""
        rows = self.order.rows(number)
        share = np.arange(self.rank, len(rows), self.world)
        parts = min(self.accumulation, max(1, len(rows) // self.world))
        places = tuple(np.array_split(share, parts)) if len(share) else (np.zeros(1, dtype=np.int64),)
        epoch, step = divmod(number, len(self))
        micro_batches, counted = self.rows.tensors(Turn(self.seed, epoch, step, rows, places))
        if not len(share):
            ignore(micro_batches[0])
        return Step(micro_batches, counted, step)

    def _shuffle(self, epoch: int) -> np.ndarray:
        sequence = np.random.SeedSequence(self.seed, spawn_key=(epoch,))
        return np.random.Generator(np.random.PCG64(sequence)).permutation(len(self.rows))


class InOrder(Generic[B]):
    """Every item exactly once over all processes, in order, for evaluation. Go through it as often as needed.

    Every process gets the same number of batches, so that their collective calls match: one that has no item left gets the
    first of the batch, and nothing of it is counted.
    """

    def __init__(self, items: int, gather: Callable[[np.ndarray], B], batch_size: int, rank: int = 0, world: int = 1) -> None:
        """
        Args:
            items: how many there are.
            gather: makes a batch of the items at int64 (b,).
            batch_size: items a batch, over all processes; at least one for each is taken.
            rank: this process.
            world: number of processes.
        """
        self.items, self.gather = items, gather
        self.batch_size = max(batch_size, world)
        self.rank, self.world = rank, world

    def __len__(self) -> int:
        """Batches, the same number on each process."""
        return -(-self.items // self.batch_size)

    def __iter__(self) -> Iterator[B]:
        for first in range(0, self.items, self.batch_size):
            rows = np.arange(first + self.rank, min(first + self.batch_size, self.items), self.world)
            if len(rows):
                yield self.gather(rows)
            else:
                filler = self.gather(np.array([first]))
                ignore(filler)
                yield filler


def ahead(batches: Iterable[T]) -> Iterator[T]:
    """The same batches, each made by a thread while the one before it is in use.

    An error in making one is raised in its place. Whoever goes on no further closes this or drops it: the thread then ends with
    the batch that it has begun.
    """
    source = iter(batches)
    with ThreadPoolExecutor(1, thread_name_prefix="next batch") as pool:
        coming = pool.submit(next, source, None)
        while (batch := coming.result()) is not None:
            coming = pool.submit(next, source, None)
            yield batch


def ignore(batch: Any) -> None:
    """Make a batch one that only fills a place: nothing in it is to be learned, counted or kept."""
    for name in ("labels", "targets"):
        if name in batch:
            batch[name].fill_(IGNORED)
    if "index" in batch:
        batch["index"] = batch["index"][:0]
