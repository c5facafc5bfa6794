"""Figures of a search over settings: its rungs and curves, every trial's settings, their importance, the learning rate."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from crossalign.report.blocks import Figure
from crossalign.report.figures.drawing import BLUE, GREEN, INK, MUTED, ORANGE, PAPER, PURPLE, RED, SKY, clean, name_rows, styled
from crossalign.report.figures.shared import legend_below, panels, whole_numbers
from crossalign.report.searches import in_percent, score_name, score_text, short_names
from crossalign.report.tables import number_text, plain
from crossalign.report.words import counted, number
from crossalign.runs.search import SearchedField, SearchRecord, TrialRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FEW = 8
"""Scores below which importances would be noise alone."""
ENOUGH_AT_TOP = 5
"""Trials in the best quarter that PED-ANOVA wants, by optuna's own advice."""
ABSENT = -0.16
"""Where a line of parallel coordinates passes for a setting that its trial lacks, or a score that it never had."""
GROUPS = (BLUE, 1.6, "best quarter"), (SKY, 1.2, "next quarter"), (MUTED, 0.8, "lower half"), (RED, 0.9, "")
"""Trials by their score at the first rung, the last without any: colour and width of their lines, and what they are called."""
CUT_OFF = " The highest losses are cut off."


def search_figures(search: SearchRecord, suffix: str = "", where: str = "") -> tuple[list[Figure], list[str]]:
    """Every figure that the search has data for, and a sentence for each that is left out for a reason to know of.

    ``suffix`` is that of the figures' names, ``where`` names the search in their captions, where there are several.
    """
    if not search.trials:
        return [], ["No trial was begun yet: there is nothing to draw."]
    with styled():
        importance, left_out = importance_figure(search)
        drawn = [rung_figure(search), curve_figure(search), parallel_figure(search), rate_figure(search), importance]
    return [
        replace(f, name=f.name + suffix, title=f.title.replace("{where}", where), alt=f.alt.replace("{where}", where))
        for f in drawn
        if f is not None
    ], left_out


def in_units(search: SearchRecord, scores: Any) -> Any:
    """Scores as they are drawn: an accuracy in percent."""
    return np.asarray(scores, np.float64) * (100 if in_percent(search) else 1)


def rung_keys(search: SearchRecord) -> list[tuple[str, str]]:
    """For no rung, then for each: its name, and the colour of trials that reached its end and no other, from grey for what
    stopped early to orange for what was trained to the end."""
    names = [f"rung {rung} ({search.unit} {end:g})" for rung, end in enumerate(search.ends, 1)]
    between = [MUTED, *((SKY, BLUE, PURPLE, GREEN)[rung % 4] for rung in range(len(names) - 2))][: len(names) - 1]
    return list(zip(["no rung's end yet", *names], [MUTED, *between, ORANGE], strict=True))


def _ends(search: SearchRecord, rung: int) -> list[tuple[str, int, str, str]]:
    """What the trials of a rung came to: how that is called, how many they are, and the bar's colour and hatching."""
    reached, last = search.reached(rung), rung == len(search.ends) - 1
    promoted = sum(trial.begun > rung for trial in reached)
    ends = [
        ("promoted", promoted, BLUE, ""),
        ("trained to the end", len(reached) if last else 0, ORANGE, ""),
        ("not promoted" if search.over else "waiting", 0 if last else len(reached) - promoted, SKY, ""),
        ("in training", sum(trial.begun == rung for trial in search.training), GREEN, "...."),
        ("failed", sum(trial.begun == rung for trial in search.failed), RED, "////"),
        ("to come", 0 if rung or search.over else search.asked - len(search.trials), MUTED, " "),
    ]
    return [end for end in ends if end[1] > 0]


def rung_figure(search: SearchRecord) -> Figure:
    """How many trials were trained in each rung, and what became of them there."""
    from matplotlib.ticker import MaxNLocator

    figure, [[axes]] = panels(9.6, 1.3 + 0.42 * len(search.ends))
    most = len(search.trials) if search.over else max(search.asked, len(search.trials))
    bars: dict[str, Any] = {}
    for rung in range(len(search.ends)):
        left, ends = 0, _ends(search, rung)
        for label, count, colour, hatch in ends:
            style: Any = {"color": "none" if hatch else colour, "edgecolor": colour, "hatch": hatch.strip() or None}
            bars.setdefault(label, axes.barh(rung, count, left=left, height=0.66, linewidth=1, **style))
            left += count
        text = ", ".join(f"{count} {label}" for label, count, *_ in ends) or ("none" if search.over else "none yet")
        axes.annotate(text, (left, rung), (5, 0), textcoords="offset points", va="center", fontsize=8)
    name_rows(axes, [name for name, _ in rung_keys(search)[1:]])
    axes.set_xlim(0, 1.55 * most)  # room for the words
    axes.set_xticks([tick for tick in MaxNLocator(6, integer=True).tick_values(0, most) if 0 <= tick <= most])
    axes.spines["bottom"].set_bounds(0, most)
    axes.set_xlabel("trials that were given work in the rung", x=1 / 3)
    legend_below(figure, bars, 6)
    title = "What became of the trials in each rung{where}."
    return Figure("search-rungs", title, "Trials in each rung; the same numbers are in the table of rungs.", figure)


def curve_figure(search: SearchRecord) -> Figure | None:
    """Every trial's validation score over its training, coloured by the highest rung whose end it reached."""
    trials = [trial for trial in search.trials if np.isfinite(trial.curve).any()]
    if not trials:
        return None
    figure, [[axes]] = panels(9.6, 4.4)
    keys, many = rung_keys(search), len(trials) > 12
    for trial in sorted(trials, key=lambda t: (len(t.scores), t is search.winner)):
        reached, wins = len(trial.scores), trial is search.winner
        values = in_units(search, trial.curve)
        style: dict[str, Any] = {"linewidth": 0.9 if many else 1.4, "alpha": 0.75 if many else 1}
        if wins:
            style = {"linewidth": 2.6, "alpha": 1}
        colour = INK if wins else keys[reached][1]
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
    return Figure(
        "search-curves", title + CUT_OFF * clipped, f"Curves of {search.score} over training, a line a trial{{where}}.", figure
    )


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

    lines: dict[str, Any] = {}
    for reached, (name, colour) in reversed([*enumerate(rung_keys(search))]):
        count = sum(len(trial.scores) == reached and (reached > 0 or not trial.reason) for trial in trials)
        if count:
            line = "" if shape else "-" if reached else ":"
            lines[f"{name}: {count}"] = Line2D([], [], color=colour, marker=shape, linestyle=line)
    failed = sum(bool(trial.reason) for trial in trials)
    if failed:
        lines[f"failed: {failed}"] = Line2D([], [], color=RED, marker="x", markeredgewidth=1.8, linestyle="")
    legend_below(figure, lines, 3)


@dataclass(frozen=True)
class Scale:
    """Where values of one field lie on its axis, between 0 and 1, and the values that are marked."""

    ticks: tuple[tuple[Any, str], ...]
    low: float = 0.0
    high: float = 1.0
    log: bool = False
    choices: tuple[str, ...] = ()

    def up(self, value: Any) -> float:
        """The place of a value."""
        if self.choices:
            return (self.choices.index(plain(value)) + 0.5) / len(self.choices)
        low, high, x = (math.log10(v) if self.log else float(v) for v in (self.low, self.high, value))
        return (x - low) / (high - low) if high != low else 0.5


def values_of(field: SearchedField, trials: Iterable[TrialRecord]) -> list[Any]:
    """A setting's values in the trials that have it."""
    return [trial.settings[field.name] for trial in trials if field.name in trial.settings]


def scale_of(field: SearchedField, values: list[Any]) -> Scale:
    """The axis of a field: its range, or its choices, and whatever trials have beside them."""
    if field.choices or any(isinstance(value, str | bool) or value is None for value in values):
        choices = tuple(dict.fromkeys(plain(value) for value in (*field.choices, *values)))
        return Scale(tuple(zip(choices, choices, strict=True)), choices=choices)
    low, high = min([field.low, *values]), max([field.high, *values])
    log, ticks = field.log and low > 0, [low, (low + high) / 2, high]
    if log:
        tens = [10.0**power for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
        inside = [ten for ten in tens if low <= ten <= high]
        ticks = inside if len(inside) > 1 else [low, *inside, high]
    return Scale(tuple((tick, number_text(tick)) for tick in dict.fromkeys(ticks)), low, high, log)


def quarters(search: SearchRecord) -> dict[int, int]:
    """0 for a trial in the best quarter by first-rung score, 1 for the next quarter, 2 for the lower half."""
    scores = sorted(search.scores(0), key=lambda pair: (-search.worth(pair[1]), pair[0].number))
    count = len(scores)
    return {t.number: 0 if 4 * i < count else 1 if 2 * i < count else 2 for i, (t, _) in enumerate(scores)}


def _score_scale(search: SearchRecord, scores: list[float]) -> Scale:
    """The axis of scores, better up."""
    if not scores:
        return Scale(())
    worst, best = sorted((min(scores), max(scores)), reverse=not search.larger_is_better)
    ticks = dict.fromkeys([worst, (worst + best) / 2, best])
    return Scale(tuple((tick, score_text(search, tick)) for tick in ticks), worst, best)


def parallel_figure(search: SearchRecord) -> Figure | None:
    """Every trial as a line through its settings to its score at the end of the first rung."""
    from matplotlib.lines import Line2D

    fields, trials, winner = search.space, search.trials, search.winner
    if not fields:
        return None
    first = {trial.number: score for trial, score in search.scores(0)}
    scales = [scale_of(field, values_of(field, trials)) for field in fields]
    scales.append(_score_scale(search, list(first.values())))
    figure, [[axes]] = panels(max(9.6, 1.15 * len(scales)), 4.6)
    groups = quarters(search)
    for trial in sorted(trials, key=lambda t: groups.get(t.number, 3), reverse=True):
        jitter = 0.045 * (((trial.number * 0.618) % 1) - 0.5)  # choices would lie on one another
        ups = []
        for field, scale in zip(fields, scales, strict=False):
            known = field.name in trial.settings
            up = scale.up(trial.settings[field.name]) if known else ABSENT
            ups.append(up + jitter if scale.choices or not known else up)
        ups.append(scales[-1].up(first[trial.number]) if trial.number in first else ABSENT + jitter)
        colour, width, _ = GROUPS[groups.get(trial.number, 3)]
        style: dict[str, Any] = {"color": colour, "linewidth": width, "alpha": 0.85}
        if trial is winner:
            style = {"color": INK, "linewidth": 2.2, "zorder": 5}
        axes.plot(range(len(ups)), ups, "-" if trial.number in first else "--", **style)
    absent = {i for i, f in enumerate(fields) if len(values_of(f, trials)) < len(trials)}
    missing, short = len(first) < len(trials), short_names(search)
    _parallel_axes(axes, scales, absent | ({len(fields)} if missing else set()))
    names = [narrow(short[f.name], f"when {f.when}" if i in absent and f.when else "") for i, f in enumerate(fields)]
    axes.set_xticks(range(len(scales)), [*names, narrow(score_name(search), "first rung")])
    shares = sorted({group for number, group in groups.items() if winner is None or number != winner.number})
    lines: dict[str, Any] = {GROUPS[group][2]: Line2D([], [], color=GROUPS[group][0]) for group in shares}
    if missing:
        lines["no score at the first rung"] = Line2D([], [], color=RED, linestyle="--")
    if winner:
        lines[f"winner, trial {winner.number}"] = Line2D([], [], color=INK, linewidth=2.2)
    legend_below(figure, lines, 5)
    title = "Settings of every trial{where} and its score at the end of the first rung, which all trials share; better is up."
    return Figure("search-settings", title, "Parallel coordinates of settings and first-rung scores{where}.", figure)


def narrow(*texts: str) -> str:
    """Texts below one another in lines that do not reach into the next axis."""
    return "\n".join(line for text in texts for line in textwrap.wrap(clean(text), 15))


def _parallel_axes(axes: Axes, scales: list[Scale], absent: set[int]) -> None:
    """The vertical axes with their marks; ``absent``: those below which lines pass that have no value there."""
    plate: Any = {"boxstyle": "round,pad=0.1", "facecolor": PAPER, "edgecolor": "none", "alpha": 0.85}
    for i, scale in enumerate(scales):
        side, shift = ("right", -6) if i == len(scales) - 1 else ("left", 6)
        how: Any = {"textcoords": "offset points", "va": "center", "ha": side, "fontsize": 8, "bbox": plate, "zorder": 6}
        axes.plot([i, i], [-0.03, 1.03], color=MUTED, linewidth=1, zorder=1)
        for up, text in [*((scale.up(value), text) for value, text in scale.ticks), *([(ABSENT, "none")] * (i in absent))]:
            axes.annotate(clean(text, 18), (i, up), (shift, 0), **how)
    axes.set(xlim=(-0.08, len(scales) - 0.95), ylim=(ABSENT - 0.06 if absent else -0.05, 1.05), yticks=[])
    axes.grid(visible=False)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.tick_params(length=0)


def rate_figure(search: SearchRecord) -> Figure | None:
    """First-rung score against the learning rate."""
    field = next((field for field in search.space if field.name == search.rate), None)
    rates = {t.number: t.settings[search.rate] for t in search.trials if isinstance(t.settings.get(search.rate), int | float)}
    scores = [(trial, score) for trial, score in search.scores(0) if trial.number in rates]
    if field is None or not scores:
        return None
    figure, [[axes]] = panels(9.6, 3.8)
    keys = rung_keys(search)
    for trial, score in sorted(scores, key=lambda pair: len(pair[0].scores)):
        x, y = rates[trial.number], in_units(search, score)
        axes.plot(x, y, "o", color=keys[len(trial.scores)][1], markersize=6, alpha=0.85, markeredgewidth=0)
        if trial.reason:
            axes.plot(x, y, "x", color=RED, markersize=9)
        if trial is search.winner:
            axes.plot(x, y, "o", color=INK, markersize=11, markerfacecolor="none", markeredgewidth=1.4)
    shown = [trial for trial, _ in scores]
    lost = [trial for trial in search.failed if trial.number in rates and trial not in shown]
    edge = 0.03 if search.larger_is_better else 0.97  # the worse one
    how: dict[str, Any] = {"markersize": 7, "markeredgewidth": 1.8, "transform": axes.get_xaxis_transform()}
    axes.plot([rates[trial.number] for trial in lost], [edge] * len(lost), "x", color=RED, **how)
    axes.margins(y=0.12)
    clipped = bound_losses(search, axes, [score for _, score in scores])
    values = [rates[trial.number] for trial in lost + shown]
    if field.choices:  # as a range, on which small ones do not fall together
        field = replace(field, low=min(values), high=max(values), log=True, choices=())
    scale = scale_of(field, values)
    axes.set(xscale="log" if scale.log else "linear", xlabel="learning rate", ylabel=score_name(search))
    if scale.log:
        axes.set_xlim(scale.low / 1.15, scale.high * 1.15)
        axes.set_xticks(*zip(*scale.ticks, strict=True))
        axes.minorticks_off()
    rung_legend(search, figure, shown + lost, "o")
    title = "Score at the end of the first rung{where} against the learning rate, by the highest rung reached since."
    title += " Ring: the winner." if search.winner in shown else ""
    title += " A cross at the edge: failed before it had a score." if lost else ""
    return Figure(
        "search-rate", title + CUT_OFF * clipped, f"{search.score} at the first rung by learning rate{{where}}.", figure
    )


def importance_figure(search: SearchRecord) -> tuple[Figure | None, list[str]]:
    """Shares of importance of the settings for being in the best quarter at the first rung, or why they are not drawn."""
    scores = search.scores(0)
    if len(search.space) < 2 or not scores:
        return None, []
    reason, shares = "no setting took two values", list[tuple[str, float]]()
    if len(scores) < FEW:
        reason = f"{counted(len(scores), 'score')} of the first rung are too few"
    elif len({score for _, score in scores}) == 1:
        reason = "all scores of the first rung are equal"
    else:
        try:
            shares = importances(search)
        except ImportError:
            reason = "it needs the package optuna (pip install optuna)"
    if not shares:
        return None, [f"Importance of the settings is left out: {reason}."]
    figure, [[axes]] = panels(9.6, 1.0 + 0.3 * len(shares))
    percents = [100 * share for _, share in shares]
    for row, share in enumerate(percents):
        axes.barh(row, share, height=0.62, color=BLUE)
        axes.annotate(f"{number(share, 0)} %", (share, row), (4, 0), textcoords="offset points", va="center")
    when = {field.name: field.when for field in search.space if any(field.name not in trial.settings for trial, _ in scores)}
    name_rows(axes, [name + (f" (when {when[name]})" if when.get(name) else "") for name, _ in shares])
    axes.set_xlim(0, min(108, 1.15 * max(percents) + 4))
    axes.set_xlabel("share of importance (%)")
    top = sum(group == 0 for group in quarters(search).values())
    late = "What helps early need not help late, and " if len(search.ends) > 1 else ""
    title = (
        f"Which settings decided whether a trial{{where}} came into the best quarter (PED-ANOVA of optuna), from the "
        f"{len(scores)} scores at the end of the first rung ({search.unit} {search.ends[0]:g}), where all trials had the same "
        f"training. {late}{counted(top, 'trial')} in the best quarter make this "
        f"{'too rough to lean on' if top < ENOUGH_AT_TOP else 'rough'}."
    )
    alt = "Importance of settings{where}: " + ", ".join(f"{name} {number(100 * share, 0)} %" for name, share in shares) + "."
    return Figure("search-importance", title, alt, figure), []


def importances(search: SearchRecord) -> list[tuple[str, float]]:
    """Each setting's share of importance by first-rung score, largest first; one that took a single value is left out.

    The evaluator is PED-ANOVA (Watanabe et al. 2023, "PED-ANOVA: efficiently quantifying hyperparameter importance in
    arbitrary subspaces"), in its form for conditional settings, with the best quarter as its target.
    """
    import warnings

    import optuna
    from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    scores = search.scores(0)
    kinds: dict[str, BaseDistribution] = {}
    for field in search.space:
        values = values_of(field, (trial for trial, _ in scores))
        scale = scale_of(field, values)
        if len({plain(value) for value in values}) > 1:
            numbers = FloatDistribution(scale.low, scale.high, log=scale.log)
            kinds[field.name] = CategoricalDistribution(scale.choices) if scale.choices else numbers
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            study = optuna.create_study(direction="maximize")
            for trial, score in scores:
                own = {name: kind for name, kind in kinds.items() if name in trial.settings}
                params = {
                    name: plain(trial.settings[name])
                    if isinstance(kind, CategoricalDistribution)
                    else float(trial.settings[name])
                    for name, kind in own.items()
                }
                study.add_trial(optuna.trial.create_trial(params=params, distributions=own, value=search.worth(score)))
            shares = get_param_importances(study, evaluator=PedAnovaImportanceEvaluator(target_quantile=0.25))
    finally:
        optuna.logging.set_verbosity(verbosity)
    return [(name, share) for name, share in shares.items() if math.isfinite(share)]
