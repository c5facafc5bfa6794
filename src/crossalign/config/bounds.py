"""Bounds of settings: each stands in the type of its field, and one function holds a configuration against all of them."""

import dataclasses
import math
import re
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from crossalign.core.errors import UserError, unknown
from crossalign.core.reading import user_path

ABOVE_0, BELOW_1 = math.nextafter(0, 1), math.nextafter(1, 0)


@dataclass(frozen=True)
class Bound:
    """The numbers that a setting may be; nan is none of them."""

    words: str
    """What follows "it must" in the error."""
    low: float
    high: float
    too_large: str = ""
    """What follows "it must" where a number is too large; empty for ``words``."""

    def refuses(self, value: float) -> str:
        """What ``value`` must be; empty where it lies inside."""
        if self.low <= value <= self.high:
            return ""
        return self.too_large if self.too_large and value > self.high else self.words


def at_least(low: int, most: int = 2**31 - 1) -> Bound:
    """Whole numbers from ``low`` to ``most``, usually the largest that every part of a run can count to."""
    return Bound(f"be at least {low}", low, most, too_large=f"be at most {most}")


def between(low: float, high: float) -> Bound:
    """Numbers between two others, these included."""
    return Bound(f"lie between {low:g} and {high:g}", low, high)


Count = Annotated[int, at_least(1)]
Size = Annotated[int, at_least(1, 2**20)]
"""What is held in memory at once: widths, batches, tokens."""
Layers = Annotated[int, at_least(1, 1024)]
Side = Annotated[int | None, at_least(1, 8192)]
"""Of an image, in pixels."""
Limit = Annotated[int | None, at_least(1)]
"""None sets none."""
Whole = Annotated[int, at_least(0)]
Seed = Annotated[int, Bound("be a whole number from 0 to 4294967295", 0, 2**32 - 1)]
"""What every generator that training seeds can take."""
LARGE = 1e30
"""Far beyond what any setting is for, and far inside what fp32 holds."""
Amount = Annotated[float, Bound("be a finite number, 0 or more", 0, LARGE, too_large=f"be at most {LARGE:g}")]
Share = Annotated[float, Bound("be a share from 0 to 1", 0, 1)]
PositiveShare = Annotated[float, Bound("be above 0, and at most 1", ABOVE_0, 1)]
Fraction = Annotated[float, Bound("lie between 0 and 1", ABOVE_0, BELOW_1)]
"""A share that leaves something on both sides."""
Probability = Annotated[float, Bound("be from 0 to 0.999999", 0, 0.999999)]
"""Nearer to 1, what is divided by the rest is lost in rounding."""
Finite = Annotated[float, between(-LARGE, LARGE)]
Positive = Annotated[float, Bound("be above 0", ABOVE_0, LARGE, too_large=f"be at most {LARGE:g}")]
Scale = Annotated[float, Bound("be at least 1e-06", 1e-6, LARGE, too_large=f"be at most {LARGE:g}")]
"""What is divided by."""


def validate(config: Any, prefix: str = "") -> None:
    """Hold every field of a configuration, and of its sections, against its type and its bound.

    Args:
        config: an instance of a dataclass of settings.
        prefix: what its options begin with, such as ``data.``; "" for a verb's own configuration.

    Raises:
        UserError: naming the option, its value, and what it must be.
    """
    hints = get_type_hints(type(config), include_extras=True)
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            validate(value, f"{name}.")
        else:
            _check(value, hints[field.name], f"--{name.replace('_', '-')}", value, "it")


def _check(value: Any, hint: Any, option: str, whole: Any, subject: str) -> None:
    """``value`` as the field ``whole``, or an entry of it, against the field's type."""
    origin, options = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        if value is None and NoneType in options:
            return
        hint = next(option for option in options if option is not NoneType)
        return _check(value, hint, option, whole, subject)
    if origin is Annotated:
        _check(value, options[0], option, whole, subject)
        for bound in (entry for entry in options[1:] if isinstance(entry, Bound) and value is not None):
            if words := bound.refuses(value):
                raise UserError(f"{option} is {_text(whole)}; {subject} must {words}")
    elif origin is Literal:
        if value not in options:
            raise unknown(f"value for {option}", str(value), map(str, options))
    elif origin in (tuple, list):
        if not isinstance(value, tuple | list):
            raise UserError(f"{option} is {value!r}; it must be a tuple")
        several = origin is list or options[-1] is Ellipsis
        if not several and len(value) != len(options):
            raise UserError(f"{option} has {len(value)} values; it must have {len(options)}")
        for entry, kind in zip(value, [options[0]] * len(value) if several else options, strict=True):
            _check(entry, kind, option, whole, "each")
    elif isinstance(value, Path) and hint is Path:
        user_path(value)  # says what can be no path
    elif isinstance(value, str) and hint is str and re.search("[\0\ud800-\udfff]", value):
        raise UserError(f"{option} is {value!r}; {subject} must be text that a file can hold")
    elif not _is_a(value, hint):
        raise UserError(f"{option} is {value!r}; {subject} must be {_WORDS.get(hint, hint.__name__)}")


_WORDS: dict[Any, str] = {int: "a whole number", float: "a number", str: "text", bool: "True or False", Path: "a pathlib.Path"}


def _is_a(value: Any, kind: Any) -> bool:
    if kind in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, int | float if kind is float else kind)


def _text(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)
