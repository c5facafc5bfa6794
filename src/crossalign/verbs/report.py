"""``report``: tables, figures and one HTML page from finished runs."""

from dataclasses import dataclass
from pathlib import Path

from crossalign.verbs import Verb


@dataclass
class ReportArgs:
    """Tables, figures and one HTML page from finished runs."""

    runs: list[Path]
    """Run folders, or folders that hold them."""
    html: Path | None = None
    """Where the page goes; report.html in the one folder given, or in the current folder for several."""
    markdown: Path | None = None
    """Also write the tables as Markdown, with figures in a folder beside it."""


def run(args: ReportArgs, _: str) -> None:
    """Write the page, and print where it is."""
    from crossalign.report import report

    print(report(args.runs, html=args.html, markdown=args.markdown))


REPORT = Verb(ReportArgs, run)
