"""What several figures are made of: the forest plot of differences, and curves of rows with their range over seeds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from crossalign.report.blocks import Figure
from crossalign.report.figures.drawing import BLUE, INK, PALETTE, clean, name_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame

    from crossalign.results.frame import Results
    from crossalign.results.rows import Row


def panels(width: float, height: float, lines: int = 1, columns: int = 1, **shared: Any) -> tuple[Any, Any]:
    """An empty figure, in inches, outside pyplot and its global state, and its axes as an array (lines, columns)."""
    from matplotlib import figure

    empty = figure.Figure(figsize=(width, height))
    return empty, empty.subplots(lines, columns, squeeze=False, **shared)


def legend_below(figure: Any, named: Axes | Mapping[str, Any], columns: int) -> None:
    """What the lines of a figure are: as they are labelled in its axes, or by name."""
    if isinstance(named, Mapping):
        handles, labels = list(named.values()), list(named)
    else:
        handles, labels = named.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)


@dataclass(frozen=True)
class Mark:
    """A number with its interval, in a row of a forest plot."""

    row: int
    low: float
    middle: float
    high: float
    colour: str = BLUE
    shape: str = "o"


def forest(axes: Axes, labels: Sequence[str], marks: Iterable[Mark], zero: bool = False, caps: float = 0) -> list[Any]:
    """A row a label, first at the top, with its marks; returns what was drawn for each, as a legend takes it.

    Args:
        zero: whether the numbers are differences, with a line where there is none.
        caps: size of the strokes at the ends of the intervals.
    """
    if zero:
        axes.axvline(0, color=INK, linewidth=0.8)
    style: dict[str, Any] = {"markersize": 6, "elinewidth": 1.6, "capsize": caps}
    drawn = []
    for mark in marks:
        ends = [[mark.middle - mark.low], [mark.high - mark.middle]]
        drawn.append(axes.errorbar(mark.middle, mark.row, xerr=ends, fmt=mark.shape, color=mark.colour, **style))
    name_rows(axes, labels)
    return drawn


def difference_figure(
    results: Results, contrasts: DataFrame, title: str, across: str, colours: Mapping[str, str] | None = None
) -> Figure | None:
    """Every paired difference with its 95 % interval, an axis an outcome; None where there is none.

    Args:
        across: what all the axes show.
        colours: of each question, where rows are pairs of rows; a diamond's interval then leaves out zero.
    """
    tests = [test for test in contrasts.itertuples() if test.low is not None]
    if not tests:
        return None
    labels: dict[tuple[str, str], str] = {}
    for test in tests:
        both = f"{clean(test.other, 40)} − {clean(test.reference, 40)}"
        labels[test.other, test.reference] = both if colours else clean(test.other, 60)
    pairs = list(labels)  # by these, for names may be alike once they are cut
    outcomes = list(dict.fromkeys(test.outcome for test in tests))
    figure, (line,) = panels(9.6, 1.1 + 0.3 * len(labels), columns=len(outcomes))
    for axes, name in zip(line, outcomes, strict=True):  # an axis each: one text may scatter far more than another
        outcome, marks = results.outcome[name], []
        scale = 100 if outcome.share else 1
        for test in (test for test in tests if test.outcome == name):
            row = pairs.index((test.other, test.reference))
            mark = Mark(row, scale * test.low, scale * test.difference, scale * test.high)
            shape = "D" if test.low * test.high > 0 else "o"
            marks.append(replace(mark, colour=colours[test.question], shape=shape) if colours else mark)
        forest(axes, list(labels.values()) if axes is line[0] else [""] * len(labels), marks, zero=True)
        if not colours:
            axes.set_title(outcome.label, fontsize="medium")
            axes.locator_params(axis="x", nbins=5)
    (line[0].set_xlabel if len(outcomes) == 1 else figure.supxlabel)(across, fontsize="medium")
    alt = f"Paired differences; the same numbers are in the {'tables' if colours else 'table'} of comparisons."
    return Figure("differences", title, alt, figure)


@dataclass(frozen=True)
class Panel:
    """A number that runs log: what it is called, of which stage and split it is, and what is drawn of each row beside it."""

    label: str
    key: str
    split: str = "validation"
    stage: str = "train"
    over: str = "epoch"
    scale: float = 1
    """0: such that each row's first value is 1."""
    beside: tuple[tuple[str, str, dict[str, Any]], ...] = ()
    """Split and key of each, and the line's style, where it is not that of the row."""

    def curve(self, row: Row, split: str, key: str) -> DataFrame:
        """Mean, min and max over seeds, a line for each epoch or step where every seed has a number."""
        import pandas

        series = [values for run in row.runs if (values := run.series(self.stage, split, key, self.over))]
        numbers = pandas.DataFrame(series).dropna(axis=1).sort_index(axis=1)
        return pandas.DataFrame({"mean": numbers.mean(), "min": numbers.min(), "max": numbers.max()})

    def draw(self, axes: Axes, rows: Iterable[Row], styles: Iterable[Mapping[str, Any]]) -> int:
        """Each row's curve in a style of its own; returns how many points the longest one has."""
        longest = 0
        for row, style in zip(rows, styles, strict=True):
            curve = self.curve(row, self.split, self.key)
            if not len(curve):
                continue
            longest = max(longest, len(curve))
            draw_curve(axes, curve * (self.scale or 1 / (abs(curve["mean"].iloc[0]) or 1)), markersize=3.5, **style)
            for split, key, own in self.beside:
                how = {"color": style["color"], "linewidth": 1.2} | own
                draw_curve(axes, self.curve(row, split, key) * self.scale, band=0, **how)
        if longest and self.over == "epoch":
            whole_numbers(axes)
        axes.set_ylabel(self.label)
        return longest


def draw_curve(axes: Axes, curve: DataFrame, band: float = 0.15, **style: Any) -> Any:
    """The mean as a line, which is returned, and as a band of so much opacity what lies between min and max."""
    (line,) = axes.plot(curve.index, curve["mean"], **style)
    if band and (curve["max"] > curve["min"]).any():
        axes.fill_between(curve.index, curve["min"], curve["max"], color=line.get_color(), alpha=band, linewidth=0)
    return line


def line_style(i: int) -> dict[str, str]:
    """Of the line of row ``i``, where there may be more rows than colours; what stands beside a line is dotted."""
    return {"color": PALETTE[i % len(PALETTE)], "linestyle": ("-", "--", "-.")[i // len(PALETTE) % 3]}


def whole_numbers(axes: Axes) -> None:
    """Ticks across at whole numbers alone, as of epochs."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def band_text(rows: Iterable[Row], band: str = "range") -> str:
    """What a caption says of several seeds."""
    return f", mean over seeds; band: {band}" if any(len(row.runs) > 1 for row in rows) else ""
