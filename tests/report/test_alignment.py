"""Figures and table of a measurement, from numbers that are known: whatever models are called, and whatever they score."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from crossalign.config import MeasureConfig

pytest.importorskip("matplotlib", reason="needs matplotlib")

from crossalign.report.blocks import Figure
from crossalign.report.figures.drawing import png, styled
from crossalign.report.figures.measure import against_chance, dynamics_figure, heat_maps, quality_figure
from crossalign.verbs.measure.page import summary_table

Result = tuple[dict[str, Any], dict[str, NDArray[np.float32]]]


def model(name: str, ref: str = "", layers: int = 2, **more: Any) -> dict[str, Any]:
    return {"name": name, "ref": ref or name, "layers": [str(i) for i in range(layers)], **more}


def measured(language: list[dict[str, Any]], vision: list[dict[str, Any]], shift: float = 0.0) -> Result:
    """What measure finds of models: scores from 0 to 1, all moved by ``shift``."""
    found, arrays = [], {}
    draw = np.random.default_rng(0)
    for left in language:
        for right in vision:
            scores = draw.random((len(left["layers"]), len(right["layers"])), dtype=np.float32) + np.float32(shift)
            arrays[f"{left['name']} | {right['name']} | score"] = scores
            best = float(scores.max())
            row, column = divmod(int(scores.argmax()), scores.shape[1])
            numbers = {"score": best, "interval": [best - 0.1, best + 0.1], "null_mean": shift, "critical": shift + 0.1}
            numbers |= {"calibrated": 0.2, "calibrated_interval": [0.1, 0.3], "p": 0.01}
            layers = {"language_layer": left["layers"][row], "vision_layer": right["layers"][column]}
            found.append({"language": left["name"], "vision": right["name"], **layers, **numbers})
    return {"pairs": "some", "n": 9, "language": language, "vision": vision, "alignment": found}, arrays


def drawn(picture: Figure | None) -> Any:
    """The figure, once it has been written as a file."""
    assert picture is not None and png(picture)
    return picture.figure


def legend(figure: Any) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_scores_below_zero_have_colours_too() -> None:
    result, scores = measured([model("a")], [model("b")], shift=-3.0)
    with styled():
        figure = drawn(heat_maps(MeasureConfig(), result, scores))
    values = scores["a | b | score"]
    assert figure.axes[0].images[0].get_clim() == pytest.approx((float(values.min()), float(values.max())))


def test_a_control_is_one_whatever_it_is_called() -> None:
    """Two models of one name are called by their whole references, and their twins are, too."""
    twins = [model("runs/a/gpt"), model("random:runs/a/gpt"), model("runs/b/gpt"), model("random:runs/b/gpt")]
    language = [{**one, "bits_per_byte": 2.0 + place} for place, one in enumerate(twins)]
    result, _ = measured(language, [model("vit", "timm:vit"), model("shuffled vit", "shuffled:timm:vit")])
    with styled():
        figure = drawn(against_chance(MeasureConfig(), result))
        assert set(legend(figure)) == {"both trained", "one is a control", "both are controls"}
        lines = drawn(quality_figure(MeasureConfig(text="a.txt"), result)).axes[0].containers
    assert [line.lines[0].get_linestyle() for line in lines] == ["-", "--"]


def test_what_a_figure_has_no_room_for_is_said_and_no_twin_stands_alone() -> None:
    names = [f"m{i}" for i in range(4)]
    language = [model("first"), *(one for name in names for one in (model(name), model(f"random {name}", f"random:{name}")))]
    result, scores = measured([*language, model("last")], [model("b")])
    with styled():
        for picture in (heat_maps(MeasureConfig(), result, scores), against_chance(MeasureConfig(), result)):
            assert picture.title.endswith("The last 7 of 10 language models.")
        rows = drawn(heat_maps(MeasureConfig(), result, scores)).axes[:-1]
        few, some = measured(language[:2], [model("b")])
        assert "language models." not in heat_maps(MeasureConfig(), few, some).title
    assert [axes.get_ylabel() for axes in rows] == [
        *(one for name in names[1:] for one in (name, f"random {name}")),
        "last",
    ]


def test_all_twins_after_all_models_stay_with_them() -> None:
    names = [f"m{i}" for i in range(9)]
    language = [*map(model, names), *(model(f"random {name}", f"random:{name}") for name in names)]
    result, scores = measured(language, [model("b")])
    with styled():
        rows = drawn(heat_maps(MeasureConfig(), result, scores)).axes[:-1]
    assert [axes.get_ylabel() for axes in rows] == [*names[5:], *(f"random {name}" for name in names[5:])]


@pytest.mark.parametrize(("level", "share"), [(0.05, "95%"), (0.001, "99.9%")])
def test_the_share_of_bests_is_told_as_it_is(level: float, share: str) -> None:
    config = MeasureConfig(level=level)
    result, _ = measured([model("a")], [model("b")])
    table = summary_table(config, result)
    assert f"{share} of bests" in table.columns and f"in {share} of the permutations" in table.notes[0]
    with styled():
        assert f"in {share} of the permutations" in against_chance(config, result).title


def test_each_run_has_a_panel_and_each_layer_a_colour() -> None:
    """Runs of several depths; a legend that names every layer of the deepest."""
    language = [
        model(f"{run}, step {step}", layers=layers, run=run, step=step)
        for run, layers in (("plain/seed-0", 2), ("cka/seed-0", 4))
        for step in (0, 5, 9)
    ]
    with styled():
        figure = drawn(dynamics_figure(MeasureConfig(), *measured(language, [model("b")])))
    assert [axes.get_title() or axes.get_title("left") for axes in figure.axes] == ["plain/seed-0 × b", "cka/seed-0 × b"]
    found = ["layer 0", "layer 1", "layer 2", "layer 3", "best layer, 95 % interval", "chance: 95% of bests stay below"]
    assert legend(figure) == found
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.x1  # all of it is on the page
    shallow, deep = (axes.lines for axes in figure.axes)
    assert len(shallow) == 4 and len(deep) == 6 and all(list(line.get_xdata()) == [0, 5, 9] for line in (*shallow, *deep))
    assert [line.get_color() for line in shallow[:2]] == [line.get_color() for line in deep[:2]]
