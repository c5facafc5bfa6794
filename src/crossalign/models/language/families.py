"""What differs between architectures, as one table: direction, positions, and where LoRA goes."""

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from crossalign.core.registry import Registry


@dataclass(frozen=True)
class Family:
    """One architecture of transformers. A further one is one more row of ``FAMILIES``, and one of the test matrix."""

    name: str
    """``config.model_type``."""
    attention: Literal["causal", "bidirectional", "none"]
    """The direction that it is pretrained with."""
    positions: Literal["rotary", "learned", "none"]
    """rotary: turned into queries and keys; learned: a table that is added to the input vectors."""
    position_module: str
    """The submodule of the base model that holds the table, or that makes the rotation."""
    attention_targets: tuple[str, ...]
    """Suffixes of module names: query, key, value and output projections."""
    mlp_targets: tuple[str, ...]
    """Suffixes of module names: the projections up and down, without a gate (CMDA §3.1.3)."""
    pooler: bool = False
    """The base class builds a pooler unless it is told not to."""
    bos: Literal["yes", "no", ""] = ""
    """Whether its texts started with BOS in pre-training; empty: as the model's own tokenizer does, where families differ."""

    @property
    def lora_targets(self) -> tuple[str, ...]:
        """Suffixes of the names of all modules that LoRA adapts, as PEFT's ``target_modules`` takes them."""
        return self.attention_targets + self.mlp_targets


_QKVO = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_UP_DOWN = ("mlp.up_proj", "mlp.down_proj")
_NEOX_QKVO = ("attention.query_key_value", "attention.dense")
_OPT_QKVO = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj")
_DISTIL_QKVO = ("attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin")
_VIT_QKVO = ("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj")
_NEOX_MLP = ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
_BERT_POSITIONS = "embeddings.position_embeddings"
_BERT_QKVO = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")
_BERT_MLP = ("intermediate.dense", "output.dense")

_FAMILIES = (
    Family("gpt2", "causal", "learned", "wpe", ("attn.c_attn", "attn.c_proj"), ("mlp.c_fc", "mlp.c_proj"), bos="no"),
    Family("llama", "causal", "rotary", "rotary_emb", _QKVO, _UP_DOWN),
    Family("mistral", "causal", "rotary", "rotary_emb", _QKVO, _UP_DOWN),
    Family("qwen2", "causal", "rotary", "rotary_emb", _QKVO, _UP_DOWN, bos="no"),
    Family("qwen3", "causal", "rotary", "rotary_emb", _QKVO, _UP_DOWN, bos="no"),
    Family("gemma", "causal", "rotary", "rotary_emb", _QKVO, _UP_DOWN, bos="yes"),
    Family("gpt_neox", "causal", "rotary", "rotary_emb", _NEOX_QKVO, _NEOX_MLP, bos="no"),
    Family("opt", "causal", "learned", "decoder.embed_positions", _OPT_QKVO, ("fc1", "fc2"), bos="yes"),
    Family("bert", "bidirectional", "learned", _BERT_POSITIONS, _BERT_QKVO, _BERT_MLP, True),
    Family("roberta", "bidirectional", "learned", _BERT_POSITIONS, _BERT_QKVO, _BERT_MLP, True),
    Family("distilbert", "bidirectional", "learned", _BERT_POSITIONS, _DISTIL_QKVO, ("ffn.lin1", "ffn.lin2")),
)
FAMILIES: Registry[Family] = Registry("backbone architecture", {f.name: f for f in _FAMILIES}, group="crossalign.backbones")

# The two controls that are no language model; see scratch.py.
VIT = Family("crossalign_vit", "bidirectional", "none", "", _VIT_QKVO, ("mlp.fc1", "mlp.fc2"))
NONE = Family("crossalign_none", "none", "none", "", (), ())


def register_backbone(model_type: str, **facts: Any) -> Family:
    """Make an architecture of transformers usable as a backbone; ``facts`` are the other fields of :class:`Family`."""
    return FAMILIES.register(model_type, Family(model_type, **facts))


def family_of(config: Any) -> Family:
    """The family of a backbone by its transformers configuration.

    Raises:
        UserError: an architecture that is not in ``FAMILIES``.
    """
    return family_named(getattr(config, "model_type", ""))


def family_named(name: str) -> Family:
    """The family of a ``model_type``; see :func:`family_of`."""
    for control in (VIT, NONE):
        if name == control.name:
            return control
    return FAMILIES[name]


def longest_input(model: Any, family: Family) -> int | None:
    """Rows of a learned position table that a token can take (some ids come before the first token's), or the window
    of local attention, which without a mask would not be kept; None where there is no limit."""
    if family.positions != "learned":
        return getattr(model.config, "sliding_window", None)
    table: Any = getattr(model, "base_model", model).get_submodule(family.position_module)
    first = table.padding_idx + 1 if table.padding_idx is not None else getattr(table, "offset", 0)
    return int(table.num_embeddings) - int(first)


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalisation layer, by its type.

    Each RMSNorm of transformers is a class of its own (``LlamaRMSNorm``, ``Qwen3RMSNorm``), unrelated to torch's, so
    that those are known by the class's name. Parameter names say nothing: Llama's norms hold no 'ln', BERT's no 'norm'.
    """
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return True
    return any(base.__name__.endswith("RMSNorm") for base in type(module).__mro__)
