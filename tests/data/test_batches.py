"""Batches: each image once an epoch, the same for any number of processes, and from any step on."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from crossalign.config import AugmentConfig
from crossalign.core.errors import UserError
from crossalign.data.batches import IGNORED, Batches, InOrder, ahead
from crossalign.data.images.batches import ImageBatch, ImageRows, augment
from crossalign.data.images.load import ImageSet
from crossalign.verbs.adapt.scoring import score

AUGMENT = AugmentConfig(crop_padding=2)


def numbered(count: int) -> ImageSet:
    """Images whose first two pixels spell their place in the set."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, 3, 8, 8), dtype=np.uint8)
    pixels[:, 0, 0, 0], pixels[:, 0, 0, 1] = np.arange(count) // 256, np.arange(count) % 256
    return ImageSet(pixels, torch.arange(count) % 7, tuple("abcdefg"))


def places(batch: ImageBatch) -> list[int]:
    images = batch["images"].long()
    return (images[:, 0, 0, 0] * 256 + images[:, 0, 0, 1]).tolist()


def seen(batch: ImageBatch) -> dict[int, torch.Tensor]:
    """Place in the set → the image as the model would see it."""
    changed = augment(batch["images"], batch["draw"], AUGMENT)
    return {
        place: image for place, image, label in zip(places(batch), changed, batch["labels"], strict=True) if label != IGNORED
    }


@pytest.mark.parametrize("count,batch_size", [(100, 10), (103, 10), (64, 64), (7, 2)])
def test_an_epoch_holds_each_image_once_with_its_label(count: int, batch_size: int) -> None:
    batches = Batches(ImageRows(numbered(count)), batch_size=batch_size, seed=0)
    steps = list(batches.epoch(0))
    assert len(steps) == len(batches) == -(-count // batch_size)
    assert [step.count for step in steps] == [batch_size] * (count // batch_size) + [count % batch_size] * (
        count % batch_size > 0
    )
    found = [place for step in steps for micro in step.micro_batches for place in places(micro)]
    labels = torch.cat([micro["labels"] for step in steps for micro in step.micro_batches])
    assert sorted(found) == list(range(count))
    assert labels.tolist() == [place % 7 for place in found]
    assert steps[0].micro_batches[0]["draw"] is None
    assert steps[0].micro_batches[0]["images"].dtype == torch.uint8


def test_order_and_draws_change_with_epoch_and_seed_and_repeat() -> None:
    images = numbered(60)

    def order(seed: int, epoch: int) -> list[int]:
        batches = Batches(ImageRows(images, AUGMENT), batch_size=16, seed=seed)
        return [place for step in batches.epoch(epoch) for micro in step.micro_batches for place in places(micro)]

    assert order(0, 0) == order(0, 0) != sorted(order(0, 0))
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1, 2)}) == 6

    def angles(seed: int, epoch: int, step: int) -> tuple[float, ...]:
        batches = Batches(ImageRows(images, AUGMENT), batch_size=16, seed=seed)
        drawn = next(batches.epoch(epoch, step)).micro_batches[0]["draw"]
        assert drawn is not None and len(drawn.angle.unique()) == len(drawn.angle) == (16 if step < 3 else 12)
        return tuple(drawn.angle.tolist())

    cases = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 1, 1)]
    assert len({angles(*case) for case in cases}) == len(cases)
    assert angles(0, 1, 1) == angles(0, 1, 1)


@pytest.mark.parametrize("count,batch_size", [(53, 12), (49, 12)])
@pytest.mark.parametrize("world,accumulation", [(1, 3), (2, 1), (2, 3), (4, 2)])
def test_any_number_of_processes_and_micro_batches_sees_the_same_images(
    count: int, batch_size: int, world: int, accumulation: int
) -> None:
    """Bit for bit, augmentation included; 49 = 4 x 12 + 1 leaves a last batch smaller than the number of processes."""
    images = numbered(count)

    def make(accumulation: int, rank: int, world: int) -> Batches[ImageBatch]:
        rows = ImageRows(images, AUGMENT)
        return Batches(rows, batch_size=batch_size, seed=3, accumulation=accumulation, rank=rank, world=world)

    alone = list(make(1, 0, 1).epoch(2))
    shares = [list(make(accumulation, rank, world).epoch(2)) for rank in range(world)]
    assert {len(share) for share in shares} == {len(alone)}
    for whole, *parts in zip(alone, *shares, strict=True):
        assert {part.count for part in parts} == {whole.count}
        assert len({len(part.micro_batches) for part in parts}) == 1
        together = [seen(micro) for part in parts for micro in part.micro_batches]
        merged = {place: image for share in together for place, image in share.items()}
        expected = seen(whole.micro_batches[0])
        assert sum(len(share) for share in together) == len(merged) == whole.count
        assert merged.keys() == expected.keys()
        assert all(torch.equal(merged[place], expected[place]) for place in expected)


def test_rows_are_dealt_out_in_turn() -> None:
    whole = next(Batches(ImageRows(numbered(40)), batch_size=10, seed=0).epoch(0)).micro_batches[0]
    share = next(Batches(ImageRows(numbered(40)), batch_size=10, seed=0, rank=1, world=3).epoch(0)).micro_batches[0]
    assert places(share) == places(whole)[1::3]


def test_a_process_without_an_image_gets_one_that_counts_nothing() -> None:
    step = list(Batches(ImageRows(numbered(9), AUGMENT), batch_size=4, seed=0, rank=3, world=4).epoch(0))[-1]
    (micro,) = step.micro_batches
    assert step.count == 1 and micro["labels"].tolist() == [IGNORED] and len(micro["images"]) == 1
    logits = torch.randn(1, 7, requires_grad=True)
    loss = torch.nn.functional.cross_entropy(logits, micro["labels"], reduction="sum")
    loss.backward()
    assert loss.item() == 0 and not logits.grad.any()  # type: ignore[union-attr]


def test_any_step_is_made_without_those_before_it() -> None:
    def make() -> Batches[ImageBatch]:
        return Batches(ImageRows(numbered(47), AUGMENT), batch_size=8, seed=1, accumulation=2)

    through = list(make().epoch(5))
    for first in range(len(through) + 1):
        resumed = list(make().epoch(5, first))
        assert [step.step for step in resumed] == list(range(first, len(through)))
        for a, b in zip(resumed, through[first:], strict=True):
            for x, y in zip(a.micro_batches, b.micro_batches, strict=True):
                assert torch.equal(x["labels"], y["labels"])
                assert seen(x).keys() == seen(y).keys()
                assert all(torch.equal(seen(x)[place], seen(y)[place]) for place in seen(x))


@pytest.mark.parametrize(
    "settings,words",
    [
        ({"batch_size": 11}, "a batch of 11 is larger than the set of 10"),
        ({"batch_size": 4, "accumulation": 3, "world": 2}, "cannot be cut"),
        ({"batch_size": 0}, "cannot be cut"),
        ({"batch_size": 4, "accumulation": 0}, "cannot be cut"),
        ({"batch_size": 4, "seed": -1}, "must not be negative"),
    ],
)
def test_batches_that_cannot_be_are_refused(settings: dict[str, int], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Batches(ImageRows(numbered(10)), **({"seed": 0} | settings))  # type: ignore[arg-type]


@pytest.mark.parametrize("count,batch_size,world", [(20, 6, 1), (20, 6, 2), (25, 6, 4), (25, 8, 3), (3, 100, 1), (9, 1, 2)])
def test_evaluation_sees_each_image_once_in_order(count: int, batch_size: int, world: int) -> None:
    images = numbered(count)
    shares = [list(InOrder(count, ImageRows(images).gather, batch_size, rank, world)) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1, "processes must make the same number of calls"
    index = torch.cat([batch["index"] for share in shares for batch in share])
    assert sorted(index.tolist()) == list(range(count))
    for share in shares:
        for batch in share:
            assert len(batch["images"]) > 0
            assert batch["index"].tolist() == sorted(batch["index"].tolist())
            if not len(batch["index"]):  # it only fills a place
                assert len(batch["images"]) == 1 and batch["labels"].tolist() == [IGNORED]
                continue
            assert torch.equal(batch["images"], torch.from_numpy(images.pixels[batch["index"].numpy()]))
            assert torch.equal(batch["labels"], images.labels[batch["index"]])


def test_scores_of_several_processes_add_up_to_those_of_one() -> None:
    """9 = 2 x 4 + 1: in the last batch two of three processes only fill a place, and answer nothing."""
    images, model = numbered(9), torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 7))
    cpu = SimpleNamespace(device=torch.device("cpu"), num_processes=1)

    def answers(rank: int, world: int) -> np.ndarray:
        batches = ({**b, "images": b["images"].float()} for b in InOrder(9, ImageRows(images).gather, 4, rank, world))
        scores = score(model, batches, images.labels, cpu)
        return np.stack([scores.predicted, scores.confidence, scores.losses.numpy()])

    np.testing.assert_allclose(sum(answers(rank, 3) for rank in range(3)), answers(0, 1), rtol=1e-5)


def test_the_next_batch_is_made_while_one_is_in_use() -> None:
    batches = Batches(ImageRows(numbered(60), AUGMENT), batch_size=8, seed=0)
    for first in (0, 3):
        found, expected = list(ahead(batches.epoch(1, first))), list(batches.epoch(1, first))
        assert [step.step for step in found] == [step.step for step in expected] == list(range(first, 8))
        for one, other in zip(found, expected, strict=True):
            assert seen(one.micro_batches[0]).keys() == seen(other.micro_batches[0]).keys()
            for place, image in seen(one.micro_batches[0]).items():
                assert torch.equal(image, seen(other.micro_batches[0])[place])
    begun = [threading.Event() for _ in range(3)]

    def numbers() -> Iterator[int]:
        for number, event in enumerate(begun):
            event.set()
            yield number

    for number in ahead(numbers()):
        assert all(event.wait(10) for event in begun[: number + 2])
        assert not any(event.is_set() for event in begun[number + 2 :])


def test_errors_come_in_their_place_and_no_thread_stays() -> None:
    def broken() -> Iterator[int]:
        yield 0
        yield 1
        raise UserError("the third cannot be made")

    before = threading.active_count()
    found = []
    with pytest.raises(UserError, match="the third"):
        for number in ahead(broken()):
            found.append(number)
    assert found == [0, 1] and threading.active_count() == before

    def stopped() -> None:
        for _ in ahead(iter(range(100))):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    given_up = ahead(iter(range(100)))
    next(given_up)
    given_up.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before
    assert list(ahead(())) == []
