"""Names for measures, so that a configuration or the command line can ask for one, a user's own included."""

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from torch import Tensor

from crossalign.core.registry import Registry

F = TypeVar("F", bound=Callable[..., Any])
GROUP = "crossalign.metrics"
"""Entry points of plug-ins that register measures."""


class Divergence(Protocol):
    """A distance of two samples: `(x, y)`, or `(x, x_labels, y, y_labels)` where `needs_labels` is true."""

    needs_labels: bool

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor: ...


divergences: Registry[Divergence] = Registry("divergence", group=GROUP)


def register_divergence(name: str, *, needs_labels: bool = False) -> Callable[[F], F]:
    """Decorator: make a function usable by `name` wherever a divergence is asked for.

    The function takes `(x, y)` with shapes (n, d) and (m, d) and returns a scalar tensor that is differentiable in x;
    with `needs_labels` it takes `(x, x_labels, y, y_labels)`. The flag becomes its attribute of the same name.

    >>> @register_divergence("mean-distance")
    ... def mean_distance(x, y):
    ...     return (x.mean(0) - y.mean(0)).norm()
    """
    return divergences.register(name, needs_labels=needs_labels)


def get_divergence(name: str) -> Divergence:
    """The divergence of that name. Raises ValueError, with the nearest name, where there is none."""
    return divergences[name]


class Similarity(Protocol):
    """A score of paired features, `(x, y)`; its attributes say what it may be used for."""

    differentiable: bool
    centred: bool
    ranks_rows: bool
    comparable_across_batch_sizes: bool

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor: ...


similarities: Registry[Similarity] = Registry("similarity", group=GROUP)


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
    return similarities.register(
        name,
        differentiable=differentiable,
        centred=centred,
        ranks_rows=ranks_rows,
        comparable_across_batch_sizes=comparable_across_batch_sizes,
    )


def get_similarity(name: str) -> Similarity:
    """The similarity of that name. Raises ValueError, with the nearest name, where there is none."""
    return similarities[name]


penalties: Registry[Callable[..., Tensor]] = Registry("penalty", group=GROUP)


def register_penalty(name: str) -> Callable[[F], F]:
    """Decorator: make a function of features (n, p), which returns a scalar tensor to make small, usable by `name`."""
    return penalties.register(name)


def get_penalty(name: str) -> Callable[..., Tensor]:
    """The penalty of that name. Raises ValueError, with the nearest name, where there is none."""
    return penalties[name]
