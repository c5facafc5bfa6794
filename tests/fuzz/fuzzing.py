"""What the fuzzers share: a verb called in this process and how it ended, an alarm, the number of examples, and counts."""

from __future__ import annotations

import contextlib
import io
import os
import re
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.strategies import SearchStrategy

from crossalign import UserError, cli

EXAMPLES = int(os.environ.get("CROSSALIGN_FUZZ_EXAMPLES", "5000"))
"""Of the slow run, over all tests of a file."""
SEED = os.environ.get("CROSSALIGN_FUZZ_SEED")
"""Draws other examples; without it every run draws the same."""
SECONDS = 10.0
COUNTS: Counter[str] = Counter()
"""What was done, for the end of the slow run."""
NOTES = re.compile(r"crossalign: (\d+ of \d+ images could not be read$|warning: )")
"""Lines for the user beside which the verb goes on."""

FAILED = re.compile(r"^(?:failed: \S+|seed \d+ of the winner failed): (.*)$", re.MULTILINE)
"""What a study says of one of its runs, while the others finish."""


class Hang(BaseException):
    """A call took longer than ``SECONDS``."""


class Began(BaseException):
    """The work would begin: all checks have passed."""


@dataclass(frozen=True)
class Ending:
    """How a call ended."""

    code: int | str
    """The exit code; "began" where the work would have begun, "hang", or "traceback"."""
    output: str
    errors: str

    @property
    def sentence(self) -> str:
        """What was said of bad input, after "crossalign: "."""
        lines = [line for line in self.errors.splitlines() if line.startswith("crossalign: ") and not NOTES.match(line)]
        return lines[-1].removeprefix("crossalign: ") if lines else ""

    @property
    def fault(self) -> str:
        """Why this is no good end; empty where it is one."""
        if self.code in ("hang", "traceback"):
            return str(self.code)
        if self.code == 1 and (told := re.findall(FAILED, self.errors)):
            return "".join(map(fault_of, told))
        if self.code != 2:
            return "" if self.code in (0, "began") else f"exit code {self.code}"
        if "For full helptext, see" in self.errors:  # the parser's own message, of what is no value of an option
            return ""
        return fault_of(self.sentence)


def fault_of(sentence: str) -> str:
    """What an error's sentence lacks."""
    if not sentence or "\n" in sentence:
        return f"not one sentence: {sentence!r}"
    if re.search(
        r"\b(UserError|BadArgument|AttributeError|KeyError|TypeError|IndexError|Traceback)\b|<class '|object at 0x", sentence
    ):
        return f"the name of an exception: {sentence!r}"
    return f"too long: {sentence[:200]!r}…" if len(sentence) > 1000 else ""


def call(*arguments: str, seconds: float = SECONDS) -> Ending:
    """``crossalign ARGUMENTS`` in this process."""
    COUNTS["calls"] += 1
    COUNTS[f"verb {arguments[0]}"] += 1
    output, errors, argv = io.StringIO(), io.StringIO(), sys.argv
    code: int | str
    sys.argv = ["crossalign", *arguments]
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors), alarm(seconds):
            code = cli.main(list(arguments))
    except Began:
        code = "began"
    except Hang:
        code = "hang"
        errors.write(traceback.format_exc())
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except Exception:
        code = "traceback"
        errors.write(traceback.format_exc())
    finally:
        sys.argv = argv
    return Ending(code, output.getvalue(), errors.getvalue())


@contextlib.contextmanager
def alarm(seconds: float = SECONDS) -> Iterator[None]:
    """Raise Hang in the block after so many seconds; a timer that runs already, as a test's own, goes on after it."""

    def ring(number: int, frame: Any) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, ring)
    left, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, left)
        signal.signal(signal.SIGALRM, before)


def refused(error: BaseException) -> str:
    """Why an exception of the library is no good refusal; empty where it is one."""
    if not isinstance(error, UserError | ValueError):
        return "".join(traceback.format_exception(error))
    return fault_of(str(error))


def amounts(short: int, share: float = 1.0) -> Any:
    """Run a test with few examples, and with its ``share`` of ``EXAMPLES`` where slow tests run."""
    slow = pytest.param(max(1, int(EXAMPLES * share)), marks=[pytest.mark.slow, pytest.mark.timeout(7200)], id="slow")
    return pytest.mark.parametrize("amount", [pytest.param(short, id="short"), slow])


def explore(check: Callable[..., None], strategy: SearchStrategy[Any], amount: int) -> None:
    """Hold ``check`` against so many examples of a strategy; a failing one is made as small as may be."""
    phases = (Phase.explicit, Phase.generate, Phase.shrink)
    profile = settings(
        max_examples=amount,
        deadline=None,
        database=None,
        derandomize=SEED is None,
        phases=phases,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
        report_multiple_bugs=False,
    )
    test = profile(given(strategy)(check))
    (test if SEED is None else seed(int(SEED))(test))()
    COUNTS["examples"] += amount
