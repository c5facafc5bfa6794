"""Figures of language models that were trained on text: differences of losses, and curves over steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from crossalign.report.blocks import Figure
from crossalign.report.figures.drawing import PALETTE, blank, clean, styled
from crossalign.report.figures.shared import Mark, Series, draw_curve, forest, mean_and_range
from crossalign.results.frame import Results
from crossalign.results.outcomes import HELD_OUT
from crossalign.results.questions import PREDICTS
from crossalign.results.rows import NO_IMAGES, Row, by_block
from crossalign.runs.records import Run

if TYPE_CHECKING:
    from pandas import DataFrame


def text_figures(results: Results, contrasts: DataFrame) -> list[Figure]:
    """Differences and curves of each model."""
    models, drawn = by_block(results.row.values()), list[Figure]()
    with styled():
        for number, (name, group) in enumerate(models.items(), 1):
            suffix, start = (f"-{number}", f"{name}. ") if len(models) > 1 else ("", "")
            tests = contrasts[contrasts.other.isin([row.label for row in group])]
            losses = difference_figure(results, tests[tests.question == PREDICTS.name], ACROSS)
            own = [losses, *curve_figures(group)]
            drawn += [replace(f, name=f.name + suffix, title=start + f.title, alt=start + f.alt) for f in own if f]
    return drawn


def further_figures(results: Results, contrasts: DataFrame) -> list[Figure]:
    """Differences of outcomes that no other figure shows, from one row."""
    with styled():
        figure = difference_figure(results, contrasts)
    title = "Other rows minus the first, paired by seed, with 95 % intervals, not corrected."
    return [replace(figure, name="differences-further", title=title)] if figure else []


def difference_figure(results: Results, contrasts: DataFrame, across: str = "") -> Figure | None:
    """Every paired difference with its 95 % interval, an axis an outcome; ``across`` is what all the axes show."""
    tests = [test for test in contrasts.itertuples() if test.low is not None]
    if not tests:
        return None
    measures = list(dict.fromkeys(test.outcome for test in tests))
    labels = list(dict.fromkeys(test.other for test in tests))
    figure = blank(9.6, 1.1 + 0.3 * len(labels))
    for column, measure in enumerate(measures, 1):  # an axis each: one text may scatter far more than another
        axes = figure.add_subplot(1, len(measures), column)
        own = [test for test in tests if test.outcome == measure]
        marks = [Mark(labels.index(test.other), test.low, test.difference, test.high) for test in own]
        forest(axes, [clean(label, 60) for label in labels] if column == 1 else [""] * len(labels), marks, zero=True)
        axes.set_title(results.outcome[measure].label, fontsize="medium")
        axes.locator_params(axis="x", nbins=5)
    figure.supxlabel(across or "difference", fontsize="medium")
    title = "Loss with the term minus loss without it, paired by seed, with 95 % intervals, not corrected."
    return Figure("differences", title, "Paired differences; the same numbers are in the table of comparisons.", figure)


ACROSS = "difference in loss (nats a token); below zero the term helps"
CURVES = {
    "curves-loss": ("validation", "loss", "validation loss (nats a token)", "Validation loss over steps"),
    "curves-aligned": ("validation", HELD_OUT, "debiased linear CKA", "Alignment of held-out pairs over steps"),
    "curves-score": ("extra", "score", "score of the training pairs", "What the term sees over steps, each by its own score"),
}


def curve_figures(rows: list[Row]) -> Iterator[Figure | None]:
    """Mean over seeds of a number over steps, with its range."""
    for name, (split, key, label, title) in CURVES.items():
        figure = blank(9.6, 4.2)
        axes, longest, extra = figure.add_subplot(), 0, split == "extra"
        for i, row in enumerate(rows):
            curve = mean_and_range(_steps(run, split, key) for run in row.runs)
            if curve is None or (extra and row.align in NO_IMAGES):  # what those log is in a unit of its own
                continue
            longest, colour = max(longest, len(curve.x)), PALETTE[i % len(PALETTE)]
            style = ("-", "--", "-.")[i // len(PALETTE) % 3]
            draw_curve(axes, curve, color=colour, linestyle=style, linewidth=1.5, label=clean(row.label, 60))
            null = mean_and_range(_steps(run, split, "null_score") for run in row.runs) if extra else None
            if null is not None:
                draw_curve(axes, null, band=0, color=colour, linestyle=":", linewidth=1.2)
        axes.set(xlabel="step", ylabel=label)
        if len(rows) > 1:
            figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
        seeds = ", mean over seeds; band: range" if any(len(row.runs) > 1 for row in rows) else ""
        # Sequences of the validation text that evaluations during training were limited to; 0 where they took all.
        limit = max(int((row.first.config.get("loop") or {}).get("evaluate_blocks") or 0) for row in rows)
        title += " (dotted: pairs exchanged)" if extra else ""
        if key == "loss" and limit:
            title += f", of the first {limit:,} sequences of it; the table of results has the whole text"
        ends = "; end values are in the table of results" if not extra and not (key == "loss" and limit) else ""
        yield Figure(name, f"{title}{seeds}.", f"{title}{ends}.", figure) if longest > 1 else None  # the table has one point


def _steps(run: Run, split: str, key: str) -> Series:
    rows = [row for row in run.metrics if row.get("split") == split and isinstance(row.get(key), int | float)]
    return {float(row.get("step", 0)): float(row[key]) for row in rows}
