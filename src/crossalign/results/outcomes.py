"""What runs are compared in: accuracy on test images, losses on texts, held-out alignment, scores of tasks.

This is the one place where a run's record becomes outcomes. A result.json that states its ``outcomes`` itself is taken as it
stands; one from before that has a field for each kind.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from crossalign.core.errors import UserError
from crossalign.core.refs import Ref
from crossalign.results.rows import TEXT_VERBS
from crossalign.runs.evaluations import BITS_PER_BYTE, Answers, Evaluation, is_likelihood
from crossalign.runs.records import Run, read_columns

HELD_OUT = "held_out_cka-linear-debiased"
ALIGNED = "alignment"
"""The outcome of which more is neither better nor worse."""
BEFORE = "before"
"""Prefix, and family, of a task's score before the language model became a classifier; only forgetting asks for it."""
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

    def lacking(self, run: str) -> str:
        """What to say of a run that has no number."""
        return f"no {self.name} in {run}; {self.remedy.format(run=run)} makes it" if self.remedy else f"no {self.label}"


ACCURACY = Outcome("accuracy", "test accuracy", "test accuracy", "points", share=True, digits=2, items="images")

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


def unlike(reference: Fingerprint, other: Fingerprint) -> str:
    """Why the numbers of two runs cannot be compared; empty where they can."""
    for (sentence, there), (_, here) in zip(reference, other, strict=False):
        if here is not None and there is not None and here != there:
            return sentence.replace("{here}", str(here)).replace("{there}", str(there))
    return ""


def scores_of(run: Run) -> Iterator[Score]:
    """Every number of a finished run that it can be compared in.

    Raises:
        UserError: an outcome in result.json that lacks its name or has an unknown key.
    """
    if run.evaluation is not None:
        yield from _tasks(run, run.evaluation)
    stated = (run.result or {}).get("outcomes")
    if stated is not None:
        yield from (_stated(run, entry) for entry in stated)
    elif run.text("verb") in TEXT_VERBS:
        yield from _language_model(run)
    else:
        yield _classifier(run)


def _stated(run: Run, entry: dict[str, Any]) -> Score:
    """An outcome that a run states: fields of ``Outcome``, its value, and what answers and comparisons need.

    ``fingerprint`` is a list of (sentence, value), ``answers`` a parquet file in the run folder with the columns id and amount,
    and size where it isn't 1.
    """
    facts = {key: value for key, value in entry.items() if key not in ("value", "fingerprint", "answers")}
    try:
        outcome = Outcome(**{"label": facts["name"], "family": facts["name"], **facts})
    except (KeyError, TypeError) as error:
        raise UserError(f"{run.folder}/result.json has a damaged outcome ({error}); run it again") from error
    file = str(entry.get("answers") or "")

    def answers() -> Answers | str:
        columns = read_columns(run.folder / file, ["id", "amount"], ["size"], run.notes) if file else None
        if columns is None:
            return f"no {file} in {run.folder} to pair {outcome.items} by; only running it again makes it" if file else ""
        amount = np.asarray(columns["amount"], np.float64)
        return Answers(np.asarray(columns["id"]), amount, np.asarray(columns.get("size", np.ones(len(amount))), np.float64))

    fingerprint = tuple((str(sentence), part) for sentence, part in entry.get("fingerprint") or [])
    return Score(outcome, _number(entry.get("value")), fingerprint, answers)


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _classifier(run: Run) -> Score:
    read = run.predictions
    other, count = "different test images", run.number("test", "n") if read is None else len(read.index)
    images = None if read is None else read.images
    data = ("different data", run.text("data")), (other, run.text("data_fingerprint"))

    def answers() -> Answers | str:
        if read is None:
            return f"no predictions.parquet in {run.folder} to pair images by; only running it again makes it"
        return Answers(read.index, read.correct.astype(np.float64), np.ones(len(read.index)))

    return Score(ACCURACY, run.number("test", "accuracy"), (*data, (other, count), (other, images)), answers)


def _language_model(run: Run) -> Iterator[Score]:
    data = ("different data or another tokenizer", run.text("data_fingerprint"))
    for text in (run.result or {}).get("scores") or {}:
        loss = Outcome(f"loss.{text}", f"loss on {text}", "losses", "nats a token", lower_is_better=True)
        yield Score(loss, run.number("scores", text, "loss"), (data,), str)
    aligned = Outcome(ALIGNED, "held-out alignment", "held-out alignment")
    model = ("alignment with another vision model", _measured_with(run))
    yield Score(aligned, run.number("held_out", HELD_OUT), (data, model), str)


def _measured_with(run: Run) -> str:
    """The vision model of held-out alignment: a teacher that was never trained is measured by its trained original."""
    align = run.config.get("align")
    named = str(align.get("held_out_teacher") or "") if isinstance(align, dict) else ""
    return named or Ref(run.text("teacher")).base


def _tasks(run: Run, evaluation: Evaluation) -> Iterator[Score]:
    """Every metric of every task, and what it was before the language model became a classifier."""
    for task, facts in evaluation.tasks.items():
        for metric in evaluation.metrics(task):
            outcome = _task_outcome(evaluation, task, metric)
            alike = [
                (f"different {key.replace('_', '-')}: {{here}} here, {{there}} there", str(facts.get(key)))
                for key in ("label", "few_shot", "bos", "precision")
            ]
            if is_likelihood(metric):
                pieces = "text in pieces of {here} tokens here, of {there} there"
                alike.append((pieces, str(facts.get("max_length"))))
            value = evaluation.score(task, metric)
            yield Score(outcome, value, tuple(alike), partial(evaluation.answers, task, metric))
            forgot = evaluation.forgetting.get(task, {}).get(metric)
            if forgot is not None:
                name, before = f"{BEFORE}.{outcome.name}", evaluation.before
                yield Score(
                    dataclasses.replace(outcome, name=name, family=BEFORE, tested=False),
                    _number(forgot.get("before")),
                    tuple(alike),
                    partial(before.answers, task, metric) if before else str,
                )


def _task_outcome(evaluation: Evaluation, task: str, metric: str) -> Outcome:
    bits, likelihood = metric == BITS_PER_BYTE, is_likelihood(metric)
    # On the same documents a perplexity is the same likelihood in other units: it is shown, not tested again.
    again = likelihood and not bits and BITS_PER_BYTE in evaluation.metrics(task)
    return Outcome(
        f"{task}.{metric}",
        f"{evaluation.tasks[task].get('label') or task} {metric}",
        "tasks",
        unit="bits a byte" if bits else "" if likelihood else "points",
        share=not likelihood,
        lower_is_better=not evaluation.higher_is_better(task, metric),
        digits=4 if bits else 2,
        tested=not again,
        remedy=f"crossalign evaluate {{run}} --tasks {task}",
    )
