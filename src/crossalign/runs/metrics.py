"""Rows of metrics.jsonl: written as JSON can hold them, cut where a checkpoint was, read on from where one stopped."""

import math
import os
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from crossalign.core.reading import parse_json

Row = dict[str, Any]


def plain(value: Any) -> Any:
    """``value`` as JSON can hold it: one-element tensors and arrays opened, what is not finite as None."""
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def keep_rows(path: Path, rows: int) -> int:
    """Cut the file after its first ``rows`` whole lines; how many those are."""
    lines = path.read_bytes().splitlines(keepends=True)[:rows]
    whole = [line for line in lines if line.endswith(b"\n")]
    os.truncate(path, sum(len(line) for line in whole))
    return len(whole)


def rows_after(path: Path, sent: int) -> Iterator[tuple[int, int, Row]]:
    """Rows from number ``sent`` on, as (number, milliseconds since 1970, row); none where there is no file."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8") as lines:
        for number, line in islice(enumerate(lines), sent, None):
            yield number, now(), parse_json(line, f"'{path}' line {number + 1}", "remove it", dict)


def now() -> int:
    """Milliseconds since 1970, as MLflow counts time."""
    return int(time.time() * 1000)
