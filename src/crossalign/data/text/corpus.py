"""A corpus as two token files, train and validation: made once by ``prepare``, resumably."""

import fcntl
import hashlib
import os
import shutil
import sys
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from crossalign.config import CorpusConfig, validate
from crossalign.core.errors import UserError, some
from crossalign.core.files import cache_dir, content_key, open_lock, remove_strays, write_json
from crossalign.core.progress import progress
from crossalign.data.text import tokenizer as tok
from crossalign.data.text.documents import Piece, Place, TextFile, cut, list_files, stream, whole
from crossalign.data.text.prepared import FORMAT, META, SIDES, Corpus, Side, open_corpus, read_meta

CHUNK = 1 << 21
"""Characters between two states that a killed call goes on from; also what the tokenizer's threads share out."""
TRAINED_ON = 1 << 30
"""Bytes of text that a tokenizer is trained on at most; of more, an even share is drawn."""

Part: TypeAlias = tuple[Side, str, bool]
"""A side, a text for it, and whether a document ends there."""


def prepare(config: CorpusConfig, output: str | Path = "") -> Corpus:
    """Tokenise a corpus into ``output``: train.bin, validation.bin, tokenizer/ and meta.json.

    A call that was killed goes on after its last finished chunk, and the files are those of a call that was not; a finished
    folder is opened at once. Of several processes that want one folder, one works and the others wait for it.

    Args:
        config: what to read and how; documents are split by a seeded hash of their text, so copies stay on one side.
        output: a folder of its own; empty for one in the cache that is named by the settings and the content of the files.

    Raises:
        UserError: a source, tokenizer or setting that cannot be used; a folder that holds something else.
    """
    validate(config)
    tokenizer = tok.open_tokenizer(config.tokenizer) if config.tokenizer else None
    files, left_out = list_files(config.source, config.text_column)
    settings: dict[str, Any] = {  # all that decides the tokens
        "source": [[file.name, file.digest] for file in files],
        "text_column": config.text_column,
        "tokenizer": tok.fingerprint(tokenizer) if tokenizer else "trained",
        "separator": tok.separator(tokenizer) if tokenizer else None,
        "vocabulary": None if tokenizer else config.vocabulary,
        "validation_fraction": config.validation_fraction,
        "split_seed": config.split_seed,
    }
    cached = not output
    output = Path(output) if output else cache_dir("corpora") / content_key(**settings)
    with _locked(output):
        if cached and not _is_sound(output):
            for path in output.iterdir():  # but for the lock, which we hold
                if path.name != ".lock":
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        meta = read_meta(output)
        if meta is None:
            taken = [name for name in ("train.bin", "validation.bin", "tokenizer") if (output / name).exists()]
            if taken:
                raise UserError(f"'{output}' holds {', '.join(taken)} but no {META}: choose another --output")
            meta = {"format": FORMAT, "complete": False, "settings": settings, "left_out": left_out}
        elif meta["settings"] != settings:
            raise _differs(output, meta["settings"], settings)
        if not meta["complete"]:
            Preparation(config, output, files, tokenizer, meta).run()
    return open_corpus(output)


def _is_sound(folder: Path) -> bool:
    """Whether a corpus in the cache, finished or not, can be opened or gone on with; an empty folder can."""
    try:
        meta = read_meta(folder)
        if meta is not None and meta.get("complete"):
            _ = open_corpus(folder).tokenizer
        return meta is not None or not any(path.name != ".lock" for path in folder.iterdir())
    except UserError:
        return False


def _differs(output: Path, saved: dict[str, Any], here: dict[str, Any]) -> UserError:
    differing: dict[str, Any] = {name: (saved.get(name), new) for name, new in here.items() if saved.get(name) != new}
    why = [f"{name} is {old!r} there and {new!r} here" for name, (old, new) in differing.items() if name != "source"]
    if "source" in differing:
        old, new = (files or [] for files in differing["source"])
        names = [[file for file, _ in files] for files in (old, new)]
        if names[0] == names[1]:
            changed = [file for (file, first), (_, two) in zip(old, new, strict=True) if first != two]
            why.insert(0, f"source: {', '.join(changed)} has changed")
        else:
            why.insert(0, f"source is {some(names[0]) or 'nothing'} there and {some(names[1])} here")
    return UserError(f"'{output}' holds a corpus of other settings ({'; '.join(why)}): choose another --output, or delete it")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Make the folder and let one process work in it; the others wait, since they need what it makes."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise UserError(f"'{folder}' is a file; choose another --output") from error
    with open_lock(folder / ".lock") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"another process is preparing {folder}; waiting for it", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        remove_strays(folder)
        yield


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
        survey, at = Survey(), 0
        with progress(len(self.files), "reading", unit="file") as bar:
            for piece in stream(self.files):
                bar.update(piece.after[0] - at)
                at = piece.after[0]
                if not piece.text:
                    survey.empty += 1
                    continue
                survey.bytes += len(piece.text.encode())
                survey.characters += len(piece.text)
                if piece.last:
                    key = self._key(piece)
                    survey.documents += 1
                    survey.smallest, survey.largest = min(survey.smallest, key), max(survey.largest, key)
        if not survey.documents:
            raise UserError(
                f"the corpus has no text: its {survey.empty:,} documents are empty (column or key '{self.config.text_column}')"
            )
        if survey.smallest == survey.largest and survey.characters < 2 * survey.documents:
            raise UserError("the corpus is a single character, which cannot be cut into train and validation: give more text")
        return survey

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
                position = _character(piece.text, head - into)
                parts = [("train", piece.text[:position], True), ("validation", piece.text[position:], piece.last)]
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
        position, into = tuple(state["place"]), state["into"]
        done = sum(written.bytes for written in self.written.values())
        with tok.ordinary_text(self.tokenizer) as backend, progress(self.survey.bytes, "tokens", done, unit="B") as bar:
            pieces = stream(self.files, position)
            if not tok.is_separable(backend):
                pieces = whole(pieces)
            waiting: list[Part] = []
            size = 0
            for parts, position, into in self._sided(pieces, state["into"]):
                waiting += parts
                size += sum(len(text) for _, text, _ in parts)
                if size >= CHUNK:
                    bar.update(self._encode(backend, waiting))
                    self._save_state(position, into)
                    waiting, size = [], 0
            bar.update(self._encode(backend, waiting))
            self._save_state(position, into)

    def _encode(self, backend: Any, parts: list[Part]) -> int:
        """Append the tokens of ``parts`` and return their bytes."""
        encoded = backend.encode_batch_fast([text for _, text, _ in parts], add_special_tokens=False)
        before = sum(written.bytes for written in self.written.values())
        for side, written in self.written.items():
            tokens: list[int] = []
            for (where, text, ends), encoding in zip(parts, encoded, strict=True):
                if where == side:
                    tokens += [*encoding.ids, self.separator] if ends else encoding.ids
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

    def _save_state(self, position: Place, into: int) -> None:
        self._save(state={"place": list(position), "into": into, **self._sides()})

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
        description = {
            "entries": len(self.tokenizer),
            "separator": self.separator,
            "separator_token": self.tokenizer.convert_ids_to_tokens(self.separator),
            "fingerprint": tok.fingerprint(self.tokenizer),
        }
        settings, sides = self.meta["settings"], self._sides()
        finished: dict[str, Any] = {
            "format": FORMAT,
            "complete": True,
            "fingerprint": content_key(settings=settings, tokenizer=description, **sides),
            "settings": settings,
            "tokenizer": description,
            "dtype": self.dtype,
            **sides,
            "empty_documents": self.survey.empty,
            "left_out": self.meta["left_out"],
        }
        write_json(self.output / META, finished)


def _character(text: str, position: int) -> int:
    """The character to cut a lone document at, near byte ``position``: where a line or word ends, so that no word is cut."""
    near = len(text.encode()[:position].decode(errors="ignore"))
    return min(max(cut(text, near, min(1000, near)), 1), len(text) - 1) if len(text) > 1 else near
