"""What rows are compared in: accuracy on test images, losses on texts, held-out alignment, scores of tasks."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce

import numpy as np
from numpy.typing import NDArray

from crossalign.core.refs import Ref
from crossalign.report.text import HELD_OUT
from crossalign.results.comparisons import same_test
from crossalign.results.rows import Row
from crossalign.runs.evaluations import BITS_PER_BYTE, Answers, is_likelihood
from crossalign.runs.records import Run


@dataclass(frozen=True)
class Outcome(ABC):
    """A number of each finished run, with what the run did on each document where that was kept."""

    name: str
    """As the command line names it."""
    label: str
    family: str
    """Holm's correction is made within it."""
    unit: str = ""
    """Of a difference."""
    share: bool = False
    """Shown in percent, and its differences in points."""
    lower_is_better: bool = False
    digits: int = 4
    tested: bool = True
    items: str = "documents"
    """What answers are about."""

    @abstractmethod
    def value(self, run: Run) -> float:
        """The run's number; NaN where it has none."""

    def answers(self, run: Run) -> Answers | None:
        """What the run did on each document; None where that was not kept."""
        return None

    def unlike(self, a: Run, b: Run) -> str:
        """Why the numbers of two runs cannot be compared; empty where they can."""
        return ""

    def unscored(self, run: Run) -> str:
        """What to say of a run that has no number."""
        return f"no {self.label}"

    def lacking(self, run: Run) -> str:
        """What to say of a run whose answers by document are not there; empty where there never are any."""
        return ""


@dataclass(frozen=True)
class ImageAccuracy(Outcome):
    """Share of test images that are classified correctly."""

    def value(self, run: Run) -> float:
        return run.number("test", "accuracy")

    def answers(self, run: Run) -> Answers | None:
        held = run.predictions
        return None if held is None else Answers(held.index, held.correct.astype(np.float64), np.ones(len(held.index)))

    def unlike(self, a: Run, b: Run) -> str:
        if a.text("data") != b.text("data"):
            return "different data"
        return "" if same_test(a, b) else "different test images"

    def lacking(self, run: Run) -> str:
        return f"no predictions.parquet in {run.folder} to pair images by; only running it again makes it"


@dataclass(frozen=True)
class Reported(Outcome):
    """A number in result.json, such as a text's loss."""

    keys: tuple[str, ...] = ()

    def value(self, run: Run) -> float:
        return run.number(*self.keys)

    def unlike(self, a: Run, b: Run) -> str:
        if a.text("data_fingerprint") != b.text("data_fingerprint"):
            return "different data or another tokenizer"
        if self.keys[0] == "held_out" and _measured_with(a) != _measured_with(b):
            return "alignment with another vision model"
        return ""


def _measured_with(run: Run) -> str:
    """The vision model of held-out alignment: a teacher that was never trained is measured by its trained original."""
    align = run.config.get("align")
    named = str(align.get("held_out_teacher") or "") if isinstance(align, dict) else ""
    return named or Ref(run.text("teacher")).base


@dataclass(frozen=True)
class TaskScore(Outcome):
    """A metric of an evaluated task."""

    task: str = ""
    metric: str = ""

    def value(self, run: Run) -> float:
        return math.nan if run.evaluation is None else run.evaluation.score(self.task, self.metric)

    def answers(self, run: Run) -> Answers | None:
        return None if run.evaluation is None else run.evaluation.answers(self.task, self.metric)

    def unlike(self, a: Run, b: Run) -> str:
        one, other = a.evaluation, b.evaluation
        if one is None or other is None:
            return ""
        here, there = other.tasks[self.task], one.tasks[self.task]
        for key in ("label", "few_shot", "bos", "precision"):
            if here.get(key) != there.get(key):
                return f"different {key.replace('_', '-')}: {here.get(key)} here, {there.get(key)} there"
        if is_likelihood(self.metric) and here.get("max_length") != there.get("max_length"):
            return f"text in pieces of {here.get('max_length')} tokens here, of {there.get('max_length')} there"
        return ""

    def unscored(self, run: Run) -> str:
        return f"no {self.name} in {run.folder}; crossalign evaluate {run.folder} --tasks {self.task} makes it"

    def lacking(self, run: Run) -> str:
        if run.evaluation is None:
            return self.unscored(run)
        path, columns = run.evaluation.samples(self.task), run.evaluation.columns(self.task)
        if columns is None:
            return f"no {path} to pair documents by; crossalign evaluate {run.folder} --tasks {self.task} makes it"
        if self.metric not in columns and self.metric != BITS_PER_BYTE:
            return f"{path} has no column '{self.metric}' to pair documents by (columns: {', '.join(columns)})"
        return f"{path} does not come to the {self.metric} of results.json, so its documents are not compared"


def outcomes_of(rows: list[Row]) -> list[Outcome]:
    """Everything that one row at least has a number of: tasks first, then test accuracy, losses and alignment."""
    runs = [run for row in rows for run in row.runs]
    found: list[Outcome] = _tasks(runs)
    accuracy = ImageAccuracy("accuracy", "test accuracy", "test accuracy", "points", share=True, digits=2, items="images")
    texts = dict.fromkeys(name for run in runs for name in (run.result or {}).get("scores") or {})
    losses = [
        Reported(f"loss.{t}", f"loss on {t}", "losses", "nats a token", lower_is_better=True, keys=("scores", t, "loss"))
        for t in texts
    ]
    aligned = Reported("alignment", "held-out alignment", "held-out alignment", keys=("held_out", HELD_OUT))
    possible: list[Outcome] = [accuracy, *losses, aligned]
    return found + [one for one in possible if any(not math.isnan(one.value(run)) for run in runs)]


def _tasks(runs: Iterable[Run]) -> list[Outcome]:
    found: dict[str, Outcome] = {}
    for evaluation in (run.evaluation for run in runs if run.evaluation is not None):
        for task, told in evaluation.tasks.items():
            for metric in evaluation.metrics(task):
                name, label = f"{task}.{metric}", f"{told.get('label') or task} {metric}"
                bits, likelihood = metric == BITS_PER_BYTE, is_likelihood(metric)
                # On the same documents a perplexity is the same likelihood in other units: it is shown, not tested again.
                again = likelihood and not bits and BITS_PER_BYTE in evaluation.metrics(task)
                found[name] = TaskScore(
                    name,
                    label,
                    "tasks",
                    unit="bits a byte" if bits else "" if likelihood else "points",
                    share=not likelihood,
                    lower_is_better=not evaluation.higher_is_better(task, metric),
                    digits=4 if bits else 2,
                    tested=not again,
                    task=task,
                    metric=metric,
                )
    return list(found.values())


@dataclass(frozen=True)
class Pairing:
    """One outcome of two rows, seed by seed, and document by document where both kept them."""

    seeds: tuple[int, ...] = ()
    reference: tuple[float, ...] = ()
    other: tuple[float, ...] = ()
    answers: tuple[tuple[Answers, Answers], ...] = ()
    """Of each seed, the same documents in the same order; empty unless every seed has them."""
    reason: str = ""
    """Why nothing could be paired, where nothing could."""
    notes: tuple[str, ...] = ()


def pair_outcome(outcome: Outcome, reference: Row, other: Row) -> Pairing:
    """The seeds that both rows have, on the documents that both were scored on."""
    mine, theirs = ({run.seed: run for run in row.runs} for row in (reference, other))
    common = [seed for seed in mine if seed in theirs]
    if not common:
        listed = (", ".join(map(str, seeds)) for seeds in (theirs, mine))
        return Pairing(reason="different seeds: {} here, {} there".format(*listed))
    runs = {seed: (mine[seed], theirs[seed]) for seed in common}
    reasons = {seed: _unpaired(outcome, *pair) for seed, pair in runs.items()}
    seeds = [seed for seed in common if not reasons[seed]]
    if not seeds:
        return Pairing(reason="; ".join(dict.fromkeys(reasons.values())))
    notes = [f"seed {seed} of “{other.label}” is left out: {reasons[seed]}" for seed in common if reasons[seed]]
    alone = sorted(set(mine) ^ set(theirs))
    if alone:
        which = f"seed{'s' if len(alone) > 1 else ''} {', '.join(map(str, alone))}"
        notes.append(f"“{other.label}” and “{reference.label}” do not share {which}, left out of their comparison")
    held = [tuple(outcome.answers(run) for run in runs[seed]) for seed in seeds]
    answers = [(a, b) for a, b in held if a is not None and b is not None]
    if len(answers) < len(seeds):
        lacking = [run for seed in seeds for run in runs[seed] if outcome.answers(run) is None]
        notes += [text for run in lacking if (text := outcome.lacking(run))]
        values = [tuple(outcome.value(run) for run in runs[seed]) for seed in seeds]
        return Pairing(tuple(seeds), *_columns(values), notes=tuple(notes))
    ids = reduce(np.intersect1d, [one.ids for pair in answers for one in pair])
    most = max(len(one.ids) for pair in answers for one in pair)
    if len(ids) < most:
        notes.append(
            f"{outcome.label}, “{other.label}” and “{reference.label}”: {most - len(ids):,} of {most:,} documents are not in "
            f"all of their runs; paired on the other {len(ids):,}"
        )
    aligned = [(a.only(ids), b.only(ids)) for a, b in answers]
    return Pairing(tuple(seeds), *_columns([(a.score, b.score) for a, b in aligned]), tuple(aligned), "", tuple(notes))


def _unpaired(outcome: Outcome, a: Run, b: Run) -> str:
    """Why two runs of one seed cannot be compared; empty where they can."""
    unscored = [run for run in (a, b) if math.isnan(outcome.value(run))]
    if unscored:
        return outcome.unscored(unscored[0])
    left, right = outcome.answers(a), outcome.answers(b)
    reason = outcome.unlike(a, b)
    if reason or left is None or right is None:
        return reason
    shared: NDArray[np.str_] = np.intersect1d(left.ids, right.ids)
    if not len(shared):
        return "no document in common"
    same = np.array_equal(left.only(shared).size, right.only(shared).size)
    return "" if same else "different documents under the same ids"


def _columns(values: list[tuple[float, ...]]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return tuple(a for a, _ in values), tuple(b for _, b in values)
