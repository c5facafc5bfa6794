"""Reading run folders and study folders, as they lie on disk: whole, unfinished or damaged."""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crossalign.core.errors import UserError
from crossalign.core.reading import parse_json, read_json, read_yaml, shown
from crossalign.core.refs import Ref
from crossalign.runs.evaluations import Evaluation, read_columns, read_evaluation
from crossalign.runs.names import RunFolder, SearchFolder, StudyFolder
from crossalign.runs.schema import CONFIG, ENVIRONMENT, ROW, STUDY, SWEEP, Shape, read_result, read_shaped, shaped
from crossalign.runs.search import SearchRecord, read_search

SKIPPED = {"checkpoints", "model", "mlruns", "mlartifacts", "sweep", "__pycache__"}
"""Folders that are not searched for runs: parts of a run, and a study's sweep, which sweep.json stands for."""
RESTORE = "restore or delete it"
LEFT_OUT = "Left out: "


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
        return shown((self.result or {}).get("row") or self.config.get("row") or self.folder.name)

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
        return [shown(name) for name in (self.result or {}).get("classes") or []]

    @cached_property
    def predictions(self) -> Predictions | None:
        """The test set's predictions in the order of their index; None where absent, None and a note where damaged."""
        columns = self.columns(RunFolder.predictions.name, ("index", "label", "predicted"))
        if columns is None:
            return None
        try:
            index, label, predicted = (np.asarray(columns[key], np.int64) for key in ("index", "label", "predicted"))
            confidence = np.asarray(columns.get("confidence", np.full(len(index), np.nan)), np.float64)
        except (TypeError, ValueError, OverflowError):
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
    notes: list[str] = field(default_factory=list)
    """Sentences on what was damaged and is left out."""

    @contextmanager
    def leaving_out(self, run: Run | None = None) -> Iterator[None]:
        """Reading a part of the study: where that is damaged, it is left out, with a note; and so is the ``run``."""
        try:
            yield
        except UserError as error:
            self.notes.append(f"{LEFT_OUT}{error}.")
            self.runs = [other for other in self.runs if other is not run]

    def check(self) -> None:
        """Raise UserError where it holds nothing, or nothing that could be read."""
        if not self.runs and not self.searches:
            text = "no run to report; name at least one run folder, or a folder that holds some"
            raise UserError(self.notes[0].removeprefix(LEFT_OUT).removesuffix(".") if self.notes else text)

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

    Runs of a winner whom a longer search has overtaken are left out; so is what is damaged, with a note.

    Raises:
        UserError: a path that is no folder or holds neither run nor search; or all that they hold is damaged.
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
                skipped = {SearchFolder.trials.name}  # the record tells of them
                with study.leaving_out():
                    search = read_search(SearchFolder(folder).record)
                    if search.overtaken:
                        skipped.add(SearchFolder.winner.name)
                    if folder.resolve() not in seen:
                        seen.add(folder.resolve())
                        study.searches.append(search)
                folders[:] = [name for name in folders if name not in skipped]
                continue
            if _is_run(files):
                count += 1
                folders.clear()  # what lies in a run belongs to it
                if folder.resolve() not in seen:
                    seen.add(folder.resolve())
                    with study.leaving_out():
                        study.runs.append(read_run(folder))
        if not count:
            raise UserError(f"no run in '{path}': no folder under it has a result.json, metrics.jsonl or config.yaml")
    study.check()
    return study


def _is_run(files: list[str]) -> bool:
    """Whether a folder of these files is that of a run, be it unfinished."""
    begun = {RunFolder.config.name, RunFolder.environment.name}
    return RunFolder.result.name in files or RunFolder.metrics.name in files or begun <= set(files)


def _add_study_files(study: Study, folder: Path, files: list[str]) -> None:
    """Put what the files of a study say, where the folder has them, into ``study``."""
    if StudyFolder.study.name in files:
        with study.leaving_out():
            facts = read_study(folder)
            study.titles[folder] = str(facts.get("title") or ""), str(facts.get("note") or "")
            study.rows += [str(row) for row in facts.get("rows") or [] if str(row) not in study.rows]
            study.commands += [str(line) for line in facts.get("commands") or [] if str(line) not in study.commands]
    if StudyFolder.sweep.name in files:
        with study.leaving_out():
            study.sweep += [{**entry, "study": folder.name} for entry in read_sweep(folder)]


def read_study(folder: Path) -> dict[str, Any]:
    """What a study's study.json says; nothing where there is none. Raises UserError where it is damaged."""
    file = StudyFolder(folder).study
    return read_shaped(file, STUDY, RESTORE) if file.exists() else {}


def read_sweep(folder: Path) -> list[dict[str, Any]]:
    """The learning rates that a study's sweep.json lists; none where there is none. Raises UserError where it is damaged."""
    file = StudyFolder(folder).sweep
    return read_shaped(file, SWEEP, RESTORE) if file.exists() else []


def read_run(folder: Path) -> Run:
    """One run folder, whole or unfinished.

    Raises:
        UserError: a result.json that is damaged or lacks what a finished run states.
    """
    files = RunFolder(folder)
    run = Run(folder, read_result(files.result) if files.result.exists() else None, {}, {}, [])
    run.config = _read_facts(files.config, read_yaml, CONFIG, "the settings", run.notes)
    run.environment = _read_facts(files.environment, read_json, ENVIRONMENT, "hardware, command and commit", run.notes)
    run.metrics = read_metrics(files.metrics, run.notes)
    return run


def _read_facts(path: Path, read: Callable[[Path], Any], shape: Shape, unknown: str, notes: list[str]) -> dict[str, Any]:
    """What a side file of a run says; nothing, and a note that it is ``unknown``, where it is missing or damaged."""
    try:
        return shaped(read(path), shape, path)  # type: ignore[no-any-return]
    except UserError:
        notes.append(f"{path} is missing or damaged: {unknown} of this run are unknown")
        return {}


def read_metrics(path: Path, notes: list[str]) -> list[dict[str, Any]]:
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
            row = shaped(parse_json(line, str(path), ""), ROW, path)
        except UserError:
            broken += 1
            continue
        rows[tuple(str(row.get(key)) for key in ("stage", "split", "epoch", "step"))] = row
    if broken:
        notes.append(f"{path}: {broken} broken line{'s' if broken > 1 else ''} (a process killed in mid-write) left out")
    return list(rows.values())
