"""Instructions with answers: read, put into the prompt template, encoded with the prompt masked, and made batches.

The template is that of Stanford Alpaca (Taori et al. 2023, github.com/tatsu-lab/stanford_alpaca, train.py). Data that
brings prompt and completion are used as they are. A row of a batch is one example with padding, or several that are packed
without seeing one another.
"""

import hashlib
import sys
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from crossalign.config import InstructConfig, validate
from crossalign.core.errors import UserError
from crossalign.core.progress import followed
from crossalign.data.batches import IGNORED, Turn
from crossalign.data.records import Row, json_lines, json_list, open_table
from crossalign.data.sources import text_sources
from crossalign.data.text.tokenizer import ordinary_text
from crossalign.data.text.tokens import TextBatch

WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
SUFFIXES = (".json", ".jsonl", ".parquet")
FORMS: tuple[tuple[str, ...], ...] = (("instruction", "input", "output"), ("prompt", "completion"))
"""The fields of an example; the first and the last must be there."""
Side = Literal["right", "left"]
END = "<|endoftext|>"  # some sets spell out the end of the answer, which the tokenizer's own end token marks


@dataclass(frozen=True)
class Example:
    """What the model is given, and what it is to answer."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Encoded:
    """Examples as tokens: start token if the model has one, prompt, completion, end token."""

    tokens: np.ndarray
    """int32: all examples, one after the other."""
    bounds: np.ndarray
    """int64 (N + 1,): example i is ``tokens[bounds[i] : bounds[i + 1]]``."""
    prompts: np.ndarray
    """int64 (N,): tokens before the completion."""
    truncated: int = 0
    """Examples whose answer was cut at the block."""
    dropped: int = 0
    """Examples whose prompt left no room for an answer."""

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def lengths(self) -> np.ndarray:
        """int64 (N,): positions that an example takes, one fewer than its tokens, since the last is only predicted."""
        lengths: np.ndarray = np.diff(self.bounds) - 1
        return lengths

    @property
    def targets(self) -> np.ndarray:
        """int64 (N,): tokens to predict, at least one each; the first token of all has nothing before it."""
        targets: np.ndarray = np.diff(self.bounds) - np.maximum(self.prompts, 1)
        return targets


@dataclass(frozen=True)
class Instructions:
    """A set split two ways."""

    train: Encoded
    validation: Encoded
    empty: int
    """Examples without an answer, left out."""
    fingerprint: str
    """A hash of the tokens of both parts."""


def open_instructions(config: InstructConfig, tokenizer: Any) -> Instructions:
    """Read, split and encode a set.

    The split goes by a seeded hash of the prompt, so an instruction with several answers stays on one side. Prompts that
    share a long passage but differ in their question are different prompts.

    Raises:
        UserError: a source or setting that cannot be used, or a side without an example.
    """
    validate(config, "data.")
    examples, empty = read_examples(config.source)
    digests = (hashlib.sha256(f"{config.split_seed} {example.prompt}".encode()).digest() for example in examples)
    keys = np.array([int.from_bytes(digest[:7]) for digest in digests])
    order = np.unique(keys)
    if len(order) < 2:
        raise UserError(f"the instruction data has {len(order)} prompt with an answer; a split needs two or more")
    held_out = order[: min(max(1, round(len(order) * config.validation_fraction)), len(order) - 1)]
    is_validation = keys <= held_out[-1]
    train, validation = (
        encode_examples([e for e, chosen in zip(examples, mask, strict=True) if chosen], tokenizer, config.block)
        for mask in (~is_validation, is_validation)
    )
    digest = hashlib.sha256()
    for side in (train, validation):
        for array in (side.tokens, side.bounds, side.prompts):
            digest.update(array.tobytes())
    return Instructions(train, validation, empty, digest.hexdigest()[:20])


def read_examples(source: Sequence[str]) -> tuple[list[Example], int]:
    """All examples of the files with an answer, in order, and the number of those without.

    Raises:
        UserError: nothing there, a damaged file, or a row without the fields; it names the file, the row and the fields.
    """
    files, left_out = text_sources(source, "instruction", SUFFIXES)
    if left_out:
        print(f"left out, of other splits: {', '.join(left_out)}", file=sys.stderr)
    examples = [_example(record, where) for file in files for record, where, *_ in _rows(file)]
    answered = [example for example in examples if example.completion.strip()]
    if not answered:
        raise UserError(f"the instruction data has no example with an answer ({len(examples):,} are empty)")
    return answered, len(examples) - len(answered)


def _rows(source: Path | str) -> Iterator[Row]:
    if isinstance(source, Path) and source.suffix.lower() != ".parquet":
        return json_lines(source) if source.suffix.lower() == ".jsonl" else json_list(source)
    table = open_table(source)
    names = [name for name in _form(table.names) if name in table.names]
    return table.rows(names or None)  # of another form: all columns, which the error names


def _form(fields: Sequence[str]) -> tuple[str, ...]:
    """The form of an example that has these fields; empty where they are none's."""
    return next((names for names in FORMS if {names[0], names[-1]} <= set(fields)), ())


def _example(record: Any, where: str) -> Example:
    fields = list(record) if isinstance(record, dict) else []
    names = _form(fields)
    if not names:
        raise UserError(
            f"{where} has {', '.join(map(str, fields)) or 'no fields'}; it needs instruction and output, or prompt and "
            "completion: rename its fields"
        )
    values = []
    for name in names:
        value = record.get(name)
        if value is not None and not isinstance(value, str):
            raise UserError(f"{where}, '{name}', holds {type(value).__name__}, not text: mend or remove the row")
        text = value or ""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{where}, '{name}', is not valid Unicode (a lone surrogate): mend or remove the row") from error
        stripped = text.strip()
        if stripped.startswith(END) or stripped.endswith(END):
            text = stripped.removeprefix(END).removesuffix(END).strip()
        values.append(text)
    if len(values) == 2:
        return Example(*values)
    instruction, given, output = values
    template = WITH_INPUT if given.strip() else WITHOUT_INPUT
    return Example(template.format(instruction=instruction, input=given), output)


def encode_examples(examples: Sequence[Example], tokenizer: Any, block: int) -> Encoded:
    """Tokens of the examples, prompt and completion each encoded on its own, as when the model answers.

    Args:
        examples: to encode; special tokens that a text spells out are taken as text.
        tokenizer: of the fast kind, with an end token.
        block: positions at most, so block + 1 tokens; what is longer is cut on the right.

    Raises:
        UserError: no end token, or no example that leaves room for an answer.
    """
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no eos token to end an answer with; name a causal model's tokenizer")
    start = [tokenizer.bos_token_id] if tokenizer.bos_token_id in tokenizer("")["input_ids"][:1] else []
    prompts, answers = (_encode(texts, tokenizer) for texts in ([e.prompt for e in examples], [e.completion for e in examples]))
    rows: list[np.ndarray] = []
    before: list[int] = []
    truncated = dropped = 0
    both = zip(prompts, answers, strict=True)
    for prompt, answer in followed(both, len(examples), "tokenising instructions", "example"):
        tokens = [*start, *prompt, *answer, tokenizer.eos_token_id]
        given = len(start) + len(prompt)
        cut = tokens[: block + 1]
        if len(cut) <= max(given, 1):
            dropped += 1
            continue
        truncated += len(cut) < len(tokens)
        rows.append(np.array(cut, dtype=np.int32))
        before.append(given)
    if not rows:
        raise UserError(
            f"none of {len(examples):,} examples leaves room for an answer in a block of {block} tokens: raise the block"
        )
    bounds = np.cumsum([0, *map(len, rows)], dtype=np.int64)
    return Encoded(np.concatenate(rows), bounds, np.array(before, dtype=np.int64), truncated, dropped)


def _encode(texts: Sequence[str], tokenizer: Any) -> Iterator[list[int]]:
    """Tokens of each text; a thousand at a time, since what the tokenizer returns is many times their size."""
    for start in range(0, len(texts), 1000):
        with ordinary_text(tokenizer) as backend:
            encoded = backend.encode_batch_fast(texts[start : start + 1000], add_special_tokens=False)
        yield from (encoding.ids for encoding in encoded)


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
        return tuple(self.gather(turn.rows[places]) for places in turn.micro_batches), int(self._targets[turn.rows].sum())

    def gather(self, rows: np.ndarray) -> TextBatch:
        """Some rows, filled up."""
        batch = collate(self.examples, [self.rows[row] for row in rows], self.block, self.padding)
        if not self.block:  # one example a row: nothing to keep apart
            del batch["segment_ids"]
        return batch


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
        index = bisect_left(open_rows, (length, -1))
        if index < len(open_rows):
            room, row = open_rows.pop(index)
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
        start = 0 if padding == "right" else width - int(lengths[row].sum())
        for number, example in enumerate(row, start=1):
            tokens = examples.tokens[examples.bounds[example] : examples.bounds[example + 1]]
            both = torch.from_numpy(tokens.astype(np.int64))
            stop = start + len(both) - 1
            inputs[i, start:stop] = both[:-1]
            given = max(int(examples.prompts[example]), 1)
            targets[i, start + given - 1 : stop] = both[given:]
            positions[i, start:stop] = torch.arange(stop - start)
            segments[i, start:stop] = number
            start = stop
    return {
        "input_ids": inputs,
        "targets": targets,
        "attention_mask": (segments > 0).long(),
        "position_ids": positions,
        "segment_ids": segments,
    }
