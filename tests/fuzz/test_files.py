"""Every file of a run, a model, a search, a study, a corpus and the cache, damaged, under each verb that reads it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from damage import damage
from fuzzing import COUNTS, EXAMPLES, call, explore
from hypothesis import strategies as st
from material import ADAPTER, CALLS, CUT, FPT, OWN, Material


def parameters() -> Iterator[Any]:
    for name, reading in CALLS.items():
        if not reading.slow:
            yield pytest.param(name, 4, id=f"{name}-short")
        yield pytest.param(
            name, max(1, EXAMPLES // len(CALLS)), id=f"{name}-slow", marks=[pytest.mark.slow, pytest.mark.timeout(3600)]
        )


@pytest.mark.parametrize("name,amount", list(parameters()))
def test_any_damaged_file_is_read_made_again_or_named(work: Material, name: str, amount: int) -> None:
    files = work.files(CALLS[name].reads)
    assert files
    work.first(name)

    def check(data: st.DataObject) -> None:
        path = data.draw(st.sampled_from(files), "file")
        hold(work, name, path, lambda file: damage(file, work.victim, data))

    explore(check, st.data(), amount)


NO_WIDTH = '{"hidden_size": null, "model_type": "crossalign_none"}'
FOUND = {
    "a configuration without its width": ("predict of damaged pictures", "runs/none/model/backbone/config.json", NO_WIDTH),
    "a search's name that is no text": ("tune, unfinished", f"{CUT}/search.id", "\udce6"),
    "a teacher without the size of its pictures": ("features", "vit/preprocessor_config.json", '{"a": 1}'),
    "an adapter without its kind": ("evaluate", f"{ADAPTER}/model/adapter_config.json", '{"a": 1}'),
    "a lone surrogate": ("report", f"{FPT}/config.yaml", '{"seed": 0, "tune": {"method": "\\ud800"}}'),
    "one row of a study": ("reproduce", "study/none/seed-0/environment.json", ""),
}
"""Damages with which calls ended wrongly once: the short run tries them too."""


@pytest.mark.parametrize("name,path,content", FOUND.values(), ids=FOUND.keys())
def test_damages_that_once_ended_wrongly(work: Material, name: str, path: str, content: str) -> None:
    def put(file: Path) -> str:
        file.write_bytes(content.encode(errors="surrogateescape"))
        return "changed"

    hold(work, name, path, put)


@pytest.mark.parametrize("value", [None, "x", []])
def test_notes_of_cached_pictures_that_hold_no_number(work: Material, value: Any) -> None:
    work.first("adapt, unfinished")
    (path,) = [path for path in work.files(("cache/images",)) if path.endswith(".json")]

    def put(file: Path) -> str:
        file.write_text(json.dumps(json.loads(file.read_text()) | {"largest": value}))
        return "changed"

    hold(work, "adapt, unfinished", path, put)


def hold(work: Material, name: str, path: str, put: Callable[[Path], str]) -> None:
    """Call with one file damaged: it is right, or says why it cannot be, and loses nothing."""
    reading, usual = CALLS[name], work.usual.get(name)
    kind, before = put(work.work / path), work.state
    COUNTS["files damaged"] += 1
    work.state = work.look()
    try:
        ending = call(*reading.arguments)
        fault = ending.fault or lost(work, path, reading.writes)
        compared = usual and name != "cache" and path.startswith("cache/") and ending.code == 0  # "cache" tells what lies there
        if not fault and compared and plain(ending.output) != plain(usual.output):
            fault = f"another answer than without the fault: {ending.output}"
        assert work.victim.read_text() == '{"a": 1}\n', "the victim"
    finally:
        work.state = before
        work.reset()
        work.victim.write_text('{"a": 1}\n')
    assert not fault, f"{name}, {path}, {kind}: {fault}\n{ending.errors[-3000:]}"


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
