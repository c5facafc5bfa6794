"""Rows of files, whatever their format: tables in parquet files or of the hub, JSON lines and lists, lines of text.

Nothing is read before it is asked for, tables are read in order from any row on, and each row has a name for messages.
"""

from __future__ import annotations

import bisect
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from crossalign.core.errors import UserError
from crossalign.data.sources import Raw, title_of

IMAGE_COLUMNS = ("img", "image")
"""Usual names of a column of images."""
ROWS = 64  # read at a time
IN_MEMORY_BYTES = 1 << 30
"""Encoded images that a parquet table keeps in memory for :meth:`Table.image`; beyond it, row groups are read again."""


class _Table:
    """What tables of both kinds have."""

    title: str
    """For messages."""
    names: list[str]
    """Of the columns."""
    files: tuple[Path, ...]
    """What it is read from."""

    def typed(self, kind: str) -> list[str]:
        """Columns that the hub's metadata describes as ``kind``, such as Image or ClassLabel."""
        raise NotImplementedError

    def find(self, kind: str, usual: tuple[str, ...], typed: str = "") -> str:
        """The first of the usual columns, else the first that the hub's metadata types as such.

        Raises:
            UserError: there is none.
        """
        for name in (*usual, *(self.typed(typed) if typed else [])):
            if name in self.names:
                return name
        raise UserError(f"{self.title} has no {kind} column ({' or '.join(usual)}), only {', '.join(self.names)}; rename one")


class ParquetTable(_Table):
    """Rows with named columns in parquet files, one after the other."""

    def __init__(self, files: Sequence[Path]) -> None:
        import pyarrow.parquet as pq

        self.files, self.title = tuple(files), title_of(files)
        with reading(files[0]):
            self.schema = pq.read_schema(files[0])
        self.names = self.schema.names
        self._metadata: dict[bytes, bytes] = self.schema.metadata or {}
        self.note = self._text(b"source")
        self._kept: dict[int, list[Any]] = {}
        self._bytes = 0

    def __len__(self) -> int:
        return self._groups[1][-1]

    def row_name(self, row: int) -> str:
        """A row, in words."""
        starts = self._groups[2]
        file = bisect.bisect_right(starts, row) - 1
        return f"{self.files[file].name} row {row - starts[file]}"

    def typed(self, kind: str) -> list[str]:
        return [name for name, value in self._features.items() if isinstance(value, dict) and value.get("_type") == kind]

    def class_names(self, column: str) -> Sequence[str] | None:
        """Names of the classes that whole numbers in a column stand for; None where none are given."""
        names = self._features.get(column, {}).get("names") if column in self.typed("ClassLabel") else None
        if names:
            return [str(name) for name in names]
        plain = self._text(b"class_names")
        return [name.strip() for name in plain.split(",")] if plain else None

    def column(self, name: str) -> list[Any]:
        """All cells of a column."""
        import pyarrow.parquet as pq

        cells: list[Any] = []
        for file in self.files:
            with reading(file):
                cells += pq.read_table(file, columns=[name]).column(name).to_pylist()
        return cells

    def records(self, columns: list[str] | None = None, start: int = 0) -> Iterator[dict[str, Any]]:
        """Rows from ``start`` on, with some of the columns or all, a few in memory at a time."""
        for _, batch in self._batches(columns, start):
            yield from batch.to_pylist()

    def images(self, column: str) -> Iterator[Raw]:
        """All images of a column, in order, still encoded."""
        for file, batch in self._batches([column]):
            yield from (raw_cell(cell, file.parent) for cell in batch.column(0).to_pylist())

    def image(self, column: str, row: int) -> Raw:
        """The image of a row, still encoded."""
        import pyarrow.parquet as pq

        places, starts, _ = self._groups
        number = bisect.bisect_right(starts, row) - 1
        owner, group = places[number]
        file = self.files[owner]
        if number not in self._kept:
            with reading(file):
                cells = pq.ParquetFile(file).read_row_group(group, columns=[column]).column(0)
            if self._bytes + cells.nbytes > IN_MEMORY_BYTES:
                self._kept.clear()
                self._bytes = 0
            self._kept[number] = cells.to_pylist()
            self._bytes += cells.nbytes
        return raw_cell(self._kept[number][row - starts[number]], file.parent)

    def check_images(self, column: str) -> None:
        """Raise UserError for a column of images that holds names or numbers."""
        import pyarrow as pa

        kind = self.schema.field(column).type
        if not any(check(kind) for check in (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_struct)):
            raise UserError(f"column '{column}' of {self.title} holds {kind}; encoded images (PNG, JPEG bytes) are expected")

    def check_text(self, column: str) -> None:
        """Raise UserError unless there is such a column, of text."""
        import pyarrow as pa

        if column not in self.names:
            raise no_column(self.title, column, self.names)
        kind = self.schema.field(column).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not any(check(kind) for check in (pa.types.is_string, pa.types.is_large_string, pa.types.is_null)):
            raise UserError(
                f"column '{column}' of {self.title} holds {kind}, not text; the columns are {', '.join(self.names)}"
            )

    def _batches(self, columns: list[str] | None, start: int = 0) -> Iterator[tuple[Path, Any]]:
        """Record batches of all rows from ``start`` on, each with its file."""
        import pyarrow.parquet as pq

        places, starts, _ = self._groups
        for owner, file in enumerate(self.files):
            numbers = [n for n, (of, _) in enumerate(places) if of == owner and starts[n + 1] > start]
            if not numbers:
                continue
            skip = max(0, start - starts[numbers[0]])
            with reading(file), pq.ParquetFile(file) as opened:
                for batch in opened.iter_batches(ROWS, row_groups=[places[n][1] for n in numbers], columns=columns):
                    if skip < batch.num_rows:
                        yield file, batch.slice(skip)
                    skip = max(0, skip - batch.num_rows)

    @cached_property
    def _groups(self) -> tuple[list[tuple[int, int]], list[int], list[int]]:
        """Row groups as (file, number in it); the first row of each, and of what follows the last; that of each file."""
        import pyarrow.parquet as pq

        places: list[tuple[int, int]] = []
        starts, files = [0], []
        for owner, file in enumerate(self.files):
            with reading(file):
                metadata = pq.read_metadata(file)
            files.append(starts[-1])
            for group in range(metadata.num_row_groups):
                places.append((owner, group))
                starts.append(starts[-1] + metadata.row_group(group).num_rows)
        return places, starts, files

    @cached_property
    def _features(self) -> dict[str, Any]:
        """Column → description, as ``datasets`` leaves it in the schema metadata; empty where it did not write the file."""
        try:
            features = json.loads(self._metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
        except (ValueError, AttributeError):
            return {}
        return features if isinstance(features, dict) else {}

    def _text(self, key: bytes) -> str:
        return self._metadata.get(key, b"").decode("utf-8", "replace")


class HubTable(_Table):
    """The same of a set as ``datasets`` loads it; images stay encoded in its memory map."""

    def __init__(self, rows: Any, title: str) -> None:
        self.rows, self.title, self.names = rows, title, list(rows.column_names)
        self.files = tuple(Path(entry["filename"]) for entry in rows.cache_files)
        self._encoded: dict[str, Any] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def row_name(self, row: int) -> str:
        return f"{self.title} row {row}"

    def typed(self, kind: str) -> list[str]:
        import datasets

        return [name for name, feature in self.rows.features.items() if isinstance(feature, getattr(datasets, kind))]

    def class_names(self, column: str) -> Sequence[str] | None:
        return self.rows.features[column].names if column in self.typed("ClassLabel") else None

    def column(self, name: str) -> list[Any]:
        return list(self.rows[name][:])

    def records(self, columns: list[str] | None = None, start: int = 0) -> Iterator[dict[str, Any]]:
        rows = self.rows if columns is None else self.rows.select_columns(columns)
        for batch in rows.select(range(start, len(rows))).iter(ROWS):
            yield from (dict(zip(batch, cells, strict=True)) for cells in zip(*batch.values(), strict=True))

    def images(self, column: str) -> Iterator[Raw]:
        for batch in self._undecoded(column).iter(ROWS):
            yield from (raw_cell(cell, None) for cell in batch[column])

    def image(self, column: str, row: int) -> Raw:
        return raw_cell(self._undecoded(column)[row][column], None)

    def _undecoded(self, column: str) -> Any:
        if column not in self._encoded:
            import datasets

            encoded = self.rows.select_columns([column])
            decodes = column in self.typed("Image")
            self._encoded[column] = encoded.cast_column(column, datasets.Image(decode=False)) if decodes else encoded
        return self._encoded[column]


Table = ParquetTable | HubTable


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


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Raise UserError for a parquet file that turns out not to be one, or not a whole one."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"cannot read parquet file {file.name} ({reason}); it may be cut off: fetch it again") from error


def no_column(where: str, column: str, present: Sequence[str]) -> UserError:
    """The error for a table or an object without the text that is asked for."""
    return UserError(f"{where} has no '{column}', only {', '.join(present) or 'nothing'}; name the text's column or key")


def json_lines(path: Path, start: int = 0) -> Iterator[tuple[dict[str, Any], str, int, int]]:
    """Objects of a .jsonl file from byte ``start`` on, with their place in words, their byte and the next.

    Raises:
        UserError: a line that is no JSON object.
    """
    with path.open("rb") as file:
        number = place = 0
        while place < start and (line := file.readline()):
            number, place = number + 1, place + len(line)
        for line in file:
            number, this, place = number + 1, place, place + len(line)
            if not line.strip():
                continue
            where = f"{path.name} line {number}"
            try:
                record = json.loads(line)
            except ValueError as error:
                raise UserError(f"{where} is not valid JSON ({error}): mend or remove it") from error
            if not isinstance(record, dict):
                raise UserError(f'{where} holds {type(record).__name__}; each line is an object such as {{"text": "…"}}')
            yield record, where, this, place


def json_list(path: Path) -> list[Any]:
    """The entries of a .json file.

    Raises:
        UserError: it holds no list.
    """
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path.name} is not valid JSON ({error}); one object a line is .jsonl") from error
    if not isinstance(value, list):
        raise UserError(f"{path.name} holds {type(value).__name__}; it should be a list of objects")
    return value


def whole_text(path: Path, fault: Callable[[Exception], str], encoding: str = "utf-8") -> str:
    """A whole file of text; line ends stay as they are.

    Raises:
        UserError: with the sentence of ``fault``, where it cannot be read.
    """
    try:
        return path.read_bytes().decode(encoding)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(fault(error)) from error


def read_text(path: str) -> str:
    """A text to score.

    Raises:
        UserError: it cannot be read, or holds no text.
    """
    # As a corpus is read: line ends stay.
    text = whole_text(
        Path(path).expanduser(),
        lambda error: f"cannot read the text '{path}' to score ({error}): give a UTF-8 text file",
        encoding="utf-8-sig",
    )
    if not text.strip():
        raise UserError(f"the text '{path}' to score is empty: give another, or leave it out")
    return text
