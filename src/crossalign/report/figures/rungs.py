"""What became of a search's trials, rung by rung, and how they learned."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from crossalign.report.blocks import Figure
from crossalign.report.figures.drawing import BLUE, GREEN, INK, MUTED, ORANGE, PURPLE, RED, SKY, blank, name_rows
from crossalign.report.figures.shared import whole_numbers
from crossalign.report.searches import in_percent, score_name
from crossalign.report.words import counted
from crossalign.runs.search import SearchRecord, TrialRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def in_units(search: SearchRecord, scores: Any) -> Any:
    """Scores as they are drawn: an accuracy in percent."""
    return np.asarray(scores, np.float64) * (100 if in_percent(search) else 1)


def rung_colours(search: SearchRecord) -> list[str]:
    """A colour for no rung, then for each rung: grey for what stopped early, orange for what was trained to the end."""
    between = [(SKY, BLUE, PURPLE, GREEN)[(rung - 1) % 4] for rung in range(1, len(search.ends) - 1)]
    return [MUTED, ORANGE] if len(search.ends) == 1 else [MUTED, MUTED, *between, ORANGE]


def _rung_name(search: SearchRecord, reached: int) -> str:
    return f"rung {reached} ({search.unit} {search.ends[reached - 1]:g})" if reached else "no rung's end yet"


def _ends(search: SearchRecord, rung: int) -> list[tuple[str, int, str, str]]:
    """What the trials of a rung came to: how that is called, how many they are, and the bar's colour and hatching."""
    reached, last = search.reached(rung), rung == len(search.ends) - 1
    promoted = sum(trial.begun > rung for trial in reached)
    to_come = 0 if rung or search.over else search.asked - len(search.trials)
    ends = [
        ("promoted", promoted, BLUE, ""),
        ("trained to the end", len(reached) if last else 0, ORANGE, ""),
        ("not promoted" if search.over else "waiting", 0 if last else len(reached) - promoted, SKY, ""),
        ("in training", len(search.training_in(rung)), GREEN, "...."),
        ("failed", len(search.failed_in(rung)), RED, "////"),
        ("to come", to_come, MUTED, " "),
    ]
    return [end for end in ends if end[1] > 0]


def rung_figure(search: SearchRecord) -> Figure:
    """How many trials were trained in each rung, and what became of them there."""
    from matplotlib.ticker import MaxNLocator

    figure = blank(9.6, 1.3 + 0.42 * len(search.ends))
    axes, labels = figure.add_subplot(), set()
    most = len(search.trials) if search.over else max(search.asked, len(search.trials))
    for rung in range(len(search.ends)):
        left, ends = 0, _ends(search, rung)
        for label, count, colour, hatch in ends:
            style: Any = {"color": "none" if hatch else colour, "edgecolor": colour, "hatch": hatch.strip() or None}
            axes.barh(rung, count, left=left, height=0.66, linewidth=1, label=None if label in labels else label, **style)
            labels.add(label)
            left += count
        text = ", ".join(f"{count} {label}" for label, count, *_ in ends) or ("none" if search.over else "none yet")
        axes.annotate(text, (left, rung), (5, 0), textcoords="offset points", va="center", fontsize=8)
    name_rows(axes, [_rung_name(search, rung + 1) for rung in range(len(search.ends))])
    axes.set_xlim(0, 1.55 * most)  # room for the words
    axes.set_xticks([tick for tick in MaxNLocator(6, integer=True).tick_values(0, most) if 0 <= tick <= most])
    axes.spines["bottom"].set_bounds(0, most)
    axes.set_xlabel("trials that were given work in the rung", x=1 / 3)
    figure.legend(loc="outside lower center", ncols=6)
    title = "What became of the trials in each rung{where}."
    return Figure("search-rungs", title, "Trials in each rung; the same numbers are in the table of rungs.", figure)


def curve_figure(search: SearchRecord) -> Figure | None:
    """Every trial's validation score over its training, coloured by the highest rung whose end it reached."""
    trials = [trial for trial in search.trials if np.isfinite(trial.curve).any()]
    if not trials:
        return None
    figure = blank(9.6, 4.4)
    axes, colours, many = figure.add_subplot(), rung_colours(search), len(trials) > 12
    for trial in sorted(trials, key=lambda t: (len(t.scores), t is search.winner)):
        reached, wins, values = len(trial.scores), trial is search.winner, in_units(search, trial.curve)
        style: dict[str, Any] = {"linewidth": 2.6 if wins else 0.9 if many else 1.4, "alpha": 1 if wins or not many else 0.75}
        colour = INK if wins else colours[reached]
        x = range(1, len(values) + 1)
        axes.plot(x, values, "-" if reached else ":", color=colour, zorder=2 + reached / 10, **style)
        if len(values) == 1 or trial.reason:
            last = int(np.flatnonzero(np.isfinite(values))[-1])
            shape, colour = ("x", RED) if trial.reason else (".", colour)
            axes.plot(last + 1, values[last], shape, color=colour, markersize=7, markeredgewidth=1.8, zorder=4)
    for end in search.ends:
        axes.axvline(end, color=MUTED, linewidth=0.8, linestyle=":", zorder=1)
    clipped = bound_losses(search, axes, [value for trial in trials for value in trial.curve if np.isfinite(value)])
    axes.set(xlabel=search.unit, ylabel=score_name(search))
    axes.set_xlim(left=0.5 if search.ends[-1] < 20 else 0, right=search.ends[-1] * 1.01 + 0.2)
    whole_numbers(axes)
    rung_legend(search, figure, trials)
    silent = len(search.trials) - len(trials)
    title = "Learning curves of all trials{where}, by the highest rung whose end they reached. Dotted: the ends of rungs."
    title += f" Thick: the winner, trial {search.winner.number}." if search.winner else ""
    title += f" {counted(silent, 'trial')} without any finite score {'is' if silent == 1 else 'are'} not shown." * (silent > 0)
    title += " The highest losses are cut off." * clipped
    return Figure("search-curves", title, f"Curves of {search.score} over training, a line a trial{{where}}.", figure)


def bound_losses(search: SearchRecord, axes: Axes, scores: list[float]) -> bool:
    """Keep one loss that ran away from flattening all others; whether anything was cut off."""
    low, middle, high = np.quantile(scores, [0, 0.9, 1])
    if search.larger_is_better or high - low <= 3 * (middle - low) or middle == low:
        return False
    axes.set_ylim(low - 0.05 * (middle - low), low + 1.6 * (middle - low))
    return True


def rung_legend(search: SearchRecord, figure: Any, trials: list[TrialRecord], shape: str = "") -> None:
    """Below a figure, how many of the trials in it reached each rung, with its colour."""
    from matplotlib.lines import Line2D

    colours, handles = rung_colours(search), []
    for reached in range(len(search.ends), -1, -1):
        count = sum(len(trial.scores) == reached and (reached > 0 or not trial.reason) for trial in trials)
        style: dict[str, Any] = {"marker": shape, "linestyle": ""} if shape else {"linestyle": "-" if reached else ":"}
        if count:
            label = f"{_rung_name(search, reached)}: {count}"
            handles.append(Line2D([], [], color=colours[reached], label=label, **style))
    failed = sum(bool(trial.reason) for trial in trials)
    if failed:
        handles.append(Line2D([], [], color=RED, marker="x", markeredgewidth=1.8, linestyle="", label=f"failed: {failed}"))
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
