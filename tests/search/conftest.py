"""Learning curves, recorded and drawn, and the replay of ASHA over them."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

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
        if not file.is_file():
            pytest.skip(f"no recorded curves at {file}")
        return np.array([trial["curve"] for trial in json.loads(file.read_text())["trials"] if trial["state"] == "complete"])
    draw = np.random.default_rng(0)
    reached, slowness = draw.beta(3, 2, size=(64, 1)), draw.uniform(2, 30, size=(64, 1))
    curve = 0.1 + 0.6 * reached * (1 - np.exp(-np.arange(1, 51) / slowness)) + 0.01 * draw.normal(size=(64, 50))
    return np.asarray(np.round(curve, 2))
