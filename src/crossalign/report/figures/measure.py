"""Figures of a measurement: heat maps of layers, bests against chance, language quality, and what training changes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crossalign.config import MeasureConfig
from crossalign.core.refs import Ref
from crossalign.report.blocks import Figure
from crossalign.report.figures.drawing import BLUE, INK, MUTED, ORANGE, PALETTE, clean, styled
from crossalign.report.figures.shared import Mark, draw_curve, forest, legend_below, panels

Scores = Mapping[str, NDArray[np.float32]]
MOST_PANELS = 8
"""Language models that a figure of heat maps holds; of more, as training leaves them, the last ones are drawn."""
CHANCES = (BLUE, "both trained"), (ORANGE, "one is a control"), (MUTED, "both are controls")


def measure_figures(config: MeasureConfig, result: dict[str, Any], scores: Scores) -> list[Figure]:
    """Every figure that the measurement has data for; ``result`` and ``scores`` as :func:`report.measure.write_page` takes."""
    with styled():
        figures = [
            heat_maps(config, result, scores),
            against_chance(config, result),
            quality_figure(config, result),
            dynamics_figure(config, result, scores),
        ]
    return [figure for figure in figures if figure is not None]


def share(config: MeasureConfig) -> str:
    """How many of the permutations the critical value is above: 95% at level 0.05."""
    return f"{100 * (1 - config.level):g}%"


def _pairs(result: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """What was found for each language model with each vision model."""
    return {(pair["language"], pair["vision"]): pair for pair in result["alignment"]}


def _drawn(result: dict[str, Any]) -> tuple[list[dict[str, Any]], str]:
    """The language models that a figure has room for, each with its controls, and a sentence where others are left out."""
    models = result["language"]
    bases = [Ref(model["ref"]).base for model in models]
    taken: set[str] = set()
    for base in reversed(dict.fromkeys(bases)):
        if sum(other in taken or other == base for other in bases) > MOST_PANELS:
            break
        taken.add(base)
    drawn = [model for model, base in zip(models, bases, strict=True) if base in taken]
    return drawn, "" if len(drawn) == len(models) else f" The last {len(drawn)} of {len(models)} language models."


def heat_maps(config: MeasureConfig, result: dict[str, Any], scores: Scores) -> Figure:
    """Every layer against every layer: a panel for each pair of models, one colour scale."""
    language, left_out = _drawn(result)
    vision, pairs = result["vision"], _pairs(result)
    every = [scores[f"{left} | {right} | score"] for left, right in pairs]
    lowest = min(0, *(float(values.min()) for values in every))
    largest = max(lowest + 1e-6, *(float(values.max()) for values in every))
    how: dict[str, Any] = {"cmap": "viridis", "vmin": lowest, "vmax": largest, "aspect": "auto", "interpolation": "nearest"}
    figure, grid = panels(1.2 + 2.5 * len(vision), 0.6 + 2.1 * len(language), len(language), len(vision))
    for line, left in zip(grid, language, strict=True):
        for panel, right in zip(line, vision, strict=True):
            pair = pairs[left["name"], right["name"]]
            image = panel.imshow(scores[f"{left['name']} | {right['name']} | score"], origin="lower", **how)
            panel.grid(visible=False)
            _name_layers(panel.set_xticks, right["layers"])
            _name_layers(panel.set_yticks, left["layers"])
            best = right["layers"].index(pair["vision_layer"]), left["layers"].index(pair["language_layer"])
            full = "white" if pair["p"] <= config.level else "none"
            panel.plot(*best, "o", markersize=7, markerfacecolor=full, markeredgecolor="white")
            panel.set_title(f"{pair['score']:.3f}, p = {pair['p']:.2g}", fontsize=8, fontweight="normal")
        line[0].set_ylabel(clean(left["name"], 24))
    for panel, right in zip(grid[-1], vision, strict=True):
        panel.set_xlabel(clean(right["name"], 28))
    figure.colorbar(image, ax=grid, shrink=0.6, label=config.metric)
    title = "Score of each layer of a language model (up) with each of a vision model (across). Circle: the best, full where "
    title += f"it is more than chance gives at best (p ≤ {config.level:g}).{left_out}"
    return Figure("heat-maps", title, "Heat maps of scores over layers; the best of each stand in the table.", figure)


def _name_layers(set_ticks: Any, names: list[str]) -> None:
    """At most about eight layers' names, the first and the last among them."""
    chosen = np.unique(np.linspace(0, len(names) - 1, min(8, len(names))).round().astype(int))
    set_ticks(chosen, ["pen." if names[i] == "penultimate" else clean(names[i], 8) for i in chosen], fontsize=7)


def against_chance(config: MeasureConfig, result: dict[str, Any]) -> Figure:
    """The best score of each pair of models beside what chance gives at best; controls in colours of their own."""
    language, left_out = _drawn(result)
    pairs = [pair for pair in result["alignment"] if pair["language"] in {model["name"] for model in language}]
    controls = {side: {model["name"] for model in result[side] if Ref(model["ref"]).control} for side in ("language", "vision")}
    kinds = [CHANCES[sum(pair[side] in names for side, names in controls.items())] for pair in pairs]
    figure, [[axes]] = panels(8.6, 1.0 + 0.26 * len(pairs))
    marks = []
    for i, (pair, (colour, _)) in enumerate(zip(pairs, kinds, strict=True)):
        axes.plot([pair["null_mean"], pair["critical"]], [i, i], color=INK, linewidth=6, alpha=0.15, solid_capstyle="butt")
        low, high = pair["interval"]
        marks.append(Mark(i, low, pair["score"], high, colour))
    drawn = forest(axes, [f"{pair['language']} × {pair['vision']}" for pair in pairs], marks, caps=2)
    axes.set_xlabel(f"{config.metric}, best of all layers")
    legend_below(figure, dict(zip((name for _, name in kinds), drawn, strict=True)), 3)
    title = (
        "Best of all layers with its 95 % interval. Grey: the best of all layers under chance, from its mean to what it stays "
    )
    title += f"under in {share(config)} of the permutations.{left_out}"
    return Figure("against-chance", title, "Best scores against chance; the same numbers are in the table.", figure)


def quality_figure(config: MeasureConfig, result: dict[str, Any]) -> Figure | None:
    """Language quality against alignment, as the Platonic Representation Hypothesis has it (Huh et al. 2024, figure 3)."""
    quality = {model["name"]: model["bits_per_byte"] for model in result["language"] if "bits_per_byte" in model}
    if len(quality) < 2:
        return None
    figure, [[axes]] = panels(7.2, 4.4)
    pairs = _pairs(result)
    for i, model in enumerate(result["vision"]):
        names = sorted(quality, key=lambda name: quality[name])
        middle = np.array([pairs[name, model["name"]]["calibrated"] for name in names])
        low, high = np.array([pairs[name, model["name"]]["calibrated_interval"] for name in names]).T
        style: dict[str, Any] = {"fmt": "o--" if Ref(model["ref"]).control else "o-", "color": PALETTE[i % len(PALETTE)]}
        style |= {"markersize": 5, "capsize": 2, "linewidth": 1.2, "label": clean(model["name"])}
        ends = [np.maximum(middle - low, 0), np.maximum(high - middle, 0)]
        axes.errorbar([quality[name] for name in names], middle, yerr=ends, **style)
    for name, bits in quality.items():
        axes.annotate(clean(name, 28), (bits, 1), xycoords=("data", "axes fraction"), rotation=30, fontsize=7, color=MUTED)
    axes.invert_xaxis()
    axes.set(xlabel=f"bits a byte of {Path(config.text).name} (better to the right)", ylabel="calibrated alignment")
    legend_below(figure, axes, 2)
    title = "Language quality against alignment: best of all layers, calibrated, with 95 % intervals; one line a vision model."
    return Figure("quality", title, "Bits a byte against calibrated alignment; both stand in measure.json.", figure)


def dynamics_figure(config: MeasureConfig, result: dict[str, Any], scores: Scores) -> Figure | None:
    """Alignment over the steps of a training run, layer by layer (CMAR A.5, figure 9)."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for model in result["language"]:
        if "step" in model:
            runs.setdefault(model["run"], []).append(model)
    if not runs:
        return None
    from matplotlib import colormaps
    from pandas import DataFrame

    vision, pairs = result["vision"], _pairs(result)
    figure, grid = panels(1 + 3.6 * len(vision), 0.8 + 2.7 * len(runs), len(runs), len(vision), sharey=True)
    layers = list(dict.fromkeys(layer for models in runs.values() for layer in models[0]["layers"]))  # a run may have more
    legend: dict[str, Any] = {}
    for line, (run, models) in zip(grid, runs.items(), strict=True):
        steps = [model["step"] for model in models]
        for panel, right in zip(line, vision, strict=True):
            bests = np.array([scores[f"{model['name']} | {right['name']} | score"].max(axis=1) for model in models])
            for layer, values in zip(models[0]["layers"], bests.T, strict=True):
                colour = colormaps["viridis"](layers.index(layer) / max(1, len(layers) - 1) * 0.9)
                (legend[f"layer {layer}"],) = panel.plot(steps, values, color=colour, linewidth=1.1)
            own = [pairs[model["name"], right["name"]] for model in models]
            curve = DataFrame([(pair["score"], *pair["interval"]) for pair in own], steps, ["mean", "min", "max"])
            best = draw_curve(panel, curve, band=0.1, color=INK, linestyle="", marker="o", markersize=3)
            (chance,) = panel.plot(steps, [pair["critical"] for pair in own], color=MUTED, linestyle=":")
            panel.set_title(f"{clean(run, 32)} × {clean(right['name'], 26)}", fontsize=8)
            panel.set_xlabel("optimiser step")
        line[0].set_ylabel(config.metric)
    legend |= {"best layer, 95 % interval": best, f"chance: {share(config)} of bests stay below": chance}
    legend_below(figure, legend, min(5, 1 + len(vision)))
    title = "Alignment during training: each layer of the language model with the vision layer that it is most aligned with."
    return Figure("dynamics", title, "Scores of layers over steps; they stand in scores.safetensors.", figure)
