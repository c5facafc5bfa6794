"""The search as a whole: real training of a tiny model, in this process, and what a stopped, failed or killed trial costs."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from searching import SPACE, record, settings

from crossalign import adapt, cli
from crossalign.config import AdaptConfig, SearchConfig, TrackingConfig, update
from crossalign.core.errors import UserError
from crossalign.recipes.space import open_space
from crossalign.report import report
from crossalign.studies.reproduce import configured
from crossalign.studies.search import jobs as work
from crossalign.studies.search.jobs import validations
from crossalign.studies.search.journal import Journal
from crossalign.studies.tune import _space, tune
from crossalign.training import loop


@pytest.mark.usefixtures("here")
def test_a_search_promotes_pauses_and_trains_the_winner_again(tmp_path: Path, tiny: tuple[str, ...]) -> None:
    config = settings(tmp_path, tiny, seeds=2, keep_checkpoints=True)
    assert tune(config) == []
    found = record(config)
    assert found["rungs"] == [1, 2, 4] and len(found["trials"]) == 8
    reached = [len(trial["rungs"]) for trial in found["trials"]]
    assert sum(count >= 1 for count in reached) == 8 and sum(count >= 2 for count in reached) >= 4 and max(reached) == 3
    for trial in found["trials"]:
        assert len(trial["curve"]) == [1, 2, 4][len(trial["rungs"]) - 1]
        assert [rung["score"] for rung in trial["rungs"]] == [max(trial["curve"][: rung["epochs"]]) for rung in trial["rungs"]]
        folder = config.output / "trials" / f"{trial['number']:04d}"
        assert [row["accuracy"] for row in validations(folder)] == trial["curve"]
        assert not (folder / "result.json").exists() and not (folder / "predictions.parquet").exists()  # no test score
        assert trial["state"] == ("complete" if len(trial["rungs"]) == 3 else "paused")
    last = [trial for trial in found["trials"] if trial["state"] == "complete"]
    best = max(last, key=lambda trial: (trial["rungs"][-1]["score"], -trial["number"]))
    assert found["winner"] == best["number"] and found["epochs"] == sum(len(trial["curve"]) for trial in found["trials"])
    finals = sorted(config.output.glob("winner/*/result.json"))
    assert [path.parent.name for path in finals] == ["seed-1", "seed-2"]  # seed 0 is the one that chose
    for path in finals:
        result = json.loads(path.read_text())
        assert result["test"]["n"] > 0 and result["learning_rate"] == best["settings"]["optim.lr"]
    chosen = yaml.safe_load((config.output / "winner.yaml").read_text())
    assert chosen["optim"]["weight_decay"] == best["settings"]["optim.weight_decay"]
    page = report([config.output], html=tmp_path / "page.html").read_text()
    assert "rung" in page


@pytest.mark.usefixtures("here")
def test_a_trial_trained_by_rungs_equals_one_trained_at_once(tmp_path: Path, tiny: tuple[str, ...]) -> None:
    config = settings(tmp_path, tiny, trials=4, seeds=0)
    tune(config)
    found = record(config)
    best = found["trials"][found["winner"]]
    straight = update(AdaptConfig(), yaml.safe_load((config.output / "winner.yaml").read_text()))
    straight.output = tmp_path / "straight"
    adapt(straight, quiet=True)
    assert [row["accuracy"] for row in validations(straight.output)] == best["curve"]
    rows = [(config.output / "trials" / f"{best['number']:04d}"), straight.output]
    assert len({len((folder / "metrics.jsonl").read_text().splitlines()) for folder in rows}) == 1  # none lost, none twice


@pytest.mark.usefixtures("here")
def test_a_search_stopped_at_any_write_decides_the_same(tmp_path: Path, tiny: tuple[str, ...]) -> None:
    """After every line of the journal, what comes next is what came next."""
    config = settings(tmp_path, tiny, seeds=0)
    tune(config)
    lines = (config.output / "journal.log").read_bytes().splitlines(keepends=True)
    search_of: dict[str, Any] = {}

    def replay(count: int, torn: bytes = b"") -> tuple[Any, Journal]:
        file = tmp_path / "copy.log"
        file.write_bytes(b"".join(lines[:count]) + torn)
        journal = Journal(file, "small-fpt", True, [1, 2, 4], 2)
        return journal.next_job(8, set(), search_of["draw"]), journal

    base = update(AdaptConfig(), yaml.safe_load((config.output / "winner.yaml").read_text()))
    space = open_space(config.space, base)

    def draw(number: int, attempt: int) -> Any:
        drawn = space.draw(base, int(np.random.SeedSequence([0, number, attempt]).generate_state(1)[0]))
        return drawn, space.distributions(drawn)

    search_of["draw"] = draw
    begun = []
    for line in lines:
        told = json.loads(line)
        if "begun" in told.get("user_attr", {}):
            begun.append((told["trial_id"], told["user_attr"]["begun"]))
    assert len(begun) >= 14
    for count in range(2, len(lines) + 1):
        done = sum("begun" in json.loads(line).get("user_attr", {}) for line in lines[:count])
        job, journal = replay(count, b'{"op_code": 3, "worker')
        ended = sum(len(trial.scores) for trial in journal.trials)
        expected = begun[done - 1] if ended < done else begun[done] if done < len(begun) else None
        assert (None if job is None else (job.trial, job.rung)) == expected


@pytest.mark.usefixtures("here")
def test_the_same_seed_draws_the_same_and_more_trials_go_further(tmp_path: Path, tiny: tuple[str, ...]) -> None:
    config = settings(tmp_path, tiny, trials=4, seeds=0)
    tune(config)
    first = record(config)
    config.trials = 6
    tune(config)
    more = record(config)
    assert [t["settings"] for t in more["trials"][:4]] == [t["settings"] for t in first["trials"]]
    other = settings(tmp_path, tiny, trials=6, seeds=0, output=tmp_path / "whole")
    tune(other)
    assert [t["settings"] for t in record(other)["trials"]] == [t["settings"] for t in more["trials"]]
    assert len({json.dumps(t["settings"]) for t in more["trials"]}) == 6
    config.factor = 3
    with pytest.raises(UserError, match="factor is 2 there and 3 here"):
        tune(config)


def test_a_worker_without_the_folder_asks_for_what_the_search_has(tmp_path: Path, tiny: tuple[str, ...]) -> None:
    """Also where it has a copy of its own from before another worker took the trial further."""
    base = configured("small-fpt", (*tiny, "tracking.mlflow=false"))
    base = dataclasses.replace(base, output=tmp_path / "gone" / "trials" / "0000")
    first = work.train(work.Work(base, "small-fpt", 1, tmp_path / "gone", "token"))
    assert len(first.curve) == 1 and first.files and not (tmp_path / "gone").exists()
    again = work.Work(base, "small-fpt", 3, tmp_path / "gone", "token", done=2)
    assert work.train(again).wants_files
    further = work.train(dataclasses.replace(again, until=2, done=1))  # its own copy will do
    there = work.train(dataclasses.replace(again, files=further.files))
    assert there.curve[:2] == further.curve and len(there.curve) == 3 and there.curve[0] == first.curve[0]


@pytest.mark.usefixtures("here")
def test_mlflow_has_a_run_for_the_search_and_a_child_for_each_trial(tmp_path: Path, tiny: tuple[str, ...]) -> None:
    from mlflow import MlflowClient

    config = settings(tmp_path, tiny, trials=4, tracking=TrackingConfig())
    tune(config)
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("crossalign").experiment_id])
    parent = next(run for run in runs if run.info.run_name == "search small-fpt")
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(children) == 5 and {run.info.status for run in runs} == {"FINISHED"}
    found = record(config)
    for trial in found["trials"]:
        run = next(run for run in children if run.info.run_name == f"trial {trial['number']}")
        history = client.get_metric_history(run.info.run_id, "train/validation/accuracy")
        assert [metric.value for metric in history] == trial["curve"]  # each epoch once, over all pauses
        assert float(run.data.params["optim.lr"]) == trial["settings"]["optim.lr"]
    final = next(run for run in children if "seed 1" in run.info.run_name)
    assert 0 <= final.data.metrics["test/accuracy"] <= 1


@pytest.mark.usefixtures("here")
def test_methods_get_searches_of_one_size(tmp_path: Path, tiny: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    space = tmp_path / "s.yaml"
    space.write_text(SPACE + "tune.lora_rank: {choices: [2, 4], when: tune.method == lora}\n")
    out = tmp_path / "two"
    args = ["tune", "--methods", "small-fpt,small-lora", "--output", str(out), "--space", str(space), "--trials", "4"]
    assert cli.main([*args, "--rungs", "2", "--seeds", "1", "--tracking.no-mlflow", "--set", *tiny]) == 0
    found = {name: json.loads((out / name / "search.json").read_text()) for name in ("small-fpt", "small-lora")}
    assert [record["rungs"] for record in found.values()] == [[2, 4], [2, 4]]
    assert all("tune.lora_rank" in trial["settings"] for trial in found["small-lora"]["trials"])
    assert not any("tune.lora_rank" in trial["settings"] for trial in found["small-fpt"]["trials"])
    assert (out / "report.html").is_file() and "report:" in capsys.readouterr().out
    with pytest.raises(UserError, match="different rungs"):
        tune(SearchConfig(methods=("small-fpt", "cmda-fpt"), output=tmp_path / "three", set=tiny[:2]))


def test_bad_options_are_told(tmp_path: Path, tiny: tuple[str, ...]) -> None:
    for more, message in (
        ({"recipe": "small-ftp"}, "small-fpt"),
        ({"recipe": ""}, "no recipe"),
        ({"trials": 0}, "--trials is 0"),
        ({"rungs": 4}, "cannot be cut into 4 rungs"),
        ({"resources": (2, 3)}, "end at 4"),
        ({"resources": (4, 2)}, "do not rise"),
        ({"space": "cmdaa"}, "did you mean 'cmda'"),
        ({"space": "none.yaml"}, "cannot be read"),
        ({"resources": (0, 4)}, "--resources is 0 4; each must be at least 1"),
        ({"set": (*tiny, "score_test=false")}, "--set score_test=False: .*--seeds 0"),
        ({"set": (*tiny, "output=elsewhere")}, "--output tells where"),
        ({"set": ("optim={lr",)}, "--set optim={lr: the value is no YAML"),
    ):
        with pytest.raises(UserError, match=message):
            tune(settings(tmp_path, tiny, **more))


def test_set_fixes_a_field_of_the_usual_space_and_contradicts_that_of_a_file(tmp_path: Path) -> None:
    config = SearchConfig(recipe="small-lora", set=("optim.lr=5e-5", "loop.batch_size=8"), show_space=True)
    space = _space(config, configured("small-lora", config.set))
    assert {"optim.lr", "loop.batch_size"}.isdisjoint(space.as_data()) and "tune.lora_rank" in space.as_data()
    section = dataclasses.replace(config, set=("optim={lr: 1.0e-3, schedule: cosine}",))
    assert {"optim.lr", "optim.schedule"}.isdisjoint(_space(section, configured("small-lora", section.set)).as_data())
    fixed = dataclasses.replace(config, set=("tune.method=fpt",))
    assert "tune.lora_rank" not in _space(fixed, configured("small-lora", fixed.set)).as_data()
    file = tmp_path / "space.yaml"
    file.write_text("loop.batch_size: [4, 12]\n")
    with pytest.raises(UserError, match=r"--set fixes loop.batch_size, which --space .*space.yaml varies"):
        tune(dataclasses.replace(config, space=str(file)))
    base = configured("small-lora", ())
    every = tuple(f"{field.name}={field.examples[0]}" for field in open_space("", base).fields)
    with pytest.raises(UserError, match=r"--set fixes every field that the space varies .*optim.lr, .*: leave one of them"):
        tune(dataclasses.replace(config, set=every))
    assert base.loop.batch_size == 64 and open_space(str(file), base).inside(base).loop.batch_size == 4


@pytest.mark.usefixtures("here")
def test_a_longer_search_may_have_another_winner_and_trains_that_one(tmp_path: Path, tiny: tuple[str, ...]) -> None:
    config = settings(tmp_path, tiny, trials=1, seeds=1, rungs=2, space_text="optim.lr: [1.0e-7, 1.0e-2, 3.0e-3]\n", seed=3)
    tune(config)
    first = record(config)
    assert first["trials"][0]["settings"]["optim.lr"] == 1e-7
    config.trials, config.seeds = 3, 2
    tune(config)
    found = record(config)
    assert found["winner"] != 0
    results = [json.loads(path.read_text()) for path in sorted(config.output.glob("winner/*/result.json"))]
    assert [result["seed"] for result in results] == [1, 2]
    assert {result["learning_rate"] for result in results} == {found["trials"][found["winner"]]["settings"]["optim.lr"]}
    written = {path: path.stat().st_mtime_ns for path in config.output.glob("winner/*/result.json")}
    tune(config)  # whatever seed the settings were drawn with
    assert written == {path: path.stat().st_mtime_ns for path in config.output.glob("winner/*/result.json")}


@pytest.mark.usefixtures("here")
def test_settings_told_otherwise_go_on_and_others_are_refused(tmp_path: Path, tiny: tuple[str, ...]) -> None:
    config = settings(tmp_path, tiny, trials=2, seeds=0, rungs=2)
    tune(config)
    again = dataclasses.replace(config, trials=3, rungs=4, resources=(2, 4), set=(*reversed(tiny), "optim.clip=1.0"))
    tune(again)
    assert len(record(config)["trials"]) == 3
    with pytest.raises(UserError, match=r"base.optim.clip is 1.0 there and 2.0 here"):
        tune(dataclasses.replace(config, set=(*tiny, "optim.clip=2.0")))
    with pytest.raises(UserError, match="holds the search of one recipe"):
        tune(dataclasses.replace(config, recipe="", methods=("small-fpt", "small-lora")))
    with pytest.raises(UserError, match="give one or the other"):
        tune(dataclasses.replace(config, methods=("small-fpt", "small-lora")))


@pytest.mark.usefixtures("here")
def test_alignment_before_training_is_counted_apart(
    tmp_path: Path, tiny: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    stages, fit = list[tuple[str, int]](), loop.fit

    def followed(stage: Any, run: Any) -> Any:
        if stage.name == "align" and run.until == 0:
            monkeypatch.setattr(stage, "steps", lambda epoch, first: pytest.fail("the base trained"))
        stages.append((stage.name, run.until))
        return fit(stage, run)

    for place in ("crossalign.verbs.adapt.job", "crossalign.verbs.adapt.alignment"):
        monkeypatch.setattr(sys.modules[place], "fit", followed)
    align = ("align.metric=mmd", "align.epochs=3", "align.batch_size=16", "align.sequences=100", "align.sequence_length=8")
    config = settings(tmp_path, (*tiny, *align), trials=2, seeds=0, rungs=2)
    tune(config)
    assert stages[0] == ("align", 0) and stages[1][0] == "align" and stages[1][1] == 2
    assert record(config)["alignment_epochs"] == 6 and record(config)["epochs"] == 6
