"""environment.json says what a run ran on, and nothing about who ran it."""

from __future__ import annotations

import getpass
import json
import os
import platform
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest
import torch

from crossalign.core import machine as module
from crossalign.core.machine import command_line, environment, free_memory, git_state, is_main_process


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    variables = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=variables).stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository that holds this package where ours does."""
    root = tmp_path / "checkout"
    room = root / "src" / "crossalign" / "core"
    room.mkdir(parents=True)
    (room / "machine.py").write_text("")
    git(root, "init", "-q")
    monkeypatch.setattr(module, "__file__", str(room / "machine.py"))
    git_state.cache_clear()
    yield root
    git_state.cache_clear()


def test_it_names_the_machine_and_the_software() -> None:
    found = environment()
    json.dumps(found)
    assert found["python"] == platform.python_version()
    assert found["packages"]["torch"] == torch.__version__.split("+")[0] and found["crossalign"]
    assert found["threads"] == torch.get_num_threads() and found["cores"] >= 1 and found["processes"] == 1
    assert found["cpu"] and (found["memory_bytes"] or 1) > 0
    assert free_memory() is None or 0 < free_memory() <= found["memory_bytes"]
    assert len(found["gpus"]) == torch.cuda.device_count()
    assert datetime.fromisoformat(found["started"]).tzinfo is not None


def test_it_names_no_person_and_no_host() -> None:
    text = json.dumps(environment())
    assert str(Path.home()) + "/" not in text and platform.node() not in text
    if getpass.getuser() != "root":
        assert getpass.getuser() not in text


def test_it_imports_nothing_heavy() -> None:
    script = (
        "import sys; from crossalign.core.machine import environment; environment()\n"
        "assert not {'torch', 'numpy', 'mlflow', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_the_command_is_one_that_can_be_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    argv = ["/home/ada/env/bin/crossalign", "adapt", "--output", "/home/ada/runs/x", "--row", "FPT, mine"]
    assert command_line(argv) == "crossalign adapt --output ~/runs/x --row 'FPT, mine'"
    assert command_line(["/lib/crossalign/__main__.py", "plan"]) == "python -m crossalign plan"
    uri = ["crossalign", "adapt", "--tracking.mlflow-uri=https://ada:secret@host:5000/x"]
    assert command_line(uri) == "crossalign adapt --tracking.mlflow-uri=https://host:5000/x"


def test_commit_and_changes_of_our_own_checkout(checkout: Path) -> None:
    assert git_state() == (None, None), "no commit yet"
    git(checkout, "add", ".")
    git(checkout, "commit", "-qm", "first")
    git_state.cache_clear()
    assert git_state() == (git(checkout, "rev-parse", "HEAD"), False)
    (checkout / "notes.txt").write_text("not a source file")
    git_state.cache_clear()
    assert git_state()[1] is False
    (checkout / "src" / "crossalign" / "new.py").write_text("")
    git_state.cache_clear()
    assert git_state()[1] is True


def test_another_repository_round_the_package_is_not_ours(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git(checkout, "add", ".")
    git(checkout, "commit", "-qm", "first")
    installed = checkout / ".venv" / "lib" / "python3" / "site-packages" / "crossalign"
    installed.mkdir(parents=True)
    monkeypatch.setattr(module, "__file__", str(installed / "environment.py"))
    assert git_state() == (None, None)


def test_the_main_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert is_main_process()
    monkeypatch.setenv("RANK", "1")
    assert not is_main_process()


@pytest.mark.parametrize(
    ("features", "answer"),
    [
        (["avx2"], False),
        (["avx2", "avx512f", "avx512_bf16"], True),
        (["amx_bf16"], True),
        (["asimd", "bf16"], True),
        ([], None),
    ],
)
def test_bf16_is_asked_of_the_processor(features: list[str], answer: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "cpu_features", lambda: features)
    assert module.computes_bf16() is answer


@pytest.mark.parametrize(
    ("variables", "threads"),
    [({}, 8), ({"OMP_NUM_THREADS": "2"}, 2), ({"SLURM_CPUS_PER_TASK": "3"}, 3), ({"OMP_NUM_THREADS": "x"}, 8),
     ({"OMP_NUM_THREADS": "64"}, 8)],
)  # fmt: skip
def test_threads_are_those_that_this_process_is_allowed(
    variables: dict[str, str], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "usable_cores", lambda: 8)
    monkeypatch.setattr(module.Path, "read_text", lambda *args, **kwargs: "max 100000")
    for name in ("OMP_NUM_THREADS", "SLURM_CPUS_PER_TASK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert module.usable_threads() == threads
    monkeypatch.setattr(module.Path, "read_text", lambda *args, **kwargs: "150000 100000")
    assert module.usable_threads() == min(threads, 2)
