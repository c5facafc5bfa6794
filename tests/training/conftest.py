"""A tiny language model with weights and a small set of pictures that can be told apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from crossalign.config import AdaptConfig
from crossalign.studies.reproduce import configured


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Llama of 2 layers and width 32, with weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    path = tmp_path_factory.mktemp("tiny-llama")
    config = LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of 8 × 8 pictures, 40 of each: horizontal stripes, vertical stripes, noise."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    stripes = np.zeros((8, 8, 3), dtype=np.int64)
    stripes[::2] = 200
    for name, base in (("across", stripes), ("down", stripes.transpose(1, 0, 2)), ("noise", stripes * 0 + 100)):
        (root / name).mkdir()
        for i in range(40):
            picture = np.clip(base + rng.integers(-60, 60, base.shape), 0, 255).astype(np.uint8)
            Image.fromarray(picture).save(root / name / f"{i}.png")
    return root


@pytest.fixture
def tiny_run(tiny_llama: Path, pictures: Path, tmp_path: Path) -> Callable[..., AdaptConfig]:
    """``tiny_run(recipe, "key=value", …, output=…)``: a configuration that trains in a second."""

    def make(recipe: str = "small-fpt", *settings: str, output: str = "run", **changes: Any) -> AdaptConfig:
        config = configured(
            recipe,
            (
                f"backbone.ref={tiny_llama}",
                f"data.source={pictures}",
                "data.channels=rgb",
                "embedder.patch=4",
                "loop.epochs=3",
                "loop.batch_size=10",
                "loop.precision=fp32",
                "loop.log_every=2",
                "align.epochs=2",
                "align.batch_size=16",
                "align.sequences=200",
                "align.sequence_length=8",
                "head.dropout=0.0",
                "tracking.mlflow=false",
                *settings,
            ),
        )
        return dataclasses.replace(config, output=tmp_path / output, **changes)

    return make
