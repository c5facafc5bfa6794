"""Every row against one reference in every outcome: tests over seeds and over documents, corrected within a family."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from crossalign.core.progress import progress
from crossalign.results.outcomes import Outcome, Pairing, pair_outcome
from crossalign.results.rows import Row
from crossalign.stats import (
    Bootstrap,
    EffectSize,
    Interval,
    McNemar,
    PairedT,
    combine_mcnemar,
    detectable_difference,
    effect_size,
    holm,
    mcnemar,
    paired_bootstrap,
    paired_t,
    seeds_needed,
)

By = Literal["seed", "sample"]


@dataclass(frozen=True)
class PValue:
    """A p-value, and the same after Holm's correction; None where there was no test."""

    raw: float | None = None
    holm: float | None = None


@dataclass(frozen=True)
class Contrast:
    """``other`` minus ``reference`` in one outcome."""

    outcome: Outcome
    reference: Row
    other: Row
    pairing: Pairing
    t: PairedT | None = None
    effect: EffectSize | None = None
    detectable: float | None = None
    needed: int | None = None
    needed_corrected: int | None = None
    bootstrap: Bootstrap | None = None
    mcnemar: tuple[McNemar, ...] = ()
    """Of each seed."""
    p_seeds: PValue = PValue()
    p_bootstrap: PValue = PValue()
    p_mcnemar: PValue = PValue()

    @property
    def p_documents(self) -> PValue:
        """Of the test over documents that decides: the exact one where answers are right or wrong."""
        return self.p_mcnemar if self.p_mcnemar.raw is not None else self.p_bootstrap

    @property
    def over_documents(self) -> tuple[float, Interval] | None:
        """Standard error and interval over documents, of these trained models; None where they cannot be known.

        The bootstrap's; where it has none, that of McNemar's cells for one seed.
        """
        if self.bootstrap is not None and self.bootstrap.interval is not None:
            return self.bootstrap.error, self.bootstrap.interval
        return (self.mcnemar[0].error, self.mcnemar[0].interval) if len(self.mcnemar) == 1 else None

    def decides(self, by: By) -> tuple[PValue, bool]:
        """The p-value that a star stands for, and whether it is one over documents: so for one seed in any case."""
        if by == "sample" or self.t is None or self.t.n == 1:
            return self.p_documents, True
        return self.p_seeds, False


def contrasts_of(rows: list[Row], reference: Row, outcomes: Iterable[Outcome], resamples: int) -> list[Contrast]:
    """Every other row beside ``reference``, outcome by outcome.

    Holm's correction is over all rows and outcomes of one family together, apart for each of the three tests.
    """
    tested = [one for one in outcomes if one.tested]
    others = [row for row in rows if row is not reference]
    found = []
    with progress(len(tested) * len(others), "comparing", unit="pair", leave=False) as bar:
        for outcome in tested:
            for other in others:
                found.append(contrast(outcome, reference, other, resamples))
                bar.update(1)
    return corrected(found)


def contrast(outcome: Outcome, reference: Row, other: Row, resamples: int) -> Contrast:
    """Both kinds of tests of one difference, before correction."""
    pairing = pair_outcome(outcome, reference, other)
    if pairing.reason:
        return Contrast(outcome, reference, other, pairing)
    t = paired_t(pairing.reference, pairing.other)
    told = Contrast(outcome, reference, other, pairing, t, p_seeds=PValue(t.p_value), effect=effect_size(t))
    told = replace(told, detectable=detectable_difference(t.sd, t.n), needed=seeds_needed(t.difference, t.sd))
    if not pairing.answers:
        return told
    # One sample of documents for all seeds: what both methods do on a document, on average over their trained models.
    difference = np.mean([b.amount - a.amount for a, b in pairing.answers], axis=0)
    drawn = paired_bootstrap(difference, pairing.answers[0][0].size, resamples)
    told = replace(told, bootstrap=drawn, p_bootstrap=PValue(drawn.p_value))
    if not all(one.right_or_wrong for pair in pairing.answers for one in pair):
        return told
    exact = tuple(mcnemar(a.amount == 1, b.amount == 1) for a, b in pairing.answers)
    return replace(told, mcnemar=exact, p_mcnemar=PValue(combine_mcnemar(exact)))


def corrected(contrasts: list[Contrast]) -> list[Contrast]:
    """The contrasts with Holm's correction, in each family and for each kind of test."""
    made = list(contrasts)
    families = dict.fromkeys(one.outcome.family for one in made)
    for family, test in itertools.product(families, ("p_seeds", "p_bootstrap", "p_mcnemar")):
        places = [i for i, one in enumerate(made) if one.outcome.family == family]
        held: list[PValue] = [getattr(made[i], test) for i in places]
        for i, p, adjusted in zip(places, held, holm([p.raw for p in held]), strict=True):
            change: dict[str, Any] = {test: replace(p, holm=adjusted)}
            made[i] = replace(made[i], **change)
    counts = Counter(one.outcome.family for one in made if one.p_seeds.raw is not None)
    return [replace(one, needed_corrected=_needed(one.t, counts[one.outcome.family])) for one in made]


def _needed(t: PairedT | None, tests: int) -> int | None:
    """Seeds that would show the difference at the level of Holm's first step among so many tests."""
    return seeds_needed(t.difference, t.sd, alpha=0.05 / tests) if t is not None and tests else None
