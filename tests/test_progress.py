"""A bar for people, plain lines for log files, nothing for short work."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest

from crossalign.core import progress

SCRIPT = """
import time
from crossalign.core import progress as module
module.QUIET_SECONDS, module.LINE_SECONDS = 0.2, 0.1
with module.progress(50, "train", initial=10) as bar:
    for step in range(40):
        time.sleep({pause})
        bar.update(1)
"""


def run_plain(pause: float, **variables: str) -> str:
    command = [sys.executable, "-c", SCRIPT.format(pause=pause)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | variables)
    assert done.stdout == ""
    return done.stderr


def run_on_terminal(pause: float) -> str:
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    command = [sys.executable, "-c", SCRIPT.format(pause=pause)]
    done = subprocess.run(command, stdin=follower, stdout=follower, stderr=follower, check=True)
    assert done.returncode == 0
    os.close(follower)
    shown = b""
    try:
        while piece := os.read(leader, 65536):
            shown += piece
    except OSError:  # Linux reports the closed other end as an error
        pass
    os.close(leader)
    return shown.decode()


def test_a_log_file_gets_plain_lines_with_rate_and_time_left() -> None:
    lines = run_plain(0.015).splitlines()
    assert 2 <= len(lines) <= 12, "one a tenth of a second at most"
    assert all(line.startswith("train: ") and "/50 [" in line and "step/s" in line for line in lines)
    assert not any(character < " " or character > "~" for line in lines for character in line)
    assert "| 50/50 [" in lines[-1]


def test_a_log_file_gets_lines_of_bars_within_bars() -> None:
    script = (
        SCRIPT.split("with ")[0]
        + """
with module.progress(2, "runs", unit="run") as runs:
    for run in range(2):
        with module.progress(40, "train") as bar:
            for step in range(40):
                time.sleep(0.015)
                bar.update(1)
        runs.update(1)
"""
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    lines = done.stderr.splitlines()
    assert {line.split(": ")[0] for line in lines} == {"runs", "train"}
    assert not any(character < " " or character > "~" for line in lines for character in line)


def test_a_terminal_gets_a_bar_that_is_redrawn() -> None:
    shown = run_on_terminal(0.015)
    assert shown.count("\r") > 2 and "50/50" in shown and "step/s" in shown and "<" in shown


@pytest.mark.parametrize("run", [run_plain, run_on_terminal])
def test_short_work_shows_nothing(run: object) -> None:
    assert run(0.0) == ""  # type: ignore[operator]


def test_a_bar_over_items_changes_none(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.0)
    assert list(progress.followed("abc", 3, "letters", "letter")) == ["a", "b", "c"]
    assert capsys.readouterr().err.startswith("letters: ")
    assert list(progress.followed("abc", 3, "", "letter")) == ["a", "b", "c"]
    assert capsys.readouterr().err == ""


def test_other_processes_show_nothing() -> None:
    assert run_plain(0.015, RANK="1") == ""


STEPS = """
import sys, time
from crossalign.core import progress as module
module.STEP_SECONDS, module.QUIET_SECONDS, module.LINE_SECONDS = 0.1, 0.2, 0.1
with module.doing("opening the model"):
    time.sleep({pause})
with module.progress(8, "train") as bar:
    for step in range(4):
        time.sleep(0.15)
        bar.update(1)
    with module.paused(bar):
        time.sleep(2)
    module.say("epoch 1: loss 0.5")
    for step in range(4):
        time.sleep(0.15)
        bar.update(1)
"""


@pytest.mark.parametrize("pause", [0.0, 0.9])
def test_long_work_is_named_once_and_lines_stand_above_bars(pause: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "SCRIPT", STEPS)
    lines = run_plain(pause).splitlines()
    assert lines.count("crossalign: opening the model") == (pause > 0)
    assert "epoch 1: loss 0.5" in lines and all(line.startswith(("crossalign: ", "train: ", "epoch 1")) for line in lines)
    rate = re.search(r"([\d.]+)s?(step/s|s/step)", lines[-1])
    assert rate and "8/8" in lines[-1], lines
    assert 0.1 < (1 / float(rate[1]) if rate[2] == "step/s" else float(rate[1])) < 0.3, "without the two seconds of the pause"
    shown = run_on_terminal(pause)
    assert ("opening the model ..." in shown) == (pause > 0)
    assert re.search(r"(^|[\r\n])epoch 1: loss 0.5\r?\n", shown)
