"""Which settings mattered in a search: each trial's own, their importance, and the learning rate beside the score."""

from __future__ import annotations

import math
import textwrap
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from crossalign.report.blocks import Figure
from crossalign.report.figures.drawing import BLUE, INK, MUTED, PAPER, RED, SKY, blank, clean, name_rows
from crossalign.report.figures.search import bound_losses, in_units, rung_colours, rung_legend
from crossalign.report.search_tables import score_name, score_text
from crossalign.report.tables import number_text, plain
from crossalign.report.wording import counted, number
from crossalign.runs.search import Field, Search, Trial, short_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FEW = 8
"""Scores below which importances would be noise alone."""
ENOUGH_AT_TOP = 5
"""Trials in the best quarter that PED-ANOVA wants, by optuna's own advice."""
ABSENT = -0.16
"""Where a line of parallel coordinates passes for a setting that its trial lacks, or a score that it never had."""


@dataclass(frozen=True)
class Scale:
    """Where values of one field lie on its axis, between 0 and 1, with marks."""

    marks: list[tuple[float, str]]
    log: bool = False
    low: float = 0.0
    high: float = 1.0
    choices: tuple[str, ...] = ()

    def place(self, value: Any) -> float:
        if self.choices:
            return (self.choices.index(plain(value)) + 0.5) / len(self.choices)
        low, high, x = (math.log10(v) if self.log else float(v) for v in (self.low, self.high, value))
        return (x - low) / (high - low) if high != low else 0.5


def scale_of(one: Field, values: list[Any]) -> Scale:
    """The axis of a field: its range, or its choices, and whatever trials have beside them."""
    if one.choices or any(isinstance(value, str | bool) or value is None for value in values):
        choices = tuple(dict.fromkeys(plain(value) for value in (*one.choices, *values)))
        return Scale([((i + 0.5) / len(choices), name) for i, name in enumerate(choices)], choices=choices)
    low, high = min([one.low, *values]), max([one.high, *values])
    scale = Scale([], one.log and low > 0, low, high)
    if scale.log:
        tens = [10.0**power for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
        inside = [ten for ten in tens if low <= ten <= high]
        ticks = inside if len(inside) > 1 else [low, *inside, high]
    else:
        ticks = [low, (low + high) / 2, high]
    return Scale([(scale.place(t), number_text(t)) for t in dict.fromkeys(ticks)], scale.log, low, high)


def parallel_figure(search: Search) -> Figure | None:
    """Every trial as a line through its settings to its score at the end of the first rung."""
    fields = list(search.space)
    if not fields:
        return None
    scales = [scale_of(f, [t.settings[f.name] for t in search.trials if f.name in t.settings]) for f in fields]
    first = {trial.number: score for trial, score in search.scores(0)}
    final = _score_scale(search, list(first.values()))
    figure = blank(max(9.6, 1.15 * (len(fields) + 1)), 4.6)
    axes = figure.add_subplot()
    groups = quarters(search)
    for trial in sorted(search.trials, key=lambda t: groups.get(t.number, 3), reverse=True):
        ups = [
            s.place(trial.settings[f.name]) if f.name in trial.settings else ABSENT for f, s in zip(fields, scales, strict=True)
        ]
        jitter = 0.09 * (((trial.number * 0.618) % 1) - 0.5)  # choices would lie on one another
        ups = [up + jitter / 2 if up == ABSENT or s.choices else up for up, s in zip(ups, scales, strict=True)]
        ups.append(final.place(first[trial.number]) if trial.number in first else ABSENT + jitter / 2)
        colour, width = ((BLUE, 1.6), (SKY, 1.2), (MUTED, 0.8), (RED, 0.9))[groups.get(trial.number, 3)]
        wins = trial is search.winner
        axes.plot(
            range(len(ups)),
            ups,
            "--" if trial.number not in first else "-",
            color=INK if wins else colour,
            linewidth=2.2 if wins else width,
            alpha=1 if wins else 0.85,
            zorder=5 if wins else None,
        )
    missing = any(trial.number not in first for trial in search.trials)
    absent = {i for i, f in enumerate(fields) if any(f.name not in trial.settings for trial in search.trials)}
    _parallel_axes(axes, scales, final, absent | ({len(fields)} if missing else set()))
    short = short_names([f.name for f in fields])
    names = [
        [short[f.name].replace("_", " "), f"when {f.when}" if i in absent and f.when else ""] for i, f in enumerate(fields)
    ]
    axes.set_xticks(range(len(names) + 1), [narrow(*lines) for lines in [*names, [score_name(search), "first rung"]]])
    seen = {group for one, group in groups.items() if search.winner is None or one != search.winner.number}
    _parallel_legend(figure, seen, missing, search.winner)
    title = "Settings of every trial{where} and its score at the end of the first rung, which all trials share; better is up."
    return Figure("search-settings", title, "Parallel coordinates of settings and first-rung scores{where}.", figure)


def narrow(*texts: str) -> str:
    """Texts below one another in lines that do not reach into the next axis."""
    return "\n".join(line for text in texts for line in textwrap.wrap(clean(text), 15))


def _score_scale(search: Search, scores: list[float]) -> Scale:
    if not scores:
        return Scale([])
    low, high = min(scores), max(scores)
    if not search.larger_is_better:
        low, high = high, low
    places = [(low, 0.0), ((low + high) / 2, 0.5), (high, 1.0)] if low != high else [(low, 0.5)]
    return Scale([(place, score_text(search, value)) for value, place in places], False, low, high)


def quarters(search: Search) -> dict[int, int]:
    """0 for a trial in the best quarter by first-rung score, 1 for the next quarter, 2 for the lower half."""
    held = sorted(search.scores(0), key=lambda pair: (-search.worth(pair[1]), pair[0].number))
    count = len(held)
    return {t.number: 0 if 4 * i < count else 1 if 2 * i < count else 2 for i, (t, _) in enumerate(held)}


def _parallel_axes(axes: Axes, scales: list[Scale], final: Scale, absent: set[int]) -> None:
    """The vertical axes with their marks; ``absent``: those below which lines pass that have no value there."""
    plate: Any = {"boxstyle": "round,pad=0.1", "facecolor": PAPER, "edgecolor": "none", "alpha": 0.85}
    for place, scale in enumerate([*scales, final]):
        side, shift = ("left", 6) if place < len(scales) else ("right", -6)
        how: Any = {"textcoords": "offset points", "va": "center", "ha": side, "fontsize": 8, "bbox": plate, "zorder": 6}
        axes.plot([place, place], [-0.03, 1.03], color=MUTED, linewidth=1, zorder=1)
        for up, text in [*scale.marks, *([(ABSENT, "none")] if place in absent else [])]:
            axes.annotate(clean(text, 18), (place, up), (shift, 0), **how)
    axes.set(xlim=(-0.08, len(scales) + 0.05), ylim=(ABSENT - 0.06 if absent else -0.05, 1.05))
    axes.set_yticks([])
    axes.grid(visible=False)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.tick_params(length=0)


def _parallel_legend(figure: Any, groups: set[int], missing: bool, winner: Trial | None) -> None:
    from matplotlib.lines import Line2D

    names = ((BLUE, "best quarter"), (SKY, "next quarter"), (MUTED, "lower half"))
    handles = [Line2D([], [], color=names[i][0], label=names[i][1]) for i in sorted(groups)]
    if missing:
        handles.append(Line2D([], [], color=RED, linestyle="--", label="no score at the first rung"))
    if winner:
        handles.append(Line2D([], [], color=INK, linewidth=2.2, label=f"winner, trial {winner.number}"))
    figure.legend(handles=handles, loc="outside lower center", ncols=5)


def rate_figure(search: Search) -> Figure | None:
    """First-rung score against the learning rate."""
    held = [(trial, score) for trial, score in search.scores(0) if isinstance(trial.settings.get(search.rate), int | float)]
    one = next((field for field in search.space if field.name == search.rate), None)
    if one is None or not held:
        return None
    figure = blank(9.6, 3.8)
    axes = figure.add_subplot()
    colours = rung_colours(search)
    for trial, score in sorted(held, key=lambda pair: len(pair[0].rungs)):
        x, y = trial.settings[search.rate], in_units(search, score)
        axes.plot(x, y, "o", color=colours[len(trial.rungs)], markersize=6, alpha=0.85, markeredgewidth=0)
        if trial.state == "failed":
            axes.plot(x, y, "x", color=RED, markersize=9)
        if trial is search.winner:
            axes.plot(x, y, "o", color=INK, markersize=11, markerfacecolor="none", markeredgewidth=1.4)
    scored = {trial.number for trial, _ in held}
    lost = [trial for trial in search.failed if trial.number not in scored]
    lost = [trial for trial in lost if isinstance(trial.settings.get(search.rate), int | float)]
    rates = [trial.settings[search.rate] for trial in lost]
    edge = 0.03 if search.larger_is_better else 0.97  # the worse one
    how: dict[str, Any] = {"markersize": 7, "markeredgewidth": 1.8, "transform": axes.get_xaxis_transform()}
    axes.plot(rates, [edge] * len(rates), "x", color=RED, **how)
    axes.margins(y=0.12)
    clipped = bound_losses(search, axes, [score for _, score in held])
    rates += [trial.settings[search.rate] for trial, _ in held]
    if one.choices:  # as a range, on which small ones do not fall together
        one = replace(one, low=min(rates), high=max(rates), log=True, choices=())
    scale = scale_of(one, rates)
    axes.set(xscale="log" if scale.log else "linear", xlabel="learning rate", ylabel=score_name(search))
    if scale.log:
        axes.set_xlim(scale.low / 1.15, scale.high * 1.15)
        axes.set_xticks([_unplaced(scale, up) for up, _ in scale.marks], [text for _, text in scale.marks])
        axes.minorticks_off()
    rung_legend(search, figure, [trial for trial, _ in held] + lost, "o")
    title = "Score at the end of the first rung{where} against the learning rate, by the highest rung reached since."
    title += " Ring: the winner." if search.winner and search.winner.number in scored else ""
    title += " A cross at the edge: failed before it had a score." if lost else ""
    title += " The highest losses are cut off." if clipped else ""
    return Figure("search-rate", title, f"{search.score} at the first rung by learning rate{{where}}.", figure)


def _unplaced(scale: Scale, up: float) -> float:
    """The value at a place of a logarithmic axis."""
    low, high = math.log10(scale.low), math.log10(scale.high)
    return 10 ** (low + up * (high - low))


def importance_figure(search: Search) -> tuple[Figure | None, list[str]]:
    """Shares of importance of the settings for being in the best quarter at the first rung."""
    scores = search.scores(0)
    if len(search.space) < 2 or not scores:
        return None, []
    if len(scores) < FEW:
        return None, [f"Importance of the settings is left out: {counted(len(scores), 'score')} of the first rung are too few."]
    if len({score for _, score in scores}) == 1:
        return None, ["Importance of the settings is left out: all scores of the first rung are equal."]
    try:
        shares = importances(search)
    except ImportError:
        return None, ["Importance of the settings is left out: it needs the package optuna (pip install optuna)."]
    if not shares:
        return None, ["Importance of the settings is left out: no setting took two values."]
    figure = blank(9.6, 1.0 + 0.3 * len(shares))
    axes = figure.add_subplot()
    for place, (_, share) in enumerate(shares):
        axes.barh(place, 100 * share, height=0.62, color=BLUE)
        axes.annotate(f"{number(100 * share, 0)} %", (100 * share, place), (4, 0), textcoords="offset points", va="center")
    when = {one.name: one.when for one in search.space if any(one.name not in trial.settings for trial, _ in scores)}
    name_rows(axes, [name + (f" (when {when[name]})" if when.get(name) else "") for name, _ in shares])
    axes.set_xlim(0, min(108, 115 * max(share for _, share in shares) + 4))
    axes.set_xlabel("share of importance (%)")
    top = sum(group == 0 for group in quarters(search).values())
    late = "What helps early need not help late, and " if len(search.rungs) > 1 else ""
    title = (
        f"Which settings decided whether a trial{{where}} came into the best quarter (PED-ANOVA of optuna), from the "
        f"{len(scores)} scores at the end of the first rung ({search.unit} {search.rungs[0]:g}), where all trials had the same "
        f"training. {late}{counted(top, 'trial')} in the best quarter make this "
        f"{'too rough to lean on' if top < ENOUGH_AT_TOP else 'rough'}."
    )
    alt = "Importance of settings{where}: " + ", ".join(f"{name} {number(100 * share, 0)} %" for name, share in shares) + "."
    return Figure("search-importance", title, alt, figure), []


def importances(search: Search) -> list[tuple[str, float]]:
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
    for one in search.space:
        values = [trial.settings[one.name] for trial, _ in scores if one.name in trial.settings]
        if len({plain(value) for value in values}) < 2:
            continue
        scale = scale_of(one, values)
        kinds[one.name] = (
            CategoricalDistribution(scale.choices) if scale.choices else FloatDistribution(scale.low, scale.high, log=scale.log)
        )
    if not kinds:
        return []
    said = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            study = optuna.create_study(direction="maximize")
            for trial, score in scores:
                held = {name: kind for name, kind in kinds.items() if name in trial.settings}
                params = {
                    name: plain(trial.settings[name])
                    if isinstance(kind, CategoricalDistribution)
                    else float(trial.settings[name])
                    for name, kind in held.items()
                }
                study.add_trial(optuna.trial.create_trial(params=params, distributions=held, value=search.worth(score)))
            found = get_param_importances(study, evaluator=PedAnovaImportanceEvaluator(target_quantile=0.25))
    finally:
        optuna.logging.set_verbosity(said)
    return [(name, share) for name, share in found.items() if math.isfinite(share)]
