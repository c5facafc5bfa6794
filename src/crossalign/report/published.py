"""What CMDA found, beside what the same rows show here: which findings hold, which do not, and which cannot be told."""

from dataclasses import dataclass
from typing import Any

from crossalign.core.refs import Ref
from crossalign.report.blocks import Table
from crossalign.report.words import difference_text, p_values, percent, points
from crossalign.results.contrasts import Pair, contrasts
from crossalign.results.frame import Results
from crossalign.results.outcomes import ACCURACY

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


def published_tables(results: Results) -> list[Table]:
    """A table for each backbone and data set that has rows of Table 1 with two seeds or more."""
    blocks: dict[tuple[str, str], dict[str, str]] = {}
    for row in results.row.values():
        if row.weights == "pretrained" and row.first.name in TABLE1:
            blocks.setdefault((row.backbone, row.data), {})[row.first.name] = row.label
    return list(filter(None, (_table(results, backbone, labels) for (backbone, _), labels in blocks.items())))


def _table(results: Results, backbone: str, labels: dict[str, str]) -> Table:
    asked = {
        Pair(finding.text, ACCURACY.name, labels[finding.reference], labels[finding.other], "published"): finding
        for finding in FINDINGS
        if finding.reference in labels and finding.other in labels
    }
    lines = [
        {
            "Finding of CMDA": finding.text,
            "Paper": points(finding.published),
            "Here": difference_text(ACCURACY, contrast.t.difference, contrast.t.error),
            "p, seeds (Holm)": p_values(contrast.p_seeds, contrast.p_seeds_holm),
            "Here it": verdict(finding, contrast),
        }
        for finding, contrast in zip(asked.values(), contrasts(results, asked).itertuples(), strict=True)
        if contrast.over == "seeds"
    ]
    notes = [
        "Differences of test accuracy in percentage points; here the mean ± standard error over seeds, paired by seed. "
        "The paper's are single runs of a 110 M model on 50,000 images, without an uncertainty; scale and backbone differ.",
        "Holm's correction is over the lines of this table. In brackets: the true difference that the t-test would "
        "have found with 80 % power at α = 0.05.",
    ]
    strong = [i for i, line in enumerate(lines) if line["Here it"].startswith(("holds", "is contradicted"))]
    return Table.of(f"The paper's findings, with {Ref(backbone).short_name}", lines, notes, ["Here it"], strong)


def verdict(finding: Finding, contrast: Any) -> str:
    """holds, is contradicted, or could not be told, with what could have been seen."""
    power = f" (visible: {percent(contrast.detectable, 1)} points)" if contrast.detectable is not None else ""
    shown = contrast.verdict in ("gain", "loss")
    if finding.nothing:
        return "is contradicted" if shown else f"agrees: no difference shown{power}"
    same = (contrast.t.difference > 0) == (finding.published > 0)
    if shown:
        return "holds" if same else "is contradicted"
    return f"was not shown; {'the same' if same else 'the opposite'} direction{power}"
