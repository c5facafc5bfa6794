"""Reading run folders and study folders, as they lie on disk: whole, unfinished or damaged."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crossalign.core.errors import UserError
from crossalign.core.reading import parse_json, read_json, read_yaml
from crossalign.core.refs import Ref
from crossalign.runs.evaluations import Evaluation, read_columns, read_evaluation
from crossalign.runs.names import RunFolder, SearchFolder, StudyFolder
from crossalign.runs.search import SearchRecord, read_search

SKIPPED = {"checkpoints", "model", "mlruns", "mlartifacts", "sweep", "__pycache__"}
"""Folders that are not searched for runs: parts of a run, and a study's sweep, which sweep.json stands for."""


@dataclass(frozen=True)
class Predictions:
    """What a model said of its test images, in the order of ``index``; all arrays are (n,)."""

    index: NDArray[np.int64]
    label: NDArray[np.int64]
    predicted: NDArray[np.int64]
    confidence: NDArray[np.float64]
    """NaN where the file leaves it out, as archived runs may: it is four fifths of the size."""

    @property
    def correct(self) -> NDArray[np.bool_]:
        return np.asarray(self.label == self.predicted)

    @cached_property
    def images(self) -> str:
        """A hash of the test set: the same where the indices and their labels are."""
        return hashlib.sha256(self.index.tobytes() + self.label.tobytes()).hexdigest()


@dataclass(frozen=True)
class Sample:
    """One test image with what the model said of it; ``png`` is the file's bytes."""

    png: bytes
    label: str
    predicted: str
    confidence: float


@dataclass
class Run:
    """One run folder. ``result`` is None where the run did not finish."""

    folder: Path
    result: dict[str, Any] | None
    config: dict[str, Any]
    environment: dict[str, Any]
    metrics: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)
    """Sentences about files of this run that could not be read whole."""

    @property
    def name(self) -> str:
        """The row's name; of an unfinished run, what its configuration or its folder calls it."""
        return str((self.result or {}).get("row") or self.config.get("row") or self.folder.name)

    @property
    def seed(self) -> int:
        return int((self.result or self.config).get("seed", 0))

    def text(self, key: str) -> str:
        """A top-level text of result.json; empty where absent."""
        return str((self.result or {}).get(key) or "")

    def number(self, *keys: str) -> float:
        """A number in result.json, by path; NaN where absent or null."""
        value: Any = self.result or {}
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return float(value) if isinstance(value, int | float) else float("nan")

    @property
    def backbone(self) -> str:
        """The backbone's reference without the prefix of a control, so that controls meet their original."""
        return Ref(self.text("backbone")).base

    def columns(self, file: str, wanted: Iterable[str]) -> dict[str, list[Any]] | None:
        """Columns of a parquet file in the folder; None where it is absent, or damaged, with a note."""
        try:
            return read_columns(self.folder / file, wanted)
        except UserError as error:
            self.notes.append(f"{error} and is left out")
            return None

    @property
    def classes(self) -> list[str]:
        return [str(name) for name in (self.result or {}).get("classes") or []]

    @cached_property
    def predictions(self) -> Predictions | None:
        """The test set's predictions in the order of their index; None where absent, None and a note where damaged."""
        columns = self.columns(RunFolder.predictions.name, ("index", "label", "predicted"))
        if columns is None:
            return None
        try:
            index, label, predicted = (np.asarray(columns[key], np.int64) for key in ("index", "label", "predicted"))
            confidence = np.asarray(columns.get("confidence", np.full(len(index), np.nan)), np.float64)
        except (TypeError, ValueError):
            self.notes.append(f"{RunFolder(self.folder).predictions} has other values than numbers and is left out")
            return None
        order = np.argsort(index, kind="stable")
        read = Predictions(index[order], label[order], predicted[order], confidence[order])
        share = float(read.correct.mean()) if len(index) else float("nan")
        if abs(share - self.number("test", "accuracy")) > 1e-4:
            stated = f"{100 * self.number('test', 'accuracy'):.2f}"
            self.notes.append(f"{self.folder}/predictions.parquet has {100 * share:.2f} % right, result.json says {stated} %")
        return read

    @cached_property
    def samples(self) -> list[Sample]:
        """A few test images as PNG; what is no PNG, or has no confidence, is left out."""
        names = "png", "label", "predicted", "confidence"
        columns = self.columns(RunFolder.samples.name, names)
        rows = zip(*(columns[name] for name in names), strict=True) if columns else ()
        return [
            Sample(png, str(label), str(predicted), float(confidence))
            for png, label, predicted, confidence in rows
            if isinstance(png, bytes) and png.startswith(b"\x89PNG") and isinstance(confidence, float)
        ]

    @cached_property
    def evaluation(self) -> Evaluation | None:
        """Scores of tasks and answers by document; None where the run was not evaluated."""
        return read_evaluation(self.folder)

    def series(self, stage: str, split: str, key: str, over: str = "epoch") -> dict[float, float]:
        """A curve: the mean of ``key`` over each epoch's, or step's, rows; alignment's health starts at 0, before it began."""
        by_epoch: dict[float, list[float]] = {}
        for row in self.metrics:
            value = row.get(key)
            if row.get("stage") == stage and row.get("split") == split and isinstance(value, int | float):
                by_epoch.setdefault(float(row.get(over, 0)), []).append(float(value))
        before = ((self.result or {}).get("alignment") or {}).get("before") or {}
        if stage == "align" and split == "validation" and key in before:
            by_epoch.setdefault(0.0, [float(before[key])])
        return {epoch: float(np.mean(values)) for epoch, values in sorted(by_epoch.items())}


@dataclass
class Study:
    """Runs that are reported together, with what their study folders say of them."""

    titles: dict[Path, tuple[str, str]] = field(default_factory=dict)
    """Title and note of each study, by its folder."""
    rows: list[str] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    sweep: list[dict[str, Any]] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    searches: list[SearchRecord] = field(default_factory=list)

    @property
    def title(self) -> str:
        return "; ".join(dict.fromkeys(title for title, _ in self.titles.values() if title))

    @property
    def note(self) -> str:
        """A line a study that says something, with its name where there are several."""
        notes = [(folder.name, note) for folder, (_, note) in self.titles.items() if note]
        return "\n".join(f"{name}: {note}" if len(notes) > 1 else note for name, note in notes)

    @property
    def complete(self) -> list[Run]:
        return [run for run in self.runs if run.result is not None]

    @property
    def incomplete(self) -> list[Run]:
        return [run for run in self.runs if run.result is None]


def open_study(paths: Iterable[Path]) -> Study:
    """Every run at or under ``paths``, at any depth; a folder named ``sweep``, or a search's ``trials``, only if named itself.

    Runs of a winner whom a longer search has overtaken are left out.

    Raises:
        UserError: a path that is no folder or holds neither run nor search, or a damaged result.json, study.json, sweep.json or
            search.json.
    """
    study, seen = Study(), set()
    for path in paths:
        if not path.is_dir():
            raise UserError(f"no run folder at '{path}'; name a folder that crossalign wrote a run into")
        count = 0
        for root, folders, files in os.walk(path):
            folders[:] = sorted(name for name in folders if name not in SKIPPED and not name.startswith("."))
            folder = Path(root)
            if RunFolder.measurement.name in files:  # a measurement has a page of its own
                folders.clear()
                continue
            _add_study_files(study, folder, files)
            if SearchFolder.record.name in files:
                count += 1
                search = read_search(SearchFolder(folder).record)
                skipped = {SearchFolder.trials.name}  # the record tells of them
                if search.overtaken:
                    skipped.add(SearchFolder.winner.name)
                folders[:] = [name for name in folders if name not in skipped]
                if folder.resolve() not in seen:
                    seen.add(folder.resolve())
                    study.searches.append(search)
                continue
            if _is_run(files):
                count += 1
                folders.clear()  # what lies in a run belongs to it
                if folder.resolve() not in seen:
                    seen.add(folder.resolve())
                    study.runs.append(read_run(folder))
        if not count:
            raise UserError(f"no run in '{path}': no folder under it has a result.json, metrics.jsonl or config.yaml")
    if not study.runs and not study.searches:
        raise UserError("no run to report; name at least one run folder, or a folder that holds some")
    return study


def _is_run(files: list[str]) -> bool:
    """Whether a folder of these files is that of a run, be it unfinished."""
    begun = {RunFolder.config.name, RunFolder.environment.name}
    return RunFolder.result.name in files or RunFolder.metrics.name in files or begun <= set(files)


def _add_study_files(study: Study, folder: Path, files: list[str]) -> None:
    """Put what the files of a study say, where the folder has them, into ``study``."""
    if StudyFolder.study.name in files:
        facts = _read_json(StudyFolder(folder).study, dict)
        study.titles[folder] = str(facts.get("title") or ""), str(facts.get("note") or "")
        study.rows += [str(row) for row in facts.get("rows") or [] if str(row) not in study.rows]
        study.commands += [str(line) for line in facts.get("commands") or [] if str(line) not in study.commands]
    if StudyFolder.sweep.name in files:
        entries = _read_json(StudyFolder(folder).sweep, list)
        study.sweep += [{**entry, "study": folder.name} for entry in entries if isinstance(entry, dict)]


def read_run(folder: Path) -> Run:
    """One run folder, whole or unfinished.

    Raises:
        UserError: a result.json that is damaged or lacks what a finished run states.
    """
    result = None
    path = RunFolder(folder).result
    if path.is_file():
        result = _read_json(path, dict)
        wanted = ("row", "seed") if "outcomes" in result else ("row", "seed", "test")
        missing = [key for key in wanted if key not in result]
        if not missing and result.get("test") is not None and "outcomes" not in result and "accuracy" not in result["test"]:
            missing = ["test.accuracy"]  # test is null where it was not scored, as in a sweep
        if missing:
            raise UserError(f"{path} has no '{missing[0]}'; it isn't the result of a finished run")
        if not isinstance(result["seed"], int):
            raise UserError(f"{path} has seed {result['seed']!r}, which is no whole number; run it again")
    run = Run(folder, result, {}, {}, [])
    files = RunFolder(folder)
    run.config = _read_facts(files.config, read_yaml, "the settings", run.notes)
    run.environment = _read_facts(files.environment, read_json, "hardware, command and commit", run.notes)
    run.metrics = _read_metrics(files.metrics, run.notes)
    return run


def _read_json(path: Path, kind: type) -> Any:
    return read_json(path, kind, "restore it, or delete it and run that run again")


def _read_facts(path: Path, read: Callable[[Path], Any], unknown: str, notes: list[str]) -> dict[str, Any]:
    """What a side file of a run says; nothing, and a note that it is ``unknown``, where it is missing or damaged."""
    try:
        return dict(read(path))
    except UserError:
        notes.append(f"{path} is missing or damaged: {unknown} of this run are unknown")
        return {}


def _read_metrics(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl.

    A process killed in mid-write leaves a broken line: it is counted and left out. A resumed run repeats the steps
    since its checkpoint: of rows for one step the later stands.
    """
    if not path.is_file():
        return []
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    broken = 0
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        if not line.strip():
            continue
        try:
            row = parse_json(line, str(path), "")
        except UserError:
            broken += 1
            continue
        if isinstance(row, dict):
            rows[tuple(str(row.get(key)) for key in ("stage", "split", "epoch", "step"))] = row
    if broken:
        notes.append(f"{path}: {broken} broken line{'s' if broken > 1 else ''} (a process killed in mid-write) left out")
    return list(rows.values())
