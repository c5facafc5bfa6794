"""What runs are compared in: accuracy on test images, losses on texts, held-out alignment, scores of tasks.

A verb states the outcomes of a run in its result.json, and this is the one place where they are read. ``outcomes_of`` says what
the record of a version that did not state them comes to.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from crossalign.core.errors import UserError
from crossalign.core.refs import Ref
from crossalign.runs.evaluations import BITS_PER_BYTE, Answers, Evaluation
from crossalign.runs.names import RunFolder
from crossalign.runs.records import Predictions, Run
from crossalign.runs.schema import finite

HELD_OUT = "held_out_cka-linear-debiased"
ALIGNED = "alignment"
"""The outcome of which more is neither better nor worse."""
BEFORE = "before"
"""Prefix, and family, of a task's score before the language model became a classifier; only forgetting asks for it."""
VALIDATION = "validation"
"""Family of the number that a run's weights and settings are chosen by; nothing is compared in it."""
FAMILIES = ("tasks", "test accuracy", "losses", "held-out alignment")
"""The order in which outcomes are listed; those of other families follow."""


@dataclass(frozen=True)
class Outcome:
    """What a number of a run is of, and how it is shown."""

    name: str
    """As the command line names it."""
    label: str
    family: str
    """What Holm's correction is made within, where rows are compared with one reference."""
    unit: str = ""
    """Of a difference."""
    share: bool = False
    """Shown in percent, and its differences in points."""
    lower_is_better: bool = False
    digits: int = 4
    tested: bool = True
    items: str = "documents"
    """What answers are about."""
    remedy: str = ""
    """The command that makes the number, where a run lacks it; ``{run}`` stands for the run's folder."""

    @property
    def scale(self) -> int:
        """What a value is multiplied by to be shown."""
        return 100 if self.share else 1

    def lacking(self, run: str) -> str:
        """What to say of a run that has no number."""
        return f"no {self.name} in {run}; {self.remedy.format(run=run)} makes it" if self.remedy else f"no {self.label}"


ACCURACY = Outcome("accuracy", "test accuracy", "test accuracy", "points", share=True, digits=2, items="images")
VALIDATION_ACCURACY = Outcome("accuracy", "validation accuracy", VALIDATION, "points", share=True, digits=2)
VALIDATION_LOSS = Outcome("loss", "validation loss", VALIDATION, "nats a token", lower_is_better=True)
KINDS = {ACCURACY.family: "image classifiers", "losses": "language models"}
"""What runs are of, by a family of outcomes that no others have."""

Fingerprint = tuple[tuple[str, Any], ...]
"""What must be equal for two runs to be compared, each behind the sentence that tells it is not; None: not known."""


@dataclass(frozen=True)
class Score:
    """A run's number in one outcome; NaN where the record has the outcome without a number."""

    outcome: Outcome
    value: float
    fingerprint: Fingerprint
    answers: Callable[[], Answers | str]
    """Reads what the run did on each item, or a sentence on why that is not known; empty where it never is."""

    @property
    def goodness(self) -> float:
        """The number, turned so that more is better."""
        return -self.value if self.outcome.lower_is_better else self.value


def unlike(reference: Fingerprint, other: Fingerprint) -> str:
    """Why the numbers of two runs cannot be compared; empty where they can."""
    for (sentence, expected), (_, value) in zip(reference, other, strict=False):
        if value is not None and expected is not None and value != expected:
            return sentence.replace("{here}", str(value)).replace("{there}", str(expected))
    return ""


def scores_of(run: Run) -> Iterator[Score]:
    """Every number of a finished run that it can be compared in.

    Raises:
        UserError: an outcome in result.json that lacks its name or has an unknown key.
    """
    if run.evaluation is not None:
        yield from _tasks(run.evaluation)
    yield from (_stated(run, entry) for entry in outcomes_of(run) if entry.get("family") != VALIDATION)


def chosen_by(run: Run) -> Score:
    """The validation number by which a run is chosen among others.

    Raises:
        UserError: its result.json states none.
    """
    entry = next((entry for entry in outcomes_of(run) if entry.get("family") == VALIDATION), None)
    if entry is None:
        raise UserError(f"{run.folder}/result.json states no outcome of the family '{VALIDATION}' to choose by; run it again")
    return _stated(run, entry)


def stated(outcome: Outcome, value: float | None, fingerprint: Fingerprint = (), answers: Any = None) -> dict[str, Any]:
    """What result.json says of an outcome.

    Args:
        value: None where the run has none.
        fingerprint: see ``Fingerprint``.
        answers: where the run folder has what was done on each item: ``{"file", "id", "amount"}``, a parquet file and its
            columns, and ``"size"`` where that isn't 1. ``"amount"`` of two columns: 1 where they are equal, else 0.
    """
    entry: dict[str, Any] = {}
    for field in dataclasses.fields(Outcome):
        fact = getattr(outcome, field.name)
        if fact != field.default:
            entry[field.name] = fact
    entry["value"] = value
    if fingerprint:
        entry["fingerprint"] = [list(part) for part in fingerprint]
    if answers:
        entry["answers"] = answers
    return entry


def classifier_outcomes(result: dict[str, Any], predictions: Predictions | None) -> list[dict[str, Any]]:
    """What an image classifier's result.json states: accuracy on test images, and on those that chose its weights."""
    test = result.get("test") or {}
    validation = result.get("validation") or {}
    other_images = "different test images"
    fingerprint = (
        ("different data", str(result.get("data") or "")),
        (other_images, str(result.get("data_fingerprint") or "")),
        (other_images, test.get("n") if predictions is None else len(predictions.index)),
        (other_images, None if predictions is None else predictions.images),
    )
    answers = {"file": RunFolder.predictions.name, "id": "index", "amount": ["label", "predicted"]}
    return [
        stated(ACCURACY, test.get("accuracy"), fingerprint, answers),
        stated(VALIDATION_ACCURACY, validation.get("accuracy")),
    ]


def language_model_outcomes(result: dict[str, Any], measured_with: str) -> list[dict[str, Any]]:
    """What a language model's result.json states: losses on texts, and the alignment of pairs held out.

    Args:
        measured_with: the vision model that held-out alignment was asked to be measured with; empty for the teacher's own.
    """
    scores = result.get("scores") or {}
    data = ("different data or another tokenizer", str(result.get("data_fingerprint") or ""))
    # A teacher that was never trained is measured by its trained original.
    model = ("alignment with another vision model", measured_with or Ref(str(result.get("teacher") or "")).base)
    entries = []
    for text, numbers in scores.items():
        loss = Outcome(f"loss.{text}", f"loss on {text}", "losses", "nats a token", lower_is_better=True)
        entries.append(stated(loss, numbers.get("loss"), (data,)))
    aligned = Outcome(ALIGNED, "held-out alignment", "held-out alignment")
    entries.append(stated(aligned, (result.get("held_out") or {}).get(HELD_OUT), (data, model)))
    own: dict[str, Any] = next((scores[name] for name in ("validation", "answers") if name in scores), {})
    return [*entries, stated(VALIDATION_LOSS, own.get("loss"))]


def outcomes_of(run: Run) -> list[dict[str, Any]]:
    """What result.json states, or would if it were not of a version that had a field for each kind of run instead."""
    result = run.result or {}
    if "outcomes" in result:
        entries = result["outcomes"]
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise UserError(f"{run.folder}/result.json has 'outcomes' that are no list of outcomes; run it again")
        return entries
    if run.text("verb") in ("pretrain", "finetune"):
        align = run.config.get("align")
        return language_model_outcomes(result, str(align.get("held_out_teacher") or "") if isinstance(align, dict) else "")
    return classifier_outcomes(result, run.predictions)


def _stated(run: Run, entry: dict[str, Any]) -> Score:
    """An outcome that a run states, see ``stated``; ``answers`` may be the name of a file, with columns id, amount, size."""
    facts = dict(entry)
    value, answers, alike = (facts.pop(key, None) for key in ("value", "answers", "fingerprint"))
    columns = answers if isinstance(answers, dict) else {"file": answers or ""}
    try:
        outcome = Outcome(**{"label": facts["name"], "family": facts["name"], **facts})
        for field in dataclasses.fields(outcome):
            fact = getattr(outcome, field.name)
            if type(fact) is not field.type:
                raise TypeError(f"{field.name} is {fact!r}")
        file = _AnswersFile(run, outcome, _number(value), **columns)
        if outcome.share and abs(file.value) > 1:
            raise ValueError(f"value is {value!r}, no share")
        fingerprint = tuple((str(sentence), part) for sentence, part in alike or ())
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{run.folder}/result.json has a damaged outcome ({error}); run it again") from error
    return Score(outcome, file.value, fingerprint, file.answers)


@dataclass(frozen=True)
class _AnswersFile:
    """Where a run's folder has what it did on each item of an outcome, and what its result says that comes to."""

    run: Run
    outcome: Outcome
    value: float
    file: str
    id: str = "id"
    amount: str | list[str] = "amount"
    size: str = "size"

    def __post_init__(self) -> None:
        """Raises TypeError or ValueError where result.json has something else than names of a file and of its columns."""
        for part in ("file", "id", "size"):
            if not isinstance(getattr(self, part), str):
                raise TypeError(f"{part} is {getattr(self, part)!r}")
        one_or_two = isinstance(self.amount, list) and len(self.amount) in (1, 2)
        if not isinstance(self.amount, str) and not (one_or_two and all(isinstance(name, str) for name in self.amount)):
            raise TypeError(f"amount is {self.amount!r}")
        if Path(self.file).name != self.file:
            raise ValueError(f"'{self.file}' is no file of the run's folder")

    def answers(self) -> Answers | str:
        """What the run did on each item, or why that is not known; a note where it does not come to the stated value."""
        run, outcome = self.run, self.outcome
        if not self.file:
            return ""
        named = [self.amount] if isinstance(self.amount, str) else self.amount
        columns = run.columns(self.file, (self.id, *named))
        if columns is None:
            return f"no {self.file} in {run.folder} to pair {outcome.items} by; only running it again makes it"
        try:
            read = _answers_of(columns, self.id, named, self.size)
        except (TypeError, ValueError) as error:
            return f"{run.folder / self.file} has {error}, so its {outcome.items} are not paired"
        self._note_another_score(read.score)
        return read

    def _note_another_score(self, score: float) -> None:
        """Leave a note where the answers come to another score than the run states."""
        share, value = self.outcome.share, self.value
        if abs(score - value) > 1e-4 * (1 if share else max(1.0, abs(value))):
            read, says = (f"{100 * number:.2f} %" if share else f"{number:.4g}" for number in (score, value))
            right = " right" if share else ""
            self.run.notes.append(f"{self.run.folder}/{self.file} has {read}{right}, result.json says {says}")


def _answers_of(columns: dict[str, list[Any]], id_column: str, amounts: list[str], size_column: str) -> Answers:
    """Answers from the columns of a file; raises TypeError or ValueError, saying what it has that answers cannot have."""
    ids = np.asarray(columns[id_column])
    if ids.ndim != 1 or ids.dtype.kind not in "iufUS":
        raise ValueError("items without a number or a name")
    if len(np.unique(ids)) < len(ids):
        raise ValueError("an item twice")
    parts = [np.asarray(columns[name]) for name in amounts]
    sizes = columns.get(size_column, np.ones(len(ids)))
    try:
        amount = (parts[0] if len(parts) == 1 else parts[0] == parts[1]).astype(np.float64)
        size = np.asarray(sizes, np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError("other values than numbers") from error
    if not (np.isfinite(amount).all() and np.isfinite(size).all()):
        raise ValueError("other values than numbers")
    if not size.sum() > 0:
        raise ValueError("no items of any size")
    return Answers(ids, amount, size)


def _number(value: Any) -> float:
    """A number of a record; NaN where it is none, not finite, or too large to be computed with."""
    return float(value) if finite(value) else math.nan


def _tasks(evaluation: Evaluation) -> Iterator[Score]:
    """Every metric of every task, and what it was before the language model became a classifier."""
    for task, facts in evaluation.tasks.items():
        for metric, value in facts["metrics"].items():
            bits, likelihood = metric == BITS_PER_BYTE, metric == BITS_PER_BYTE or "perplexity" in metric
            higher = (facts.get("higher_is_better") or {}).get(metric)
            outcome = Outcome(
                f"{task}.{metric}",
                f"{facts.get('label') or task} {metric}",
                "tasks",
                unit="bits a byte" if bits else "" if likelihood else "points",
                share=not likelihood,
                lower_is_better=not higher if isinstance(higher, bool) else likelihood,
                digits=4 if bits else 2,
                # On the same documents a perplexity is the same likelihood in other units: it is shown, not tested again.
                tested=bits or not likelihood or BITS_PER_BYTE not in facts["metrics"],
                remedy=f"crossalign evaluate {{run}} --tasks {task}",
            )
            sentences = {
                key: f"different {key.replace('_', '-')}: {{here}} here, {{there}} there"
                for key in ("label", "few_shot", "bos", "precision")
            }
            if likelihood:
                sentences["max_length"] = "text in pieces of {here} tokens here, of {there} there"
            alike = tuple((sentence, str(facts.get(key))) for key, sentence in sentences.items())
            yield Score(outcome, _number(value), alike, partial(evaluation.answers, task, metric))
            forgot = evaluation.forgetting.get(task, {}).get(metric)
            if forgot is not None:
                read = partial(evaluation.before.answers, task, metric) if evaluation.before else str
                outcome = dataclasses.replace(outcome, name=f"{BEFORE}.{outcome.name}", family=BEFORE, tested=False)
                yield Score(outcome, _number(forgot.get("before")), alike, read)
