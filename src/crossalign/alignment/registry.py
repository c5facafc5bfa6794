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
            begun = sorted((known for known in self.names() if name and known.startswith(name)), key=len)[:2]
            near = begun or difflib.get_close_matches(name, self.names(), n=1, cutoff=0.5)
            hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
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


class Similarity(Protocol):
    """A score of paired features, `(x, y)`; its attributes say what it may be used for."""

    differentiable: bool
    centred: bool
    ranks_rows: bool
    comparable_across_batch_sizes: bool

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor: ...


similarities: Registry[Similarity] = Registry("similarity")


def register_similarity(
    name: str,
    *,
    differentiable: bool = True,
    centred: bool = False,
    ranks_rows: bool = False,
    comparable_across_batch_sizes: bool = False,
) -> Callable[[F], F]:
    """Decorator: make a function usable by `name` wherever a similarity is asked for.

    The function takes `(x, y)` with shapes (n, p) and (n, q), row i of x being the pair of row i of y, and returns a
    scalar tensor, larger for more alike. The flags become its attributes: `differentiable`, without which it is refused
    as a loss; `centred`, undefined where the rows of a side are all equal; `ranks_rows`, defined there but meaningless,
    since it asks which rows are nearest; `comparable_across_batch_sizes`, whether its mean over batches hardly depends on n.

    >>> @register_similarity("mean-cosine")
    ... def mean_cosine(x, y):
    ...     return torch.cosine_similarity(x, y).mean()
    """

    def add(function: F) -> F:
        entry = cast(Similarity, function)
        entry.differentiable = differentiable
        entry.centred = centred
        entry.ranks_rows = ranks_rows
        entry.comparable_across_batch_sizes = comparable_across_batch_sizes
        similarities.register(name, entry)
        return function

    return add


def get_similarity(name: str) -> Similarity:
    """The similarity of that name. Raises ValueError, with the nearest name, where there is none."""
    return similarities.get(name)


def similarity_names() -> tuple[str, ...]:
    """The names that `get_similarity` knows, sorted."""
    return similarities.names()


penalties: Registry[Callable[..., Tensor]] = Registry("penalty")


def register_penalty(name: str) -> Callable[[F], F]:
    """Decorator: make a function of features (n, p), which returns a scalar tensor to make small, usable by `name`."""

    def add(function: F) -> F:
        penalties.register(name, function)
        return function

    return add


def get_penalty(name: str) -> Callable[..., Tensor]:
    """The penalty of that name. Raises ValueError, with the nearest name, where there is none."""
    return penalties.get(name)


def penalty_names() -> tuple[str, ...]:
    """The names that `get_penalty` knows, sorted."""
    return penalties.names()
