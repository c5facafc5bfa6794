"""Every block in every medium that has it, and in that alone."""

from __future__ import annotations

from typing import get_args

import pytest

from crossalign.report.blocks import (
    Block,
    Code,
    Facts,
    Figure,
    Figures,
    Findings,
    Folded,
    Group,
    Heading,
    Listing,
    Only,
    Page,
    Prose,
    Samples,
    Table,
    Warnings,
)
from crossalign.report.render.html import html
from crossalign.report.render.markdown import markdown
from crossalign.report.render.terminal import terminal
from crossalign.runs.records import Sample

pytest.importorskip("jinja2", reason="needs jinja2")
matplotlib_figure = pytest.importorskip("matplotlib.figure", reason="needs matplotlib")


def drawn(name: str) -> Figure:
    return Figure(name, f"caption of {name}", f"words for {name}", matplotlib_figure.Figure(figsize=(1, 1)))


def table(title: str) -> Table:
    return Table(title, ["Row", "Number"], [[f"row of {title}", "1"]], [f"note of {title}"])


PAGE = Page(
    "the title",
    (
        Prose(("a first sentence",), "lede"),
        Facts((("a fact", "seven"),)),
        Facts((("a basis", "eight"),), small=True),
        Warnings(("a warning",)),
        Heading("a section", "settings"),
        Findings((("a question?", "an answer.", (("gain", "a finding"),)),)),
        table("plain"),
        Figures((drawn("one"),), "gathered", ("left out",)),
        Group((table("grouped"), drawn("small")), Figures((drawn("beside"),))),
        Samples("pictures", (Sample(b"\x89PNG", "cat", "dog", 0.75),)),
        Listing("a list", ("an entry",)),
        Folded(table("folded")),
        Folded(Code("program", ("run me",))),
        *(Only(medium, (Prose((f"only in {medium}",)),)) for medium in ("html", "markdown", "terminal")),
    ),
    "report",
)
EVERYWHERE = ["a first sentence", "row of plain", "note of plain"]
ON_PAGES = ["the title", "seven", "eight", "a warning", "a question?", "an answer.", "a finding", "row of grouped", "run me"]
ON_PAGES += ["row of folded", "caption of one", "words for one", "left out"]


def test_the_page_has_every_kind_of_block() -> None:
    kinds = {type(block) for block in PAGE.blocks} | {Code, Figure}
    assert kinds == set(get_args(Block))


@pytest.mark.parametrize(
    ("medium", "text", "more", "absent"),
    [
        ("html", html(PAGE), ["a section", "caption of small", "caption of beside", "truly cat"], ["an entry"]),
        ("markdown", markdown(PAGE, "some-figures"), ["an entry", "## gathered", "some-figures/one.png"], ["a section", "cat"]),
        ("terminal", terminal(PAGE), ["an entry"], ["seven", "a warning", "caption"]),
    ],
    ids=["html", "markdown", "terminal"],
)
def test_a_medium_has_its_blocks(medium: str, text: str, more: list[str], absent: list[str]) -> None:
    wanted = EVERYWHERE + more + [f"only in {medium}"] + (ON_PAGES if medium != "terminal" else [])
    assert [words for words in wanted if words not in text] == []
    assert [words for words in absent if words in text] == []
    assert text.count("only in") == 1


def test_markdown_without_figures_has_none() -> None:
    text = markdown(PAGE)
    assert "caption" not in text and "gathered" not in text and "left out" not in text
