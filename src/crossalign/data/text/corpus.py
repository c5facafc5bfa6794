"""A corpus as two token files, train and validation: made once by ``prepare``, resumably, and opened by ``open_corpus``."""

from __future__ import annotations

import fcntl
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from crossalign.config import CorpusConfig, validate
from crossalign.core.errors import UserError, some
from crossalign.core.files import cache_dir, content_key
from crossalign.data.text import tokenizer as tok
from crossalign.data.text.documents import list_files
from crossalign.data.text.preparation import FORMAT, META, SIDES, Preparation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from crossalign.data.text.tokens import TokenFile


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus."""

    folder: Path
    meta: dict[str, Any]
    """What ``meta.json`` holds."""
    train: TokenFile
    validation: TokenFile

    @property
    def fingerprint(self) -> str:
        """A hash of the tokens, the tokenizer and the settings."""
        return str(self.meta["fingerprint"])

    @property
    def vocabulary(self) -> int:
        """Entries of the tokenizer: a model's token table needs as many."""
        return int(self.meta["tokenizer"]["entries"])

    @property
    def separator(self) -> int:
        """The token at the head of each stream and after each document."""
        return int(self.meta["tokenizer"]["separator"])

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that made the tokens."""
        return tok.open_tokenizer(str(self.folder / "tokenizer"))


def open_corpus(folder: str | Path) -> Corpus:
    """Open what ``prepare`` made; the token files are mapped, not read.

    Raises:
        UserError: no finished corpus lies there, or its token files have other sizes than its meta.json tells of.
    """
    from crossalign.data.text.tokens import TokenFile

    folder = Path(folder)
    meta = _read_meta(folder)
    if meta is None:
        raise UserError(f"'{folder}' holds no prepared corpus (no {META}): make one with crossalign data prepare")
    if not meta["complete"]:
        raise UserError(f"the corpus in '{folder}' is not finished: run the same crossalign data prepare again, it goes on")
    streams = {}
    for side in SIDES:
        told, path = meta[side], folder / f"{side}.bin"
        if not path.is_file():
            raise UserError(f"'{folder}' lacks its token file {path.name}: prepare the corpus again in another folder")
        found, expected = path.stat().st_size / np.dtype(meta["dtype"]).itemsize, told["tokens"]
        if found != expected:
            raise UserError(f"'{path}' holds {found:,g} tokens, but its meta.json says {expected:,}: copy or prepare it again")
        streams[side] = TokenFile(np.memmap(path, dtype=meta["dtype"], mode="r"), told["documents"], told["bytes"])
    return Corpus(folder, meta, streams["train"], streams["validation"])


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
    if not tokenizer:
        tok.check_vocabulary(config.vocabulary)
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
    output = Path(output) if output else cache_dir("corpora") / content_key(**settings)
    with _locked(output):
        meta = _read_meta(output)
        if meta is None:
            taken = [name for name in ("train.bin", "validation.bin", "tokenizer") if (output / name).exists()]
            if taken:
                raise UserError(f"'{output}' holds {', '.join(taken)} but no {META}: choose another --output")
            meta = {"format": FORMAT, "complete": False, "settings": settings, "left_out": left_out}
        elif meta["settings"] != settings:
            raise _differs(output, meta["settings"], settings)
        if not meta["complete"]:
            for stray in output.glob(f".{META}.*"):  # of a call that was killed while it wrote
                stray.unlink()
            Preparation(config, output, files, tokenizer, meta).run()
    return open_corpus(output)


def _read_meta(folder: Path) -> dict[str, Any] | None:
    path = folder / META
    if not path.is_file():
        return None
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"'{path}' is not valid JSON ({error}): prepare the corpus again in another folder") from error
    if not isinstance(meta, dict) or meta.get("format") != FORMAT or "settings" not in meta:
        raise UserError(f"'{path}' was not written by crossalign data prepare, or by another version: choose another folder")
    return meta


def _differs(output: Path, there: dict[str, Any], here: dict[str, Any]) -> UserError:
    differing: dict[str, Any] = {name: (there.get(name), new) for name, new in here.items() if there.get(name) != new}
    said = [f"{name} is {old!r} there and {new!r} here" for name, (old, new) in differing.items() if name != "source"]
    if "source" in differing:
        old, new = differing["source"]
        names = [[file for file, _ in files] for files in (old, new)]
        if names[0] == names[1]:
            changed = [file for (file, one), (_, two) in zip(old, new, strict=True) if one != two]
            said.insert(0, f"source: {', '.join(changed)} has changed")
        else:
            said.insert(0, f"source is {some(names[0])} there and {some(names[1])} here")
    return UserError(f"'{output}' holds a corpus of other settings ({'; '.join(said)}): choose another --output, or delete it")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Make the folder and let one process work in it; the others wait, since they need what it makes."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise UserError(f"'{folder}' is a file; choose another --output") from error
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"another process is preparing {folder}; waiting for it", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
