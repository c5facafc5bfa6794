"""A comparison, its page, and the same as JSON."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crossalign.core.files import write_json
from crossalign.report.blocks import Block, Listing, Only, Page, Prose, Table
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
        items = items_table(self.results, self.contrasts, self.resamples)
        return [means, seeds_table(self.results, self.contrasts), *([items] if items else [])]

    @cached_property
    def sentences(self) -> list[str]:
        return [sentence(self.results, one) for one in self.contrasts.itertuples()]

    @property
    def page(self) -> Page:
        """The comparison in tables and in words."""
        blocks: list[Block] = [Only("terminal", (Prose((f"reference: {self.rows[0]}",)),)), *self.tables]
        blocks += [Listing("In words", tuple(self.sentences)), Listing("Notes", tuple(self.notes))]
        return Page(f"Comparison with “{self.rows[0]}”", tuple(blocks), "compare")


def as_json(compared: Compared) -> dict[str, Any]:
    """Everything as numbers; differences in the outcome's own unit, shares between 0 and 1."""
    results, rows = compared.results, [compared.results.row[label] for label in compared.rows]
    means = {row.label: {one.name: results.mean(row.label, one.name) for one in compared.outcomes} for row in rows}
    return {
        "reference": compared.rows[0],
        "by": compared.by,
        "resamples": compared.resamples,
        "rows": [
            {
                "label": row.label,
                "runs": {run.seed: str(run.folder) for run in row.runs},
                "means": {name: dataclasses.asdict(mean) for name, mean in means[row.label].items()},
            }
            for row in rows
        ],
        "settings_that_differ": differing(row.first for row in rows),
        "comparisons": [
            _numbers(one) | {"sentence": told}
            for one, told in zip(compared.contrasts.itertuples(), compared.sentences, strict=True)
        ],
        "notes": compared.notes,
    }


def _numbers(one: Any) -> dict[str, Any]:
    t = one.t and dataclasses.asdict(one.t)
    if t and t["interval"] is None:
        t["difference"] = None  # not without its uncertainty
    tests = ("seeds", "bootstrap", "mcnemar")
    return {
        "row": one.other,
        "outcome": one.outcome,
        "family": one.family,
        "seeds": list(one.seeds),
        "reference_values": list(one.reference_values),
        "row_values": list(one.other_values),
        "not_paired": one.reason,
        "t": t,
        "effect_size": one.effect and dataclasses.asdict(one.effect),
        "smallest_visible": one.detectable,
        "seeds_needed": one.needed,
        "seeds_needed_corrected": one.needed_corrected,
        "bootstrap": one.bootstrap and dataclasses.asdict(one.bootstrap),
        "mcnemar": [dataclasses.asdict(test) for test in one.mcnemar or ()],
    } | {f"p_{test}": {"raw": getattr(one, f"p_{test}"), "holm": getattr(one, f"p_{test}_holm")} for test in tests}


def write_numbers(compared: Compared, path: Path) -> None:
    """The comparison as JSON, for programs."""
    write_json(path, as_json(compared))
