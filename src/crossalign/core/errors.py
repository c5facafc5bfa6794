"""What a user did wrong, told in one sentence that names the value, the place and the remedy."""

import difflib
import importlib
from collections.abc import Iterable, Sequence
from typing import Any

SHORT = 12
"""Names that a sentence can hold."""


class UserError(Exception):
    """Bad input. The command line prints the sentence alone and exits with 2; a library caller catches it."""


class BadArgument(UserError, ValueError):
    """A value that a function of the library cannot take: also the ValueError that any function raises then."""


class UnknownName(BadArgument):
    """A name that nothing has."""


def unknown(kind: str, name: Any, known: Iterable[str], listed: str = "") -> UnknownName:
    """An error for a name that no registry holds: it gives the nearest one and the whole list.

    ``listed``: the command that lists a registry too long for a sentence, of which the three nearest names are given.

    >>> raise unknown("metric", "mdd", ["mmd", "mse"])
    Traceback (most recent call last):
    crossalign.core.errors.UnknownName: unknown metric 'mdd'; did you mean 'mmd'? (known: mmd, mse)
    """
    if not isinstance(name, str):
        return UnknownName(f"unknown {kind} {name!r}: give its name (known: {listed or ', '.join(sorted(known))})")
    names = sorted(known)
    # "cka" is the beginning of "cka-rbf", though more like "cca".
    begun = sorted((known for known in names if name and known.startswith(name)), key=len)[:2]
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    guess = begun or near[:1]
    hint = f"; did you mean {' or '.join(map(repr, guess))}?" if guess else ""
    if not listed or len(names) <= SHORT:
        return UnknownName(f"unknown {kind} '{name}'{hint} (known: {', '.join(names)})")
    more = [other for other in near if other not in guess]
    others = f"also near: {', '.join(more)}; " if more else ""
    return UnknownName(f"unknown {kind} '{name}'{hint} ({others}all {len(names)}: {listed})")


def missing_extra(package: str, extra: str, purpose: str) -> UserError:
    """An error for an optional package that is not installed, with the line that installs it."""
    return UserError(f"{purpose} needs the package '{package}': pip install 'crossalign[{extra}]'")


def needed(module: str, extra: str, purpose: str, package: str = "") -> Any:
    """The module of an optional package, imported.

    Raises:
        UserError: the package, of the module's name unless another is given, is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise missing_extra(package or module, extra, purpose) from error


def first_line(error: BaseException) -> str:
    """The first line of an error's text that says anything."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def cause(error: BaseException) -> str:
    """An exception of another's code as a user may read it: its first line, and its name where that says more.

    >>> cause(TypeError("int() argument must be a number")), cause(KeyError("width")), cause(OSError("no route"))
    ('int() argument must be a number', "no entry 'width'", 'OSError: no route')
    """
    text = first_line(error)
    if isinstance(error, LookupError):
        return f"no entry {text}" if isinstance(error, KeyError) else text
    return text if isinstance(error, UserError | TypeError | AttributeError) else f"{type(error).__name__}: {text}"


def some(names: Sequence[str]) -> str:
    """The first three names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
