"""Documents from text files, jsonl, parquet and the hub, streamed in pieces from any place on.

A document may be larger than memory, so it comes in pieces. They are cut where a tokenizer cuts as well, so that the
tokens are those of the whole text, and each says where reading goes on after it.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from crossalign.core.errors import UserError
from crossalign.core.files import file_hash, files_hash
from crossalign.core.refs import Ref
from crossalign.data.hub import train_split
from crossalign.data.records import HubTable, ParquetTable, Table, json_lines, no_column
from crossalign.data.sources import files_below, without_other_splits

TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst", ".tokens", ".raw")
SUFFIXES = (*TEXT_SUFFIXES, ".jsonl", ".parquet")
TOPICS = "python:topics"
"""CPython's own documentation topics, 79 of them in 3.11: half a megabyte of text that every machine has."""
PIECE = 1 << 16
"""Characters of a piece at most: small enough to keep many threads busy, large enough to cost nothing."""

Place: TypeAlias = tuple[int, int, int]
"""File, row in it, offset in the row: rows are bytes in jsonl, offsets are bytes in a text file, else characters."""

# A word starts after either of these whatever came before, in the patterns of GPT-2, Llama 3 and their relatives.
_LINE_ENDS = re.compile(r"\S\n(?=\S)")
_WORD_ENDS = re.compile(r"\S(?= \S)")


@dataclass(frozen=True)
class Piece:
    """A stretch of a document; an empty document comes as one piece without text."""

    text: str
    digest: str
    """SHA-256 of the whole document."""
    last: bool
    """Whether the document ends here."""
    after: Place
    """Where reading goes on."""


@dataclass(frozen=True)
class TextFile:
    """One file (or hub split) of a corpus."""

    name: str
    digest: str
    """SHA-256 of its content."""
    read: Callable[[int, int], Iterator[tuple[str, str, bool, int, int]]]
    """(row, offset) → text, digest of its document, whether it ends there, and the row and offset after it."""


def list_files(source: Sequence[str], column: str) -> tuple[list[TextFile], list[str]]:
    """The files of a corpus in their order, checked but unread, and the names of test and validation files left out.

    Raises:
        UserError: nothing there, a kind of file that is not read, or a table without the text column.
    """
    if not source:
        raise UserError(
            f"the corpus has no source: give text files ({', '.join(SUFFIXES)}), folders of them, hf:ORG/NAME or {TOPICS}"
        )
    files: list[TextFile] = []
    left_out: list[str] = []
    for name in source:
        if name == TOPICS or Ref(name, ()).kind == "hf":
            files.append(_topics() if name == TOPICS else _hub_file(name, column))
            continue
        path = Path(name).expanduser()
        paths = [path]
        if name and path.is_dir():
            paths, others = _folder(path)
            left_out += [other.name for other in others]
        elif not path.is_file():
            raise UserError(
                f"corpus source '{name}' does not exist: give a text file, .jsonl, .parquet, a folder or hf:ORG/NAME"
            )
        elif path.suffix and path.suffix.lower() not in SUFFIXES:
            raise UserError(f"corpus source '{name}' is no text that is read here ({', '.join(SUFFIXES)}): convert it to one")
        files += [_file(path, column) for path in paths]
    return files, left_out


def stream(files: Sequence[TextFile], start: Place = (0, 0, 0)) -> Iterator[Piece]:
    """All documents in order from ``start`` on, in pieces.

    Raises:
        UserError: a file is damaged, not UTF-8, or has a row whose text is no text; it names the file and the place.
    """
    first, row, offset = start
    for number in range(first, len(files)):
        for text, digest, last, *after in files[number].read(row, offset):
            yield Piece(text, digest, last, (number, after[0], after[1]))
        row = offset = 0


def whole(pieces: Iterator[Piece]) -> Iterator[Piece]:
    """Join the pieces of each document, for a tokenizer that must see it at once."""
    held: list[str] = []
    for piece in pieces:
        held.append(piece.text)
        if piece.last:
            yield Piece("".join(held), piece.digest, True, piece.after)
            held = []


def cut(text: str, limit: int, reach: int) -> int:
    """The last place at or before ``limit``, at most ``reach`` back, where a line or else a word ends; else ``limit``."""
    low = max(0, limit - reach)
    for pattern in (_LINE_ENDS, _WORD_ENDS):
        found = [match.end() for match in pattern.finditer(text, low, limit + 1) if match.end() <= limit]
        if found:
            return found[-1]
    return limit


def _spans(text: str, start: int) -> Iterator[tuple[int, int]]:
    """Where the pieces of ``text`` from ``start`` on begin and end."""
    while len(text) - start > PIECE:
        stop = cut(text, start + PIECE, PIECE // 4)
        yield start, stop
        start = stop
    yield start, len(text)


def _folder(folder: Path) -> tuple[list[Path], list[Path]]:
    """Files at any depth, and those left out for being of other splits."""
    found = [path for path in files_below(folder, SUFFIXES) if path.is_file()]
    if not found:
        raise UserError(f"corpus folder '{folder}' holds no text ({', '.join(SUFFIXES)}); fill it or name another")
    return without_other_splits(folder, found)


def _file(path: Path, column: str) -> TextFile:
    reader: Callable[[int, int], Iterator[tuple[str, str, bool, int, int]]]
    digest = file_hash(path)
    if path.suffix.lower() == ".parquet":
        table = ParquetTable([path])
        table.check_text(column)
        reader = partial(_rows, partial(_table_texts, table, column))
    elif path.suffix.lower() == ".jsonl":
        reader = partial(_rows, partial(_json_texts, path, column))
    else:
        reader = partial(_text_pieces, path, digest)
    return TextFile(path.name, digest, reader)


def _topics() -> TextFile:
    from pydoc_data.topics import topics

    names = sorted(topics)

    def texts(row: int) -> Iterator[tuple[Any, str, int, int]]:
        for number in range(row, len(names)):
            yield topics[names[number]], f"topic '{names[number]}'", number, number + 1

    digest = hashlib.sha256(json.dumps(topics, sort_keys=True).encode()).hexdigest()
    return TextFile(TOPICS, digest, partial(_rows, texts))


def _text_pieces(path: Path, digest: str, row: int, offset: int) -> Iterator[tuple[str, str, bool, int, int]]:
    if row or not path.stat().st_size:
        if not row:
            yield "", digest, True, 1, 0
        return
    if not offset and _is_blank(path):
        yield "", digest, True, 1, 0
        return
    with path.open("rb") as file:
        file.seek(offset)
        decoder, held, block = codecs.getincrementaldecoder("utf-8")(), "", b"-"
        while block:
            block = file.read(4 * PIECE)
            try:
                held += decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                place = file.tell() - len(error.object) + error.start
                raise UserError(f"{path.name} is not UTF-8 text (byte {place:,}): convert it, or leave it out") from error
            if not offset and held.startswith("\ufeff"):  # a byte order mark is no text
                held, offset = held[1:], 3
            while len(held) > PIECE:
                stop = cut(held, PIECE, PIECE // 4)
                offset += len(held[:stop].encode())
                yield held[:stop], digest, False, 0, offset
                held = held[stop:]
        yield held, digest, True, 1, 0


def _is_blank(path: Path) -> bool:
    with path.open("rb") as file:
        return not any(block.strip() for block in iter(lambda: file.read(PIECE), b""))


def _rows(
    texts: Callable[[int], Iterator[tuple[Any, str, int, int]]], row: int, offset: int
) -> Iterator[tuple[str, str, bool, int, int]]:
    """Documents of a table, from texts with their place in words, their row and the next."""
    for text, where, this, following in texts(row):
        if text is not None and not isinstance(text, str):
            raise UserError(f"{where} holds {type(text).__name__}, not text: name another column, or mend the row")
        if text is None or not text.strip():
            yield "", "", True, following, 0
            continue
        try:
            digest = hashlib.sha256(text.encode()).hexdigest()
        except UnicodeEncodeError as error:
            raise UserError(f"{where} is not valid Unicode (a lone surrogate at character {error.start}): mend it") from error
        for start, stop in _spans(text, offset):
            last = stop == len(text)
            yield text[start:stop], digest, last, following if last else this, 0 if last else stop
        offset = 0


def _json_texts(path: Path, column: str, row: int) -> Iterator[tuple[Any, str, int, int]]:
    for record, where, this, following in json_lines(path, row):
        if column not in record:
            raise no_column(where, column, list(record))
        yield record[column], f"{where}, '{column}',", this, following


def _table_texts(table: Table, column: str, row: int) -> Iterator[tuple[Any, str, int, int]]:
    for number, record in enumerate(table.records([column], row), start=row):
        yield record[column], f"{table.row_name(number)}, '{column}',", number, number + 1


def _hub_file(name: str, column: str) -> TextFile:
    table = HubTable(train_split(name), name)
    if column not in table.names:
        raise no_column(name, column, table.names)
    return TextFile(name, files_hash(table.files), partial(_rows, partial(_table_texts, table, column)))
