"""The report of language models: means, paired tests against the row without the term, curves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from scipy import stats

from crossalign.core.errors import UserError
from crossalign.report import report, summary_table
from crossalign.report.blocks import Figure, Figures, Findings, Table
from crossalign.report.pages import study_page
from crossalign.report.render.markdown import markdown
from crossalign.results.contrasts import contrasts
from crossalign.results.frame import Results
from crossalign.results.outcomes import HELD_OUT
from crossalign.results.questions import CONTROLS, text_pairs
from crossalign.results.rows import NO_IMAGES
from crossalign.runs.records import open_study
from crossalign.stats import holm

LOSSES = {"none": [4.00, 4.10, 4.05, 4.02], "cka": [3.95, 4.04, 4.01, 3.96], "l2": [4.01, 4.09, 4.06, 4.00]}


def make_run(folder: Path, align: str, seed: int, loss: float, complete: bool = True, **more: str) -> None:
    folder.mkdir(parents=True)
    row = "Pre-training" + ("" if align == "none" else f" + {align}")
    row += "".join(f" ({value.partition(':')[0]})" for value in more.values())
    config = {"output": str(folder), "seed": seed, "row": row, "block": 64, "gpt": {"layers": 2}, "align": {"metric": align}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "environment.json").write_text(json.dumps({"cpu": "some CPU", "command": f"crossalign pretrain --seed {seed}"}))
    rows: list[dict[str, Any]] = []
    for step in (100, 200, 300):
        held = {"loss": loss + 1 / step, "perplexity": np.exp(loss), HELD_OUT: step / 1000, "held_out_directions": 9.0}
        rows.append({"stage": "train", "split": "validation", "epoch": step // 100, "step": step, **held})
        if align != "none":
            rows.append({"stage": "train", "split": "extra", "epoch": 1, "step": step, "score": 0.5, "null_score": 0.1})
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    if not complete:
        return
    result = {
        "verb": "pretrain",
        "row": row,
        "seed": seed,
        "align": align,
        "method": "pretrain",
        "weights": "random",
        "backbone": "gpt2-2x32",
        **more,
        "data": "some novels",
        "data_fingerprint": "f",
        "test": None,
        "tokens": 1_000_000,
        "scores": {"validation": {"loss": loss, "perplexity": float(np.exp(loss)), "bits_per_byte": loss / 3}},
        "held_out": {HELD_OUT: 0.1 + seed / 100, "held_out_directions": 9.0},
        "parameters": {"trainable": 5000, "total": 5000},
        "seconds": {"train": 60.0},
        "tokens_per_second": 5000.0,
        "peak_memory_bytes": 10**9,
        "precision": "fp32",
        "device": "cpu",
    }
    (folder / "result.json").write_text(json.dumps(result))


def asked(folder: Path) -> tuple[list[Any], dict[str, str]]:
    """The contrasts that a report makes of runs, and the metric of each row."""
    results = Results(open_study([folder]))
    return list(contrasts(results, text_pairs(results)).itertuples()), {row.label: row.align for row in results.row.values()}


def blocks_of(folder: Path, kind: type) -> list[Any]:
    return [block for block in study_page(open_study([folder])).of("markdown") if isinstance(block, kind)]


def figures_of(folder: Path) -> dict[str, Figure]:
    """The page's figures by name."""
    return {figure.name: figure for group in blocks_of(folder, Figures) for figure in group.figures}


@pytest.fixture
def study(tmp_path: Path) -> Path:
    for align, losses in LOSSES.items():
        for seed, loss in enumerate(losses):
            make_run(tmp_path / "study" / align / f"seed-{seed}", align, seed, loss)
    return tmp_path / "study"


def test_comparisons_are_paired_t_tests_with_holms_correction(study: Path) -> None:
    tests, align = asked(study)
    losses = {align[one.other]: one for one in tests if one.question == "predicts"}
    assert losses.keys() == {"cka", "l2"}
    expected = {name: stats.ttest_rel(LOSSES[name], LOSSES["none"]) for name in losses}
    for name, one in losses.items():
        assert one.t.difference == pytest.approx(np.mean(LOSSES[name]) - np.mean(LOSSES["none"]))
        assert one.t.p_value == pytest.approx(expected[name].pvalue)
    assert losses["cka"].p_holm == pytest.approx(2 * expected["cka"].pvalue)
    assert losses["l2"].p_holm == pytest.approx(max(expected["l2"].pvalue, losses["cka"].p_holm or 0.0))


def test_a_row_with_images_is_compared_with_each_control(study: Path) -> None:
    for seed, loss in enumerate([4.02, 4.05, 4.06, 4.03]):
        make_run(study / "unpaired" / f"seed-{seed}", "cka", seed, loss, mode="unpaired")
        make_run(study / "random" / f"seed-{seed}", "cka", seed, loss + 0.01, teacher="random:package:efficientnet_lite0")
    tests, _ = asked(study)
    controls = [one for one in tests if one.question == "controls"]
    labels = {one.reference for one in controls}
    assert len(controls) == len(labels) == 3 and {one.other for one in controls} == {"Pre-training + cka"}
    unpaired = next(one for one in controls if "unpaired" in one.reference)
    expected = stats.ttest_rel(LOSSES["cka"], [4.02, 4.05, 4.06, 4.03])
    assert unpaired.t.p_value == pytest.approx(expected.pvalue) and unpaired.t.difference < 0
    assert [one.p_holm for one in controls] == holm([one.t.p_value for one in controls])  # a family of their own
    assert sum(one.question == "aligns" for one in tests) == 4
    ((_, controlled, _),) = (findings.questions for findings in blocks_of(study, Findings))
    assert controlled[0] == CONTROLS.title and "“Pre-training + cka” against “Pre-training + cka (unpaired)”" in str(controlled)


def test_rows_that_differ_in_more_than_the_term_are_in_no_family(study: Path) -> None:
    for path in (study / "l2").rglob("config.yaml"):
        path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"block": 128}))
    tests, align = asked(study)
    assert {(one.question, align[one.other]) for one in tests if one.verdict == "apart"} == {
        *(("predicts", "l2"), ("aligns", "l2"), ("controls", "cka")),
    }
    assert all(one.also == ("block",) and one.p_holm is None for one in tests if one.verdict == "apart")
    assert all(one.p_holm == one.p for one in tests if one.verdict != "apart")  # of each question one is left
    (apart,) = [table for table in blocks_of(study, Table) if table.title == "Rows that differ in more than what is asked"]
    assert len(apart.rows) == 3 and {line[2] for line in apart.rows} == {"block"}


def test_data_of_another_fingerprint_and_another_vision_model_are_not_paired(study: Path) -> None:
    """One name may stand for other data: the fingerprint tells."""
    for seed in range(4):
        for row, change in (("l2", {"data_fingerprint": "g"}), ("cka", {"teacher": "package:other"})):
            path = study / row / f"seed-{seed}" / "result.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | change))
    tests, align = asked(study)
    reasons = {(one.question, align[one.other]): one.reason for one in tests}
    assert reasons["predicts", "l2"] == "different data or another tokenizer" and reasons["predicts", "cka"] == ""
    assert reasons["aligns", "cka"] == "alignment with another vision model"
    assert "not compared, different data or another tokenizer" in str(blocks_of(study, Findings))
    assert "not paired: alignment with another vision model" in str(blocks_of(study, Table))


def test_terms_without_images_are_named() -> None:
    from crossalign.alignment import penalties
    from crossalign.features.regularizer import WEIGHT_PENALTIES

    assert set(NO_IMAGES) == {"captions", *penalties, *WEIGHT_PENALTIES}


def test_the_table_holds_means_and_errors_over_seeds(study: Path) -> None:
    table = blocks_of(study, Table)[0]
    baseline = next(row for row in table.rows if row[0] == "Pre-training")
    perplexities = np.exp(LOSSES["none"])
    assert baseline[1] == f"{perplexities.mean():.2f} ± {perplexities.std(ddof=1) / 2:.2f}"
    assert baseline[-1] == "4"


def test_the_page_and_the_markdown_say_the_same_and_print_null_results(study: Path, tmp_path: Path) -> None:
    page = report([study], html=tmp_path / "page.html", markdown=tmp_path / "tables.md").read_text()
    text = (tmp_path / "tables.md").read_text()
    for said in ("no difference could be shown", "): shown to be better. ", "Alignment of held-out pairs over steps"):
        assert said in page and said in text
    assert "confusion" not in page.lower() and "test images" not in text
    figures = {path.stem for path in (tmp_path / "tables-figures").iterdir()}
    assert figures == {"differences", "curves-loss", "curves-aligned", "curves-score"}
    assert "Pre-training + cka" in summary_table([study])


def test_scores_of_one_kind_share_an_axis_and_a_limited_curve_says_so(study: Path) -> None:
    """A penalty is in a unit of its own; and the loss of a part of the text is not that of the table."""
    figures = figures_of(study)
    (axes,) = figures["curves-score"].figure.axes
    assert axes.get_legend_handles_labels()[1] == ["Pre-training + cka"]
    assert "table of results" not in figures["curves-score"].alt
    assert "end values are in the table of results" in figures["curves-loss"].alt
    for file in study.rglob("config.yaml"):
        file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | {"loop": {"evaluate_blocks": 128}}))
    figures = figures_of(study)
    assert "of the first 128 sequences" in figures["curves-loss"].title
    assert "end values" not in figures["curves-loss"].alt


def test_models_stand_apart_each_with_its_own_correction(study: Path, tmp_path: Path) -> None:
    for align, losses in LOSSES.items():
        for seed, loss in enumerate(losses):
            make_run(study / "larger" / align / f"seed-{seed}", align, seed, loss - 0.2, backbone="gpt2-4x64")
    tests, align = asked(study)
    assert [table.title.split(",")[0] for table in blocks_of(study, Table)[:2]] == ["Results: gpt2-2x32", "Results: gpt2-4x64"]
    assert all(("gpt2-4x64" in one.other) == ("gpt2-4x64" in one.reference) for one in tests)
    losses = [one for one in tests if one.question == "predicts" and align[one.other] == "cka"]
    assert len(losses) == 2 and all(one.p_holm == pytest.approx(2 * (one.t.p_value or 0)) for one in losses)
    assert set(figures_of(study)) >= {"differences-1", "differences-2", "curves-loss-2"}
    report([study], html=tmp_path / "page.html", markdown=tmp_path / "tables.md")
    assert "## Results: gpt2-4x64" in (tmp_path / "tables.md").read_text()
    assert summary_table([study]).count("Results: ") == 2


def test_runs_that_are_not_whole_are_listed_apart(study: Path, tmp_path: Path) -> None:
    make_run(study / "cka" / "seed-9", "cka", 9, 3.0, complete=False)
    tests, _ = asked(study)
    assert len(open_study([study]).incomplete) == 1
    assert all(one.t.n == 4 for one in tests)
    report([study], html=tmp_path / "page.html")


def test_one_seed_gives_no_p_value(tmp_path: Path) -> None:
    for align in ("none", "cka"):
        make_run(tmp_path / align, align, 0, LOSSES[align][0])
    tests, _ = asked(tmp_path)
    assert all(one.t.p_value is None for one in tests)
    report([tmp_path], html=tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "Nothing is known of the chance of" in page and "no difference;" not in page and "none shows" not in page
    text = markdown(study_page(open_study([tmp_path])))
    assert "2 rows of one seed: differences are shown, of chance nothing can be said." in text
    assert "| −0.0500 |" in text and "A difference without ± is of one seed, and nothing is known of its chance." in text
    assert "no difference is stated" not in text and "Bold" not in text and "test images" not in text


def test_rows_of_other_seeds_are_not_said_to_be_of_one(tmp_path: Path) -> None:
    for seed, align in enumerate(("none", "cka")):
        for more in (0, 2):
            make_run(tmp_path / align / f"{seed + more}", align, seed + more, 4.0)
    text = markdown(study_page(open_study([tmp_path])))
    assert "4 runs of 2 rows, of which none could be compared." in text and "of one seed" not in text
    assert "The one comparison could not be made." in text and "not compared, different seeds: 1, 3 here, 0, 2 there" in text


def test_classifiers_and_language_models_are_reported_apart(study: Path, new_run: Callable[..., Path], tmp_path: Path) -> None:
    images = new_run(tmp_path / "images")
    with pytest.raises(UserError, match="report each kind apart"):
        study_page(open_study([study, images]))


def test_one_point_is_no_curve(study: Path) -> None:
    for file in study.rglob("metrics.jsonl"):
        rows = [row for row in map(json.loads, file.read_text().splitlines()) if row["split"] == "extra" or row["step"] == 300]
        file.write_text("\n".join(map(json.dumps, rows)) + "\n")
    names = set(figures_of(study))
    assert "curves-score" in names and not names & {"curves-loss", "curves-aligned"}
