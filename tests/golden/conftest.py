"""Golden files: what the package gave when they were written. ``pytest tests/golden --write-golden`` writes them anew."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
LINES = 60
"""Of a difference that a failing test shows."""


@pytest.fixture(scope="session")
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """``golden(path, content)``: ``content`` is, byte for byte, what the file at ``path`` under tests/golden holds."""

    def compare_or_write(path: str, content: str) -> None:
        file = FOLDER / path
        if request.config.getoption("--write-golden"):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content.encode())
        elif not file.is_file():
            pytest.fail(f"no golden file {path}; --write-golden writes it", pytrace=False)
        elif file.read_bytes() != content.encode():
            before, after = file.read_bytes().decode().splitlines(), content.splitlines()
            lines = list(difflib.unified_diff(before, after, f"{path} as written", f"{path} now", n=1, lineterm=""))
            more = [f"and {len(lines) - LINES} lines more"] if len(lines) > LINES else []
            lines = lines or ["only in how its lines end"]
            pytest.fail("\n".join([f"{path} differs:", *lines[:LINES], *more]), pytrace=False)

    return compare_or_write
