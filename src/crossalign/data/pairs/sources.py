"""Where images with texts come from: each reader lists one kind of source, without decoding an image.

``list_pairs`` finds the reader by the look of the source's name. A new kind of files is one row of ``READERS``, a new kind of
source is one function in ``SOURCES``.
"""

import glob
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crossalign.config import PairsConfig
from crossalign.core.errors import UserError
from crossalign.core.reading import parse_json, user_path
from crossalign.core.refs import Ref
from crossalign.core.registry import Registry
from crossalign.data.pairs.openmoji import openmoji_file
from crossalign.data.records import HubTable, ParquetTable, RecordTable, load_hub
from crossalign.data.sources import EXTENSIONS, Raw, by_split, file_identity, files_below, split_name, title_of

TEXT_COLUMNS = ("captions", "caption", "texts", "text", "sentences", "sentence", "alt_text")
ID_COLUMNS = ("filename", "file_name", "image_id", "img_id", "id", "key", "__key__", "url")
TEXT_FILES = (".txt", ".caption", ".json")

Parts = dict[str, list[Any]]
"""Files, or loaded splits of a hub set, by split; under "" where the source has no splits."""


@dataclass(frozen=True)
class PairListing:
    """Pairs as found: texts and ids are known, images are read one by one and still encoded."""

    title: str
    """For messages."""
    ids: Sequence[str]
    texts: Sequence[Any]
    """A cell for each image: a text, a list of texts, or None."""
    read: Callable[[int], Raw]
    """The encoded image of a row."""
    identity: Any
    """JSON-able; changes when the pairs may have changed."""
    splits: Sequence[str] | None = None
    """The split of each row, where the source has a column of that name."""


def list_pairs(config: PairsConfig) -> tuple[PairListing, bool]:
    """The pairs of a source, unread, and whether they are those of ``config.split`` alone already.

    Raises:
        UserError: no such source, nothing in it that can be read, or no such split.
    """
    parts, make = _reader(config.source)
    if config.split_file or len(parts) == 1:
        listing = make([part for some in parts.values() for part in some], config)
        if config.split_file or listing.splits is not None or "" in parts:
            return listing, False
    if config.split not in parts:
        names = ", ".join(sorted(parts))
        raise UserError(f"'{config.source}' has no split '{config.split}', only {names}: choose one with --pairs.split")
    return make(parts[config.split], config), True


def check_source(source: str) -> None:
    """Raise UserError where nothing lies at ``source`` that pairs are read from; nothing is read yet."""
    _reader(source)


def _reader(source: str) -> tuple[Parts, Callable[[list[Any], PairsConfig], PairListing]]:
    if source == "openmoji":
        return {"": [openmoji_file()]}, _table
    ref = Ref(source, ())
    if ref.kind == "hf":
        return _hub_parts(source), _table
    if ref.kind != "path" and ref.kind in SOURCES:
        return {"": [ref.rest]}, lambda names, _: SOURCES[ref.kind](names[0])
    path = user_path(source)
    for suffix, make in READERS.items():
        files = _files(path, suffix) if source else []
        if files:
            return by_split(path if path.is_dir() else path.parent, files), make
    if not source or not (path.exists() or glob.glob(str(path))):
        raise UserError(
            f"pair source '{source}' does not exist; give openmoji, a .parquet file or folder, .tar shards or hf:ORG/NAME"
        )
    raise UserError(f"'{source}' holds no .parquet file and no .tar shard; pairs are read from those, openmoji or hf:ORG/NAME")


def _files(path: Path, suffix: str) -> list[Path]:
    """The file, those below a folder, or those of a pattern such as shards-*.tar, sorted."""
    if path.is_file():
        return [path] if path.suffix == suffix else []
    if path.is_dir():
        return files_below(path, {suffix})
    return sorted(Path(name) for name in glob.glob(str(path)) if name.endswith(suffix))


def _hub_parts(ref: str) -> Parts:
    loaded = load_hub(ref)
    parts: Parts = {}
    for split, rows in loaded.items():
        ours = split_name(str(split)) or ("" if len(loaded) == 1 else str(split))
        parts.setdefault(ours, []).append(rows)
    return parts


def _table(parts: list[Any], config: PairsConfig) -> PairListing:
    """Pairs of a table with a column of encoded images and one of captions, or of lists of captions."""
    if isinstance(parts[0], Path):
        table: RecordTable = ParquetTable(parts)
    else:
        import datasets

        table = HubTable(datasets.concatenate_datasets(parts) if len(parts) > 1 else parts[0], config.source)
    image = table.image_column(config.image_column)
    text = table.find("text", TEXT_COLUMNS, given=config.text_column)
    key = next((name for name in ID_COLUMNS if name in table.names and name not in (image, text)), None)
    texts = table.column(text)
    ids = table.column(key) if key else [f"row {i}" for i in range(len(texts))]
    splits = table.column("split") if "split" in table.names else None
    identity: list[Any] = [image, text, key]
    if isinstance(table, HubTable):
        identity = [table.title, *identity, len(table)]
    identity.append(file_identity(table.files))
    return PairListing(table.note or table.title, unique(ids), texts, lambda row: table.image(image, row), identity, splits)


def _tar(files: list[Path], config: PairsConfig) -> PairListing:
    """WebDataset shards: files with one name before the first dot belong together, KEY.jpg with KEY.txt or KEY.json.

    With a text column that one of the .json files is read, and no other.
    """
    if config.image_column:
        raise UserError("--pairs.image-column is for tables; in .tar shards the image is the file with a picture's suffix")
    kinds = (".json",) if config.text_column else TEXT_FILES
    ids: list[str] = []
    texts: list[Any] = []
    places: list[tuple[Path, int, int]] = []
    for file in files:
        samples: dict[str, dict[str, tarfile.TarInfo]] = {}
        try:
            with tarfile.open(file, "r:") as archive:
                for member in archive:
                    if member.isfile():
                        folder, _, base = member.name.rpartition("/")
                        stem, dot, rest = base.partition(".")
                        samples.setdefault(f"{folder}/{stem}" if folder else stem, {})[dot + rest.lower()] = member
                for key, sample in samples.items():
                    image = next((info for kind, info in sample.items() if kind in EXTENSIONS), None)
                    text = next((info for kind in kinds if (info := sample.get(kind)) is not None), None)
                    ids.append(key)
                    texts.append(None if text is None else _tar_text(archive, text, config.text_column))
                    places.append((file, image.offset_data, image.size) if image else (file, 0, 0))
        except (tarfile.TarError, OSError, EOFError) as error:
            raise UserError(f"cannot read '{file}' as a .tar shard ({error}); it may be cut off or compressed") from error

    def read(row: int) -> Raw:
        file, start, size = places[row]
        with file.open("rb") as opened:
            opened.seek(start)
            return opened.read(size) if size else None

    return PairListing(title_of(files), unique(ids), texts, read, [config.text_column, file_identity(files)])


def _tar_text(archive: tarfile.TarFile, member: tarfile.TarInfo, column: str) -> Any:
    """A text file's text, or what a JSON file has under one of the usual names."""
    opened = archive.extractfile(member)
    assert opened is not None  # it is a file
    content = opened.read().decode("utf-8", "replace")
    if not member.name.lower().endswith(".json"):
        return content
    try:
        record = parse_json(content, member.name, "mend it")
    except UserError:
        return None
    if not isinstance(record, dict):
        return record if isinstance(record, str | list) else None
    return next((record[name] for name in ((column,) if column else TEXT_COLUMNS) if name in record), None)


def unique(ids: Sequence[Any]) -> list[str]:
    """Ids as text; the second row of an id becomes ``id#2``, and so on: some sets have a row for each caption."""
    seen: dict[str, int] = {}
    distinct = []
    for value in ids:
        name = str(value)
        seen[name] = seen.get(name, 0) + 1
        distinct.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return distinct


SOURCES: Registry[Callable[[str], PairListing]] = Registry("kind of pair source", group="crossalign.datasets")
"""What lists the pairs of a user's own kind of source, by the word before the colon; it is given what follows the colon."""
READERS: dict[str, Callable[[list[Any], PairsConfig], PairListing]] = {".parquet": _table, ".tar": _tar}
"""By the suffix of files."""


def register_pairs(kind: str) -> Callable[[Callable[[str], PairListing]], Callable[[str], PairListing]]:
    """Decorator: make a function usable for the sources of pairs ``kind:NAME``; it takes the name, and lists the pairs."""
    return SOURCES.register(kind)
