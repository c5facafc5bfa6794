"""The space of a search as data: which fields vary, over what, and when they matter.

A file has a line a field. Choices are a list; numbers have ``low`` and ``high``, with ``log: true`` on a log scale and
``int: true`` for whole ones; ``when`` says on which value of another field (``==``, or ``!=`` for all but one) it matters::

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

from crossalign.config import AdaptConfig, FinetuneConfig, PretrainConfig, flatten, to_dict, update
from crossalign.config.effect import When
from crossalign.core.errors import UserError, unknown
from crossalign.core.reading import parse_yaml, read_yaml, user_path
from crossalign.core.registry import Registry

Config = AdaptConfig | PretrainConfig | FinetuneConfig
Value = float | int | str | bool | None
DEFAULTS: dict[type, str] = {AdaptConfig: "cmda", PretrainConfig: "cmar-pretrain", FinetuneConfig: "cmar-finetune"}
_FILES = {path.name.removesuffix(".yaml"): path for path in (files("crossalign.recipes") / "spaces").iterdir()}
SPACES = Registry("space", _FILES, listed="or a file that ends in .yaml")
KEYS = ("choices", "low", "high", "log", "int", "when")
FIXED = {
    **dict.fromkeys(("output", "overwrite", "row", "score_test", "tracking"), "the search gives each trial its own"),
    **dict.fromkeys(("seed", "data", "corpus", "prepared", "score", "pairs.split_file"), "trials must be scored alike"),
    **dict.fromkeys(("block", "loop.evaluate_blocks", "model"), "losses would not be of the same tokens"),
    **dict.fromkeys(("loop.epochs", "loop.steps", "loop.evaluate_every"), "the rungs count them"),
    **dict.fromkeys(("loop.device", "loop.precision", "loop.compile"), "they are resolved once for all trials"),
}
"""Fields, and sections, that no search may vary, and why."""
VARIABLE = ("data.augment",)
"""What may vary of them all the same."""
NUMBER = re.compile(r"[-+]?((\d+\.?\d*|\.\d+)e[-+]?\d+|inf|infinity|nan)", re.IGNORECASE)
"""What a setting takes for a number and YAML 1.1 reads as text, such as 1e-5."""


@dataclass(frozen=True)
class Field:
    """One field of the space: either ``choices``, or numbers from ``low`` to ``high``."""

    name: str
    choices: tuple[Value, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    integer: bool = False
    when: When | None = None

    def as_data(self) -> Any:
        """The field as a file has it."""
        data: dict[str, Any] = {"choices": list(self.choices)} if self.choices else {"low": self.low, "high": self.high}
        data |= {"log": True} if self.log else {}
        data |= {"int": True} if self.integer else {}
        data |= {"when": self.when.text} if self.when else {}
        return data

    def matters(self, values: Mapping[str, Any]) -> bool:
        """Whether the field matters beside settings by field name."""
        return self.when is None or self.when.holds(values)

    def holds(self, value: Any) -> bool:
        """Whether a trial may have ``value``."""
        return value in self.choices if self.choices else isinstance(value, int | float) and self.low <= value <= self.high

    @property
    def distribution(self) -> Any:
        """The same as Optuna has it."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        if self.choices:
            return CategoricalDistribution(self.choices)
        if self.integer:
            return IntDistribution(int(self.low), int(self.high), log=self.log)
        return FloatDistribution(self.low, self.high, log=self.log)

    @property
    def examples(self) -> tuple[Value, ...]:
        """Values that must be possible if all are."""
        return self.choices or ((int(self.low), int(self.high)) if self.integer else (self.low, self.high))


@dataclass(frozen=True)
class Space:
    """Fields in the order in which they are drawn; one that another's ``when`` names stands before it."""

    fields: tuple[Field, ...]

    def of(self, config: Config) -> Space:
        """The part that can matter to ``config``: what hangs on a field that the space does not vary is decided now."""
        given, fields = self._given(config), dict[str, Field]()
        for field in self.fields:
            if field.matters(given) or (field.when and field.when.name in fields):
                fields[field.name] = field
        return Space(tuple(fields.values()))

    def inside(self, config: Config) -> Config:
        """``config`` with values of the space where its own are none, so that what fails with it is no trial's fault."""
        settings = flatten(to_dict(config))
        outside = [field for field in self.fields if not field.holds(settings[field.name])]
        return update(config, nested({field.name: field.examples[0] for field in outside}))

    def _given(self, config: Config) -> dict[str, Any]:
        """The settings of ``config`` that the space does not vary."""
        varied = {field.name for field in self.fields}
        return {name: value for name, value in flatten(to_dict(config)).items() if name not in varied}

    def draw(self, config: Config, seed: int) -> dict[str, Value]:
        """Settings drawn at random by Optuna's sampler, the same for the same ``seed``; a field that does not matter is out."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
        values, drawn = self._given(config), dict[str, Value]()
        for field in self.fields:
            if field.matters(values):
                trial = study.ask({field.name: field.distribution})  # whether the next one matters hangs on it
                values |= trial.params
                drawn |= trial.params
        return drawn

    def distributions(self, drawn: Mapping[str, Value]) -> dict[str, Any]:
        """Optuna's distribution of each field drawn, for its record."""
        return {field.name: field.distribution for field in self.fields if field.name in drawn}

    def as_data(self) -> dict[str, Any]:
        """The space as its file has it."""
        return {field.name: field.as_data() for field in self.fields}

    def text(self) -> str:
        """The space as the text of a file."""
        data = {f.name: list(f.choices) if f.choices and not f.when else f.as_data() for f in self.fields}
        lines = {name: yaml.safe_dump(d, default_flow_style=True, sort_keys=False, width=1000) for name, d in data.items()}
        return "".join(f"{name}: {value.strip()}\n" for name, value in lines.items())


def open_space(ref: str, config: Config) -> Space:
    """The space in the file or of the name ``ref``, or the usual one of the recipe's verb, checked against ``config``.

    Raises:
        UserError: no such file or name; a field that the configuration does not have (the nearest is named), that the search
            itself needs, or whose values it cannot hold; a ``when`` that can never hold; nothing that matters to ``config``.
    """
    origin = f"--space {ref}" if ref else f"the space '{DEFAULTS[type(config)]}'"
    if ref.endswith((".yaml", ".yml")):
        file = user_path(ref)
    else:
        file = Path(str(SPACES[ref or DEFAULTS[type(config)]]))
    data, settings = _load(file, origin), flatten(to_dict(config))
    fields: dict[str, Field] = {}
    for name, value in data.items():
        _check_variable(name, value, settings, origin)
        fields[name] = _read_field(name, value, origin, config, [*data], fields)
    whole = Space(tuple(fields.values()))
    space = whole.of(config)
    first = whole.fields[0]
    if not space.fields and first.when:
        raise UserError(
            f"{origin} has no field that matters to this recipe: '{first.name}' needs {first.when.text}, and the recipe has "
            f"{first.when.name} = {settings[first.when.name]}; change that with --set, or take another space"
        )
    return space


def nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by field name as nested sections, as ``update`` takes them."""
    values: dict[str, Any] = {}
    for name, value in settings.items():
        *sections, last = name.split(".")
        branch = values
        for section in sections:
            branch = branch.setdefault(section, {})
        branch[last] = value
    return values


def _load(file: Path, origin: str) -> dict[str, Any]:
    """The fields of a space's file, by name; none twice."""
    data = read_yaml(file, object, "write it as the docs on searches say", origin)
    if not isinstance(data, dict) or not data:
        raise UserError(f"{origin} holds no fields: write a line a field, such as 'optim.lr: {{low: 1e-5, high: 1e-3}}'")
    return {str(name): value for name, value in data.items()}


def _check_variable(name: str, value: Any, settings: Mapping[str, Any], origin: str) -> None:
    """Raise UserError for a section, or for what a search cannot vary; of a section the message names a field in it."""
    field = name
    in_section = [setting for setting in settings if setting.startswith(f"{name}.")]
    if in_section:
        keys = value if isinstance(value, dict) else ()
        listed = [setting for setting in in_section if setting.removeprefix(f"{name}.").split(".")[0] in keys]
        field = (listed or in_section)[0]
    for start, why in FIXED.items():
        if (field == start or field.startswith(f"{start}.")) and not field.startswith(VARIABLE):
            raise UserError(f"{origin} varies '{field}', which a search cannot: {why}")
    if in_section:
        raise UserError(f"{origin}, field '{name}', is a section: write a line a field, such as '{field}: …'")


def _read_field(name: str, value: Any, origin: str, config: Config, names: list[str], before: Mapping[str, Field]) -> Field:
    """A field, with values as ``config`` holds them; ``names``: all of the space, ``before``: the fields above this one."""
    where = f"{origin}, field '{name}'"
    value = {"choices": value} if isinstance(value, list) else value
    if not isinstance(value, dict):
        raise UserError(f"{where}, holds {value!r}: give a list of choices, or low and high")
    if odd := [key for key in value if key not in KEYS]:
        raise unknown(f"key in {where}", str(odd[0]), KEYS)
    when = _read_when(value["when"], name, origin, config, names, before) if "when" in value else None
    if "choices" in value:
        choices = value["choices"]
        if not isinstance(choices, list) or not choices:
            raise UserError(f"{where}, has choices {choices!r}: give a list of plain values")
        if beside := [f"{key}: {value[key]}" for key in ("low", "high", "log", "int") if key in value]:
            raise UserError(f"{where}, has choices {choices!r} and {', '.join(beside)}: give either choices, or low and high")
        values = (_as_held(config, name, _plain(choice, where), f"{origin}: ") for choice in choices)
        return Field(name, choices=tuple(dict.fromkeys(values)), when=when)
    if odd := [key for key in ("log", "int") if not isinstance(value.get(key, False), bool)]:
        raise UserError(f"{where}, has {odd[0]}: {value[odd[0]]!r}: write true or false")
    low, high = (_plain(value.get(key), where) for key in ("low", "high"))
    if not {type(low), type(high)} <= {int, float}:
        raise UserError(f"{where}, needs choices, or low and high as numbers; it holds {value!r}")
    log, integer = value.get("log", False), value.get("int", False)
    if not low <= high or (log and low <= 0) or (integer and (int(low) != low or int(high) != high)):
        rule = "low must not be above high, a log scale begins above 0, and whole numbers have whole ends"
        raise UserError(f"{where}, goes from {low} to {high}: {rule}")
    field = Field(name, low=float(low), high=float(high), log=log, integer=integer, when=when)
    for end in field.examples:
        _as_held(config, name, end, f"{origin}{'' if integer else ', without int: true'}: ")
    return field


def _read_when(text: Any, name: str, origin: str, config: Config, names: list[str], before: Mapping[str, Field]) -> When:
    where = f"{origin}, field '{name}', has when: {text!r}"
    match = re.fullmatch(r"\s*(\S+)\s*(==|!=)\s*(\S+)\s*", text) if isinstance(text, str) else None
    try:
        value = parse_yaml(match[3], where, "") if match else None
    except UserError:
        match = None
    if match is None:
        raise UserError(f"{where}: write FIELD == VALUE or FIELD != VALUE")
    other = match[1]
    condition = f"{origin}, 'when' of '{name}'"
    value = _as_held(config, other, _plain(value, condition), f"{condition}: ")
    if other in names and other not in before:
        raise UserError(f"{where}: '{other}' must stand before what hangs on it, '{name}'")
    parent, equal = before.get(other), match[2] == "=="
    single = parent is None or parent.choices or parent.integer  # a real number is hardly ever drawn twice
    if parent and (not single or not parent.holds(value) or (parent.choices == (value,) and not equal)):
        raise UserError(f"{where}: '{other}' is never that in this space; name one of its choices, or give it some")
    return When(other, equal, (value,), text)


def _plain(value: Any, where: str) -> Any:
    """``value`` if it is a plain one, and a finite one if it is a number."""
    if isinstance(value, str) and NUMBER.fullmatch(value):
        value = float(value)
    if value is not None and not isinstance(value, int | float | str):
        raise UserError(f"{where}, holds {value!r}: give plain values")
    if isinstance(value, int | float) and not abs(value) < 1e300:  # the width of a range must be finite too
        raise UserError(f"{where}, holds {value}: give a finite number, below 1e300")
    return value


def _as_held(config: Config, name: str, value: Value, origin: str) -> Any:
    """A value as the field of ``config`` holds it, told plainly."""
    return flatten(to_dict(update(config, nested({name: value}), origin)))[name]
