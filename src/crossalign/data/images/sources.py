"""Where labelled images come from: each reader lists one kind of source without decoding anything.

``list_source`` finds the reader by the look of the source's name. A new kind is one function that returns listings by
split.
"""

import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from crossalign.config import DataConfig
from crossalign.core.errors import UserError, needed, some, unknown
from crossalign.core.reading import shown, user_path
from crossalign.core.refs import Ref
from crossalign.core.registry import Registry
from crossalign.data.records import HubTable, ParquetTable, RecordTable, load_hub
from crossalign.data.sources import (
    EXTENSIONS,
    SPLITS,
    ImageListing,
    Listings,
    by_split,
    file_identity,
    files_below,
    is_litter,
    split_name,
)

LABEL_COLUMNS = ("label", "labels", "fine_label", "coarse_label", "class", "target")


def list_source(source: str, alone: bool = False, config: DataConfig | None = None) -> Listings:
    """The splits of ``source``, unread; with ``alone`` a parquet file is taken without its siblings.

    ``config`` names the columns of a table, where they are not found by their usual names.

    Raises:
        UserError: no such source, nothing in it that can be read, or labels that are no labels.
    """
    config = config or DataConfig()
    ref = Ref(source, ())
    if ref.kind == "hf":
        return _hub(ref.rest, config)
    if ref.kind != "path" and ref.kind in SOURCES:
        return SOURCES[ref.kind](ref.rest)
    path = user_path(source)
    if path.is_file():
        if path.suffix != ".parquet":
            raise UserError(f"data source '{source}' is a file but not .parquet; give a folder of class folders")
        files = {"train": [path]} | ({} if alone else _siblings(path))
        return {split: _listing(ParquetTable(paths), config) for split, paths in files.items()}
    if not source or not path.is_dir():
        raise UserError(
            f"data source '{source}' does not exist; give a folder of class folders, a .parquet file, sklearn:digits "
            "or hf:ORG/NAME"
        )
    if (path / "cifar-10-batches-bin").is_dir():
        path = path / "cifar-10-batches-bin"
    if (path / "data_batch_1.bin").is_file():
        return _cifar_binary(path)
    if (path / "data_batch_1").is_file() or (path / "cifar-10-batches-py").is_dir():
        raise UserError(
            f"'{path}' holds CIFAR-10 as Python pickles, which are not read because they can run code; use the binary "
            "version (cifar-10-binary.tar.gz, with data_batch_1.bin)"
        )
    faults: dict[Path, str] = {}
    files = by_split(path, files_below(path, {".parquet"}, faults))
    if not files:
        return _image_folder(path)
    unnamed = files.pop("", [])
    notes: tuple[str, ...] = ()
    if "train" in files and unnamed:
        notes = (f"left out beside the files named train: {some([shown(file.name) for file in unnamed])}",)
    elif unnamed:
        files["train"] = unnamed
    listings = {split: _listing(ParquetTable(paths), config) for split, paths in files.items()}
    first = next(iter(listings))
    listings[first] = replace(listings[first], notes=notes, faults=_in_words(faults, path))
    return listings


def _in_words(faults: dict[Path, str], folder: Path) -> tuple[str, ...]:
    return tuple(f"{shown(path.relative_to(folder).as_posix())} ({why})" for path, why in faults.items())


def _siblings(path: Path) -> dict[str, list[Path]]:
    """Files beside a parquet file that are named as it is, with test or validation for train."""
    splits = {}
    for split, words in {"validation": ("validation", "valid", "val"), "test": ("test",)}.items():
        names = (path.with_name(path.name.replace("train", word)) for word in words if "train" in path.name)
        if sibling := next((name for name in names if name.is_file()), None):
            splits[split] = [sibling]
    return splits


def _hub(name: str, config: DataConfig) -> Listings:
    """A set of the Hugging Face hub, or a local folder that ``datasets`` understands."""
    loaded = load_hub(f"hf:{name}")
    splits = {split_name(str(split)): str(split) for split in reversed(loaded)}
    if len(loaded) == 1:
        splits = {"train": next(iter(loaded))}
    tables = {ours: HubTable(loaded[split], f"hf:{name} {split}") for ours, split in splits.items() if ours}
    if not tables:
        raise UserError(f"hf:{name} has no split named train, only {', '.join(map(str, loaded))}")
    return {split: _listing(table, config) for split, table in tables.items()}


def _listing(table: RecordTable, config: DataConfig) -> ImageListing:
    image = table.image_column(config.image_column)
    label = table.find("label", LABEL_COLUMNS, "ClassLabel", config.label_column)
    names = [table.row_name(row) for row in range(len(table))]
    labels, classes = _labels(table, label, names)
    title = table.title + (f" ({table.note})" if table.note else "")
    identity: list[Any] = [image, file_identity(table.files)]
    if isinstance(table, HubTable):
        identity += [table.title, len(table)]
    return ImageListing(
        title,
        labels,
        classes,
        names,
        lambda: table.images(image),
        identity,
        table.files,
        column=lambda name: table.column(table.find("group", (), given=name)),
    )


def _labels(table: RecordTable, column: str, names: Sequence[str]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Label column → int64 (N,) and class names: the given ones, else the sorted labels themselves."""
    values, title = table.column(column), table.title
    if not values:
        raise UserError(f"{title} has no rows")
    missing = [row for row, value in enumerate(values) if value is None or value != value]
    if missing:
        first = names[missing[0]]
        raise UserError(f"column '{column}' has {len(missing)} missing labels, the first at {first}; remove those rows")
    if not all(isinstance(value, str) for value in values):
        if not all(isinstance(value, int | float) and value == int(value) for value in values):
            raise UserError(f"column '{column}' of {title} holds {values[0]!r}; labels are whole numbers or names")
        class_names = table.class_names(column)
        if class_names is None and all(isinstance(value, bool) for value in values):
            class_names = ("False", "True")
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
    index = {value: i for i, value in enumerate(known)}
    return np.array([index[value] for value in values], dtype=np.int64), tuple(str(value) for value in known)


def _sklearn(name: str) -> Listings:
    """Digits, 1,797 images of 8x8 in 17 grey levels, scaled to 0..255."""
    if name != "digits":
        raise unknown("scikit-learn image set", name, ["digits"])
    data = needed("sklearn.datasets", "offline", "data source sklearn:digits", "scikit-learn").load_digits()
    images = np.rint(data.images * (255 / 16)).astype(np.uint8)
    names = [f"digit {i}" for i in range(len(images))]
    classes = tuple(str(c) for c in data.target_names)
    labels = data.target.astype(np.int64)
    return {"train": ImageListing("scikit-learn digits", labels, classes, names, lambda: iter(images), "digits")}


SOURCES: Registry[Callable[[str], Listings]] = Registry(
    "kind of image source", {"sklearn": _sklearn}, group="crossalign.datasets"
)
"""What lists a source without decoding it, by the word before the colon; it is given what follows the colon."""


def register_images(kind: str) -> Callable[[Callable[[str], Listings]], Callable[[str], Listings]]:
    """Decorator: make a function usable for the sources of images ``kind:NAME``; it takes the name, and lists each split."""
    return SOURCES.register(kind)


def _cifar_binary(folder: Path) -> Listings:
    """CIFAR-10's original binary version: a label byte, then 3x32x32 colour planes, 10,000 times a file."""
    meta = folder / "batches.meta.txt"
    classes = tuple(meta.read_text(encoding="utf-8").split()) if meta.is_file() else tuple(str(i) for i in range(10))
    train = sorted(folder.glob("data_batch_*.bin"))
    splits = {"train": _binary_listing(train, classes, f"{folder.name} data_batch_*.bin")}
    if (folder / "test_batch.bin").is_file():
        splits["test"] = _binary_listing([folder / "test_batch.bin"], classes, f"{folder.name} test_batch.bin")
    return splits


def _binary_listing(files: list[Path], classes: tuple[str, ...], title: str) -> ImageListing:
    size = 1 + 3 * 32 * 32
    labels, names = [], []
    for file in files:
        if file.stat().st_size % size or not file.stat().st_size:
            raise UserError(f"'{file}' is not a whole CIFAR-10 binary file ({size} bytes an image); unpack it again")
        rows = np.memmap(file, dtype=np.uint8, mode="r").reshape(-1, size)
        labels.append(rows[:, 0].astype(np.int64))
        names += [f"{file.name} image {i}" for i in range(len(rows))]
        if labels[-1].max() >= len(classes):
            raise UserError(f"'{file}' holds label {labels[-1].max()}, but there are {len(classes)} class names")

    def records() -> Iterator[np.ndarray]:
        for file in files:
            for row in np.memmap(file, dtype=np.uint8, mode="r").reshape(-1, size):
                yield row[1:].reshape(3, 32, 32).transpose(1, 2, 0)

    identity = file_identity(files)
    return ImageListing(title, np.concatenate(labels), classes, names, records, identity, tuple(files))


def _image_folder(path: Path) -> Listings:
    """Class folders, or folders of them whose names speak of splits, as those of files do."""
    inside = {folder: {below.name for below in _subfolders(folder)} for folder in _subfolders(path)}
    parts = {folder: split for folder, below in inside.items() if below and (split := split_name(folder.name))}
    classes = {folder.name for folder in inside if folder not in parts}
    if classes and not any(SPLITS.get(folder.name.lower()) == "train" for folder in parts):  # "train station" is a class
        parts = {}
    if not parts:
        _check_classes(path, {folder.name: below for folder, below in inside.items()})
        return {"train": _class_folders(path, path.name)}
    for folder, split in parts.items():
        if twin := next((other for other in parts if parts[other] == split and other != folder), None):
            raise UserError(f"'{path}': '{folder.name}' and '{twin.name}' are both named {split}: put them into one folder")
    listings = {split: _class_folders(folder, f"{path.name}/{folder.name}") for folder, split in parts.items()}
    beside = {folder.name: len(files_below(folder, EXTENSIONS, {})) for folder in inside if folder not in parts}
    left_out = [f"{shown(name)} ({count:,} images)" for name, count in beside.items() if count]
    if left_out and "train" in listings:
        train = listings["train"]
        listings["train"] = replace(train, notes=(*train.notes, f"left out beside the splits: {some(left_out)}"))
    return listings


def _check_classes(path: Path, inside: dict[str, set[str]]) -> None:
    """Raise UserError where folders (name → names of those in it) seem to be splits, though not named so."""
    alike = [name for name, below in inside.items() if len(below) > 1 and below == next(iter(inside.values()))]
    beside = [name for name, below in inside.items() if below and below <= inside.keys() - {name}]
    if beside or len(alike) == len(inside) > 1:
        why = f"'{beside[0]}' holds the folders that lie beside it" if beside else f"{some(alike)} hold the same folders"
        raise UserError(
            f"'{path}': {why} ({some(sorted(inside[(beside or alike)[0]]))}), so that it is not clear which are classes: put "
            "the images of each class into one folder, below train, validation and test if they are split"
        )


def _class_folders(path: Path, title: str) -> ImageListing:
    """Each folder is a class and holds its images, at any depth; the order of classes is that of their sorted names."""
    folders = _subfolders(path)
    if not folders:
        raise UserError(f"'{path}' holds no class folders; put the images of each class into a folder of its own")
    faults = {entry: "a link that leads nowhere" for entry in _entries(path) if not entry.exists()}
    loose = sum(entry.suffix.lower() in EXTENSIONS and entry.is_file() for entry in _entries(path))
    notes = (f"{loose:,} images beside the class folders left out",) if loose else ()
    files: list[Path] = []
    counts = []
    for folder in folders:
        pictures = files_below(folder, EXTENSIONS, faults)
        if not pictures:
            kinds = ", ".join(sorted(EXTENSIONS))
            why = next((f"{entry}: {why}" for entry, why in faults.items() if entry.is_relative_to(folder)), kinds)
            raise UserError(f"class folder '{folder}' holds no images ({why}); fill it or remove it")
        files += pictures
        counts.append(len(pictures))
    classes = tuple(folder.name for folder in folders)
    spelt = [unicodedata.normalize("NFC", name) for name in classes]
    if twin := next((name for name in spelt if spelt.count(name) > 1), None):
        raise UserError(f"'{path}' has two folders '{twin}', of which accents are encoded in two ways: put them into one")
    names = [f.relative_to(path).as_posix() for f in files]
    labels = np.repeat(np.arange(len(folders), dtype=np.int64), counts)
    identity, bad = file_identity(files), _in_words(faults, path)
    return ImageListing(title, labels, classes, names, lambda: iter(files), identity, tuple(files), bad, notes)


def _subfolders(path: Path) -> list[Path]:
    return [entry for entry in _entries(path) if entry.is_dir()]


def _entries(path: Path) -> list[Path]:
    try:
        return sorted(entry for entry in path.iterdir() if not is_litter(entry.name))
    except OSError as error:
        raise UserError(f"cannot read the folder '{path}' ({error.strerror}): mend or remove it") from error
