"""A training session in a run folder: claimed, its checkpoint found, its log open, its random state as the seed says."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from functools import wraps
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed

from crossalign.config import BaseLoopConfig, flatten, to_dict, validate
from crossalign.core.device import device_name, peak_memory_bytes, reset_peak_memory, resolve_device
from crossalign.core.errors import UserError
from crossalign.core.files import write_json
from crossalign.core.machine import environment, is_main_process, world_size
from crossalign.core.progress import announce
from crossalign.core.reading import shown
from crossalign.data.batches import Batches, Rows
from crossalign.runs.folder import claim_folder, clear_folder, inputs, locked, made_from, replaces, resolved, write_config
from crossalign.runs.names import RunFolder
from crossalign.runs.schema import read_result
from crossalign.training import checkpoint as ckpt
from crossalign.training.loop import Session
from crossalign.training.stops import StageResult
from crossalign.training.tracking import RunLog

Train = TypeVar("Train", bound=Callable[..., dict[str, Any]])
T = TypeVar("T")
B = TypeVar("B")


def in_folder(train: Train) -> Train:
    """Let ``train`` run in the folder ``config.output``, which is locked and claimed, with its device resolved.

    If the run there is finished, what it left is returned, unless its data have changed since. An unfinished one with the same
    configuration goes on where it stopped.

    Raises:
        UserError: a setting out of its bounds, a folder that is another's, or a device that is not here.
    """

    @wraps(train)
    def in_its_folder(config: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        validate(config)
        config.row = shown(config.row)
        with locked(config.output):
            config = claim_folder(config)
            folder = RunFolder(config.output)
            finished = read_result(folder.result) if folder.result.exists() and not replaces(config) else None
            if finished and not _touched(config):
                if not folder.model.is_dir():
                    announce(f"the run in {config.output} is finished, but its {folder.model.name}/ is gone; its result:")
                return finished
            try:
                return train(resolved(config, loop={"device": resolve_device(config.loop.device)}), *args, **kwargs)
            except Unchanged:
                assert finished is not None
                if is_main_process():
                    write_json(folder.environment, made_from(config.output) | {"inputs": inputs(config)})
                return finished

    return in_its_folder  # type: ignore[return-value]


def _touched(config: Any) -> bool:
    """Whether files that the run in its folder was made from are others now, or written anew; one that is gone is neither."""
    before, now = made_from(config.output).get("inputs") or {}, inputs(config)
    return any(now.get(name, state) != state for name, state in before.items())


class Unchanged(Exception):
    """A finished run was made from just what lies there now, though files have been written anew."""


@contextmanager
def opened_run(config: Any, identity: str, made_of: str, until: int | None = None, quiet: bool = False) -> Iterator[Session]:
    """A run with its settings resolved: facts written down, checkpoint found, log open, random state as the seed says.

    Args:
        config: resolved; its folder is claimed and locked.
        identity: hash of the data and the weights that it begins with.
        made_of: what ``identity`` hashes, in words, for the message.
        until: pause the stage "train" after so many epochs.
        quiet: print no line an epoch.

    Raises:
        UserError: the checkpoint there was trained on something else.
    """
    folder, replacing = RunFolder(config.output), replaces(config)
    resume = None if replacing else ckpt.latest(folder.checkpoints, rank=int(os.environ.get("RANK", "0")))
    finished = folder.result.exists() and not replacing
    with ckpt.reading(resume.path if resume else None):
        rows, before = (resume.extra["rows"], resume.extra["identity"]) if resume else (0, identity)
    if finished:
        before = made_from(folder.path).get("identity") or before
    if before != identity:
        if not config.overwrite:
            raise UserError(
                f"the run in {folder.path} was made from other {made_of} than lie there now: put them back, choose another "
                "--output, or --overwrite to delete that run"
            )
        replacing, resume, rows = True, None, 0
    elif finished:
        raise Unchanged
    with main_process_first(config.loop.device):
        if is_main_process():
            if replacing:
                clear_folder(folder.path)
            folder.refuse_links()
            write_config(folder.path, config)
            write_json(folder.environment, environment() | {"identity": identity, "inputs": inputs(config)})
    torch.use_deterministic_algorithms(config.loop.deterministic)
    reset_peak_memory(config.loop.device)
    with RunLog(config.output, config.tracking, f"{config.row}, seed {config.seed}", flatten(to_dict(config)), rows) as log:
        run = Session(config.output, make_accelerator(config.loop), config.loop, log, identity, resume, quiet, until)
        set_seed(config.seed)
        yield run
        run.accelerator.wait_for_everyone()


def run_result(
    config: Any, verb: str, recipe: str, facts: dict[str, Any], trained: StageResult, unit: str, **seconds: float
) -> dict[str, Any]:
    """result.json: what the run was, by the ``facts`` of its verb, and what it cost, of which ``unit`` is what rates count.

    ``seconds`` are of other stages than training.
    """
    loop = config.loop
    return {
        "verb": verb,
        "recipe": recipe,
        "row": config.row,
        **facts,
        "seconds": seconds | {"train": trained.seconds},
        f"{unit}_per_second": trained.examples / max(trained.seconds, 1e-9),
        "peak_memory_bytes": peak_memory_bytes(loop.device),
        "precision": loop.precision,
        "device": device_name(loop.device),
    }


def batches_of(config: Any, rows: Rows[B], rank: int = 0, world: int | None = None) -> Batches[B]:
    """The steps of one process; unless they are named, of the first of all that there are.

    Raises:
        UserError: steps of more rows than there are, or of fewer than processes and micro-batches.
    """
    loop = config.loop
    world = world_size() if world is None else world
    return Batches(rows, batch_size=loop.batch_size, seed=config.seed, accumulation=loop.accumulation, rank=rank, world=world)


def main_process_first(device: str) -> AbstractContextManager[None]:
    """Let the first process go ahead, so that the others find in the cache what it made."""
    waits = {"timeout": timedelta(days=1)} if world_size() > 1 else {}  # it may tokenise a corpus
    return PartialState(cpu=device == "cpu", **waits).main_process_first()  # type: ignore[no-any-return]


def agreed(choose: Callable[[], T]) -> T:
    """What the first process chooses, in every process: what they measure differs, and what they compute must not.

    Raises:
        RuntimeError: there are several processes, and torch.distributed is not initialised.
    """
    if world_size() == 1:
        return choose()
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        raise RuntimeError("initialise torch.distributed before precision is chosen: the processes must agree on one")
    box: list[Any] = [choose() if torch.distributed.get_rank() == 0 else None]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]  # type: ignore[no-any-return]


def make_accelerator(loop: BaseLoopConfig) -> Any:
    """The accelerate ``Accelerator`` for resolved loop settings; one process or as many as the launcher started."""
    # The state is a process-wide singleton, which would keep the precision of an earlier run of the same process.
    AcceleratorState._reset_state(reset_partial_state=loop.device == "cpu")
    return Accelerator(mixed_precision="no" if loop.precision == "fp32" else loop.precision, cpu=loop.device == "cpu")
