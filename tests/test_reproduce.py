"""A study: sweep, seeds, resume, failures that cost one run, and workers that die with their driver."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from crossalign import cli
from crossalign.config import PretrainConfig
from crossalign.config.studies import ReproduceArgs
from crossalign.core.errors import UserError
from crossalign.recipes import RECIPES, Recipe, get_recipe
from crossalign.recipes.cmar import TEACHERS
from crossalign.results import outcomes
from crossalign.runs.folder import alone
from crossalign.studies.quickstart import QUICKSTART, quickstart
from crossalign.studies.reproduce import STUDIES, StudyRun, configured
from crossalign.training.stops import Diverged
from crossalign.verbs.language_model import row_name

reproduce_module = importlib.import_module("crossalign.studies.reproduce")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Settings that make every row of the table train in a second."""
    from transformers import LlamaConfig, LlamaForCausalLM

    root = tmp_path_factory.mktemp("study")
    config = LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(root / "llama")
    rng = np.random.default_rng(0)
    for name, low in (("dark", 0), ("light", 120)):
        (root / "pictures" / name).mkdir(parents=True)
        for i in range(30):
            pixels = rng.integers(low, low + 130, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "pictures" / name / f"{i}.png")
    return (
        f"backbone.ref={root / 'llama'}", f"data.source={root / 'pictures'}", "data.channels=rgb", "embedder.patch=4",
        "loop.epochs=2", "loop.batch_size=8", "loop.precision=fp32", "align.epochs=1", "align.sequences=100",
        "align.sequence_length=8", "align.batch_size=8", "tracking.mlflow=false",
    )  # fmt: skip


def study(output: Path, tiny: tuple[str, ...], *more: str) -> list[str]:
    return ["reproduce", "cmda-table1", "--output", str(output), "--set", *tiny, *more]


def test_a_study_sweeps_then_runs_seeds_at_the_best_rate(
    tiny: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = study(tmp_path, tiny, "--rows", "fpt", "fpt-mmd", "vit", "--seeds", "2", "--lrs", "1e-3", "1e-2")
    assert cli.main(args) == 0
    sweep = json.loads((tmp_path / "sweep.json").read_text())
    assert len(sweep) == 6
    best = {}
    for row in {r["row"] for r in sweep}:
        tried = [r for r in sweep if r["row"] == row]
        (chosen,) = [r for r in tried if r["chosen"]]
        assert chosen["validation_accuracy"] == max(r["validation_accuracy"] for r in tried)
        best[row] = chosen["learning_rate"]
    results = [json.loads(f.read_text()) for f in tmp_path.glob("*/seed-*/result.json")]
    assert len(results) == 6 and {r["seed"] for r in results} == {0, 1}
    assert all(r["learning_rate"] == best[r["row"]] for r in results)
    searched = [json.loads(f.read_text()) for f in tmp_path.glob("sweep/*/*/result.json")]
    assert all(r["test"] is None for r in searched)
    said = capsys.readouterr()
    lines = [line for line in said.err.splitlines() if re.match(r"\[\d+/6\] ", line)]
    assert len(lines) == 12 and all(re.fullmatch(r"\[\d/6\] sweep/\S+: validation .* %, epoch \d, \d+ s", x) for x in lines[:6])
    assert all(re.fullmatch(r"\[\d/6\] \S+: test [\d.]+ % \(validation [\d.]+ %, epoch \d\), \d+ s", x) for x in lines[6:])
    assert "FPT + alignment (MMD)" in said.out and (tmp_path / "report.html").stat().st_size > 10_000

    stamps = {f: f.stat().st_mtime_ns for f in tmp_path.rglob("result.json")}
    assert cli.main(args) == 0
    assert {f: f.stat().st_mtime_ns for f in tmp_path.rglob("result.json")} == stamps


def test_a_run_that_fails_costs_itself_only(tiny: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "fpt" / "seed-0").mkdir(parents=True)
    (tmp_path / "fpt" / "seed-0" / "notes.txt").write_text("not a run")
    assert cli.main(study(tmp_path, tiny, "--rows", "fpt", "none", "--seeds", "1")) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("failed: ")]
    assert (
        line.startswith("failed: fpt/seed-0: ") and "is not empty and not a run folder" in line and "UserError" not in line
    ), line
    assert (tmp_path / "none" / "seed-0" / "result.json").exists()


def test_a_study_in_use_is_left_alone(tiny: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with alone(tmp_path):
        before = sorted(tmp_path.rglob("*"))
        assert cli.main(study(tmp_path, tiny, "--rows", "fpt", "--seeds", "1")) == 2
    assert "another process is running" in capsys.readouterr().err and sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("why", [UserError("in use"), OSError("gone"), Diverged("not finite")])
def test_a_sweep_that_failed_in_part_chooses_nothing_unless_training_diverged(
    tiny: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], why: Exception
) -> None:
    run_job = reproduce_module._run_job

    def failing(job: StudyRun) -> float:
        if job.name == "sweep/fpt/lr-0.01":
            raise why
        return float(run_job(job))

    monkeypatch.setattr(reproduce_module, "_run_job", failing)
    lrs = ("--lrs", "1e-4", "1e-2", "1e30") if isinstance(why, Diverged) else ("--lrs", "1e-4", "1e-2")
    assert cli.main(study(tmp_path, tiny, "optim.clip=0", "--rows", "fpt", "none", "--seeds", "1", *lrs)) == 1
    trained = (tmp_path / "fpt" / "seed-0" / "result.json").exists()
    rows = {entry["row"] for entry in json.loads((tmp_path / "sweep.json").read_text())}
    assert trained is isinstance(why, Diverged) and ("FPT" in rows) is trained and "No backbone" in rows
    assert ("fpt chooses no learning rate" in capsys.readouterr().err) is not trained


def test_a_later_sweep_knows_what_an_earlier_one_found(
    tiny: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Worse rates change nothing; a better one replaces the final runs."""
    worth = {1e-4: 0.3, 1e-3: 0.6, 1e-2: 0.5, 3e-3: 0.9, 5e-3: 0.1}
    real = outcomes.chosen_by

    def chosen_by(run: Any) -> Any:
        return dataclasses.replace(real(run), value=worth[run.result["learning_rate"]])

    monkeypatch.setattr(outcomes, "chosen_by", chosen_by)

    def call(*lrs: str) -> tuple[float, int]:
        assert cli.main(study(tmp_path, tiny, "--rows", "fpt", "--seeds", "1", "--lrs", *lrs)) == 0
        final = tmp_path / "fpt" / "seed-0" / "result.json"
        return json.loads(final.read_text())["learning_rate"], final.stat().st_mtime_ns

    first = call("1e-3", "1e-2")
    assert first[0] == 1e-3 and call("1e-4") == first
    sweep = json.loads((tmp_path / "sweep.json").read_text())
    assert [entry["learning_rate"] for entry in sweep if entry["chosen"]] == [1e-3] and len(sweep) == 3
    assert call("3e-3")[0] == 3e-3
    final = tmp_path / "fpt" / "seed-0"
    shutil.rmtree(tmp_path / "sweep")  # the rate of a final run is known too
    assert call("5e-3")[0] == 3e-3 and json.loads((final / "result.json").read_text())["learning_rate"] == 3e-3


@pytest.mark.parametrize("name", ["study.json", "sweep.json"])
@pytest.mark.parametrize("content", ["", "5", "null", '[{"row": 5}]', '{"rows": 5}', '{"commands": [5]}', "[" * 100_000])
def test_a_damaged_file_of_a_study_is_named_before_any_run(
    tiny: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: str
) -> None:
    (tmp_path / name).write_text(content)
    assert cli.main(study(tmp_path, tiny, "--rows", "fpt", "--seeds", "1", "--lrs", "1e-3")) == 2
    assert name in capsys.readouterr().err and not (tmp_path / "sweep").exists()
    assert (tmp_path / name).read_text() == content


def test_workers_do_not_outlive_a_killed_driver(tiny: tuple[str, ...], tmp_path: Path) -> None:
    args = study(tmp_path, tiny, "loop.epochs=2000", "--rows", "fpt", "full", "--seeds", "1", "--workers", "2")
    driver = subprocess.Popen([sys.executable, "-m", "crossalign.cli", *args], stderr=subprocess.DEVNULL)
    files = [tmp_path / row / "seed-0" / "metrics.jsonl" for row in ("fpt", "full")]
    deadline = time.monotonic() + 100
    while not all(f.exists() and f.stat().st_size for f in files) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    time.sleep(4)
    sizes = [f.stat().st_size for f in files]
    time.sleep(2)
    assert [f.stat().st_size for f in files] == sizes, "a worker still trains"
    assert all(list((f.parent / "checkpoints").glob("train-*")) for f in files)


def test_a_study_of_language_models_keeps_what_the_sweep_of_other_rows_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from io import BytesIO

    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "text.txt").write_text("".join(f"Line {i} has {i * i} words in it.\n" for i in range(500)))
    buffer = BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "PNG")
    captions = [f"picture {i}" for i in range(40)]
    pairs = {"id": captions, "image": [buffer.getvalue()] * 40, "caption": captions}
    pq.write_table(pa.table(pairs), tmp_path / "pairs.parquet")
    settings = [
        f"corpus.source=[{tmp_path / 'text.txt'}]", "corpus.vocabulary=300", "block=16", "gpt.layers=1", "gpt.heads=2",
        "gpt.width=8", "loop.steps=2", "loop.evaluate_every=1", "loop.batch_size=4", "loop.precision=fp32",
        f"pairs.source={tmp_path / 'pairs.parquet'}", "align.batch_size=8", "align.max_length=8", "align.held_out=0",
        "tracking.mlflow=false",
    ]  # fmt: skip
    args = ["reproduce", "cmar-pretrain", "--output", str(tmp_path / "out"), "--lrs", "1e-3", "1e-2", "--set", *settings]
    for row in ("baseline", "captions"):
        assert cli.main([*args, "--rows", row, "--seeds", "2"]) == 0
    assert "Pre-training + captions" in capsys.readouterr().out
    sweep = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert [entry["row"] for entry in sweep] == ["Pre-training"] * 2 + ["Pre-training + captions"] * 2
    assert sum(entry["chosen"] for entry in sweep) == 2
    assert len(list((tmp_path / "out").glob("*/seed-*/result.json"))) == 4


def test_a_study_without_a_published_table_has_no_paper_scale(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["reproduce", "cmar-finetune", "--output", str(tmp_path / "out"), "--scale", "paper"]) == 2
    assert "is no table of a paper" in capsys.readouterr().err


def test_a_recipe_that_gives_one_object_each_time_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recipe of the user's own may; what a study puts into it is the study's alone."""
    ours = PretrainConfig()
    recipe = Recipe("small-pretrain-baseline", lambda: ours, "")
    monkeypatch.setattr(RECIPES, "_entries", {**RECIPES._entries, recipe.name: recipe})
    monkeypatch.setattr("crossalign.studies.reproduce._run_all", lambda jobs, *_: ([], {}))
    options = ["--rows", "baseline", "--set", "corpus.source=[a.txt]"]
    assert cli.main(["reproduce", "cmar-pretrain", *options, "--output", str(tmp_path)]) == 0
    configured(recipe.name, ())
    assert ours == PretrainConfig()


@pytest.mark.parametrize(
    ("more", "rows", "seeds"),
    [
        (["--scale", "paper"], ["baseline", *TEACHERS], 5),
        (["--scale", "paper", "--rows", "lambda-5", "clip-", "--seeds", "2"], None, 0),
        (["--scale", "paper", "--rows", "lambda-5", "baseline", "--seeds", "2"], ["baseline", "lambda-5"], 2),
        (["--set", "corpus.source=[a.txt]", "--rows", "layers-first", "mobilenet"], ["layers-first", "mobilenet"], 3),
    ],
)
def test_rows_and_seeds_of_either_scale(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, more: list[str], rows: list[str] | None, seeds: int
) -> None:
    """Table 3 is a baseline and seven teachers, five runs each; a row that has a recipe can be asked for."""
    ran: list[tuple[str, int, str]] = []

    def run_all(jobs: list[StudyRun], workers: int, threads: int) -> tuple[list[str], dict[str, str]]:
        ran.extend((job.recipe, job.config.seed, job.config.row) for job in jobs)
        return [], {}

    monkeypatch.setattr("crossalign.studies.reproduce._run_all", run_all)
    code = cli.main(["reproduce", "cmar-pretrain", "--output", str(tmp_path / "out"), *more])
    if rows is None:
        assert code == 2 and not ran
        return
    prefix = "cmar-pretrain" if "paper" in more else "small-pretrain"
    assert {(recipe, seed) for recipe, seed, _ in ran} == {(f"{prefix}-{row}", seed) for row in rows for seed in range(seeds)}
    assert len({title for _, _, title in ran}) == len(rows)


@pytest.mark.parametrize(
    ("study", "scale"), [("cmar-pretrain", "paper"), ("cmar-pretrain", "small"), ("cmar-finetune", "small")]
)
def test_no_two_rows_of_a_study_bear_one_name(study: str, scale: str) -> None:
    """The report would take them for one row."""
    configs = [get_recipe(STUDIES[study].recipe(row, scale)).make() for row in STUDIES[study].known_rows(scale)]
    titles = [config.row or row_name(config) for config in configs]
    assert len(titles) > 30 and sorted(set(titles)) == sorted(titles)


def test_the_quickstart_ends_with_what_was_shown_where_and_what_is_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def study(args: ReproduceArgs) -> int:
        table = STUDIES[args.study]
        assert args.seeds is not None and args.seeds >= 3 and len(table.rows) * args.seeds <= 6
        for row in table.rows:
            for seed in range(args.seeds):
                better = row in ("fpt", "aligned")
                result: dict[str, Any] = {"row": row, "seed": seed, "outcomes": {}}
                result["test"] = {"accuracy": 0.5 + 0.25 * better}
                result["scores"] = {"validation": {"loss": 3.0 + 0.125 * better}}
                result["held_out"] = {"held_out_cka-linear-debiased": 0.1 * better}
                folder = args.output / row / f"seed-{seed}"
                folder.mkdir(parents=True)
                (folder / "result.json").write_text(json.dumps(result))
        return failed

    failed = 0
    monkeypatch.setattr(quickstart.__module__ + ".reproduce", study)
    assert quickstart(tmp_path / "a") == 0
    lines = capsys.readouterr().out.splitlines()
    shown, pages, following = lines[-3:]
    assert (
        "75 % of unseen digits, with random weights 50 %" in shown and "from 0.00 to 0.10" in shown and "+0.125 nats" in shown
    )
    assert all(str(tmp_path / "a" / name / "report.html") in pages for name in ("digits", "text"))
    assert "crossalign adapt --data.source" in following
    assert any(re.fullmatch(r"[\d.]+ seconds went into timing steps to choose number formats", line) for line in lines)
    assert sum(bool(re.fullmatch(r"(digits|text): \d+ seconds", line)) for line in lines) == 2
    failed = 1
    assert quickstart(tmp_path / "b") == 1 and "shown:" not in capsys.readouterr().out


def test_the_quickstarts_settings_are_real() -> None:
    for study, (_, settings, _) in QUICKSTART.items():
        for row in STUDIES[study].rows:
            configured(STUDIES[study].recipe(row, "small"), settings)
