"""Where images with texts come from: each reader lists one kind of source, without decoding an image.

``list_pairs`` finds the reader by the look of the source's name. A new kind of files is one row of ``READERS``, a new kind of
source is one function in ``SOURCES``.
"""

import glob
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from crossalign.config import PairsConfig
from crossalign.core.errors import UserError, some
from crossalign.core.reading import open_regular, parse_json, shown, user_path
from crossalign.core.refs import Ref
from crossalign.core.registry import Registry
from crossalign.data.images.decode import MAX_BYTES
from crossalign.data.pairs.openmoji import openmoji_file
from crossalign.data.records import HubTable, ParquetTable, RecordTable, load_hub
from crossalign.data.sources import EXTENSIONS, Raw, by_split, file_identity, files_below, is_litter, split_name, title_of

TEXT_COLUMNS = ("captions", "caption", "texts", "text", "sentences", "sentence", "alt_text")
ID_COLUMNS = ("filename", "file_name", "image_id", "img_id", "id", "key", "__key__", "url")
TEXT_FILES = (".txt", ".caption", ".json")
LARGEST_TEXT = 1 << 20
"""Bytes of a caption's file in an archive."""

Parts = dict[str, list[Any]]
"""Files, or loaded splits of a hub set, by split; under "" where the source has no splits."""


@dataclass(frozen=True)
class PairListing:
    """Pairs as found: texts and ids are known, images are read one by one and still encoded."""

    title: str
    """For messages."""
    ids: Sequence[str]
    texts: Sequence[Any]
    """A cell for each image: a text or its bytes, a list of texts, None; a UserError says why it cannot be read."""
    read: Callable[[int], Raw]
    """The encoded image of a row."""
    identity: Any
    """JSON-able; changes when the pairs may have changed."""
    splits: Sequence[str] | None = None
    """The split of each row, where the source has a column of that name."""
    faults: tuple[str, ...] = ()
    """What else lies there and cannot be read, each with the reason."""


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
            plain = takewhile(lambda part: not re.search(r"[*?\[{]", part), path.parts[:-1])
            folder = path if path.is_dir() else path.parent if path.is_file() else Path(*plain)
            return by_split(folder, files), make
    if not source or not (path.exists() or glob.glob(str(path))):
        raise UserError(
            f"pair source '{source}' does not exist; give openmoji, a .parquet file or folder, .tar shards or hf:ORG/NAME"
        )
    raise UserError(f"'{source}' holds no .parquet file and no .tar shard; pairs are read from those, openmoji or hf:ORG/NAME")


def _files(path: Path, suffix: str) -> list[Path]:
    """The file, those below a folder, or those of a pattern such as shards-*.tar or {00..12}.tar, sorted."""
    if path.is_file():
        return [path] if path.suffix == suffix else []
    if path.is_dir():
        return files_below(path, {suffix})
    files: list[str] = []
    for name in _spelt_out(str(path)) if path.suffix == suffix else ():
        matches = glob.glob(name)
        if not matches and name != str(path):
            raise UserError(f"'{name}' does not exist, which is one of '{path}': name those that do")
        files += matches
    return sorted(map(Path, files))


def _spelt_out(pattern: str) -> Iterator[str]:
    """Names that braces stand for, as in a shell: ``{00..12}`` and ``{a,b}``."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", pattern)
    if not match:
        yield pattern
        return
    first, last, several = match.groups()
    words = several.split(",") if several else (f"{i:0{len(first)}}" for i in range(int(first), int(last) + 1))
    for word in words:
        yield from _spelt_out(pattern[: match.start()] + word + pattern[match.end() :])


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
    images: list[tuple[Path, tarfile.TarInfo | None, str]] = []
    faults: list[str] = []
    for file in files:
        try:
            with open_regular(file) as opened, tarfile.open(fileobj=opened, mode="r:", tarinfo=_Member) as archive:
                for key, sample in _samples(archive).items():
                    image = next((info for kind, info in sample.items() if kind in EXTENSIONS), None)
                    text = next((info for kind in kinds if (info := sample.get(kind)) is not None), None)
                    ids.append(key)
                    texts.append(None if text is None else _tar_text(archive, text, config.text_column))
                    images.append((file, image, shown(some(list(sample)))))
                if fault := _fault_at_end(archive):
                    faults.append(f"{file.name}: {fault}")
        except (tarfile.TarError, OSError, EOFError) as error:
            raise UserError(f"cannot read '{file}' as a .tar shard ({error}); it may be cut off or compressed") from error
    if ids and not faults and not any(image and text is not None for (_, image, _), text in zip(images, texts, strict=True)):
        raise UserError(
            f"no picture of {title_of(files)} has a text: name them KEY.jpg and KEY.txt ({', '.join(kinds)}), where KEY ends "
            f"at the first dot, after which there is {images[0][2]} here"
        )

    def read(row: int) -> Raw:
        file, image, suffixes = images[row]
        if image is None or image.issparse():
            raise UserError("a sparse member" if image else f"no image data among {suffixes}")
        if image.size > MAX_BYTES:
            raise UserError(f"{image.size:,} bytes, more than the {MAX_BYTES:,} allowed")
        with open_regular(file) as opened:
            opened.seek(image.offset_data)
            return opened.read(image.size)

    identity = [config.text_column, file_identity(files)]
    return PairListing(title_of(files), unique(ids), texts, read, identity, faults=tuple(faults))


class _Member(tarfile.TarInfo):
    """A member of an archive of which headers, too, have bounds: a long name or extended header is read as a whole."""

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type not in (*tarfile.REGULAR_TYPES, tarfile.DIRTYPE) and self.size > LARGEST_TEXT:
            raise tarfile.ReadError(f"a header of {self.size:,} bytes")
        return super()._proc_member(archive)  # type: ignore[misc,no-any-return]


def _samples(archive: tarfile.TarFile) -> dict[str, dict[str, tarfile.TarInfo]]:
    """Members by key and by what follows its dot; litter and what is no file are left out."""
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    for member in archive:
        if member.isfile() and not is_litter(member.name):
            folder, _, base = member.name.rpartition("/")
            stem, dot, rest = base.partition(".")
            samples.setdefault(f"{folder}/{stem}" if folder else stem, {})[dot + rest.lower()] = member
    return samples


def _fault_at_end(archive: tarfile.TarFile) -> str:
    """What is wrong with the end of an archive that has been gone through; "" if nothing is."""
    file = archive.fileobj
    assert file is not None
    file.seek(archive.offset)
    mark = file.read(tarfile.BLOCKSIZE)
    if len(mark) < tarfile.BLOCKSIZE or any(mark):
        return "it may be cut off, since it has no end mark: fetch it again"
    while block := file.read(1 << 20):
        if any(block):
            return "it goes on after its end mark, as joined archives do: unpack and pack it again"
    return ""


def _tar_text(archive: tarfile.TarFile, member: tarfile.TarInfo, column: str) -> Any:
    """A text file's bytes, or what a JSON file has under one of the usual names; a UserError says why it cannot be read."""
    base = shown(member.name.rpartition("/")[2])
    if member.size > LARGEST_TEXT:
        return UserError(f"{base} has {member.size:,} bytes, more than the {LARGEST_TEXT:,} allowed")
    opened = archive.extractfile(member)
    assert opened is not None  # it is a file
    content = opened.read()
    if not member.name.lower().endswith(".json"):
        return content
    try:
        record = parse_json(content, base, "mend it")
    except UserError as error:
        return error
    if not isinstance(record, dict):
        return record
    names = (column,) if column else TEXT_COLUMNS
    lacks = f"{base} has {shown(some(list(record))) or 'nothing'}, none of {', '.join(names)}"
    return next((record[name] for name in names if name in record), UserError(lacks))


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
