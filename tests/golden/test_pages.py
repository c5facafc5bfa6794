"""Golden master of the pages from results: what ``report`` and ``compare`` make of the archived runs.

Everything goes through the command line, from a folder that holds the unpacked archives, as docs/results/README.md has it: the
files that ``--html``, ``--markdown`` and ``--json`` write, and what is printed. So nothing here knows the inside, nor a path of
this machine. Nothing is stored twice:

- Markdown: byte for byte, figures by name, title and alternative text.
- Pages: byte for byte without what is drawn, the style sheet once for all. Cells of tables are left out, for they must be those
  of the Markdown; and of long lines that the Markdown has to the letter, only a hash is stored.
- Numbers of ``compare``: from its JSON file at full precision, for each key a list over the contrasts; its sentences are those
  of the Markdown. A number may be off by 1e-12 of its size, for processors round differently. One file is stored as written.
- Numbers of ``report``: it writes none but in its tables, so these; those with p-values also as JSON, cell by cell. What is
  behind them at full precision, before correction, is in the comparisons with another reference.
- Terminal: byte for byte for an archive alone; of several, word by word that of the Markdown.
"""

from __future__ import annotations

import hashlib
import html
import itertools
import json
import math
import re
import shutil
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from crossalign import cli
from crossalign.report import summary_table

pytestmark = pytest.mark.timeout(300)  # on a busy machine; the slowest needs 15 s of a core

ARCHIVES = Path(__file__).resolve().parents[2] / "docs" / "results" / "archive"
FOLDER = Path(__file__).parent
CIFAR10 = ["stories260k", "minilm"]
TEXT = ["novels", "finetune-stories260k", "finetune-smollm2"]
ALL = [*CIFAR10, *TEXT, "search-cifar10"]

REPORTS = {name: [name] for name in ALL} | {
    "cifar10": CIFAR10,
    "text": TEXT,
    "all": ALL,
    "search-and-rows": ["search-cifar10", "stories260k/fpt", "stories260k/lora"],
    "one-run": ["minilm/lora-mmd/seed-0"],
    "one-run-of-text": ["novels/aligned/seed-0"],
    "unfinished": ["unfinished"],
}
"""Folder of golden files, and what ``crossalign report`` is given."""

FEW = ["--resamples", "200"]
COMPARISONS = {f"{name}/compare": [name] for name in ALL} | {
    "cifar10/compare": [*CIFAR10, *FEW],
    "text/compare": TEXT,
    "all/compare": ALL,
    "search-and-rows/compare": [*REPORTS["search-and-rows"], *FEW],
    "unfinished/compare": ["unfinished", *FEW],
    "one-seed/compare": ["minilm/fpt/seed-0", "minilm/lora/seed-0", "minilm/full/seed-0", *FEW],
    "minilm/compare-by-sample": [*(f"minilm/{row}" for row in ("fpt", "lora", "full", "vit")), "--by", "sample", *FEW],
    "minilm/compare-with-none": ["minilm/lora", "minilm/full", "minilm/none", "--reference", "minilm/none", *FEW],
    "stories260k/compare-with-random-weights": [
        *(f"stories260k/{row}" for row in ("fpt", "fpt-mse", "lora", "full", "full-random", "fpt-random", "none", "vit")),
        *("--reference", "FPT, random weights", *FEW),
    ],
    "novels/compare-with-captions": ["novels", "--reference", "novels/captions", "--tasks", "loss.*"],
}
"""Golden file without its ending, and what ``crossalign compare`` is given."""

WHOLE = "minilm/compare-with-none"
"""The comparison whose JSON file is stored as it is written."""

SUMMARIES = ("minilm", "novels", "search-cifar10", "unfinished")

Golden = Callable[[str, str], None]
Cells = list[list[str]]


@pytest.fixture(scope="session")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every archived study, and with ``unfinished``: two rows, one of which has a run that did not end."""
    folder = tmp_path_factory.mktemp("archives")
    for name in sorted(ARCHIVES.glob("*.tar.xz")):
        with tarfile.open(name) as archive:
            archive.extractall(folder, filter="data")
    for row in ("fpt", "lora"):
        shutil.copytree(folder / "minilm" / row, folder / "unfinished" / row)
    (folder / "unfinished" / "lora" / "seed-2" / "result.json").unlink()
    return folder


@dataclass(frozen=True)
class Printed:
    """How a command ended and what it printed; on stderr there may be its progress, too, which depends on the time."""

    code: int
    out: str
    err: str

    @property
    def refusal(self) -> str:
        return f"{self.out}{self.err}exit code {self.code}\n"


@pytest.fixture
def command(unpacked: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Printed]:
    """The command line in the folder of the unpacked archives. Figures are made and then not drawn: no drawing is compared."""
    from matplotlib.figure import Figure

    def savefig(figure: Figure, file: Any, *, format: str, **_: Any) -> None:
        if format == "svg":
            file.write('<svg viewBox="0 0 1 1"></svg>')
        else:
            Image.new("RGB", (1, 1)).save(file, format=format)

    monkeypatch.setattr(Figure, "savefig", savefig)
    monkeypatch.chdir(unpacked)

    def run(*args: str | Path) -> Printed:
        code = cli.main([str(arg) for arg in args])
        return Printed(code, *capsys.readouterr())

    return run


@pytest.mark.parametrize("name", REPORTS)
def test_report(name: str, golden: Golden, command: Callable[..., Printed], tmp_path: Path) -> None:
    page, tables = tmp_path / "page.html", tmp_path / "tables.md"
    printed = command("report", *REPORTS[name], "--html", page, "--markdown", tables)
    if printed.code:
        golden(f"pages/{name}/report.txt", printed.refusal)
        assert not list(tmp_path.iterdir())
        return
    assert printed.out == f"{page}\n"
    markdown, text = (path.read_bytes().decode() for path in (tables, page))
    golden(f"pages/{name}/report.md", markdown)
    style, outline = outline_of(text, markdown)
    golden("pages/style.css", style)
    golden(f"pages/{name}/report.html", outline)

    cells = cells_of_page(text)
    assert cells == cells_of_markdown(markdown)
    tests = {title: rows for title, rows in cells.items() if any(re.match(r"p\b", head) for head in rows[0])}
    if tests:
        golden(f"pages/{name}/report.json", as_lines(tests))

    files = [f"tables-figures/{path.name}" for path in (tmp_path / "tables-figures").glob("*")]
    assert sorted(re.findall(r"^!\[.*\]\((.*)\)$", markdown, re.MULTILINE)) == sorted(files)


@pytest.mark.parametrize("name", COMPARISONS)
def test_compare(name: str, golden: Golden, command: Callable[..., Printed], tmp_path: Path) -> None:
    page, numbers = tmp_path / "page.md", tmp_path / "numbers.json"
    printed = command("compare", *COMPARISONS[name], "--markdown", page, "--json", numbers)
    if printed.code:
        golden(f"pages/{name}.txt", printed.refusal)
        assert not list(tmp_path.iterdir())
        return
    markdown, text = (path.read_bytes().decode() for path in (page, numbers))
    golden(f"pages/{name}.md", markdown)
    if len(COMPARISONS[name]) == 1:
        golden(f"pages/{name}.txt", printed.out)
    assert words_of_terminal(printed.out) == words_of_markdown(markdown)

    value = json.loads(text)
    assert text == as_written(value)
    if name == WHOLE:
        golden(f"pages/{name}.json", as_written(settled(value, name)))
        return
    sentences = [contrast.pop("sentence") for contrast in value["comparisons"]]
    assert sentences == [plain(line[2:]) for line in markdown.split("\n") if line.startswith("- ")][: len(sentences)]
    value["comparisons"] = as_columns(value["comparisons"])
    golden(f"pages/{name}.json", as_lines(settled(value, name)))


@pytest.mark.parametrize("name", SUMMARIES)
def test_summary(name: str, golden: Golden, unpacked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``reproduce`` and ``tune`` print at their end."""
    monkeypatch.chdir(unpacked)
    golden(f"pages/{name}/summary.txt", summary_table([Path(name)]) + "\n")


def test_every_golden_file_has_a_case() -> None:
    files = {path.relative_to(FOLDER / "pages").with_suffix("").as_posix() for path in (FOLDER / "pages").rglob("*.*")}
    assert files == {"style", *COMPARISONS, *(f"{name}/report" for name in REPORTS), *(f"{name}/summary" for name in SUMMARIES)}


# The page


def outline_of(page: str, markdown: str) -> tuple[str, str]:
    """The style sheet, and the page without it, without drawings, cells and what the Markdown says as well.

    Cells and lines that repeat stand there once, with their number.
    """
    page = re.sub(r"<svg\b.*?</svg>", "<svg/>", page, flags=re.DOTALL)
    before, style, after = re.split(r"<style>(.*?)</style>", page, flags=re.DOTALL)
    bare = re.sub(r"(<t[hd]\b[^>]*>)[^<]*(?=</t[hd]>)", r"\1", f"{before}<style/>{after}")
    lines = markdown.split("\n")
    known = {*lines, *(plain(re.sub("^(- (Data: )?|## )", "", line)) for line in lines)}

    def short(text: re.Match[str]) -> str:
        line = html.unescape(text[0])
        return f"as in Markdown, {hashlib.sha256(line.encode()).hexdigest()[:8]}" if line in known else text[0]

    bare = re.sub(r"[^<>\n]{40,}", short, bare)
    bare = re.sub(r"((?:<t[hd]\b[^>]*></t[hd]>)+?)\1+", lambda cells: f"{cells[1]} × {len(cells[0]) // len(cells[1])}", bare)
    runs = [(line, len(list(lines))) for line, lines in itertools.groupby(bare.split("\n"))]
    return style, "\n".join(line if count == 1 or not line else f"{line} × {count}" for line, count in runs)


class TableReader(HTMLParser):
    """Titles and cells of a page's tables, heads first."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: list[tuple[str, Cells]] = []
        self._cell: list[str] | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "table":
            self.tables.append(("", []))
        elif tag == "tr":
            self.tables[-1][1].append([])
        elif tag in ("caption", "th", "td"):
            self._cell = []

    def handle_data(self, data: str) -> None:
        if self._cell is not None:
            self._cell.append(data)

    def handle_endtag(self, tag: str) -> None:
        if tag == "caption":
            self.tables[-1] = "".join(self._cell or []), self.tables[-1][1]
        elif tag in ("th", "td"):
            self.tables[-1][1][-1].append("".join(self._cell or []))
        if tag in ("caption", "th", "td"):
            self._cell = None


def cells_of_page(text: str) -> dict[str, Cells]:
    """Cells of every table of a page, heads first, by title."""
    reader = TableReader()
    reader.feed(text)
    return by_title(reader.tables)


def by_title(tables: list[tuple[str, Cells]]) -> dict[str, Cells]:
    assert len(dict(tables)) == len(tables), "two tables of one title"
    return dict(sorted(tables))


# Markdown and the terminal


def cells_of_markdown(text: str) -> dict[str, Cells]:
    """Cells of every table of a Markdown file, heads first, by the heading above."""
    tables: list[tuple[str, Cells]] = []
    for block in re.split(r"^## ", text, flags=re.MULTILINE):
        title, *lines = block.split("\n")
        rows = [cells_of_line(line) for line in lines if line.startswith("| ") and not is_rule(line)]
        if rows:
            tables.append((plain(title), rows))
    return by_title(tables)


def cells_of_line(line: str) -> list[str]:
    return [plain(cell) for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def is_rule(line: str) -> bool:
    """Whether a line only parts a table's heads from its rows."""
    return not line.strip("|:- ")


def plain(text: str) -> str:
    """Text of Markdown, neither bold nor escaped."""
    text = re.sub(r"^\*\*(.*)\*\*$", r"\1", text.strip())
    for sign, entity in (("<", "&lt;"), (">", "&gt;"), ("&", "&amp;")):
        text = text.replace(entity, sign)
    return re.sub(r"\\(.)", r"\1", text)


def words_of_markdown(text: str) -> list[str]:
    """Words of a comparison, without what only the Markdown has: the first two lines, two headings, and marks."""
    words = []
    for line in text.split("\n")[4:]:
        if line not in ("## In words", "## Notes") and not is_rule(line):
            words += (" ".join(cells_of_line(line)) if line.startswith("| ") else plain(re.sub("^(## |- )", "", line))).split()
    return words


def words_of_terminal(text: str) -> list[str]:
    """Words of a comparison, without what only the terminal has: the first line, and rules under heads."""
    return [word for line in text.split("\n")[1:] if not is_rule(line) for word in line.split()]


# JSON


def as_written(value: Any) -> str:
    """How the package writes JSON."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def as_lines(value: Any, depth: int = 2) -> str:
    """JSON with the entries of ``depth`` levels on lines of their own."""
    if depth == 0 or not isinstance(value, dict | list) or not value:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    if isinstance(value, list):
        text = "[\n" + ",\n".join(as_lines(entry, depth - 1) for entry in value) + "\n]"
    else:
        text = "{\n" + ",\n".join(f"{json.dumps(key)}: {as_lines(entry, depth - 1)}" for key, entry in value.items()) + "\n}"
    return text + "\n" * (depth == 2)


def as_columns(entries: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """For each dotted key of the entries the values of all of them; null where one lacks the key."""
    rows = [dict(flat(entry)) for entry in entries]
    return {key: [row.get(key) for row in rows] for key in dict.fromkeys(key for row in rows for key in row)}


def flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Nested dictionaries, and lists of them, as pairs of a dotted key and a value."""
    if value and isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        value = dict(enumerate(value))
    if value and isinstance(value, dict):
        for name, entry in value.items():
            yield from flat(entry, f"{key}.{name}" if key else str(name))
    else:
        yield key, value


def settled(value: Any, name: str) -> Any:
    """The value with the golden file's own numbers where it differs from them by rounding alone."""
    file = FOLDER / "pages" / f"{name}.json"
    return near(value, json.loads(file.read_bytes())) if file.is_file() else value


def near(value: Any, golden: Any) -> Any:
    if isinstance(value, dict) and isinstance(golden, dict):
        return {key: near(entry, golden.get(key)) for key, entry in value.items()}
    if isinstance(value, list) and isinstance(golden, list):
        return [near(entry, other) for entry, other in itertools.zip_longest(value, golden[: len(value)])]
    if isinstance(value, float) and isinstance(golden, float) and math.isclose(value, golden, rel_tol=1e-12):
        return golden
    return value
