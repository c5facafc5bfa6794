"""Run folders as they lie on disk, whole and damaged, and how they become rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from crossalign.core.errors import UserError
from crossalign.report.blocks import Findings, Table
from crossalign.report.pages import study_page
from crossalign.report.render.html import html
from crossalign.results.contrasts import Pair, contrasts
from crossalign.results.frame import Results
from crossalign.results.questions import image_pairs
from crossalign.results.rows import baseline, best, group_rows, warnings
from crossalign.runs.records import open_study
from crossalign.stats import holm
from crossalign.verbs.compare.job import compare

Maker = Callable[..., Path]


def asked(folder: Path) -> list[Any]:
    """The contrasts that a report makes of runs, with their numbers."""
    results = Results(open_study([folder]))
    return list(contrasts(results, image_pairs(results)).itertuples())


def mask(right: int, images: int = 100) -> np.ndarray:
    return np.arange(images) < right


def test_a_study_is_found_at_any_depth(study_folder: Path) -> None:
    study = open_study([study_folder.parent])
    assert study.title == "CIFAR-10 with stories260K"
    assert (len(study.complete), len(study.incomplete)) == (42, 1)
    rows, notes = group_rows(study)
    assert [row.label for row in rows] == study.rows
    assert not notes
    assert {row.seeds for row in rows} == {(0, 1, 2)}


def test_several_studies_keep_their_titles_and_settings_apart(tmp_path: Path, new_run: Maker) -> None:
    for name, title in {"novels": "Pre-training", "alpaca": "Fine-tuning", "more": "Fine-tuning"}.items():
        new_run(tmp_path / name / "a")
        (tmp_path / name / "study.json").write_text(json.dumps({"title": title, "note": f"Settings of {name}"}))
    one, all_three = open_study([tmp_path / "novels"]), open_study([tmp_path / name for name in ("novels", "alpaca", "more")])
    assert (one.title, one.note) == ("Pre-training", "Settings of novels")
    assert all_three.title == "Pre-training; Fine-tuning"
    assert all_three.note.splitlines() == ["novels: Settings of novels", "alpaca: Settings of alpaca", "more: Settings of more"]


def test_a_run_named_twice_counts_once(tmp_path: Path, new_run: Maker) -> None:
    folder = new_run(tmp_path / "a")
    assert len(open_study([folder, tmp_path]).runs) == 1


def test_checkpoints_and_sweeps_are_no_runs(tmp_path: Path, new_run: Maker) -> None:
    new_run(tmp_path / "a")
    new_run(tmp_path / "a" / "checkpoints" / "copy")
    new_run(tmp_path / "sweep" / "b", seed=1)
    assert [run.folder.name for run in open_study([tmp_path]).runs] == ["a"]
    assert [run.folder.name for run in open_study([tmp_path / "sweep"]).runs] == ["b"]


def test_no_run_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run in"):
        open_study([tmp_path])
    with pytest.raises(UserError, match="no run folder at"):
        open_study([tmp_path / "absent"])
    with pytest.raises(UserError, match="at least one"):
        open_study([])


@pytest.mark.parametrize("content", ['{"row": "FPT"', "[1]", "", "\xff"])
def test_a_damaged_result_is_named(tmp_path: Path, new_run: Maker, content: str) -> None:
    folder = new_run(tmp_path / "a")
    (folder / "result.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=r"result\.json"):
        open_study([folder])


@pytest.mark.parametrize(("key", "wanted"), [("row", "row"), ("seed", "seed"), ("test", "test")])
def test_a_result_that_lacks_a_key_is_named(tmp_path: Path, new_run: Maker, key: str, wanted: str) -> None:
    path = new_run(tmp_path / "a") / "result.json"
    held = json.loads(path.read_text())
    del held[key]
    path.write_text(json.dumps(held))
    with pytest.raises(UserError, match=f"'{wanted}'"):
        open_study([tmp_path])


def put(value: Any, path: tuple[Any, ...], entry: Any) -> Any:
    """``value`` with an entry of it replaced."""
    if not path:
        return entry
    copy = value.copy()
    copy[path[0]] = put(value[path[0]], path[1:], entry)
    return copy


@pytest.mark.parametrize(
    ("path", "entry"),
    [
        ((), {}), ((), []), ((), 5), (("test",), float("nan")), (("test",), 0.5), (("test", "accuracy"), 5),
        (("test", "accuracy"), 1e308), (("test", "accuracy"), float("nan")), (("test", "n"), -1), (("test", "n"), 10**400),
        (("test", "confusion"), 3), (("test", "confusion"), [["x"]]), (("validation",), "x"), (("validation", "loss"), 1e308),
        (("seed",), True), (("seed",), None), (("seed",), -1), (("row",), "\ud800"), (("row",), None), (("classes",), {}),
        (("parameters", "groups"), [1]), (("seconds", "train"), "x"), (("learning_rate",), {}), (("outcomes",), 5),
        (("outcomes",), [{"name": "accuracy", "share": True, "value": 5}]), (("alignment",), 3),
    ],
    ids=str,
)  # fmt: skip
def test_a_bad_run_is_left_out_with_a_note_and_the_page_stands(
    tmp_path: Path, new_run: Maker, path: tuple[str, ...], entry: Any
) -> None:
    for row, align in (("FPT", "none"), ("FPT + MMD", "mmd")):
        for seed in range(2):
            new_run(tmp_path / align / f"{seed}", row, align=align, seed=seed, images=40)
    file = tmp_path / "mmd" / "1" / "result.json"
    result = json.loads(file.read_text()) | {"outcomes": []} if path == ("outcomes",) else json.loads(file.read_text())
    file.write_text(json.dumps(put(result, path, entry)))
    compared = compare([tmp_path], resamples=200)
    pages = ["\n".join(compared.notes), html(study_page(open_study([tmp_path])))]
    assert compared.results.values.run.nunique() == 3
    for page in pages:
        assert "Left out: " in page and "result.json" in page and page.encode()


@pytest.mark.parametrize(
    "row",
    [
        {"epoch": None}, {"epoch": "one"}, {"epoch": []}, {"step": {}}, {"stage": 5}, {"split": []}, {"accuracy": 1e308},
        {"accuracy": {}}, {"epoch": float("inf")}, {"note": "\ud800"},
    ],
    ids=str,
)  # fmt: skip
def test_a_bad_line_is_left_out_with_a_note(tmp_path: Path, new_run: Maker, row: dict[str, Any]) -> None:
    path = new_run(tmp_path / "a", images=40) / "metrics.jsonl"
    before = len(open_study([tmp_path]).runs[0].metrics)
    usual = {"stage": "train", "split": "validation", "epoch": 90, "step": 9000, "accuracy": 0.5}
    path.write_text(path.read_text() + json.dumps(usual | row) + "\n" + "[" * 100_000 + "\n5\n")
    study = open_study([tmp_path])
    assert len(study.runs[0].metrics) == before
    assert "3 broken lines" in str(list(study_page(study).of("markdown")))


@pytest.mark.parametrize("name", ["study.json", "sweep.json", "search.json"])
@pytest.mark.parametrize("content", ["", "5", '{"rows": 5}', '[{"row": 5}]', "[" * 100_000])
def test_what_is_damaged_beside_runs_is_left_out_with_a_note(tmp_path: Path, new_run: Maker, name: str, content: str) -> None:
    new_run(tmp_path / "a", images=40)
    (tmp_path / ("b" if name == "search.json" else "")).mkdir(exist_ok=True)
    (tmp_path / ("b" if name == "search.json" else "") / name).write_text(content)
    study = open_study([tmp_path])
    assert len(study.runs) == 1
    assert any(note.startswith("Left out: ") and name in note for note in study.notes)


def test_alignment_curves_start_before_it(tmp_path: Path, new_run: Maker) -> None:
    run = open_study([new_run(tmp_path / "a", align="mmd")]).runs[0]
    assert run.series("align", "validation", "std")[0.0] == 1.4
    assert list(run.series("align", "train", "divergence")) == [1.0, 2.0, 3.0, 4.0]


def test_another_fingerprint_is_another_test_set(tmp_path: Path, new_run: Maker) -> None:
    new_run(tmp_path / "a")
    path = new_run(tmp_path / "b", "FPT + MMD", align="mmd") / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"data_fingerprint": "other"}))
    (one,) = asked(tmp_path)
    assert one.reason == "different test images"


def test_a_broken_line_is_counted_and_a_repeated_step_replaced(tmp_path: Path, new_run: Maker) -> None:
    path = new_run(tmp_path / "a", epochs=2) / "metrics.jsonl"
    clean = open_study([tmp_path]).runs[0].series("train", "validation", "accuracy")
    row = json.loads(path.read_text().splitlines()[-1]) | {"accuracy": 0.9, "note": "a\u2028b"}
    path.write_text(path.read_text() + json.dumps(row, ensure_ascii=False) + '\n{"stage": "train", "spl')
    run = open_study([tmp_path]).runs[0]
    assert run.series("train", "validation", "accuracy") == clean | {2.0: 0.9}
    assert [note for note in run.notes if "1 broken line" in note]


def test_damaged_side_files_are_noted_and_left_out(tmp_path: Path, new_run: Maker) -> None:
    folder = new_run(tmp_path / "a")
    for name in ("predictions.parquet", "samples.parquet", "environment.json", "config.yaml"):
        (folder / name).write_text("{broken")
    study = open_study([folder])
    rows, _ = group_rows(study)
    told = "\n".join(warnings(study, rows))
    assert study.runs[0].predictions is None and study.runs[0].samples == []
    for name in ("predictions.parquet", "samples.parquet", "environment.json", "config.yaml"):
        assert name in told


@pytest.mark.parametrize(("column", "value"), [("label", None), ("predicted", "cat"), ("confidence", "high")])
def test_predictions_that_are_no_numbers_are_noted_and_left_out(
    tmp_path: Path, new_run: Maker, column: str, value: str | None
) -> None:
    path = new_run(tmp_path / "a") / "predictions.parquet"
    columns = pq.read_table(path).to_pydict()
    columns[column] = [value] * len(columns[column])
    pq.write_table(pa.table(columns), path)
    study = open_study([tmp_path])
    assert study.runs[0].predictions is None
    assert any("predictions.parquet has other values than numbers" in note for note in study.runs[0].notes)
    assert "predictions.parquet has other values" in str(list(study_page(study).of("markdown")))


def test_samples_without_a_confidence_are_left_out(tmp_path: Path, new_run: Maker) -> None:
    path = new_run(tmp_path / "a") / "samples.parquet"
    columns = pq.read_table(path).to_pydict()
    columns["confidence"][0] = None
    pq.write_table(pa.table(columns), path)
    assert len(open_study([tmp_path]).runs[0].samples) == 11


def test_predictions_that_contradict_the_result_are_told(tmp_path: Path, new_run: Maker) -> None:
    folder = new_run(tmp_path / "a", correct=mask(40), images=100)
    path = folder / "result.json"
    path.write_text(path.read_text().replace('"accuracy": 0.4,', '"accuracy": 0.8,'))
    study = open_study([folder])
    assert any("40.00 % right, result.json says 80.00" in note for note in warnings(study, group_rows(study)[0]))


def test_two_runs_of_one_seed_are_not_two_seeds(tmp_path: Path, new_run: Maker) -> None:
    new_run(tmp_path / "a")
    new_run(tmp_path / "b")
    rows, notes = group_rows(open_study([tmp_path]))
    assert len(rows) == 1 and len(rows[0].runs) == 1
    assert "seed 0" in notes[0]


def test_rows_of_one_name_are_told_apart(tmp_path: Path, new_run: Maker) -> None:
    new_run(tmp_path / "a")
    new_run(tmp_path / "b", backbone="package:minilm")
    rows, _ = group_rows(open_study([tmp_path]))
    assert [row.label for row in rows] == ["FPT, stories260K", "FPT, minilm"]
    assert [baseline(row, rows) for row in rows] == rows
    assert asked(tmp_path) == []


def test_the_best_row_is_chosen_on_validation(tmp_path: Path, new_run: Maker) -> None:
    new_run(tmp_path / "a", "test wins", correct=mask(60), images=100)
    low = new_run(tmp_path / "b", "validation wins", correct=mask(50), images=100) / "result.json"
    low.write_text(low.read_text().replace('"accuracy": 0.51', '"accuracy": 0.7'))
    assert best(group_rows(open_study([tmp_path]))[0]).label == "validation wins"


def test_a_comparison_has_the_numbers_that_went_in(tmp_path: Path, new_run: Maker) -> None:
    for seed, (plain, aligned) in enumerate([(40, 43), (42, 44), (41, 42)]):
        new_run(tmp_path / f"a{seed}", correct=mask(plain), images=100, seed=seed)
        new_run(tmp_path / f"b{seed}", "FPT + MMD", align="mmd", correct=mask(aligned), images=100, seed=seed)
    (one,) = asked(tmp_path)
    assert (one.question, one.reference, one.other) == ("alignment", "FPT", "FPT + MMD")
    assert one.t is not None and one.t.difference == pytest.approx(0.02) and one.t.sd == pytest.approx(0.01)
    assert [(test.only_a, test.only_b) for test in one.mcnemar] == [(0, 3), (0, 2), (0, 1)]
    assert one.t.p_value == pytest.approx(0.07418, abs=1e-4) and one.p_holm == one.p == one.t.p_value


def test_over_images_every_paired_seed_needs_its_predictions(tmp_path: Path, new_run: Maker) -> None:
    for seed in (0, 1, 2):
        new_run(tmp_path / f"a{seed}", correct=mask(40 + seed), images=100, seed=seed)
        folder = new_run(tmp_path / f"b{seed}", "FPT + MMD", align="mmd", correct=mask(50), images=100, seed=seed)
    (whole,) = asked(tmp_path)
    assert len(whole.mcnemar) == 3 and whole.p_mcnemar is not None
    (folder / "predictions.parquet").unlink()
    (one,) = asked(tmp_path)
    assert one.seeds == (0, 1, 2) and one.t == whole.t and one.mcnemar is None and one.p_mcnemar is None
    assert one.notes == (f"no predictions.parquet in {folder} to pair images by; only running it again makes it",)


def test_accuracies_are_those_of_the_predictions_where_there_are_any(tmp_path: Path, new_run: Maker) -> None:
    for row, align, right in (("FPT", "none", 40), ("FPT + MMD", "mmd", 45)):
        path = new_run(tmp_path / align, row, align=align, correct=mask(right), images=100) / "result.json"
        result = json.loads(path.read_text())
        result["test"]["accuracy"] += 4e-5  # as if rounded
        path.write_text(json.dumps(result))
    (one,) = asked(tmp_path)
    assert (one.reference_values, one.other_values) == ((0.4,), (0.45,))


def test_comparisons_ask_the_three_questions(study_folder: Path) -> None:
    results = Results(open_study([study_folder]))
    frame = contrasts(results, image_pairs(results))
    assert frame.question.value_counts().to_dict() == {"alignment": 6, "pretraining": 3, "backbone": 6}
    for one in frame[frame.question == "alignment"].itertuples():
        reference, other = results.row[one.reference], results.row[one.other]
        assert reference.method == other.method and reference.align == "none"


def test_different_test_images_are_never_paired(tmp_path: Path, new_run: Maker) -> None:
    new_run(tmp_path / "a", images=100)
    new_run(tmp_path / "b", "FPT + MMD", align="mmd", images=200)
    new_run(tmp_path / "c", "elsewhere", align="mse", data="another data set")
    study = open_study([tmp_path])
    rows, _ = group_rows(study)
    (one,) = asked(tmp_path)
    assert one.t is None and one.mcnemar is None and one.reason == "different test images" and one.verdict == "unpaired"
    elsewhere = Pair("alignment", "accuracy", rows[0].label, rows[-1].label, "")
    assert contrasts(Results(study), [elsewhere]).reason[0] == "different data"
    told = " ".join(warnings(study, rows))
    assert "same test images" in told and "2 data sets" in told


def test_mixed_precision_and_missing_seeds_are_warned_of(tmp_path: Path, new_run: Maker) -> None:
    new_run(tmp_path / "a", seed=0)
    new_run(tmp_path / "b", seed=1, config={"optim": {"lr": 0.1}})
    new_run(tmp_path / "c", "LoRA", method="lora", precision="bf16")
    study = open_study([tmp_path])
    told = " ".join(warnings(study, group_rows(study)[0]))
    assert "same precision: fp32 (FPT); bf16 (LoRA)" in told
    assert "“LoRA” has 0" in told
    assert "“FPT” differ in more than their seed: optim.lr" in told


def test_the_nearest_reference_is_taken_and_what_else_differs_is_told(tmp_path: Path, new_run: Maker) -> None:
    stem = {"embedder": {"kind": "conv", "patch": 4}}
    new_run(tmp_path / "a", "FPT")
    new_run(tmp_path / "b", "FPT conv", config=stem)
    new_run(tmp_path / "c", "FPT conv + MMD", align="mmd", config=stem | {"head": {"dropout": 0.5}})
    (one,) = asked(tmp_path)
    assert one.reference == "FPT conv"
    assert one.also == ("head.dropout",)
    assert (one.verdict, one.family, one.p_holm) == ("apart", "", None)


def test_a_family_holds_rows_that_differ_in_what_is_asked_alone(tmp_path: Path, new_run: Maker) -> None:
    matched = {"embedder": {"match_scale": True}}
    rows = {
        "FPT": {"right": 400, "config": {"embedder": {"match_scale": False}}},
        "FPT, input scale matched": {"right": 450, "config": matched},
        "FPT, random weights": {"right": 300, "weights": "random", "config": {"embedder": {"match_scale": False}}},
        "No backbone": {"right": 200, "method": "none", "weights": "none", "config": {"embedder": {"match_scale": False}}},
    }
    for row, told in rows.items():
        for seed, luck in enumerate((0, 11, 4)):
            right = told["right"] + luck * (1 + len(row) % 3)
            facts = {key: value for key, value in told.items() if key != "right"}
            new_run(tmp_path / row / f"{seed}", row, seed=seed, correct=mask(right, 1000), images=1000, **facts)
    tests = {(one.question, one.other): one for one in asked(tmp_path)}
    assert len(tests) == 4
    apart = tests.pop(("pretraining", "FPT, input scale matched"))
    assert apart.reference == "FPT, random weights" and apart.also == ("embedder.match_scale",)
    assert (apart.verdict, apart.p_holm, apart.p_seeds_holm, apart.p_mcnemar_holm) == ("apart", None, None, None)
    # Without a language model there is no text whose scale could be matched: that is part of what is asked.
    assert all(not one.also and one.family == "images" for one in tests.values())
    assert [one.p_seeds_holm for one in tests.values()] == holm([one.p_seeds for one in tests.values()])
    assert max(one.p_seeds_holm / one.p_seeds for one in tests.values()) == pytest.approx(3)  # a family of three
    page = study_page(open_study([tmp_path]))
    ((_, pretraining, said), _) = next(block for block in page.blocks if isinstance(block, Findings)).questions
    assert pretraining == "The one comparison shows a gain." and len(said) == 1
    tables = {block.title: block for block in page.blocks if isinstance(block, Table)}
    assert [line[0] for line in tables["Do the pretrained weights help?"].rows] == ["FPT − FPT, random weights"]
    (line,) = tables["Rows that differ in more than what is asked"].rows
    assert line[:3] == [
        "FPT, input scale matched − FPT, random weights",
        "Do the pretrained weights help?",
        "embedder.match_scale",
    ]
    assert any("over all 3 comparisons" in note for note in tables["Does the language model help at all?"].notes)
