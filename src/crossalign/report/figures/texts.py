"""Figures of language models that were trained on text: differences of losses, and curves over steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from crossalign.report.blocks import Figure
from crossalign.report.figures.drawing import PALETTE, blank, clean, name_rows, styled
from crossalign.report.text import groups
from crossalign.results.frame import Results
from crossalign.results.outcomes import HELD_OUT
from crossalign.results.questions import PREDICTS
from crossalign.results.rows import NO_IMAGES, Row
from crossalign.runs.records import Run

if TYPE_CHECKING:
    from pandas import DataFrame

Series = dict[float, float]


def text_figures(results: Results, contrasts: DataFrame) -> list[Figure]:
    """Differences and curves of each model."""
    models, drawn = groups(results), list[Figure]()
    with styled():
        for number, (name, group) in enumerate(models.items(), 1):
            suffix, start = (f"-{number}", f"{name}. ") if len(models) > 1 else ("", "")
            tests = contrasts[contrasts.other.isin([row.label for row in group])]
            own = [difference_figure(results, tests), *curve_figures(group)]
            drawn += [replace(f, name=f.name + suffix, title=start + f.title, alt=start + f.alt) for f in own if f]
    return drawn


def difference_figure(results: Results, contrasts: DataFrame) -> Figure | None:
    """Every paired difference of losses from the row without the term, with its 95 % interval."""
    shown = [one for one in contrasts.itertuples() if one.question == PREDICTS.name and one.low is not None]
    if not shown:
        return None
    measures = list(dict.fromkeys(one.outcome for one in shown))
    labels = list(dict.fromkeys(one.other for one in shown))
    figure = blank(9.6, 1.1 + 0.3 * len(labels))
    for column, measure in enumerate(measures):  # an axis each: one text may scatter far more than another
        axes = figure.add_subplot(1, len(measures), column + 1)
        axes.axvline(0, color="#1a1d21", linewidth=0.8)
        for one in shown:
            if one.outcome == measure:
                place = labels.index(one.other)
                axes.plot((one.low, one.high), [place, place], color=PALETTE[0], linewidth=1.6)
                axes.plot(one.difference, place, "o", color=PALETTE[0], markersize=6)
        name_rows(axes, [clean(label, 60) for label in labels] if column == 0 else [""] * len(labels))
        axes.set_title(results.outcome[measure].label, fontsize="medium")
        axes.locator_params(axis="x", nbins=5)
    figure.supxlabel("difference in loss (nats a token); below zero the term helps", fontsize="medium")
    title = "Loss with the term minus loss without it, paired by seed, with 95 % intervals, not corrected."
    return Figure("differences", title, "Paired differences; the same numbers are in the table of comparisons.", figure)


CURVES = (
    ("curves-loss", "validation", "loss", "validation loss (nats a token)", "Validation loss over steps"),
    ("curves-aligned", "validation", HELD_OUT, "debiased linear CKA", "Alignment of held-out pairs over steps"),
    (
        "curves-score",
        "extra",
        "score",
        "score of the training pairs",
        "What the term sees over steps, each by its own score (dotted: pairs exchanged)",
    ),
)


def curve_figures(rows: list[Row]) -> Iterator[Figure | None]:
    """Mean over seeds of a number over steps, with its range."""
    for name, split, key, label, title in CURVES:
        figure = blank(9.6, 4.2)
        axes = figure.add_subplot()
        drawn = False
        for place, row in enumerate(rows):
            if split == "extra" and row.align in NO_IMAGES:  # what they log is in a unit of its own
                continue
            colour = PALETTE[place % len(PALETTE)]
            style = ("-", "--", "-.")[place // len(PALETTE) % 3]
            held = _mean_series([_series(run, split, key) for run in row.runs])
            if held is None:
                continue
            steps, mean, low, high = held
            drawn = drawn or len(steps) > 1  # one point is no curve: the table of results has it
            axes.plot(steps, mean, style, color=colour, linewidth=1.5, label=clean(row.label, 60))
            axes.fill_between(steps, low, high, color=colour, alpha=0.12, linewidth=0)
            null = _mean_series([_series(run, split, "null_score") for run in row.runs]) if split == "extra" else None
            if null is not None:
                axes.plot(null[0], null[1], ":", color=colour, linewidth=1.2)
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        if len(rows) > 1:
            figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
        seeds = ", mean over seeds; band: range" if any(len(row.runs) > 1 for row in rows) else ""
        blocks = max(_first_blocks(row) for row in rows)
        if key == "loss" and blocks:
            title += f", of the first {blocks:,} sequences of it; the table of results has the whole text"
        ends = "; end values are in the table of results" if key == HELD_OUT or (key == "loss" and not blocks) else ""
        yield Figure(name, f"{title}{seeds}.", f"{title}{ends}.", figure) if drawn else None


def _first_blocks(row: Row) -> int:
    """Sequences of the validation text that evaluations during training were limited to; 0 where they took all."""
    return int((row.first.config.get("loop") or {}).get("evaluate_blocks") or 0)


def _series(run: Run, split: str, key: str) -> Series:
    rows = [row for row in run.metrics if row.get("split") == split and isinstance(row.get(key), int | float)]
    return {float(row.get("step", 0)): float(row[key]) for row in rows}


def _mean_series(held: list[Series]) -> tuple[Any, ...] | None:
    held = [series for series in held if series]
    steps = sorted(set.intersection(*map(set, held))) if held else []
    if not steps:
        return None
    values = np.array([[series[step] for step in steps] for series in held])
    return np.array(steps), values.mean(axis=0), values.min(axis=0), values.max(axis=0)
