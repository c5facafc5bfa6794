"""Names and what stands behind them: near names, entries of one's own, and plug-ins that cannot be loaded."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from crossalign.core import registry
from crossalign.core.errors import UnknownName, UserError
from crossalign.core.registry import Registry

GROUP = "crossalign.for_tests"


@dataclass(frozen=True)
class Entry:
    make: Callable[[], int]


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], None]]:
    """``installed(name, code)``: a package of one module with an entry point of that name, as pip leaves it."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "_loaded", set())
    monkeypatch.setattr(registry, "_failures", {})

    def install(name: str, code: str) -> None:
        (tmp_path / f"{name}_module.py").write_text(code)
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[{GROUP}]\n{name} = {name}_module\n")

    yield install
    for module in [module for module in sys.modules if module.endswith("_module")]:
        del sys.modules[module]


def test_entries_are_looked_up_by_name_and_near_names_are_told() -> None:
    colours = Registry("colour", {"red": 1, "green": 2}, listed="--list")
    assert colours["red"] == 1 and "blue" not in colours and colours.names() == ("green", "red")
    assert list(colours.items()) == [("red", 1), ("green", 2)]
    with pytest.raises(UserError, match=r"^unknown colour 'gren'; did you mean 'green'\? \(known: green, red\)$") as caught:
        colours["gren"]
    assert isinstance(caught.value, UnknownName) and isinstance(caught.value, ValueError)


def test_the_same_entry_may_come_again_but_no_other_of_its_name() -> None:
    entries: Registry[object] = Registry("entry")
    for _ in range(2):  # a notebook's cell, run twice

        @entries.register("five", good=True)
        def five() -> int:
            return 5

        entries.register("five, made", Entry(five))
    assert entries["five"] is five and five.good  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="the entry 'five, made' is registered already; give yours another name"):
        entries.register("five, made", Entry(lambda: 6))


def test_a_plugin_is_loaded_when_its_name_is_asked_for(installed: Callable[[str, str], None]) -> None:
    names: Registry[str] = Registry("name", {"ours": "1"}, group=GROUP)
    registry.names_of_tests = names  # type: ignore[attr-defined]
    installed("theirs", "from crossalign.core.registry import names_of_tests\nnames_of_tests.register('theirs', '2')\n")
    assert names["ours"] == "1" and "ours" in names and "theirs_module" not in sys.modules
    assert names["theirs"] == "2" and names.names() == ("ours", "theirs")
    del registry.names_of_tests  # type: ignore[attr-defined]


def test_a_plugin_that_fails_is_told_of_and_stops_who_asks_for_it(installed: Callable[[str, str], None]) -> None:
    names: Registry[str] = Registry("name", {"ours": "1"}, group=GROUP)
    installed("broken", "import no_such_module_anywhere\n")
    told = "the plug-in 'broken' of the package 'broken' cannot be loaded .ModuleNotFoundError: No module named 'no_such"
    with pytest.warns(UserWarning, match=told):
        assert list(names) == ["ours"]
    assert "broken" in names  # whoever takes it for a name of this kind finds out why it is not there
    with pytest.raises(UserError, match=told):
        names["broken"]
    with pytest.raises(UnknownName, match=r"unknown name 'other' \(known: ours\)"):
        names["other"]
