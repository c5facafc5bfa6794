"""A run, its resume and a search, kept by a real MLflow server on loopback that stops and starts in between."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from crossalign import adapt, tune
from crossalign.config import AdaptConfig, SearchConfig, TrackingConfig
from crossalign.runs.metrics import rows_after
from crossalign.runs.names import RunFolder
from crossalign.studies.reproduce import configured
from crossalign.training import tracking
from crossalign.training.stops import Paused

CLOCK = ("seconds", "examples_per_second")  # of a trial that a longer search trains again MLflow keeps the first
pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]


class Server:
    """``mlflow server`` over one SQLite store, at one address whenever it is up."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with closing(socket.socket()) as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        store = [
            "--backend-store-uri",
            f"sqlite:///{self.folder / 'store.db'}",
            "--artifacts-destination",
            str(self.folder / "a"),
        ]
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}
        log = (self.folder / "server.log").open("ab")
        self.process = subprocess.Popen(
            [*command, *store], env=os.environ | quiet, stdout=log, stderr=log, start_new_session=True, cwd=self.folder
        )
        until = time.monotonic() + 120
        while time.monotonic() < until:
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=2) as answer:
                    if answer.status == 200:
                        return
            except OSError:
                time.sleep(0.3)
            assert self.process.poll() is None, (self.folder / "server.log").read_text()[-2000:]
        raise AssertionError((self.folder / "server.log").read_text()[-2000:])

    def stop(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)  # the worse end of the two
            self.process.wait()
            self.process = None


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    pytest.importorskip("mlflow")
    (tmp_path / "server").mkdir()
    server = Server(tmp_path / "server")
    server.start()
    yield server
    server.stop()


@pytest.fixture
def tiny(tmp_path: Path, tiny_llama: Path) -> tuple[str, ...]:
    rng = np.random.default_rng(0)
    for name, low in (("dark", 0), ("light", 40)):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i in range(30):
            pixels = rng.integers(low, low + 200, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pictures" / name / f"{i}.png")
    return (
        f"backbone.ref={tiny_llama}",
        f"data.source={tmp_path / 'pictures'}",
        "data.channels=rgb",
        "embedder.patch=4",
        "loop.epochs=4",
        "loop.batch_size=10",
        "loop.precision=fp32",
        "loop.log_every=1",
        "loop.device=cpu",
        "align.metric=none",
    )


def sent(client: Any, folder: Path) -> tuple[Any, dict[str, list[tuple[int, float]]]]:
    """A folder's MLflow run, and the history of each of its metrics."""
    run = client.get_run((folder / "mlflow_run.txt").read_text().strip())
    return run, {
        key: [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, key)]
        for key in run.data.metrics
        if key.count("/") == 2 and not key.endswith(CLOCK)
    }


def kept(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The same as metrics.jsonl has it, which is the truth."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for *_, row in rows_after(RunFolder(folder).metrics, 0):
        for key, value in row.items():
            if key not in tracking.PLACES and isinstance(value, int | float) and not key.endswith(CLOCK):
                curves.setdefault(f"{row['stage']}/{row['split']}/{key}", []).append((row["step"], float(value)))
    return curves


def test_a_server_that_comes_and_goes_has_every_row_once(
    server: Server, tiny: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    monkeypatch.setattr(tracking, "RETRY_SECONDS", 0.0)
    settings = (*tiny, f"tracking.mlflow_uri={server.url}", "tracking.experiment=trust")

    def config(name: str) -> AdaptConfig:
        made: AdaptConfig = configured("small-fpt", settings)
        made.output = tmp_path / name
        return made

    # A run that pauses with the server up, goes on while it is away, and ends when it is back.
    with pytest.raises(Paused):
        adapt(config("run"), quiet=True, until=1)
    server.stop()
    with pytest.warns(UserWarning, match="MLflow fails"), pytest.raises(Paused):
        adapt(config("run"), quiet=True, until=3)
    server.start()
    adapt(config("run"), quiet=True)
    client = MlflowClient(tracking_uri=server.url)
    run, curves = sent(client, tmp_path / "run")
    assert run.info.status == "FINISHED" and run.data.metrics["test/accuracy"] >= 0
    assert curves == kept(tmp_path / "run") and len(curves["train/train_step/loss"]) == 4 * 4
    assert run.data.params["loop.epochs"] == "4"

    # The search: its own run with one of each trial below it, with the server killed and started anew between two calls.
    space = tmp_path / "space.yaml"
    space.write_text("optim.lr: {low: 1.0e-4, high: 1.0e-2, log: true}\n")
    uri = TrackingConfig(mlflow_uri=server.url, experiment="trust")
    search = {"recipe": "small-fpt", "rungs": 2, "seeds": 1, "threads": 1, "space": str(space), "tracking": uri, "set": tiny}
    assert not tune(SearchConfig(trials=2, output=tmp_path / "search", **search))
    server.stop()
    server.start()
    assert not tune(SearchConfig(trials=4, output=tmp_path / "search", **search))
    experiment = client.get_experiment_by_name("trust")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], max_results=100)
    folders = sorted(file.parent for file in (tmp_path / "search").rglob("mlflow_run.txt"))
    assert len(runs) == len({run.info.run_id for run in runs}) == 1 + len(folders)
    children = 0
    for folder in folders:
        run, curves = sent(client, folder)
        children += "mlflow.parentRunId" in run.data.tags
        assert run.info.lifecycle_stage == "active" and run.info.status != "RUNNING"
        if (folder / "metrics.jsonl").exists():
            assert curves == kept(folder)
    assert children == len(folders) - 1
