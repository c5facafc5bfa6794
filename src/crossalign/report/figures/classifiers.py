"""Figures of image classifiers: accuracies, differences, curves of training and of alignment, errors, learning rates."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from crossalign.core.refs import Ref
from crossalign.report.blocks import Figure
from crossalign.report.figures import drawing
from crossalign.report.figures.drawing import BLUE, GREEN, INK, MUTED, ORANGE, PALETTE, RED, blank, clean, styled
from crossalign.report.figures.shared import Array, Curve, Mark, draw_curve, forest, mean_and_range, whole_numbers
from crossalign.results.rows import ALIGNMENTS, Row, best, blocks
from crossalign.runs.records import Run, Study

if TYPE_CHECKING:
    from pandas import DataFrame

ALIGN_COLOURS = dict(zip(ALIGNMENTS, (INK, ORANGE, drawing.PURPLE, BLUE, GREEN, drawing.SKY, RED), strict=True))
SHAPES = "osD^vP*X<>"


def classifier_figures(study: Study, rows: list[Row], contrasts: DataFrame) -> list[Figure]:
    """Every figure that the runs have data for, in the order of the page."""
    parts = blocks(rows)
    with styled():
        figures = [accuracy_figure(rows), difference_figure(contrasts)]
        for number, block in enumerate(parts, 1):
            several = (f"-{number}", f", {Ref(block[0].backbone).short_name}") if len(parts) > 1 else ("", "")
            figures += [curve_figure(block, *several), align_figure(block, *several)]
        figures += [confusion_figure(best(rows)), reliability_figure(rows), *sweep_figures(study)]
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
    figure = blank(9.6, 0.9 + 0.3 * len(rows))
    axes, marks = figure.add_subplot(), []
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


def difference_figure(contrasts: DataFrame) -> Figure | None:
    """Every paired difference with its 95 % interval: over seeds where there are several, else over images."""
    tests = [test for test in contrasts.itertuples() if test.low is not None]
    if not tests:
        return None
    figure = blank(9.6, 0.9 + 0.3 * len(tests))
    axes, marks = figure.add_subplot(), []
    for i, test in enumerate(tests):
        colour = {"alignment": BLUE, "pretraining": ORANGE, "backbone": GREEN}[test.question]
        shape = "o" if test.low <= 0 <= test.high else "D"
        marks.append(Mark(i, 100 * test.low, 100 * test.difference, 100 * test.high, colour, shape))
    forest(axes, [f"{clean(test.other, 40)} − {clean(test.reference, 40)}" for test in tests], marks, zero=True)
    axes.set_xlabel("difference in test accuracy (points)")
    title = "Paired differences with 95 % intervals, not corrected; a diamond's interval leaves out zero."
    if any(test.over == "items" for test in tests):
        title += " With one seed the interval is over test images."
    return Figure("differences", title, "Paired differences; the same numbers are in the tables of comparisons.", figure)


def _families(block: list[Row]) -> dict[str, list[Row]]:
    """Rows that share a panel: pretrained ones by method, then the controls."""
    names = {"fpt": "FPT", "lora": "LoRA", "full": "Full fine-tuning"}
    families: dict[str, list[Row]] = {}
    for row in block:
        own = names.get(row.method, row.method or "runs") if row.weights == "pretrained" else "Controls"
        families.setdefault(own, []).append(row)
    return families


def _curve(row: Row, stage: str, split: str, key: str) -> Curve | None:
    return mean_and_range(run.series(stage, split, key) for run in row.runs)


def _colours(rows: list[Row]) -> list[str]:
    """A colour for each row of a panel: by alignment where that tells them apart, else from the palette."""
    alignments = [row.align for row in rows]
    if len(set(alignments)) == len(rows) and set(alignments) <= set(ALIGN_COLOURS):
        return [ALIGN_COLOURS[align] for align in alignments]
    return [PALETTE[i % len(PALETTE)] for i in range(len(rows))]


def curve_figure(block: list[Row], suffix: str, where: str) -> Figure | None:
    """Accuracy and loss over epochs, a column of panels for each method (CMDA figures 1 and 2)."""
    families = _families(block)
    if not any(_curve(row, "train", "validation", "loss") for row in block):
        return None
    alone = len(families) == 1  # then the two panels lie side by side
    figure = blank(9.6, 3.6) if alone else blank(3.2 * len(families), 6)
    shared: Any = {"squeeze": False} if alone else {"squeeze": False, "sharex": "col", "sharey": "row"}
    axes: Any = figure.subplots(1, 2, **shared).T if alone else figure.subplots(2, len(families), **shared)
    dashed: Any = {"linestyle": (0, (3, 2)), "linewidth": 1, "band": 0}
    for column, (name, rows) in enumerate(families.items()):
        for i, (row, colour) in enumerate(zip(rows, _colours(rows), strict=True)):
            solid = {"markersize": 3.5, "marker": SHAPES[i % len(SHAPES)], "linewidth": 1.5, "label": clean(row.label, 38)}
            for panel, key, scale in ((axes[0][column], "accuracy", 100), (axes[1][column], "loss", 1)):
                for split, style in (("validation", solid), ("train", dashed)):
                    curve = _curve(row, "train", split, key)
                    if curve is not None:
                        draw_curve(panel, curve, scale, color=colour, **style)
                        whole_numbers(panel)
        axes[0][column].set_title("" if alone else name)
        for panel in axes[:, column] if alone else axes[1:, column]:
            panel.set_xlabel("epoch")
        if not alone:
            axes[1][column].legend(loc="upper left", bbox_to_anchor=(-0.02, -0.2))
        elif len(rows) > 1:
            figure.legend(*axes[0][column].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    axes[0][0].set_ylabel("accuracy (%)")
    axes[1][0].set_ylabel("loss (nats)")
    seeds = ", mean over seeds; band: range of validation" if any(len(row.runs) > 1 for row in block) else ""
    title = f"Accuracy and loss{where}: validation (solid, marked) and training (dashed){seeds}."
    alt = "Curves of accuracy and loss over epochs; their last values are in the table of test results."
    return Figure(f"curves{suffix}", title, alt, figure)


ALIGN_PANELS = (
    ("divergence", "train", "", "divergence / its first value"),
    ("heldout_mmd", "validation", "", "MMD on held-out images"),
    ("effective_rank", "validation", "effective_rank_text", "effective rank"),
    ("std", "validation", "std_text", "standard deviation"),
)


def align_figure(block: list[Row], suffix: str, where: str) -> Figure | None:
    """The alignment stage: does it come closer, and does it collapse?"""
    rows = [row for row in block if any(run.series("align", split, key) for run in row.runs for key, split, *_ in ALIGN_PANELS)]
    if not rows:
        return None
    figure = blank(11, 6.2)
    axes: Any = figure.subplots(2, 2, sharex=True)
    # One colour for one divergence, one shape for one method: nine lines are read by two keys, not nine.
    methods = list(dict.fromkeys((row.method, row.weights) for row in rows))
    for panel, (key, split, text_key, label) in zip(axes.flat, ALIGN_PANELS, strict=True):
        for row in rows:
            curve, text = _curve(row, "align", split, key), _curve(row, "align", split, text_key)
            if curve is None:
                continue
            shape = SHAPES[methods.index((row.method, row.weights)) % len(SHAPES)]
            style: Any = {"color": ALIGN_COLOURS.get(row.align, RED), "marker": shape, "markersize": 3.5}
            first = abs(float(curve.mean[0])) if key == "divergence" else 1.0
            draw_curve(panel, curve, 1 / (first or 1.0), label=clean(row.label), **style)
            whole_numbers(panel)
            if text is not None:
                draw_curve(panel, text, band=0, color=MUTED, linestyle=":", linewidth=1.5)
        panel.set_ylabel(label)
    for panel in axes[1]:
        panel.set_xlabel("epoch of alignment")
    handles, labels = axes[0][0].get_legend_handles_labels()
    if len(handles) > 1:
        figure.legend(handles, labels, loc="outside lower center", ncols=3)
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
    figure = blank(side + 0.8, side)
    axes = figure.add_subplot()
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
    binned = [(row, bins) for row in chosen if (bins := run_bins(row)) is not None][:6]
    if not binned:
        return None
    columns = min(3, len(binned))
    lines = -(-len(binned) // columns)
    figure = blank(3.3 * columns + 0.4, 3.4 * lines)
    axes: Any = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for panel in axes.flat[len(binned) :]:
        panel.set_visible(False)
    for panel, (row, (confidence, accuracy, weight)) in zip(axes.flat, binned, strict=False):
        panel.plot([0, 100], [0, 100], color=MUTED, linewidth=1, linestyle="--")
        for x, y in zip(confidence, accuracy, strict=True):
            panel.plot([x, x], [x, y], color=RED if y < x else GREEN, linewidth=2, alpha=0.7)
        panel.scatter(confidence, accuracy, s=12 + 250 * weight, color=BLUE, alpha=0.85, linewidths=0, zorder=3)
        panel.set_title(clean(row.label, 34))
        panel.set(xlim=(0, 102), ylim=(0, 102), aspect="equal", xlabel="confidence (%)")
    for line in axes:
        line[0].set_ylabel("correct (%)")
    title = "Reliability: below the dashed line a model is more confident than right. Area: share of the test images."
    if len(rows) > 1:
        title += " The best row of each method, by validation accuracy."
    return Figure("reliability", title, "Accuracy against confidence in ten bins; ECE is in the table of results.", figure)


def run_bins(row: Row, bins: int = 10) -> tuple[Array, Array, Array] | None:
    """Mean confidence and accuracy in percent, and the share of images, in equally wide bins over all seeds."""
    predictions = [p for run in row.runs if (p := run.predictions) is not None and np.isfinite(p.confidence).all()]
    if not sum(len(p.label) for p in predictions):
        return None
    confidence = np.concatenate([p.confidence for p in predictions])
    correct = np.concatenate([p.correct for p in predictions])
    bin_of = np.clip((confidence * bins).astype(int), 0, bins - 1)
    count = np.bincount(bin_of, minlength=bins)
    full = count > 0
    sums = [np.bincount(bin_of, weights=values, minlength=bins)[full] for values in (confidence, correct)]
    return 100 * sums[0] / count[full], 100 * sums[1] / count[full], count[full] / count.sum()


def sweep_figures(study: Study) -> list[Figure]:
    """Validation accuracy against the learning rate, a line a row, the chosen one marked: a figure for each study."""
    keys = ("learning_rate", "validation_accuracy")
    entries = [entry for entry in study.sweep if all(isinstance(entry.get(key), int | float) for key in keys)]
    studies = list(dict.fromkeys(str(entry["study"]) for entry in entries))
    figures = []
    for number, name in enumerate(studies, 1):
        several = (f"-{number}", f", {name}") if len(studies) > 1 else ("", "")
        figures.append(_sweep_figure([entry for entry in entries if str(entry["study"]) == name], *several))
    return [figure for figure in figures if figure is not None]


def _sweep_figure(entries: list[dict[str, Any]], suffix: str, where: str) -> Figure | None:
    rows: dict[str, list[tuple[float, float, bool]]] = {}
    for entry in entries:
        point = entry["learning_rate"], 100 * entry["validation_accuracy"], bool(entry.get("chosen"))
        rows.setdefault(str(entry.get("row")), []).append(point)
    if all(len(points) == 1 for points in rows.values()):
        return None
    figure = blank(9.6, max(3.8, 0.8 + 0.19 * len(rows)))
    axes = figure.add_subplot()
    for i, (name, points) in enumerate(rows.items()):
        style: Any = {"color": PALETTE[i % len(PALETTE)], "linestyle": ("-", "--", ":", "-.")[i // len(PALETTE) % 4]}
        rates, values, _ = zip(*sorted(points), strict=True)
        axes.plot(rates, values, marker=".", linewidth=1.3, label=clean(name), **style)
        for rate, accuracy, chosen in points:
            if chosen:
                axes.plot(rate, accuracy, "o", markersize=9, markerfacecolor="none", color=style["color"])
    axes.set(xscale="log", xlabel="learning rate", ylabel="validation accuracy (%)")
    known = sorted({float(entry["learning_rate"]) for entry in entries})
    ticks = known if len(known) <= 8 else [10.0**power for power in range(-7, 1) if known[0] <= 10.0**power <= known[-1]]
    axes.set_xticks(ticks, [f"{rate:g}" for rate in ticks])
    axes.minorticks_off()
    figure.legend(loc="outside right center")
    title = f"Learning-rate sweep{where}; a ring marks the rate chosen, on validation accuracy."
    return Figure(f"sweep{suffix}", title, "Validation accuracy by learning rate; the same numbers are in the table.", figure)
