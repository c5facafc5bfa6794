"""Every published setting and every small-scale sibling, as named functions that return configurations.

A recipe says which of its fields the paper leaves open: ``assumed`` maps each such field to the reason for its value.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from crossalign.config import AdaptConfig
from crossalign.errors import unknown


@dataclass(frozen=True)
class Recipe:
    """A named configuration with its source."""

    name: str
    make: Callable[[], AdaptConfig]
    summary: str
    """One line: what it is, and the place in the paper."""
    assumed: dict[str, str] = field(default_factory=dict)
    """Fields that the paper does not give, and why they hold what they hold."""


RECIPES: dict[str, Recipe] = {}


def get_recipe(name: str) -> Recipe:
    """The recipe called ``name``.

    Raises:
        UserError: there is none; the nearest name is given.
    """
    from crossalign.recipes import cmda  # noqa: F401  registers its recipes

    if name not in RECIPES:
        raise unknown("recipe", name, RECIPES)
    return RECIPES[name]


def all_recipes() -> dict[str, Recipe]:
    """Every recipe by name."""
    from crossalign.recipes import cmda  # noqa: F401

    return RECIPES
