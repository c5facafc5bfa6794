"""The search as a whole: real training of a tiny model, in this process, and what a stopped, failed or killed trial costs."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from crossalign import adapt, cli, progress
from crossalign.config import AdaptConfig, SearchConfig, TrackingConfig, update
from crossalign.errors import UserError
from crossalign.report import report
from crossalign.reproduce import configured
from crossalign.search import work
from crossalign.search.drive import Pool
from crossalign.search.journal import Journal
from crossalign.search.space import open_space
from crossalign.search.work import validations
from crossalign.tune import tune
from crossalign.workers import Workers

SPACE = "optim.lr: {low: 1.0e-4, high: 1.0e-2, log: true}\nloop.batch_size: [8, 12]\n"


@contextmanager
def one_thread(config: SearchConfig) -> Iterator[Pool]:
    with ThreadPoolExecutor(1) as executor:
        yield Pool(executor, lambda: 1)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The work is done in this process, one job after the other."""
    monkeypatch.setattr(sys.modules["crossalign.tune"], "_pool", one_thread)
    monkeypatch.setattr(progress, "_silent", False)


def settings(tmp_path: Path, tiny: tuple[str, ...], **more: Any) -> SearchConfig:
    space = tmp_path / "space.yaml"
    space.write_text(more.pop("space_text", SPACE))
    base = {"recipe": "small-fpt", "trials": 8, "rungs": 3, "seeds": 1, "tracking": TrackingConfig(mlflow=False)}
    return SearchConfig(**(base | {"output": tmp_path / "found", "space": str(space), "set": tiny} | more))


def record(config: SearchConfig) -> dict[str, Any]:
    return json.loads((config.output / "search.json").read_text())  # type: ignore[no-any-return]


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
    assert chosen["loop"]["batch_size"] == best["settings"]["loop.batch_size"]
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


@pytest.mark.usefixtures("here")
def test_a_failing_trial_ends_with_its_reason_and_the_search_goes_on(tmp_path: Path, tiny: tuple[str, ...]) -> None:
    text = "optim.lr: [1.0e-3, 1.0e+30]\nhead.dropout: [0.0, 0.1]\n"
    config = settings(tmp_path, (*tiny, "optim.clip=0"), space_text=text, trials=9, seeds=1)
    assert tune(config) == []
    found = record(config)
    assert len(found["trials"]) == 4  # the space holds no more, and none is drawn twice
    failed = [trial for trial in found["trials"] if trial["state"] == "failed"]
    assert len(failed) == 2 and all("stopped being a number" in trial["reason"] for trial in failed)
    assert all(trial["settings"]["optim.lr"] == 1e30 for trial in failed)
    assert found["trials"][found["winner"]]["settings"]["optim.lr"] == 1e-3


@pytest.mark.usefixtures("here")
def test_settings_that_no_draw_can_mend_stop_the_search_early(tmp_path: Path, tiny: tuple[str, ...]) -> None:
    config = settings(tmp_path, (*tiny[:1], "data.source=nowhere", *tiny[2:]))
    with pytest.raises(UserError, match="nowhere"):
        tune(config)
    assert not list((config.output / "trials").glob("0*"))
    batches = settings(tmp_path, tiny, space_text="loop.batch_size: {low: 500, high: 900, int: true}\n", output=tmp_path / "b")
    with pytest.raises(UserError, match=r"3 trials failed and none did not|all 8 trials failed"):
        tune(batches)
    assert 3 <= len(record(batches)["trials"]) <= 8


class Dying(Executor):
    """Does the work, but for the ``deaths`` first jobs of trial 1, whose worker is killed."""

    def __init__(self, deaths: int) -> None:
        self.deaths = deaths
        self.inner = ThreadPoolExecutor(1)

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        if args[0].config.output.name == "0001" and self.deaths:
            self.deaths -= 1
            broken: Future[Any] = Future()
            broken.set_exception(BrokenProcessPool("killed"))
            return broken
        return self.inner.submit(fn, *args, **kwargs)


@pytest.mark.parametrize("deaths", [1, 2])
@pytest.mark.usefixtures("here")
def test_a_killed_worker_costs_a_trial_at_its_second_death(
    tmp_path: Path, tiny: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, deaths: int
) -> None:
    @contextmanager
    def dying(config: SearchConfig) -> Iterator[Pool]:
        yield Pool(Dying(deaths), lambda: 1)

    monkeypatch.setattr(sys.modules["crossalign.tune"], "_pool", dying)
    config = settings(tmp_path, tiny, trials=4, seeds=0)
    tune(config)
    states = [trial["state"] for trial in record(config)["trials"]]
    assert (states[1] == "failed") == (deaths == 2)
    assert "failed" not in states[:1] + states[2:]


def test_a_worker_without_the_folder_asks_for_what_the_search_has(
    tmp_path: Path, tiny: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it has a copy of its own from before another worker took the trial further."""
    monkeypatch.setattr(progress, "_silent", False)
    base = configured("small-fpt", (*tiny, "tracking.mlflow=false"))
    base = dataclasses.replace(base, output=tmp_path / "gone" / "trials" / "0000")
    first = work.train(work.Work(base, "small-fpt", 1, tmp_path / "gone", "token"))
    assert len(first.curve) == 1 and first.files and not (tmp_path / "gone").exists()
    again = work.Work(base, "small-fpt", 3, tmp_path / "gone", "token", done=2)
    assert work.train(again).wants_files
    further = work.train(dataclasses.replace(again, until=2, done=1))  # its own copy will do
    there = work.train(dataclasses.replace(again, files=further.files))
    assert there.curve[:2] == further.curve and len(there.curve) == 3 and there.curve[0] == first.curve[0]


def kill_self(_: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_breaks_its_own_pool_alone() -> None:
    workers = Workers(2, 1)
    try:
        good, bad = workers.submit(pow, 2, 10), workers.submit(kill_self, 0)
        assert isinstance(bad.exception(timeout=100), BrokenProcessPool)
        assert good.result(timeout=100) == 1024
        assert [workers.submit(pow, 2, n).result(timeout=100) for n in (3, 4)] == [8, 16]
    finally:
        workers.shutdown()


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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim.lrr: [1]\n", "did you mean 'lr'"),
        ("optim.lr: {low: 1, hihg: 2}\n", "did you mean 'high'"),
        ("optim.lr: {low: 0, high: 1, log: true}\n", "log scale begins above 0"),
        ("optim.lr: {low: 2, high: 1}\n", "low must not be above high"),
        ("optim.lr: 3\n", "give a list of choices"),
        ("optim.optimizer: [adam, sgd]\n", "sgd"),
        ("loop.batch_size: [many]\n", "holds 'many'"),
        ("loop.epochs: [1, 2]\n", "the rungs count them"),
        ("data.validation_fraction: [0.1, 0.2]\n", "must be scored alike"),
        ("seed: [1, 2]\n", "scored alike"),
        ("optim.lr: {choices: [1], when: optim.optimiser == adam}\n", "optim.optimizer"),
        ("optim.lr: {choices: [1], when: sometimes}\n", "FIELD == VALUE"),
        ("optim.lr: {choices: [1], when: optim.optimizer == adam}\noptim.optimizer: [adam, adamw]\n", "must stand before"),
        ("- a\n", "holds no fields"),
        ("a: [\n", "is no YAML"),
    ],
)
def test_a_space_that_cannot_be_is_told_before_any_work(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "space.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=message) as told:
        tune(SearchConfig(recipe="small-fpt", space=str(file), output=tmp_path / "out"))
    assert "space.yaml" in str(told.value) and not (tmp_path / "out").exists()


def test_conditions_decide_what_is_drawn(tmp_path: Path) -> None:
    file = tmp_path / "space.yaml"
    file.write_text("tune.method: [fpt, lora]\ntune.lora_rank: {choices: [4, 8], when: tune.method == lora}\n")
    space = open_space(str(file), AdaptConfig())
    drawn = [space.draw(AdaptConfig(), seed) for seed in range(40)]
    assert {d["tune.method"] for d in drawn} == {"fpt", "lora"}
    assert all(("tune.lora_rank" in d) == (d["tune.method"] == "lora") for d in drawn)


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
    ):
        with pytest.raises(UserError, match=message):
            tune(settings(tmp_path, tiny, **more))
