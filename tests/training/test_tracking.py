"""The record of a run: no row lost, none twice, and MLflow never in the way of training."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from crossalign.config import TrackingConfig
from crossalign.training import tracking
from crossalign.training.tracking import RunLog

FILES_ONLY = TrackingConfig(mlflow=False)
PROCESSES = 4

# What one of several workers does on a folder where nobody made the store yet.
WORKER = """
import sys
from pathlib import Path
from crossalign.config import TrackingConfig
from crossalign.training.tracking import RunLog
name = sys.argv[2]
with RunLog(Path(sys.argv[1]) / name, TrackingConfig(), name, {"seed": 1}) as log:
    log.log({"stage": "train", "split": "train", "epoch": 1, "step": 1, "loss": 0.5})
    from mlflow.telemetry import get_telemetry_client
    print("telemetry", get_telemetry_client())
"""


def row(step: int, **values: Any) -> dict[str, Any]:
    return {"stage": "train", "split": "train", "epoch": 1, "step": step} | (values or {"loss": 1 / (step + 1)})


def read(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def steps(folder: Path) -> list[int]:
    return [entry["step"] for entry in read(folder)]


def test_rows_are_on_disk_at_once_and_plain(tmp_path: Path) -> None:
    log = RunLog(tmp_path, FILES_ONLY, "run", {})
    log.log(row(7, loss=torch.tensor(0.25), accuracy=0.5, bad=float("nan"), worse=float("inf"), where=Path("a")))
    expected = {"stage": "train", "split": "train", "epoch": 1, "step": 7, "loss": 0.25, "accuracy": 0.5}
    assert read(tmp_path) == [expected | {"bad": None, "worse": None, "where": "a"}]
    log.close()
    log.close()
    assert log.rows == 1


def test_resume_drops_what_the_checkpoint_had_not_seen(tmp_path: Path) -> None:
    with RunLog(tmp_path, FILES_ONLY, "run", {}) as log:
        for step in range(3):
            log.log(row(step))
        seen = log.rows
        log.log(row(3))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "tra')  # the process died while it wrote
    with RunLog(tmp_path, FILES_ONLY, "run", {}, rows=seen) as log:
        log.log(row(3))
    assert steps(tmp_path) == [0, 1, 2, 3]
    with RunLog(tmp_path, FILES_ONLY, "run", {}) as log:
        log.log(row(0))
    assert steps(tmp_path) == [0]


def test_a_file_shorter_than_its_checkpoint_is_told(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row(0)) + "\n" + '{"cut')
    with pytest.warns(UserWarning, match="holds 1 of the 5 rows"), RunLog(tmp_path, FILES_ONLY, "r", {}, rows=5) as log:
        log.log(row(1))
    assert steps(tmp_path) == [0, 1] and log.rows == 2


def test_a_full_disk_costs_a_warning_and_no_row(tmp_path: Path) -> None:
    log = RunLog(tmp_path, FILES_ONLY, "run", {})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, hard))  # so that a write ends in the middle of a line
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for step in range(5):
                log.log(row(step))
            log.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [str(w.message) for w in caught] == ["metrics.jsonl cannot be written: File too large"]
    assert (tmp_path / "metrics.jsonl").stat().st_size == 200
    log.close()
    assert steps(tmp_path) == [0, 1, 2, 3, 4]


def test_only_the_main_process_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with RunLog(tmp_path / "run", TrackingConfig(), "run", {}, rows=2) as log:
        log.log(row(0))
        log.flush()
        log.results = {"test/accuracy": 1.0}
    assert not (tmp_path / "run").exists()
    assert log.rows == 3, "a checkpoint has the same number in every process"


def test_without_mlflow_one_notice_and_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    tracking._mlflow_installed.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for name in ("a", "b"):
            with RunLog(tmp_path / name, TrackingConfig(), name, {}) as log:
                log.log(row(0))
    tracking._mlflow_installed.cache_clear()
    assert [str(w.message) for w in caught] == [
        "MLflow is not installed (pip install 'crossalign[tracking]'): only run folders are kept"
    ]
    assert steps(tmp_path / "a") == steps(tmp_path / "b") == [0]


def test_mlflow_is_not_imported_when_it_is_off(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from crossalign.config import TrackingConfig\n"
        "from crossalign.training.tracking import RunLog\n"
        f"RunLog(Path({str(tmp_path)!r}), TrackingConfig(mlflow=False), 'r', {{}}).close()\n"
        "assert 'mlflow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_dead_server_costs_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    config = TrackingConfig(mlflow_uri="http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with RunLog(tmp_path, config, "run", {}) as log:
            for step in range(2000):
                log.log(row(step))
            log.flush()
            log.results = {"test/accuracy": 0.5}
    told = [str(w.message) for w in caught if "MLflow" in str(w.message)]
    assert len(told) == 1 and told[0].startswith("MLflow fails, metrics.jsonl goes on: ")
    assert steps(tmp_path) == list(range(2000))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose MLflow store several processes made at once."""
    pytest.importorskip("mlflow")
    folder = tmp_path_factory.mktemp("store")
    # As on a user's machine, where MLflow's telemetry would be on.
    noticed = ("PYTEST", "CI", "GITHUB", "MLFLOW", "DO_NOT")
    variables = {name: value for name, value in os.environ.items() if not name.startswith(noticed)}
    command = [sys.executable, "-c", WORKER, str(folder)]
    workers = [
        subprocess.Popen([*command, f"w{i}"], env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for i in range(PROCESSES)
    ]
    for worker in workers:
        output, errors = worker.communicate(timeout=100)
        assert (worker.returncode, errors, output) == (0, "", "telemetry None\n")
    return folder


def run_in(store: Path, name: str) -> Any:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{store}/mlflow.db")
    return client, client.get_run((store / name / "mlflow_run.txt").read_text().strip())


def history(store: Path, name: str, key: str) -> list[tuple[int, float]]:
    client, run = run_in(store, name)
    return [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, key)]


def test_processes_that_open_one_new_store_at_once_all_succeed(store: Path) -> None:
    runs = [run_in(store, f"w{i}")[1] for i in range(PROCESSES)]
    assert len({run.info.run_id for run in runs}) == PROCESSES
    assert len({run.info.experiment_id for run in runs}) == 1
    assert all(run.info.status == "FINISHED" and run.data.metrics == {"train/train/loss": 0.5} for run in runs)


def test_mlflow_holds_settings_metrics_results_and_origin(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/pytest", "-q"])  # under xdist it is "-c"
    monkeypatch.chdir(store)
    settings = {f"loop.p{i}": i for i in range(150)} | {"a (b)=c": "x" * 7000, "../up//x": None}
    log = RunLog(store / "trial", TrackingConfig(), "trial", settings)
    for step in range(700):
        log.log(row(step, loss=1.0 + step, lr=0.1, gone=float("nan"), note="text", flag=True))
    log.results = {"test/accuracy": 0.75}
    log.status = "KILLED"
    log.close()
    (store / "child").mkdir()
    child = tracking.log_results(store / "child", TrackingConfig(), "child", {}, {"rung": 2}, parent="abc123")

    _, run = run_in(store, "trial")
    assert history(store, "trial", "train/train/loss") == [(step, 1.0 + step) for step in range(700)]
    assert set(run.data.metrics) == {"train/train/loss", "train/train/lr", "test/accuracy"}
    assert run.data.metrics["test/accuracy"] == 0.75
    assert run.data.params["loop.p149"] == "149" and len(run.data.params) == 152
    assert len(run.data.params["a _b__c"]) == 6000 and run.data.params["up/x"] == "None"
    assert "mlflow.parentRunId" not in run.data.tags
    assert "pytest" in run.data.tags["mlflow.source.name"] and run.info.run_name == "trial"
    assert run.info.status == "KILLED"
    assert run.info.artifact_uri.startswith((store / "mlartifacts").as_uri()) and not (store / "mlruns").exists()
    _, run = run_in(store, "child")
    assert run.info.run_id == child and run.data.tags["mlflow.parentRunId"] == "abc123" and run.data.metrics == {"rung": 2.0}


@pytest.mark.parametrize("content", [b"", b"\xe6\xff", b"../up"])
def test_a_damaged_run_id_begins_a_new_run(store: Path, content: bytes) -> None:
    folder = store / f"damaged-{content.hex()}"
    folder.mkdir()
    (folder / "mlflow_run.txt").write_bytes(content)
    with RunLog(folder, TrackingConfig(), folder.name, {}) as log:
        log.log(row(0))
    assert history(store, folder.name, "train/train/loss") == [(0, 1.0)]


def test_a_killed_run_goes_on_in_the_same_mlflow_run_with_every_row_once(store: Path) -> None:
    killed = RunLog(store / "killed", TrackingConfig(), "killed", {})
    for step in range(6):
        killed.log(row(step))
        if step == 4:
            killed.flush()  # MLflow has rows 0 to 4; the checkpoint below has seen 3; row 5 is only in the file
    run_id = run_in(store, "killed")[1].info.run_id
    os.close(killed._file or -1)

    def expected(count: int) -> list[tuple[int, float]]:
        return [(step, 1 / (step + 1)) for step in range(count)]

    with RunLog(store / "killed", TrackingConfig(), "killed", {}, rows=3) as log:
        run = run_in(store, "killed")[1]
        assert run.info.run_id == run_id and run.info.status == "RUNNING"
        for step in range(3, 8):
            log.log(row(step))
    assert history(store, "killed", "train/train/loss") == expected(8)
    assert steps(store / "killed") == list(range(8))

    unsent = RunLog(store / "unsent", TrackingConfig(), "unsent", {})
    for step in range(4):
        unsent.log(row(step))
    os.close(unsent._file or -1)
    assert history(store, "unsent", "train/train/loss") == []
    with pytest.raises(ZeroDivisionError), RunLog(store / "unsent", TrackingConfig(), "unsent", {}, rows=4) as log:
        log.log(row(4, loss=0.2) | {"x": 1 / 0})
    assert history(store, "unsent", "train/train/loss") == expected(4)
    assert run_in(store, "unsent")[1].info.status == "FAILED"


def test_what_a_broken_store_missed_is_sent_when_it_is_back(store: Path, tmp_path: Path) -> None:
    database = tmp_path / "mlflow.db"
    database.mkdir()  # SQLite cannot open a folder
    with pytest.warns(UserWarning, match="MLflow fails"):
        log = RunLog(tmp_path / "run", TrackingConfig(), "run", {"seed": 3})
    for step in range(3):
        log.log(row(step))
    assert not (tmp_path / "run" / "mlflow_run.txt").exists()
    database.rmdir()
    shutil.copy(store / "mlflow.db", database)
    log.results = {"test/accuracy": 0.5}
    log.close()
    client, run = run_in(tmp_path, "run")
    assert [m.step for m in client.get_metric_history(run.info.run_id, "train/train/loss")] == [0, 1, 2]
    assert run.info.status == "FINISHED" and run.data.params == {"seed": "3"}
    assert run.data.metrics["test/accuracy"] == 0.5
