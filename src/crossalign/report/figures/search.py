"""Figures of a search over settings: its rungs and curves, every trial's settings, their importance, the learning rate."""

from __future__ import annotations

import math
import textwrap
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from crossalign.report.blocks import Figure
from crossalign.report.figures.drawing import BLUE, INK, MUTED, PAPER, RED, SKY, blank, clean, name_rows, styled
from crossalign.report.figures.rungs import bound_losses, curve_figure, in_units, rung_colours, rung_figure, rung_legend
from crossalign.report.searches import score_name, score_text, short_names
from crossalign.report.tables import number_text, plain
from crossalign.report.words import counted, number
from crossalign.runs.search import SearchedField, SearchRecord

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


def search_figures(search: SearchRecord, suffix: str = "", where: str = "") -> tuple[list[Figure], list[str]]:
    """Every figure that the search has data for, and a sentence for each that is left out for a reason to know of.

    ``suffix`` is that of the figures' names, ``where`` names the search in their captions, where there are several.
    """
    if not search.trials:
        return [], ["No trial was begun yet: there is nothing to draw."]
    with styled():
        importance, left_out = importance_figure(search)
        drawn = [rung_figure(search), curve_figure(search), parallel_figure(search), rate_figure(search), importance]
    figures = [figure for figure in drawn if figure is not None]
    return [
        replace(f, name=f.name + suffix, title=f.title.replace("{where}", where), alt=f.alt.replace("{where}", where))
        for f in figures
    ], left_out


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


def _score_scale(search: SearchRecord, scores: list[float]) -> Scale:
    if not scores:
        return Scale(())
    low, high = (min(scores), max(scores)) if search.larger_is_better else (max(scores), min(scores))
    ticks = dict.fromkeys([low, (low + high) / 2, high])
    return Scale(tuple((tick, score_text(search, tick)) for tick in ticks), low, high)


def quarters(search: SearchRecord) -> dict[int, int]:
    """0 for a trial in the best quarter by first-rung score, 1 for the next quarter, 2 for the lower half."""
    scores = sorted(search.scores(0), key=lambda pair: (-search.worth(pair[1]), pair[0].number))
    count = len(scores)
    return {t.number: 0 if 4 * i < count else 1 if 2 * i < count else 2 for i, (t, _) in enumerate(scores)}


def parallel_figure(search: SearchRecord) -> Figure | None:
    """Every trial as a line through its settings to its score at the end of the first rung."""
    from matplotlib.lines import Line2D

    fields = search.space
    if not fields:
        return None
    first = {trial.number: score for trial, score in search.scores(0)}
    scales = [scale_of(f, [t.settings[f.name] for t in search.trials if f.name in t.settings]) for f in fields]
    scales.append(_score_scale(search, list(first.values())))
    short, figure = short_names(search), blank(max(9.6, 1.15 * len(scales)), 4.6)
    axes, groups, winner = figure.add_subplot(), quarters(search), search.winner
    for trial in sorted(search.trials, key=lambda t: groups.get(t.number, 3), reverse=True):
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
    absent = {i for i, f in enumerate(fields) if any(f.name not in trial.settings for trial in search.trials)}
    names = [narrow(short[f.name], f"when {f.when}" if i in absent and f.when else "") for i, f in enumerate(fields)]
    missing = any(trial.number not in first for trial in search.trials)
    _parallel_axes(axes, scales, absent | ({len(fields)} if missing else set()))
    axes.set_xticks(range(len(scales)), [*names, narrow(score_name(search), "first rung")])
    shares = sorted({group for number, group in groups.items() if winner is None or number != winner.number})
    lines: list[tuple[str, dict[str, Any]]] = [(GROUPS[group][2], {"color": GROUPS[group][0]}) for group in shares]
    lines += [("no score at the first rung", {"color": RED, "linestyle": "--"})] * missing
    lines += [(f"winner, trial {winner.number}", {"color": INK, "linewidth": 2.2})] if winner else []
    figure.legend(handles=[Line2D([], [], label=label, **style) for label, style in lines], loc="outside lower center", ncols=5)
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
    rates: dict[int, Any] = {trial.number: trial.settings.get(search.rate) for trial in search.trials}
    rates = {number: rate for number, rate in rates.items() if isinstance(rate, int | float)}
    scores = [(trial, score) for trial, score in search.scores(0) if trial.number in rates]
    field = next((field for field in search.space if field.name == search.rate), None)
    if field is None or not scores:
        return None
    figure = blank(9.6, 3.8)
    axes, colours, scored = figure.add_subplot(), rung_colours(search), {trial.number for trial, _ in scores}
    for trial, score in sorted(scores, key=lambda pair: len(pair[0].scores)):
        x, y = rates[trial.number], in_units(search, score)
        axes.plot(x, y, "o", color=colours[len(trial.scores)], markersize=6, alpha=0.85, markeredgewidth=0)
        if trial.reason:
            axes.plot(x, y, "x", color=RED, markersize=9)
        if trial is search.winner:
            axes.plot(x, y, "o", color=INK, markersize=11, markerfacecolor="none", markeredgewidth=1.4)
    lost = [trial for trial in search.failed if trial.number in rates and trial.number not in scored]
    edge = 0.03 if search.larger_is_better else 0.97  # the worse one
    how: dict[str, Any] = {"markersize": 7, "markeredgewidth": 1.8, "transform": axes.get_xaxis_transform()}
    axes.plot([rates[trial.number] for trial in lost], [edge] * len(lost), "x", color=RED, **how)
    axes.margins(y=0.12)
    clipped = bound_losses(search, axes, [score for _, score in scores])
    values = [rates[trial.number] for trial in [*lost, *(trial for trial, _ in scores)]]
    if field.choices:  # as a range, on which small ones do not fall together
        field = replace(field, low=min(values), high=max(values), log=True, choices=())
    scale = scale_of(field, values)
    axes.set(xscale="log" if scale.log else "linear", xlabel="learning rate", ylabel=score_name(search))
    if scale.log:
        axes.set_xlim(scale.low / 1.15, scale.high * 1.15)
        axes.set_xticks(*zip(*scale.ticks, strict=True))
        axes.minorticks_off()
    rung_legend(search, figure, [trial for trial, _ in scores] + lost, "o")
    title = "Score at the end of the first rung{where} against the learning rate, by the highest rung reached since."
    title += " Ring: the winner." if search.winner and search.winner.number in scored else ""
    title += " A cross at the edge: failed before it had a score." if lost else ""
    title += " The highest losses are cut off." if clipped else ""
    return Figure("search-rate", title, f"{search.score} at the first rung by learning rate{{where}}.", figure)


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
    figure = blank(9.6, 1.0 + 0.3 * len(shares))
    axes = figure.add_subplot()
    percents = [100 * share for _, share in shares]
    for row, share in enumerate(percents):
        axes.barh(row, share, height=0.62, color=BLUE)
        axes.annotate(f"{number(share, 0)} %", (share, row), (4, 0), textcoords="offset points", va="center")
    when = {one.name: one.when for one in search.space if any(one.name not in trial.settings for trial, _ in scores)}
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
        values = [trial.settings[field.name] for trial, _ in scores if field.name in trial.settings]
        if len({plain(value) for value in values}) > 1:
            scale = scale_of(field, values)
            choices, (low, high, log) = scale.choices, (scale.low, scale.high, scale.log)
            kinds[field.name] = CategoricalDistribution(choices) if choices else FloatDistribution(low, high, log=log)
    if not kinds:
        return []
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            study = optuna.create_study(direction="maximize")
            for trial, score in scores:
                own = {name: kind for name, kind in kinds.items() if name in trial.settings}
                params: dict[str, Any] = {name: trial.settings[name] for name in own}
                for name, kind in own.items():
                    params[name] = plain(params[name]) if isinstance(kind, CategoricalDistribution) else float(params[name])
                study.add_trial(optuna.trial.create_trial(params=params, distributions=own, value=search.worth(score)))
            shares = get_param_importances(study, evaluator=PedAnovaImportanceEvaluator(target_quantile=0.25))
    finally:
        optuna.logging.set_verbosity(verbosity)
    return [(name, share) for name, share in shares.items() if math.isfinite(share)]
