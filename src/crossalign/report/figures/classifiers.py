"""Figures of image classifiers: accuracies, differences, curves of training and of alignment, errors, learning rates."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from crossalign.core.refs import Ref
from crossalign.report.blocks import Figure
from crossalign.report.figures.drawing import BLUE, GREEN, INK, MUTED, ORANGE, PALETTE, PURPLE, RED, SKY, clean, styled
from crossalign.report.figures.shared import Mark, Panel, band_text, difference_figure, forest, legend_below, line_style, panels
from crossalign.results.frame import Results
from crossalign.results.rows import ALIGNMENTS, Row, best, blocks
from crossalign.runs.records import Run, Study

if TYPE_CHECKING:
    from pandas import DataFrame

ALIGN_COLOURS = dict(zip(ALIGNMENTS, (INK, ORANGE, PURPLE, BLUE, GREEN, SKY, RED), strict=True))
QUESTION_COLOURS = {"alignment": BLUE, "pretraining": ORANGE, "backbone": GREEN}
SHAPES = "osD^vP*X<>"
DASHED, DOTTED = {"linestyle": (0, (3, 2))}, {"linestyle": ":", "color": MUTED}
TRAINING = (
    Panel("accuracy (%)", "accuracy", scale=100, beside=(("train", "accuracy", DASHED),)),
    Panel("loss (nats)", "loss", beside=(("train", "loss", DASHED),)),
)
ALIGNING = (
    Panel("divergence / its first value", "divergence", "train", "align", scale=0),
    Panel("MMD on held-out images", "heldout_mmd", stage="align"),
    Panel("effective rank", "effective_rank", stage="align", beside=(("validation", "effective_rank_text", DOTTED),)),
    Panel("standard deviation", "std", stage="align", beside=(("validation", "std_text", DOTTED),)),
)


def classifier_figures(results: Results, rows: list[Row], contrasts: DataFrame) -> list[Figure]:
    """Every figure that the runs have data for, in the order of the page."""
    parts = blocks(rows)
    differences = "Paired differences with 95 % intervals, not corrected; a diamond's interval leaves out zero."
    if any(test.low is not None and test.over == "items" for test in contrasts.itertuples()):
        differences += " With one seed the interval is over test images."
    across = "difference in test accuracy (points)"
    with styled():
        figures = [accuracy_figure(rows), difference_figure(results, contrasts, differences, across, QUESTION_COLOURS)]
        for number, block in enumerate(parts, 1):
            several = (f"-{number}", f", {Ref(block[0].backbone).short_name}") if len(parts) > 1 else ("", "")
            figures += [curve_figure(block, *several), align_figure(block, *several)]
        figures += [confusion_figure(best(rows)), reliability_figure(rows), *sweep_figures(results.study)]
    return [figure for figure in figures if figure is not None]


def unfinished_figures(runs: list[Run]) -> list[Figure]:
    """Curves of runs that have no result yet, one row each."""
    rows = [Row(f"{run.name}, seed {run.seed}", (run,)) for run in runs]
    with styled():
        figures = curve_figure(rows, "", " (incomplete)"), align_figure(rows, "", " (incomplete)")
    return [figure for figure in figures if figure is not None]


def accuracy_figure(rows: list[Row]) -> Figure | None:
    """Every row's test accuracy: each seed, the mean and its standard error."""
    if len(rows) < 2:
        return None
    figure, [[axes]] = panels(9.6, 0.9 + 0.3 * len(rows))
    marks = []
    for i, row in enumerate(rows):
        accuracy, _ = row.accuracy
        mean, error = 100 * accuracy.mean, 100 * (math.nan if accuracy.error is None else accuracy.error)
        colour = ALIGN_COLOURS.get(row.align, BLUE) if row.weights == "pretrained" else MUTED
        seeds = [100 * run.number("test", "accuracy") for run in row.runs]
        axes.plot(seeds, [i] * len(seeds), "|", color=colour, markersize=11, alpha=0.7)
        marks.append(Mark(i, mean - error, mean, mean + error, colour))
    forest(axes, [row.label for row in rows], marks, caps=3)
    axes.set_xlabel("test accuracy (%)")
    alt = "Test accuracy of each row; the same numbers are in the table of test results."
    title = "Test accuracy: mean ± standard error (dot) and each seed (stroke)."
    if any(len(row.runs) == 1 for row in rows):
        title += " Where there is one seed the standard error is over test images."
    return Figure("accuracy", title, alt, figure)


def _families(block: list[Row]) -> dict[str, list[Row]]:
    """Rows that share a panel: pretrained ones by method, then the controls."""
    names = {"fpt": "FPT", "lora": "LoRA", "full": "Full fine-tuning"}
    families: dict[str, list[Row]] = {}
    for row in block:
        own = names.get(row.method, row.method or "runs") if row.weights == "pretrained" else "Controls"
        families.setdefault(own, []).append(row)
    return families


def curve_figure(block: list[Row], suffix: str, where: str) -> Figure | None:
    """Accuracy and loss over epochs, a column of panels for each method (CMDA figures 1 and 2)."""
    families = _families(block)
    if not any(run.series("train", "validation", "loss") for row in block for run in row.runs):
        return None
    alone = len(families) == 1  # then the two panels lie side by side
    columns = {"columns": 2} if alone else {"lines": 2, "columns": len(families), "sharex": "col", "sharey": "row"}
    figure, grid = panels(9.6, 3.6, **columns) if alone else panels(3.2 * len(families), 6, **columns)
    for column, (name, rows) in zip(grid if alone else grid.T, families.items(), strict=True):
        styles: list[dict[str, Any]] = []
        told_apart = len({row.align for row in rows} & set(ALIGN_COLOURS)) == len(rows)
        for i, row in enumerate(rows):
            colour = ALIGN_COLOURS[row.align] if told_apart else PALETTE[i % len(PALETTE)]
            styles.append({"color": colour, "marker": SHAPES[i % len(SHAPES)], "label": clean(row.label, 38)})
        for axes, panel in zip(column, TRAINING, strict=True):
            panel.draw(axes, rows, styles)
            axes.set_xlabel("epoch" if alone or panel is TRAINING[1] else "")
            axes.set_ylabel(panel.label if alone or axes in grid[:, 0] else "")
        if not alone:
            column[0].set_title(name)
            column[1].legend(loc="upper left", bbox_to_anchor=(-0.02, -0.2))
        elif len(rows) > 1:
            legend_below(figure, column[0], 3)
    seeds = band_text(block, "range of validation")
    title = f"Accuracy and loss{where}: validation (solid, marked) and training (dashed){seeds}."
    alt = "Curves of accuracy and loss over epochs; their last values are in the table of test results."
    return Figure(f"curves{suffix}", title, alt, figure)


def align_figure(block: list[Row], suffix: str, where: str) -> Figure | None:
    """The alignment stage: does it come closer, and does it collapse?"""
    rows = [row for row in block if any(run.series("align", entry.split, entry.key) for run in row.runs for entry in ALIGNING)]
    if not rows:
        return None
    figure, grid = panels(11, 6.2, 2, 2, sharex=True)
    # One colour for one divergence, one shape for one method: nine lines are read by two keys, not nine.
    methods = list(dict.fromkeys((row.method, row.weights) for row in rows))
    styles: list[dict[str, Any]] = []
    for row in rows:
        shape = SHAPES[methods.index((row.method, row.weights)) % len(SHAPES)]
        styles.append({"color": ALIGN_COLOURS.get(row.align, RED), "marker": shape, "label": clean(row.label)})
    for axes, panel in zip(grid.flat, ALIGNING, strict=True):
        panel.draw(axes, rows, styles)
    for axes in grid[1]:
        axes.set_xlabel("epoch of alignment")
    if len(rows) > 1:
        legend_below(figure, grid[0][0], 3)
    title = f"Alignment stage{where}. Dotted: the same number for text embeddings; a fall far below it is a collapse."
    alt = "Divergence, held-out MMD, effective rank and standard deviation over the epochs of alignment."
    return Figure(f"alignment{suffix}", title, alt, figure)


def confusion_counts(row: Row) -> tuple[list[str], NDArray[np.int64]] | None:
    """Class names and counts (true class, predicted class) summed over seeds, from predictions where there are any."""
    names = row.first.classes
    total = np.zeros((len(names), len(names)), np.int64)
    for run in row.runs:
        predictions = run.predictions
        if run.classes != names:
            continue
        if predictions is not None and len(predictions.label):
            if max(predictions.label.max(), predictions.predicted.max()) >= len(names):
                return None
            np.add.at(total, (predictions.label, predictions.predicted), 1)
        else:
            stated = np.asarray(((run.result or {}).get("test") or {}).get("confusion") or [], np.int64)
            total += stated if stated.shape == total.shape else 0
    return (names, total) if total.any() else None


def confusion_figure(row: Row) -> Figure | None:
    """Which class is taken for which, in percent of the true class."""
    from matplotlib.colors import LinearSegmentedColormap, to_rgb

    confusions = confusion_counts(row)
    if confusions is None:
        return None
    names, counts = confusions
    share = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    written = len(names) <= 20
    side = min(7.5, 2.2 + 0.42 * len(names)) if written else 6.5
    figure, [[axes]] = panels(side + 0.8, side)
    fade = LinearSegmentedColormap.from_list("fade", [(*to_rgb(BLUE), 0.0), (*to_rgb(BLUE), 1.0)])
    axes.imshow(share, cmap=fade, vmin=0, vmax=100, interpolation="nearest")
    axes.grid(visible=False)
    if written:
        slant: Any = {"rotation": 45, "ha": "right"} if max(map(len, names)) > 3 else {}
        axes.set_xticks(range(len(names)), [clean(name, 16) for name in names], **slant)
        axes.set_yticks(range(len(names)), [clean(name, 16) for name in names])
        for (i, j), value in np.ndenumerate(share):
            if value >= 0.5:
                axes.text(j, i, f"{value:.0f}", ha="center", va="center", fontsize=8, color="white" if value > 55 else INK)
    axes.set(xlabel="predicted class", ylabel="true class")
    seeds = f", {len(row.runs)} seeds" if len(row.runs) > 1 else ""
    title = f"Confusion matrix of “{row.label}”{seeds}: percent of each true class."
    return Figure("confusion", title, f"{title} The most frequent confusions are in the table beside it.", figure)


def reliability_figure(rows: list[Row]) -> Figure | None:
    """Confidence against accuracy in ten bins, for the best row of each method."""
    families = [family for block in blocks(rows) for family in _families(block).items()]
    chosen = [best(family) for name, family in families if name != "Controls"] or [best(rows)]
    binned = [(row, bins) for row in chosen if (bins := confidence_bins(row)) is not None][:6]
    if not binned:
        return None
    columns = min(3, len(binned))
    lines = -(-len(binned) // columns)
    figure, grid = panels(3.3 * columns + 0.4, 3.4 * lines, lines, columns, sharex=True, sharey=True)
    for panel in grid.flat[len(binned) :]:
        panel.set_visible(False)
    for panel, (row, bins) in zip(grid.flat, binned, strict=False):
        panel.plot([0, 100], [0, 100], color=MUTED, linewidth=1, linestyle="--")
        for x, y in zip(bins.confidence, bins.correct, strict=True):
            panel.plot([x, x], [x, y], color=RED if y < x else GREEN, linewidth=2, alpha=0.7)
        panel.scatter(bins.confidence, bins.correct, s=12 + 250 * bins.share, color=BLUE, alpha=0.85, linewidths=0, zorder=3)
        panel.set_title(clean(row.label, 34))
        panel.set(xlim=(0, 102), ylim=(0, 102), aspect="equal", xlabel="confidence (%)")
    for line in grid:
        line[0].set_ylabel("correct (%)")
    title = "Reliability: below the dashed line a model is more confident than right. Area: share of the test images."
    if len(rows) > 1:
        title += " The best row of each method, by validation accuracy."
    return Figure("reliability", title, "Accuracy against confidence in ten bins; ECE is in the table of results.", figure)


def confidence_bins(row: Row, bins: int = 10) -> DataFrame | None:
    """Mean confidence, share of correct answers in percent, and share of images, in equally wide bins over all seeds."""
    import pandas

    predictions = [p for run in row.runs if (p := run.predictions) is not None and np.isfinite(p.confidence).all()]
    if not sum(len(p.label) for p in predictions):
        return None
    confidence = np.concatenate([p.confidence for p in predictions])
    answers = pandas.DataFrame({"confidence": confidence, "correct": np.concatenate([p.correct for p in predictions])})
    binned = answers.groupby(np.clip((confidence * bins).astype(int), 0, bins - 1))
    return (100 * binned.mean()).assign(share=binned.size() / len(answers))


def sweep_figures(study: Study) -> Iterator[Figure]:
    """Validation accuracy against the learning rate, a line a row, the chosen one marked: a figure for each study."""
    import pandas

    keys = ("learning_rate", "validation_accuracy")
    known = (entry for entry in study.sweep if all(isinstance(entry.get(key), int | float) for key in keys))
    points = [(str(e["study"]), str(e.get("row")), e[keys[0]], 100 * e[keys[1]], bool(e.get("chosen"))) for e in known]
    entries = pandas.DataFrame(points, columns=["study", "row", "rate", "accuracy", "chosen"])
    studies = entries.groupby("study", sort=False)
    for number, (name, tried) in enumerate(studies, 1):
        rows = tried.groupby("row", sort=False)
        if rows.size().max() == 1:
            continue
        figure, [[axes]] = panels(9.6, max(3.8, 0.8 + 0.19 * len(rows)))
        for i, (label, line) in enumerate(rows):
            by_rate, chosen = line.sort_values(["rate", "accuracy"]), line[line.chosen]
            axes.plot(by_rate.rate, by_rate.accuracy, marker=".", linewidth=1.3, label=clean(label), **line_style(i))
            axes.plot(chosen.rate, chosen.accuracy, "o", markersize=9, markerfacecolor="none", color=line_style(i)["color"])
        axes.set(xscale="log", xlabel="learning rate", ylabel="validation accuracy (%)")
        rates = sorted(set(tried.rate))
        ticks = rates if len(rates) <= 8 else [10.0**power for power in range(-7, 1) if rates[0] <= 10.0**power <= rates[-1]]
        axes.set_xticks(ticks, [f"{rate:g}" for rate in ticks])
        axes.minorticks_off()
        figure.legend(loc="outside right center")
        suffix, where = (f"-{number}", f", {name}") if len(studies) > 1 else ("", "")
        title = f"Learning-rate sweep{where}; a ring marks the rate chosen, on validation accuracy."
        alt = "Validation accuracy by learning rate; the same numbers are in the table."
        yield Figure(f"sweep{suffix}", title, alt, figure)
