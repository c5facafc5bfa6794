"""Every file of a run, a model, a search, a study, a corpus and the cache, damaged, under each verb that reads it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from damage import damage
from fuzzing import COUNTS, EXAMPLES, call, explore
from hypothesis import strategies as st
from material import CALLS, OWN, Material


def parameters() -> Iterator[Any]:
    for name, reading in CALLS.items():
        if not reading.slow:
            yield pytest.param(name, 4, id=f"{name}-short")
        yield pytest.param(
            name, max(1, EXAMPLES // len(CALLS)), id=f"{name}-slow", marks=[pytest.mark.slow, pytest.mark.timeout(3600)]
        )


@pytest.mark.parametrize("name,amount", list(parameters()))
def test_any_damaged_file_is_read_made_again_or_named(work: Material, name: str, amount: int) -> None:
    reading, usual = CALLS[name], work.first(name)
    files = work.files(reading.reads)
    assert files

    def check(data: st.DataObject) -> None:
        path = data.draw(st.sampled_from(files), "file")
        kind, before = damage(work.work / path, work.victim, data), work.state
        COUNTS["files damaged"] += 1
        work.state = work.look()
        try:
            ending = call(*reading.arguments)
            fault = ending.fault or lost(work, path, reading.writes)
            if not fault and path.startswith("cache/") and ending.code == 0 and plain(ending.output) != plain(usual.output):
                fault = f"another answer than without the fault: {ending.output}"
            assert work.victim.read_text() == '{"a": 1}\n', "the victim"
        finally:
            work.state = before
            work.reset()
            work.victim.write_text('{"a": 1}\n')
        assert not fault, f"{name}, {path}, {kind}: {fault}\n{ending.errors[-3000:]}"

    explore(check, st.data(), amount)


def lost(material: Material, damaged: str, writes: tuple[str, ...]) -> str:
    """What was changed that is no business of the call."""
    for path in sorted(material.changes()):
        parts = Path(path).parts
        if parts[0] in ("cache", "new") or "mlruns" in parts:
            continue
        if not path.startswith(tuple(f"{root}/" for root in writes)) and path not in writes:
            return f"{path} was changed"
        whole, now = material.whole / path, material.work / path
        if whole.is_file() and now.is_file() and whole.read_bytes() == now.read_bytes():
            continue
        runs = [folder for folder in Path(path).parents if (material.whole / folder / "result.json").is_file()]
        if runs and runs[0] not in Path(damaged).parents and Path(path).name not in OWN:
            return f"{path}, of a finished run, was changed"
    return ""


def plain(output: str) -> list[str]:
    """An output without what a clock or the file system decides."""
    return [line for line in output.splitlines() if "cache" not in line and "second" not in line and not line.endswith(" s")]
