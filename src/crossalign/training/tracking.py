"""The record of a run: metrics.jsonl, which is the truth, and an MLflow run that follows it."""

from __future__ import annotations

import functools
import importlib.util
import json
import logging
import math
import os
import re
import sqlite3
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

from filelock import FileLock

from crossalign.config import TrackingConfig
from crossalign.core.errors import first_line
from crossalign.core.files import write_text
from crossalign.core.machine import command_line, git_state, is_main_process
from crossalign.core.reading import read_word, without_login
from crossalign.results.outcomes import VALIDATION
from crossalign.runs.metrics import Row, keep_rows, now, plain, rows_after
from crossalign.runs.names import RunFolder

if TYPE_CHECKING:
    from mlflow import MlflowClient

Status = Literal["RUNNING", "SCHEDULED", "FINISHED", "FAILED", "KILLED"]

METRICS_FILE = RunFolder.metrics.name

# MLflow takes 1000 metrics, parameters and tags in a call; the last place is for the tag that counts the rows it has.
METRICS_PER_CALL = 999
VALUE_LENGTH = 6000
TAG_LENGTH = 8000
KEY_LENGTH = 250
ROWS_TAG = "crossalign.rows"
SEND_SECONDS = 30.0
RETRY_SECONDS = 600.0
# These place a row; everything else in it was measured.
PLACES = ("stage", "split", "step", "epoch")


class RunLog:
    """Writes rows of metrics to ``folder/metrics.jsonl`` at once, and to MLflow in batches.

    Only the main process writes; in the others every method does nothing. Trouble with MLflow (not installed, server
    gone, database locked, disk full) costs one warning, never the training: what MLflow missed is sent later, when
    the run closes or is next resumed. A run that ends while MLflow is away is not sent again: its folder has all.

    Args:
        folder: the run folder. MLflow's local store lies beside it: ``mlflow.db`` and ``mlartifacts``.
        config: whether and where to use MLflow.
        run_name: MLflow's name of the run.
        params: flat settings for MLflow; values are cut to 6000 characters.
        rows: ``rows`` as the checkpoint being resumed had it; later rows are dropped, so that no step is there twice.
            0 starts the file anew.

    As a context manager it ends the run as FINISHED, as FAILED after an exception, as KILLED after Ctrl-C or an exit,
    or as its ``status`` says, where that was set.
    """

    def __init__(self, folder: Path, config: TrackingConfig, run_name: str, params: Mapping[str, Any], rows: int = 0) -> None:
        self.rows = rows
        self.status: Status | None = None
        self.results: Mapping[str, float] = {}
        """Final ones, such as ``{"test/accuracy": 0.61}``, for MLflow to show."""
        self._file: int | None = None
        self._unwritten = b""
        self._warned = False
        self._mirror: _Mirror | None = None
        if not is_main_process():
            return
        folder.mkdir(parents=True, exist_ok=True)
        path = RunFolder(folder).metrics
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o666)
        self.rows = keep_rows(path, rows)
        if self.rows < rows:
            warnings.warn(f"{path} holds {self.rows} of the {rows} rows that the checkpoint had seen", stacklevel=2)
        if config.mlflow and _mlflow_installed():
            self._mirror = _Mirror(folder, config, run_name, params)
            self._mirror.send()

    def log(self, row: Mapping[str, Any]) -> None:
        """Append one flat row: "stage", "split", "epoch", "step" and what was measured there.

        Values are plain, or tensors and arrays of one element. One that is not finite becomes null, since JSON has
        no word for it, and MLflow does not get it.
        """
        number, self.rows = self.rows, self.rows + 1
        if self._file is None:
            return
        values = {key: plain(value) for key, value in row.items()}
        self._unwritten += (json.dumps(values, ensure_ascii=False, allow_nan=False) + "\n").encode()
        self._write()
        if self._mirror:
            self._mirror.add(number, values)

    def flush(self) -> None:
        """Bring every row to the disk and to MLflow; call it with each checkpoint."""
        if self._file is not None:
            self._write(sync=True)
        if self._mirror:
            self._mirror.send()

    def close(self) -> None:
        """Send what waits and end the run; a second call does nothing."""
        if self._file is not None:
            self._write(sync=True)
            os.close(self._file)
            self._file = None
        if self._mirror:
            self._mirror.end(self.status or "FINISHED", self.results)
            self._mirror = None

    def _write(self, sync: bool = False) -> None:
        """Write what waits. A full disk costs a warning, and the rows stay in memory until there is room."""
        assert self._file is not None
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[os.write(self._file, self._unwritten) :]
            if sync:
                os.fsync(self._file)
        except OSError as error:
            if not self._warned:
                self._warned = True
                warnings.warn(f"{METRICS_FILE} cannot be written: {error.strerror}", stacklevel=3)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is not None and self.status is None:
            self.status = "FAILED" if issubclass(kind, Exception) else "KILLED"
        self.close()


def summary(result: Mapping[str, Any]) -> dict[str, float]:
    """What MLflow shows of a finished run: its numbers of the test set and of texts, and every outcome that it states."""
    places = {"test": result.get("test") or {}} | result.get("scores", {})
    values = {f"{prefix}/{name}": value for prefix, numbers in places.items() for name, value in numbers.items()}
    compared = (entry for entry in result.get("outcomes", ()) if entry.get("family") != VALIDATION)
    values |= {f"outcome/{entry['name']}": entry.get("value") for entry in compared}
    return {name: value for name, value in values.items() if isinstance(value, float)}


def log_results(
    folder: Path,
    config: TrackingConfig,
    run_name: str,
    params: Mapping[str, Any],
    values: Mapping[str, float],
    status: Status = "FINISHED",
    parent: str = "",
) -> str:
    """Bring a folder's MLflow run, or a new one, up to date with its metrics and ``values``; trouble costs one warning.

    For results that came after training, and for runs that another process trains. Returns the id of the MLflow run, or "",
    which is the ``parent`` of the runs that are its trials.
    """
    if not (config.mlflow and _mlflow_installed()):
        return ""
    mirror = _Mirror(folder, config, run_name, params, parent)
    mirror.end(status, values)
    return mirror.run_id


class _Mirror:
    """An MLflow run that follows the rows of a metrics file.

    Rows are numbered as in the file, and a tag of the run says how many it has. So a resumed run sends neither twice
    what it repeats from its checkpoint, nor forgets what was in the file but not yet sent when the process died.
    """

    def __init__(
        self, folder: Path, config: TrackingConfig, run_name: str, params: Mapping[str, Any], parent: str = ""
    ) -> None:
        self.run_id = ""
        self._connect = functools.partial(_open_run, folder, config, run_name, dict(params), parent)
        self._metrics_file = RunFolder(folder).metrics
        self._client: MlflowClient | None = None
        self._sent = 0
        self._waiting: list[tuple[int, int, Row]] = []  # row number, milliseconds since 1970, row
        self._next_send = 0.0
        self._retry_at = 0.0
        self._warned = False

    def add(self, number: int, row: Row) -> None:
        """Queue a row; send the queue when it fills a call or has waited for half a minute."""
        self._waiting.append((number, now(), row))
        full = len(self._waiting) * len(row) >= METRICS_PER_CALL
        if full or time.monotonic() >= self._next_send:
            self.send()

    def send(self) -> None:
        """Send every row that waits."""
        self._next_send = time.monotonic() + SEND_SECONDS
        self._guard(self._send)

    def end(self, status: Status, results: Mapping[str, float]) -> None:
        """Send every row that waits, and what came out in the end; say how the run stands."""

        def finish(client: MlflowClient) -> None:
            self._send(client)
            client.log_batch(self.run_id, metrics=_metrics(results, now()))
            if status in ("RUNNING", "SCHEDULED"):
                client.update_run(self.run_id, status)
            else:
                client.set_terminated(self.run_id, status)

        self._retry_at = 0.0  # the last chance: try even if the server was away a moment ago
        self._guard(finish)

    def _guard(self, action: Callable[[MlflowClient], object]) -> None:
        """Do ``action``, connecting first if need be; after a failure, warn once and leave MLflow alone for a while."""
        if time.monotonic() < self._retry_at:
            return
        try:
            if self._client is None:
                self._client, self.run_id, self._sent = self._connect()
                self._waiting = list(rows_after(self._metrics_file, self._sent))
            action(self._client)
        except Exception as error:  # whatever a tracking server does, the training goes on
            self._retry_at = time.monotonic() + RETRY_SECONDS
            if not self._warned:
                self._warned = True
                reason = without_login(first_line(error))
                warnings.warn(f"MLflow fails, {METRICS_FILE} goes on: {reason}", stacklevel=4)

    def _send(self, client: MlflowClient) -> None:
        from mlflow.entities import RunTag

        self._waiting = [item for item in self._waiting if item[0] >= self._sent]
        while self._waiting:
            metrics: list[Any] = []
            taken = 0
            for _, when, row in self._waiting:
                more = _metrics(row, when)
                if metrics and len(metrics) + len(more) > METRICS_PER_CALL:
                    break
                metrics += more
                taken += 1
            sent = self._waiting[taken - 1][0] + 1
            client.log_batch(self.run_id, metrics=metrics, tags=[RunTag(ROWS_TAG, str(sent))])
            self._sent = sent
            del self._waiting[:taken]


@functools.cache
def _mlflow_installed() -> bool:
    if importlib.util.find_spec("mlflow") is not None:
        return True
    warnings.warn("MLflow is not installed (pip install 'crossalign[tracking]'): only run folders are kept", stacklevel=3)
    return False


def _open_run(
    folder: Path, config: TrackingConfig, run_name: str, params: Mapping[str, Any], parent: str
) -> tuple[MlflowClient, str, int]:
    """Client, run id and number of rows that the run has: the folder's own run if it has one, else a new one."""
    store = config.mlflow_uri or f"sqlite:///{folder.resolve().parent / 'mlflow.db'}"
    client, experiment = _open_experiment(store, config.experiment)
    from mlflow.entities import Param
    from mlflow.exceptions import MlflowException

    id_file = RunFolder(folder).mlflow_run
    if id_file.exists() and (run_id := read_word(id_file)):
        try:
            run = client.get_run(run_id)
            if run.info.lifecycle_stage == "active":  # it was not deleted
                client.update_run(run_id, status="RUNNING")
                return client, run_id, int(run.data.tags.get(ROWS_TAG, "0"))
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":  # another store may have none of that id
                raise
    tags = {"mlflow.source.name": _cut(command_line(), TAG_LENGTH), "mlflow.source.type": "LOCAL"}
    commit, _ = git_state()
    if commit:
        tags["mlflow.source.git.commit"] = commit
    if parent:
        tags["mlflow.parentRunId"] = parent
    run_id = client.create_run(experiment, run_name=run_name, tags=tags).info.run_id
    client.log_batch(run_id, params=[Param(_clean_key(k), _cut(str(v), VALUE_LENGTH)) for k, v in params.items()])
    write_text(id_file, run_id + "\n")
    return client, run_id, 0


def _open_experiment(store: str, name: str) -> tuple[MlflowClient, str]:
    """Client of ``store`` and the id of its experiment, both made if need be, by one process at a time."""
    # MLflow reads these when it is imported. Its own patience with a dead server, four minutes a call, would stall
    # the training.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("DO_NOT_TRACK", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    from mlflow import MlflowClient

    # It tells of each new database, and prints a traceback for each error that we report in a line.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    with _alone(store) as artifacts:
        client = MlflowClient(tracking_uri=store)
        experiment = client.get_experiment_by_name(name)
        return client, experiment.experiment_id if experiment else client.create_experiment(name, artifact_location=artifacts)


@contextmanager
def _alone(store: str) -> Iterator[str | None]:
    """Hold a store that is a SQLite file, and give the place for artifacts beside it.

    Two processes that both find it empty would both make its tables, and one fail. Where SQLite cannot read or lock it, this
    fails at once: MLflow would try ten times, for a hundred seconds.
    """
    if not store.startswith("sqlite:///"):
        yield None
        return
    database = Path(store.removeprefix("sqlite:///"))
    database.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(database.with_name(f".{database.name}.lock"), timeout=120):
        with closing(sqlite3.connect(database)) as connection:
            connection.execute("PRAGMA schema_version")
            connection.execute("BEGIN IMMEDIATE")
        yield (database.resolve().parent / "mlartifacts").as_uri()


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."


def _clean_key(key: str) -> str:
    """``key`` in the characters that MLflow allows, and not readable as a path that leads elsewhere."""
    key = re.sub(r"[^\w./ -]", "_", key)
    parts = [part for part in key.split("/") if part.strip(". ")]
    return "/".join(parts)[:KEY_LENGTH].rstrip("/") or "_"


def _metrics(row: Mapping[str, Any], when: int) -> list[Any]:
    """MLflow metrics of a row, named like train/validation/accuracy; where it has no place, by its own names."""
    from mlflow.entities import Metric

    prefix = "/".join(str(row[key]) for key in ("stage", "split") if row.get(key))
    step = int(row.get("step") or 0)
    metrics = []
    for key, value in row.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and key not in PLACES and math.isfinite(value):
            metrics.append(Metric(_clean_key(f"{prefix}/{key}"), float(value), when, step))
    return metrics
