"""Every file is read by one reader of its kind; what is damaged, foreign or endless is told in one sentence that names it."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from crossalign.core import files
from crossalign.core.errors import UserError
from crossalign.core.reading import (
    LARGEST_YAML,
    check_whole,
    open_regular,
    read_bytes,
    read_json,
    read_word,
    read_yaml,
    user_path,
)

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n"
BOMB = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 10)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGES = "a: &a {x: 1}\n" + "".join(
    f"{new}: &{new}\n  <<: [{','.join([f'*{old}'] * 10)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


def pipe(path: Path) -> None:
    os.mkfifo(path)


def text(content: str | bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content if isinstance(content, bytes) else content.encode())


BROKEN: list[tuple[str, Callable[[Path], object], str]] = [
    ("absent", lambda path: None, "cannot be read .No such file"),
    ("folder", Path.mkdir, "cannot be read .a folder"),
    ("pipe", pipe, "cannot be read .no regular file"),
    ("device", lambda path: path.symlink_to("/dev/zero"), "cannot be read .no regular file"),
    ("circle", lambda path: path.symlink_to(path), "cannot be read .Too many levels"),
    ("pointer", text(POINTER), "is a pointer of git-LFS.*git lfs pull"),
    ("latin-1", text(b"a: \xfc"), "is no UTF-8 text .byte 3.: save it as UTF-8"),
    ("scalar", text("5"), "holds int, not settings"),
    ("list", text("[]"), "holds list, not settings"),
]
JSON = [
    ("empty", "", "is not valid JSON"),
    ("cut", '{"a": [1', "is not valid JSON"),
    ("deep", "[" * 100_000, "nested more than 100"),
]
JSON += [("deep-but-whole", "[" * 500 + "]" * 500, "nested more than 100"), ("number", "1" * 5000, "is not valid JSON")]
YAML = [("empty", "", "holds NoneType"), ("deep", "[" * 20_000, "nested too deeply"), ("bomb", BOMB, "with its aliases")]
YAML += [("merges", MERGES, "with its aliases"), ("itself", "a: &a [*a]", "with its aliases"), ("tab", "a: [\t", "is no YAML")]
YAML += [("twice", "a: 1\na: 2", "gives 'a' twice"), ("inner-twice", "a: {b: 1, b: 2}", "field 'a', gives 'b' twice")]
YAML += [
    ("object", "!!python/object/apply:os.system ['touch ran']", "is no YAML"),
    ("date", "a: 2024-13-01", "is no YAML: month"),
]
YAML += [("large", "#" * (LARGEST_YAML + 1), "is larger than 1 MB")]


@pytest.mark.parametrize(
    ("read", "make", "sentence"),
    [
        pytest.param(read, make, says, id=f"{read.__name__}-{name}")
        for read in (read_json, read_yaml)
        for name, make, says in BROKEN
    ]
    + [pytest.param(read_json, text(content), says, id=f"json-{name}") for name, content, says in JSON]
    + [pytest.param(read_yaml, text(content), says, id=f"yaml-{name}") for name, content, says in YAML],
)
def test_a_file_that_cannot_be_used_is_one_sentence_with_its_path(
    read: Callable[[Path], Any], make: Callable[[Path], object], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "file")
    with pytest.raises(UserError, match=sentence) as caught:
        read(tmp_path / "file")
    assert str(tmp_path / "file") in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte order mark"])
def test_utf8_is_read_with_and_without_a_byte_order_mark(mark: bytes, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(mark + '{"é": [1, {"b": null}]}'.encode())
    assert read_json(tmp_path / "file") == read_yaml(tmp_path / "file") == {"é": [1, {"b": None}]}


@pytest.mark.parametrize("content", [b"", b"\xe6a1", b"../../other", b"a/b", b"a b", b"a\nb", "a\u0661".encode()])
def test_an_identifier_leads_nowhere_else(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "id"
    file.write_bytes(b"0a_F\n")
    assert read_word(file) == "0a_F"
    file.write_bytes(content)
    assert read_word(file) == ""


def test_what_is_larger_than_is_asked_for_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file:
        file.truncate(50 << 30)  # takes no room
    with pytest.raises(UserError, match="is larger than 256 MB"):
        read_bytes(tmp_path / "file")


@pytest.mark.parametrize("path", ["a\0b", "a" * 5000, "circle/x", "a\ud800"], ids=["nul", "long", "circle", "surrogate"])
def test_what_can_be_no_path_is_told(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(UserError, match="can be no path here") as caught:
        user_path(path)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 200


def test_a_home_folder_that_there_is_not_stays_as_it_is_written() -> None:
    assert user_path("~no-such-user/x") == Path("~no-such-user/x")
    assert user_path("~/x") == Path.home() / "x"


def test_pipes_and_devices_are_never_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(OSError, match="no regular file"):
            open_regular(path)


def test_weights_that_are_cut_or_pointers_are_told(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(100), "empty": torch.zeros(0)}, tmp_path / "whole.safetensors", {"format": "pt"})
    check_whole(tmp_path / "whole.safetensors")
    whole = (tmp_path / "whole.safetensors").read_bytes()
    (tmp_path / "w.bin").write_bytes(POINTER)
    with pytest.raises(UserError, match=r"w\.bin' is a pointer of git-LFS"):
        check_whole(tmp_path / "w.bin")
    header = json.dumps({"x": {"data_offsets": ["a", "b"]}}).encode()
    cases = {b"": "has 0 bytes", whole[:5]: "has 5 bytes", whole[:-1]: f"has {len(whole) - 1} of {len(whole)} bytes"}
    cases |= {POINTER: "is a pointer", whole[:60]: "has 60 of \\d+ bytes", b"\xff" * 100: "has 100 bytes"}
    cases |= {len(header).to_bytes(8, "little") + header: "of no safetensors file"}
    for content, sentence in cases.items():
        (tmp_path / "x.safetensors").write_bytes(content)
        with pytest.raises(UserError, match=sentence):
            check_whole(tmp_path / "x.safetensors")


@pytest.mark.parametrize("content", [b"", b"garbage", b"0" * 63, b"\xff\xfe"])
def test_a_damaged_hash_is_found_anew(content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CROSSALIGN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "file").write_text("something")
    value = files.file_hash(tmp_path / "file")
    (entry,) = (tmp_path / "cache" / "hashes").iterdir()
    entry.write_bytes(content)
    assert files.file_hash(tmp_path / "file") == value == entry.read_text()


@pytest.mark.parametrize("read", [check_whole, read_bytes, read_json, read_yaml], ids=lambda read: read.__name__)
def test_a_file_without_permission_is_told_as_such(read: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not as one that is missing."""
    (tmp_path / "model.safetensors").touch()

    def refused(*_: object) -> int:  # the superuser would be let in
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(UserError, match=r"model.safetensors' cannot be read \(Permission denied\)"):
        read(tmp_path / "model.safetensors")
