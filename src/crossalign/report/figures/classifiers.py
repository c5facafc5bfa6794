"""The report's figures, each drawn once from the runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from crossalign.core.refs import Ref
from crossalign.report.blocks import Figure
from crossalign.report.figures.drawing import (
    BLUE,
    GREEN,
    INK,
    MUTED,
    ORANGE,
    PALETTE,
    PURPLE,
    RED,
    SKY,
    blank,
    clean,
    name_rows,
    styled,
)
from crossalign.report.wording import image_error
from crossalign.results.rows import ALIGNMENTS, Row, best, blocks
from crossalign.runs.records import Run, Study

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame

ALIGN_COLOURS = dict(zip(ALIGNMENTS, (INK, ORANGE, PURPLE, BLUE, GREEN, SKY, RED), strict=True))
MARKERS = "osD^vP*X<>"


def draw(study: Study, rows: list[Row], contrasts: DataFrame) -> list[Figure]:
    """Every figure that the runs have data for, in the order of the page."""
    with styled():
        top = best(rows)
        made: list[Figure | None] = [accuracy_figure(rows), difference_figure(contrasts)]
        parts = blocks(rows)
        for place, block in enumerate(parts):
            suffix = "" if len(parts) == 1 else f"-{place + 1}"
            where = "" if len(parts) == 1 else f", {Ref(block[0].backbone).short_name}"
            made += [curve_figure(block, suffix, where), align_figure(block, suffix, where)]
        made += [confusion_figure(top), reliability_figure(rows), *sweep_figures(study)]
    return [picture for picture in made if picture is not None]


def _dots_height(count: int) -> float:
    return 0.9 + 0.3 * count


def accuracy_figure(rows: list[Row]) -> Figure | None:
    """Every row's test accuracy: each seed, the mean and its standard error."""
    if len(rows) < 2:
        return None
    figure = blank(9.6, _dots_height(len(rows)))
    axes = figure.add_subplot()
    for place, row in enumerate(rows):
        accuracy = row.mean("test", "accuracy")
        colour = ALIGN_COLOURS.get(row.align, BLUE) if row.weights == "pretrained" else MUTED
        seeds = [100 * run.number("test", "accuracy") for run in row.runs]
        axes.plot(seeds, [place] * len(seeds), "|", color=colour, markersize=11, alpha=0.7)
        error = 100 * (accuracy.error if accuracy.error is not None else image_error(row.first))
        axes.errorbar(100 * accuracy.mean, place, xerr=error, fmt="o", color=colour, markersize=6, capsize=3)
    name_rows(axes, [row.label for row in rows])
    axes.set_xlabel("test accuracy (%)")
    alt = "Test accuracy of each row; the same numbers are in the table of test results."
    title = "Test accuracy: mean ± standard error (dot) and each seed (stroke)."
    if any(len(row.runs) == 1 for row in rows):
        title += " Where there is one seed the standard error is over test images."
    return Figure("accuracy", title, alt, figure)


def difference_figure(contrasts: DataFrame) -> Figure | None:
    """Every paired difference with its 95 % interval: over seeds where there are several, else over images."""
    shown = [one for one in contrasts.itertuples() if one.low is not None]
    if not shown:
        return None
    figure = blank(9.6, _dots_height(len(shown)))
    axes = figure.add_subplot()
    axes.axvline(0, color=INK, linewidth=0.8)
    colours = {"alignment": BLUE, "pretraining": ORANGE, "backbone": GREEN}
    for place, one in enumerate(shown):
        middle, low, high = 100 * one.difference, 100 * one.low, 100 * one.high
        colour, marker = colours[one.question], "o" if low <= 0 <= high else "D"
        axes.plot([low, high], [place, place], color=colour, linewidth=1.6)
        axes.plot(middle, place, marker, color=colour, markersize=6)
    name_rows(axes, [f"{clean(one.other, 40)} − {clean(one.reference, 40)}" for one in shown])
    axes.set_xlabel("difference in test accuracy (points)")
    title = "Paired differences with 95 % intervals, not corrected; a diamond's interval leaves out zero."
    if any(one.over == "items" for one in shown):
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


def _curves(runs: tuple[Run, ...], stage: str, split: str, key: str) -> tuple[NDArray[np.float64], ...] | None:
    """Epochs, and the mean, least and largest value over seeds at each, where every seed has that epoch."""
    held = [series for series in (run.series(stage, split, key) for run in runs) if series]
    epochs = sorted(set.intersection(*map(set, held))) if held else []
    if not epochs:
        return None
    values = np.array([[series[epoch] for epoch in epochs] for series in held])
    return np.array(epochs), values.mean(axis=0), values.min(axis=0), values.max(axis=0)


def _line(
    axes: Axes,
    curve: tuple[NDArray[np.float64], ...],
    colour: str,
    scale: float = 1,
    banded: bool = True,
    **options: Any,
) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    epochs, mean, low, high = curve
    axes.plot(epochs, scale * mean, color=colour, **options)
    if banded and np.any(high > low):
        axes.fill_between(epochs, scale * low, scale * high, color=colour, alpha=0.15, linewidth=0)


def _colours(rows: list[Row]) -> list[str]:
    """A colour for each row of a panel: by alignment where that tells them apart, else from the palette."""
    alignments = [row.align for row in rows]
    if len(set(alignments)) == len(rows) and set(alignments) <= set(ALIGN_COLOURS):
        return [ALIGN_COLOURS[align] for align in alignments]
    return [PALETTE[i % len(PALETTE)] for i in range(len(rows))]


def curve_figure(block: list[Row], suffix: str, where: str) -> Figure | None:
    """Accuracy and loss over epochs, a column of panels for each method (CMDA figures 1 and 2)."""
    families = _families(block)
    if not any(_curves(row.runs, "train", "validation", "loss") for row in block):
        return None
    alone = len(families) == 1  # then the two panels lie side by side
    figure = blank(9.6, 3.6) if alone else blank(3.2 * len(families), 6)
    grid: Any = figure.subplots(1, 2) if alone else figure.subplots(2, len(families), sharex="col", sharey="row")
    axes = grid[:, None] if alone else grid
    for column, (name, rows) in enumerate(families.items()):
        for place, (row, colour) in enumerate(zip(rows, _colours(rows), strict=True)):
            for panel, key, scale in ((axes[0][column], "accuracy", 100), (axes[1][column], "loss", 1)):
                options = {"markersize": 3.5, "marker": MARKERS[place % len(MARKERS)], "linewidth": 1.5}
                for split, how in (("validation", options), ("train", {"linestyle": (0, (3, 2)), "linewidth": 1})):
                    curve = _curves(row.runs, "train", split, key)
                    if curve is not None:
                        label = clean(row.label, 38) if split == "validation" else None
                        _line(panel, curve, colour, scale, split == "validation", label=label, **how)
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
    # One colour for one divergence, one marker for one method: nine lines are read by two keys, not nine.
    methods = list(dict.fromkeys((row.method, row.weights) for row in rows))
    for panel, (key, split, text_key, label) in zip(axes.flat, ALIGN_PANELS, strict=True):
        for row in rows:
            curve = _curves(row.runs, "align", split, key)
            if curve is None:
                continue
            marker = MARKERS[methods.index((row.method, row.weights)) % len(MARKERS)]
            first = abs(float(curve[1][0])) if key == "divergence" else 1.0
            colour = ALIGN_COLOURS.get(row.align, RED)
            _line(panel, curve, colour, 1 / (first or 1.0), marker=marker, markersize=3.5, label=clean(row.label))
            text = _curves(row.runs, "align", split, text_key) if text_key else None
            if text is not None:
                panel.plot(text[0], text[1], color=MUTED, linestyle=":", linewidth=1.5)
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

    held = confusion_counts(row)
    if held is None:
        return None
    names, counts = held
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
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    seeds = f", {len(row.runs)} seeds" if len(row.runs) > 1 else ""
    title = f"Confusion matrix of “{row.label}”{seeds}: percent of each true class."
    return Figure("confusion", title, f"{title} The most frequent confusions are in the table beside it.", figure)


def reliability_figure(rows: list[Row]) -> Figure | None:
    """Confidence against accuracy in ten bins, for the best row of each method."""
    families = [family for block in blocks(rows) for family in _families(block).items()]
    chosen = [(name, best(family)) for name, family in families if name != "Controls"] or [("", best(rows))]
    held = [(row, run_bins(row)) for _, row in chosen]
    shown = [(row, bins) for row, bins in held if bins is not None][:6]
    if not shown:
        return None
    columns = min(3, len(shown))
    lines = -(-len(shown) // columns)
    figure = blank(3.3 * columns + 0.4, 3.4 * lines)
    axes: Any = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for panel in axes.flat[len(shown) :]:
        panel.set_visible(False)
    for panel, (row, (confidence, accuracy, weight)) in zip(axes.flat, shown, strict=False):
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


def run_bins(row: Row, bins: int = 10) -> tuple[NDArray[np.float64], ...] | None:
    """Mean confidence and accuracy in percent, and the share of images, in equally wide bins over all seeds."""
    held = [p for run in row.runs if (p := run.predictions) is not None and np.isfinite(p.confidence).all()]
    if not held or not sum(len(p.label) for p in held):
        return None
    confidence = np.concatenate([p.confidence for p in held])
    correct = np.concatenate([p.correct for p in held])
    place = np.clip((confidence * bins).astype(int), 0, bins - 1)
    count = np.bincount(place, minlength=bins)
    full = count > 0
    sums = [np.bincount(place, weights=values, minlength=bins) for values in (confidence, correct)]
    return 100 * sums[0][full] / count[full], 100 * sums[1][full] / count[full], count[full] / count.sum()


def sweep_figures(study: Study) -> list[Figure]:
    """Validation accuracy against the learning rate, a line a row, the chosen one marked: a figure for each study."""
    entries = [e for e in study.sweep if isinstance(e.get("learning_rate"), int | float)]
    entries = [e for e in entries if isinstance(e.get("validation_accuracy"), int | float)]
    studies = list(dict.fromkeys(str(e["study"]) for e in entries))
    made = []
    for place, name in enumerate(studies):
        suffix, where = ("", "") if len(studies) == 1 else (f"-{place + 1}", f", {name}")
        picture = _sweep_figure([e for e in entries if str(e["study"]) == name], suffix, where)
        made += [picture] if picture is not None else []
    return made


def _sweep_figure(entries: list[dict[str, Any]], suffix: str, where: str) -> Figure | None:
    names = list(dict.fromkeys(str(e.get("row")) for e in entries))
    if all(sum(str(e.get("row")) == name for e in entries) == 1 for name in names):
        return None
    figure = blank(9.6, max(3.8, 0.8 + 0.19 * len(names)))
    axes = figure.add_subplot()
    for place, name in enumerate(names):
        mine = sorted(
            (e["learning_rate"], 100 * e["validation_accuracy"], bool(e.get("chosen")))
            for e in entries
            if str(e.get("row")) == name
        )
        colour = PALETTE[place % len(PALETTE)]
        style = ("-", "--", ":", "-.")[place // len(PALETTE) % 4]
        rates, values = [m[0] for m in mine], [m[1] for m in mine]
        axes.plot(rates, values, style, color=colour, marker=".", linewidth=1.3, label=clean(name))
        for rate, accuracy, chosen in mine:
            if chosen:
                axes.plot(rate, accuracy, "o", markersize=9, markerfacecolor="none", color=colour)
    axes.set(xscale="log", xlabel="learning rate", ylabel="validation accuracy (%)")
    rates = sorted({float(e["learning_rate"]) for e in entries})
    ticks = rates if len(rates) <= 8 else [10.0**power for power in range(-7, 1) if rates[0] <= 10.0**power <= rates[-1]]
    axes.set_xticks(ticks, [f"{rate:g}" for rate in ticks])
    axes.minorticks_off()
    figure.legend(loc="outside right center")
    title = f"Learning-rate sweep{where}; a ring marks the rate chosen, on validation accuracy."
    alt = "Validation accuracy by learning rate; the same numbers are in the table."
    return Figure(f"sweep{suffix}", title, alt, figure)


def draw_unfinished(runs: list[Run]) -> list[Figure]:
    """Curves of runs that have no result yet, one row each."""
    with styled():
        rows = [Row(f"{run.name}, seed {run.seed}", (run,)) for run in runs]
        made = [curve_figure(rows, "", " (incomplete)"), align_figure(rows, "", " (incomplete)")]
    return [picture for picture in made if picture is not None]
