"""Checkpoints: written whole or not at all, holding everything that an exact resume needs."""

import contextlib
import io
import os
import random
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from crossalign.core.errors import UserError, first_line
from crossalign.core.files import atomic_path, free_bytes, naming_full_disk, remove, remove_strays
from crossalign.models.loading import read_tensors, write_tensors
from crossalign.training.stops import DiskFull, NoRoom

TENSORS, STATE = "model.safetensors", "state.pt"


@dataclass
class Checkpoint:
    """All the state of a stage at one step."""

    stage: str
    epoch: int
    step: int
    """Steps done in this epoch."""
    model: dict[str, Tensor]
    """The tensors that training changes."""
    optimizer: dict[str, Any]
    rng: dict[str, Any]
    extra: dict[str, Any] = field(default_factory=dict)
    """Plain values: metric sums, best score, rows logged, seconds spent."""
    path: Path | None = None
    """Where it was read."""


def rng_state() -> dict[str, Any]:
    """The state of every random number generator that training may draw from."""
    name, keys, *rest = np.random.get_state()  # noqa: NPY002  users' own code may draw from it
    return {
        "python": random.getstate(),
        "numpy": [name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "mps": torch.mps.get_rng_state() if torch.backends.mps.is_available() else None,
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Put :func:`rng_state` back."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    if state["mps"] is not None:
        torch.mps.set_rng_state(state["mps"])


def save(folder: Path, checkpoint: Checkpoint, *, rank: int = 0) -> Path:
    """Write ``checkpoint`` under ``folder`` and drop the older ones once it is whole.

    Every rank calls this: rank 0 writes the shared part, each rank its own generators. The caller puts a barrier after it.

    Raises:
        DiskFull: there was no room; nothing partial is left and the previous checkpoint is untouched.
    """
    target = folder / f"{checkpoint.stage}-{checkpoint.epoch:04d}-{checkpoint.step:07d}"
    folder.mkdir(parents=True, exist_ok=True)
    if rank:  # beside, not inside: rank 0 renames its folder when it likes
        _write_torch(folder / f"{target.name}.rng-{rank}.pt", checkpoint.rng)
        return target
    if target.exists():  # the same step of the same run: the same content
        return target
    with (
        naming_full_disk(DiskFull(f"no room left to write {target}; the checkpoint before it is whole")),
        atomic_path(target) as temporary,
    ):
        write_tensors(temporary / TENSORS, checkpoint.model)
        with (temporary / TENSORS).open("rb") as written:
            os.fsync(written.fileno())  # the rename must not reach the disk before the bytes do
        state = {"optimizer": checkpoint.optimizer, "rng": checkpoint.rng, "extra": checkpoint.extra}
        _write_torch(temporary / STATE, state)
    best = best_file(folder, checkpoint.stage, checkpoint.extra.get("best_epoch", 0))
    older_best = [file for file in folder.glob(f"best-{checkpoint.stage}*") if file != best and best.is_file()]
    for old in [*_all(folder), *folder.glob("*.rng-*.pt"), *older_best]:
        if not old.name.startswith(target.name):
            with contextlib.suppress(OSError):
                remove(old)
    remove_strays(folder)
    return target


def best_file(folder: Path, stage: str, epoch: int) -> Path:
    """Where the weights of a stage's best epoch lie; a checkpoint names it by the epoch, so that both are of one moment."""
    return folder / f"best-{stage}-{epoch:04d}.safetensors"


def latest(folder: Path, *, rank: int = 0) -> Checkpoint | None:
    """The newest whole checkpoint under ``folder``, or None.

    Raises:
        UserError: its files are damaged.
    """
    path = max(_all(folder), key=lambda p: (p.stat().st_mtime_ns, p.name), default=None)
    if path is None:
        return None
    stage, epoch, step = path.name.rsplit("-", 2)
    with reading(path):
        state = torch.load(path / STATE, weights_only=True, map_location="cpu")
        own = folder / f"{path.name}.rng-{rank}.pt"
        rng = torch.load(own, weights_only=True) if rank and own.exists() else state["rng"]
        tensors = load_file(path / TENSORS)
        return Checkpoint(stage, int(epoch), int(step), tensors, state["optimizer"], rng, dict(state["extra"]), path)


@contextmanager
def reading(path: Path | None) -> Iterator[None]:
    """Using what a checkpoint holds: whatever it lacks or has of another kind raises a UserError that names it."""
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a damaged file can raise anything inside torch
        why = f"it lacks {error}" if isinstance(error, KeyError) else first_line(error)
        raise UserError(f"the checkpoint {path} cannot be read ({why}); delete it to start over") from error


def read_best(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The weights of the best epoch that a checkpoint knows of.

    Raises:
        UserError: the file is missing or damaged, or of another model.
    """
    assert checkpoint.path is not None
    folder, stage = checkpoint.path.parent, checkpoint.stage
    file = best_file(folder, stage, checkpoint.extra["best_epoch"])
    if not file.is_file():
        file = folder / f"best-{stage}.safetensors"  # of a version that named it by its stage alone
    best = read_tensors([file])
    if {name: t.shape for name, t in best.items()} != {name: t.shape for name, t in checkpoint.model.items()}:
        raise UserError(f"'{file}' holds other weights than {checkpoint.path}: delete that checkpoint to start over")
    return best


def check_room(folder: Path, trained: Iterable[Tensor], extra_numel: int) -> None:
    """Fail before a long run whose checkpoints would not fit on the disk.

    Two stand beside each other while one takes the other's place, each with what is ``trained`` and Adam's two moments.

    Args:
        folder: of the run; it need not be there yet.
        trained: the tensors that training changes.
        extra_numel: how many numbers the run writes besides, 4 bytes each: the best weights, whole models.

    Raises:
        NoRoom: names both figures.
    """
    needed = 4 * (2 * 3 * sum(tensor.numel() for tensor in trained) + extra_numel) + 50_000_000
    free = free_bytes(folder)
    if free < needed:
        raise NoRoom(
            f"checkpoints in {folder} need up to {needed / 1e6:,.0f} MB, but {free / 1e6:,.0f} MB are free: "
            "free some space or choose another --output"
        )


def _write_torch(path: Path, value: Any) -> None:
    buffer = io.BytesIO()  # torch's own writer hides the operating system's reason when the disk is full
    torch.save(value, buffer)
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        file.write(buffer.getbuffer())
        file.flush()
        os.fsync(file.fileno())


def _all(folder: Path) -> list[Path]:
    """Folders named STAGE-EPOCH-STEP; temporary ones start with a dot."""
    return [p for p in folder.glob("*") if p.is_dir() and re.fullmatch(r"[a-z]\w*-\d{4,}-\d{7,}", p.name)]
