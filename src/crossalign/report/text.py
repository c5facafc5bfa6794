"""What a report says of language models that were trained on text: losses, held-out alignment, and paired tests of both.

A row is compared with the row without alignment of the same model and data, seed by seed; one that is pulled towards the
images of its own captions also with each control.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from crossalign.report import words
from crossalign.report.blocks import Table
from crossalign.results.frame import Results
from crossalign.results.outcomes import HELD_OUT
from crossalign.results.questions import PREDICTS
from crossalign.results.rows import Row

if TYPE_CHECKING:
    from pandas import DataFrame


def headline(results: Results, contrasts: DataFrame) -> str:
    """The page's first sentence."""
    rows = words.counted(len(results.row), "row")
    if not len(contrasts):
        return f"{words.counted(len(results.study.complete), 'run')} of {rows}."
    if contrasts.p.isna().all():
        return f"{rows} of one seed: differences are shown, of chance nothing can be said."
    verdicts = list(contrasts.verdict[contrasts.question == PREDICTS.name])
    return (
        f"Of {words.counted(len(verdicts), 'comparison')} of losses with those of the row without any term, "
        f"{verdicts.count('gain')} show a lower loss and {verdicts.count('loss')} a higher one after correction; of the rest "
        "no difference could be shown."
    )


def groups(results: Results) -> dict[str, list[Row]]:
    """Rows of one kind of training of one model on the same data, which can be compared, under a name."""
    rows = results.row.values()
    return {block: [row for row in rows if row.block == block] for block in dict.fromkeys(row.block for row in rows)}


def _texts(rows: list[Row]) -> list[str]:
    """Names of the texts that were scored, each once."""
    return list(dict.fromkeys(name for row in rows for run in row.runs for name in (run.result or {}).get("scores") or {}))


def results_table(title: str, rows: list[Row]) -> Table:
    """Perplexity of every text and alignment of held-out pairs, each mean ± standard error over seeds."""
    texts = _texts(rows)
    shown = []
    for row in rows:
        cells = [row.label]
        for text in texts:
            found = row.mean("scores", text, "perplexity")
            cells.append(words.plus_minus(found.mean, found.error))
        for text in texts:
            found = row.mean("scores", text, "loss")
            cells.append(words.plus_minus(found.mean, found.error, 4))
        aligned, wide = row.mean("held_out", HELD_OUT), row.mean("held_out", "held_out_directions")
        cells += [words.plus_minus(aligned.mean, aligned.error, 3), words.plus_minus(wide.mean, wide.error, 1)]
        shown.append([*cells, str(len(row.runs))])
    columns = ["Row", *(f"Perplexity, {t}" for t in texts), *(f"Loss (nats a token), {t}" for t in texts)]
    notes = [
        "Mean ± standard error over seeds. Alignment: debiased linear CKA of held-out captions with the teacher's features "
        "of their images; 0 for unrelated ones, however many pairs. Directions: participation ratio of the captions' features.",
        "Perplexities are of this vocabulary's tokens; bits a byte, comparable across tokenizers, are in result.json.",
    ]
    return Table(title, [*columns, "Alignment, held out", "Directions", "Seeds"], shown, notes)
