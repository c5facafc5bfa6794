"""A small search over the tiny model, and what it wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from crossalign.config import SearchConfig, TrackingConfig

SPACE = "optim.lr: {low: 1.0e-4, high: 1.0e-2, log: true}\noptim.weight_decay: [0.0, 0.1]\n"


def settings(tmp_path: Path, tiny: tuple[str, ...], **more: Any) -> SearchConfig:
    """A search of ``small-fpt`` below ``tmp_path``; ``space_text`` is its space."""
    space = tmp_path / "space.yaml"
    space.write_text(more.pop("space_text", SPACE))
    base = {"recipe": "small-fpt", "trials": 8, "rungs": 3, "seeds": 1, "tracking": TrackingConfig(mlflow=False)}
    return SearchConfig(**(base | {"output": tmp_path / "found", "space": str(space), "set": tiny} | more))


def record(config: SearchConfig) -> dict[str, Any]:
    """Its search.json."""
    return json.loads((config.output / "search.json").read_text())  # type: ignore[no-any-return]
