"""A run folder: opened fresh or to be resumed, locked against a second process, with its facts written down."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml

from crossalign.core.files import atomic_path, write_json
from crossalign.config import LoopConfig, to_dict, update
from crossalign.core.machine import environment, is_main_process
from crossalign.core.errors import UserError

if TYPE_CHECKING:
    from crossalign.training.loop import Run

C = TypeVar("C")
OURS = ("environment.json", "metrics.jsonl", "result.json", "alignment.json", "predictions.parquet",
        "samples.parquet", "mlflow_run.txt", "report.html", "checkpoints", "snapshots", "model", "evaluation",
        "measure.json", "measure.md", "scores.safetensors", "figures", "config.yaml")  # fmt: skip
NOT_COMPARED = ("output", "overwrite", "tracking")
MEASURED = ("row", "data.mean", "data.std", "loop.device", "loop.precision", "loop.compile")  # left open, a run fills them in


class InUse(UserError):
    """Another process is running in the folder."""


def in_folder(config: C, train: Callable[[C], dict[str, Any]]) -> dict[str, Any]:
    """What ``config.output`` holds if its run is finished, else what ``train`` returns for the settings to run with.

    The folder is locked and claimed, and the device is resolved. An unfinished run with the same configuration goes on
    where it stopped.

    Raises:
        UserError: the folder is another's, or the device is not here.
    """
    with locked(config.output):  # type: ignore[attr-defined]
        config = claim_folder(config)
        finished: Path = config.output / "result.json"  # type: ignore[attr-defined]
        if finished.is_file():
            return read_json(finished)
        return train(resolved(config, loop={"device": resolve_device(config.loop.device)}))  # type: ignore[attr-defined]


def claim_folder(config: C) -> C:
    """Look into ``config.output``, which the caller has locked, and return the configuration to run with.

    A folder that holds the same configuration is resumed: settings that were ``auto`` or measured keep what the first call
    resolved them to. Nothing that crossalign did not write is ever deleted.

    Raises:
        UserError: the folder holds another configuration; the differing settings are named.
    """
    folder: Path = config.output  # type: ignore[attr-defined]
    file = folder / "config.yaml"
    if file.is_file():
        saved = yaml.safe_load(file.read_text(encoding="utf-8"))
        differing = [f"{key} is {old!r} there and {new!r} here" for key, old, new in differences(config, saved)]
        if differing and config.overwrite:  # type: ignore[attr-defined]
            for name in OURS if is_main_process() else ():
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


def write_config(folder: Path, config: Any, name: str = "config.yaml", without: tuple[str, ...] = ()) -> None:
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
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {file} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"--config {file} holds no settings: a config.yaml of a run is wanted")
    return update(config, values)


@contextmanager
def locked(folder: Path, mark: str = "config.yaml") -> Iterator[None]:
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


@contextmanager
def opened_run(config: Any, identity: str, made_of: str, until: int | None = None) -> Iterator[Run]:
    """A run with its settings resolved: facts written down, checkpoint found, log open, random state as the seed says.

    Args:
        config: resolved; its folder is claimed and locked.
        identity: hash of the data and the weights that it begins with.
        made_of: what ``identity`` hashes, in words, for the message.
        until: pause the stage "train" after so many epochs.

    Raises:
        UserError: the checkpoint there was trained on something else.
    """
    import torch

    from crossalign.training import checkpoint as ckpt
    from crossalign.training.loop import Run
    from crossalign.training.precision import reset_peak_memory
    from crossalign.training.tracking import RunLog

    if is_main_process():
        write_config(config.output, config)
        write_json(config.output / "environment.json", environment())
    resume = ckpt.latest(config.output / "checkpoints", rank=int(os.environ.get("RANK", "0")))
    if resume and resume.extra["identity"] != identity:
        raise UserError(
            f"the checkpoint in {config.output} was made from other {made_of} than lie there now: put them back, or choose "
            "another --output"
        )
    rows = resume.extra["rows"] if resume else 0
    torch.use_deterministic_algorithms(config.loop.deterministic)
    reset_peak_memory(config.loop.device)
    with RunLog(config.output, config.tracking, f"{config.row}, seed {config.seed}", flatten(to_dict(config)), rows) as log:
        run = Run(config.output, make_accelerator(config.loop), config.loop, log, identity, resume, until)
        seed_all(config.seed)
        yield run
        run.accelerator.wait_for_everyone()


def seed_all(seed: int) -> None:
    """Seed every generator that training may draw from."""
    from accelerate.utils import set_seed

    set_seed(seed)


def main_process_first(device: str) -> AbstractContextManager[None]:
    """Let the first process go ahead, so that the others find in the cache what it made."""
    from accelerate import PartialState

    waits = {"timeout": timedelta(days=1)} if int(os.environ.get("WORLD_SIZE", "1")) > 1 else {}  # it may tokenise a corpus
    return PartialState(cpu=device == "cpu", **waits).main_process_first()  # type: ignore[no-any-return]


def device_name(device: str) -> str:
    """What result.json calls the device that a run was computed on."""
    import torch

    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"cpu ({torch.get_num_threads()} threads)" if device == "cpu" else device


def make_accelerator(loop: LoopConfig) -> Any:
    """The accelerate ``Accelerator`` for resolved loop settings; one process or as many as the launcher started."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    # The state is a process-wide singleton, which would keep the precision of an earlier run of the same process.
    AcceleratorState._reset_state(reset_partial_state=loop.device == "cpu")
    precision = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}[loop.precision]
    return Accelerator(mixed_precision=precision, cpu=loop.device == "cpu")


def resolve_device(requested: str, option: str = "--loop.device") -> str:
    """``auto`` to the best device at hand.

    Raises:
        UserError: the device asked for is not here.
    """
    import torch

    here = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if requested == "auto":
        return next(name for name in ("cuda", "mps", "cpu") if here[name])
    if not here[requested]:
        raise UserError(f"{option} {requested} is not on this machine; it has {', '.join(n for n in here if here[n])}")
    return requested


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as ``section.key`` names."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file that crossalign wrote."""
    return json.loads(file.read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def differences(config: Any, saved: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Settings in which ``config`` differs from a saved one, as (key, saved value, own value)."""
    asked = flatten({k: v for k, v in to_dict(config).items() if k not in NOT_COMPARED})
    there = flatten(saved)
    return [
        (key, there[key], value)
        for key, value in asked.items()
        if key in there and there[key] != value and not (key in MEASURED and value in ("auto", None, ""))
    ]


def resolved(config: C, **sections: dict[str, Any]) -> C:
    """``config`` with resolved values put into its sections: ``resolved(c, loop={"precision": "bf16"})``."""
    changes = {name: dataclasses.replace(getattr(config, name), **values) for name, values in sections.items()}
    return dataclasses.replace(config, **changes)  # type: ignore[type-var]
