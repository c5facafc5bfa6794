"""Documents from text files, jsonl, parquet and the hub, streamed in pieces from any place on.

A document may be larger than memory, so it comes in pieces. They are cut where a tokenizer cuts as well, so that the
tokens are those of the whole text, and each says where reading goes on after it.
"""

import codecs
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeAlias

from crossalign.core.errors import UserError
from crossalign.core.files import file_hash, files_hash
from crossalign.core.reading import open_regular
from crossalign.data.records import Row, json_lines, no_column, open_table
from crossalign.data.sources import text_sources

SUFFIXES = (".txt", ".text", ".md", ".rst", ".tokens", ".raw", ".jsonl", ".parquet")
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
    read: Callable[[Place], Iterator[Piece]]
    """Its documents from a place in it on."""


def list_files(source: Sequence[str], column: str) -> tuple[list[TextFile], list[str]]:
    """The files of a corpus in their order, checked but unread, and the names of test and validation files left out.

    Raises:
        UserError: nothing there, a kind of file that is not read, or a table without the text column.
    """
    files, left_out = text_sources(source, "corpus", ("", *SUFFIXES), built_in=(TOPICS,))
    return [_file(file, column) for file in files], left_out


def stream(files: Sequence[TextFile], start: Place = (0, 0, 0)) -> Iterator[Piece]:
    """All documents in order from ``start`` on, in pieces.

    Raises:
        UserError: a file is damaged, not UTF-8, or has a row whose text is no text; it names the file and the place.
    """
    for number in range(start[0], len(files)):
        yield from files[number].read(start if number == start[0] else (number, 0, 0))


def whole(pieces: Iterator[Piece]) -> Iterator[Piece]:
    """Join the pieces of each document, for a tokenizer that must see it at once."""
    texts: list[str] = []
    for piece in pieces:
        texts.append(piece.text)
        if piece.last:
            yield Piece("".join(texts), piece.digest, True, piece.after)
            texts = []


def cut(text: str, limit: int, reach: int) -> int:
    """The last place at or before ``limit``, at most ``reach`` back, where a line or else a word ends; else ``limit``."""
    low = max(0, limit - reach)
    for pattern in (_LINE_ENDS, _WORD_ENDS):
        ends = [match.end() for match in pattern.finditer(text, low, limit + 1) if match.end() <= limit]
        if ends:
            return ends[-1]
    return limit


def _file(source: Path | str, column: str) -> TextFile:
    if source == TOPICS:
        from pydoc_data.topics import topics

        digest = hashlib.sha256(json.dumps(topics, sort_keys=True).encode()).hexdigest()
        entries = [({column: topics[name]}, f"topic '{name}'", i, i + 1) for i, name in enumerate(sorted(topics))]
        return TextFile(TOPICS, digest, partial(_rows, lambda row: iter(entries[row:]), column))
    if isinstance(source, str) or source.suffix.lower() == ".parquet":
        table = open_table(source)
        table.check_text(column)
        digest = files_hash(table.files) if isinstance(source, str) else file_hash(source)
        return TextFile(table.title, digest, partial(_rows, partial(table.rows, [column]), column))
    digest = file_hash(source)
    if source.suffix.lower() == ".jsonl":
        return TextFile(source.name, digest, partial(_rows, partial(json_lines, source), column))
    return TextFile(source.name, digest, partial(_text_pieces, source, digest))


def _text_pieces(path: Path, digest: str, start: Place) -> Iterator[Piece]:
    number, row, offset = start
    if row:
        return
    with open_regular(path) as file:
        if not offset and not any(block.strip() for block in iter(lambda: file.read(PIECE), b"")):
            yield Piece("", digest, True, (number, 1, 0))
            return
        file.seek(offset)
        decoder, text, block = codecs.getincrementaldecoder("utf-8")(), "", b"-"
        while block:
            block = file.read(4 * PIECE)
            try:
                text += decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                position = file.tell() - len(error.object) + error.start
                raise UserError(f"{path.name} is not UTF-8 text (byte {position:,}): convert it, or leave it out") from error
            if not offset and text.startswith("\ufeff"):  # a byte order mark is no text
                text, offset = text[1:], 3
            while len(text) > PIECE:
                stop = cut(text, PIECE, PIECE // 4)
                offset += len(text[:stop].encode())
                yield Piece(text[:stop], digest, False, (number, 0, offset))
                text = text[stop:]
        yield Piece(text, digest, True, (number, 1, 0))


def _rows(rows: Callable[[int], Iterator[Row]], column: str, start: Place) -> Iterator[Piece]:
    """Documents of a table, cut into pieces."""
    number, row, offset = start
    for record, where, this, following in rows(row):
        if column not in record:
            raise no_column(where, column, list(record))
        text, where = record[column], f"{where}, '{column}',"
        if text is not None and not isinstance(text, str):
            raise UserError(f"{where} holds {type(text).__name__}, not text: name another column, or mend the row")
        if text is None or not text.strip():
            yield Piece("", "", True, (number, following, 0))
            continue
        try:
            digest = hashlib.sha256(text.encode()).hexdigest()
        except UnicodeEncodeError as error:
            raise UserError(f"{where} is not valid Unicode (a lone surrogate at character {error.start}): mend it") from error
        while len(text) - offset > PIECE:
            stop = cut(text, offset + PIECE, PIECE // 4)
            yield Piece(text[offset:stop], digest, False, (number, this, stop))
            offset = stop
        yield Piece(text[offset:], digest, True, (number, following, 0))
        offset = 0
