"""Whether two rows differ: the one engine that tests it, over seeds and over what the trained models did on each item."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from crossalign.core.progress import progress
from crossalign.results.frame import Results, tidy
from crossalign.results.outcomes import Outcome, unlike
from crossalign.runs.evaluations import Answers
from crossalign.stats import (
    combine_mcnemar,
    detectable_difference,
    effect_size,
    holm,
    mcnemar,
    paired_bootstrap,
    paired_t,
    seeds_needed,
)

if TYPE_CHECKING:
    from pandas import DataFrame

By = Literal["seed", "sample"]
LEVEL = 0.05
COLUMNS = (
    "question", "family", "outcome", "reference", "other", "also",
    "seeds", "reference_values", "other_values", "reason", "notes",
    "t", "effect", "detectable", "needed", "needed_corrected", "change", "bootstrap", "mcnemar", "over_items",
    "p_seeds", "p_seeds_holm", "p_bootstrap", "p_bootstrap_holm", "p_mcnemar", "p_mcnemar_holm", "p_items", "p_items_holm",
    "over", "difference", "error", "low", "high", "p", "p_holm", "verdict",
)  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """A question that two rows answer in one outcome: how ``other`` differs from ``reference``."""

    question: str
    outcome: str
    reference: str
    other: str
    family: str
    """Of one question or several: Holm's correction is made within it, apart for each kind of test; empty: it is in none."""
    also: tuple[str, ...] = ()
    """Settings in which the rows differ beside the one that is asked about: such a pair is in no family and has no verdict."""
    reference_outcome: str = ""
    """The outcome of the reference, where it is another one."""


@dataclass(frozen=True)
class Pairing:
    """One outcome of two rows, seed by seed, and item by item where both kept them."""

    seeds: tuple[int, ...] = ()
    reference_values: tuple[float, ...] = ()
    other_values: tuple[float, ...] = ()
    answers: tuple[tuple[Answers, Answers], ...] = ()
    """Of each seed, the same items in the same order; empty unless every seed has them."""
    reason: str = ""
    """Why nothing could be paired, where nothing could."""
    notes: tuple[str, ...] = ()


def contrasts(results: Results, pairs: Iterable[Pair], resamples: int = 0, by: By = "seed") -> DataFrame:
    """Both kinds of tests of every pair, with Holm's correction: one line a pair.

    Over seeds the paired t-test speaks of the method; over items (documents, images), with the trained models held fixed, the
    bootstrap and McNemar's exact test speak of these trained models.

    Args:
        resamples: of the bootstrap over items; 0: none is made.
        by: what decides: the test over seeds, and that over items where there is one seed; or ``sample``, that over items.

    The columns of the frame: what was asked and paired (``Pair``, ``Pairing``); the tests as ``stats`` returns them (``t``,
    ``effect``, ``bootstrap``, ``mcnemar`` of each seed) with ``change``, the difference on each item, and ``over_items``, its
    standard error and interval: the bootstrap's, or that of McNemar's cells for one seed; p-values, raw and corrected, of the
    three tests, and of that which speaks for items (McNemar's, where it can be made); and what decides: ``over`` seeds or
    items, the difference, its standard error and 95 % interval, ``p``, ``p_holm`` and the ``verdict``: ``gain`` or ``loss``
    (shown after correction), ``alone`` (before it only), ``none``, ``undefined`` (no test was possible), ``unpaired``, or
    ``apart`` (more differs than what is asked). None stands for what is not known.

    Raises:
        UserError: a damaged file of answers, or SciPy or pandas is not installed.
    """
    pairs = list(pairs)
    records = []
    with progress(len(pairs), "comparing", unit="pair", leave=False) as bar:
        for pair in pairs:
            pairing = pair_up(results, pair)
            records.append(dict.fromkeys(COLUMNS) | vars(pair) | vars(pairing) | _tests(pairing, resamples))
            bar.update(1)
    _correct(records)
    for record in records:
        record |= _decision(record, by, results.outcome)
    return tidy(([record[column] for column in COLUMNS] for record in records), COLUMNS)


def pair_up(results: Results, pair: Pair) -> Pairing:
    """The seeds that both rows have, on the items that both were scored on."""
    reference, other = ({run.seed: run for run in results.row[label].runs} for label in (pair.reference, pair.other))
    common = [seed for seed in reference if seed in other]
    if not common:
        listed = (", ".join(map(str, seeds)) for seeds in (other, reference))
        return Pairing(reason="different seeds: {} here, {} there".format(*listed))
    names = pair.reference_outcome or pair.outcome, pair.outcome
    runs = {seed: (str(reference[seed].folder), str(other[seed].folder)) for seed in common}
    reasons = {seed: _unpaired(results, names, runs[seed]) for seed in common}
    seeds = tuple(seed for seed in common if not reasons[seed])
    if not seeds:
        return Pairing(reason="; ".join(dict.fromkeys(reasons.values())))
    notes = [f"seed {seed} of “{pair.other}” is left out: {reasons[seed]}" for seed in common if reasons[seed]]
    alone = sorted(set(reference) ^ set(other))
    if alone:
        which = f"seed{'s' if len(alone) > 1 else ''} {', '.join(map(str, alone))}"
        notes.append(f"“{pair.other}” and “{pair.reference}” do not share {which}, left out of their comparison")
    read = [tuple(map(results.answers, runs[seed], names)) for seed in seeds]
    answers = [(a, b) for a, b in read if isinstance(a, Answers) and isinstance(b, Answers)]
    if len(answers) < len(seeds):
        notes += [text for both in read for text in both if isinstance(text, str) and text]
        left, right = (tuple(results.number(runs[seed][side], names[side]).value for seed in seeds) for side in (0, 1))
        return Pairing(seeds, left, right, notes=tuple(notes))
    ids = reduce(np.intersect1d, [answer.ids for both in answers for answer in both])
    most = max(len(answer.ids) for both in answers for answer in both)
    if len(ids) < most:
        notes.append(
            f"{results.outcome[pair.outcome].label}, “{pair.other}” and “{pair.reference}”: {most - len(ids):,} of {most:,} "
            f"documents are not in all of their runs; paired on the other {len(ids):,}"
        )
    answers = [(a.only(ids), b.only(ids)) for a, b in answers]
    left, right = (tuple(both[side].score for both in answers) for side in (0, 1))
    return Pairing(seeds, left, right, tuple(answers), "", tuple(notes))


def _unpaired(results: Results, names: tuple[str, str], runs: tuple[str, str]) -> str:
    """Why two runs of one seed cannot be compared; empty where they can."""
    numbers = [results.number(run, name) for run, name in zip(runs, names, strict=True)]
    for number, run, name in zip(numbers, runs, names, strict=True):
        if math.isnan(number.value):
            return results.outcome[name].lacking(run)
    reason = unlike(numbers[0].fingerprint, numbers[1].fingerprint)
    left, right = map(results.answers, runs, names)
    if reason or isinstance(left, str) or isinstance(right, str):
        return reason
    shared = np.intersect1d(left.ids, right.ids)
    if not len(shared):
        return "no document in common"
    same = np.array_equal(left.only(shared).size, right.only(shared).size)
    return "" if same else "different documents under the same ids"


def _tests(pairing: Pairing, resamples: int) -> dict[str, Any]:
    """Both kinds of tests of one difference, before correction."""
    if pairing.reason:
        return {}
    t = paired_t(pairing.reference_values, pairing.other_values)
    tests: dict[str, Any] = {"t": t, "p_seeds": t.p_value, "effect": effect_size(t)}
    tests |= {"detectable": detectable_difference(t.sd, t.n), "needed": seeds_needed(t.difference, t.sd)}
    if not pairing.answers:
        return tests
    # One sample of items for all seeds: what both methods do on an item, on average over their trained models.
    first = pairing.answers[0][0]
    change = Answers(first.ids, np.mean([b.amount - a.amount for a, b in pairing.answers], axis=0), first.size)
    tests["change"] = change
    if resamples:
        drawn = paired_bootstrap(change.amount, change.size, resamples)
        tests |= {"bootstrap": drawn, "p_bootstrap": drawn.p_value}
        if drawn.interval is not None:
            tests["over_items"] = drawn.error, drawn.interval
    if all(side.right_or_wrong for both in pairing.answers for side in both):
        exact = tuple(mcnemar(a.amount == 1, b.amount == 1) for a, b in pairing.answers)
        tests |= {"mcnemar": exact, "p_mcnemar": combine_mcnemar(exact)}
        if len(exact) == 1:
            tests.setdefault("over_items", (exact[0].error, exact[0].interval))
    return tests


def _correct(records: list[dict[str, Any]]) -> None:
    """Holm's correction in each family and for each kind of test, and the seeds needed at the level of its first step."""
    for family in {record["family"] for record in records if record["family"]}:
        members = [record for record in records if record["family"] == family]
        for test in ("p_seeds", "p_bootstrap", "p_mcnemar"):
            for record, p in zip(members, holm([record[test] for record in members]), strict=True):
                record[f"{test}_holm"] = p
        tests = sum(record["p_seeds"] is not None for record in members)
        for record in members:
            t = record["t"]
            record["needed_corrected"] = seeds_needed(t.difference, t.sd, alpha=0.05 / tests) if t and tests else None


def _decision(record: dict[str, Any], by: By, outcomes: dict[str, Outcome]) -> dict[str, Any]:
    """What decides: the test over seeds, or over items where it is asked for or there is one seed."""
    t = record["t"]
    if t is None:
        return {"verdict": "apart" if record["also"] else "unpaired"}
    kind = "p_bootstrap" if record["p_mcnemar"] is None else "p_mcnemar"
    p_items, p_items_holm = record[kind], record[f"{kind}_holm"]
    if by == "sample" or t.n == 1:
        over, p, corrected = "items", p_items, p_items_holm
        error, interval = record["over_items"] or (None, None)
    else:
        over, p, corrected = "seeds", record["p_seeds"], record["p_seeds_holm"]
        error, interval = t.error, t.interval
    low, high = interval or (None, None)
    if record["also"]:
        verdict = "apart"
    elif p is None or corrected is None:
        verdict = "undefined"
    elif corrected > LEVEL:
        verdict = "alone" if p <= LEVEL else "none"
    else:
        verdict = "gain" if (t.difference < 0) is outcomes[record["outcome"]].lower_is_better else "loss"
    return {
        "p_items": p_items,
        "p_items_holm": p_items_holm,
        "over": over,
        "difference": t.difference,
        "error": error,
        "low": low,
        "high": high,
        "p": p,
        "p_holm": corrected,
        "verdict": verdict,
    }
