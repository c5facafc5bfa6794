"""What lies damaged in the cache is made again, once and without a word, and the result is the same."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from pictures import open_source, png

from crossalign.config import CorpusConfig, PairsConfig
from crossalign.core.files import file_hash
from crossalign.data.images import decode as decoding
from crossalign.data.pairs.load import open_pairs
from crossalign.data.text.corpus import prepare

Open = Callable[[Path], object]


def images(folder: Path) -> object:
    for i in range(20):
        file = folder / "ab"[i % 2] / f"{i}.png"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(png(i) if i else b"broken")
    splits = open_source(folder, on_error="skip")
    return splits.fingerprint, splits.skipped, splits.train.pixels[:].tobytes()


def pairs(folder: Path) -> object:
    path = folder / "set.tar"
    if not path.exists():
        folder.mkdir()
        with tarfile.open(path, "w") as archive:
            for i in range(40):
                for name, data in ((f"{i}.png", png(i)), (f"{i}.txt", f"picture {i}".encode())):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
    found = open_pairs(PairsConfig(source=str(path)))
    return found.ids, found.texts, found.fingerprint


def corpora(folder: Path) -> object:
    path = folder / "a.txt"
    if not path.exists():
        folder.mkdir()
        path.write_text("\n".join(f"line {i} of a text, with {i * i} words" for i in range(300)))
    corpus = prepare(CorpusConfig(source=(str(path),), vocabulary=300))
    return corpus.fingerprint, corpus.train.tokens[:].tobytes(), len(corpus.tokenizer)


def hashes(folder: Path) -> object:
    folder.mkdir(exist_ok=True)
    path = folder / "a.bin"
    if not path.exists():
        path.write_bytes(b"weights")
    return file_hash(path)


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


HARM: dict[str, Callable[[Path], object]] = {
    "emptied": lambda path: path.write_bytes(b""),
    "halved": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "garbage": lambda path: path.write_bytes(b"\x80garbage" * 200),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "gone": Path.unlink,
    "pipe": pipe,
}


@pytest.mark.parametrize("harm", HARM)
@pytest.mark.parametrize("open_again", [images, pairs, corpora, hashes], ids=lambda kind: str(kind.__name__))
def test_a_damaged_entry_is_made_again(
    tmp_path: Path, open_again: Open, harm: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CROSSALIGN_CACHE", str(tmp_path / "cache"))
    whole = open_again(tmp_path / "data")
    entries = sorted(path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.suffix != ".lock")
    entries = [path for path in entries if path.name != ".lock"]
    assert entries
    capfd.readouterr()
    for entry in entries:
        if harm == "zeros" and entry.suffix == ".bin":  # tokens of the right number that the tokenizer has: not told apart
            continue
        before = entry.read_bytes()
        HARM[harm](entry)
        assert open_again(tmp_path / "data") == whole, entry
        assert capfd.readouterr().out == ""
        if open_again is not corpora:  # of which some files are not looked into
            assert entry.read_bytes() == before, entry
    stamps = {path: os.stat(path).st_mtime_ns for path in entries if path.exists()}
    monkeypatch.setattr(decoding, "picture", lambda *_: pytest.fail("decoded again"))
    assert open_again(tmp_path / "data") == whole
    assert {path: os.stat(path).st_mtime_ns for path in stamps} == stamps  # made once
