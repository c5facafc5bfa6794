"""Batches of encoded examples: one a row with padding, or several packed into a row without seeing one another."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import torch

from crossalign.core.errors import UserError
from crossalign.data.batches import IGNORED, Turn, ignore, in_order
from crossalign.data.text.instructions import Encoded
from crossalign.data.text.tokens import TextBatch

Side = Literal["right", "left"]


class ExampleRows:
    """Examples as batches of training; a step's ``count`` is the answer tokens of all its rows.

    So each token weighs the same whatever the micro-batches and processes. Packed rows are put together once and shuffled
    every epoch, so an epoch always has as many steps; which examples share a row is not learned from, since they do not see
    one another.
    """

    def __init__(self, examples: Encoded, block: int = 0, padding: Side = "right") -> None:
        """
        Args:
            examples: what to go through.
            block: pack examples into rows of this many positions; 0 gives each example a row, as long as the longest
                of its micro-batch.
            padding: side to fill rows up on.

        Raises:
            UserError: a block shorter than an example.
        """
        self.examples, self.block, self.padding = examples, block, padding
        self.rows = pack(examples.lengths, block) if block else [np.array([i]) for i in range(len(examples))]
        self.title = ("packed blocks" if block else "training examples", "a sequence")
        self._targets = np.array([int(examples.targets[row].sum()) for row in self.rows])

    def __len__(self) -> int:
        return len(self.rows)

    def tensors(self, turn: Turn) -> tuple[tuple[TextBatch, ...], int]:
        """The rows of a turn, filled up."""
        micro_batches = tuple(
            collate(self.examples, [self.rows[row] for row in turn.rows[places]], self.block, self.padding)
            for places in turn.micro_batches
        )
        if not self.block:  # one example a row: nothing to keep apart
            for batch in micro_batches:
                del batch["segment_ids"]
        return micro_batches, int(self._targets[turn.rows].sum())


def evaluation_examples(
    examples: Encoded, batch_size: int, padding: Side = "right", rank: int = 0, world: int = 1
) -> Iterator[TextBatch]:
    """Each example exactly once over all processes, in order; divide the sum of losses by ``examples.targets.sum()``.

    Every process gets the same number of batches; where it has no row left it gets one without targets.
    """
    for rows, filler in in_order(len(examples), batch_size, rank, world):
        batch = collate(examples, list(rows[:, None]), 0, padding)
        del batch["segment_ids"]
        if filler:
            ignore(batch)
        yield batch


def pack(lengths: np.ndarray, block: int) -> list[np.ndarray]:
    """Which examples share a row of ``block`` positions: each, longest first, goes where it leaves the least room.

    Args:
        lengths: int (N,), positions of the examples.
        block: positions of a row.

    Returns:
        Places of the examples by row, each example once; the same for the same lengths.

    Raises:
        UserError: an example longer than the block.
    """
    if lengths.max() > block:
        raise UserError(f"an example of {lengths.max()} positions does not fit into blocks of {block}; encode with that block")
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # (room, row), sorted
    for example in np.argsort(-lengths, kind="stable"):
        length = int(lengths[example])
        place = bisect_left(open_rows, (length, -1))
        if place < len(open_rows):
            room, row = open_rows.pop(place)
        else:
            room, row = block, len(rows)
            rows.append([])
        rows[row].append(int(example))
        if room > length:
            insort(open_rows, (room - length, row))
    return [np.array(row) for row in rows]


def collate(examples: Encoded, rows: Sequence[np.ndarray], width: int = 0, padding: Side = "right") -> TextBatch:
    """Rows of examples as tensors (b, width); width 0 takes that of the longest row.

    A position's target is the token after it in the same example, if that is part of the answer: no target crosses from one
    example to the next. Positions restart in each example. Padding holds token 0, which nothing sees and nothing predicts.
    """
    lengths = examples.lengths
    width = width or max(int(lengths[row].sum()) for row in rows)
    inputs, positions, segments = (torch.zeros(len(rows), width, dtype=torch.int64) for _ in range(3))
    targets = torch.full_like(inputs, IGNORED)
    for i, row in enumerate(rows):
        place = 0 if padding == "right" else width - int(lengths[row].sum())
        for number, example in enumerate(row, start=1):
            tokens = examples.tokens[examples.bounds[example] : examples.bounds[example + 1]]
            both = torch.from_numpy(tokens.astype(np.int64))
            stop = place + len(both) - 1
            inputs[i, place:stop] = both[:-1]
            given = max(int(examples.prompts[example]), 1)
            targets[i, place + given - 1 : stop] = both[given:]
            positions[i, place:stop] = torch.arange(stop - place)
            segments[i, place:stop] = number
            place = stop
    return {
        "input_ids": inputs,
        "targets": targets,
        "attention_mask": (segments > 0).long(),
        "position_ids": positions,
        "segment_ids": segments,
    }
