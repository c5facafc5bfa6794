"""Which rows answer which question, and the tests that say whether they differ."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from crossalign.results.rows import Row, settings
from crossalign.runs.records import Run
from crossalign.stats import (
    McNemar,
    PairedT,
    combine_mcnemar,
    detectable_difference,
    holm,
    mcnemar,
    paired_t,
    seeds_needed,
)

Question = Literal["alignment", "pretraining", "backbone"]

QUESTIONS: dict[Question, str] = {
    "alignment": "Does alignment before training help?",
    "pretraining": "Do the pretrained weights help?",
    "backbone": "Does the language model help at all?",
}


@dataclass(frozen=True)
class Comparison:
    """``other`` minus ``reference``, paired by seed and, within a seed, by test image."""

    question: Question
    reference: Row
    other: Row
    seeds: tuple[int, ...]
    t: PairedT | None
    images: tuple[McNemar, ...]
    p_images: float | None
    detectable: float | None = None
    needed: int | None = None
    p_holm: float | None = None
    p_images_holm: float | None = None
    also: tuple[str, ...] = ()
    """Settings beside the one in question in which the two rows differ."""
    reason: str = ""
    """Why runs could not be paired, where they could not."""


def pair(reference: Row, other: Row, question: Question = "alignment") -> Comparison:
    """Compare two rows over the seeds that both have and that were scored on the same test images."""
    if reference.data != other.data:
        return Comparison(question, reference, other, (), None, (), None, reason="different data")
    mine, theirs = ({run.seed: run for run in row.runs} for row in (reference, other))
    common = [seed for seed in mine if seed in theirs]
    seeds, images, accuracy = [], [], []
    for seed in common:
        a, b = mine[seed], theirs[seed]
        if not same_test(a, b):
            continue
        left, right = a.predictions, b.predictions
        if left is not None and right is not None:
            images.append(mcnemar(left.correct, right.correct))
        values = a.number("test", "accuracy"), b.number("test", "accuracy")
        if values[0] == values[0] and values[1] == values[1]:
            seeds.append(seed)
            accuracy.append(values)
    if not seeds:
        scored = [seed for seed in common if min(r[seed].number("test", "n") for r in (mine, theirs)) > 0]
        reason = "different test images" if scored else "no test score" if common else "no seed in common"
        return Comparison(question, reference, other, (), None, (), None, reason=reason)
    t = paired_t([a for a, _ in accuracy], [b for _, b in accuracy])
    return Comparison(question, reference, other, tuple(seeds), t, tuple(images), combine_mcnemar(images), reason=t.reason)


def same_test(a: Run, b: Run) -> bool:
    """Whether two runs were scored on the same test images, as far as their folders tell."""
    if a.text("data_fingerprint") != b.text("data_fingerprint"):
        return False
    if a.predictions is not None and b.predictions is not None:
        return a.predictions.images == b.predictions.images
    return a.number("test", "n") == b.number("test", "n")


def compare_rows(rows: list[Row]) -> list[Comparison]:
    """Every comparison that the rows allow, with Holm's correction over them all, once for each kind of test."""
    found = []
    for question, reference, other in _pairs(rows):
        one = pair(reference, other, question)
        if one.t is not None:
            one = replace(
                one,
                detectable=detectable_difference(one.t.sd, one.t.n),
                needed=seeds_needed(one.t.difference, one.t.sd),
                also=_also(reference, other) if question != "backbone" else (),
            )
        found.append(one)
    by_seed = holm([one.t.p_value if one.t else None for one in found])
    by_image = holm([one.p_images for one in found])
    return [replace(one, p_holm=p, p_images_holm=q) for one, p, q in zip(found, by_seed, by_image, strict=True)]


def _pairs(rows: list[Row]) -> Iterator[tuple[Question, Row, Row]]:
    for row in rows:
        if row.align == "none":
            continue
        plain = [r for r in rows if r.align == "none" and _like(r, row) and r.weights == row.weights]
        if plain:
            yield "alignment", _nearest(row, plain), row
    pretrained = [row for row in rows if row.weights == "pretrained" and row.align == "none"]
    for row in pretrained:
        for weights in ("random", "shuffled"):
            controls = [r for r in rows if r.weights == weights and r.align == "none" and _like(r, row)]
            if controls:
                yield "pretraining", _nearest(row, controls), row
    for row in pretrained:
        for method in ("none", "vit"):
            others = [r for r in rows if r.method == method and r.data == row.data and r.backbone in ("", row.backbone)]
            if others:
                yield "backbone", _nearest(row, others), row


def _like(a: Row, b: Row) -> bool:
    return (a.method, a.backbone, a.data) == (b.method, b.backbone, b.data)


def _nearest(row: Row, candidates: list[Row]) -> Row:
    """Of several rows that could be the reference, the one whose configuration differs in the fewest settings."""
    return min(candidates, key=lambda other: len(_also(row, other)))


def _also(a: Row, b: Row) -> tuple[str, ...]:
    """Settings in which two rows differ beside alignment, backbone weights, and the learning rate that each chose."""
    left, right = settings(a.first), settings(b.first)
    keys = [key for key in dict.fromkeys([*left, *right]) if repr(left.get(key)) != repr(right.get(key))]
    expected = ("align.", "optim.lr", "backbone.ref", "tune.method", "loop.precision", "loop.compile")
    return tuple(key for key in keys if not key.startswith(expected))
