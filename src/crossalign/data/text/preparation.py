"""The work behind ``corpus.prepare``: a survey of the documents, a tokenizer, and the token files, each step resumable."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from crossalign.config import CorpusConfig
from crossalign.core.errors import UserError
from crossalign.core.files import content_key, write_json
from crossalign.core.progress import progress
from crossalign.data.text import tokenizer as tok
from crossalign.data.text.documents import Piece, Place, TextFile, cut, stream, whole

META, FORMAT = "meta.json", 1
CHUNK = 1 << 21
"""Characters between two states that a killed call goes on from; also what the tokenizer's threads share out."""
TRAINED_ON = 1 << 30
"""Bytes of text that a tokenizer is trained on at most; of more, an even share is drawn."""

Side: TypeAlias = Literal["train", "validation"]
SIDES: tuple[Side, Side] = ("train", "validation")
Part: TypeAlias = tuple[Side, str, bool]
"""A side, a text for it, and whether a document ends there."""


@dataclass
class Survey:
    """What a first pass over the documents finds, so that bad rows are told before long work."""

    documents: int = 0
    empty: int = 0
    bytes: int = 0
    characters: int = 0
    smallest: int = 1 << 64
    largest: int = -1
    """Of the documents' split keys, so that neither side stays empty."""


@dataclass
class Written:
    """How far one token file is."""

    tokens: int = 0
    documents: int = 0
    bytes: int = 0
    crc32: int = 0


class Preparation:
    """One call's work: survey, tokenizer, tokens; each step is skipped if ``meta`` says that it is done."""

    def __init__(self, config: CorpusConfig, output: Path, files: list[TextFile], tokenizer: Any, meta: dict[str, Any]) -> None:
        self.config, self.output, self.files, self.tokenizer, self.meta = config, output, files, tokenizer, meta

    def run(self) -> None:
        if "survey" not in self.meta:
            self._save(survey=asdict(self._survey()))
        self.survey = Survey(**self.meta["survey"])
        folder = self.output / "tokenizer"
        if not folder.is_dir():
            tok.save_tokenizer(self.tokenizer or self._train_tokenizer(), folder)
        self.tokenizer = tok.open_tokenizer(str(folder))
        self.separator = tok.separator(self.tokenizer)
        self.dtype = "uint16" if len(self.tokenizer) <= 1 << 16 else "uint32"
        self._tokenize()
        self._finish()

    def _save(self, **changes: Any) -> None:
        self.meta |= changes
        write_json(self.output / META, self.meta)

    def _survey(self) -> Survey:
        found, at = Survey(), 0
        with progress(len(self.files), "reading", unit="file") as bar:
            for piece in stream(self.files):
                bar.update(piece.after[0] - at)
                at = piece.after[0]
                if not piece.text:
                    found.empty += 1
                    continue
                found.bytes += len(piece.text.encode())
                found.characters += len(piece.text)
                if piece.last:
                    key = self._key(piece)
                    found.documents += 1
                    found.smallest, found.largest = min(found.smallest, key), max(found.largest, key)
        if not found.documents:
            raise UserError(
                f"the corpus has no text: its {found.empty:,} documents are empty (column or key '{self.config.text_column}')"
            )
        if found.smallest == found.largest and found.characters < 2 * found.documents:
            raise UserError("the corpus is a single character, which cannot be cut into train and validation: give more text")
        return found

    def _key(self, piece: Piece) -> int:
        """A number below 2^64 that depends on the document's text and the seed of the split."""
        return int.from_bytes(hashlib.sha256(f"{self.config.split_seed} {piece.digest}".encode()).digest()[:8])

    def _sided(self, pieces: Iterable[Piece], into: int = 0) -> Iterator[tuple[list[Part], Place, int]]:
        """Of each piece: its parts, where reading goes on, bytes into a document."""
        survey, fraction = self.survey, self.config.validation_fraction
        threshold = min(max(int(fraction * 2**64) - 1, survey.smallest), survey.largest - 1)
        lone = survey.bytes // survey.documents  # its bytes, if all documents are copies of one
        head = min(max(lone - round(fraction * lone), 1), lone - 1)
        parts: list[Part]
        for piece in pieces:
            if not piece.text:
                continue
            if survey.smallest < survey.largest:
                side: Side = "validation" if self._key(piece) <= threshold else "train"
                yield [(side, piece.text, piece.last)], piece.after, 0
                continue
            size = len(piece.text.encode())
            after = 0 if piece.last else into + size
            if into < head < into + size:
                place = _character(piece.text, head - into)
                parts = [("train", piece.text[:place], True), ("validation", piece.text[place:], piece.last)]
            else:
                parts = [("train" if into < head else "validation", piece.text, piece.last or into + size == head)]
            yield parts, piece.after, after
            into = after

    def _train_tokenizer(self) -> Any:
        share = TRAINED_ON / self.survey.bytes

        def texts() -> Iterator[str]:
            for parts, _, _ in self._sided(stream(self.files)):
                for side, text, _ in parts:
                    data = text.encode()
                    bar.update(len(data))
                    if side == "train" and (share >= 1 or zlib.crc32(data) < share * 2**32):
                        yield text

        with progress(self.survey.bytes, "training a tokenizer", unit="B") as bar:
            return tok.train_tokenizer(texts(), self.config.vocabulary)

    def _tokenize(self) -> None:
        if "state" not in self.meta:
            self.written = {side: Written() for side in SIDES}
            for side in SIDES:
                (self.output / f"{side}.bin").write_bytes(b"")
                self._append(side, [self.separator])
            self._save_state((0, 0, 0), 0)
        state = self.meta["state"]
        self.written = {side: Written(**state[side]) for side in SIDES}
        self._drop_unfinished()
        place, into = tuple(state["place"]), state["into"]
        done = sum(written.bytes for written in self.written.values())
        with tok.ordinary_text(self.tokenizer) as backend, progress(self.survey.bytes, "tokens", done, unit="B") as bar:
            pieces = stream(self.files, place)
            if not tok.is_separable(backend):
                pieces = whole(pieces)
            held: list[Part] = []
            size = 0
            for parts, place, into in self._sided(pieces, state["into"]):
                held += parts
                size += sum(len(text) for _, text, _ in parts)
                if size >= CHUNK:
                    bar.update(self._encode(backend, held))
                    self._save_state(place, into)
                    held, size = [], 0
            bar.update(self._encode(backend, held))
            self._save_state(place, into)

    def _encode(self, backend: Any, parts: list[Part]) -> int:
        """Append the tokens of ``parts`` and return their bytes."""
        encoded = backend.encode_batch_fast([text for _, text, _ in parts], add_special_tokens=False)
        before = sum(written.bytes for written in self.written.values())
        for side, written in self.written.items():
            tokens: list[int] = []
            for (where, text, ends), one in zip(parts, encoded, strict=True):
                if where == side:
                    tokens += [*one.ids, self.separator] if ends else one.ids
                    written.documents += ends
                    written.bytes += len(text.encode())
            self._append(side, tokens)
        return sum(written.bytes for written in self.written.values()) - before

    def _append(self, side: Side, tokens: list[int]) -> None:
        data = np.array(tokens, dtype=self.dtype).tobytes()
        with (self.output / f"{side}.bin").open("ab") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # on the disk before the state that counts on it
        written = self.written[side]
        written.tokens, written.crc32 = written.tokens + len(tokens), zlib.crc32(data, written.crc32)

    def _save_state(self, place: Place, into: int) -> None:
        self._save(state={"place": list(place), "into": into, **self._sides()})

    def _sides(self) -> dict[str, Any]:
        return {side: asdict(written) for side, written in self.written.items()}

    def _drop_unfinished(self) -> None:
        """Cut off what a killed call appended after its last state."""
        for side in SIDES:
            path, size = self.output / f"{side}.bin", self.written[side].tokens * np.dtype(self.dtype).itemsize
            if not path.is_file() or path.stat().st_size < size:
                raise UserError(f"'{path}' is missing or shorter than {META} says: delete '{self.output}' and prepare it again")
            os.truncate(path, size)

    def _finish(self) -> None:
        told = {
            "entries": len(self.tokenizer),
            "separator": self.separator,
            "separator_token": self.tokenizer.convert_ids_to_tokens(self.separator),
            "fingerprint": tok.fingerprint(self.tokenizer),
        }
        settings, sides = self.meta["settings"], self._sides()
        finished: dict[str, Any] = {
            "format": FORMAT,
            "complete": True,
            "fingerprint": content_key(settings=settings, tokenizer=told, **sides),
            "settings": settings,
            "tokenizer": told,
            "dtype": self.dtype,
            **sides,
            "empty_documents": self.survey.empty,
            "left_out": self.meta["left_out"],
        }
        write_json(self.output / META, finished)


def _character(text: str, place: int) -> int:
    """The character to cut a lone document at, near byte ``place``: where a line or word ends, so that no word is cut."""
    near = len(text.encode()[:place].decode(errors="ignore"))
    return min(max(cut(text, near, min(1000, near)), 1), len(text) - 1) if len(text) > 1 else near
