"""What lies in the cache is listed and pruned, and nothing else."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from typing import get_args

import pytest

import crossalign
from crossalign.cli import main
from crossalign.config import DataConfig
from crossalign.data.images.load import open_images
from crossalign.verbs.cache import Kind

KEY = "0123456789abcdef0123"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with the digits, an old corpus, and what is not ours."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("CROSSALIGN_CACHE", str(folder))
    open_images(DataConfig(source="sklearn:digits", channels="gray"))
    files = {
        f"corpora/{KEY}/train.bin": 3_000_000,
        f"images/{KEY}.part.npy": 2_000_000,
        "images/holiday.png": 9,
        "corpora/novel.txt": 9,
        "mine.txt": 9,
        f"features/{KEY}.lock": 0,
    }
    for name, size in files.items():
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_bytes(bytes(size))
    month = time.time() - 30 * 86_400
    for path in (folder / "corpora" / KEY / "train.bin", folder / "corpora" / KEY):
        os.utime(path, (month, month))
    return folder


def lines(*arguments: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    assert main(["cache", *arguments]) == 0
    return capsys.readouterr().out.splitlines()


def test_entries_are_listed_with_size_age_and_words(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    listed = lines(capsys=capsys)
    assert [line.split()[0] for line in listed[:-1]] == ["images", "images", "corpora"]
    assert "2.0 MB" in listed[0] and "0.0 days" in listed[0] and "no longer used" in listed[0]
    assert "1 of less than 1 MB" in listed[1]
    assert KEY in listed[2] and "3.0 MB" in listed[2] and "30.0 days" in listed[2] and "text as tokens" in listed[2]
    assert listed[-1].startswith("3 entries, 5.") and listed[-1].endswith(str(cache))
    (cache / "images" / f"{KEY}.part.npy").unlink()
    assert "scikit-learn digits" in lines("--kind", "images", capsys=capsys)[0]


@pytest.mark.parametrize(
    "chosen,gone",
    [
        ([], {"corpora", "part", "digits"}),
        (["--kind", "corpora"], {"corpora"}),
        (["--older-than", "29"], {"corpora"}),
        (["--older-than", "31"], set()),
        (["--larger-than", "1"], {"corpora", "part"}),
        (["--larger-than", "1", "--kind", "images"], {"part"}),
    ],
)
def test_what_is_chosen_is_deleted_and_nothing_else(
    cache: Path, capsys: pytest.CaptureFixture[str], chosen: list[str], gone: set[str]
) -> None:
    def there() -> set[Path]:
        return {path for path in cache.rglob("*") if path.is_file()}

    before = there()
    digits = {path for path in before if path.parent.name == "images" and path.suffix != ".png" and KEY not in path.name}
    parts = {
        "corpora": {cache / "corpora" / KEY / "train.bin"},
        "part": {cache / "images" / f"{KEY}.part.npy"},
        "digits": digits,
    }
    if gone:
        assert main(["cache", "--prune", *chosen]) == 2 and there() == before
        assert "add --yes" in capsys.readouterr().err
    assert lines("--prune", "--yes", *chosen, capsys=capsys)[0].startswith(f"deleted {len(gone)} entries")
    assert before - there() == {path for name in gone for path in parts[name]}
    open_images(DataConfig(source="sklearn:digits", channels="gray"))  # made again


def test_deletion_is_asked_for(cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    for answer, words in (("", "nothing is deleted"), ("n", "nothing is deleted"), ("y", "deleted 1 entries")):
        monkeypatch.setattr("builtins.input", lambda question, answer=answer: answer)
        assert words in lines("--prune", "--kind", "corpora", capsys=capsys)[-1]


def test_every_kind_of_entry_is_listed() -> None:
    source = Path(crossalign.__file__).parent
    kinds = {kind for file in source.rglob("*.py") for kind in re.findall(r'cache_dir\("(\w+)"\)', file.read_text())}
    assert kinds - {"search"} == set(get_args(Kind)), "copies of a search's trials go with it"
