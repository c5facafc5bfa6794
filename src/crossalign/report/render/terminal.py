"""A page as lines for a terminal."""

from collections.abc import Iterator

from crossalign.report.blocks import Block, Listing, Page, Prose, Table


def terminal(page: Page) -> str:
    """The page's lines, tables in aligned columns. One with a title stands apart; figures are left out."""
    return "\n".join(line for block in page.of("terminal") for line in _lines(block))


def _lines(block: Block) -> Iterator[str]:
    match block:
        case Prose(lines):
            yield from lines
        case Table():
            yield from (["", block.title] if block.title else [])
            yield from (as_text(block), *block.notes)
        case Listing(_, lines) if lines:
            yield from ("", *lines)


def as_text(table: Table) -> str:
    """Aligned columns for a terminal."""
    cells = [table.columns, *table.rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(table.columns))]
    lines = [
        "  ".join(c.ljust(w) if table.is_text(i) else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in cells
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(line.rstrip() for line in lines)
