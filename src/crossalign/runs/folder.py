"""A run folder: opened fresh or to be resumed, locked against a second process, with its facts written down."""

from __future__ import annotations

import dataclasses
import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import yaml

from crossalign.config import flatten, to_dict, update
from crossalign.core import reading
from crossalign.core.errors import UserError
from crossalign.core.files import atomic_path
from crossalign.core.machine import is_main_process
from crossalign.core.reading import read_yaml
from crossalign.runs.names import RunFolder

C = TypeVar("C")
NOT_COMPARED = ("output", "overwrite", "tracking")
MEASURED = ("row", "data.mean", "data.std", "loop.device", "loop.precision", "loop.compile")  # left open, a run fills them in


class InUse(UserError):
    """Another process is running in the folder."""


def claim_folder(config: C) -> C:
    """Look into ``config.output``, which the caller has locked, and return the configuration to run with.

    A folder that holds the same configuration is resumed: settings that were ``auto`` or measured keep what the first call
    resolved them to. Nothing that crossalign did not write is ever deleted.

    Raises:
        UserError: the folder holds another configuration; the differing settings are named.
    """
    folder: Path = config.output  # type: ignore[attr-defined]
    file = RunFolder(folder).config
    if file.is_file():
        saved = read_yaml(file)
        differing = [f"{key} is {old!r} there and {new!r} here" for key, old, new in differences(config, saved)]
        if differing and config.overwrite:  # type: ignore[attr-defined]
            for name in RunFolder.names() if is_main_process() else ():
                path = folder / name
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            return config
        if differing:
            raise UserError(
                f"{folder} holds a run of another configuration ({'; '.join(differing[:4])}): "
                "choose another --output, or --overwrite to delete that run"
            )
        return update(config, {k: v for k, v in saved.items() if k not in NOT_COMPARED})
    return config


def write_config(folder: Path, config: Any, name: str = RunFolder.config.name, without: tuple[str, ...] = ()) -> None:
    """Write the resolved configuration as config.yaml, ``without`` some of its keys."""
    with atomic_path(folder / name) as temporary:
        left_out = {"overwrite", *without}  # the first is no property of the run
        values = {key: value for key, value in to_dict(config).items() if key not in left_out}
        temporary.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")


def read_config(config: C, file: Path) -> C:
    """``config`` with the values of a config.yaml put in.

    Raises:
        UserError: no such file, no YAML, or a key that the configuration does not have.
    """
    return update(config, read_yaml(file, remedy="give the config.yaml of a run", title=f"--config {file}"))


@contextmanager
def locked(folder: Path, mark: str = RunFolder.config.name) -> Iterator[None]:
    """Make a run folder if need be and keep a second process out; a distributed run holds the lock through rank 0.

    ``mark`` is the file by which a folder that is not empty is known to be ours.

    Raises:
        UserError: another process is running there, or the folder holds something that is no run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    main = is_main_process()
    if main and not (folder / mark).exists() and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise UserError(f"{folder} is not empty and not a run folder: choose another --output")
    if not main:
        yield
        return
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InUse(f"another process is running in {folder}: wait for it, or choose another --output") from error
        yield


def read_json(file: Path, absent: Any = None) -> Any:
    """A JSON file that crossalign wrote, or ``absent`` where that is given and there is none."""
    if absent is not None and not file.is_file():
        return absent
    return reading.read_json(file, object)


def differences(config: Any, saved: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Settings in which ``config`` differs from a saved one, as (key, saved value, own value)."""
    asked = flatten({k: v for k, v in to_dict(config).items() if k not in NOT_COMPARED})
    old = flatten(saved)
    return [
        (key, old[key], value)
        for key, value in asked.items()
        if key in old and old[key] != value and not (key in MEASURED and value in ("auto", None, ""))
    ]


def resolved(config: C, **sections: dict[str, Any]) -> C:
    """``config`` with resolved values put into its sections: ``resolved(c, loop={"precision": "bf16"})``."""
    changes = {name: dataclasses.replace(getattr(config, name), **values) for name, values in sections.items()}
    return dataclasses.replace(config, **changes)  # type: ignore[type-var]
