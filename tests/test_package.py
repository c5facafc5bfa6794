"""What `import crossalign` gives."""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path

import pytest

import crossalign

NEEDED = (
    "AlignedTrainerMixin", "AlignmentCallback", "AlignmentRegularizer", "ImageClassifier", "PairBatches", "UserError", "adapt",
    "compare", "evaluate", "finetune", "get_recipe", "measure", "open_language_model", "open_pairs", "open_teacher", "plan",
    "pretrain", "report", "tune",
)  # fmt: skip
"""What code of users needs beside the measures and the settings, which `tests/golden/names.json` lists."""


def test_every_public_name_can_be_imported_and_is_what_it_says() -> None:
    assert set(NEEDED) < set(crossalign.__all__)
    for name in crossalign.__all__:
        value = getattr(crossalign, name)
        assert name == "__version__" or value.__name__ == name or callable(value)


def test_a_function_stays_one_when_the_room_of_its_name_is_imported() -> None:
    room = importlib.import_module("crossalign.report")
    for _ in range(2):
        assert inspect.isfunction(crossalign.report) and crossalign.report is room.report
    from crossalign import mmd, report

    assert inspect.isfunction(report) and inspect.isfunction(mmd)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="adpat"):
        _ = crossalign.adpat


def test_the_list_for_type_checkers_is_the_one_that_is_loaded() -> None:
    stub = ast.parse(Path(crossalign.__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
    names = [alias for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert all(alias.name == alias.asname for alias in names), "a name without `as` is private to a type checker"
    assert {alias.name for alias in names} | {"__version__"} == set(crossalign.__all__)
