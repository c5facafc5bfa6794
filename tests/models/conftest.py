"""Tiny models of every architecture, as folders, made once a run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

_LLAMA: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,  # grouped queries
    "attention_dropout": 0.1,
}
_BERT: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 24,
}
TINY: dict[str, dict[str, Any]] = {
    "gpt2": {"vocab_size": 61, "n_embd": 32, "n_inner": 48, "n_layer": 2, "n_head": 4, "n_positions": 24},
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": {**_LLAMA, "head_dim": 8},
    "gemma": {**_LLAMA, "head_dim": 8},
    "gpt_neox": {**_BERT, "attention_dropout": 0.1, "hidden_dropout": 0.1},
    "opt": {
        "vocab_size": 61,
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 24,
        "layerdrop": 0.5,
    },
    "bert": _BERT,
    "roberta": {**_BERT, "pad_token_id": 1},
    "distilbert": {
        "vocab_size": 61,
        "dim": 32,
        "hidden_dim": 48,
        "n_layers": 2,
        "n_heads": 4,
        "max_position_embeddings": 24,
    },
}


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder that holds only the config.json of a tiny model of one family."""

    def folder(family: str) -> Path:
        path = tmp_path_factory.getbasetemp() / "tiny-configs" / family
        if not path.is_dir():
            path.mkdir(parents=True)
            (path / "config.json").write_text(json.dumps({"model_type": family, **TINY[family]}))
        return path

    return folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory, tiny_config: Callable[[str], Path]) -> Callable[[str], Path]:
    """A folder of a tiny model with weights, as transformers saves the causal or masked model that people publish."""
    import transformers

    def folder(family: str) -> Path:
        path = tmp_path_factory.getbasetemp() / "tiny-models" / family
        if not path.is_dir():
            config = transformers.AutoConfig.from_pretrained(tiny_config(family))
            masked = family in ("bert", "roberta", "distilbert")
            kind = transformers.AutoModelForMaskedLM if masked else transformers.AutoModelForCausalLM
            kind.from_config(config).save_pretrained(path)
        return path

    return folder
