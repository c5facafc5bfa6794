"""The counts of the slow run, and the files that the fuzzers damage."""

from __future__ import annotations

import pytest
from fuzzing import COUNTS


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if COUNTS:
        terminalreporter.write_line("fuzzed: " + ", ".join(f"{count:,} {name}" for name, count in sorted(COUNTS.items())))
