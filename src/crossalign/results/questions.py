"""Which rows answer which question."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from crossalign.results.contrasts import Pair
from crossalign.results.frame import Results
from crossalign.results.outcomes import Outcome


def beside(results: Results, reference: str, outcomes: Iterable[Outcome]) -> Iterator[Pair]:
    """Every other row beside one, in each outcome that is tested; a family is all rows and outcomes of one kind."""
    for outcome in outcomes:
        for other in results.row:
            if outcome.tested and other != reference:
                yield Pair("beside", outcome.name, reference, other, outcome.family)
