"""Features of a set of pairs, computed once and kept: training then needs no other model in memory.

A features file is safetensors: the tensor ``features`` (N, D), one row a pair, in the pairs' order, and metadata that
names the model, its layers and transform, and the pairs.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from filelock import FileLock
from torch import Tensor
from tqdm import tqdm

from crossalign.core.device import resolve_device
from crossalign.core.errors import UserError
from crossalign.core.files import atomic_path, cache_dir, content_key, file_hash
from crossalign.features.own_files import own_file, read_features_file

if TYPE_CHECKING:
    from crossalign.data.pairs.load import Pairs

FORMAT = "crossalign.features.1"
AGAIN = "give another file, or delete this one and run `crossalign features` again"
CHUNK = 256  # images between two files of a run that may be stopped: what a kill can cost


@dataclass(frozen=True)
class Features:
    """Features of N pairs, as one model gives them."""

    values: Tensor
    """(N, D), fp32; the layers side by side."""
    key: str
    """A hash of what made them."""
    layers: dict[str, int]
    """Width of each layer by its name."""

    def by_layer(self) -> dict[str, Tensor]:
        """Each layer's own features (N, width)."""
        return dict(zip(self.layers, self.values.split(list(self.layers.values()), dim=1), strict=True))


@dataclass(frozen=True)
class Maker:
    """An opened model that makes features of pairs."""

    compute: Callable[[Tensor], Tensor]
    """Indices of pairs (B,) to their features (B, D)."""
    metadata: dict[str, str]
    """What the file says of the model; safetensors holds text alone."""
    batch_size: int
    unit: str
    """What the progress bar counts."""


class Source(Protocol):
    """A model whose features are wanted: a teacher of images, or a language model of texts."""

    @property
    def ref(self) -> str:
        """The reference that opens it."""

    @property
    def key(self) -> str:
        """A hash of all that decides the features but the pairs; nothing is loaded for it. Empty for the user's own file."""

    def open(self, pairs: Pairs, device: str, weights: bool) -> Maker:
        """The model on ``device``; without its weights where only what the file says of it is still wanted."""


class FeatureStore:
    """Features of one set of pairs: found where they lie, else computed chunk by chunk and kept.

    Args:
        pairs: open.
        device: where models compute: auto, cpu, cuda or mps.
    """

    def __init__(self, pairs: Pairs, device: str = "auto") -> None:
        self.pairs, self.device = pairs, device

    def read(self, source: Source) -> Features:
        """The features that ``source`` gives: made or found as :meth:`write` does, or of the user's own file, ``file:PATH``.

        Raises:
            UserError: see :meth:`write`; or a file that is not of these pairs.
        """
        own = own_file(source.ref)
        if own is None:
            return self.load(self._file(source, None), source.key)
        if is_ours(own):  # it knows its pairs
            return self.load(own)
        values = read_features_file(own, self.pairs.ids)
        return Features(values, file_hash(own)[:20], {"features": values.shape[1]})

    def write(self, source: Source, output: Path | None = None) -> Path:
        """Write the features that ``source`` gives, or find them written; returns the file.

        A run that was stopped, even killed, goes on where it was, at most 256 pairs back.

        Args:
            source: the model.
            output: the file; None for one in the cache, named by a hash of model and pairs.

        Raises:
            UserError: a model that cannot be opened, an ``output`` that belongs to others, or features that are no finite
                numbers.
        """
        path = self._file(source, output)
        self.load(path, source.key)
        return path

    def load(self, path: Path, key: str | None = None) -> Features:
        """The features in a file that the store wrote.

        Args:
            path: the file.
            key: of the model that must have made them; None takes any.

        Raises:
            UserError: no such file, no features file, or one of other pairs or of another model.
        """
        facts = read_metadata(path)
        if facts["pairs_fingerprint"] != self.pairs.fingerprint:
            raise UserError(f"'{path}' holds features of other pairs ({facts['pairs']}), not of {self.pairs.source}: {AGAIN}")
        if key is not None:
            check_maker(path, facts, key)
        values = _load(path)
        if len(values) != len(self.pairs):
            raise UserError(f"'{path}' holds {len(values)} rows for {len(self.pairs)} pairs: {AGAIN}")
        apart = facts.get("combine") != "sum" and {"layers", "widths"} <= facts.keys()
        layers = dict(zip(json.loads(facts["layers"]), json.loads(facts["widths"]), strict=True)) if apart else {}
        return Features(values, facts["teacher_key"], layers or {"features": values.shape[1]})

    def _file(self, source: Source, output: Path | None) -> Path:
        """The file, made if it is not there."""
        name = f"{content_key(teacher=source.key, pairs=self.pairs.fingerprint)}.safetensors"
        path = output or cache_dir("features") / name
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = cache_dir("features") / f"{content_key(path=str(path.resolve()))}.lock"
            with FileLock(lock):  # another process may be at it; we then find its file
                if not path.is_file():
                    self._compute(source, source.key, path)
        return path

    def _compute(self, source: Source, key: str, path: Path) -> None:
        """Chunk by chunk, each a file beside ``path`` until all are there."""
        parts = path.with_name(f".{path.name}.{content_key(teacher=key, pairs=self.pairs.fingerprint)}.parts")
        parts.mkdir(exist_ok=True)
        count = len(self.pairs)
        starts = range(0, count, CHUNK)
        missing = [start for start in starts if not (parts / f"{start}.safetensors").is_file()]
        maker = source.open(self.pairs, resolve_device(self.device), bool(missing))
        with tqdm(total=count, desc=f"features of {source.ref}", unit=maker.unit, delay=2, leave=False, disable=None) as bar:
            bar.update(count - sum(min(CHUNK, count - start) for start in missing))
            for start in missing:
                rows = range(start, min(start + CHUNK, count))
                _save(parts / f"{start}.safetensors", self._chunk(source, maker, rows, bar))
        whole = torch.cat([_load(parts / f"{start}.safetensors") for start in starts])
        facts = {"format": FORMAT, "teacher": source.ref, "teacher_key": key} | maker.metadata
        _save(path, whole, facts | {"pairs": self.pairs.source, "pairs_fingerprint": self.pairs.fingerprint})
        shutil.rmtree(parts)

    def _chunk(self, source: Source, maker: Maker, rows: range, bar: Any) -> Tensor:
        done = []
        for batch in torch.tensor(rows).split(maker.batch_size):
            values = maker.compute(batch).cpu()
            finite = values.isfinite().all(1)
            if not finite.all():
                name = self.pairs.ids[int(batch[int(torch.argmin(finite.int()))])]
                raise UserError(f"'{source.ref}' gives features of {name} that are no finite numbers: choose others")
            done.append(values)
            bar.update(len(batch))
        return torch.cat(done)


def check_maker(path: Path, facts: dict[str, str], key: str) -> None:
    """Raise UserError unless the file's metadata says that the model of that key made its features."""
    if facts["teacher_key"] != key:
        of = f"{facts['teacher']}, layers {', '.join(json.loads(facts['layers']))}, pool {facts['pool']}, seed {facts['seed']}"
        raise UserError(f"'{path}' holds features of another teacher or of other settings ({of}): {AGAIN}")


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
            facts: dict[str, str] = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"'{path}' is not a whole safetensors file ({error}): delete it and make it again") from error
    if facts.get("format") != FORMAT:
        raise UserError(f"'{path}' is no features file of `crossalign features`: for features of your own use file:{path}")
    return facts


def is_ours(path: Path) -> bool:
    """Whether the store wrote the file."""
    try:
        return path.suffix == ".safetensors" and bool(read_metadata(path))
    except UserError:
        return False


def _load(path: Path) -> Tensor:
    from safetensors.torch import load_file

    return load_file(path)["features"]


def _save(path: Path, values: Tensor, metadata: dict[str, str] | None = None) -> None:
    from safetensors.torch import save_file

    with atomic_path(path) as temporary:
        save_file({"features": values.contiguous()}, temporary, metadata)
