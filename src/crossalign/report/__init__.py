"""Tables, figures and one page, made from run folders and never typed by hand.

>>> from pathlib import Path
>>> from crossalign.report import report, summary_table
>>> report([Path("runs/quickstart")], html=Path("report.html"))  # doctest: +SKIP
PosixPath('report.html')
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


def report(runs: list[Path], html: Path | None = None, markdown: Path | None = None, figures: bool = True) -> Path:
    """Write the report of ``runs``: run folders and folders of searches, or folders that hold some at any depth.

    Args:
        html: the self-contained page to write; unless named it is ``report.html`` in the one folder given, or in the
            current folder for several.
        markdown: also write the tables as Markdown.
        figures: with Markdown, also write its figures as PNG into the folder STEM-figures beside it.

    Returns:
        The page's path.

    Raises:
        UserError: no run in a path, a damaged result.json or search.json, a missing package of the extra ``report``.
    """
    from crossalign.core.errors import UserError
    from crossalign.core.files import atomic_path
    from crossalign.report.page import page
    from crossalign.report.text import content_of
    from crossalign.runs.records import open_study

    if html is None:
        html = Path(runs[0] if len(runs) == 1 else ".") / "report.html"
    for target in (html, markdown):
        if target is not None and target.is_dir():
            raise UserError(f"'{target}' is a folder; name the file to write, such as '{target / 'report.html'}'")
    content = content_of(open_study(runs))
    text = page(content)
    with atomic_path(html) as temporary:
        temporary.write_text(text, encoding="utf-8")
    if markdown is not None:
        from crossalign.report.markdown import write_markdown

        write_markdown(content, markdown, figures)
    return html


def summary_table(runs: Iterable[Path]) -> str:
    """The table of test results in aligned columns for a terminal, with a line a note."""
    from crossalign.report.search_tables import rung_table
    from crossalign.report.tables import as_text, incomplete_table
    from crossalign.report.text import content_of
    from crossalign.runs.records import open_study

    content = content_of(open_study(runs))
    parts = []
    for one in content.searches:
        parts += [one.search.title, one.headline, *one.remarks, "", as_text(rung_table(one.search)), ""]
    for table in content.results:
        named = [f"{table.title}:"] if len(content.results) > 1 else []
        parts += [*named, as_text(table), *(note for note in table.notes if not note.startswith("Bold"))]
    parts += content.duplicates
    unfinished = incomplete_table(content.study.incomplete)
    if unfinished is not None:
        parts += ["", f"{unfinished.title}:", as_text(unfinished)]
    return "\n".join(parts)
