"""``compare``: which rows differ, by how much and how surely."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from crossalign.config.bounds import at_least
from crossalign.verbs import Verb


@dataclass
class CompareArgs:
    """Which rows differ, by how much and how surely: tests over seeds and over documents, corrected for their number."""

    runs: list[Path]
    """Run folders, or folders that hold them; runs that differ in their seed alone are one row."""
    by: Literal["seed", "sample"] = "seed"
    """What a star stands for: the test over seeds, which speaks of the method, or over samples, of these trained models."""
    reference: str = ""
    """The row that the others are compared with, by name or folder; the first folder's, or the one without alignment in it."""
    tasks: tuple[str, ...] = ()
    """Only these outcomes, such as accuracy, loss.validation or arc_easy.acc; * stands for any letters."""
    resamples: Annotated[int, at_least(200, 10**6)] = 5000
    """Resamples of the bootstrap, 200 or more."""
    markdown: Path | None = None
    """Also write the comparison as Markdown."""
    json: Path | None = None
    """Also write every number as JSON."""


def run(args: CompareArgs, _: str) -> None:
    """Compare, print the page, and write the files asked for."""
    from crossalign.core.files import write_json
    from crossalign.report.render.markdown import write_markdown
    from crossalign.report.render.terminal import terminal
    from crossalign.verbs.compare.compared import as_json
    from crossalign.verbs.compare.job import compare

    compared = compare(args.runs, args.by, args.reference, args.tasks, args.resamples)
    print(terminal(compared.page))
    if args.markdown is not None:
        write_markdown(compared.page, args.markdown)
    if args.json is not None:
        write_json(args.json, as_json(compared))


COMPARE = Verb(CompareArgs, run)
