"""Labelled images in tables, with the hub's column names: parquet files and ``datasets``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from crossalign.core.errors import UserError
from crossalign.data.hub import load_hub
from crossalign.data.sources import Listing, Listings, Raw, file_identity, split_name

IMAGE_COLUMNS = ("img", "image")
LABEL_COLUMNS = ("label", "labels", "fine_label", "coarse_label", "class", "target")
ROWS = 256  # read at a time


def list_parquet_file(path: Path, siblings: bool = True) -> Listings:
    """One parquet file; with ``siblings`` also those named so, with test or validation for train."""
    found = {"train": [path]}
    if siblings and "train" in path.name:
        for split, words in {"validation": ("validation", "valid", "val"), "test": ("test",)}.items():
            names = [path.with_name(path.name.replace("train", word)) for word in words]
            there = [name for name in names if name.is_file()]
            if there:
                found[split] = there[:1]
    return {split: _parquet_listing(files) for split, files in found.items()}


def list_parquet_folder(folder: Path, files: list[Path]) -> Listings:
    """All parquet files of a folder, by the split that their own or their folder's name speaks of."""
    found = files_by_split(folder, files)
    unnamed = found.pop("", [])
    if unnamed and "train" not in found:
        found["train"] = unnamed
    return {split: _parquet_listing(files) for split, files in found.items()}


def files_by_split(folder: Path, files: list[Path]) -> dict[str, list[Path]]:
    """Files by the split that their own or their folder's name speaks of; "" where neither does."""
    found: dict[str, list[Path]] = {}
    for file in files:
        split = split_name(file.stem) or split_name(file.parent.name if file.parent != folder else "")
        found.setdefault(split or "", []).append(file)
    return found


def _parquet_listing(files: list[Path]) -> Listing:
    import pyarrow as pa
    import pyarrow.parquet as pq

    title = files[0].name if len(files) == 1 else f"{files[0].name} and {len(files) - 1} more"
    try:
        schema = pq.read_schema(files[0])
        features = hub_features(schema.metadata or {})
        image = find_column(title, "image", of_type(features, "Image"), IMAGE_COLUMNS, schema.names)
        label = find_column(title, "label", of_type(features, "ClassLabel"), LABEL_COLUMNS, schema.names)
        kind = schema.field(image).type
        if not any(check(kind) for check in (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_struct)):
            raise UserError(f"column '{image}' of {title} holds {kind}; encoded images (PNG, JPEG bytes) are expected")
    except (pa.ArrowException, OSError) as error:
        raise unreadable(files[0].name, error) from error
    columns = [_column(file, label) for file in files]
    starts = [f"{file.name} row " for file in files]
    names = [start + str(i) for start, column in zip(starts, columns, strict=True) for i in range(len(column))]
    values = [value for column in columns for value in column]
    labels, classes = _labels(values, _class_names(schema.metadata or {}, features, label), label, names, title)
    note = (schema.metadata or {}).get(b"source", b"").decode("utf-8", "replace")

    def records() -> Iterator[Raw]:
        for file in files:
            try:
                for batch in pq.ParquetFile(file).iter_batches(ROWS, columns=[image]):
                    yield from (raw_cell(cell, file.parent) for cell in batch.column(0).to_pylist())
            except (pa.ArrowException, OSError) as error:
                raise unreadable(file.name, error) from error

    identity = [image, file_identity(files)]
    return Listing(title + (f" ({note})" if note else ""), labels, classes, names, records, identity, tuple(files))


def _column(file: Path, name: str) -> list[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_table(file, columns=[name]).column(name).to_pylist()  # type: ignore[no-any-return]
    except (pa.ArrowException, OSError, KeyError) as error:
        raise unreadable(file.name, error) from error


def list_hub(name: str) -> Listings:
    """A set of the Hugging Face hub, or a local folder that ``datasets`` understands."""
    loaded = load_hub(f"hf:{name}")
    splits = {split_name(str(split)): str(split) for split in reversed(loaded)}
    if len(loaded) == 1:
        splits = {"train": next(iter(loaded))}
    found = {ours: _hub_listing(loaded[split], f"hf:{name} {split}") for ours, split in splits.items() if ours}
    if not found:
        raise UserError(f"hf:{name} has no split named train, only {', '.join(map(str, loaded))}")
    return found


def _hub_listing(rows: Any, title: str) -> Listing:
    import datasets

    features = rows.features
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    labels = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    image = find_column(title, "image", images, IMAGE_COLUMNS, list(features))
    label = find_column(title, "label", labels, LABEL_COLUMNS, list(features))
    names = [f"{title} row {i}" for i in range(len(rows))]
    class_names = features[label].names if label in labels else None
    values, classes = _labels(rows[label][:], class_names, label, names, title)
    encoded = rows.select_columns([image])
    if image in images:
        encoded = encoded.cast_column(image, datasets.Image(decode=False))

    def records() -> Iterator[Raw]:
        for batch in encoded.iter(ROWS):
            yield from (raw_cell(cell, None) for cell in batch[image])

    files = tuple(Path(entry["filename"]) for entry in rows.cache_files)
    identity = [image, file_identity(files), title, len(rows)]
    return Listing(title, values, classes, names, records, identity, files)


def raw_cell(cell: Any, folder: Path | None) -> Raw:
    """A cell of an image column: bytes, or the hub's {bytes, path}, where the path is used if there are no bytes.

    Paths count from ``folder``; None is for those that ``datasets`` made itself, into its own cache.

    Raises:
        UserError: a path that leads out of ``folder``.
    """
    if not isinstance(cell, dict):
        return cell  # type: ignore[no-any-return]
    if cell.get("bytes") is not None:
        return bytes(cell["bytes"])
    if not cell.get("path"):
        return None
    if folder is None:
        return Path(cell["path"])
    path: Path = (folder / cell["path"]).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise UserError(f"the image path '{cell['path']}' leads out of '{folder}': put the images beside the table")
    return path


def _labels(
    values: list[Any], class_names: Sequence[str] | None, column: str, names: Sequence[str], title: str
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Label column → int64 (N,) and class names: the given ones, else the sorted labels themselves."""
    if not values:
        raise UserError(f"{title} has no rows")
    missing = [row for row, value in enumerate(values) if value is None or value != value]
    if missing:
        first = names[missing[0]]
        raise UserError(f"column '{column}' has {len(missing)} missing labels, the first at {first}; remove those rows")
    if not all(isinstance(value, str) for value in values):
        if not all(isinstance(value, int | float) and value == int(value) for value in values):
            raise UserError(f"column '{column}' of {title} holds {values[0]!r}; labels are whole numbers or names")
        values = [int(value) for value in values]
        if min(values) < 0:
            row = next(row for row, value in enumerate(values) if value < 0)
            raise UserError(
                f"column '{column}' has the negative label {values[row]} at {names[row]}; remove rows without a label"
            )
        if class_names is not None:
            if max(values) >= len(class_names):
                raise UserError(f"column '{column}' of {title} has label {max(values)}, but {len(class_names)} class names")
            return np.array(values, dtype=np.int64), tuple(class_names)
    known = sorted(set(values))
    place = {value: i for i, value in enumerate(known)}
    return np.array([place[value] for value in values], dtype=np.int64), tuple(str(value) for value in known)


def find_column(title: str, kind: str, typed: list[str], usual: tuple[str, ...], names: list[str]) -> str:
    """The first of the usual names, else the first column that the hub's metadata types as such."""
    for name in (*usual, *typed):
        if name in names:
            return name
    raise UserError(f"{title} has no {kind} column ({' or '.join(usual)}), only {', '.join(names)}; rename one")


def hub_features(metadata: dict[bytes, bytes]) -> dict[str, Any]:
    """Column → description, as ``datasets`` leaves it in the schema metadata; empty where it did not write the file."""
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    except (ValueError, AttributeError):
        return {}
    return features if isinstance(features, dict) else {}


def of_type(features: dict[str, Any], kind: str) -> list[str]:
    """Names of the columns that :func:`hub_features` describes as ``kind``, such as Image or ClassLabel."""
    return [name for name, value in features.items() if isinstance(value, dict) and value.get("_type") == kind]


def _class_names(metadata: dict[bytes, bytes], features: dict[str, Any], label: str) -> Sequence[str] | None:
    names = features.get(label, {}).get("names") if label in of_type(features, "ClassLabel") else None
    if names:
        return [str(name) for name in names]
    plain = metadata.get(b"class_names", b"").decode("utf-8", "replace")
    return [name.strip() for name in plain.split(",")] if plain else None


def unreadable(title: str, error: Exception) -> UserError:
    """The error for a parquet file that cannot be read."""
    reason = str(error).strip().split("\n")[0]
    return UserError(f"cannot read parquet file {title} ({reason}); it may be cut off: fetch it again")
