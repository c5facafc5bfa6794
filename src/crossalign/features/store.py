"""Features of a set of pairs, computed once and kept: training then needs no other model in memory.

A features file is safetensors: the tensor ``features`` (N, D), one row a pair, in the pairs' order, and metadata that
names the model, its layers and transform, and the pairs. Features may also come from a file of the user's own, made by
whatever model, of whatever modality.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from crossalign.core.device import resolve_device
from crossalign.core.errors import UserError, unknown
from crossalign.core.files import cache_dir, content_key, file_hash
from crossalign.core.progress import progress
from crossalign.core.reading import parse_json, read_array
from crossalign.core.refs import Ref
from crossalign.data.pairs.sources import ID_COLUMNS, unique
from crossalign.models.loading import read_tensors, write_tensors

if TYPE_CHECKING:
    from crossalign.data.pairs.load import Pairs

FORMAT = "crossalign.features.1"
AGAIN = "give another file, or delete this one and run `crossalign features` again"
CHUNK = 256  # images between two files of a run that may be stopped: what a kill can cost
FEATURE_COLUMNS = ("features", "feature", "embedding", "embeddings", "vector")


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


class FeatureSource(Protocol):
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

    def read(self, source: FeatureSource) -> Features:
        """The features that ``source`` gives: made or found as :meth:`write` does, or of the user's own file, ``file:PATH``.

        Raises:
            UserError: see :meth:`write`; or a file that is not of these pairs.
        """
        own = own_file(source.ref)
        if own is None:
            return self._made(source, None)
        if is_ours(own):  # it knows its pairs
            return self.load(own)
        values = read_features_file(own, self.pairs.ids)
        return Features(values, file_hash(own)[:20], {"features": values.shape[1]})

    def write(self, source: FeatureSource, output: Path | None = None) -> Path:
        """Write the features that ``source`` gives, or find them written; returns the file.

        A run that was stopped, even killed, goes on where it was, at most 256 pairs back.

        Args:
            source: the model.
            output: the file; None for one in the cache, named by a hash of model and pairs.

        Raises:
            UserError: a model that cannot be opened, an ``output`` that belongs to others, or features that are no finite
                numbers.
        """
        self._made(source, output)
        return self._path(source, output)

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
        values = read_tensors([path]).get("features", torch.empty(0))
        if len(values) != len(self.pairs) or values.ndim != 2 or not values.shape[1]:
            shape = " x ".join(map(str, values.shape))
            raise UserError(f"'{path}' holds features of shape {shape} for {len(self.pairs)} pairs: {AGAIN}")
        apart = facts.get("combine") != "sum" and {"layers", "widths"} <= facts.keys()
        names, widths = (_listed(path, facts, name) if apart else [] for name in ("layers", "widths"))
        if apart and (len(names) != len(widths) or sum(widths) != values.shape[1]):
            raise UserError(f"'{path}' names layers of other widths than its features have: {AGAIN}")
        layers = dict(zip(names, widths, strict=True))
        return Features(values, facts["teacher_key"], layers or {"features": values.shape[1]})

    def _path(self, source: FeatureSource, output: Path | None) -> Path:
        name = f"{content_key(teacher=source.key, pairs=self.pairs.fingerprint)}.safetensors"
        return output or cache_dir("features") / name

    def _made(self, source: FeatureSource, output: Path | None) -> Features:
        """The features in their file, made if it is not there; a damaged one in the cache is made again."""
        path = self._path(source, output)
        if output is None:
            with suppress(UserError):
                return self.load(path, source.key)
            path.unlink(missing_ok=True)
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = cache_dir("features") / f"{content_key(path=str(path.resolve()))}.lock"
            with FileLock(lock):  # another process may be at it; we then find its file
                if not path.is_file():
                    self._compute(source, source.key, path)
        return self.load(path, source.key)

    def _compute(self, source: FeatureSource, key: str, path: Path) -> None:
        """Chunk by chunk, each a file beside ``path`` until all are there."""
        parts = path.with_name(f".{path.name}.{content_key(teacher=key, pairs=self.pairs.fingerprint)}.parts")
        parts.mkdir(exist_ok=True)
        count = len(self.pairs)
        starts = range(0, count, CHUNK)
        missing = [start for start in starts if not _is_whole(parts / f"{start}.safetensors")]
        maker = source.open(self.pairs, resolve_device(self.device), bool(missing))
        ready = count - sum(min(CHUNK, count - start) for start in missing)
        with progress(count, f"features of {source.ref}", initial=ready, unit=maker.unit, leave=False) as bar:
            for start in missing:
                done = []
                for batch in torch.arange(start, min(start + CHUNK, count)).split(maker.batch_size):
                    values = maker.compute(batch).cpu()
                    bad = (~values.isfinite().all(1)).nonzero().flatten().tolist()
                    if bad:
                        name = self.pairs.ids[int(batch[bad[0]])]
                        raise UserError(f"'{source.ref}' gives features of {name} that are no finite numbers: choose others")
                    done.append(values)
                    bar.update(len(batch))
                write_tensors(parts / f"{start}.safetensors", {"features": torch.cat(done)})
        whole = torch.cat([read_tensors([parts / f"{start}.safetensors"])["features"] for start in starts])
        facts = {"format": FORMAT, "teacher": source.ref, "teacher_key": key} | maker.metadata
        facts |= {"pairs": self.pairs.source, "pairs_fingerprint": self.pairs.fingerprint}
        write_tensors(path, {"features": whole}, facts)
        shutil.rmtree(parts)


def _listed(path: Path, facts: dict[str, str], name: str) -> list[Any]:
    """A list among the facts of a file, which are text."""
    return list(parse_json(facts.get(name, ""), f"'{name}' of '{path}'", AGAIN, list))


def _is_whole(path: Path) -> bool:
    """Whether a chunk was written, and can be read."""
    try:
        return path.is_file() and "features" in read_tensors([path])
    except UserError:
        return False


def check_maker(path: Path, facts: dict[str, str], key: str) -> None:
    """Raise UserError unless the file's metadata says that the model of that key made its features."""
    if facts["teacher_key"] != key:
        layers = ", ".join(map(str, _listed(path, facts, "layers")))
        of = f"{facts['teacher']}, layers {layers}, pool {facts.get('pool')}, seed {facts.get('seed')}"
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
    if facts.get("format") != FORMAT or not {"teacher", "teacher_key", "pairs", "pairs_fingerprint"} <= facts.keys():
        raise UserError(f"'{path}' is no features file of `crossalign features`: for features of your own use file:{path}")
    return facts


def is_ours(path: Path) -> bool:
    """Whether the store wrote the file."""
    try:
        return path.suffix == ".safetensors" and bool(read_metadata(path))
    except UserError:
        return False


def own_file(ref: str) -> Path | None:
    """The file that ``file:PATH`` names; None for a reference to a model.

    Raises:
        UserError: no file lies there that features are read from.
    """
    path = Ref(ref).file
    if path is not None and not path.is_file():
        raise UserError(f"there is no file of features '{path}': give file:PATH of a .npy, .safetensors or .parquet file")
    if path is not None and path.suffix not in READERS:
        raise unknown("kind of features file", path.suffix, READERS)
    return path


def read_features_file(path: Path, ids: Sequence[str]) -> Tensor:
    """Features (N, D), fp32, one row for each of ``ids``.

    A .npy file holds an array (N, D), a .safetensors file such a tensor named features (or a single one), both in the
    order of the pairs. A .parquet file has a column of lists named features; with a column of ids (id, filename, …) its
    rows are found by those, else they are in the order of the pairs.

    Raises:
        UserError: other rows than pairs, a pair without features, or values that are no finite numbers.
    """
    try:
        values, names = READERS[path.suffix](path)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"cannot read features from '{path}' ({error})") from error
    if values.ndim != 2 or not values.shape[1] or values.dtype.kind not in "fiu":
        raise UserError(f"'{path}' holds {values.dtype} values of shape {values.shape}; features are numbers (pairs, width)")
    if names is not None:
        row_of = {name: row for row, name in enumerate(unique(names))}
        absent = [name for name in ids if name not in row_of]
        if absent:
            raise UserError(f"'{path}' has no features of {len(absent)} of {len(ids)} pairs, such as {', '.join(absent[:3])}")
        values = values[[row_of[name] for name in ids]]
    elif len(values) != len(ids):
        raise UserError(
            f"'{path}' has {len(values)} rows for {len(ids)} pairs; without a column of ids there must be one a pair, in order"
        )
    features = torch.from_numpy(np.require(values, np.float32, ["C", "W"]))  # copies what is mapped from a file
    bad = (~features.isfinite().all(1)).nonzero().flatten().tolist()
    if bad:
        raise UserError(f"'{path}' holds values that are no finite numbers, first for {ids[bad[0]]} ({len(bad)} rows in all)")
    return features


def _npy(path: Path) -> tuple[np.ndarray, None]:
    return read_array(path, mapped=True), None


def _safetensors(path: Path) -> tuple[np.ndarray, None]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    if "features" not in tensors and len(tensors) != 1:
        raise ValueError(f"no tensor named features, only {', '.join(sorted(tensors))}")
    return tensors.get("features", next(iter(tensors.values()))).float().numpy(), None


def _parquet(path: Path) -> tuple[np.ndarray, list[object] | None]:
    import pyarrow.parquet as pq

    table = pq.read_table(path)  # its errors are ValueErrors or OSErrors
    column = next((name for name in FEATURE_COLUMNS if name in table.column_names), None)
    if column is None:
        raise ValueError(f"no column named {' or '.join(FEATURE_COLUMNS)}, only {', '.join(table.column_names)}")
    rows = table.column(column).to_pylist()
    widths = {0 if row is None else len(row) for row in rows}
    if len(widths) > 1:
        raise ValueError(f"rows of {min(widths)} to {max(widths)} values in column '{column}'")
    key = next((name for name in ID_COLUMNS if name in table.column_names), None)
    return np.asarray(rows), table.column(key).to_pylist() if key else None


READERS: dict[str, Callable[[Path], tuple[np.ndarray, list[object] | None]]] = {
    ".npy": _npy,
    ".safetensors": _safetensors,
    ".parquet": _parquet,
}
"""By suffix: a file → values (N, D), and ids where it has them."""
