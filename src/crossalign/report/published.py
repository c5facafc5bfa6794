"""What CMDA found, beside what the same rows show here: which findings hold, which do not, and which cannot be told."""

from __future__ import annotations

from dataclasses import dataclass

from crossalign.core.refs import Ref
from crossalign.report.blocks import Table
from crossalign.report.tables import plus_minus
from crossalign.report.wording import LEVEL, p_text, percent, points
from crossalign.results.comparisons import Comparison, pair
from crossalign.results.rows import Row
from crossalign.stats import detectable_difference, holm

TABLE1 = {
    "FPT": 67.06,
    "FPT + alignment (MSE)": 66.74,
    "FPT + alignment (MMD)": 66.96,
    "Full fine-tuning": 85.26,
    "Full fine-tuning + alignment (MSE)": 85.48,
    "Full fine-tuning + alignment (MMD)": 87.39,
    "LoRA": 81.42,
    "LoRA + alignment (MSE)": 81.87,
    "LoRA + alignment (MMD)": 83.86,
}
"""Test accuracy in percent on CIFAR-10, CMDA Table 1: one run each, with a 110 M Llama and all 50,000 images."""


@dataclass(frozen=True)
class Finding:
    """A difference that the paper speaks of."""

    text: str
    reference: str
    other: str
    nothing: bool = False
    """The paper's finding is that there is no difference to speak of."""

    @property
    def published(self) -> float:
        """The paper's difference, as a share."""
        return (TABLE1[self.other] - TABLE1[self.reference]) / 100


FINDINGS = (
    Finding("Full fine-tuning is better than FPT (§3.2.3)", "FPT", "Full fine-tuning"),
    Finding("LoRA is better than FPT (§3.2.4)", "FPT", "LoRA"),
    Finding("Full fine-tuning is better than LoRA (§3.2.4)", "LoRA", "Full fine-tuning"),
    Finding("MMD alignment helps full fine-tuning (§3.2.3)", "Full fine-tuning", "Full fine-tuning + alignment (MMD)"),
    Finding("MMD alignment helps LoRA (§3.2.4)", "LoRA", "LoRA + alignment (MMD)"),
    Finding("MSE alignment helps full fine-tuning a little (§3.2.3)", "Full fine-tuning", "Full fine-tuning + alignment (MSE)"),
    Finding("MSE alignment helps LoRA a little (§3.2.4)", "LoRA", "LoRA + alignment (MSE)"),
    Finding("MMD alignment does nothing for FPT (§3.2.2)", "FPT", "FPT + alignment (MMD)", nothing=True),
    Finding("MSE alignment does nothing for FPT (§3.2.2)", "FPT", "FPT + alignment (MSE)", nothing=True),
)


def published_tables(rows: list[Row]) -> list[Table]:
    """A table for each backbone and data set that has rows of Table 1 with two seeds or more."""
    blocks: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        if row.weights == "pretrained" and row.first.name in TABLE1:
            blocks.setdefault((row.backbone, row.data), {})[row.first.name] = row
    return [table for (backbone, _), held in blocks.items() if (table := _table(backbone, held)) is not None]


def _table(backbone: str, held: dict[str, Row]) -> Table | None:
    told = [(f, pair(held[f.reference], held[f.other])) for f in FINDINGS if f.reference in held and f.other in held]
    told = [(finding, one) for finding, one in told if one.t is not None and one.t.n > 1]
    if not told:
        return None
    corrected = holm([one.t.p_value if one.t else None for _, one in told])
    cells = []
    for (finding, one), p in zip(told, corrected, strict=True):
        assert one.t is not None
        here = plus_minus(100 * one.t.difference, 100 * (one.t.error or 0.0))
        sign = "+" if one.t.difference > 0 else ""
        p_values = f"{p_text(one.t.p_value)} ({p_text(p)})"
        cells.append([finding.text, points(finding.published), f"{sign}{here}", p_values, verdict(finding, one, p)])
    return Table(
        f"The paper's findings, with {Ref(backbone).short_name}",
        ["Finding of CMDA", "Paper", "Here", "p, seeds (Holm)", "Here it"],
        cells,
        [
            "Differences of test accuracy in percentage points; here the mean ± standard error over seeds, paired by seed. "
            "The paper's are single runs of a 110 M model on 50,000 images, without an uncertainty; scale and backbone differ.",
            "Holm's correction is over the lines of this table. In brackets: the true difference that the t-test would "
            "have found with 80 % power at α = 0.05.",
        ],
        texts=frozenset({4}),
        strong=frozenset(i for i, cell in enumerate(cells) if cell[-1].startswith(("holds", "is contradicted"))),
    )


def verdict(finding: Finding, one: Comparison, p_holm: float | None) -> str:
    """holds, is contradicted, or could not be told, with what could have been seen."""
    assert one.t is not None
    visible = detectable_difference(one.t.sd, one.t.n)
    power = f" (visible: {percent(visible, 1)} points)" if visible is not None else ""
    shown = p_holm is not None and p_holm <= LEVEL
    if finding.nothing:
        return "is contradicted" if shown else f"agrees: no difference shown{power}"
    same = (one.t.difference > 0) == (finding.published > 0)
    if shown:
        return "holds" if same else "is contradicted"
    return f"was not shown; {'the same' if same else 'the opposite'} direction{power}"
