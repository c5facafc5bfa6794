"""What a page consists of before it is HTML, Markdown or lines on a terminal: a title and blocks, in the order of reading."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import matplotlib.figure

    from crossalign.runs.records import Sample

Medium = Literal["html", "markdown", "terminal"]


@dataclass(frozen=True)
class Heading:
    """The name of what follows. One with an ``anchor`` begins a section of the HTML page, and stands in that page alone:
    elsewhere every table, list and group of figures has its own."""

    text: str
    anchor: str = ""


@dataclass(frozen=True)
class Prose:
    """Paragraphs, or lines on a terminal."""

    lines: tuple[str, ...]
    kind: Literal["lede", "soft", "note", "plain"] = "plain"


@dataclass(frozen=True)
class Facts:
    """Names with values: a few large numbers to meet first, or (``small``) where everything comes from."""

    pairs: tuple[tuple[str, str], ...]
    small: bool = False


@dataclass(frozen=True)
class Warnings:
    """Sentences on what makes the numbers less comparable than they look."""

    lines: tuple[str, ...]


@dataclass(frozen=True)
class Findings:
    """Each question with its answer, and a verdict and a sentence for each comparison that it rests on.

    A verdict is ``gain`` or ``loss`` where a difference is shown, ``alone`` where it is lost on correction, else another word.
    """

    questions: tuple[tuple[str, str, tuple[tuple[str, str], ...]], ...]


@dataclass
class Table:
    """Text cells under column heads. The first column names the row; the others are numbers unless in ``texts``."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)
    texts: frozenset[int] = frozenset()
    strong: frozenset[int] = frozenset()
    """Rows to set off: the best by validation accuracy, or a shown difference."""
    narrow: bool = False
    """Whether it takes as little width as it needs."""

    @classmethod
    def of(
        cls,
        title: str,
        lines: Sequence[Mapping[str, str]],
        notes: Iterable[str] = (),
        texts: Iterable[str] = (),
        strong: Iterable[int] = (),
        narrow: bool = False,
    ) -> Table:
        """A table of lines that each hold their cells by column head; ``texts`` are heads, some of which may be absent."""
        heads = list(lines[0]) if lines else []
        columns = frozenset(heads.index(head) for head in texts if head in heads)
        return cls(
            title, heads, [[line[head] for head in heads] for line in lines], list(notes), columns, frozenset(strong), narrow
        )

    def __bool__(self) -> bool:
        return bool(self.rows)

    def noting(self, mark: str, note: str) -> Table:
        """The table with a note on a mark, where a cell has it."""
        marked = any(mark in cell for line in self.rows for cell in line[1:])
        return replace(self, notes=[*self.notes, note] if marked else self.notes)

    def is_text(self, column: int) -> bool:
        return column == 0 or column in self.texts


@dataclass(frozen=True)
class Figure:
    """A drawing with its file name, its caption, and the text that stands for it where it cannot be seen."""

    name: str
    title: str
    alt: str
    figure: matplotlib.figure.Figure


@dataclass(frozen=True)
class Figures:
    """Figures below one another; ``notes``: a sentence for each that could not be drawn."""

    figures: tuple[Figure, ...]
    title: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Samples:
    """Test images with a model's answers."""

    title: str
    samples: tuple[Sample, ...]


@dataclass(frozen=True)
class Listing:
    """Sentences, one a line."""

    title: str
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Code:
    """Lines to be read by a program: settings, commands."""

    title: str
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Folded:
    """A table or code that HTML keeps closed until it is asked for."""

    block: Table | Code


@dataclass(frozen=True)
class Group:
    """Blocks that stand close together: below one another, or in HTML beside a figure, where there is room."""

    blocks: tuple[Block, ...]
    beside: Figures | None = None


@dataclass(frozen=True)
class Only:
    """Blocks that one medium alone has."""

    medium: Medium
    blocks: tuple[Block, ...]


Block = (
    Heading | Prose | Facts | Warnings | Findings | Table | Figure | Figures | Samples | Listing | Code | Folded | Group | Only
)


@dataclass(frozen=True)
class Page:
    """A page; ``command``: that of crossalign which wrote it."""

    title: str
    blocks: tuple[Block, ...]
    command: str = ""

    def of(self, medium: Medium) -> Iterator[Block]:
        """The blocks that a medium has."""
        for block in self.blocks:
            if not isinstance(block, Only):
                yield block
            elif block.medium == medium:
                yield from block.blocks
