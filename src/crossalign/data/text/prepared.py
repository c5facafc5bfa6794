"""A prepared corpus as it lies on disk: two token files, their tokenizer, and what is known of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from crossalign.core.errors import UserError, first_line
from crossalign.core.reading import read_json
from crossalign.data.text import tokenizer as tok

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from crossalign.data.text.tokens import TokenFile

META, FORMAT = "meta.json", 1
SCANNED = 1 << 24
"""Tokens looked at together for the largest of them."""

Side: TypeAlias = Literal["train", "validation"]
SIDES: tuple[Side, Side] = ("train", "validation")


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

    @property
    def names(self) -> list[str]:
        """Of what the text was read from."""
        return source_names(self.meta)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that made the tokens."""
        return tok.open_tokenizer(str(self.folder / "tokenizer"))


def source_names(meta: dict[str, Any]) -> list[str]:
    """What a corpus was read from, by its meta.json; raises KeyError, TypeError or ValueError where that is damaged."""
    return [str(name) for name, _ in meta["settings"]["source"]]


def open_corpus(folder: str | Path) -> Corpus:
    """Open what ``prepare`` made; the token files are mapped, not read.

    Raises:
        UserError: no finished corpus lies there, or its token files have other sizes than its meta.json tells of.
    """
    from crossalign.data.text.tokens import TokenFile

    folder = Path(folder)
    meta = read_meta(folder)
    if meta is None:
        raise UserError(f"'{folder}' holds no prepared corpus (no {META}): make one with crossalign data prepare")
    if not meta.get("complete"):
        raise UserError(f"the corpus in '{folder}' is not finished: run the same crossalign data prepare again, it goes on")
    streams = {}
    try:
        entries, separator, _ = int(meta["tokenizer"]["entries"]), int(meta["tokenizer"]["separator"]), str(meta["fingerprint"])
        source_names(meta)
        dtype = {"uint16": np.uint16, "uint32": np.uint32}[meta["dtype"]]
        sizes = {side: [int(meta[side][name]) for name in ("tokens", "documents", "bytes")] for side in SIDES}
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"'{folder / META}' is damaged ({first_line(error)}): copy or prepare the corpus again") from error
    for side, (expected, documents, size) in sizes.items():
        path = folder / f"{side}.bin"
        if not path.is_file():
            raise UserError(f"'{folder}' lacks its token file {path.name}: prepare the corpus again in another folder")
        count = path.stat().st_size / np.dtype(dtype).itemsize
        if count != expected:
            raise UserError(f"'{path}' holds {count:,g} tokens, but its meta.json says {expected:,}: copy or prepare it again")
        tokens = np.memmap(path, dtype=dtype, mode="r") if expected else np.empty(0, dtype)
        largest = max((int(tokens[i : i + SCANNED].max()) for i in range(0, expected, SCANNED)), default=0)
        if max(largest, separator) >= entries:  # a model would have no row for it
            raise UserError(
                f"'{path}' holds token {max(largest, separator)}, but its tokenizer has {entries:,} entries: prepare it again"
            )
        streams[side] = TokenFile(tokens, documents, size)
    return Corpus(folder, meta, streams["train"], streams["validation"])


def read_meta(folder: Path) -> dict[str, Any] | None:
    """What meta.json says; None where there is none.

    Raises:
        UserError: it is damaged, or another program's.
    """
    path = folder / META
    if not path.is_file():
        return None
    meta: dict[str, Any] = read_json(path, remedy="prepare the corpus again in another folder")
    if meta.get("format") != FORMAT or "settings" not in meta:
        raise UserError(f"'{path}' was not written by crossalign data prepare, or by another version: choose another folder")
    return meta
