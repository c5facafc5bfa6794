"""Token blocks: each token once an epoch, the same for any number of processes, from any step on; evaluation is exact."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from crossalign.core.errors import UserError
from crossalign.data.batches import IGNORED, Batches, Step
from crossalign.data.text.tokens import EvaluationBlocks, TextBatch, TokenFile, TokenRows


def numbered(count: int) -> np.ndarray:
    return np.arange(count, dtype=np.uint16)


def flat(steps: list[Step[TextBatch]], name: str = "targets") -> list[int]:
    return [t for step in steps for micro in step.micro_batches for t in micro[name].flatten().tolist()]  # type: ignore[literal-required]


@pytest.mark.parametrize("count,block,batch_size", [(1000, 16, 8), (1001, 7, 10), (65, 64, 1), (640, 64, 3)])
def test_an_epoch_predicts_each_token_once(count: int, block: int, batch_size: int) -> None:
    """Sampling with replacement, as nanoGPT does, would leave out 37 % of the tokens of an epoch."""
    batches = Batches(TokenRows(numbered(count), block), batch_size=batch_size, seed=0)
    for epoch in (0, 1, 5):
        steps = list(batches.epoch(epoch))
        assert len(steps) == len(batches) == -(-(count // block) // batch_size)
        for name in ("targets", "input_ids"):
            seen = flat(steps, name)
            assert len(seen) == len(set(seen)) == count // block * block
        assert all((micro["targets"] == (micro["input_ids"] + 1) % count).all() for s in steps for micro in s.micro_batches)
        assert sum(step.count for step in steps) == count // block * block
    assert steps[0].micro_batches[0]["input_ids"].dtype == torch.int64


def test_order_and_cuts_change_with_epoch_and_seed_and_repeat() -> None:
    def order(seed: int, epoch: int) -> tuple[int, ...]:
        return tuple(flat(list(Batches(TokenRows(numbered(500), 8), batch_size=4, seed=seed).epoch(epoch)), "input_ids"))

    cases = [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert len({order(*case) for case in cases}) == len(cases)
    assert order(0, 1) == order(0, 1)
    left_out = {next(iter(set(range(500)) - set(order(0, epoch)))) for epoch in range(8)}
    assert len(left_out) > 4  # not the same end of the text each time


@pytest.mark.parametrize("count", [500, 500 - 8 * 5])
@pytest.mark.parametrize("world,accumulation", [(2, 1), (2, 2), (3, 1)])
def test_any_number_of_processes_sees_the_same_tokens(count: int, world: int, accumulation: int) -> None:
    def batches(rank: int, world: int, accumulation: int) -> list[Step[TextBatch]]:
        made = Batches(TokenRows(numbered(count), 8), batch_size=6, seed=3, rank=rank, world=world, accumulation=accumulation)
        return list(made.epoch(2))

    alone, shared = batches(0, 1, 1), [batches(rank, world, accumulation) for rank in range(world)]
    for number, step in enumerate(alone):
        parts = [ranks[number] for ranks in shared]
        assert {part.count for part in parts} == {step.count}
        assert len({len(part.micro_batches) for part in parts}) == 1
        found = [t for t in flat(parts) if t != IGNORED]
        assert sorted(found) == sorted(flat([step])) and len(found) == step.count


def test_any_step_is_made_from_its_number() -> None:
    batches = Batches(TokenRows(numbered(1000), 8), batch_size=6, seed=1, accumulation=2)
    whole = [flat([step]) for epoch in range(3) for step in batches.epoch(epoch)]
    for first in (0, 7, len(batches), len(batches) + 5, 2 * len(batches) - 1):
        again = batches.steps(first)
        assert [flat([next(again)]) for _ in range(4)] == whole[first : first + 4]
    assert [step.step for step in batches.epoch(1, 4)] == list(range(4, len(batches)))


def test_a_corpus_smaller_than_a_block_is_refused() -> None:
    with pytest.raises(UserError, match="has 64 tokens, fewer than a block of 64 and the one after it"):
        Batches(TokenRows(numbered(64), 64), batch_size=1, seed=0)
    with pytest.raises(UserError, match="larger than the set of 15 blocks"):
        Batches(TokenRows(numbered(1000), 64), batch_size=16, seed=0)
    with pytest.raises(UserError, match="cannot be cut into 3 micro-batches for 2 processes"):
        Batches(TokenRows(numbered(1000), 64), batch_size=5, seed=0, accumulation=3, world=2)
    with pytest.raises(UserError, match="none can be predicted"):
        EvaluationBlocks(TokenFile(numbered(1), 1, 1), 8, 1)


@pytest.mark.parametrize("count", [2, 9, 64, 65, 66, 203])
@pytest.mark.parametrize("batch_size,world", [(1, 1), (4, 1), (4, 3), (64, 2), (1, 2)])
def test_evaluation_predicts_each_token_once(count: int, batch_size: int, world: int) -> None:
    stream = TokenFile(numbered(count), 1, 3 * count)
    ranks = [list(EvaluationBlocks(stream, 8, batch_size, rank, world)) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    found = []
    for batch in (batch for batches in ranks for batch in batches):
        valid = batch["targets"] != IGNORED
        assert batch["input_ids"].shape[1] == 8
        assert (batch["targets"][valid] == batch["input_ids"][valid] + 1).all()
        found += batch["targets"][valid].tolist()
    assert sorted(found) == list(range(1, count))
    blocks = EvaluationBlocks(stream, 8, batch_size)
    assert len(blocks) == len(list(blocks)) == len(list(blocks)) and blocks.tokens == count - 1


def test_perplexity_does_not_depend_on_the_batch() -> None:
    """A bigram table's loss, by hand and through blocks: with one token of context no block edge matters."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 16, 103).astype(np.uint16)
    table = torch.from_numpy(rng.normal(size=(16, 16)))
    loss = torch.nn.functional.cross_entropy
    ids = torch.from_numpy(tokens.astype(np.int64))
    expected = float(loss(table[ids[:-1]], ids[1:], reduction="sum"))
    for batch_size in (1, 3, 50):
        blocks = EvaluationBlocks(TokenFile(tokens, 1, 250), 8, batch_size)
        nats = sum(
            float(loss(table[b["input_ids"]].flatten(0, 1), b["targets"].flatten(), ignore_index=IGNORED, reduction="sum"))
            for b in blocks
        )
        metrics = blocks.metrics(nats)
        assert metrics["loss"] == pytest.approx(expected / 102)
        assert metrics["perplexity"] == pytest.approx(math.exp(expected / 102))
        assert metrics["bits_per_byte"] == pytest.approx(expected / math.log(2) / 250)
