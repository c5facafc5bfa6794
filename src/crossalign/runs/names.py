"""What lies where: the files of a run, a study and a search, each by the one name that it has on disk."""

from __future__ import annotations

from pathlib import Path
from typing import overload

from crossalign.core.errors import UserError


class Name:
    """A file or folder inside another; read from a folder it is the path there, read from the class its name."""

    def __init__(self, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, folder: None, owner: type) -> Name: ...

    @overload
    def __get__(self, folder: Folder, owner: type) -> Path: ...

    def __get__(self, folder: Folder | None, owner: type) -> Name | Path:
        return self if folder is None else folder.path / self.name


class Folder:
    """A folder whose contents have names."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def names(cls) -> list[str]:
        """Of all that crossalign writes there."""
        return [entry.name for entry in vars(cls).values() if isinstance(entry, Name)]

    def refuse_links(self) -> None:
        """Raise UserError where something that crossalign writes there is a symbolic link: it would write elsewhere."""
        for path in (self.path / name for name in self.names()):
            if path.is_symlink():
                raise UserError(
                    f"'{path}' is a symbolic link, through which nothing is written: put there what it leads to, or remove it"
                )


class RunFolder(Folder):
    """One run, of any verb."""

    environment = Name("environment.json")
    metrics = Name("metrics.jsonl")
    result = Name("result.json")
    alignment = Name("alignment.json")
    predictions = Name("predictions.parquet")
    samples = Name("samples.parquet")
    mlflow_run = Name("mlflow_run.txt")
    report = Name("report.html")
    checkpoints = Name("checkpoints")
    snapshots = Name("snapshots")
    """Models that were kept during training, named step-0000100 and so on."""
    model = Name("model")
    evaluation = Name("evaluation")
    measurement = Name("measure.json")
    measure_page = Name("measure.md")
    scores = Name("scores.safetensors")
    figures = Name("figures")
    config = Name("config.yaml")
    """The last, by which the folder is known as a run's while the others are deleted."""


class EvaluationFolder(Folder):
    """The scores of one model on tasks."""

    results = Name("results.json")
    samples = Name("samples")
    before = Name("before")
    """The same of the language model that a classifier was made from."""


class StudyFolder(Folder):
    """Runs that belong to one table."""

    study = Name("study.json")
    sweep = Name("sweep.json")
    sweep_runs = Name("sweep")


class SearchFolder(Folder):
    """A search over settings."""

    settings = Name("search.yaml")
    record = Name("search.json")
    journal = Name("journal.log")
    token = Name("search.id")
    """What tells this search's folder from another host's of the same name."""
    trials = Name("trials")
    winner = Name("winner")
    winner_config = Name("winner.yaml")
