"""A comparison, its page, and the same as JSON."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from crossalign.report.blocks import Listing, Only, Page, Prose, Table
from crossalign.report.contrasts import items_table, means_table, seeds_table
from crossalign.report.words import sentence
from crossalign.results.contrasts import By
from crossalign.results.frame import Results
from crossalign.results.outcomes import Outcome
from crossalign.results.rows import differing

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass
class Compared:
    """Rows, the reference first, and every other row beside it in every outcome."""

    results: Results
    rows: list[str]
    """Labels."""
    outcomes: list[Outcome]
    contrasts: DataFrame
    """As ``results.contrasts`` returns it."""
    by: By
    resamples: int
    notes: list[str] = field(default_factory=list)

    @cached_property
    def tables(self) -> list[Table]:
        means = means_table(self.results, self.rows, self.outcomes, self.contrasts, self.by)
        over_items = items_table(self.results, self.contrasts, self.resamples)
        return list(filter(None, (means, seeds_table(self.results, self.contrasts), over_items)))

    @cached_property
    def sentences(self) -> list[str]:
        return [sentence(self.results, contrast) for contrast in self.contrasts.itertuples()]

    @property
    def page(self) -> Page:
        """The comparison in tables and in words."""
        reference = Only("terminal", (Prose((f"reference: {self.rows[0]}",)),))
        lists = Listing("In words", tuple(self.sentences)), Listing("Notes", tuple(self.notes))
        return Page(f"Comparison with “{self.rows[0]}”", (reference, *self.tables, *lists), "compare")


def as_json(compared: Compared) -> dict[str, Any]:
    """Everything as numbers; differences in the outcome's own unit, shares between 0 and 1."""
    results, rows = compared.results, [compared.results.row[label] for label in compared.rows]
    pairs = zip(compared.contrasts.itertuples(), compared.sentences, strict=True)
    return {
        "reference": compared.rows[0],
        "by": compared.by,
        "resamples": compared.resamples,
        "rows": [
            {
                "label": row.label,
                "runs": {run.seed: str(run.folder) for run in row.runs},
                "means": {outcome.name: _plain(results.mean(row.label, outcome.name)) for outcome in compared.outcomes},
            }
            for row in rows
        ],
        "settings_that_differ": differing(row.first for row in rows),
        "comparisons": [_numbers(outcome) | {"sentence": sentence} for outcome, sentence in pairs],
        "notes": compared.notes,
    }


def _numbers(contrast: Any) -> dict[str, Any]:
    t = _plain(contrast.t)
    if t and t["interval"] is None:
        t["difference"] = None  # not without its uncertainty
    tests = ("seeds", "bootstrap", "mcnemar")
    return {
        "row": contrast.other,
        "outcome": contrast.outcome,
        "family": contrast.family,
        "seeds": list(contrast.seeds),
        "reference_values": list(contrast.reference_values),
        "row_values": list(contrast.other_values),
        "not_paired": contrast.reason,
        "t": t,
        "effect_size": _plain(contrast.effect),
        "smallest_visible": contrast.detectable,
        "seeds_needed": contrast.needed,
        "seeds_needed_corrected": contrast.needed_corrected,
        "bootstrap": _plain(contrast.bootstrap),
        "mcnemar": [_plain(test) for test in contrast.mcnemar or ()],
    } | {f"p_{test}": {"raw": getattr(contrast, f"p_{test}"), "holm": getattr(contrast, f"p_{test}_holm")} for test in tests}


def _plain(test: Any) -> dict[str, Any] | None:
    return test and dataclasses.asdict(test)
