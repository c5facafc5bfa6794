"""The counts of the slow run, and the artefacts that the fuzzers work on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from fuzzing import COUNTS
from material import Material

from crossalign.studies.workers import WorkerPool


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if COUNTS:
        terminalreporter.write_line("fuzzed: " + ", ".join(f"{count:,} {name}" for name, count in sorted(COUNTS.items())))


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    return Material(tmp_path_factory.mktemp("fuzzed"))


@pytest.fixture
def work(material: Material, monkeypatch: pytest.MonkeyPatch) -> Iterator[Material]:
    """Calls run among the artefacts; workers are threads of this process."""

    @contextlib.contextmanager
    def one_thread(config: Any) -> Iterator[WorkerPool]:
        with ThreadPoolExecutor(1) as executor:
            yield WorkerPool(executor, lambda: 1)

    monkeypatch.setattr("crossalign.studies.tune._pool", one_thread)
    monkeypatch.setenv("CROSSALIGN_CACHE", str(material.work / "cache"))
    monkeypatch.chdir(material.work)
    yield material
    material.reset()
