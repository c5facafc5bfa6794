"""Learning curves, recorded and drawn, and the replay of ASHA over them."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import crossalign.studies.tune  # noqa: F401
from crossalign.config import SearchConfig
from crossalign.core import progress
from crossalign.studies.workers import WorkerPool

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def bench() -> Any:
    spec = importlib.util.spec_from_file_location("search_benchmark", ROOT / "benchmarks" / "search.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["search_benchmark"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session", params=["drawn", "recorded"])
def curves(request: pytest.FixtureRequest) -> np.ndarray:
    """(64, 50) accuracy after each epoch, with ties: where good configurations learn fast or slowly."""
    if request.param == "recorded":
        file = ROOT / "docs" / "results" / "search-curves.json"
        return np.array([trial["curve"] for trial in json.loads(file.read_text())["trials"] if trial["state"] == "complete"])
    draw = np.random.default_rng(0)
    reached, slowness = draw.beta(3, 2, size=(64, 1)), draw.uniform(2, 30, size=(64, 1))
    curve = 0.1 + 0.6 * reached * (1 - np.exp(-np.arange(1, 51) / slowness)) + 0.01 * draw.normal(size=(64, 50))
    return np.asarray(np.round(curve, 2))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Settings that make a trial train in a tenth of a second."""
    from transformers import LlamaConfig, LlamaForCausalLM

    root = tmp_path_factory.mktemp("search")
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=31, num_key_value_heads=2, **shape)).save_pretrained(root / "llama")
    rng = np.random.default_rng(0)
    for name, low in (("dark", 0), ("light", 40)):
        (root / "pictures" / name).mkdir(parents=True)
        for i in range(30):
            Image.fromarray(rng.integers(low, low + 200, (8, 8, 3), dtype=np.uint8)).save(root / "pictures" / name / f"{i}.png")
    return (
        f"backbone.ref={root / 'llama'}", f"data.source={root / 'pictures'}", "data.channels=rgb", "embedder.patch=4",
        "loop.epochs=4", "loop.precision=fp32", "loop.batch_size=8",
    )  # fmt: skip


@pytest.fixture(autouse=True)
def _audible(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job silences its process, which here is that of other tests."""
    monkeypatch.setattr(progress, "_silent", False)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The work is done in this process, one job after the other."""

    @contextmanager
    def one_thread(config: SearchConfig) -> Iterator[WorkerPool]:
        with ThreadPoolExecutor(1) as executor:
            yield WorkerPool(executor, lambda: 1)

    monkeypatch.setattr(sys.modules["crossalign.studies.tune"], "_pool", one_thread)
