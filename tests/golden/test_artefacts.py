"""What version 0.1.0 left on users' disks opens, goes on and answers the same: see make_artefacts.py and stored.py."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from stored import (
    CLASSIFIERS,
    CONTINUED,
    EVALUATE,
    FEATURES,
    FOLDER,
    MEASURE,
    PREPARE,
    SEARCH,
    SELF_CONTAINED,
    STUDY,
    answers,
    language_logits,
    plain_result,
    unpack,
)

from crossalign import UserError, cli

Run = Callable[..., str]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked archives, which no test changes."""
    folder = tmp_path_factory.mktemp("artefacts")
    unpack(folder)
    return folder


@pytest.fixture(autouse=True)
def _in_a_copy(unpacked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of the archives' content is the current folder."""
    shutil.copytree(unpacked, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    """What the archives must answer."""
    return read_json(FOLDER / "expected.json")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """``run(*arguments, code=0)``: what the command prints, errors after output."""

    def call(*arguments: str, code: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["crossalign", *arguments])
        capsys.readouterr()
        ended = cli.main(list(arguments))
        output, errors = capsys.readouterr()
        assert ended == code, errors
        return output + errors

    return call


def files(*folders: str | Path) -> dict[Path, tuple[int, bytes]]:
    """Times of change and content of all files that say what was computed."""
    own = (".lock", "environment.json", "report.html")
    paths = (path for folder in folders for path in Path(folder).rglob("*") if path.is_file() and path.name not in own)
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}


def read_json(file: str | Path) -> dict[str, Any]:
    return json.loads(Path(file).read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def close(value: Any, wanted: Any, tolerance: float = 1e-4) -> bool:
    """Whether a plain value is the wanted one: numbers within a tolerance, and what a later version has beside it left out."""
    if isinstance(wanted, dict):
        return value.keys() >= wanted.keys() and all(close(value[key], wanted[key], tolerance) for key in wanted)
    if isinstance(wanted, list):
        return len(value) == len(wanted) and all(close(a, b, tolerance) for a, b in zip(value, wanted, strict=True))
    if isinstance(wanted, float):
        return bool(value == pytest.approx(wanted, rel=tolerance, abs=tolerance))
    return bool(value == wanted)


def check_answers(given: list[dict[str, float]], wanted: list[dict[str, float]]) -> None:
    assert [next(iter(classes)) for classes in given] == [next(iter(classes)) for classes in wanted]
    assert close(given, wanted, 1e-5)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_saved_classifier_answers_the_same(expected: dict[str, Any], run: Run, name: str) -> None:
    wanted = expected["classifiers"][name]
    check_answers(answers(f"runs/{name}/model"), wanted)
    shutil.move("llama", "moved")
    shutil.move(f"runs/{name}/model", "elsewhere")
    call = ["predict", "elsewhere", "images", "--device", "cpu"]
    if name not in SELF_CONTAINED:
        with pytest.raises(UserError, match="name where it lies now with --backbone"):
            answers("elsewhere")
        assert "--backbone" in run(*call, code=2)
        check_answers(answers("elsewhere", backbone="moved"), wanted)
        call += ["--backbone", "moved"]
    lines = [json.loads(line) for line in run(*call).splitlines()]
    assert [line["label"] for line in lines] == [next(iter(classes)) for classes in wanted]


def test_finished_runs_are_returned_as_they_are(expected: dict[str, Any], run: Run) -> None:
    before = files("runs")
    for verb, name in (*(("adapt", name) for name in CLASSIFIERS), ("pretrain", "pretrain"), ("finetune", "finetune")):
        assert f"runs/{name}" in run(verb, "--config", f"runs/{name}/config.yaml")
        assert close(plain_result(Path("runs") / name), expected["results"][f"runs/{name}" if verb == "adapt" else name])
    assert files("runs") == before
    assert "trainable parameters   554" in run("plan", "--config", "runs/fpt/config.yaml")


@pytest.mark.parametrize("name", CONTINUED)
def test_an_unfinished_run_goes_on_to_what_a_whole_one_gives(expected: dict[str, Any], run: Run, name: str) -> None:
    folder, (verb, *settings) = Path("unfinished") / name, CONTINUED[name]
    recipe = settings[:1] if not settings[0].startswith("-") else []
    rows = (folder / "metrics.jsonl").read_bytes()
    run(verb, *recipe, "--config", str(folder / "config.yaml"))
    assert (folder / "metrics.jsonl").read_bytes().startswith(rows), "it began anew"
    run(verb, *settings, "--output", "whole")
    assert close(plain_result(folder), plain_result(Path("whole")))  # the first part was trained on another processor
    assert close(plain_result(folder), expected["results"][name])
    weights = sorted(folder.glob("model/*.safetensors"))
    assert weights
    for file in weights:
        torch.testing.assert_close(load_file(file), load_file(Path("whole/model") / file.name), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["pretrain", "finetune"])
def test_a_language_model_and_an_adapter_give_the_same_logits(expected: dict[str, Any], name: str) -> None:
    assert close(language_logits(f"runs/{name}/model"), expected["logits"][name])


def test_what_was_evaluated_is_not_scored_again_and_scores_the_same(expected: dict[str, Any], run: Run) -> None:
    stored = Path("runs/finetune/evaluation")
    before = files(stored / "samples", stored / "outputs")
    run(*EVALUATE)
    assert files(stored / "samples", stored / "outputs") == before
    assert close(read_json(stored / "results.json")["tasks"], expected["evaluation"])
    run(*EVALUATE, "--output", "anew")
    assert close(read_json("anew/results.json")["tasks"]["copa"]["metrics"], expected["evaluation"]["copa"]["metrics"])
    samples = [pq.read_table(folder / "samples/copa.parquet").to_pylist() for folder in (Path("anew"), stored)]
    assert close(*samples)
    assert "COPA" in run("compare", "runs/finetune", "runs/pretrain", "--resamples", "200")


def test_features_are_found_again_and_computed_the_same(run: Run) -> None:
    file, again = Path("features.safetensors"), "again.safetensors"
    before = file.read_bytes(), file.stat().st_mtime_ns
    run(*FEATURES)
    assert (file.read_bytes(), file.stat().st_mtime_ns) == before
    run(*FEATURES, "--output", again)
    torch.testing.assert_close(load_file(again), load_file(file), rtol=1e-5, atol=1e-5)
    with safe_open(file, "pt") as stored, safe_open(again, "pt") as new:
        assert stored.metadata() == new.metadata()


def test_token_files_are_found_again_and_made_the_same(run: Run) -> None:
    before = files("corpus")
    run(*PREPARE)
    assert files("corpus") == before
    run(*PREPARE, "--output", "again")
    again = {path.relative_to("again"): content for path, (_, content) in files("again").items()}
    assert again == {path.relative_to("corpus"): content for path, (_, content) in before.items()}


def test_a_measurement_is_made_again_in_its_folder(expected: dict[str, Any], run: Run) -> None:
    assert "choose another --output" in run(*MEASURE, "--groups", "4", code=2)
    assert "pretrain, step 6 × features.safetensors" in run(*MEASURE)
    assert close(read_json("measured/measure.json"), expected["measure"])
    scores = {name: values.tolist() for name, values in load_file("measured/scores.safetensors").items()}
    assert close(scores, expected["scores"])


@pytest.mark.timeout(300)  # its worker is a process that imports everything again
def test_a_search_that_was_cut_off_goes_on_to_the_same(run: Run) -> None:
    cut, whole = Path("searches/cut"), Path("searches/whole")
    begun = read_json(cut / "search.json")["trials"]
    run(*SEARCH, "--output", str(cut))
    records = [read_json(folder / "search.json") for folder in (cut, whole)]
    trials = [
        [{**trial, "rungs": [{**rung, "seconds": 0} for rung in trial["rungs"]]} for trial in record["trials"]]
        for record in records
    ]
    assert close(*trials) and records[0]["winner"] == records[1]["winner"]
    seconds = [trial["rungs"][0]["seconds"] for trial in records[0]["trials"]]
    assert seconds[: len(begun) - 1] == [trial["rungs"][0]["seconds"] for trial in begun[:-1]], "it began anew"
    assert close(*(plain_result(folder / "winner" / "seed-1") for folder in (cut, whole)))


def test_a_finished_search_is_returned_and_read(run: Run) -> None:
    before, record = files("searches/whole/trials", "searches/whole/winner"), Path("searches/whole/search.json")
    trials = read_json(record)["trials"]
    output = run(*SEARCH, "--output", "searches/whole")
    assert files("searches/whole/trials", "searches/whole/winner") == before
    assert read_json(record)["trials"] == trials
    assert "trial 3 has the best validation accuracy" in output
    run("report", "searches/whole", "--html", "page.html", "--markdown", "page.md")
    assert "trial 3" in Path("page.md").read_text() and Path("page.html").stat().st_size > 10_000
    assert "FPT" in run("compare", "searches/whole", "runs/full", "--resamples", "200")
    settings = ["--config", "searches/whole/winner.yaml", "--seed", "1", "--tracking.no-mlflow"]
    run("adapt", "small-fpt", *settings, "--output", "again")
    assert close(plain_result(Path("again")), plain_result(Path("searches/whole/winner/seed-1")))


def test_a_finished_study_is_returned_and_read(run: Run) -> None:
    before = files("study")
    assert len([path for path in before if path.name == "result.json"]) == 8
    output = run(*STUDY)
    after = files("study")
    assert {path: content for path, (_, content) in after.items()} == {path: content for path, (_, content) in before.items()}
    assert all(after[path] == before[path] for path in before if path.parent.name != "study"), "it trained again"
    run("report", "study", "--html", "page.html", "--markdown", "page.md")
    compared = run("compare", "study", "--resamples", "200", "--json", "numbers.json")
    for text in (output, Path("page.md").read_text(), compared):
        assert "FPT" in text and "No backbone" in text
    assert Path("numbers.json").stat().st_size > 100


def test_runs_are_read_by_report_and_compare(run: Run) -> None:
    for names, rows in (
        (CLASSIFIERS, ("FPT", "LoRA", "Full fine-tuning", "No backbone", "ViT from scratch")),
        (("pretrain", "finetune"), ("Pre-training + cka-linear-debiased", "LoRA fine-tuning + cka-linear-debiased")),
    ):
        folders = [f"runs/{name}" for name in names]
        run("report", *folders, "--html", "page.html", "--markdown", "page.md")
        page, compared = Path("page.md").read_text(), run("compare", *folders, "--by", "sample", "--resamples", "200")
        assert all(row in page and row in compared for row in rows)
