"""Figures of language models that were trained on text: differences of losses, and curves over steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from crossalign.report.blocks import Figure
from crossalign.report.figures.drawing import clean, styled
from crossalign.report.figures.shared import Panel, band_text, difference_figure, legend_below, line_style, panels
from crossalign.results.frame import Results
from crossalign.results.outcomes import HELD_OUT
from crossalign.results.questions import PREDICTS
from crossalign.results.rows import NO_IMAGES, Row, by_block

if TYPE_CHECKING:
    from pandas import DataFrame

DIFFERENCES = "Loss with the term minus loss without it, paired by seed, with 95 % intervals, not corrected."
FURTHER = "Other rows minus the first, paired by seed, with 95 % intervals, not corrected."
ACROSS = "difference in loss (nats a token); below zero the term helps"
CURVES = {
    "curves-loss": (Panel("validation loss (nats a token)", "loss", over="step"), "Validation loss over steps"),
    "curves-aligned": (Panel("debiased linear CKA", HELD_OUT, over="step"), "Alignment of held-out pairs over steps"),
    "curves-score": (
        Panel(
            "score of the training pairs", "score", "extra", over="step", beside=(("extra", "null_score", {"linestyle": ":"}),)
        ),
        "What the term sees over steps, each by its own score (dotted: pairs exchanged)",
    ),
}


def text_figures(results: Results, contrasts: DataFrame) -> list[Figure]:
    """Differences and curves of each model."""
    models, drawn = by_block(results.row.values()), list[Figure]()
    with styled():
        for number, (name, group) in enumerate(models.items(), 1):
            suffix, start = (f"-{number}", f"{name}. ") if len(models) > 1 else ("", "")
            tests = contrasts[contrasts.other.isin([row.label for row in group]) & (contrasts.question == PREDICTS.name)]
            own = [difference_figure(results, tests, DIFFERENCES, ACROSS), *curve_figures(group)]
            drawn += [replace(f, name=f.name + suffix, title=start + f.title, alt=start + f.alt) for f in own if f]
    return drawn


def further_figures(results: Results, contrasts: DataFrame) -> list[Figure]:
    """Differences of outcomes that no other figure shows, from one row."""
    with styled():
        figure = difference_figure(results, contrasts, FURTHER, "difference")
    return [replace(figure, name="differences-further")] if figure else []


def curve_figures(rows: list[Row]) -> Iterator[Figure]:
    """Mean over seeds of a number over steps, with its range; one that has a single point stands in the table alone."""
    for name, (panel, title) in CURVES.items():
        figure, [[axes]] = panels(9.6, 4.2)
        extra = panel.split == "extra"
        shown = {i: row for i, row in enumerate(rows) if not (extra and row.align in NO_IMAGES)}  # those log in other units
        styles = ({**line_style(i), "linewidth": 1.5, "label": clean(row.label, 60)} for i, row in shown.items())
        longest = panel.draw(axes, shown.values(), styles)
        axes.set_xlabel("step")
        if len(rows) > 1:
            legend_below(figure, axes, 2)
        # Sequences of the validation text that evaluations during training were limited to; 0 where they took all.
        limit = max(int((row.first.config.get("loop") or {}).get("evaluate_blocks") or 0) for row in rows)
        ends = "" if extra else "; end values are in the table of results"
        if panel.key == "loss" and limit:
            title += f", of the first {limit:,} sequences of it; the table of results has the whole text"
            ends = ""
        if longest > 1:
            yield Figure(name, f"{title}{band_text(rows)}.", f"{title}{ends}.", figure)
