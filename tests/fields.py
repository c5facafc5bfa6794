"""The numeric fields of settings, as tests go through them."""

import dataclasses
from collections.abc import Iterator
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints


def numbers(kind: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Each numeric field with its type, sections opened."""
    for name, hint in get_type_hints(kind, include_extras=True).items():
        if dataclasses.is_dataclass(hint):
            yield from numbers(hint, f"{place}{name}.")
        elif {int, float} & set(leaves(hint)):
            yield place + name, hint


def leaves(hint: Any) -> Iterator[Any]:
    """The plain types in a type of a field."""
    if get_origin(hint) is Annotated:
        yield from leaves(get_args(hint)[0])
    elif get_origin(hint) in (Union, UnionType, tuple):
        for option in get_args(hint):
            yield from leaves(option)
    else:
        yield hint
