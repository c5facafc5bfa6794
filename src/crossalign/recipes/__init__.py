"""Every published setting and every small-scale sibling, as named functions that return configurations.

A recipe says which of its fields the paper leaves open: ``assumed`` maps each such field to the reason for its value.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from crossalign.core.errors import UserError, unknown
from crossalign.core.registry import Registry

F = TypeVar("F", bound=Callable[[], Any])


@dataclass(frozen=True)
class Recipe:
    """A named configuration with its source."""

    name: str
    make: Callable[[], Any]
    """An AdaptConfig, PretrainConfig or FinetuneConfig."""
    summary: str
    """One line: what it is, and the place in the paper."""
    assumed: dict[str, str] = field(default_factory=dict)
    """Fields that the paper does not give, and why they hold what they hold."""


RECIPES: Registry[Recipe] = Registry("recipe")


def register_recipe(name: str, summary: str, assumed: dict[str, str] | None = None) -> Callable[[F], F]:
    """Decorator: make a function that returns a configuration usable by ``name``; see :class:`Recipe` for the rest."""

    def register(make: F) -> F:
        RECIPES.register(name, Recipe(name, make, summary, assumed or {}))
        return make

    return register


def get_recipe(name: str, kind: type | tuple[type, ...] | None = None) -> Recipe:
    """The recipe called ``name``, of configurations of class ``kind`` (or one of several) if that is given.

    Raises:
        UserError: there is none, and the nearest names are given; or it is another verb's.
    """
    recipes = all_recipes()
    if name not in recipes:
        kinds = kind if isinstance(kind, tuple) else (kind,)
        verb = verb_of(kinds[0]) if len(kinds) == 1 and kinds[0] else "plan"  # which takes them all
        raise unknown("recipe", name, all_recipes(kind), listed=f"crossalign {verb} --list")
    if kind and not isinstance(recipes[name].make(), kind):
        raise UserError(f"'{name}' is a recipe of crossalign {verb_of(type(recipes[name].make()))}")
    return recipes[name]


def verb_of(kind: type) -> str:
    """The verb that a class of configurations belongs to."""
    return kind.__name__.removesuffix("Config").lower()


def all_recipes(kind: type | tuple[type, ...] | None = None) -> dict[str, Recipe]:
    """Every recipe by name; those of configurations of class ``kind`` if that is given."""
    from crossalign.recipes import cmar, cmda  # noqa: F401  they register their recipes

    return {name: recipe for name, recipe in RECIPES.items() if kind is None or isinstance(recipe.make(), kind)}
