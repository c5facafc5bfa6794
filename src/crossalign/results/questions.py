"""Which rows answer which question."""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from crossalign.results.contrasts import Pair
from crossalign.results.frame import Results
from crossalign.results.outcomes import ACCURACY, BEFORE, Outcome
from crossalign.results.rows import Row, baseline, by_block, differing
from crossalign.runs.evaluations import BITS_PER_BYTE

CHOSEN = ("optim.lr", "loop.device", "loop.precision", "loop.compile")
"""Settings that each row chose for itself: by a sweep, or by what the machine has and is fast at."""


@dataclass(frozen=True)
class Question:
    """What a contrast is to answer."""

    name: str
    title: str
    settings: tuple[str, ...]
    """Beginnings of the settings that are asked about."""

    def pair(self, outcome: str, reference: Row, other: Row, family: str) -> Pair:
        """The question for two rows; in no family where they differ in more than what is asked."""
        also = self.also(reference, other)
        return Pair(self.name, outcome, reference.label, other.label, "" if also else family, also)

    def also(self, reference: Row, other: Row) -> tuple[str, ...]:
        """Settings in which two rows differ beside those that are asked about, and those that each chose for itself."""
        return tuple(key for key in differing((reference.first, other.first)) if not key.startswith((*self.settings, *CHOSEN)))


ALIGNMENT = Question("alignment", "Does alignment before training help?", ("align.", "backbone.ref", "tune.method"))
PRETRAINING = Question("pretraining", "Do the pretrained weights help?", ALIGNMENT.settings)
# Without a language model there is no part of one to set, to train or to align, and no text whose scale inputs could have.
BACKBONE = Question(
    "backbone", "Does the language model help at all?", ("align.", "backbone.", "tune.", "embedder.match_scale")
)
PREDICTS = Question("predicts", "Does the term change how well text is predicted?", ("align.", "teacher.", "pairs."))
CONTROLS = Question("controls", "Is it the images? Losses with them beside those of controls", PREDICTS.settings)
ALIGNS = Question("aligns", "Does it align?", PREDICTS.settings)
TEXT_QUESTIONS = (PREDICTS, CONTROLS, ALIGNS)
QUESTIONS = {question.name: question for question in (ALIGNMENT, PRETRAINING, BACKBONE, *TEXT_QUESTIONS)}


def beside(results: Results, reference: str, outcomes: Iterable[Outcome]) -> Iterator[Pair]:
    """Every other row beside one, in each outcome that is tested; a family is all rows and outcomes of one kind."""
    for outcome in outcomes:
        for other in results.row:
            if outcome.tested and other != reference:
                yield Pair("beside", outcome.name, reference, other, outcome.family)


def beside_baseline(results: Results) -> Iterator[Pair]:
    """Every row of image classifiers beside FPT without alignment; shown, not tested."""
    rows = list(results.row.values())
    for row in rows:
        reference = baseline(row, rows)
        if reference is not None and reference is not row:
            yield Pair("baseline", ACCURACY.name, reference.label, row.label, "")


def image_pairs(results: Results) -> Iterator[Pair]:
    """The three questions about image classifiers, each row beside the reference that differs from it in the fewest settings.

    All that differ in what is asked alone are one family.
    """
    rows = list(results.row.values())

    def like(row: Row, weights: str) -> list[Row]:
        facts = (row.method, row.backbone, row.data, weights, "none")
        return [other for other in rows if (other.method, other.backbone, other.data, other.weights, other.align) == facts]

    def without(row: Row, method: str) -> list[Row]:
        fitting = [other for other in rows if other.data == row.data and other.backbone in ("", row.backbone)]
        return [other for other in fitting if other.method == method]

    plain = [row for row in rows if row.weights == "pretrained" and row.align == "none"]
    asked = [(ALIGNMENT, row, like(row, row.weights)) for row in rows if row.align != "none"]
    asked += [(PRETRAINING, row, like(row, weights)) for row in plain for weights in ("random", "shuffled")]
    asked += [(BACKBONE, row, without(row, method)) for row in plain for method in ("none", "vit")]
    for question, row, references in asked:
        if references:
            reference = min(references, key=lambda other: len(question.also(other, row)))
            yield question.pair(ACCURACY.name, reference, row, "images")


def text_pairs(results: Results) -> Iterator[Pair]:
    """The three questions about language models; each is a family in each block of rows that can be compared."""
    known = _known(results)
    for block, members in by_block(results.row.values()).items():
        for question, row, reference in itertools.product(TEXT_QUESTIONS, members, members):
            control = reference.align != "none" and reference.control and not row.control
            if row.align != "none" and (control if question is CONTROLS else reference.align == "none"):
                family = "held-out alignment" if question is ALIGNS else "losses"
                for label, outcome in known:
                    both = label == row.label and (reference.label, outcome) in known
                    if both and results.outcome[outcome].family == family:
                        yield question.pair(outcome, reference, row, f"{block}: {question.name}")


def _known(results: Results) -> dict[tuple[str, str], None]:
    """Rows and outcomes of which there is a number, in order."""
    return dict.fromkeys(zip(results.values.row, results.values.outcome, strict=True))


def before_and_after(results: Results) -> Iterator[Pair]:
    """Each row's tasks after its language model became a classifier beside those before, in one metric each; not tested."""
    known = _known(results)
    for row, name in known:
        task, _, metric = name.removeprefix(f"{BEFORE}.").rpartition(".")
        metrics = [other for other in (BITS_PER_BYTE, "acc") if (row, f"{BEFORE}.{task}.{other}") in known]
        if name.startswith(f"{BEFORE}.") and metric in metrics[:1]:
            yield Pair(BEFORE, f"{task}.{metric}", row, row, "", reference_outcome=name)
