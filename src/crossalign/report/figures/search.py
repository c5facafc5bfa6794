"""The figures of a search over settings: what became of the trials, how they learned, and which settings mattered."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from crossalign.report.blocks import Figure
from crossalign.report.figures.drawing import BLUE, GREEN, INK, MUTED, ORANGE, PURPLE, RED, SKY, blank, name_rows, styled
from crossalign.report.search_tables import in_percent, score_name
from crossalign.report.wording import counted
from crossalign.runs.search import Search, Trial

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_search(search: Search, suffix: str = "", where: str = "") -> tuple[list[Figure], list[str]]:
    """Every figure that the search has data for, and a sentence for each that is left out for a reason worth telling."""
    if not search.trials:
        return [], ["No trial was begun yet: there is nothing to draw."]
    from crossalign.report.figures.search_settings import importance_figure, parallel_figure, rate_figure

    with styled():
        importance, left_out = importance_figure(search)
        made = [rung_figure(search), curve_figure(search), parallel_figure(search), rate_figure(search), importance]
    pictures = [
        replace(p, name=p.name + suffix, title=p.title.replace("{where}", where), alt=p.alt.replace("{where}", where))
        for p in made
        if p is not None
    ]
    return pictures, left_out


def in_units(search: Search, scores: Any) -> Any:
    """Scores as they are drawn: an accuracy in percent."""
    return np.asarray(scores, np.float64) * (100 if in_percent(search) else 1)


def rung_colours(search: Search) -> list[str]:
    """A colour for no rung, then for each rung: grey for what stopped early, orange for what was trained to the end."""
    between = (SKY, BLUE, PURPLE, GREEN)
    last = len(search.rungs)
    if last == 1:
        return [MUTED, ORANGE]
    return [MUTED, *(MUTED if rung == 0 else between[(rung - 1) % 4] for rung in range(last - 1)), ORANGE]


def _rung_label(search: Search, reached: int) -> str:
    return f"rung {reached} ({search.unit} {search.rungs[reached - 1]:g})" if reached else "no rung's end yet"


def rung_figure(search: Search) -> Figure:
    """How many trials were trained in each rung, and what became of them there."""
    from matplotlib.ticker import MaxNLocator

    figure = blank(9.6, 1.3 + 0.42 * len(search.rungs))
    axes = figure.add_subplot()
    last, used = len(search.rungs) - 1, set()
    most = len(search.trials) if search.over else max(search.asked, len(search.trials))
    for rung in range(last + 1):
        on = {trial.number for trial in search.begun(rung + 1)} if rung < last else set()
        reached = search.reached(rung)
        went_on = sum(trial.number in on for trial in reached)
        ends = (
            ("promoted" if rung < last else "", went_on, BLUE, ""),
            ("trained to the end" if rung == last else "", len(reached) - went_on if rung == last else 0, ORANGE, ""),
            ("not promoted" if search.over else "waiting", len(reached) - went_on if rung < last else 0, SKY, ""),
            ("in training", len(search.stopped_in(rung, "training")), GREEN, "...."),
            ("failed", len(search.stopped_in(rung, "failed")), RED, "////"),
            ("to come", search.asked - len(search.trials) if rung == 0 and not search.over else 0, MUTED, " "),
        )
        left, told = 0, []
        for label, count, colour, hatch in ends:
            if count <= 0:
                continue
            style: Any = {"color": "none" if hatch else colour, "edgecolor": colour, "hatch": hatch.strip() or None}
            axes.barh(rung, count, left=left, height=0.66, linewidth=1, label=None if label in used else label, **style)
            used.add(label)
            left += count
            told.append(f"{count} {label}")
        axes.annotate(
            ", ".join(told) or ("none" if search.over else "none yet"),
            (left, rung),
            (5, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    name_rows(axes, [_rung_label(search, rung + 1) for rung in range(last + 1)])
    axes.set_xlim(0, 1.55 * most)  # room for the words
    axes.set_xticks([tick for tick in MaxNLocator(6, integer=True).tick_values(0, most) if 0 <= tick <= most])
    axes.spines["bottom"].set_bounds(0, most)
    axes.set_xlabel("trials that were given work in the rung", x=1 / 3)
    figure.legend(loc="outside lower center", ncols=6)
    title = "What became of the trials in each rung{where}."
    return Figure("search-rungs", title, "Trials in each rung; the same numbers are in the table of rungs.", figure)


def curve_figure(search: Search) -> Figure | None:
    """Every trial's validation score over its training, coloured by the highest rung whose end it reached."""
    shown = [trial for trial in search.trials if np.isfinite(trial.curve).any()]
    if not shown:
        return None
    from matplotlib.ticker import MaxNLocator

    figure = blank(9.6, 4.4)
    axes = figure.add_subplot()
    colours, many = rung_colours(search), len(shown) > 12
    for trial in sorted(shown, key=lambda t: (len(t.rungs), t is search.winner)):
        reached, wins = len(trial.rungs), trial is search.winner
        values = in_units(search, trial.curve)
        options: dict[str, Any] = {"linewidth": 2.6 if wins else 0.9 if many else 1.4, "alpha": 1 if wins or not many else 0.75}
        style, colour = "-" if reached else ":", INK if wins else colours[reached]
        axes.plot(range(1, len(values) + 1), values, style, color=colour, zorder=2 + reached / 10, **options)
        if len(values) == 1 or trial.state == "failed":
            place = int(np.flatnonzero(np.isfinite(values))[-1])
            marker, colour = ("x", RED) if trial.state == "failed" else (".", colour)
            axes.plot(place + 1, values[place], marker, color=colour, markersize=7, markeredgewidth=1.8, zorder=4)
    for end in search.rungs:
        axes.axvline(end, color=MUTED, linewidth=0.8, linestyle=":", zorder=1)
    clipped = bound_losses(search, axes, [value for trial in shown for value in trial.curve if math.isfinite(value)])
    axes.set(xlabel=search.unit, ylabel=score_name(search))
    axes.set_xlim(left=0.5 if search.rungs[-1] < 20 else 0, right=search.rungs[-1] * 1.01 + 0.2)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    rung_legend(search, figure, shown)
    title = "Learning curves of all trials{where}, by the highest rung whose end they reached. Dotted: the ends of rungs."
    title += f" Thick: the winner, trial {search.winner.number}." if search.winner else ""
    silent = len(search.trials) - len(shown)
    title += (
        f" {counted(silent, 'trial')} without any finite score {'is' if silent == 1 else 'are'} not shown." if silent else ""
    )
    title += " The highest losses are cut off." if clipped else ""
    return Figure("search-curves", title, f"Curves of {search.score} over training, a line a trial{{where}}.", figure)


def bound_losses(search: Search, axes: Axes, scores: list[float]) -> bool:
    """Keep one loss that ran away from flattening all others; whether anything was cut off."""
    low, middle, high = np.quantile(scores, [0, 0.9, 1])
    if search.larger_is_better or high - low <= 3 * (middle - low) or middle == low:
        return False
    axes.set_ylim(low - 0.05 * (middle - low), low + 1.6 * (middle - low))
    return True


def rung_legend(search: Search, figure: Any, shown: list[Trial], marker: str = "") -> None:
    """Below a figure, how many of the trials in it reached each rung, with its colour."""
    from matplotlib.lines import Line2D

    colours, handles = rung_colours(search), []
    for reached in range(len(search.rungs), -1, -1):
        count = sum(len(trial.rungs) == reached and (reached > 0 or trial.state != "failed") for trial in shown)
        if count:
            style: dict[str, Any] = {"marker": "o", "linestyle": ""} if marker else {"linestyle": "-" if reached else ":"}
            label = f"{_rung_label(search, reached)}: {count}"
            handles.append(Line2D([], [], color=colours[reached], label=label, **style))
    failed = sum(trial.state == "failed" for trial in shown)
    if failed:
        handles.append(Line2D([], [], color=RED, marker="x", markeredgewidth=1.8, linestyle="", label=f"failed: {failed}"))
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
