"""The space of a search as data: which fields vary, over what, and when they matter.

A file has a line a field. Choices are a list; numbers have ``low`` and ``high``, with ``log: true`` on a log scale and
``int: true`` for whole ones; ``when`` says on which value of another field this one matters::

    optim.lr: {low: 1.0e-5, high: 1.0e-3, log: true}
    loop.batch_size: [16, 32, 64, 128]
    tune.lora_rank: {choices: [4, 8, 16, 32], when: tune.method == lora}
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from crossalign.config import AdaptConfig, FinetuneConfig, PretrainConfig, to_dict, update
from crossalign.errors import UserError, unknown
from crossalign.training.run import flatten

Config = AdaptConfig | PretrainConfig | FinetuneConfig
Value = float | int | str | bool | None
DEFAULTS: dict[type, str] = {AdaptConfig: "cmda", PretrainConfig: "cmar-pretrain", FinetuneConfig: "cmar-finetune"}
KEYS = ("choices", "low", "high", "log", "int", "when")
FIXED = {
    **dict.fromkeys(("output", "overwrite", "row", "score_test", "tracking"), "the search gives each trial its own"),
    **dict.fromkeys(("seed", "data", "corpus", "prepared", "score", "pairs.split_file"), "trials must be scored alike"),
    **dict.fromkeys(("loop.epochs", "loop.steps", "loop.evaluate_every"), "the rungs count them"),
    **dict.fromkeys(("loop.device", "loop.precision", "loop.compile"), "they are resolved once for all trials"),
}
"""Fields, and sections, that no search may vary, and why."""
VARIABLE = ("data.augment",)
"""What may vary of them all the same."""


@dataclass(frozen=True)
class Field:
    """One field of the space: either ``choices``, or numbers from ``low`` to ``high``."""

    name: str
    choices: tuple[Value, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    integer: bool = False
    when: str = ""
    """"FIELD == VALUE" or "FIELD != VALUE"; empty: always."""

    def as_data(self) -> Any:
        """The field as a file has it."""
        told: dict[str, Any] = {"choices": list(self.choices)} if self.choices else {"low": self.low, "high": self.high}
        told |= {"log": True} if self.log else {}
        told |= {"int": True} if self.integer else {}
        told |= {"when": self.when} if self.when else {}
        return told

    def matters(self, values: Mapping[str, Any]) -> bool:
        """Whether ``when`` holds for settings by field name."""
        if not self.when:
            return True
        name, sign, value = _condition(self.when)
        return (str(values[name]) == value) == (sign == "==")

    @property
    def examples(self) -> tuple[Value, ...]:
        """Values that must be possible if all are."""
        if self.choices:
            return self.choices
        return (int(self.low), int(self.high)) if self.integer else (self.low, self.high)


@dataclass(frozen=True)
class Space:
    """Fields in the order in which they are drawn; one that another's ``when`` names stands before it."""

    fields: tuple[Field, ...]

    def of(self, config: Config) -> Space:
        """The part that can matter to ``config``: what hangs on a field that the space does not vary is decided now."""
        known = flatten(to_dict(config))
        varied = {field.name for field in self.fields}
        return Space(tuple(f for f in self.fields if not f.when or _condition(f.when)[0] in varied or f.matters(known)))

    def draw(self, config: Config, seed: int) -> dict[str, Value]:
        """Settings drawn at random by Optuna's sampler, the same for the same ``seed``; a field that does not matter is out."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        trial = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed)).ask()
        values, drawn = flatten(to_dict(config)), {}
        for field in self.fields:
            if field.matters(values):
                values[field.name] = drawn[field.name] = _suggest(trial, field)
        return drawn

    def distributions(self, drawn: Mapping[str, Value]) -> dict[str, Any]:
        """Optuna's distribution of each field drawn, for its record."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        def of(field: Field) -> Any:
            if field.choices:
                return CategoricalDistribution(field.choices)
            if field.integer:
                return IntDistribution(int(field.low), int(field.high), log=field.log)
            return FloatDistribution(field.low, field.high, log=field.log)

        return {field.name: of(field) for field in self.fields if field.name in drawn}

    def as_data(self) -> dict[str, Any]:
        """The space as its file has it."""
        return {field.name: field.as_data() for field in self.fields}

    def text(self) -> str:
        """The space as the text of a file."""

        def told(value: Any) -> str:
            return str(yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=1000)).strip()

        data = {f.name: list(f.choices) if f.choices and not f.when else f.as_data() for f in self.fields}
        return "".join(f"{name}: {told(value)}\n" for name, value in data.items())


def open_space(ref: str, config: Config) -> Space:
    """The space in the file or of the name ``ref``, or the usual one of the recipe's verb, checked against ``config``.

    Raises:
        UserError: no such file or name; a field that the configuration does not have (the nearest is named), that the search
            itself needs, or whose values it cannot hold; names the file and the field.
    """
    known = sorted(path.name.removesuffix(".yaml") for path in (files("crossalign.search") / "spaces").iterdir())
    if ref.endswith((".yaml", ".yml")):
        try:
            text = Path(ref).read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(f"--space {ref} cannot be read: {error.strerror}") from error
    elif (name := ref or DEFAULTS[type(config)]) in known:
        text = (files("crossalign.search") / "spaces" / f"{name}.yaml").read_text(encoding="utf-8")
    else:
        raise unknown("space", ref, known, listed="or a file that ends in .yaml")
    place = f"--space {ref}" if ref else f"the space '{DEFAULTS[type(config)]}'"
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{place} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict) or not data:
        raise UserError(
            f"{place} holds no fields: write a line a field, such as 'optim.lr: {{low: 1e-5, high: 1e-3, log: true}}'"
        )
    space = Space(tuple(_read_field(str(name), value, place) for name, value in data.items()))
    _check(space, config, place)
    return space.of(config)


def nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by field name as nested sections, as ``update`` takes them."""
    values: dict[str, Any] = {}
    for name, value in settings.items():
        *sections, last = name.split(".")
        place = values
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    return values


def _suggest(trial: Any, field: Field) -> Value:
    if field.choices:
        return trial.suggest_categorical(field.name, field.choices)  # type: ignore[no-any-return]
    if field.integer:
        return trial.suggest_int(field.name, int(field.low), int(field.high), log=field.log)  # type: ignore[no-any-return]
    return trial.suggest_float(field.name, field.low, field.high, log=field.log)  # type: ignore[no-any-return]


def _read_field(name: str, value: Any, place: str) -> Field:
    where = f"{place}, field '{name}'"
    if isinstance(value, list):
        value = {"choices": value}
    if not isinstance(value, dict):
        raise UserError(f"{where}, holds {value!r}: give a list of choices, or low and high")
    for key in value:
        if key not in KEYS:
            raise unknown(f"key in {where}", str(key), KEYS)
    when = str(value.get("when", ""))
    if when:
        _condition(when, where)
    if "choices" in value:
        choices = value["choices"]
        if not isinstance(choices, list) or not choices or any(isinstance(choice, list | dict) for choice in choices):
            raise UserError(f"{where}, has choices {choices!r}: give a list of plain values")
        return Field(name, choices=tuple(dict.fromkeys(_number_if_one(choice) for choice in choices)), when=when)
    low, high = (_number_if_one(value.get(key)) for key in ("low", "high"))
    if not all(isinstance(end, int | float) and not isinstance(end, bool) for end in (low, high)):
        raise UserError(f"{where}, needs choices, or low and high as numbers; it holds {value!r}")
    log, integer = bool(value.get("log", False)), bool(value.get("int", False))
    if not low <= high or (log and low <= 0) or (integer and (int(low) != low or int(high) != high)):
        raise UserError(
            f"{where}, goes from {low} to {high}: low must not be above high, a log scale begins above 0, and whole numbers "
            "have whole ends"
        )
    return Field(name, low=float(low), high=float(high), log=log, integer=integer, when=when)


def _number_if_one(value: Any) -> Any:
    """YAML 1.1 reads 1e-5 as text."""
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value):
        return float(value)
    return value


def _condition(when: str, where: str = "") -> tuple[str, str, str]:
    found = re.fullmatch(r"\s*(\S+)\s*(==|!=)\s*(\S+)\s*", when)
    if found is None:
        raise UserError(f"{where}, has when: {when!r}: write FIELD == VALUE or FIELD != VALUE")
    return found[1], found[2], found[3]


def _check(space: Space, config: Config, place: str) -> None:
    known, before = flatten(to_dict(config)), set()
    for field in space.fields:
        for start, why in FIXED.items():
            if (field.name == start or field.name.startswith(f"{start}.")) and not field.name.startswith(VARIABLE):
                raise UserError(f"{place} varies '{field.name}', which a search cannot: {why}")
        for value in field.examples:
            update(config, nested({field.name: value}), f"{place}: ")
        before.add(field.name)
        if field.when:
            other = _condition(field.when)[0]
            if other not in known:
                raise unknown(f"field in {place}, 'when' of '{field.name}'", other, known)
            if other in {f.name for f in space.fields} - before:
                raise UserError(f"{place}: '{field.name}' hangs on '{other}', which must stand before it")
