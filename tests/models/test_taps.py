"""Taps: what transformers calls hidden states, with their gradient, whatever the architecture, padding and wrapping."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from crossalign.core.errors import UserError
from crossalign.models.language.families import FAMILIES
from crossalign.models.language.model import open_language_model
from crossalign.models.taps import Taps, block_names, pooled, resolve_layers

Folder = Callable[[str], Path]
CAUSAL = [name for name, family in FAMILIES.items() if family.attention == "causal"]


def causal_model(folder: Path) -> torch.nn.Module:
    return open_language_model(str(folder), head="causal").model  # type: ignore[no-any-return]


def texts() -> tuple[Tensor, Tensor]:
    """Three texts of 7, 4 and 1 tokens, padded on the right."""
    ids, mask = torch.randint(3, 61, (3, 7)), torch.zeros(3, 7, dtype=torch.long)
    for row, length in enumerate((7, 4, 1)):
        mask[row, :length] = 1
        ids[row, length:] = 1  # RoBERTa's padding, by which it counts positions
    return ids, mask


@pytest.mark.parametrize("family", list(FAMILIES))
def test_layers_are_those_of_transformers(tiny_folder: Folder, family: str) -> None:
    head = "causal" if family in CAUSAL else "none"
    model = open_language_model(str(tiny_folder(family)), head=head).model  # type: ignore[arg-type]
    ids, mask = texts()
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
        found = Taps("all").hidden_states(model, ids, mask)
    assert len(found) == len(expected) == 3
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a[mask.bool()], b[mask.bool()])
    assert resolve_layers(model, [-1, "penultimate", 0, "2"]) == (2, 1, 0)


@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize("pool", ["mean", "last"])
def test_the_side_of_the_padding_changes_nothing(tiny_folder: Folder, family: str, pool: str) -> None:
    model = causal_model(tiny_folder(family))
    ids, mask = texts()
    taps = Taps(["penultimate", "last"], pool)  # type: ignore[arg-type]
    right = taps(model, ids, mask)
    left = taps(
        model, *(torch.stack([torch.roll(row, 7 - n) for row, n in zip(x, (7, 4, 1), strict=True)]) for x in (ids, mask))
    )
    torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)
    alone = torch.cat([taps(model, ids[i : i + 1, :n], mask[i : i + 1, :n]) for i, n in enumerate((7, 4, 1))])
    torch.testing.assert_close(right, alone, rtol=1e-4, atol=1e-5)


def test_padding_is_left_out_of_the_mean() -> None:
    h, mask = torch.randn(2, 3, 4), torch.tensor([[1, 1, 0], [0, 1, 1]])
    torch.testing.assert_close(pooled(h, mask, "mean"), torch.stack([h[0, :2].mean(0), h[1, 1:].mean(0)]))
    torch.testing.assert_close(pooled(h, mask, "last"), torch.stack([h[0, 1], h[1, 2]]))
    assert pooled(h.bfloat16(), mask, "mean").dtype is torch.float32


def test_the_mean_of_low_precision_is_taken_in_full_precision() -> None:
    h, mask = torch.randn(3, 200, 16).bfloat16() + 1, torch.ones(3, 200, dtype=torch.long)
    mask[1, 150:] = 0
    assert torch.equal(pooled(h, mask, "mean"), pooled(h.float(), mask, "mean"))
    assert torch.equal(pooled(h, mask, "last"), pooled(h.float(), mask, "last"))


def test_only_what_is_tapped_is_kept(tiny_folder: Folder) -> None:
    """All hidden states are as much memory again as the pass."""
    model = causal_model(tiny_folder("gpt2"))
    asked: list[dict[str, object]] = []
    given: list[object] = []
    watched: list[list[int]] = []

    def before(module: torch.nn.Module, args: object, kwargs: dict[str, object]) -> None:
        asked.append(kwargs)
        watched.append([i for i, name in enumerate(block_names(module)) if module.get_submodule(name)._forward_pre_hooks])

    model.register_forward_pre_hook(before, with_kwargs=True)
    model.register_forward_hook(lambda _, __, output: given.append(output.hidden_states))
    found = Taps([1])(model, *texts())
    assert not asked[0].get("output_hidden_states") and given == [None]
    assert watched == [[1]] and found.shape == (3, 32)


def gradient(model: torch.nn.Module, taps: Taps) -> dict[str, Tensor]:
    model.zero_grad()
    ids, mask = texts()
    taps(model, ids, mask).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_keeps_the_gradient(tiny_folder: Folder, reentrant: bool) -> None:
    model = causal_model(tiny_folder("llama")).train()
    torch.manual_seed(1)
    expected = gradient(model, Taps([1, 2]))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})  # type: ignore[operator]
    model.enable_input_require_grads()  # type: ignore[operator]
    torch.manual_seed(1)
    found = gradient(model, Taps([1, 2]))
    assert expected.keys() == found.keys() and len(found) > 10
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


def test_an_output_without_gradient_is_noticed(tiny_folder: Folder) -> None:
    model = causal_model(tiny_folder("llama")).train()
    model.gradient_checkpointing_enable({"use_reentrant": True})  # type: ignore[operator]
    model.enable_input_require_grads()  # type: ignore[operator]
    with pytest.raises(RuntimeError, match=r"layers model\.layers\.0\.mlp have no gradient: tap one above"):
        Taps("model.layers.0.mlp")(model, *texts())


def counting_backend() -> tuple[list[torch.fx.GraphModule], Callable[..., torch.fx.GraphModule]]:
    """A list of the graphs that were compiled, and the backend of torch.compile that fills it."""
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    return graphs, backend


def test_a_compiled_model_is_tapped_outside_the_graph(tiny_folder: Folder) -> None:
    graphs, backend = counting_backend()
    model = causal_model(tiny_folder("llama"))
    ids, mask = texts()
    expected = Taps()(model, ids, mask)
    compiled = torch.compile(model, backend=backend)
    for _ in range(2):
        compiled(input_ids=ids, attention_mask=mask)
        count = len(graphs)
        torch.testing.assert_close(Taps()(compiled, ids, mask), expected)  # type: ignore[arg-type]
    assert count == len(graphs) > 0, "the taps neither ran in the graph nor made it anew"


def test_a_module_compiled_in_place_is_compiled_once(tiny_folder: Folder) -> None:
    """A pass with hooks through the compiled call would make the graphs anew each time, or keep nothing."""
    graphs, backend = counting_backend()
    model = causal_model(tiny_folder("llama"))
    ids, mask = texts()
    expected = Taps()(model, ids, mask)
    model.compile(backend=backend)
    counts = set()
    for _ in range(3):
        model(input_ids=ids, attention_mask=mask)
        counts.add(len(graphs))
        torch.testing.assert_close(Taps()(model, ids, mask), expected)
        counts.add(len(graphs))
    assert len(counts) == 1 and counts != {0}


def test_module_names_and_what_is_not_there(tiny_folder: Folder) -> None:
    model = causal_model(tiny_folder("gpt2"))
    ids, mask = texts()
    by_name = Taps("transformer.h.0")(model, ids, mask)
    torch.testing.assert_close(by_name, Taps(1)(model, ids, mask))
    assert Taps(["transformer.h.0", 0])(model, ids, mask).shape == (3, 64)
    with pytest.raises(UserError, match="there is no layer 3: the model has the layers 0 to 2"):
        Taps(3)(model, ids, mask)
    with pytest.raises(UserError, match=r"unknown layer 'transformer\.h\.9'; did you mean 'transformer\.h\.1'"):
        Taps("transformer.h.9")(model, ids, mask)
    with pytest.raises(UserError, match="unknown pooling 'max'"):
        Taps(1, "max")  # type: ignore[arg-type]


def test_hooks_are_gone_after_the_pass(tiny_folder: Folder) -> None:
    model = causal_model(tiny_folder("gpt2"))
    Taps(["all", "transformer.h.0"])(model, *texts())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def nested(kind: str) -> nn.Module:
    """A model of language and images, small; its vision part has as many blocks as its language model."""
    import transformers

    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    if kind == "t5":
        return transformers.T5ForConditionalGeneration(
            transformers.T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2)
        )
    if kind == "gemma3":
        text = {**small, "vocab_size": 50, "head_dim": 8, "num_key_value_heads": 1}
        vision = {**small, "image_size": 28, "patch_size": 14}
        config: Any = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
        return transformers.Gemma3ForConditionalGeneration(config)
    text = {**small, "vocab_size": 50, "num_key_value_heads": 1, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
    config = transformers.Qwen2VLConfig(text_config=text, vision_config={"depth": 2, "embed_dim": 16, "num_heads": 2})
    return transformers.Qwen2VLForConditionalGeneration(config)


@pytest.mark.parametrize("kind", ["gemma3", "qwen2-vl"])
def test_the_layers_of_a_model_of_images_too_are_those_of_its_language_model(kind: str) -> None:
    names = block_names(nested(kind))
    assert len(names) == 2 and all("language_model" in name for name in names)


def test_an_encoder_decoder_is_refused_in_a_sentence() -> None:
    with pytest.raises(UserError, match="the model is an encoder-decoder, which has two stacks of layers: name a decoder"):
        Taps("last")(nested("t5"), torch.ones(1, 2, dtype=torch.int64), torch.ones(1, 2, dtype=torch.int64))
