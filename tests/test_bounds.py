"""Every setting has a type and, where it is a number, a bound; one function holds a configuration against them."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import pytest
from fields import numbers

from crossalign.cli import VERBS, load_verb, main
from crossalign.config import AdaptConfig, update, validate
from crossalign.config.bounds import Bound
from crossalign.core.errors import UserError
from crossalign.recipes import all_recipes

CONFIGS = tuple(kind for name in VERBS for kind in (load_verb(name).args, *(load_verb(name).recipes or {}).values()))
CONFIGS = tuple(dict.fromkeys(CONFIGS))
NAN, INF = math.nan, math.inf


def make(kind: type) -> Any:
    """An instance, with something in the fields that have no default."""
    empty = (dataclasses.MISSING, dataclasses.MISSING)
    needed = [f.name for f in dataclasses.fields(kind) if (f.default, f.default_factory) == empty]
    return kind(**{name: {"runs": [Path("r")], "images": [Path("i")]}.get(name, "m") for name in needed})


def has_bound(hint: Any) -> bool:
    if get_origin(hint) is Annotated and any(isinstance(entry, Bound) for entry in get_args(hint)):
        return True
    return any(has_bound(option) for option in get_args(hint) if get_origin(hint) is not None)


FIELDS = [(kind, name, hint) for kind in CONFIGS for name, hint in numbers(kind)]


@pytest.mark.parametrize("kind,name,hint", FIELDS, ids=lambda value: getattr(value, "__name__", str(value))[:50])
def test_no_number_is_without_a_bound(kind: type, name: str, hint: Any) -> None:
    assert has_bound(hint)


@pytest.mark.parametrize("kind,name,hint", FIELDS, ids=lambda value: getattr(value, "__name__", str(value))[:50])
@pytest.mark.parametrize("value", [NAN, INF, -INF, -1, -0.5, "3", True, 10**40, Path("1")], ids=str)
def test_what_is_no_number_for_a_field_is_refused_by_name(kind: type, name: str, hint: Any, value: Any) -> None:
    config = make(kind)
    *sections, last = name.split(".")
    section = config
    for part in sections:
        section = getattr(section, part)
    several = any(get_origin(option) is tuple for option in (hint, *get_args(hint)))
    setattr(section, last, (value,) * max(1, len(getattr(section, last) or ())) if several else value)
    if last in ("mean", "weights") and value in (-1, -0.5):
        return  # these may be negative
    with pytest.raises(UserError) as refused:
        validate(config)
    assert str(refused.value).startswith(f"--{name.replace('_', '-')} is ") and " must be " in str(refused.value).replace(
        "lie", "be"
    )


def option_calls() -> Iterator[tuple[str, str, float]]:
    """A call of each verb, or kind of recipe, each of its numeric fields, and the largest that this may be."""
    needed = {"predict": "MODEL IMAGE", "evaluate": "MODEL", "compare": "RUN", "report": "RUN", "reproduce": "cmda-table1"}
    for verb in VERBS:
        for config, kind in (load_verb(verb).recipes or {None: load_verb(verb).args}).items():
            recipe = next(iter(all_recipes(config)), "") if config else needed.get(verb, "")
            for name, hint in numbers(kind):
                yield f"{verb} {recipe}", name, bounds_of(hint)[0].high


def bounds_of(hint: Any) -> list[Bound]:
    return [b for b in get_args(hint) if isinstance(b, Bound)] or [b for option in get_args(hint) for b in bounds_of(option)]


@pytest.mark.parametrize("call,name,most", list(option_calls()))
def test_every_verb_refuses_a_number_beyond_its_bound_before_it_touches_anything(
    call: str, name: str, most: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    option = f"--{name.replace('_', '-')}"
    beyond = f"{most * 2:g}" if isinstance(most, float) else str(most + 1)
    count = 2 if name == "optim.betas" else 1
    assert main([*call.split(), option, *[beyond] * count]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"crossalign: {option} is ") and said.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", all_recipes())
def test_recipes_are_inside_their_bounds(name: str) -> None:
    validate(all_recipes()[name].make())


@pytest.mark.parametrize(
    "values,message",
    [
        ({"optim": {"betas": [0.9, 2.0]}}, "--optim.betas is 0.9 2.0; each must be from 0 to 0.999999"),
        ({"optim": {"betas": [0.9]}}, "--optim.betas has 1 values; it must have 2"),
        ({"seed": 2**32}, "--seed is 4294967296; it must be a whole number from 0 to 4294967295"),
        ({"data": {"std": [0.5, 0.0, 0.5]}}, "--data.std is 0.5 0.0 0.5; each must be at least 1e-06"),
        ({"data": {"validation_fraction": 1.0}}, "--data.validation-fraction is 1.0; it must lie between 0 and 1"),
        ({"data": {"augment": {"fill": 256}}}, "--data.augment.fill is 256; it must lie between 0 and 255"),
    ],
)
def test_errors_name_the_option_its_value_and_what_it_must_be(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as refused:
        validate(update(AdaptConfig(), values))
    assert str(refused.value) == message


def test_types_are_held_too() -> None:
    for field, value, words in (("output", "runs/x", "pathlib.Path"), ("row", 3, "text"), ("score_test", 1, "True or False")):
        with pytest.raises(UserError, match=re.escape(f"--{field.replace('_', '-')} is {value!r}; it must be ") + f".*{words}"):
            validate(dataclasses.replace(AdaptConfig(), **{field: value}))
    config = AdaptConfig(output=Path("x"))
    config.data.channels = "bgr"  # type: ignore[assignment]
    with pytest.raises(UserError, match=r"unknown value for --data\.channels 'bgr'"):
        validate(config)
