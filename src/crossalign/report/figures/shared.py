"""What several figures are made of: the forest plot, and curves with their range over seeds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from crossalign.report.figures.drawing import BLUE, INK, name_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Array = NDArray[np.float64]
Series = Mapping[float, float]


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


@dataclass(frozen=True)
class Curve:
    """A number over epochs or steps ``x``, and what it ranges between; all arrays are (n,)."""

    x: Array
    mean: Array
    low: Array
    high: Array


def mean_and_range(series: Iterable[Series]) -> Curve | None:
    """The mean over seeds, the least and the largest value, wherever every seed has one; None where that is nowhere."""
    known = [values for values in series if values]
    x = sorted(set.intersection(*map(set, known))) if known else []
    if not x:
        return None
    values = np.array([[values[place] for place in x] for values in known])
    return Curve(np.array(x), values.mean(axis=0), values.min(axis=0), values.max(axis=0))


def draw_curve(axes: Axes, curve: Curve, scale: float = 1, band: float = 0.15, **style: Any) -> Any:
    """The mean as a line, which is returned, and as a band of so much opacity the range."""
    (line,) = axes.plot(curve.x, scale * curve.mean, **style)
    if band and np.any(curve.high > curve.low):
        axes.fill_between(curve.x, scale * curve.low, scale * curve.high, color=line.get_color(), alpha=band, linewidth=0)
    return line


def whole_numbers(axes: Axes) -> None:
    """Ticks across at whole numbers alone, as of epochs."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
