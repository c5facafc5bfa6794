"""Small image sets, written as a user would have them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pictures import png


@pytest.fixture
def write_folder() -> Callable[..., Path]:
    """Write class folders with so many pictures each."""

    def write(path: Path, counts: dict[str, int], size: tuple[int, int] = (12, 12), seed: int = 0) -> Path:
        for name, count in counts.items():
            (path / name).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                seed += 1
                (path / name / f"{i:03}.png").write_bytes(png(seed, size))
        return path

    return write


@pytest.fixture
def write_parquet() -> Callable[..., Path]:
    """Write pictures and labels as parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def write(
        path: Path,
        labels: list[Any],
        *,
        image: str = "img",
        label: str = "label",
        struct: bool = False,
        metadata: dict[str, str] | None = None,
        seed: int = 0,
        cells: Any = None,
        more: dict[str, Any] | None = None,
    ) -> Path:
        cells = [png(seed + i) for i in range(len(labels))] if cells is None else cells
        if struct:
            cells = [cell if isinstance(cell, dict) else {"bytes": cell, "path": None} for cell in cells]
        images = cells if len(cells) else pa.array([], pa.binary())
        table = pa.table({image: images, label: labels, **(more or {})}).replace_schema_metadata(metadata)
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, path)
        return path

    return write
