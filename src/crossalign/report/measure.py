"""The figures and the page of a measurement: which layers are aligned, is it more than chance, and what goes with it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crossalign.config import MeasureConfig
from crossalign.core.refs import Ref
from crossalign.report.blocks import Figure, Figures, Page, Prose, Table
from crossalign.report.figures.drawing import BLUE, INK, MUTED, ORANGE, PALETTE, blank, clean, name_rows, styled
from crossalign.report.render.markdown import write_markdown

Scores = Mapping[str, NDArray[np.float32]]
MOST_PANELS = 8
"""Language models that a figure of heat maps holds; of more, as training leaves them, the last ones are shown."""


def write_page(folder: Path, config: MeasureConfig, result: dict[str, Any], scores: Scores) -> None:
    """Write measure.md, a page for a repository, and its figures as PNG into the folder figures.

    Args:
        result: what measure.json holds.
        scores: for each ``"LANGUAGE | VISION | score"`` (layers of the one, layers of the other).
    """
    with styled():
        figures = [
            heat_maps(config, result, scores),
            against_chance(config, result),
            quality_figure(config, result),
            dynamics_figure(config, result, scores),
        ]
    blocks = Prose((_what(config, result),)), summary_table(config, result), Figures(tuple(filter(None, figures)), "Figures")
    page = Page("Alignment of language and vision models", blocks)
    write_markdown(page, folder / "measure.md", folder / "figures", dpi=130)


def _what(config: MeasureConfig, result: dict[str, Any]) -> str:
    return (
        f"{config.metric} on {result['n']:,} pairs ({result['pairs']}); {config.permutations:,} permutations, "
        f"{config.groups} jackknife groups, seed {config.seed}."
    )


def summary_table(config: MeasureConfig, result: dict[str, Any]) -> Table:
    """A row for each pair of models: the best of all layers, and what chance gives for the best of all layers."""
    columns = [
        "Language model",
        "Vision model",
        "Layers",
        "Score [95 % interval]",
        "Chance: mean",
        f"{_share(config)} of bests",
    ]
    columns += ["Calibrated [interval]", "p"]
    rows, strong = [], set()
    for place, one in enumerate(result["alignment"]):
        low, high = one["interval"]
        from_, to = one["calibrated_interval"]
        if one["p"] <= config.level:
            strong.add(place)
        rows.append(
            [
                one["language"],
                one["vision"],
                f"{one['language_layer']} × {one['vision_layer']}",
                f"{one['score']:.3f} [{low:.3f}, {high:.3f}]",
                f"{one['null_mean']:.3f}",
                f"{one['critical']:.3f}",
                f"{one['calibrated']:.3f} [{from_:.3f}, {to:.3f}]",
                f"{one['p']:.2g}",
            ]
        )
    notes = [
        "Score: the best of all layers. Chance: the best of all layers with the images in random order, its mean and what it "
        f"stays under in {_share(config)} of the permutations. Calibrated: 0 at that value, 1 at the largest "
        "possible score (Gröger, Wen and Brbić 2026). p: corrected for taking the best of all layers, not for the "
        "number of pairs of models. Intervals: jackknife over groups of pairs, the best layers chosen anew in each. Bold: more "
        "than chance.",
    ]
    return Table("Best of all layers", columns, rows, notes, frozenset({1, 2}), frozenset(strong))


def heat_maps(config: MeasureConfig, result: dict[str, Any], scores: Scores) -> Figure:
    """Every layer against every layer: a panel for each pair of models, one colour scale."""
    (language, left_out), vision = _shown(result), result["vision"]
    held = {(one["language"], one["vision"]): one for one in result["alignment"]}
    by_pair = {key: scores[f"{key[0]} | {key[1]} | score"] for key in held}
    lowest = min(0, *(float(values.min()) for values in by_pair.values()))
    largest = max(lowest + 1e-6, *(float(values.max()) for values in by_pair.values()))
    figure = blank(1.2 + 2.5 * len(vision), 0.6 + 2.1 * len(language))
    grid: Any = figure.subplots(len(language), len(vision), squeeze=False)
    image: Any = None
    for line, left in zip(grid, language, strict=True):
        for panel, right in zip(line, vision, strict=True):
            values, one = by_pair[left["name"], right["name"]], held[left["name"], right["name"]]
            image = panel.imshow(
                values, cmap="viridis", vmin=lowest, vmax=largest, aspect="auto", interpolation="nearest", origin="lower"
            )
            panel.grid(visible=False)
            _ticks(panel.set_xticks, right["layers"])
            _ticks(panel.set_yticks, left["layers"])
            place = right["layers"].index(one["vision_layer"]), left["layers"].index(one["language_layer"])
            shown = one["p"] <= config.level
            panel.plot(*place, "o", markersize=7, markerfacecolor="white" if shown else "none", markeredgecolor="white")
            panel.set_title(f"{one['score']:.3f}, p = {one['p']:.2g}", fontsize=8, fontweight="normal")
        line[0].set_ylabel(clean(left["name"], 24))
    for panel, right in zip(grid[-1], vision, strict=True):
        panel.set_xlabel(clean(right["name"], 28))
    figure.colorbar(image, ax=grid, shrink=0.6, label=config.metric)
    title = "Score of each layer of a language model (up) with each of a vision model (across). Circle: the best, full where "
    title += f"it is more than chance gives at best (p ≤ {config.level:g}).{left_out}"
    return Figure("heat-maps", title, "Heat maps of scores over layers; the best of each stand in the table.", figure)


def _share(config: MeasureConfig) -> str:
    """How many of the permutations the critical value is above: 95% at level 0.05."""
    return f"{100 * (1 - config.level):g}%"


def _is_control(model: dict[str, Any]) -> bool:
    return bool(Ref(model["ref"]).control)


def _shown(result: dict[str, Any]) -> tuple[list[dict[str, Any]], str]:
    """The language models that a figure has room for, each with its controls, and a sentence where others are left out."""
    models = result["language"]
    bases = [Ref(model["ref"]).base for model in models]
    taken: set[str] = set()
    for base in reversed(dict.fromkeys(bases)):
        if sum(one in taken or one == base for one in bases) > MOST_PANELS:
            break
        taken.add(base)
    shown = [model for model, base in zip(models, bases, strict=True) if base in taken]
    return shown, "" if len(shown) == len(models) else f" The last {len(shown)} of {len(models)} language models."


def _ticks(set_ticks: Any, names: list[str]) -> None:
    """At most about eight layers' names, the first and the last among them."""
    places = np.unique(np.linspace(0, len(names) - 1, min(8, len(names))).round().astype(int))
    set_ticks(places, ["pen." if names[i] == "penultimate" else clean(names[i], 8) for i in places], fontsize=7)


def against_chance(config: MeasureConfig, result: dict[str, Any]) -> Figure:
    """The best score of each pair of models beside what chance gives at best; controls in colours of their own."""
    language, left_out = _shown(result)
    shown = [one for one in result["alignment"] if one["language"] in {model["name"] for model in language}]
    controls = {side: {model["name"] for model in result[side] if _is_control(model)} for side in ("language", "vision")}
    figure = blank(8.6, 1.0 + 0.26 * len(shown))
    axes = figure.add_subplot()
    used: dict[str, Any] = {}
    for place, one in enumerate(shown):
        count = sum(one[side] in controls[side] for side in controls)
        colour, label = ((BLUE, "both trained"), (ORANGE, "one is a control"), (MUTED, "both are controls"))[count]
        axes.plot(
            [one["null_mean"], one["critical"]], [place, place], color=INK, linewidth=6, alpha=0.15, solid_capstyle="butt"
        )
        low, high = one["interval"]
        used[label] = axes.errorbar(
            one["score"],
            place,
            xerr=[[one["score"] - low], [high - one["score"]]],
            fmt="o",
            color=colour,
            markersize=5,
            capsize=2,
        )
    name_rows(axes, [f"{one['language']} × {one['vision']}" for one in shown])
    axes.set_xlabel(f"{config.metric}, best of all layers")
    figure.legend(used.values(), used.keys(), loc="outside lower center", ncols=3)
    title = (
        "Best of all layers with its 95 % interval. Grey: the best of all layers under chance, from its mean to what it stays "
    )
    title += f"under in {_share(config)} of the permutations.{left_out}"
    return Figure("against-chance", title, "Best scores against chance; the same numbers are in the table.", figure)


def quality_figure(config: MeasureConfig, result: dict[str, Any]) -> Figure | None:
    """Language quality against alignment, as the Platonic Representation Hypothesis has it (Huh et al. 2024, figure 3)."""
    quality = {model["name"]: model["bits_per_byte"] for model in result["language"] if "bits_per_byte" in model}
    if len(quality) < 2:
        return None
    figure = blank(7.2, 4.4)
    axes = figure.add_subplot()
    for place, model in enumerate(result["vision"]):
        found = [one for one in result["alignment"] if one["vision"] == model["name"] and one["language"] in quality]
        found.sort(key=lambda one: quality[one["language"]])
        middle = np.array([one["calibrated"] for one in found])
        low, high = np.array([one["calibrated_interval"] for one in found]).T
        axes.errorbar(
            [quality[one["language"]] for one in found],
            middle,
            yerr=[np.maximum(middle - low, 0), np.maximum(high - middle, 0)],
            fmt="o--" if _is_control(model) else "o-",
            color=PALETTE[place % len(PALETTE)],
            markersize=5,
            capsize=2,
            linewidth=1.2,
            label=clean(model["name"]),
        )
    for name, bits in quality.items():
        axes.annotate(clean(name, 28), (bits, 1), xycoords=("data", "axes fraction"), rotation=30, fontsize=7, color=MUTED)
    axes.invert_xaxis()
    axes.set(xlabel=f"bits a byte of {Path(config.text).name} (better to the right)", ylabel="calibrated alignment")
    figure.legend(loc="outside lower center", ncols=2)
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

    figure = blank(1 + 3.6 * len(result["vision"]), 0.8 + 2.7 * len(runs))
    grid: Any = figure.subplots(len(runs), len(result["vision"]), squeeze=False, sharey=True)
    held = {(one["language"], one["vision"]): one for one in result["alignment"]}
    layers = list(dict.fromkeys(layer for kept in runs.values() for layer in kept[0]["layers"]))  # a run may have more of them
    lines: dict[str, Any] = {}
    for line, (run, kept) in zip(grid, runs.items(), strict=True):
        steps = [model["step"] for model in kept]
        for panel, right in zip(line, result["vision"], strict=True):
            names = [f"{model['name']} | {right['name']} | score" for model in kept]
            bests = np.array([scores[name].max(axis=1) for name in names])
            for layer, values in zip(kept[0]["layers"], bests.T, strict=True):
                colour = colormaps["viridis"](layers.index(layer) / max(1, len(layers) - 1) * 0.9)
                (lines[f"layer {layer}"],) = panel.plot(steps, values, color=colour, linewidth=1.1)
            ones = [held[model["name"], right["name"]] for model in kept]
            low, high = np.array([one["interval"] for one in ones]).T
            (best,) = panel.plot(steps, [one["score"] for one in ones], "o", color=INK, markersize=3)
            panel.fill_between(steps, low, high, color=INK, alpha=0.1, linewidth=0)
            (chance,) = panel.plot(steps, [one["critical"] for one in ones], color=MUTED, linestyle=":")
            panel.set_title(f"{clean(run, 32)} × {clean(right['name'], 26)}", fontsize=8)
            panel.set_xlabel("optimiser step")
        line[0].set_ylabel(config.metric)
    lines |= {"best layer, 95 % interval": best, f"chance: {_share(config)} of bests stay below": chance}
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=min(5, 1 + len(result["vision"])))
    title = "Alignment during training: each layer of the language model with the vision layer that it is most aligned with."
    return Figure("dynamics", title, "Scores of layers over steps; they stand in scores.safetensors.", figure)
