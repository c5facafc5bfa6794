"""Every numeric setting of every verb, as the configurations declare them, given what it may not be, and what it may."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fields import numbers
from fuzzing import COUNTS, Began, alarm, amounts, call, explore, fault_of
from hypothesis import strategies as st
from material import (
    CALLS,
    CPU,
    EVALUATE,
    FEATURES,
    FINETUNE,
    FPT,
    MEASURE,
    MODEL,
    NEW,
    OPTIONS,
    OWN,
    PREPARE,
    PRETRAIN,
    SEARCH,
    STUDY,
    Material,
)

from crossalign import UserError
from crossalign.cli import VERBS, _parse, load_verb
from crossalign.config import validate

UNCOMPILED = ("--loop.compile", "False")
"""To compile, which long runs try, takes longer than a call may here."""
BASE: dict[str, tuple[str, ...]] = {
    "cache": ("cache", "--older-than", "3"),
    "adapt": ("adapt", "small-fpt-mmd", *OPTIONS, "--align.epochs", "1", "--align.batch-size", "16", *UNCOMPILED, *NEW),
    "plan": ("plan", "small-fpt", "--backbone.ref", "llama"),
    "pretrain": (*PRETRAIN, "--prepared", "corpus", *UNCOMPILED),
    "finetune": (*FINETUNE, "--model", MODEL, *UNCOMPILED),
    "data prepare": (*PREPARE[:-2], *NEW),
    "tune": (*SEARCH, *NEW),
    "evaluate": (*EVALUATE, *NEW),
    "predict": ("predict", f"{FPT}/model", "images", *CPU),
    "features": (*FEATURES[:-2], "--output", "new/f.safetensors"),
    "measure": (*MEASURE[:-2], *NEW),
    "compare": CALLS["compare"].arguments[:3],
    "reproduce": (*STUDY[:2], *NEW, *STUDY[STUDY.index("--set") :]),
}
"""A small call of each verb that has numbers among its settings."""
STARTS = (
    *(
        "verbs.adapt.job.opened_run",
        "verbs.language_model.job.opened_run",
        "verbs.evaluate.job._score",
        "verbs.measure.job.look",
    ),
    *("features.store.FeatureStore.write", "data.text.corpus._locked", "studies.tune._open", "studies.reproduce._run_all"),
)
"""Where the work of the verbs begins, all checks being done."""
WRITTEN = ("nan", "inf", "-inf", "0", "1", "-1", "2", "0.5", "-0.5", "1e308", "1e-308", "1e9", "1" + 30 * "0", "4294967296",
           "65537", "x", "", "None", "True", "1e-5", "0x10", "١", "1_0")  # fmt: skip
GIVEN: tuple[Any, ...] = (
    math.nan,
    math.inf,
    -math.inf,
    -1,
    0,
    1,
    0.5,
    10**30,
    1e308,
    "3",
    None,
    True,
    [],
    (),
    [1],
    {},
    b"1",
    1j,
    Path("1"),
)
SMALL = ("0", "1", "2", "0.5", "1e-5")
"""Values with which a call may truly run."""


def settings_of(verb: str) -> list[str]:
    kinds = load_verb(verb).recipes or {None: load_verb(verb).args}
    kind = next(iter(kinds.values()))  # the first is that of the call above
    return [name for name, _ in numbers(kind)]


FIELDS = {verb: settings_of(verb) for verb in VERBS}


def how_many(verb: str, name: str) -> int:
    """Values that the option takes on the command line, in the call above."""
    return {"betas": 2, "mean": 1, "std": 1, "ratio": 2}.get(name.rpartition(".")[2], 1)


def option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def test_every_verb_with_numbers_is_called() -> None:
    assert {verb for verb, names in FIELDS.items() if names} == BASE.keys()
    assert sum(map(len, FIELDS.values())) > 150


@contextlib.contextmanager
def stopping_where_work_begins(patch: pytest.MonkeyPatch) -> Iterator[None]:
    def begin(*arguments: Any, **settings: Any) -> None:
        raise Began

    with patch.context() as inside:
        for name in STARTS:
            inside.setattr(f"crossalign.{name}", begin)
        yield


@st.composite
def calls(draw: st.DrawFn) -> tuple[str, dict[str, tuple[str, ...]], bool]:
    """A verb, one setting or two with their values as written, and whether it truly runs."""
    verb = draw(st.sampled_from([verb for verb in BASE for _ in range(1 + len(FIELDS[verb]) // 5)]))
    runs = draw(st.integers(0, 19)) == 0
    names = draw(st.lists(st.sampled_from(FIELDS[verb]), min_size=1, max_size=2, unique=True))
    value = st.sampled_from(SMALL if runs else WRITTEN)
    return verb, {name: tuple(draw(value) for _ in range(how_many(verb, name))) for name in names}, runs


@amounts(short=60, share=0.7)
def test_any_number_on_the_command_line_begins_the_work_or_is_named(
    work: Material, amount: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with stopping_where_work_begins(monkeypatch):
        for verb in BASE:
            call(*BASE[verb])  # imports what the verb needs, and fills the cache
            work.reset(keep=("cache",))

    def check(example: tuple[str, dict[str, tuple[str, ...]], bool]) -> None:
        verb, values, runs = example
        given = [text for name, value in values.items() for text in (option(name), *value)]
        if verb in ("reproduce", "tune"):  # whose --set takes all that follows it
            place = BASE[verb].index("--set")
            arguments = (*BASE[verb][:place], *given, *BASE[verb][place:])
        else:
            arguments = (*BASE[verb], *given)
        with contextlib.nullcontext() if runs else stopping_where_work_begins(monkeypatch):
            ending = call(*arguments)
        COUNTS["values"] += len(values)
        fault = ending.fault
        if ending.code == 1 and runs and not fault_of(ending.sentence):
            fault = ""  # it diverged, and said so
        if ending.code == 2 and not fault and not any(named(ending.errors, name, value) for name, value in values.items()):
            fault = f"none of the settings is named: {ending.errors}"
        if ending.code == 2 and not runs:
            fault = fault or left(work)
        work.reset(keep=("cache",))
        assert not fault, f"{' '.join(arguments)}: {fault}\n{ending.errors[-3000:]}"

    explore(check, calls(), amount)


def named(errors: str, name: str, values: tuple[str, ...]) -> bool:
    text = errors.replace("-", "_")
    return name in text or name.rpartition(".")[2] in text or any(value and value in errors for value in values)


def left(work: Material) -> str:
    """What a refused call left behind."""
    new = [path for path in work.changes() if not path.startswith("cache/") and Path(path).name not in OWN]
    return f"{new} was written" if new else ""


TRAINED = {"adapt": FPT, "pretrain": "runs/pretrain", "finetune": "runs/finetune"}


@amounts(short=20, share=0.15)
def test_a_finished_run_outlives_any_value_with_overwrite(work: Material, amount: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(example: tuple[str, Any, str]) -> None:
        verb, place, value = example
        name = FIELDS[verb][place % len(FIELDS[verb])]
        arguments = (*BASE[verb], "--output", TRAINED[verb], "--overwrite", option(name), *[value] * how_many(verb, name))
        with stopping_where_work_begins(monkeypatch):
            ending = call(*arguments)
        COUNTS["overwritten"] += 1
        fault = ending.fault or left(work)
        work.reset(keep=("cache",))
        assert not fault, f"{' '.join(arguments)}: {fault}\n{ending.errors[-3000:]}"

    strategy = st.tuples(st.sampled_from(sorted(TRAINED)), st.integers(0, 200), st.sampled_from(WRITTEN))
    explore(check, strategy, amount)


def as_yaml(name: str, values: tuple[str, ...]) -> str:
    """A setting with its sections, as one writes it."""
    parts = name.split(".")
    sections = [f"{'  ' * depth}{part}:" for depth, part in enumerate(parts)]
    return "\n".join(sections) + " " + (values[0] if len(values) == 1 else f"[{', '.join(values)}]") + "\n"


@amounts(short=40, share=0.3)
def test_any_value_in_a_file_or_after_set_begins_the_work_or_is_named(
    work: Material, amount: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = work.work.parent / "given.yaml"

    def check(example: tuple[str, int, list[str]]) -> None:
        verb, place, drawn = example
        fields = FIELDS.get(verb) if verb in TRAINED else FIELDS["adapt"]
        name = fields[place % len(fields)]
        values = tuple(drawn[: how_many(verb, name)])
        if verb in TRAINED:
            file.write_text(as_yaml(name, values))
            arguments = (*BASE[verb], "--config", str(file))
        else:
            put = f"{name}={values[0] if len(values) == 1 else list(values)}"
            at = BASE[verb].index("--output") if verb == "tune" else len(BASE[verb])  # where what follows --set ends
            arguments = (*BASE[verb][:at], put, *BASE[verb][at:])
        with stopping_where_work_begins(monkeypatch):
            ending = call(*arguments)
        COUNTS["values in files"] += 1
        fault = ending.fault or (left(work) if ending.code == 2 else "")
        if ending.code == 2 and not fault and not named(ending.errors, name, values):
            fault = f"the setting is not named: {ending.errors}"
        work.reset(keep=("cache",))
        assert not fault, f"{' '.join(arguments)}, {name} {values}: {fault}\n{ending.errors[-3000:]}"

    verbs, values = st.sampled_from([*TRAINED, "tune", "reproduce"]), st.sampled_from(WRITTEN)
    explore(check, st.tuples(verbs, st.integers(0, 200), st.lists(values, min_size=2, max_size=2)), amount)


@amounts(short=60, share=0.15)
def test_any_object_in_a_configuration_begins_the_work_or_is_named(
    work: Material, amount: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(example: tuple[str, int, Any]) -> None:
        verb, place, value = example
        name = FIELDS[verb][place % len(FIELDS[verb])]
        *sections, last = name.split(".")
        words = 2 if " " in verb else 1
        recipe, rest = ("", BASE[verb][words:])
        if load_verb(verb).recipes is not None and not rest[0].startswith("-"):
            recipe, rest = rest[0], rest[1:]
        config = section = _parse(load_verb(verb), verb, recipe, list(rest))
        for part in sections:
            section = getattr(section, part)
        setattr(section, last, value)
        COUNTS["objects"] += 1
        try:
            with stopping_where_work_begins(monkeypatch), alarm():
                validate(config)
                load_verb(verb).run(config, recipe)
        except Began:
            pass
        except UserError as error:
            fault = fault_of(str(error)) or left(work)
            assert not fault and re.search(rf"{last}|{re.escape(str(value))}", str(error).replace("-", "_")), f"{error}"
        finally:
            work.reset(keep=("cache",))

    verbs = [verb for verb in BASE for _ in range(1 + len(FIELDS[verb]) // 5)]
    strategy = st.tuples(st.sampled_from(verbs), st.integers(0, 200), st.sampled_from(GIVEN))
    explore(check, strategy, amount)
