"""`compare` on runs that were trained here."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from crossalign import cli
from crossalign.config import AdaptConfig
from crossalign.verbs.adapt.job import adapt


def test_two_tiny_rows_are_compared(tiny_run: Callable[..., AdaptConfig], capsys: pytest.CaptureFixture[str]) -> None:
    for recipe, seed in (("small-fpt", 0), ("small-fpt", 1), ("small-lora", 0), ("small-lora", 1)):
        adapt(tiny_run(recipe, output=f"{recipe}/{seed}", seed=seed))
    root = tiny_run().output.parent
    capsys.readouterr()
    assert cli.main(["compare", str(root / "small-fpt"), str(root / "small-lora"), "--json", str(root / "told.json")]) == 0
    told, shown = json.loads((root / "told.json").read_text()), capsys.readouterr().out
    (one,) = told["comparisons"]
    results = [json.loads((root / f"small-lora/{seed}/result.json").read_text())["test"]["accuracy"] for seed in (0, 1)]
    assert one["row_values"] == pytest.approx(results) and one["seeds"] == [0, 1]
    assert told["reference"] == "FPT" and "“LoRA” against “FPT”, test accuracy" in shown
