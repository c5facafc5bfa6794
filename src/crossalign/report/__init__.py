"""Tables, figures and one page, made from run folders and never typed by hand.

>>> from pathlib import Path
>>> from crossalign.report import report, summary_table
>>> report([Path("runs/quickstart")], html=Path("report.html"))  # doctest: +SKIP
PosixPath('report.html')
"""

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
    from crossalign.core.files import write_text
    from crossalign.report.pages import study_page
    from crossalign.report.render.html import html as as_html
    from crossalign.report.render.markdown import write_markdown
    from crossalign.runs.records import open_study

    if html is None:
        html = Path(runs[0] if len(runs) == 1 else ".") / "report.html"
    for target in (html, markdown):
        if target is not None and target.is_dir():
            raise UserError(f"'{target}' is a folder; name the file to write, such as '{target / 'report.html'}'")
    page = study_page(open_study(runs))
    text = as_html(page)
    write_text(html, text)
    if markdown is not None:
        # Not of the bare stem, which may well be the study's own folder.
        write_markdown(page, markdown, markdown.with_name(f"{markdown.stem}-figures") if figures else None)
    return html


def summary_table(runs: Iterable[Path]) -> str:
    """The table of test results in aligned columns for a terminal, with a line a note."""
    from crossalign.report.pages import summary_page
    from crossalign.report.render.terminal import terminal
    from crossalign.runs.records import open_study

    return terminal(summary_page(open_study(runs)))
