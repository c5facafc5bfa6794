"""Names for measures, so that a configuration or the command line can ask for one, a user's own included."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar, cast

from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])


class Registry(Generic[F]):
    """Functions of one kind by name.

    `kind` is the word for error messages, such as "divergence".
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._functions: dict[str, F] = {}

    def register(self, name: str, function: F) -> None:
        """Add a function. Raises ValueError where another function holds the name.

        The same function may come again, as it does when its notebook cell is run twice.
        """
        held = self._functions.get(name)
        if held is not None and _identity(held) != _identity(function):
            raise ValueError(f"the {self.kind} '{name}' is registered already; give yours another name")
        self._functions[name] = function

    def get(self, name: str) -> F:
        """The function of that name. Raises ValueError with the nearest name where there is none."""
        try:
            return self._functions[name]
        except KeyError:
            near = difflib.get_close_matches(name, self.names(), n=1, cutoff=0.5)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise ValueError(f"unknown {self.kind} '{name}'{hint} (known: {', '.join(self.names())})") from None

    def names(self) -> tuple[str, ...]:
        """All names, sorted."""
        return tuple(sorted(self._functions))


def _identity(function: Callable[..., Any]) -> tuple[Any, Any]:
    return getattr(function, "__module__", None), getattr(function, "__qualname__", function)


class Divergence(Protocol):
    """A distance of two samples: `(x, y)`, or `(x, x_labels, y, y_labels)` where `needs_labels` is true."""

    needs_labels: bool

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor: ...


divergences: Registry[Divergence] = Registry("divergence")


def register_divergence(name: str, *, needs_labels: bool = False) -> Callable[[F], F]:
    """Decorator: make a function usable by `name` wherever a divergence is asked for.

    The function takes `(x, y)` with shapes (n, d) and (m, d) and returns a scalar tensor that is differentiable in x;
    with `needs_labels` it takes `(x, x_labels, y, y_labels)`. The flag becomes its attribute of the same name.

    >>> @register_divergence("mean-distance")
    ... def mean_distance(x, y):
    ...     return (x.mean(0) - y.mean(0)).norm()
    """

    def add(function: F) -> F:
        entry = cast(Divergence, function)
        entry.needs_labels = needs_labels
        divergences.register(name, entry)
        return function

    return add


def get_divergence(name: str) -> Divergence:
    """The divergence of that name. Raises ValueError, with the nearest name, where there is none."""
    return divergences.get(name)


def divergence_names() -> tuple[str, ...]:
    """The names that `get_divergence` knows, sorted."""
    return divergences.names()
