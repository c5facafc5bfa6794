"""What a user did wrong, told in one sentence that names the value, the place and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input. The command line prints the sentence alone and exits with 2; a library caller catches it."""


def unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
    """An error for a name that no registry holds: it gives the nearest one, or the whole list.

    >>> raise unknown("metric", "mdd", ["mmd", "mse"])
    Traceback (most recent call last):
    crossalign.errors.UserError: unknown metric 'mdd'; did you mean 'mmd'? (known: mmd, mse)
    """
    names = sorted(known)
    # "cka" is the beginning of "cka-rbf", though more like "cca".
    begun = sorted((known for known in names if name and known.startswith(name)), key=len)[:2]
    near = begun or difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
    return UserError(f"unknown {kind} '{name}'{hint} (known: {', '.join(names)})")


def missing_extra(package: str, extra: str, purpose: str) -> UserError:
    """An error for an optional package that is not installed, with the line that installs it."""
    return UserError(f"{purpose} needs the package '{package}': pip install 'crossalign[{extra}]'")
