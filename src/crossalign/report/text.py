"""What a report says of language models that were trained on text: losses, held-out alignment, and paired tests of both.

A row is compared with the row without alignment of the same model and data, seed by seed; one that is pulled towards the
images of its own captions also with each control.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from crossalign.core.refs import Ref
from crossalign.report import tables, wording
from crossalign.report.blocks import Table
from crossalign.report.wording import LEVEL, UNKNOWN, number, p_equals, p_text
from crossalign.results.outcomes import HELD_OUT
from crossalign.results.rows import NO_IMAGES, TEXT_VERBS, Row
from crossalign.runs.records import Run
from crossalign.stats import PairedT, detectable_difference, holm, paired_t, seeds_needed


def is_text(run: Run) -> bool:
    """Whether a run is of a language model that was trained on text."""
    return run.text("verb") in TEXT_VERBS or (run.result is None and ("gpt" in run.config or "model" in run.config))


@dataclass(frozen=True)
class Question:
    """What a family of comparisons answers; p-values are corrected within it."""

    title: str
    lower_is_better: bool


PREDICTS = Question("Does the term change how well text is predicted?", True)
CONTROLS = Question("Is it the images? Losses with them beside those of controls", True)
ALIGNS = Question("Does it align?", False)
QUESTIONS = (PREDICTS, CONTROLS, ALIGNS)


@dataclass(frozen=True)
class Change:
    """``other`` minus ``reference`` in one number, paired by seed."""

    question: Question
    measure: str
    reference: Row
    other: Row
    t: PairedT
    p_holm: float | None = None


def headline(rows: list[Row], changes: list[Change], runs: int) -> str:
    """The page's first sentence, of so many runs."""
    if not changes:
        return f"{wording.counted(runs, 'run')} of {wording.counted(len(rows), 'row')}."
    if all(one.t.p_value is None for one in changes):
        return f"{wording.counted(len(rows), 'row')} of one seed: differences are shown, of chance nothing can be said."
    losses = [one for one in changes if one.question is PREDICTS]
    better, worse = (sum(_verdict(one) == verdict for one in losses) for verdict in ("gain", "loss"))
    count = wording.counted(len(losses), "comparison")
    return (
        f"Of {count} of losses with those of the row without any term, {better} show a lower loss and {worse} a higher one "
        "after correction; of the rest no difference could be shown."
    )


def findings(rows: list[Row], changes: list[Change]) -> Iterator[tuple[str, str, tuple[tuple[str, str], ...]]]:
    """For each model and question: the question, the model where there are several, and (verdict, sentence) of each change."""
    models = groups(rows)
    for (name, group), question in itertools.product(models.items(), QUESTIONS):
        mine = [one for one in changes if one.question is question and one.other in group]
        if mine:
            yield question.title, f"{name}." if len(models) > 1 else "", tuple((_verdict(one), _sentence(one)) for one in mine)


def groups(rows: list[Row]) -> dict[str, list[Row]]:
    """Rows of one kind of training of one model on the same data, which can be compared, under a name."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        verb = {"pretrain": "pre-training", "finetune": "fine-tuning"}.get(row.first.text("verb"), "training")
        verb = "LoRA " + verb if row.method == "lora" else verb
        found.setdefault(f"{Ref(row.backbone).short_name}, {verb} on {row.data}", []).append(row)
    return found


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
            cells.append(tables.plus_minus(found.mean, found.error))
        for text in texts:
            found = row.mean("scores", text, "loss")
            cells.append(tables.plus_minus(found.mean, found.error, 4))
        aligned, wide = row.mean("held_out", HELD_OUT), row.mean("held_out", "held_out_directions")
        cells += [tables.plus_minus(aligned.mean, aligned.error, 3), tables.plus_minus(wide.mean, wide.error, 1)]
        shown.append([*cells, str(len(row.runs))])
    columns = ["Row", *(f"Perplexity, {t}" for t in texts), *(f"Loss (nats a token), {t}" for t in texts)]
    notes = [
        "Mean ± standard error over seeds. Alignment: debiased linear CKA of held-out captions with the teacher's features "
        "of their images; 0 for unrelated ones, however many pairs. Directions: participation ratio of the captions' features.",
        "Perplexities are of this vocabulary's tokens; bits a byte, comparable across tokenizers, are in result.json.",
    ]
    return Table(title, [*columns, "Alignment, held out", "Directions", "Seeds"], shown, notes)


def compare(rows: list[Row]) -> list[Change]:
    """Rows against the one without alignment, and those with images against controls; Holm's correction for each question."""
    corrected: list[Change] = []
    for mine, question in itertools.product(groups(rows).values(), QUESTIONS):
        found = list(_changes(question, mine))
        p_values = holm([one.t.p_value for one in found])
        corrected += [replace(one, p_holm=p) for one, p in zip(found, p_values, strict=True)]
    return corrected


def _changes(question: Question, rows: list[Row]) -> Iterator[Change]:
    for row in rows:
        for reference in rows:
            if not _compared(question, row, reference):
                continue
            measures: list[tuple[tuple[str, ...], str]] = [(("held_out", HELD_OUT), "held-out alignment")]
            if question is not ALIGNS:
                measures = [(("scores", text, "loss"), f"loss on {text}") for text in _texts([row])]
            for keys, name in measures:
                pairs = list(_paired(reference, row, keys))
                if pairs:
                    yield Change(question, name, reference, row, paired_t([a for a, _ in pairs], [b for _, b in pairs]))


def _compared(question: Question, row: Row, reference: Row) -> bool:
    if row.align == "none":
        return False
    if question is CONTROLS:
        return reference.align != "none" and not _is_control(row) and _is_control(reference)
    return reference.align == "none"


def _is_control(row: Row) -> bool:
    """Whether the term has no images, other ones, or a teacher that was never trained."""
    teacher, mode = row.first.text("teacher"), row.first.text("mode") or "paired"
    return row.align in NO_IMAGES or mode != "paired" or bool(Ref(teacher).control)


def _paired(reference: Row, other: Row, keys: tuple[str, ...]) -> Iterator[tuple[float, float]]:
    mine, theirs = ({run.seed: run.number(*keys) for run in row.runs} for row in (reference, other))
    for seed, value in mine.items():
        if seed in theirs and not math.isnan(value) and not math.isnan(theirs[seed]):
            yield value, theirs[seed]


def comparison_table(changes: list[Change]) -> Table:
    """Every paired comparison with its uncertainty."""
    shown = []
    for one in changes:
        t = one.t
        smallest = detectable_difference(t.sd, t.n) if t.sd else None
        needed = seeds_needed(t.difference, t.sd) if t.sd else None
        shown.append(
            [
                f"{one.other.label} − {one.reference.label}",
                one.measure,
                str(t.n),
                number(t.difference, 4, sign=True) + (f" ± {number(t.error, 4)}" if t.error is not None else ""),
                f"{number(t.interval[0], 4, sign=True)} to {number(t.interval[1], 4, sign=True)}" if t.interval else UNKNOWN,
                UNKNOWN if t.p_value is None else f"{p_text(t.p_value)} ({p_text(one.p_holm)})",
                UNKNOWN if smallest is None else number(smallest, 4),
                UNKNOWN if not t.sd else "> 1,000" if needed is None else str(needed),
            ]
        )
    strong = frozenset(i for i, one in enumerate(changes) if one.p_holm is not None and one.p_holm <= LEVEL)
    notes = [
        "Paired t-test over seeds; losses in nats a token. In brackets: after Holm's correction, made apart for each "
        "model and over losses beside the row without the term, losses beside controls, and alignments. Bold: at most 0.05 "
        "after it.",
        "Smallest visible: the true difference that the test would have found with 80 % power at α = 0.05 (uncorrected), at "
        "the spread seen. Seeds needed: for a true difference as large as the one seen.",
    ]
    columns = ["Row − reference", "Measure", "Seeds", "Difference", "95 % interval", "p (Holm)", "Smallest visible"]
    return Table("With and without the term", [*columns, "Seeds needed"], shown, notes, frozenset({1}), strong)


def _verdict(one: Change) -> str:
    if one.p_holm is None or one.t.p_value is None:
        return "undefined"
    if one.p_holm > LEVEL:
        return "alone" if one.t.p_value <= LEVEL else "none"
    return "gain" if (one.t.difference < 0) is one.question.lower_is_better else "loss"


def _sentence(one: Change) -> str:
    """One comparison in plain language, with its uncertainty, null results included."""
    t = one.t
    error = f" ± {number(t.error, 4)}" if t.error is not None else ""
    told = f"“{one.other.label}” changed the {one.measure} by {number(t.difference, 4, sign=True)}{error}"
    if one.question is CONTROLS:
        told = f"Beside “{one.reference.label}”, {told}"
    seeds = wording.counted(t.n, "seed")
    if t.p_value is None:
        return f"{told} ({seeds}; {t.reason or 'nothing can be said of chance'})."
    corrected = f", corrected {p_text(one.p_holm)}" if t.p_value <= LEVEL else ""
    ends = {
        "gain": "it is shown to be better",
        "loss": "it is shown to be worse",
        "alone": "a hint at a difference, lost on correction",
        "none": "no difference could be shown",
    }
    return f"{told} ({seeds}, {p_equals(t.p_value)}{corrected}): {ends[_verdict(one)]}."
