"""Numbers and keys of training as 0.1.0 gives them: tiny runs, losses of recipes, fingerprints, names of files in the cache.

Where processor and libraries compute the same bits as when the golden files were written, numbers are equal; elsewhere, which
is warned of, they agree to four digits. Keys are equal everywhere.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from run_tiny import KERNELS
from tiny_runs import RECIPES, RUNS

HERE = Path(__file__).parent
TOLERANCE = {"rel_tol": 1e-4, "abs_tol": 1e-5}
"""Between machines that round otherwise; AVX2's kernels were seen to differ by 2e-5 of a number, or by 2e-6."""
KEYS = ("teachers", "language models", "fingerprints", "corpora", "features", "cache")
LINE = 200
"""Characters of a golden file, which nobody edits by hand."""

pytestmark = pytest.mark.timeout(900)
Check = Callable[[str, Any], None]


@pytest.fixture(scope="session")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What run_tiny.py computes, in one process for all of pytest's."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # of all workers
    folder = folder / "golden-training"
    log, result = folder.with_suffix(".log"), folder / "outcome.json"
    with FileLock(folder.with_suffix(".lock")):
        if not log.is_file():
            command = [sys.executable, str(HERE / "run_tiny.py"), str(folder)]
            done = subprocess.run(command, env=os.environ | KERNELS, capture_output=True, text=True, check=False)
            log.write_text(done.stdout + done.stderr, encoding="utf-8")
    if not result.is_file():
        pytest.fail(f"run_tiny.py failed:\n{log.read_text(encoding='utf-8')[-4000:]}", pytrace=False)
    return json.loads(result.read_text(encoding="utf-8"))  # type: ignore[no-any-return]


@pytest.fixture
def check(request: pytest.FixtureRequest, golden: Callable[[str, str], None], outcome: dict[str, Any]) -> Check:
    """``check(path, value)``: ``value`` is what the golden file at ``path`` holds, to the bit where this machine can tell."""
    other = [] if request.config.getoption("--write-golden") else list(differences(stored("machine.json"), outcome["machine"]))

    def compare(path: str, value: Any) -> None:
        if other and any(isinstance(leaf, float) for leaf in leaves(value)):
            note = "compared to four digits, not to the bit: the golden files were written where machine and libraries differ"
            warnings.warn(f"training/{path}: {note} ({'; '.join(other)})", stacklevel=2)
            apart = list(differences(stored(path), value, **TOLERANCE))
            assert not apart, "\n".join([f"training/{path} differs beyond rounding:", *apart[:40]])
            return
        try:
            golden(f"training/{path}", readable(value) + "\n")
        except pytest.fail.Exception as error:
            if not other:
                raise
            message = (
                f"{error}\nwritten with the versions of constraints.txt on a machine that computes alike: {'; '.join(other)}"
            )
        else:
            return
        pytest.fail(message, pytrace=False)

    return compare


def stored(path: str) -> Any:
    return json.loads((HERE / "training" / path).read_text(encoding="utf-8"))


def readable(value: Any, indent: str = "") -> str:
    """JSON with what fits on a line on one."""
    line = json.dumps(value, ensure_ascii=False)
    if len(indent) + len(line) <= LINE or not isinstance(value, dict | list):
        return line
    deeper = indent + " "
    if isinstance(value, list):
        return "[\n" + ",\n".join(deeper + readable(item, deeper) for item in value) + f"\n{indent}]"
    items = (f"{deeper}{json.dumps(key, ensure_ascii=False)}: {readable(item, deeper)}" for key, item in value.items())
    return "{\n" + ",\n".join(items) + f"\n{indent}}}"


def leaves(value: Any) -> Iterator[Any]:
    """Everything in a nested value that holds nothing further."""
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from leaves(item)
    else:
        yield value


def differences(before: Any, now: Any, where: str = "", **tolerance: float) -> Iterator[str]:
    """Where two nested values differ; numbers may by ``tolerance``."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in dict.fromkeys([*before, *now]):
            yield from differences(before.get(key), now.get(key), f"{where}/{key}", **tolerance)
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for i, (old, new) in enumerate(zip(before, now, strict=True)):
            yield from differences(old, new, f"{where}/{i}", **tolerance)
    elif before != now and not (
        tolerance
        and isinstance(before, float | int)
        and isinstance(now, float | int)
        and math.isclose(before, now, **tolerance)
    ):
        yield f"{where.lstrip('/')} was {before}, is {now}"


def test_the_machine_and_its_libraries_are_noted(
    request: pytest.FixtureRequest, golden: Callable[[str, str], None], outcome: dict[str, Any]
) -> None:
    """What decides between equality and four digits: written with the golden files, and it need not be the same."""
    if request.config.getoption("--write-golden"):
        golden("training/machine.json", readable(outcome["machine"]) + "\n")
    assert stored("machine.json").keys() == outcome["machine"].keys()


@pytest.mark.parametrize("name", RUNS)
def test_a_run_gives_the_same_numbers(check: Check, outcome: dict[str, Any], name: str) -> None:
    check(f"results/{name}.json", outcome["runs"][name])


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_has_the_same_losses(check: Check, outcome: dict[str, Any], name: str) -> None:
    assert len(outcome["losses"][name]) == 20
    check(f"losses/{name}.json", outcome["losses"][name])


def test_a_measurement_gives_the_same_scores(check: Check, outcome: dict[str, Any]) -> None:
    check("measure.json", outcome["measure"])


@pytest.mark.parametrize("kind", KEYS)
def test_keys_that_caches_go_by_stay(check: Check, outcome: dict[str, Any], kind: str) -> None:
    check(f"keys/{kind.replace(' ', '-')}.json", outcome["keys"][kind])


def test_everything_computed_is_compared(outcome: dict[str, Any]) -> None:
    assert outcome.keys() == {"machine", "runs", "losses", "measure", "keys"}
    assert outcome["runs"].keys() == RUNS.keys() and outcome["losses"].keys() == RECIPES.keys()
    assert tuple(outcome["keys"]) == KEYS
