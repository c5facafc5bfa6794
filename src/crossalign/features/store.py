"""A teacher's features of a set of pairs, written once: training then needs no vision model in memory.

A features file is safetensors: the tensor ``features`` (N, D), one row a pair, in the pairs' order, and metadata that
names the teacher, its layers and transform, and the pairs.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock
from torch import Tensor
from tqdm import tqdm

from crossalign.config import PairsConfig, TeacherConfig, validate
from crossalign.core.device import resolve_device
from crossalign.core.errors import UserError
from crossalign.core.files import atomic_path, cache_dir, content_key, file_hash
from crossalign.core.refs import Ref

if TYPE_CHECKING:
    from crossalign.data.pairs.load import Pairs
    from crossalign.models.vision.teacher import Teacher

FORMAT = "crossalign.features.1"
AGAIN = "give another file, or delete this one and run `crossalign features` again"
CHUNK = 256  # images between two files of a run that may be stopped: what a kill can cost


@dataclass(frozen=True)
class Maker:
    """What makes features of pairs: a vision model of their images, or a language model of their texts."""

    ref: str
    compute: Callable[[Tensor], Tensor]
    """Indices of pairs (B,) to their features (B, D)."""
    metadata: dict[str, str]
    batch_size: int
    unit: str


def features(teacher: TeacherConfig, pairs: PairsConfig, output: Path | None = None, *, device: str = "auto") -> Path:
    """Write a teacher's features of a set of pairs, or find them written; returns the file.

    A run that was stopped, even killed, goes on where it was, at most 256 images back.

    Args:
        teacher: which model, layers and pooling.
        pairs: which images.
        output: the file; None for one in the cache, named by a hash of teacher and pairs.
        device: auto, cpu, cuda or mps.

    Raises:
        UserError: teacher or pairs that cannot be opened, an ``output`` that belongs to others, or features that are
            no finite numbers.
    """
    from crossalign.data.pairs.load import open_pairs

    if Ref(teacher.ref).file:
        raise UserError(f"'{teacher.ref}' holds features already: name it where they are used, as --teacher.ref")
    resolve_device(device)
    key = teacher_key(teacher)  # what is wrong with teacher or output is said before every image is checked
    _check_output(teacher, output, key)
    return write_features(teacher, open_pairs(pairs), output, device=device)


def check_teacher(teacher: TeacherConfig) -> str:
    """The key of a teacher, see :func:`teacher_key`; "" for a file of features. Nothing is computed.

    Raises:
        UserError: the teacher, its layers or its file of features is not there.
    """
    if own := Ref(teacher.ref).file:
        from crossalign.features.own_files import check_file

        check_file(own)
        return ""
    key = teacher_key(teacher)
    _check_output(teacher, None, key)
    return key


def teacher_key(teacher: TeacherConfig) -> str:
    """``Teacher.key`` of a configuration, without the weights in memory."""
    from crossalign.models.vision.teacher import open_teacher

    return open_teacher(teacher.ref, settings=teacher, seed=teacher.seed, weights=False).key


def write_features(
    teacher: TeacherConfig, pairs: Pairs, output: Path | None = None, *, device: str = "auto", key: str = ""
) -> Path:
    """:func:`features` for pairs that are open already; ``key`` is the teacher's, where the caller knows it."""
    key = key or teacher_key(teacher)
    _check_output(teacher, output, key)

    def open_maker(weights: bool) -> Maker:
        from crossalign.models.vision.teacher import open_teacher

        model = open_teacher(teacher.ref, settings=teacher, seed=teacher.seed, weights=weights)
        if weights:
            model.to(resolve_device(device))
        return Maker(
            teacher.ref, live_features(model, pairs), _metadata(model, teacher, pairs, key), teacher.batch_size, "image"
        )

    return write_made(open_maker, key, pairs, output, title=f"features of {teacher.ref}")


def write_made(open_maker: Callable[[bool], Maker], key: str, pairs: Pairs, output: Path | None = None, *, title: str) -> Path:
    """Write features of pairs chunk by chunk, or find them written; returns the file.

    Args:
        open_maker: opens the model, with its weights or, where only what the file says of itself is still wanted, without.
        key: hash of all that decides the features but the pairs.
        pairs: open.
        output: the file; None for one in the cache.
        title: of the progress bar.
    """
    path = output or features_path(key, pairs)
    if path.is_file():
        load_features(path, pairs, key)
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = cache_dir("features") / f"{content_key(path=str(path.resolve()))}.lock"
    with FileLock(lock):  # another process may be at it; we then find its file
        if not path.is_file():
            _compute(open_maker, pairs, path, key, title)
        load_features(path, pairs, key)
    return path


def _check_output(teacher: TeacherConfig, output: Path | None, key: str) -> None:
    """Refuse what the pairs cannot change: a batch of none, a name that is none, another teacher's file."""
    validate(teacher, "teacher.")
    if output is None:
        return
    if output.is_dir() or output.suffix != ".safetensors":
        raise UserError(f"--output {output} is no name of a features file: it must end in .safetensors")
    if output.is_file():
        _check_teacher(output, read_metadata(output), key)


def _check_teacher(path: Path, told: dict[str, str], key: str) -> None:
    if told["teacher_key"] != key:
        of = f"{told['teacher']}, layers {', '.join(json.loads(told['layers']))}, pool {told['pool']}, seed {told['seed']}"
        raise UserError(f"'{path}' holds features of another teacher or of other settings ({of}): {AGAIN}")


def _compute(open_maker: Callable[[bool], Maker], pairs: Pairs, path: Path, key: str, title: str) -> None:
    """Chunk by chunk, each a file beside ``path`` until all are there."""
    parts = path.with_name(f".{path.name}.{content_key(teacher=key, pairs=pairs.fingerprint)}.parts")
    parts.mkdir(exist_ok=True)
    starts = range(0, len(pairs), CHUNK)
    missing = [start for start in starts if not (parts / f"{start}.safetensors").is_file()]
    maker = open_maker(bool(missing))
    with tqdm(total=len(pairs), desc=title, unit=maker.unit, delay=2, leave=False, disable=None) as bar:
        bar.update(len(pairs) - sum(min(CHUNK, len(pairs) - start) for start in missing))
        for start in missing:
            rows = range(start, min(start + CHUNK, len(pairs)))
            _save(parts / f"{start}.safetensors", _features(maker, pairs, rows, bar))
    whole = torch.cat([_load(parts / f"{start}.safetensors") for start in starts])
    _save(path, whole, maker.metadata)
    shutil.rmtree(parts)


def features_path(teacher_key: str, pairs: Pairs) -> Path:
    """Where features lie unless another file is named: in the cache, by a hash of teacher and pairs."""
    return cache_dir("features") / f"{content_key(teacher=teacher_key, pairs=pairs.fingerprint)}.safetensors"


def load_features(path: Path, pairs: Pairs, teacher_key: str | None = None) -> Tensor:
    """The features (N, D) in a file, fp32.

    Args:
        path: a file that :func:`features` wrote.
        pairs: the pairs that they must belong to.
        teacher_key: ``Teacher.key`` of the teacher that must have made them; None takes any.

    Raises:
        UserError: no such file, no features file, or one of other pairs or of another teacher.
    """
    told = read_metadata(path)
    if told["pairs_fingerprint"] != pairs.fingerprint:
        raise UserError(f"'{path}' holds features of other pairs ({told['pairs']}), not of {pairs.source}: {AGAIN}")
    if teacher_key is not None:
        _check_teacher(path, told, teacher_key)
    found = _load(path)
    if len(found) != len(pairs):
        raise UserError(f"'{path}' holds {len(found)} rows for {len(pairs)} pairs: {AGAIN}")
    return found


def read_metadata(path: Path) -> dict[str, str]:
    """What a features file says of itself.

    Raises:
        UserError: no such file, or no features file.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise UserError(f"there is no features file '{path}': write it with `crossalign features`")
    try:
        with safe_open(path, "pt") as file:
            told: dict[str, str] = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"'{path}' is not a whole safetensors file ({error}): delete it and make it again") from error
    if told.get("format") != FORMAT:
        raise UserError(f"'{path}' is no features file of `crossalign features`: for features of your own use file:{path}")
    return told


def pair_features(teacher: TeacherConfig, pairs: Pairs, *, device: str = "auto") -> tuple[Tensor, str]:
    """The features (N, D) of pairs, fp32, and a hash of what made them: from a file of one's own, from the cache, or made.

    Raises:
        UserError: see :func:`features`, and :func:`crossalign.features.own_files.read_features_file` for ``file:``.
    """
    if own := Ref(teacher.ref).file:
        from crossalign.features.own_files import read_features_file

        if is_ours(own):  # it knows its pairs
            return load_features(own, pairs), read_metadata(own)["teacher_key"]
        return read_features_file(own, pairs.ids), file_hash(own)[:20]
    path = write_features(teacher, pairs, device=device)
    return load_features(path, pairs), read_metadata(path)["teacher_key"]


def is_ours(path: Path) -> bool:
    """Whether ``crossalign features`` wrote the file."""
    from safetensors import SafetensorError, safe_open

    if path.suffix != ".safetensors" or not path.is_file():
        return False
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("format") == FORMAT
    except (SafetensorError, OSError):
        return False


def live_features(model: Teacher, pairs: Pairs) -> Callable[[Tensor], Tensor]:
    """A function of pairs' indices (B,) that gives their features (B, D) from a teacher in memory, without any file."""

    def compute(indices: Tensor) -> Tensor:
        return model(model.preprocess(pairs.images(indices.tolist())).to(next(model.parameters()).device))  # type: ignore[no-any-return]

    return compute


def _features(maker: Maker, pairs: Pairs, rows: range, bar: Any) -> Tensor:
    done = []
    for batch in torch.tensor(rows).split(maker.batch_size):
        values = maker.compute(batch).cpu()
        if not values.isfinite().all():
            first = batch[int(torch.argmin(values.isfinite().all(1).int()))]
            raise UserError(
                f"'{maker.ref}' gives features of {pairs.ids[int(first)]} that are no finite numbers: choose others"
            )
        done.append(values)
        bar.update(len(batch))
    return torch.cat(done)


def _load(path: Path) -> Tensor:
    from safetensors.torch import load_file

    return load_file(path)["features"]


def _save(path: Path, values: Tensor, metadata: dict[str, str] | None = None) -> None:
    from safetensors.torch import save_file

    with atomic_path(path) as temporary:
        save_file({"features": values.contiguous()}, temporary, metadata)


def _metadata(model: Teacher, teacher: TeacherConfig, pairs: Pairs, key: str) -> dict[str, str]:
    """What the file says of itself; safetensors holds text alone."""
    return {
        "format": FORMAT,
        "teacher": teacher.ref,
        "teacher_key": key,
        "teacher_fingerprint": model.fingerprint,
        "layers": json.dumps(model.layer_names),
        "widths": json.dumps(model.widths),
        "combine": teacher.combine,
        "weights": json.dumps(teacher.weights),
        "pool": teacher.pool,
        "seed": str(teacher.seed),
        "transform": json.dumps(model.transform, sort_keys=True, default=str),
        "pairs": pairs.source,
        "pairs_fingerprint": pairs.fingerprint,
    }
