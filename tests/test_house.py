"""How far a verb reaches: what it cannot import, lazily or not, cannot break it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import crossalign

SOURCE = Path(crossalign.__file__).parent


def module_name(path: Path) -> str:
    return ".".join(("crossalign", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__")


MODULES = {module_name(path): path for path in SOURCE.rglob("*.py")}


def imports(module: str) -> Iterator[str]:
    """Modules of ours that a file imports, at its top or within a function, but for type checkers alone."""
    path = MODULES[module]
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]

    def visit(node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        if isinstance(node, ast.ImportFrom):
            start = (
                ".".join([*package[: len(package) + 1 - node.level], *filter(None, [node.module])])
                if node.level
                else node.module
            )
            for alias in node.names:
                yield from (name for name in (f"{start}.{alias.name}", str(start)) if name in MODULES)
        for child in ast.iter_child_nodes(node):
            yield from visit(child)

    yield from visit(ast.parse(path.read_text(encoding="utf-8")))


def reach(module: str) -> set[str]:
    found, waiting = set(), [module]
    while waiting:
        if (name := waiting.pop()) not in found:
            found.add(name)
            waiting += imports(name)
    return found


@pytest.mark.parametrize(
    "module,most",
    [("verbs.measure.job", 60), ("verbs.adapt.predict", 30), ("verbs.compare.job", 25)],
    ids=lambda value: str(value),
)
def test_a_verb_reaches_no_more_files_than_it_needs(module: str, most: int) -> None:
    assert len(reach(f"crossalign.{module}")) <= most


def test_the_top_of_the_package_holds_few_modules() -> None:
    assert {path.name for path in SOURCE.glob("*.py")} <= {"__init__.py", "cli.py", "stats.py"}


def test_no_file_is_long() -> None:
    lengths = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in MODULES.items()}
    assert {name: lines for name, lines in lengths.items() if lines > 400} == {}


def test_no_name_of_a_class_has_two_meanings() -> None:
    found: dict[str, list[str]] = {}
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                found.setdefault(node.name, []).append(module)
    assert {name: modules for name, modules in found.items() if len(modules) > 1} == {}


def test_json_and_yaml_are_loaded_in_one_place_alone() -> None:
    """But for what was written a moment before, in the same expression."""
    calls = []
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if name in ("json.loads", "json.load", "yaml.safe_load", "yaml.load", "yaml.compose"):
                assert isinstance(node, ast.Call)
                if "json.dumps(" not in ast.unparse(node.args[0]):
                    calls.append(module)
    assert calls == ["crossalign.core.reading"]
