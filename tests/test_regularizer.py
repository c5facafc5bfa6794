"""The regulariser: the reference gradient, its pairs, its state, and what it refuses."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from torch import Tensor

from crossalign.alignment import cka, get_similarity, mutual_knn, participation_ratio, soft_mutual_knn, svcca
from crossalign.cli import leave_group
from crossalign.core.errors import UserError
from crossalign.data.pairs.batches import PairBatches
from crossalign.features.regularizer import AlignmentRegularizer

WORDS = ["red", "dog", "runs", "on", "the", "wet", "green", "grass", "two", "birds"]
N, B, Q = 40, 16, 12


class Tokenizer:
    """Words to numbers, as a tokenizer of transformers is called."""

    pad_token_id, eos_token_id = None, 0

    def __call__(self, texts: list[str], *, truncation: bool, max_length: int, add_special_tokens: bool) -> dict[str, Any]:
        assert truncation and add_special_tokens
        return {"input_ids": [[1 + WORDS.index(word) for word in text.split()][:max_length] for text in texts]}


def texts(random: torch.Generator) -> list[list[str]]:
    """Two captions of 1 to 9 words for each image."""

    def one() -> str:
        length = int(torch.randint(1, 10, (), generator=random))
        return " ".join(WORDS[int(i)] for i in torch.randint(0, len(WORDS), (length,), generator=random))

    return [[one(), one()] for _ in range(N)]


def make_pairs(**changes: Any) -> PairBatches:
    random = torch.Generator().manual_seed(5)
    features = torch.randn(N, Q, generator=random)
    settings: dict[str, Any] = {"batch_size": B, "max_length": 6, **changes}
    return PairBatches(texts(random), settings.pop("features", features), Tokenizer(), **settings)


def make_model() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=17, n_embd=16, n_layer=3, n_head=2, n_positions=16, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    return GPT2LMHeadModel(config)


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def reference(model: Any, pairs: PairBatches, number: int) -> tuple[Tensor, dict[str, Tensor]]:
    """λ (1 - CKA) by transformers' own hidden states and a masked mean by hand."""
    batch = pairs.batch(number)
    out = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True)
    mask = batch.attention_mask[..., None].float()
    student = (out.hidden_states[2] * mask).sum(1) / mask.sum(1)
    loss = 10.0 * (1 - cka(student, batch.features, kernel="rbf"))
    model.zero_grad()
    loss.backward()
    return loss.detach(), gradients(model)


def test_value_and_gradient_are_those_of_the_equation() -> None:
    model, pairs = make_model(), make_pairs()
    regularizer = AlignmentRegularizer(pairs=pairs)
    for step in (0, 20, 60):
        expected, expected_gradients = reference(model, pairs, step // 20)
        assert regularizer.due(step)
        model.zero_grad()
        loss = regularizer.loss(model)
        loss.backward()
        torch.testing.assert_close(loss.detach(), expected)
        found = gradients(model)
        assert found.keys() == expected_gradients.keys() and "transformer.h.1.attn.c_attn.weight" in found
        for name, gradient in expected_gradients.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)
        assert "transformer.h.2.attn.c_attn.weight" not in found, "the layer above the tap has no part in it"
        assert float(regularizer.numbers["score"]) == pytest.approx(1 - float(expected) / 10, abs=1e-5)
        assert float(regularizer.numbers["null_score"]) != pytest.approx(float(regularizer.numbers["score"]))


def test_due_every_so_many_steps_and_never_at_weight_zero() -> None:
    pairs = make_pairs()
    regularizer = AlignmentRegularizer(every=3, pairs=pairs)
    assert [step for step in range(8) if regularizer.due(step)] == [0, 3, 6]
    assert not any(AlignmentRegularizer(weight=0.0, pairs=pairs).due(step) for step in range(50))


def test_a_score_between_moves_nothing_on() -> None:
    model, regularizer = make_model(), AlignmentRegularizer("cka-linear-debiased", every=4, pairs=make_pairs(), queue=8)
    assert regularizer.comparable and not AlignmentRegularizer("cka-linear", pairs=make_pairs()).comparable
    values = []
    for step in (4, 5, 7, 8):
        regularizer.due(step)
        values.append(float(regularizer.score(model)))
    # Of the pairs that come next: the model was just pulled at those of step 4.
    assert values[0] != values[1] == values[2] == values[3] and not regularizer.state_dict()["queue"]
    assert not any(p.grad is not None for p in model.parameters())


def test_an_epoch_goes_through_the_pairs_once_and_the_number_decides() -> None:
    pairs = make_pairs(features=lambda rows: torch.stack([rows.float(), rows.float() ** 2], 1))
    assert len(pairs) == N // B == 2
    epochs = [torch.cat([pairs.batch(2 * e + i).features[:, 0] for i in range(2)]).int().tolist() for e in range(3)]
    assert all(len(set(epoch)) == 2 * B for epoch in epochs) and epochs[0] != epochs[1] != epochs[2]
    again = make_pairs(features=pairs.features)
    assert torch.equal(again.batch(5).input_ids, pairs.batch(5).input_ids)
    assert make_pairs(seed=1).batch(0).input_ids.tolist() != pairs.batch(0).input_ids.tolist()


@pytest.mark.parametrize("world", [2, 3])
def test_the_shares_of_the_processes_are_the_batch(world: int) -> None:
    pairs = make_pairs()
    whole = pairs.batch(3)
    shares = [pairs.batch(3, rank=rank, world=world) for rank in range(world)]
    assert torch.equal(torch.cat([share.features for share in shares]), whole.features)
    assert sum(int(share.attention_mask.sum()) for share in shares) == int(whole.attention_mask.sum())


def test_three_set_ups() -> None:
    index = torch.arange(N).float()[:, None]
    pairs = make_pairs(features=index)
    paired = torch.cat([pairs.batch(i).features for i in range(2)]).flatten()
    unpaired = torch.cat([pairs.batch(i, mode="unpaired").features for i in range(2)]).flatten()
    assert not (paired == unpaired).any() and len(set(unpaired.tolist())) == 2 * B
    later = dict(zip(paired.tolist(), unpaired.tolist(), strict=True))
    for number in (2, 3):
        a, b = (pairs.batch(number, mode=mode).features.flatten().tolist() for mode in ("paired", "unpaired"))  # type: ignore[arg-type]
        assert all(later.get(x, y) == y for x, y in zip(a, b, strict=True)), "a text keeps its wrong image"
    assert torch.equal(pairs.batch(0, mode="mean").features, torch.full((B, 1), (N - 1) / 2))


def test_the_mean_wants_a_score_that_does_not_centre() -> None:
    with pytest.raises(UserError, match=r"cka-rbf centres its features.*use kernel-alignment"):
        AlignmentRegularizer(pairs=make_pairs(), mode="mean")
    model, regularizer = make_model(), AlignmentRegularizer("kernel-alignment", pairs=make_pairs(), mode="mean")
    regularizer.due(0)
    regularizer.loss(model).backward()
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


def test_the_queue_adds_rows_without_gradient_and_is_saved() -> None:
    model, pairs = make_model(), make_pairs()
    regularizer = AlignmentRegularizer("cka-linear", every=1, pairs=pairs, queue=24)
    plain = AlignmentRegularizer("cka-linear", every=1, pairs=pairs)
    for step in (0, 1):
        regularizer.due(step)
        regularizer.loss(model)
    plain.due(1)
    batches = [pairs.batch(number) for number in (1, 0)]
    students = [plain.taps(model, b.input_ids, b.attention_mask) for b in batches]
    x = torch.cat([students[0], students[1].detach()])
    expected = cka(x, torch.cat([b.features for b in batches])).detach()
    assert float(regularizer.numbers["score"]) == pytest.approx(float(expected), abs=1e-5)

    fresh = AlignmentRegularizer("cka-linear", every=1, pairs=make_pairs(), queue=24)
    fresh.load_state_dict(regularizer.state_dict())
    for one in (regularizer, fresh):
        one.due(2)
    assert torch.equal(regularizer.loss(model), fresh.loss(model))
    assert len(fresh.state_dict()["queue"][0]) == 24
    with pytest.raises(UserError, match="other pairs or other teacher features"):
        AlignmentRegularizer(pairs=make_pairs(features=torch.randn(N, Q))).load_state_dict(regularizer.state_dict())


@pytest.mark.parametrize("metric", ["cka-linear", "cka-linear-debiased"])
def test_what_is_logged_and_the_gradient_with_a_queue_are_those_of_the_rows_together(metric: str) -> None:
    model, pairs = make_model(), make_pairs()
    regularizer = AlignmentRegularizer(metric, every=1, pairs=pairs, queue=24)
    students = [regularizer.taps(model, pairs.batch(i).input_ids, pairs.batch(i).attention_mask) for i in (1, 0)]
    x = torch.cat([students[0], students[1].detach()])
    y = torch.cat([pairs.batch(i).features for i in (1, 0)])
    score = get_similarity(metric)
    (10.0 * (1 - score(x, y))).backward()
    expected = gradients(model)
    model.zero_grad()
    for step in (0, 1):
        regularizer.due(step)
        loss = regularizer.loss(model)
    assert not any(tensor.requires_grad for tensor in regularizer.state_dict()["queue"])
    loss.backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-6)
    numbers = regularizer.numbers
    assert float(numbers["comparable"]) == (metric == "cka-linear-debiased")
    torch.testing.assert_close(numbers["directions"], participation_ratio(x.detach()))
    torch.testing.assert_close(numbers["null_score"], score(x.detach(), y.roll(1, 0)))
    assert numbers.keys() == {"score", "comparable", "directions", "null_score"}


@pytest.mark.parametrize("penalty", ["l1", "l2", "koleo"])
def test_penalties_look_at_the_student_alone(penalty: str) -> None:
    model, regularizer = make_model(), AlignmentRegularizer(penalty, weight=2.0, pairs=make_pairs())
    regularizer.due(0)
    loss = regularizer.loss(model)
    assert float(loss) == pytest.approx(2 * float(regularizer.numbers["score"])) and "null_score" not in regularizer.numbers
    loss.backward()
    assert gradients(model)


def test_what_cannot_be_is_refused() -> None:
    pairs = make_pairs()
    for settings, says in (
        ({"metric": "cka-rfb"}, "did you mean 'cka-rbf'"),
        ({"metric": "mutual-knn"}, "soft-mutual-knn is its differentiable form"),
        ({"metric": "cka"}, "did you mean 'cka-rbf' or 'cka-linear'"),
        ({"metric": mutual_knn}, "mutual_knn has no gradient and cannot be a loss; soft-mutual-knn is"),
        ({"metric": partial(mutual_knn, k=3)}, "mutual_knn has no gradient"),
        ({"metric": svcca, "mode": "mean"}, r"svcca centres its features.*use kernel-alignment"),
        ({"metric": partial(cka, kernel="rbf"), "mode": "mean"}, "cka centres its features"),
        ({"metric": get_similarity("cka-linear"), "mode": "mean"}, "cka centres its features"),
        ({"metric": "soft-mutual-knn", "mode": "mean"}, "soft-mutual-knn asks which rows are nearest.*use kernel-alignment"),
        ({"metric": soft_mutual_knn, "mode": "mean"}, "soft_mutual_knn asks which rows are nearest"),
        ({"every": 0}, "must be at least 1"),
        ({"every": 2.5}, "the interval of the regulariser is 2.5 steps; it must be at least 1, a whole number"),
        ({"weight": float("nan")}, "the weight of the regulariser is nan; it must be a number from 0 up"),
        ({"weight": float("inf")}, "the weight of the regulariser is inf"),
        ({"weight": -1.0}, "the weight of the regulariser is -1.0"),
        ({"weight": "10"}, "the weight of the regulariser is 10; it must be a number"),
        ({"queue": -4}, "the queue of the regulariser is -4 rows; it must be a whole number, 0 for none"),
        ({"queue": 2.5}, "the queue of the regulariser is 2.5 rows"),
        ({"mode": "pared"}, "did you mean 'paired'"),
    ):
        with pytest.raises(UserError, match=says):
            AlignmentRegularizer(pairs=pairs, **settings)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"both ranks together; take a larger batch of pairs.*'cka-linear-debiased'"):
        regularizer = AlignmentRegularizer("svcca", pairs=pairs)
        regularizer.due(0)
        regularizer.loss(make_model())
    with pytest.raises(ValueError, match="at least 12 rows; got 8: take a batch size of 12 or more"):
        AlignmentRegularizer("soft-mutual-knn", pairs=make_pairs(batch_size=8)).loss(make_model())
    with pytest.raises(UserError, match=r"empty texts at the pairs 1 \(1 in all\)"):
        PairBatches(["red dog", " "], torch.zeros(2, 3), Tokenizer(), batch_size=2)
    with pytest.raises(UserError, match="a batch of 64 pairs from 40"):
        make_pairs(batch_size=64)
    with pytest.raises(UserError, match="40 texts and the features of 3 images"):
        make_pairs(features=torch.zeros(3, 2))
    with pytest.raises(UserError, match=r"features of shape \(40,\): one row an image is wanted"):
        make_pairs(features=torch.zeros(N))
    broken = torch.randn(N, Q)
    broken[7, 2], broken[9, 0] = torch.nan, torch.inf
    with pytest.raises(UserError, match=r"features that are no finite numbers, first of image 7 \(2 in all\)"):
        make_pairs(features=broken)


def test_features_may_be_a_numpy_array() -> None:
    features = torch.randn(N, Q, dtype=torch.float64)
    given, same = (make_pairs(features=one) for one in (features.numpy(), features))
    assert torch.equal(given.batch(1).features, same.batch(1).features)
    assert given.fingerprint == same.fingerprint
    assert AlignmentRegularizer(pairs=given).loss(make_model()).isfinite()


def test_a_function_of_ones_own_is_taken_if_its_score_has_a_gradient() -> None:
    model, pairs = make_model(), make_pairs()

    def count(x: Tensor, y: Tensor) -> Tensor:
        return (x[:, 0] > y[:, 0]).float().mean()

    for metric in (count, partial(count), lambda x, y: cka(x.detach(), y)):
        regularizer = AlignmentRegularizer(metric, pairs=pairs)
        for call in (regularizer.loss, regularizer.try_out):
            with pytest.raises(UserError, match=r"(count|lambda>) gives a score without gradient and cannot be a loss"):
                call(model)
        assert regularizer.score(model).isfinite()
    for metric, given in (
        (lambda x, y: 0.5, "a float"),
        (lambda x, y: x.sum(0), "a tensor of shape"),
        (lambda x, y: x.sum()[None], r"a tensor of shape \(1,\)"),
    ):
        with pytest.raises(UserError, match=rf"<lambda> gives {given}.*; a score is a tensor with one number"):
            AlignmentRegularizer(metric, pairs=pairs).loss(model)
    taken = AlignmentRegularizer(partial(cka, debiased=True), pairs=pairs)
    assert taken.name == "cka" and taken.loss(model).requires_grad
    assert AlignmentRegularizer(get_similarity("cka-linear-debiased"), pairs=pairs).comparable
    with torch.no_grad():
        assert not taken.loss(model).requires_grad


def _process(rank: int, folder: str, port: int) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    model = make_model()
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    regularizer = AlignmentRegularizer(pairs=make_pairs())
    regularizer.due(20)
    ids = torch.arange(8).view(1, 8)
    # The two ways that the docstring names: in one backward pass with the last micro-batch, and before it, unsynchronised.
    (wrapped(input_ids=ids, labels=ids).loss + regularizer.loss(wrapped)).backward()
    torch.save(gradients(model), Path(folder) / f"added-{rank}.pt")
    model.zero_grad()
    with wrapped.no_sync():
        regularizer.loss(wrapped).backward()
    wrapped(input_ids=ids, labels=ids).loss.backward()
    torch.save(gradients(model), Path(folder) / f"before-{rank}.pt")
    torch.save(_resumed_with_a_queue(wrapped), Path(folder) / f"queue-{rank}.pt")
    leave_group(0)


def _resumed_with_a_queue(model: Any) -> dict[str, Tensor]:
    """The gradient of the third of three steps, the second epoch's first, for which the queue was loaded."""
    first, second = (AlignmentRegularizer("cka-linear", every=1, pairs=make_pairs(), queue=24) for _ in range(2))
    for step in (0, 1):
        first.due(step)
        first.loss(model)
    second.load_state_dict(first.state_dict())
    second.due(2)
    model.zero_grad()
    with model.no_sync() if hasattr(model, "no_sync") else nullcontext():
        second.loss(model).backward()
    found = gradients(getattr(model, "module", model))
    if torch.distributed.is_initialized():
        for gradient in found.values():
            torch.distributed.all_reduce(gradient)
            gradient /= 2
    return found


def test_two_processes_give_the_gradient_of_one(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    torch.multiprocessing.spawn(_process, (str(tmp_path), port), nprocs=2)
    model, regularizer = make_model(), AlignmentRegularizer(pairs=make_pairs())
    regularizer.due(20)
    ids = torch.arange(8).view(1, 8)
    (model(input_ids=ids, labels=ids).loss + regularizer.loss(model)).backward()
    both = gradients(model)
    with_queue = _resumed_with_a_queue(model)
    for way, expected in {"added": both, "before": both, "queue": with_queue}.items():
        for rank in (0, 1):
            found = torch.load(tmp_path / f"{way}-{rank}.pt", weights_only=True)
            assert found.keys() == expected.keys()
            for name, gradient in expected.items():
                torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_example_of_the_docstring_has_the_weight_it_says(accumulation: int) -> None:
    model, pairs = make_model(), make_pairs()
    regularizer: Callable[..., Any] = AlignmentRegularizer
    one = regularizer(pairs=pairs)
    _, expected = reference(model, pairs, 0)
    ids = torch.randint(0, 17, (8, 6))
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    text = gradients(model)
    model.zero_grad()
    parts = ids.chunk(accumulation)
    for i, part in enumerate(parts):
        loss = model(input_ids=part, labels=part).loss / accumulation
        if i == accumulation - 1 and one.due(0):
            loss = loss + one.loss(model)
        loss.backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, text[name] + expected.get(name, 0), rtol=1e-3, atol=1e-5)


def test_between_due_steps_the_queue_does_not_hold_the_same_pairs() -> None:
    model = make_model()
    regularizer = AlignmentRegularizer("cka-linear-debiased", every=4, pairs=make_pairs(batch_size=8), queue=24)
    for step in (0, 4):
        assert regularizer.due(step)
        regularizer.loss(model)
    regularizer.due(7)
    ahead = float(regularizer.score(model))
    regularizer.due(8)
    regularizer.loss(model)
    due = float(regularizer.numbers["score"])
    assert ahead == pytest.approx(due, abs=1e-6)  # the model has not moved
    # The batch of step 8 with the 16 older rows, though the queue holds it by now.
    student, teacher = regularizer._features(model, 2)
    kept = regularizer.state_dict()["queue"]
    assert torch.equal(kept[1][:8], teacher)
    expected = cka(torch.cat([student, kept[0][8:]]), torch.cat([teacher, kept[1][8:]]), debiased=True)
    assert float(regularizer.score(model)) == pytest.approx(float(expected), abs=1e-6)
    assert float(expected) == pytest.approx(due, abs=1e-5)


def test_across_epochs_no_pair_is_scored_twice_and_a_resumed_queue_is_the_same() -> None:
    """Each epoch has an order of its own: the last batches of one and the first of the next share pairs."""
    model, pairs = make_model(), make_pairs(batch_size=8)
    features: Any = pairs.features
    seen: list[tuple[Tensor, Tensor]] = []

    def watched(student: Tensor, teacher: Tensor) -> Tensor:
        seen.append((student.detach(), teacher))
        return cka(student, teacher)

    def make() -> AlignmentRegularizer:
        return AlignmentRegularizer(watched, every=1, pairs=make_pairs(batch_size=8), queue=24)

    regularizer = make()
    sizes = []
    for step in range(3 * len(pairs)):
        regularizer.due(step)
        loss = regularizer.loss(model)
        loss.backward()
        student, teacher = seen[-2]  # the last call is that of the pairs exchanged
        assert len(teacher.unique(dim=0)) == len(teacher) == len(student)
        assert torch.equal(teacher[:8], pairs.batch(step).features)
        kept = regularizer.state_dict()["queue"]
        assert len(kept[0]) == min(8 * (step + 1), 24) and torch.equal(features[kept[2]], kept[1])
        assert not any(tensor.requires_grad for tensor in kept)
        regularizer.score(model)
        assert len(seen[-1][1]) == len(seen[-1][1].unique(dim=0))
        sizes.append(len(teacher))
        if step == len(pairs):  # amid the pairs that come again
            resumed = make()
            resumed.load_state_dict({**regularizer.state_dict(), "queue": [tensor.clone() for tensor in kept]})
        elif step > len(pairs):
            resumed.due(step)
            assert torch.equal(resumed.loss(model), loss)
    assert sizes[3:5] == [32, 32] and min(sizes[5:]) < 32, "after the first epoch some are left out"


def test_unrelated_features_score_as_without_a_queue() -> None:
    """A pair that stood in the batch and in the queue too would be alike on both sides."""
    pairs: Any = make_pairs(batch_size=16)
    noise = torch.randn(N, 6, generator=torch.Generator().manual_seed(1))
    unrelated = [noise[pairs.rows(step)] for step in range(100)]
    regularizer: Any = AlignmentRegularizer("cka-linear-debiased", every=1, pairs=pairs, queue=24)
    regularizer.taps = lambda model, ids, mask: unrelated.pop(0)
    scores = []
    for step in range(100):
        regularizer.due(step)
        regularizer.loss(torch.nn.Linear(1, 1))
        scores.append(float(regularizer.numbers["score"]))
    expected = float(cka(noise, pairs.features, debiased=True))
    assert sum(scores) / len(scores) == pytest.approx(expected, abs=0.01)


def test_a_queue_that_would_hold_pairs_twice_is_refused() -> None:
    with pytest.raises(UserError, match="holds some of the 40 pairs twice"):
        AlignmentRegularizer(pairs=make_pairs(batch_size=16), queue=25)
    assert AlignmentRegularizer("l2", pairs=make_pairs(batch_size=16), queue=24).queue == 0


def test_peft_models_are_tapped_inside_with_one_tokens_logits() -> None:
    from peft import LoraConfig, get_peft_model

    plain, pairs = make_model(), make_pairs()
    batch = pairs.batch(0)
    expected = AlignmentRegularizer(pairs=pairs).taps(plain, batch.input_ids, batch.attention_mask)
    peft = get_peft_model(plain, LoraConfig(target_modules=["attn.c_attn"]))
    seen = []
    plain.lm_head.register_forward_hook(lambda *args: seen.append(args[2].shape[1]))
    regularizer = AlignmentRegularizer(pairs=pairs)
    assert regularizer.due(0)
    regularizer.loss(peft).backward()
    assert seen == [1]
    assert any(p.grad is not None and p.grad.any() for name, p in peft.named_parameters() if "lora_B" in name)
    torch.testing.assert_close(regularizer.taps(peft, batch.input_ids, batch.attention_mask), expected)


def test_a_loop_that_knows_itself_when_the_term_is_due_gets_the_next_pairs() -> None:
    model, pairs = make_model(), make_pairs()
    regularizer = AlignmentRegularizer(pairs=pairs)
    seen = []
    for step in range(61):
        if step % 20 == 0:
            seen.append(float(regularizer.loss(model).detach()))
    expected = [float(reference(model, pairs, number)[0]) for number in range(4)]
    assert seen == pytest.approx(expected, rel=1e-5) and len(set(seen)) == 4


def test_a_counter_that_starts_anew_gets_the_next_pairs_also_when_resumed() -> None:
    """Two due steps an epoch; and the checkpoint of a loop amid an epoch."""
    model, pairs = make_model(), make_pairs()

    def run(regularizer: AlignmentRegularizer, epochs: Any) -> list[float]:
        return [float(regularizer.loss(model).detach()) for steps in epochs for step in steps if regularizer.due(step)]

    def make() -> AlignmentRegularizer:
        return AlignmentRegularizer("cka-linear", every=3, pairs=pairs)

    whole = run(make(), [range(5)] * 3)
    assert len(set(whole)) == 6 and whole == run(make(), [range(0, 18)])
    for epoch, step in ((1, 0), (1, 2), (0, 4)):
        first, second = make(), make()
        before = run(first, [range(5)] * epoch + [range(step)])
        second.load_state_dict(first.state_dict())
        assert before + run(second, [range(step, 5)] + [range(5)] * (2 - epoch)) == whole


def test_texts_that_the_model_cannot_take_are_refused_at_the_door() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

    class Numbers(Tokenizer):
        def __call__(self, texts: list[str], *, max_length: int, **_: Any) -> dict[str, Any]:
            return {"input_ids": [[int(number) for number in text.split()][:max_length] for text in texts]}

    def loss(model: Any, texts: list[str]) -> Tensor:
        pairs = PairBatches(texts * 4, torch.randn(4 * len(texts), 3), Numbers(), batch_size=8)
        return AlignmentRegularizer("cka-linear", pairs=pairs).loss(model)

    small = {"vocab_size": 17, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=17, n_embd=16, n_layer=2, n_head=2, n_positions=6))
    opt = OPTForCausalLM(OPTConfig(**small, ffn_dim=8, max_position_embeddings=6, word_embed_proj_dim=16))
    llama = LlamaForCausalLM(LlamaConfig(**small, intermediate_size=8, max_position_embeddings=6))
    for model in (gpt2, opt, llama, torch.nn.parallel.DataParallel(gpt2).module):
        with pytest.raises(ValueError, match=r"the token 17, but the model's table has 17 rows: .*own tokenizer, or resize"):
            loss(model, ["1 2 3", "4 17"])
        assert loss(model, ["1 2 3 4 5 6", "4 16"]).isfinite()
    for model in (gpt2, opt):
        with pytest.raises(ValueError, match="a text has 7 tokens, but the model takes 6: give PairBatches max_length=6"):
            loss(model, ["1 2 3 4 5 6 7", "4 16"])
    assert loss(llama, ["1 2 3 4 5 6 7", "4 16"]).isfinite(), "rotary positions go on"


ROW = torch.randn(N, Q)
WRONG_PAIRS: list[tuple[dict[str, Any], str]] = [
    ({"features": torch.zeros(N, 0)}, "features of shape"),
    ({"features": torch.zeros(N, Q).long()}, "must be floats .*; got torch.int64 values"),
    ({"features": torch.zeros(N, Q).long().numpy()}, "must be floats .*; got int64 values"),
    ({"features": ROW.tolist()}, "must be floats .*; got a list"),
    ({"features": None}, "must be floats .*; got a NoneType"),
    ({"batch_size": 1}, "batch_size must be a whole number, at least 2; got 1"),
    ({"batch_size": 8.0}, "batch_size must be a whole number"),
    ({"seed": -1}, "seed must be a whole number, at least 0"),
    ({"max_length": 0}, "max_length must be a whole number, at least 1"),
    ({"tokenizer": None}, "tokenizer must be a tokenizer of transformers"),
    ({"texts": "a text"}, "texts must be a list"),
    ({"texts": 5}, "texts must be a list"),
    ({"texts": [1] * N}, "texts must be strings"),
    ({"texts": [None] * N}, "texts must be strings"),
]


@pytest.mark.parametrize("changes,message", WRONG_PAIRS)
def test_pairs_that_cannot_be_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    given = {"texts": ["red dog"] * N, "features": ROW, "tokenizer": Tokenizer(), "batch_size": B, **changes}
    with pytest.raises(ValueError, match=message):
        PairBatches(given.pop("texts"), given.pop("features"), given.pop("tokenizer"), **given)


@pytest.mark.parametrize(
    "settings,message",
    [
        ({"metric": 5}, "unknown metric 5: give its name"),
        ({"metric": None}, "unknown metric None"),
        ({"mode": 5}, "unknown set-up of pairs 5"),
        ({"pairs": None}, "pairs must be PairBatches.*got a NoneType"),
        ({"pairs": [("a", [1.0])]}, "pairs must be PairBatches"),
        ({"layers": 2.5}, "layers must be"),
        ({"layers": []}, "no layer to tap"),
        ({"pool": 5}, "unknown pooling"),
        ({"every": 0}, "interval"),
        ({"weight": -1}, "weight"),
        ({"queue": -1}, "queue"),
        ({"bandwidth": 0.0}, "bandwidth must be a finite number above 0; got 0.0"),
        ({"bandwith": 2.0}, "bandwith"),
        ({"metric": "soft-mutual-knn", "k": 1.5}, "k must be a whole number"),
        ({"metric": "soft-mutual-knn", "k": 16}, "16 nearest neighbours need at least 18 rows"),
        ({"metric": "svcca", "variance": 2}, "variance is a part"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AlignmentRegularizer(**{"pairs": make_pairs(), **settings})
