"""Instructions: what is learned is the answer and nothing else, whatever the padding, packing and number of processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from crossalign.config import InstructConfig
from crossalign.core.errors import UserError
from crossalign.data.batches import IGNORED, Batches, InOrder, Step
from crossalign.data.text.instructions import (
    Encoded,
    Example,
    ExampleRows,
    collate,
    encode_examples,
    open_instructions,
    pack,
    read_examples,
)
from crossalign.data.text.tokenizer import train_tokenizer
from crossalign.data.text.tokens import TextBatch, block_diagonal_mask


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Each byte is a token of its own: 'a' is 1 + its place in the alphabet of bytes, END is 0."""
    return train_tokenizer([""], 257)


def ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]  # type: ignore[no-any-return]


def encoded(*sizes: tuple[int, int]) -> Encoded:
    """Examples of (prompt, answer) tokens; token values spell example and place, from 1."""
    rows = [[100 * i + j for j in range(p + a)] for i, (p, a) in enumerate(sizes, start=1)]
    bounds = np.cumsum([0, *map(len, rows)])
    return Encoded(np.concatenate(rows).astype(np.int32), bounds, np.array([p for p, _ in sizes]))


def many(count: int, seed: int = 0) -> Encoded:
    rng = np.random.default_rng(seed)
    return encoded(*zip(rng.integers(1, 12, count).tolist(), rng.integers(1, 9, count).tolist(), strict=True))


def test_alpaca_rows_take_the_published_template(tmp_path: Path) -> None:
    rows = [
        {"instruction": "Add.", "input": "1 {2}", "output": "3"},
        {"instruction": "Say hi.", "input": "", "output": "hi<|endoftext|>"},
        {"instruction": "Empty.", "input": None, "output": " <|endoftext|>"},
        {"instruction": "No input key.", "output": "ok\n"},
    ]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    examples, empty = read_examples([str(tmp_path / "a.json")])
    assert empty == 1
    assert examples[0] == Example(
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a response "
        "that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 {2}\n\n### Response:",
        "3",
    )
    assert examples[1] == Example(
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSay hi.\n\n### Response:",
        "hi",
    )
    assert examples[2].completion == "ok\n"
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert read_examples([str(tmp_path / "a.jsonl")]) == (examples, 1)
    pq.write_table(
        pa.Table.from_pylist([{"prompt": e.prompt, "completion": e.completion} for e in examples]), tmp_path / "p.parquet"
    )
    assert read_examples([str(tmp_path / "p.parquet")]) == (examples, 0)


def test_files_in_folders_below_are_read_whatever_the_letters_of_their_suffix(tmp_path: Path) -> None:
    for number, name in enumerate(
        ["a.json", "deep/er/b.JSON", "deep/c.Jsonl", "deep/.d.json", "__MACOSX/e.json", "deep/f.txt"]
    ):
        row = json.dumps({"instruction": f"{number}", "output": "yes"})
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(row if name.endswith("l") else f"[{row}]")
    found, _ = read_examples([str(tmp_path)])
    assert len(found) == 3 and [example.prompt.split("\n")[-3] for example in found] == ["0", "2", "1"]
    assert len(read_examples([str(tmp_path / "deep" / "er" / "b.JSON")])[0]) == 1
    (tmp_path / "deep" / "g.json").symlink_to("/nowhere")
    with pytest.raises(UserError, match=r"cannot read '.*g.json' \(a link that leads nowhere\): mend or remove it"):
        read_examples([str(tmp_path)])


def test_masks_by_hand(tokenizer: Any) -> None:
    found = encode_examples([Example("Q: ", "yes"), Example("", "no"), Example("Q", "<|endoftext|>")], tokenizer, 64)
    batch = collate(found, [np.array([0]), np.array([1])])
    end = tokenizer.eos_token_id
    prompt, answer, lone = ids(tokenizer, "Q: "), ids(tokenizer, "yes"), ids(tokenizer, "no")
    assert batch["input_ids"].tolist() == [[*prompt, *answer], [*lone, 0, 0, 0, 0]]
    assert batch["targets"].tolist() == [
        [IGNORED, IGNORED, *answer, end],
        [lone[1], end, IGNORED, IGNORED, IGNORED, IGNORED],  # nothing stands before the first token of all
    ]
    assert batch["attention_mask"].tolist() == [[1] * 6, [1, 1, 0, 0, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5], [0, 1, 0, 0, 0, 0]]
    assert found.targets.tolist() == [4, 2, 14]  # an end that a text spells out is text
    left = collate(found, [np.array([0]), np.array([1])], padding="left")
    assert left["targets"][1].tolist() == [IGNORED] * 4 + [lone[1], end]
    assert left["attention_mask"][1].tolist() == [0] * 4 + [1, 1]
    assert left["position_ids"][1].tolist() == [0] * 4 + [0, 1]
    both = collate(found, [np.array([0, 1])], 10)
    assert both["input_ids"].tolist() == [[*prompt, *answer, *lone, 0, 0]]
    assert both["targets"].tolist() == [[IGNORED, IGNORED, *answer, end, lone[1], end, IGNORED, IGNORED]]
    assert both["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 0, 1, 0, 0]]
    assert both["segment_ids"].tolist() == [[1] * 6 + [2, 2, 0, 0]]


def test_a_tokenizer_with_a_start_token_begins_each_example_with_it(shared_data: Path) -> None:
    from crossalign.data.text.tokenizer import open_tokenizer

    opened = open_tokenizer(str(shared_data / "models/stories260K"))
    found = encode_examples([Example("Once", "upon")], opened, 64)
    prompt, answer = (opened(text, add_special_tokens=False)["input_ids"] for text in ("Once", "upon"))
    assert found.tokens.tolist() == [opened.bos_token_id, *prompt, *answer, opened.eos_token_id]
    assert found.prompts.tolist() == [1 + len(prompt)]


@pytest.mark.parametrize("block,kept,truncated,dropped", [(9, 3, 0, 0), (8, 3, 1, 0), (5, 2, 1, 1), (3, 2, 2, 1), (2, 1, 1, 2)])
def test_no_example_is_left_without_a_target(tokenizer: Any, block: int, kept: int, truncated: int, dropped: int) -> None:
    examples = [Example("abcdef", "ghi"), Example("ab", "c"), Example("abc", "")]  # 10, 4 and 4 tokens with the end
    found = encode_examples(examples, tokenizer, block)
    assert len(found) + found.dropped == 3 and found.dropped == dropped and len(found) == kept
    assert found.targets.min() >= 1 and found.lengths.max() <= block
    batch = collate(found, [np.array([i]) for i in range(len(found))])
    assert ((batch["targets"] != IGNORED).sum(1) == torch.from_numpy(found.targets)).all()
    with pytest.raises(UserError, match="none of 1 examples leaves room for an answer in a block of 5 tokens"):
        encode_examples(examples[:1], tokenizer, 5)


def answers(steps: list[Step[TextBatch]]) -> list[int]:
    return [t for s in steps for b in s.micro_batches for t in b["targets"].flatten().tolist() if t != IGNORED]


@pytest.mark.parametrize("block", [0, 24])
def test_an_epoch_holds_each_answer_once_and_counts_its_tokens(block: int) -> None:
    examples = many(53)
    expected = sorted(
        int(t) for i in range(53) for t in examples.tokens[examples.bounds[i] + examples.prompts[i] : examples.bounds[i + 1]]
    )
    batches = Batches(ExampleRows(examples, block), batch_size=8, seed=0)
    orders = set()
    for epoch in (0, 1, 7):
        steps = list(batches.epoch(epoch))
        assert len(steps) == len(batches)
        assert sorted(answers(steps)) == expected
        assert [step.count for step in steps] == [len(answers([step])) for step in steps]
        orders.add(tuple(answers(steps)))
        assert answers(list(batches.epoch(epoch, 2))) == answers(steps[2:])
    assert len(orders) == 3
    whole = [answers([step]) for epoch in range(2) for step in batches.epoch(epoch)]
    again = batches.steps(len(batches) - 1)
    assert [answers([next(again)]) for _ in range(2)] == whole[len(batches) - 1 : len(batches) + 1]


@pytest.mark.parametrize("block", [0, 24])
@pytest.mark.parametrize("world,accumulation", [(2, 1), (2, 2), (3, 1)])
def test_any_number_of_processes_sees_the_same_answers(block: int, world: int, accumulation: int) -> None:
    examples = many(49)

    def epoch(rank: int, world: int, accumulation: int) -> list[Step[TextBatch]]:
        made = Batches(ExampleRows(examples, block), batch_size=6, seed=1, rank=rank, world=world, accumulation=accumulation)
        return list(made.epoch(1))

    shared = [epoch(rank, world, accumulation) for rank in range(world)]
    for number, step in enumerate(epoch(0, 1, 1)):
        parts = [ranks[number] for ranks in shared]
        assert {part.count for part in parts} == {step.count}
        assert len({len(part.micro_batches) for part in parts}) == 1
        assert sorted(answers(parts)) == sorted(answers([step]))


@pytest.mark.parametrize("world", [1, 3])
def test_evaluation_holds_each_answer_once(world: int) -> None:
    examples = many(10)
    ranks = [list(InOrder(10, ExampleRows(examples).gather, 4, rank, world)) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    found = [t for batches in ranks for b in batches for t in b["targets"].flatten().tolist() if t != IGNORED]
    assert len(found) == len(set(found)) == examples.targets.sum()


def test_packing_fills_rows_and_loses_nothing() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, 2000)
    rows = pack(lengths, 128)
    assert sorted(np.concatenate(rows).tolist()) == list(range(2000))
    assert max(lengths[row].sum() for row in rows) <= 128
    assert lengths.sum() / (128 * len(rows)) > 0.97
    with pytest.raises(UserError, match="does not fit into blocks of 64"):
        pack(lengths, 64)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("form", ["packed", "left", "right"])
def test_an_example_never_sees_another_nor_the_padding(family: str, form: str) -> None:
    """Logits of each example in its row are those of the example alone."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes: dict[str, dict[str, int]] = {
        "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
        "llama": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    }
    config = AutoConfig.for_model(family, vocab_size=1000, attn_implementation="sdpa", **sizes[family])
    model = AutoModelForCausalLM.from_config(config).eval()
    examples = encoded((3, 4), (1, 6), (5, 2))

    def logits(batch: TextBatch, mask: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=batch["input_ids"], attention_mask=mask, position_ids=batch["position_ids"]).logits  # type: ignore[no-any-return]

    rows = [np.array([0, 1, 2])] if form == "packed" else [np.array([0]), np.array([1]), np.array([2])]
    batch = collate(examples, rows, 20 if form == "packed" else 9, "left" if form == "left" else "right")
    mask = block_diagonal_mask(batch["segment_ids"]) if form == "packed" else batch["attention_mask"]
    found = logits(batch, mask)
    for example in range(3):
        alone = collate(examples, [np.array([example])])
        expected = logits(alone, torch.ones_like(alone["input_ids"]))[0]
        row, segment = (0, example + 1) if form == "packed" else (example, 1)
        place = batch["segment_ids"][row] == segment
        assert torch.allclose(found[row][place], expected, atol=1e-5)
        assert torch.equal(batch["targets"][row][place], alone["targets"][0])


def test_real_sets(shared_data: Path, tmp_path: Path, tokenizer: Any) -> None:
    config = InstructConfig(source=(str(shared_data / "instruct" / "alpaca_en_demo_999.json"),), block=1024)
    found = open_instructions(config, tokenizer)
    assert len(found.train) + len(found.validation) + found.train.dropped + found.validation.dropped + found.empty == 999
    assert 80 < len(found.validation) < 120 and found.train.truncated > 0
    assert open_instructions(config, tokenizer).fingerprint == found.fingerprint
    config.split_seed = 1
    assert open_instructions(config, tokenizer).fingerprint != found.fingerprint
    table = pq.read_table(shared_data / "instruct" / "t0_train_55k.parquet")
    pq.write_table(table.slice(0, 4000), tmp_path / "t0.parquet")
    examples, empty = read_examples([str(tmp_path / "t0.parquet")])
    assert len(examples) + empty == 4000
    assert not any("<|endoftext|>" in example.completion for example in examples)


def test_prompts_do_not_straddle_the_split(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"prompt": f"q{i % 10}", "completion": f"a{i}"} for i in range(100)]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = open_instructions(InstructConfig(source=(str(tmp_path),), validation_fraction=0.3), tokenizer)
    assert (len(found.train), len(found.validation)) == (70, 30)
    prompts = [{tuple(side.tokens[b : b + 2].tolist()) for b in side.bounds[:-1]} for side in (found.train, found.validation)]
    assert not prompts[0] & prompts[1]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.json", '[{"instruction": "x", "answer": "y"}]', "a.json entry 0 has instruction, answer; it needs instruction and"),
        ("a.json", '{"instruction": "x"}', "a.json holds dict; it should be a list"),
        ("a.json", '{"a": 1}\n{"a": 2}', "a.json is not valid JSON"),
        ("a.json", '[{"prompt": "x", "completion": 3}]', "a.json entry 0, 'completion', holds int"),
        ("a.json", '[{"prompt": "x", "completion": " "}]', "no example with an answer .1 are empty"),
        ("a.jsonl", '{"prompt": "x", "completion": "y"}\n[]', "a.jsonl line 2 holds list"),
        ("a.jsonl", '{"prompt": "\\ud800", "completion": "y"}', "a.jsonl line 1, 'prompt', is not valid Unicode"),
        ("a.jsonl", '{"prompt": "x", "completion": "y"}', "has 1 prompt with an answer; a split needs two"),
        ("a.txt", "x", "is no .json, .jsonl, .parquet"),
        ("a.parquet", "x", "cannot read parquet file a.parquet"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path: Path, tokenizer: Any, name: str, content: str, says: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=says):
        open_instructions(InstructConfig(source=(str(tmp_path / name),)), tokenizer)


def test_a_table_of_another_form_is_told_by_all_its_columns(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": [1], "instruction": ["x"], "response": ["y"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet row 0 has id, instruction, response; it needs instruction and output"):
        read_examples([str(tmp_path / "a.parquet")])


def test_settings_without_a_meaning_are_refused(tmp_path: Path, tokenizer: Any) -> None:
    for settings, says in (
        ({"source": ()}, "has no source"),
        ({"source": ("/nowhere",)}, "does not exist"),
        ({"source": ("",)}, "instruction source '' does not exist"),
    ):
        with pytest.raises(UserError, match=says):
            open_instructions(InstructConfig(**settings), tokenizer)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="must lie between 0 and 1"):
        open_instructions(InstructConfig(validation_fraction=0), tokenizer)
    with pytest.raises(UserError, match="larger than the set of 3 training examples"):
        Batches(ExampleRows(encoded((1, 1), (1, 1), (1, 1))), batch_size=4, seed=0)
