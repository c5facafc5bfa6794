"""Rows of files, whatever their format: tables in parquet files or of the hub, JSON lines and lists, lines of text.

Nothing is read before it is asked for, rows are read in order from any one on, and each has a name for messages.
"""

import re
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from crossalign.core.errors import UserError, cause, first_line, needed
from crossalign.core.reading import open_regular, parse_json, read_json, user_path
from crossalign.core.refs import Ref
from crossalign.data.sources import Raw, title_of

IMAGE_COLUMNS = ("img", "image")
"""Usual names of a column of images."""
BATCH_ROWS = 64  # read at a time
IN_MEMORY_BYTES = 1 << 30
"""Encoded images that a parquet table keeps in memory for :meth:`RecordTable.image`; beyond it, row groups are read again."""

Row: TypeAlias = tuple[Any, str, int, int]
"""A record, its name for messages, its place and the next one's: bytes in .jsonl, else numbers of rows."""


class RecordTable(ABC):
    """Rows with named columns; images stay encoded."""

    def __init__(self, schema: Any, title: str, files: Sequence[Path]) -> None:
        """
        Args:
            schema: Arrow's, with the hub's metadata where it has them.
            title: for messages.
            files: what the table is read from.
        """
        self.schema, self.title, self.files = schema, title, tuple(files)
        self.names: list[str] = schema.names
        self._metadata: dict[bytes, bytes] = schema.metadata or {}
        self.note = self._text(b"source")

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def batches(self, columns: list[str] | None = None, start: int = 0) -> Iterator[tuple[Path | None, Any]]:
        """Rows from ``start`` on as Arrow has them, a few at a time, each with the folder that paths in it count from."""

    @abstractmethod
    def image(self, column: str, row: int) -> Raw:
        """The image of a row, still encoded."""

    def row_name(self, row: int) -> str:
        """A row, in words."""
        return f"{self.title} row {row}"

    def images(self, column: str) -> Iterator[Raw]:
        """All images of a column, in order, still encoded."""
        for folder, batch in self.batches([column]):
            yield from (_raw(cell, folder) for cell in batch.column(0).to_pylist())

    def column(self, name: str) -> list[Any]:
        """All cells of a column."""
        return [cell for _, batch in self.batches([name]) for cell in batch.column(0).to_pylist()]

    def rows(self, columns: list[str] | None = None, start: int = 0) -> Iterator[Row]:
        """Rows from ``start`` on, with some of the columns or all."""
        for _, batch in self.batches(columns, start):
            for number, record in enumerate(batch.to_pylist(), start):
                yield record, self.row_name(number), number, number + 1
            start += batch.num_rows

    def find(self, kind: str, usual: tuple[str, ...], typed: str = "", given: str = "") -> str:
        """The column ``given``, else the first of the usual ones, else the first that the hub's metadata types as such.

        Raises:
            UserError: there is none.
        """
        for name in [given] if given else [*usual, *(self._typed(typed) if typed else [])]:
            if name in self.names:
                return name
        wanted = f"column '{given}'" if given else f"{kind} column ({' or '.join(usual)})"
        raise UserError(f"{self.title} has no {wanted}, only {', '.join(self.names)}: say which it is, or rename one")

    def image_column(self, name: str = "") -> str:
        """The column of images, which may be named.

        Raises:
            UserError: there is none, or it holds names or numbers.
        """
        name = self.find("image", IMAGE_COLUMNS, "Image", name)
        kind = self._kind(name)
        if kind not in ("binary", "large_binary", "binary_view", "fixed_size_binary", "struct"):
            raise UserError(f"column '{name}' of {self.title} holds {kind}; encoded images (PNG, JPEG bytes) are expected")
        return name

    def check_text(self, column: str) -> None:
        """Raise UserError unless there is such a column, of text."""
        if column not in self.names:
            raise no_column(self.title, column, self.names)
        kind = self._kind(column)
        if kind not in ("string", "large_string", "string_view", "null"):
            raise UserError(
                f"column '{column}' of {self.title} holds {kind}, not text; the columns are {', '.join(self.names)}"
            )

    def _kind(self, column: str) -> str:
        """Arrow's word for what cells of a column hold, such as string; where they are numbers of a dictionary's, for those."""
        kind = self.schema.field(column).type
        return re.split(r"[<\[]", str(kind.value_type if str(kind).startswith("dictionary") else kind))[0]

    def class_names(self, column: str) -> Sequence[str] | None:
        """Names of the classes that whole numbers in a column stand for; None where none are given."""
        names = self._features.get(column, {}).get("names") if column in self._typed("ClassLabel") else None
        if names:
            return [str(name) for name in names]
        plain = self._text(b"class_names")
        return [name.strip() for name in plain.split(",")] if plain else None

    def _typed(self, kind: str) -> list[str]:
        """Columns that the hub's metadata describes as ``kind``, such as Image or ClassLabel."""
        return [name for name, value in self._features.items() if isinstance(value, dict) and value.get("_type") == kind]

    @cached_property
    def _features(self) -> dict[str, Any]:
        """Column → description, as ``datasets`` leaves it in the schema metadata; empty where it did not write the file."""
        try:
            about = parse_json(self._metadata.get(b"huggingface", b"{}"), self.title, "write it again", dict)
            features = about.get("info", {}).get("features", {})
        except (UserError, AttributeError):
            return {}
        return features if isinstance(features, dict) else {}

    def _text(self, key: bytes) -> str:
        return self._metadata.get(key, b"").decode("utf-8", "replace")


class _RowGroup(NamedTuple):
    """Rows that lie together in a parquet file; numbers of rows count over all files of the table."""

    start: int
    stop: int
    file: Path
    file_start: int
    """The first row of the file."""
    number: int
    """Which group of the file it is."""


class ParquetTable(RecordTable):
    """Rows of parquet files, one after the other."""

    def __init__(self, files: Sequence[Path]) -> None:
        import pyarrow.parquet as pq

        with _reading(files[0]):
            super().__init__(pq.read_schema(files[0]), title_of(files), files)
        self._cells: dict[_RowGroup, list[Any]] = {}
        self._bytes = 0

    def __len__(self) -> int:
        return self._groups[-1].stop if self._groups else 0

    def row_name(self, row: int) -> str:
        group = self._group_of(row)
        return f"{group.file.name} row {row - group.file_start}"

    def image(self, column: str, row: int) -> Raw:
        import pyarrow.parquet as pq

        group = self._group_of(row)
        if group not in self._cells:
            with _reading(group.file):
                cells = pq.ParquetFile(group.file).read_row_group(group.number, columns=[column]).column(0)
            if self._bytes + cells.nbytes > IN_MEMORY_BYTES:
                self._cells.clear()
                self._bytes = 0
            self._cells[group] = cells.to_pylist()
            self._bytes += cells.nbytes
        return _raw(self._cells[group][row - group.start], group.file.parent)

    def batches(self, columns: list[str] | None = None, start: int = 0) -> Iterator[tuple[Path | None, Any]]:
        import pyarrow.parquet as pq

        wanted = (group for group in self._groups if group.stop > start)
        for file, groups_of_file in groupby(wanted, key=lambda group: group.file):
            groups = list(groups_of_file)
            skip = max(0, start - groups[0].start)
            with _reading(file), pq.ParquetFile(file) as opened:
                present = opened.schema_arrow.names
                missing = [column for column in columns or () if column not in present]
                if missing:
                    raise UserError(
                        f"{file.name} has no '{missing[0]}', which {self.files[0].name} has, only {', '.join(present)}: "
                        "name files of one kind"
                    )
                numbers = [group.number for group in groups]
                for batch in opened.iter_batches(BATCH_ROWS, row_groups=numbers, columns=columns):
                    if skip < batch.num_rows:
                        yield file.parent, batch.slice(skip)
                    skip = max(0, skip - batch.num_rows)

    def _group_of(self, row: int) -> _RowGroup:
        return self._groups[bisect_right(self._groups, row, key=lambda group: group.start) - 1]

    @cached_property
    def _groups(self) -> list[_RowGroup]:
        """All row groups, in order."""
        import pyarrow.parquet as pq

        groups = []
        start = 0
        for file in self.files:
            with _reading(file):
                metadata = pq.read_metadata(file)
            file_start = start
            for number in range(metadata.num_row_groups):
                stop = start + metadata.row_group(number).num_rows
                groups.append(_RowGroup(start, stop, file, file_start, number))
                start = stop
        return groups


class HubTable(RecordTable):
    """Rows of a set as ``datasets`` loads it, in its memory map."""

    def __init__(self, rows: Any, title: str) -> None:
        super().__init__(rows.features.arrow_schema, title, [Path(entry["filename"]) for entry in rows.cache_files])
        self._rows = rows.with_format("arrow")  # so that nothing is decoded

    def __len__(self) -> int:
        return len(self._rows)

    def image(self, column: str, row: int) -> Raw:
        return _raw(self._rows[row].column(column)[0].as_py(), None)

    def batches(self, columns: list[str] | None = None, start: int = 0) -> Iterator[tuple[Path | None, Any]]:
        rows = self._rows if columns is None else self._rows.select_columns(columns)
        for batch in rows.select(range(start, len(rows))).iter(BATCH_ROWS):
            yield None, batch


def open_table(source: Path | str) -> RecordTable:
    """A parquet file, or the training split of a set of the hub, else its only one.

    Raises:
        UserError: it cannot be opened; or the set has several splits, none of them named train.
    """
    if isinstance(source, Path):
        return ParquetTable([source])
    loaded = load_hub(source)
    if "train" not in loaded and len(loaded) > 1:
        raise UserError(f"{source} has no split named train, only {', '.join(map(str, loaded))}")
    return HubTable(loaded["train"] if "train" in loaded else next(iter(loaded.values())), source)


def load_hub(ref: str) -> Any:
    """The splits of a set of the hub as ``datasets`` loads them, rows in a memory map.

    Args:
        ref: hf:ORG/NAME, hf:ORG/NAME:CONFIGURATION for a set that has several, then @REVISION; or hf: and a local folder
            that ``datasets`` understands.

    Raises:
        UserError: the package is missing, or the set cannot be opened.
    """
    parts = Ref(ref, ())
    datasets = needed("datasets", "hub", f"data source {ref}")
    path, configuration = str(user_path(parts.rest)), ""
    is_local = Path(path).exists()
    if not is_local:
        path, _, configuration = parts.name.partition(":")
        path = str(user_path(path)) if path.startswith(("~", "/", ".")) else path
    try:
        return datasets.load_dataset(path, configuration or None, revision=(not is_local and parts.revision) or None)
    except Exception as error:  # the hub, the network and each set's own files fail in many ways
        raise UserError(
            f"cannot open {ref} ({cause(error)}); check the name and the network, or give a local file or folder"
        ) from error


def _raw(cell: Any, folder: Path | None) -> Raw:
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


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Raise UserError for a parquet file that turns out not to be one, or not a whole one."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, KeyError) as error:
        fault = f"cannot read parquet file {file.name} ({first_line(error)})"
        raise UserError(f"{fault}; it may be cut off: fetch it again") from error


def no_column(where: str, column: str, present: Sequence[str]) -> UserError:
    """The error for a table or an object without the text that is asked for."""
    return UserError(f"{where} has no '{column}', only {', '.join(present) or 'nothing'}; name the text's column or key")


def json_lines(path: Path, start: int = 0, title: str = "", remedy: str = "mend or remove it") -> Iterator[Row]:
    """Objects of a .jsonl file.

    Args:
        path: the file.
        start: the byte to begin at, where a line begins.
        title: what messages call it; empty for its own name.
        remedy: what to do about a damaged line.

    Raises:
        UserError: a line that is no JSON object.
    """
    with open_regular(path) as file:
        number = position = 0
        while position < start and (line := file.readline()):
            number, position = number + 1, position + len(line)
        for line in file:
            number, this, position = number + 1, position, position + len(line)
            if not line.strip():
                continue
            where = f"{title or path.name} line {number}"
            record = parse_json(line.rstrip(b"\r\n"), where, remedy)
            if not isinstance(record, dict):
                raise UserError(f'{where} holds {type(record).__name__}; each line is an object such as {{"text": "…"}}')
            yield record, where, this, position


def json_list(path: Path) -> Iterator[Row]:
    """The entries of a .json file.

    Raises:
        UserError: it holds no list.
    """
    value = read_json(path, object, "one object a line is .jsonl, of any size", most=1 << 30, title=path.name)
    if not isinstance(value, list):
        raise UserError(f"{path.name} holds {type(value).__name__}; it should be a list of objects")
    yield from ((record, f"{path.name} entry {number}", number, number + 1) for number, record in enumerate(value))


def whole_text(path: Path, fault: Callable[[Exception], str]) -> str:
    """A whole file of text, UTF-8 with or without a byte order mark; line ends stay as they are.

    Raises:
        UserError: with the sentence of ``fault``, where it cannot be read.
    """
    try:
        with open_regular(path) as file:
            return file.read().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(fault(error)) from error


def read_text(path: str) -> str:
    """A text to score.

    Raises:
        UserError: it cannot be read, or holds no text.
    """
    # As a corpus is read: line ends stay.
    text = whole_text(
        user_path(path),
        lambda error: f"cannot read the text '{path}' to score ({error}): give a UTF-8 text file",
    )
    if not text.strip():
        raise UserError(f"the text '{path}' to score is empty: give another, or leave it out")
    return text
