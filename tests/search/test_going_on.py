"""What a user meets around a search: a longer one, several methods, a page in between, the winner's settings."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from optuna.distributions import FloatDistribution
from searching import record, settings

from crossalign import cli
from crossalign.report import report
from crossalign.runs.folder import InUse
from crossalign.runs.records import open_study
from crossalign.studies.search import jobs as work
from crossalign.studies.search.journal import Journal
from crossalign.studies.tune import tune
from crossalign.training import precision
from crossalign.training.stops import Interrupted


@pytest.mark.usefixtures("here")
def test_what_a_shorter_search_scored_is_not_the_new_winners(
    tmp_path: Path, tiny: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(tmp_path, tiny, trials=1, seeds=1, rungs=2, space_text="optim.lr: [1.0e-7, 1.0e-2, 3.0e-3]\n", seed=3)
    tune(config)
    longer = dataclasses.replace(config, trials=3)
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["crossalign.studies.tune"], "train_winner", _interrupted)
        with pytest.raises(Interrupted):
            tune(longer)
    found = record(config)
    assert found["winner"] != 0 and found["scored"] == [0]
    (row,) = open_study([config.output]).searches
    assert row.overtaken and not open_study([config.output]).runs
    page = report([config.output], html=tmp_path / "page.html").read_text()
    assert "none of which is finished here" in page and "With fresh seeds" not in page
    tune(longer)
    assert record(config)["scored"] == [0, found["winner"]]
    page = report([config.output], html=tmp_path / "page.html").read_text()
    assert "They were looked at before: trial 0 was the winner of a shorter search." in page and "With fresh seeds" in page


def _interrupted(*_: object) -> None:
    raise Interrupted("stopped by a signal")


@pytest.mark.usefixtures("here")
def test_epochs_trained_again_by_a_longer_search_are_counted(tmp_path: Path, tiny: tuple[str, ...]) -> None:
    config = settings(tmp_path, tiny, trials=2, seeds=0)
    tune(config)
    before = {trial["number"]: len(trial["curve"]) for trial in record(config)["trials"]}
    longer = dataclasses.replace(config, trials=8)
    tune(longer)
    found = record(config)
    after = {trial["number"]: len(trial["curve"]) for trial in found["trials"]}
    again = sum(epochs for number, epochs in before.items() if after[number] > epochs)
    assert again > 0 and found["epochs"] == sum(after.values()) + again
    kept = settings(tmp_path, tiny, trials=2, seeds=0, output=tmp_path / "kept", keep_checkpoints=True)
    tune(kept)
    tune(dataclasses.replace(kept, trials=8))
    whole = record(kept)
    assert whole["epochs"] == sum(after.values()) and [t["curve"] for t in whole["trials"]] == [
        t["curve"] for t in found["trials"]
    ]


@pytest.mark.usefixtures("here")
def test_settings_of_the_winner_are_a_configuration_of_their_own(tmp_path: Path, tiny: tuple[str, ...]) -> None:
    config = settings(tmp_path, tiny, trials=2, seeds=0, rungs=2)
    tune(config)
    assert {"output", "tracking"}.isdisjoint(yaml.safe_load((config.output / "winner.yaml").read_text()))
    before = sorted(path for path in config.output.rglob("*"))
    call = [
        "adapt",
        "--config",
        str(config.output / "winner.yaml"),
        "--output",
        str(tmp_path / "mine"),
        "--tracking.no-mlflow",
    ]
    assert cli.main(call) == 0
    assert sorted(path for path in config.output.rglob("*")) == before and (tmp_path / "mine" / "result.json").is_file()


@pytest.mark.usefixtures("here")
def test_methods_are_locked_each_and_of_one_number_format(
    tmp_path: Path, tiny: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    auto = (*tiny, "loop.precision=auto")
    measured, choose = iter((("bf16", "measured"), ("fp32", "measured"))), precision.choose_precision
    monkeypatch.setattr(
        precision, "choose_precision", lambda name, probe: next(measured) if name == "auto" else choose(name, probe)
    )
    config = settings(
        tmp_path,
        auto,
        recipe="",
        methods=("small-fpt,small-lora",),
        trials=2,
        seeds=0,
        rungs=2,
        space_text="optim.lr: [1.0e-2, 1.0e-3]\n",
    )
    drive, refused = sys.modules["crossalign.studies.tune"].drive, list[str]()

    def driven(search: Any, pool: Any, follow: Any) -> None:
        other = settings(tmp_path, auto, recipe=search.recipe, output=search.home, trials=2, seeds=0, rungs=2)
        with pytest.raises(InUse, match="another process is running"):
            tune(other)
        refused.append(search.recipe)
        drive(search, pool, follow)

    monkeypatch.setattr(sys.modules["crossalign.studies.tune"], "drive", driven)
    assert tune(config) == [] and refused == ["small-fpt", "small-lora"]
    formats = [yaml.safe_load(path.read_text())["resolved"]["precision"] for path in config.output.glob("*/search.yaml")]
    assert formats == ["bf16", "bf16"]


@pytest.mark.usefixtures("here")
def test_a_method_that_fails_leaves_the_others_their_search(
    tmp_path: Path, tiny: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    space = tmp_path / "space.yaml"
    text = "optim.lr: {choices: [1.0e+30, 1.0e+31], when: tune.method == fpt}\n"
    space.write_text(text + "tune.lora_rank: {choices: [2, 4], when: tune.method == lora}\n")
    call = ["tune", "--methods", "small-fpt,small-lora", "--trials", "2", "--seeds", "1", "--rungs", "2", "--space", str(space)]
    call += ["--output", str(tmp_path / "found"), "--tracking.no-mlflow", "--set", *tiny]
    assert cli.main(call) == 1
    said = capsys.readouterr()
    assert "all 2 trials of small-fpt failed, the first: " in said.err and "draw more --trials" in said.err
    assert "ASHA over small-lora" in said.out and (tmp_path / "found" / "report.html").is_file()
    assert json.loads((tmp_path / "found" / "small-lora" / "search.json").read_text())["winner"] is not None


@pytest.mark.usefixtures("here")
def test_a_search_is_known_from_its_start(tmp_path: Path, tiny: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings(tmp_path, tiny, trials=2, seeds=0, rungs=2)
    monkeypatch.setattr(sys.modules["crossalign.studies.tune"], "RECORD_SECONDS", 0.0)
    train, seen = work.train, list[tuple[int, int]]()

    def looked(job: work.Work) -> work.JobResult:
        if job.config.output.name != "base":
            until, told = time.monotonic() + 20, (0, 0)
            while told != (len(seen) + 1, 1) and len(seen) < 2 and time.monotonic() < until:
                time.sleep(0.1)  # the driver looks once a second
                found = record(config)
                told = len(found["trials"]), sum(trial["state"] == "training" for trial in found["trials"])
            seen.append(told)
        return train(job)

    monkeypatch.setattr("crossalign.studies.search.drive.train", looked)
    tune(config)
    assert seen[:2] == [(1, 1), (2, 1)]


def test_ctrl_c_between_the_stages_is_told_as_any_other(
    tmp_path: Path, tiny: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["crossalign.studies.tune"], "_open", stopped)
    monkeypatch.setattr(sys.modules["crossalign.studies.tune"], "_pool", lambda config: contextlib.nullcontext())
    call = ["tune", "small-fpt", "--rungs", "2", "--output", str(tmp_path / "found"), "--set", *tiny]
    assert cli.main(call) == 130
    assert "stopped by a signal; the same command goes on from there" in capsys.readouterr().err


def test_a_journal_cut_after_any_line_is_whole(tmp_path: Path) -> None:
    def drawn(number: int, attempt: int) -> tuple[dict[str, Any], dict[str, Any]]:
        return {"optim.lr": float(number)}, {"optim.lr": FloatDistribution(0, 10)}

    def opened(name: str) -> Journal:
        return Journal(tmp_path / name, "search", True, [1, 2], 2)

    def go_on(journal: Journal) -> None:
        while job := journal.next_job(4, set(), drawn):
            journal.begin(job)
            if job.trial == 1:
                journal.fail(job, "out of memory", [0.1])
            else:
                journal.end(job, 0.1 * job.trial, [0.1 * job.trial] * journal.ends[job.rung], 1.0 + job.rung)

    whole = opened("whole.log")
    go_on(whole)
    lines = (tmp_path / "whole.log").read_bytes().splitlines(keepends=True)
    for count in range(1, len(lines)):
        (tmp_path / f"{count}.log").write_bytes(b"".join(lines[:count]))
        journal = opened(f"{count}.log")
        assert all(len(trial.seconds) == len(trial.scores) for trial in journal.trials)
        go_on(journal)
        assert journal.trials == whole.trials
        storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(tmp_path / f"{count}.log")))
        states = [trial.state.name for trial in optuna.load_study(study_name="search", storage=storage).trials]
        ended = ["FAIL" if t.reason else "COMPLETE" if len(t.scores) == 2 else "RUNNING" for t in whole.trials]
        assert states == ended


def test_a_script_without_a_guard_is_told_what_it_lacks(tmp_path: Path, tiny: tuple[str, ...]) -> None:
    script = tmp_path / "script.py"
    call = f"tune(SearchConfig(recipe='small-fpt', trials=2, rungs=2, output=Path({str(tmp_path / 'found')!r}), set={tiny!r}))"
    head = "from pathlib import Path\nfrom crossalign.config import SearchConfig\nfrom crossalign.studies.tune import tune\n"
    script.write_text(f"{head}{call}\n")
    ended = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False, timeout=100)
    assert ended.returncode and "must do so under if __name__ == '__main__'" in ended.stderr
