"""What users type and import, as lists: verbs, options, recipes and their settings, public names. One more is a decision."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import typing
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import crossalign
from crossalign import cli

FOLDER = Path(__file__).parent
DECISION = (
    "A new, changed or removed one is a decision: note it in CHANGELOG.md, then write the list anew with\n"
    "python -m pytest tests/golden/test_options.py --write-golden"
)
RECIPES_OF_ANOTHER_KIND = ("plan cmar-pretrain", "plan cmar-finetune-8b")
"""Calls of a verb whose options differ by the kind of its recipe: these stand for a kind."""
NO_FILE = "/no/such/file.yaml"

Flat = dict[str, Any]
Run = Callable[..., tuple[int, str, str]]


class Terminal(StringIO):
    """What is printed is kept; help then has its boxes, whatever the locale."""

    encoding = "utf-8"  # type: ignore[assignment]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """``run(*arguments)``: exit code, output and errors of the command line on a terminal of 129 columns without colours."""
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "129")  # from 130 on, help has several columns

    def call(*arguments: str) -> tuple[int, str, str]:
        output, errors = Terminal(), Terminal()
        with redirect_stdout(output), redirect_stderr(errors):
            try:
                code = cli.main(list(arguments))
            except SystemExit as ended:  # the parser's own way to end after its help
                code = int(ended.code or 0)
        return code, output.getvalue(), errors.getvalue()

    return call


def test_verbs_and_their_options_are_those_of_the_list(
    run: Run, golden: Callable[[str, str], None], request: pytest.FixtureRequest
) -> None:
    verbs = verbs_of(run())
    assert verbs_of(run("--help")) == verbs
    lists = {call: options_of(run(*call.split(), "--help")) for call in (*verbs, *RECIPES_OF_ANOTHER_KIND)}
    for verb in verbs:
        lists[verb] |= outside_the_parser(run, verb)
    compare("options.json", lists, golden, request)


def test_recipes_and_their_settings_are_those_of_the_list(
    run: Run, golden: Callable[[str, str], None], request: pytest.FixtureRequest
) -> None:
    lists: dict[str, Flat] = {}
    for verb in verbs_of(run()):
        for name in recipe_names(run(*verb.split(), "--list")):
            recipe = lists.setdefault(name, {"verbs": verb})
            recipe["verbs"] = ", ".join(sorted({*recipe["verbs"].split(", "), verb}))
    for name, recipe in lists.items():
        config = crossalign.get_recipe(name).make()
        usual = flatten(type(config)())
        recipe |= {key: value for key, value in flatten(config).items() if value != usual[key]}
    compare("recipes.json", lists, golden, request)


def test_public_names_signatures_and_settings_are_those_of_the_list(
    golden: Callable[[str, str], None], request: pytest.FixtureRequest
) -> None:
    lists: dict[str, Flat] = {}
    for name in sorted(crossalign.__all__):
        value = getattr(crossalign, name)
        if dataclasses.is_dataclass(value):
            lists[name] = fields_of(value)
        elif inspect.isclass(value):
            bases = [base.__qualname__ for base in (nn.Module, Exception) if issubclass(value, base)]
            lists[name] = {"is": "".join(bases) or "a class"} | methods_of(value)
        elif callable(value):
            lists[name] = {"call": signature(value)}
        else:
            lists[name] = {"is": type(value).__name__}
    compare("names.json", lists, golden, request)


def compare(path: str, lists: dict[str, Flat], golden: Callable[[str, str], None], request: pytest.FixtureRequest) -> None:
    """Lists of names to what each is, with those in a golden file: a failure says which was added, is gone or has changed."""
    file = FOLDER / path
    content = json.dumps(lists, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
    known = file.is_file() and not request.config.getoption("--write-golden")
    changes = list(differences(json.loads(file.read_text(encoding="utf-8")), lists)) if known else []
    if changes:
        pytest.fail("\n".join([f"{path} says otherwise:", *changes, DECISION]), pytrace=False)
    golden(path, content)


def differences(before: dict[str, Flat], now: dict[str, Flat]) -> Iterator[str]:
    """A line for each entry that was added, is gone or has changed."""
    for title in dict.fromkeys([*before, *now]):
        if title not in now:
            yield f"gone: {title}"
            continue
        if title not in before:
            yield f"added: {title}"
            continue
        old, new = before[title], now[title]
        yield from (f"gone: {title} {name}, which was {old[name]}" for name in old if name not in new)
        yield from (f"added: {title} {name}, which is {new[name]}" for name in new if name not in old)
        for name in old:
            if name in new and old[name] != new[name]:
                yield f"changed: {title} {name} was {old[name]} and is {new[name]}"


def verbs_of(called: tuple[int, str, str]) -> list[str]:
    """The verbs in the overview: lines of two spaces, a verb of one or two words, and what it does."""
    code, output, _ = called
    assert code == 0
    return re.findall(r"^  ([a-z]+(?: [a-z]+)?) +[^\n]+$", output, re.MULTILINE)


def options_of(called: tuple[int, str, str]) -> Flat:
    """Each option of a verb's help, as written on the command line, to what it takes and its default; arguments by position."""
    code, output, _ = called
    assert code == 0
    options: list[list[str]] = []
    arguments: list[list[str]] = []
    current = options
    for line in output.splitlines():
        inside = re.fullmatch(r"│ (.*) │", line)
        if line.startswith("╭─ "):
            current = arguments if "positional" in line else options
        elif inside and re.match(r"[^\s─]", inside[1]) and (current is arguments or inside[1].startswith("-")):
            current.append(re.split(r"\s{2,}", inside[1].strip(), maxsplit=1))
        elif inside and inside[1].startswith(" "):
            current[-1].append(inside[1].strip())
    listed: Flat = {}
    for number, (head, *text) in enumerate(arguments, 1):
        listed[f"argument {number}"] = head + default_of(text)
    for head, *text in options:
        names, takes = re.fullmatch(r"(-[\w.-]+(?:, -[\w.-]+)*) ?(.*)", head).groups()  # type: ignore[union-attr]
        if names != "-h, --help":
            listed[names] = (takes or "no value") + default_of(text)
    return listed


def default_of(lines: list[str]) -> str:
    """The default, as the end of an option's help has it."""
    text = " ".join(lines)
    if text.endswith("(required)"):
        return ", required"
    at = text.rfind("(default: ")
    assert at >= 0 and text.endswith(")"), text
    return f" = {text[at:].removeprefix('(default: ').removesuffix(')')}"


def outside_the_parser(run: Run, verb: str) -> Flat:
    """What no help shows: whether a verb takes a run's config.yaml, and lists recipes."""
    code, _, errors = run(*verb.split(), "--config", NO_FILE)
    takes = f"--config {NO_FILE} cannot be read" in errors
    assert code == 2 and (takes or "unknown option --config" in errors)
    code, output, _ = run(*verb.split(), "--list")
    return ({"--config": "FILE"} if takes else {}) | ({"--list": "recipes"} if code == 0 and output else {})


def recipe_names(called: tuple[int, str, str]) -> list[str]:
    """The first words of a list of recipes; none for a verb without recipes, which knows no --list."""
    code, output, _ = called
    return [line.split()[0] for line in output.splitlines()] if code == 0 else []


def flatten(config: Any, prefix: str = "") -> Flat:
    """The settings of a configuration by their dotted names, as text or plain values."""
    flat: Flat = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            flat |= flatten(value, f"{prefix}{field.name}.")
        else:
            plain = isinstance(value, bool | int | float | str | None)
            flat[prefix + field.name] = value if plain else str(value)
    return flat


def fields_of(config: type) -> Flat:
    """Type and default of each setting of a configuration's class; bounds that its annotation may carry are left out."""
    kinds: dict[str, str] = {}

    def visit(kind: type, prefix: str) -> None:
        settings = {field.name for field in dataclasses.fields(kind)}  # a hint may be of the class itself
        for name, hint in typing.get_type_hints(kind).items():
            if name not in settings:
                continue
            if dataclasses.is_dataclass(hint):
                visit(typing.cast(type, hint), f"{prefix}{name}.")
            else:
                kinds[prefix + name] = inspect.formatannotation(hint).replace("typing.", "").replace("pathlib.", "")

    visit(config, "")
    required = [f.name for f in dataclasses.fields(config) if f.default is f.default_factory is dataclasses.MISSING]
    values = flatten(config(**dict.fromkeys(required, "required")))
    return {name: f"{kind}, required" if name in required else f"{kind} = {values[name]!r}" for name, kind in kinds.items()}


def methods_of(kind: type) -> Flat:
    """How a class and its public methods are called, those of PyTorch's modules left out that it leaves alone."""
    names = [n for n in dir(kind) if not n.startswith("_") and getattr(kind, n) is not getattr(nn.Module, n, None)]
    names = [n for n in names if not hasattr(Exception, n)]
    call = {"call": signature(kind)} if not issubclass(kind, Exception) else {}
    return call | {n: signature(getattr(kind, n)) if callable(getattr(kind, n)) else "value" for n in names}


def signature(value: Callable[..., Any]) -> str:
    """Names, kinds and defaults of parameters; annotations are left out, since a call does not see them."""
    full = inspect.signature(value)
    plain = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in full.parameters.values()]
    return str(full.replace(parameters=plain, return_annotation=inspect.Signature.empty))
