"""The verbs: each stands in one file or package, with its arguments, what runs them and what is printed.

The files that the command line imports to print a verb's help import nothing heavy; what runs it is imported when it runs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Verb:
    """One verb: the class that parses its arguments, and what runs them."""

    args: type
    run: Callable[[Any, str], int | str | None]
    """Called with the arguments and the recipe's name, "" for none; returns what the first process prints at the end, or the
    exit code, None for 0."""
    recipes: Mapping[type, type] | None = None
    """Classes of configuration whose recipes its first word may name, each with the class that then parses the arguments; the
    first is for a call without a recipe. Empty: recipes of any verb, which leave its options as they are."""
