"""The page of a measurement: which layers are aligned, is it more than chance, and what goes with it."""

from pathlib import Path
from typing import Any

from crossalign.config import MeasureConfig
from crossalign.report.blocks import Figures, Page, Prose, Table
from crossalign.report.figures.measure import Scores, measure_figures, share
from crossalign.report.render.markdown import write_markdown


def write_page(folder: Path, config: MeasureConfig, result: dict[str, Any], scores: Scores) -> None:
    """Write measure.md, a page for a repository, and its figures as PNG into the folder figures.

    Args:
        result: what measure.json holds.
        scores: for each ``"LANGUAGE | VISION | score"`` (layers of the one, layers of the other).
    """
    basis = (
        f"{config.metric} on {result['n']:,} pairs ({result['pairs']}); {config.permutations:,} permutations, "
        f"{config.groups} jackknife groups, seed {config.seed}."
    )
    figures = Figures(tuple(measure_figures(config, result, scores)), "Figures")
    blocks = Prose((basis,)), summary_table(config, result), figures
    page = Page("Alignment of language and vision models", blocks)
    write_markdown(page, folder / "measure.md", folder / "figures", dpi=130)


def summary_table(config: MeasureConfig, result: dict[str, Any]) -> Table:
    """A row for each pair of models: the best of all layers, and what chance gives for the best of all layers."""
    lines = []
    for pair in result["alignment"]:
        (low, high), (least, most) = pair["interval"], pair["calibrated_interval"]
        lines.append(
            {
                "Language model": pair["language"],
                "Vision model": pair["vision"],
                "Layers": f"{pair['language_layer']} × {pair['vision_layer']}",
                "Score [95 % interval]": f"{pair['score']:.3f} [{low:.3f}, {high:.3f}]",
                "Chance: mean": f"{pair['null_mean']:.3f}",
                f"{share(config)} of bests": f"{pair['critical']:.3f}",
                "Calibrated [interval]": f"{pair['calibrated']:.3f} [{least:.3f}, {most:.3f}]",
                "p": f"{pair['p']:.2g}",
            }
        )
    notes = [
        "Score: the best of all layers. Chance: the best of all layers with the images in random order, its mean and what it "
        f"stays under in {share(config)} of the permutations. Calibrated: 0 at that value, 1 at the largest "
        "possible score (Gröger, Wen and Brbić 2026). p: corrected for taking the best of all layers, not for the "
        "number of pairs of models. Intervals: jackknife over groups of pairs, the best layers chosen anew in each. Bold: more "
        "than chance.",
    ]
    strong = [i for i, pair in enumerate(result["alignment"]) if pair["p"] <= config.level]
    return Table.of("Best of all layers", lines, notes, ["Vision model", "Layers"], strong)
