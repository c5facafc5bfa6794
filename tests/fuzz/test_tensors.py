"""Tensors of any shape, type and size, and what is none, given to every public function: the right value, or a sentence."""

from __future__ import annotations

import inspect
import math
import typing
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fuzzing import COUNTS, alarm, amounts, explore, refused
from hypothesis import strategies as st
from torch import Tensor

import crossalign
from crossalign import ImageClassifier, PairBatches, alignment
from crossalign.alignment import divergences, penalties, similarities

DTYPES = (torch.float32,) * 8 + (
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.uint8,
    torch.bool,
    torch.complex64,
)
SIZES = (0, 1, 2, 3, 5, 8, 12, 13, 40)
NUMBERS = (
    math.nan,
    math.inf,
    -math.inf,
    -1.0,
    0.0,
    1e-30,
    0.02,
    0.5,
    1.0,
    1,
    2,
    1e30,
    "2",
    None,
    True,
    (1.0, 2.0),
    [0.5],
    [],
    "median",
)
COUNTED = (-1, 0, 1, 2, 3, 10, 10**4, 1.5, math.nan, "2", None, True)
WORDS = ("", "linear", "rbf", "mean", "median", "mean_squared", "cosine", "euclidean", "x", "warn", "variance", 5, None, ["x"])


def signature(function: Callable[..., Any]) -> dict[str, Any]:
    """The arguments of a function with their types."""
    inner = function
    while isinstance(inner, partial):
        inner = inner.func
    try:
        hints = typing.get_type_hints(inner)
    except NameError:  # of a type that is imported for type checkers alone: no function of tensors alone
        hints = {}
    return {name: hints.get(name, Any) for name in inspect.signature(function).parameters}


def is_tensor(hint: Any) -> bool:
    return hint is Tensor or hint == Tensor | Iterable[Tensor]


def subjects() -> dict[str, Callable[..., Any]]:
    """Every measure by the name that it has in its registry, and every public function of tensors by its own."""
    found: dict[str, Callable[..., Any]] = {}
    for registry in (similarities, divergences, penalties):
        found |= {f"{name} ({registry.kind})": registry[name] for name in registry.names()}
    for module in (alignment, crossalign):
        for name in dir(module):
            function = getattr(module, name)
            if inspect.isfunction(function) and any(map(is_tensor, signature(function).values())):
                found[name] = function
    return found


SUBJECTS = subjects()


def bounds(name: str, function: Any) -> tuple[float, float]:
    """The range that a measure's documentation states, and that of all similarities."""
    inner, settings = (function.func, function.keywords) if isinstance(function, partial) else (function, {})
    text = " ".join((inner.__doc__ or "").split())
    if "0 to 1" in text and not settings.get("debiased") and "cka" not in name:
        return 0.0, 1.0
    if "similarity" in name:
        return (0.0 if "cka" in name and not settings.get("debiased") else -1.0), 1.0
    return (0.0, 2.0) if "from 0 (same direction) to 2" in text else (-math.inf, math.inf)


@st.composite
def tensors(draw: st.DrawFn, rows: int, labels: bool = False) -> Any:
    """A tensor, mostly of so many rows, or what is none."""
    ordinary = draw(st.integers(0, 3)) > 0
    shape = [rows, draw(st.sampled_from(SIZES))]
    if not ordinary:
        shape = draw(st.lists(st.sampled_from(SIZES), max_size=4) | st.just([2, rows, 3]) | st.just([1, rows, 3]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    if labels:
        values = torch.randint(-2, draw(st.sampled_from([0, 3, 300])), shape[:1] if ordinary else shape, generator=generator)
        return values if ordinary else draw(st.sampled_from([values, values.float(), values.tolist(), values.numpy(), None]))
    dtype = torch.float32 if draw(st.booleans()) else draw(st.sampled_from(DTYPES))
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    if draw(st.integers(0, 2)) == 0:
        values = values * 10.0 ** draw(st.integers(-45, 38)) + 10.0 ** draw(st.integers(-45, 38)) * draw(
            st.sampled_from([0, 1])
        )
    values = damaged(draw, values)
    values = values.to(dtype)
    kind = draw(st.integers(0, 12))
    if kind == 0:
        return draw(
            st.sampled_from([values.tolist(), values.numpy(force=True) if dtype != torch.bfloat16 else 1, None, "x", [values]])
        )
    if kind == 1 and values.ndim > 1:
        values = values.mT.contiguous().mT
    if kind == 2 and values.ndim:
        values = values.repeat_interleave(2, 0)[::2]
    if kind == 3 and values.is_floating_point():
        values.requires_grad_()
    return values


def damaged(draw: st.DrawFn, values: Tensor) -> Tensor:
    """The values with a part of them alike, zero, or no number."""
    how = draw(st.integers(0, 12))
    if not values.numel() or how > 7 or not values.ndim:
        return values
    flat = values.flatten()
    if how < 3:
        flat[draw(st.integers(0, len(flat) - 1))] = (math.nan, math.inf, -math.inf)[how]
        return flat.reshape(values.shape)
    if how == 3:
        values[..., 0] = 0
    if how == 4:
        values[1:] = values[:1].clone()
    if how == 5:
        values[..., 1:] = values[..., :1].clone()
    return values * 0 if how == 6 else values[:1].expand_as(values) if how == 7 else values


@st.composite
def calls(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """A public function and its arguments."""
    name = draw(st.sampled_from(sorted(SUBJECTS)))
    rows, arguments = draw(st.sampled_from(SIZES[1:])), {}
    parameters = inspect.signature(SUBJECTS[name]).parameters
    for key, hint in signature(SUBJECTS[name]).items():
        needed = parameters[key].default is inspect.Parameter.empty
        if is_tensor(hint) and (needed or draw(st.integers(0, 9)) == 0):
            arguments[key] = draw(tensors(rows, labels="labels" in key))
        elif needed or draw(st.integers(0, 5)) == 0:
            arguments[key] = draw(st.sampled_from(of_type(hint)))
    return name, arguments


def of_type(hint: Any) -> Sequence[Any]:
    """Values for an argument, right and wrong ones."""
    options = (hint, *typing.get_args(hint))
    if bool in options:
        return True, False
    if str in options and float not in options:
        return WORDS
    return COUNTED if int in options else NUMBERS


def all_finite(value: Any) -> bool:
    return not isinstance(value, Tensor) or bool(value.detach().isfinite().all())


def check_call(example: tuple[str, dict[str, Any]]) -> None:
    name, arguments = example
    COUNTS[f"calls of {'measures' if '(' in name else 'functions'}"] += 1
    given = (value if isinstance(value, list) else [value] for value in arguments.values())
    tensors = [value for values in given for value in values if isinstance(value, Tensor)]
    try:
        with alarm():
            value = SUBJECTS[name](**arguments)
    except Exception as error:
        fault = refused(error)
        assert not fault, fault
        return
    if not isinstance(value, Tensor):
        return
    if not all(map(all_finite, tensors)):
        assert not all_finite(value) or not value.numel() or name.startswith("gather"), f"{value} of what is no number"
        return
    low, high = bounds(name, SUBJECTS[name])
    values = value.detach().double()
    assert bool(values.isfinite().all()), f"{value}"
    assert bool(((values >= low - 1e-3) & (values <= high + 1e-3)).all()), f"{value} is outside of {low} to {high}"
    asked = [tensor for tensor in tensors if tensor.requires_grad]
    if asked and value.requires_grad:
        value.sum().backward()
        assert all(tensor.grad is None or all_finite(tensor.grad) or tensor.abs().max() < 1e-15 for tensor in asked), "gradient"


@amounts(short=400, share=0.8)
def test_any_tensor_gives_the_right_value_or_a_sentence(amount: int) -> None:
    assert len(SUBJECTS) > 40
    explore(check_call, calls(), amount)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> ImageClassifier:
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = str(tmp_path_factory.mktemp("classifier"))
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 31}
    LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, **sizes)).save_pretrained(folder)
    return ImageClassifier.from_backbone(folder, classes=["a", "b"], image_size=8)


@st.composite
def pictures(draw: st.DrawFn) -> Any:
    shape = draw(
        st.sampled_from([(2, 3, 8, 8)] * 3 + [(3, 8, 8), (8, 8, 3), (8, 8), (2, 1, 8, 8), (0, 3, 8, 8), (1, 3, 9, 7), ()])
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    images = torch.rand(shape, generator=generator) * draw(st.sampled_from([1, 1, 1, 255, 1e30, -1]))
    images = damaged(draw, images).to(draw(st.sampled_from([*DTYPES, torch.uint8, torch.uint8])))
    plain = images.float() if images.dtype == torch.bfloat16 else images
    forms = [
        images,
        images,
        plain.numpy(),
        list(images) if images.ndim else images,
        plain.tolist(),
        None,
        "no file",
        Path("no"),
        [],
        5,
    ]
    return draw(st.sampled_from(forms))


@amounts(short=100, share=0.1)
def test_any_picture_is_classified_or_refused(classifier: ImageClassifier, amount: int) -> None:
    doors: dict[str, Callable[..., Any]] = {
        "predict": lambda images: [classes[0]["score"] for classes in classifier.predict(images)],
        "forward": classifier,
        "embed": classifier.embed,
        "match_input_scale": classifier.match_input_scale,
    }
    whole = {name: value.clone() for name, value in classifier.state_dict().items()}

    def check(example: tuple[str, Any]) -> None:
        door, images = example
        COUNTS["pictures"] += 1
        classifier.load_state_dict(whole)
        try:
            with alarm(), torch.no_grad():
                value = doors[door](images)
        except Exception as error:
            fault = refused(error)
            assert not fault, fault
            return
        assert door != "match_input_scale" or all(map(all_finite, classifier.state_dict().values())), "the weights are broken"
        numbers = torch.as_tensor(value if value is not None else 0.0)
        plain = torch.as_tensor(np.asarray(images)) if not isinstance(images, Tensor | list) else images
        assert all_finite(numbers) or not all_finite(plain), value

    explore(check, st.tuples(st.sampled_from(sorted(doors)), pictures()), amount)


class Letters:
    """A tokenizer whose tokens are letters."""

    pad_token_id, padding_side = 0, "right"

    def __call__(self, texts: list[str], **settings: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[ord(letter) % 50 + 1 for letter in text] for text in texts]}


@amounts(short=60, share=0.1)
def test_any_features_make_batches_or_are_refused(amount: int) -> None:
    def check(example: tuple[Any, dict[str, Any]]) -> None:
        features, settings = example
        COUNTS["features of pairs"] += 1
        try:
            with alarm():
                batch = PairBatches(["a text"] * 8, features, Letters(), **settings).batch(3)
        except Exception as error:
            fault = refused(error)
            assert not fault, fault
            return
        assert bool(batch.features.isfinite().all()) and len(batch.input_ids) == settings["batch_size"]

    counts = {name: st.sampled_from(COUNTED) for name in ("seed", "max_length")}
    options = st.fixed_dictionaries({"batch_size": st.sampled_from([*COUNTED, 4, 4, 4])}, optional=counts)
    explore(check, st.tuples(tensors(8), options), amount)
