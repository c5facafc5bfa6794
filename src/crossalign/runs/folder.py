"""A run folder: opened fresh or to be resumed, locked against a second process, with its facts written down."""

import contextlib
import dataclasses
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import yaml

from crossalign.config import flatten, to_dict, update, validate
from crossalign.core.errors import UserError
from crossalign.core.files import content_key, open_lock, remove, remove_strays, write_text
from crossalign.core.machine import is_main_process
from crossalign.core.reading import read_yaml
from crossalign.core.refs import Ref
from crossalign.runs.names import RunFolder
from crossalign.runs.schema import ENVIRONMENT, read_shaped

C = TypeVar("C")
NOT_COMPARED = ("output", "overwrite", "tracking")
MEASURED = (
    "row",
    "data.image_size",
    "embedder.patch",
    "data.mean",
    "data.std",
    "loop.device",
    "loop.precision",
    "loop.compile",
)  # left open, a run fills them in


class InUse(UserError):
    """Another process is running in the folder."""


def claim_folder(config: C) -> C:
    """Look into ``config.output``, which the caller has locked, and return the configuration to run with.

    A folder that holds the same configuration is resumed: settings that were ``auto`` or measured keep what the first call
    resolved them to. Nothing is written or deleted.

    Raises:
        UserError: the folder holds another configuration, and ``config.overwrite`` does not say to replace it; the differing
            settings are named. Or its config.yaml is damaged.
    """
    folder: Path = config.output  # type: ignore[attr-defined]
    saved = saved_config(folder)
    if not saved:
        return config
    differing = [f"{key} is {old!r} there and {new!r} here" for key, old, new in differences(config, saved)]
    if not differing:
        return read_into(config, RunFolder(folder).config, {k: v for k, v in saved.items() if k not in NOT_COMPARED})
    if not config.overwrite:  # type: ignore[attr-defined]
        raise UserError(
            f"{folder} holds a run of another configuration ({'; '.join(differing[:4])}): "
            "choose another --output, or --overwrite to delete that run"
        )
    return config


def replaces(config: Any) -> bool:
    """Whether ``config`` is to take the place of a run of other settings in its folder."""
    return bool(config.overwrite and differences(config, saved_config(config.output)))


def clear_folder(folder: Path) -> None:
    """Delete what crossalign wrote of a run, and nothing else; of a link the link. Call it once nothing can fail any more."""
    for name in RunFolder.names():
        remove(folder / name)


def saved_config(folder: Path) -> dict[str, Any]:
    """The settings of the run in a folder; none where there is no run.

    Raises:
        UserError: its config.yaml is damaged.
    """
    file = RunFolder(folder).config
    return read_yaml(file, dict, "restore it, or choose another folder") if file.exists() else {}


def inputs(config: Any) -> dict[str, str]:
    """What lies where settings name files and folders: of each a hash of names, sizes and times, by the setting's name."""
    states = {}
    for name, value in flatten({k: v for k, v in to_dict(config).items() if k not in NOT_COMPARED}).items():
        for place, text in enumerate(value if isinstance(value, list) else [value]):
            with contextlib.suppress(OSError, ValueError):  # a text that is no path
                path = Path(os.path.expanduser(Ref(text).rest)) if isinstance(text, str) and text else None
                if path and path.exists():
                    states[f"{name}.{place}"] = content_key(files=sorted(_listed(path)))
    return states


def _listed(path: Path) -> Iterator[tuple[str, int, int]]:
    """Name, size and time of change of a file, or of all that lies in a folder."""
    for root, _, names in os.walk(path) if path.is_dir() else [(str(path.parent), [], [path.name])]:
        for name in names:
            with contextlib.suppress(OSError):  # a link to nothing
                state = os.stat(file := os.path.join(root, name))
                yield os.path.relpath(file, path), state.st_size, state.st_mtime_ns


def made_from(folder: Path) -> dict[str, Any]:
    """What environment.json keeps of the data of a run: its ``identity``, and ``inputs``; nothing of an earlier version."""
    file = RunFolder(folder).environment
    return read_shaped(file, ENVIRONMENT, "delete it") if file.exists() else {}


def read_into(config: C, file: Path, values: dict[str, Any]) -> C:
    """``config`` with the values of a file put in, within their bounds."""
    try:
        config = update(config, values)
        validate(config)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    return config


def write_config(folder: Path, config: Any, name: str = RunFolder.config.name, without: tuple[str, ...] = ()) -> None:
    """Write the resolved configuration as config.yaml, ``without`` some of its keys."""
    left_out = {"overwrite", *without}  # the first is no property of the run
    values = {key: value for key, value in to_dict(config).items() if key not in left_out}
    write_text(folder / name, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


def read_config(config: C, file: Path) -> C:
    """``config`` with the values of a config.yaml put in.

    Raises:
        UserError: no such file, no YAML, a key that the configuration does not have, or a value out of its bounds.
    """
    return read_into(config, file, read_yaml(file, remedy="give the config.yaml of a run", title=f"--config {file}"))


@contextmanager
def locked(folder: Path, mark: str = RunFolder.config.name) -> Iterator[None]:
    """Make a run folder if need be and keep a second process out; a distributed run holds the lock through rank 0.

    ``mark`` is the file by which a folder that is not empty is known to be ours.

    Raises:
        UserError: another process is running there, or the folder holds something that is no run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not is_main_process():
        yield
        return
    if not (folder / mark).exists() and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise UserError(f"{folder} is not empty and not a run folder: choose another --output")
    with alone(folder):
        yield


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep a second process out of a folder, made if need be, and clear what a killed one was writing there.

    Raises:
        InUse: another process is running there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open_lock(folder / ".lock") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InUse(f"another process is running in {folder}: wait for it, or choose another --output") from error
        remove_strays(folder)
        yield


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
