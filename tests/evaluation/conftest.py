"""A tiny causal model with a tokenizer, and a folder of benchmark data with a few rows a task."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TEXT = "the cat sat on a mat because it was warm and the dog ran home after rain fell over every green hill"
WORDS = TEXT.split()


def sentence(i: int, length: int = 7) -> str:
    return " ".join(WORDS[(i * 5 + j * j + j) % len(WORDS)] for j in range(length))


def _arc(i: int) -> dict[str, Any]:
    return {"question": f"{sentence(i)}?", "choices": [sentence(i + j, 2 + j) for j in range(3 + i % 2)], "answer": i % 3}


def _copa(i: int) -> dict[str, Any]:
    two = {"choice1": f"The {sentence(i, 3)}.", "choice2": f"A {sentence(i + 1, 4)}."}
    return {"id": i, "premise": f"My {sentence(i)}.", **two, "question": ("cause", "effect")[i % 2], "label": i % 2}


def _swag(i: int) -> dict[str, Any]:
    return {"startphrase": sentence(i), **{f"ending{j}": sentence(i + j, 3 + j) for j in range(4)}, "label": i % 4}


def _commonsense(i: int) -> dict[str, Any]:
    choices = {"label": list("ABCDE"), "text": [sentence(i + j, 1) for j in range(5)]}
    return {"question": f"{sentence(i)}? ", "choices": choices, "answerKey": "ABCDE"[i % 5]}


def _hellaswag(i: int) -> dict[str, Any]:
    return {
        "activity_label": "Home [title] work",
        "ctx_a": f"{sentence(i)}.",
        "ctx_b": "" if i % 2 else sentence(i, 2),
        "endings": [f"{sentence(i + j, 3 + j)} [step] now." for j in range(4)],
        "label": i % 4,
    }


FILES: dict[str, Callable[[int], dict[str, Any]]] = {
    "arc_easy_test": _arc,
    "arc_easy_train": lambda i: _arc(i + 50),
    "arc_challenge_test": lambda i: _arc(i + 20),
    "arc_challenge_train": lambda i: _arc(i + 70),
    "copa_dev_balanced": lambda i: {**_copa(i), "mirrored": i % 4 == 3},
    "copa_train": lambda i: _copa(i + 40),
    "lambada_openai_test": lambda i: {"text": f"{sentence(i, 12)}"},
    "swag_val": _swag,
    "swag_train": lambda i: _swag(i + 30),
    "commonsenseqa_dev": _commonsense,
    "commonsenseqa_train": lambda i: _commonsense(i + 60),
    "hellaswag_validation": _hellaswag,
    "hellaswag_train": lambda i: _hellaswag(i + 80),
}
WIKITEXT = "\n".join(
    [
        "",
        " = First = ",
        "",
        " The cat @-@ dog , was <unk> . ",
        " = = Part = = ",
        " It was 1 @,@ 000 . ",
        "",
        " = Second = ",
        " Rain fell . ",
        "",
    ]
)


@pytest.fixture(scope="session")
def evals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 24 rows of every task, and a WikiText of two articles."""
    folder = tmp_path_factory.mktemp("evals")
    for name, row in FILES.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row(i)) + "\n" for i in range(24)))
    (folder / "wikitext2_test.txt").write_text(WIKITEXT)
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a GPT-2 of two layers that sees 256 tokens, and its tokenizer."""
    from crossalign.config import GPTConfig
    from crossalign.data.text.tokenizer import separator, train_tokenizer
    from crossalign.models.language.causal import new_gpt2, save_causal

    folder = tmp_path_factory.mktemp("tiny-gpt2") / "model"
    tokenizer = train_tokenizer([sentence(i, 20) for i in range(40)], 300)
    size = GPTConfig(layers=2, heads=2, width=32)
    model = new_gpt2(size, vocabulary=len(tokenizer), block=256, separator=separator(tokenizer), seed=3)
    model.get_input_embeddings().weight.data.mul_(20)  # so that its answers differ
    save_causal(model, None, tokenizer, folder)
    return folder
