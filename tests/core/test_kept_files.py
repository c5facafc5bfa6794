"""Files are made whole or not at all, and what a killed process began is cleared away."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from crossalign.core import files
from crossalign.core.errors import UserError
from crossalign.core.files import atomic_path, cache_dir, kept, open_lock, remove, remove_strays


def fill(path: Path, folder: bool) -> None:
    if folder:
        path.mkdir()
        (path / "new").write_text("new")
    else:
        path.write_text("new")


@pytest.mark.parametrize("folder", [True, False])
@pytest.mark.parametrize("there", ["nothing", "the same", "a link"])
def test_what_is_made_takes_the_place_of_what_is_there(tmp_path: Path, folder: bool, there: str) -> None:
    path, victim = tmp_path / "made", tmp_path / "victim"
    victim.mkdir()
    (victim / "old").write_text("old")
    if there == "a link":
        path.symlink_to(victim if folder else victim / "old")
    elif there == "the same" and folder:
        path.mkdir()
        (path / "old").write_text("old")
    elif there == "the same":
        path.write_text("old")
    with atomic_path(path) as temporary:
        fill(temporary, folder)
    assert not path.is_symlink() and [p.name for p in path.iterdir()] == ["new"] if folder else path.read_text() == "new"
    assert (victim / "old").read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["made", "victim"]


@pytest.mark.parametrize("folder", [True, False])
@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space"),
        OSError(errno.EDQUOT, "quota"),
        RuntimeError("I/O: No space left on device"),
        ValueError(),
    ],
    ids=["full", "quota", "a library's", "another"],
)
def test_what_fails_leaves_what_is_there(tmp_path: Path, folder: bool, error: Exception) -> None:
    path = tmp_path / "made"
    fill(path, folder)
    with pytest.raises(Exception) as caught, atomic_path(path) as temporary:
        fill(temporary, folder)
        raise error
    assert [p.name for p in tmp_path.iterdir()] == ["made"]
    if isinstance(error, ValueError):
        assert caught.value is error
    else:
        assert isinstance(caught.value, OSError) and caught.value.errno == errno.ENOSPC
        assert caught.value.filename == str(path)


KILLED = """
import os, signal, sys
from pathlib import Path
from crossalign.core.files import atomic_path
with atomic_path(Path(sys.argv[1])) as temporary:
    temporary.mkdir()
    (temporary / "half").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_began_is_removed_at_the_next_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CROSSALIGN_CACHE", str(tmp_path))
    folder = cache_dir("images")
    subprocess.run([sys.executable, "-c", KILLED, str(folder / "pixels.npy")], check=False)
    (stray,) = folder.iterdir()
    (folder / ".lock").touch()
    monkeypatch.setattr(files, "_cleaned", set())  # as a process that starts
    with atomic_path(folder / "other.npy") as temporary:
        temporary.write_text("of a process that runs")
        cache_dir("images")
        assert not stray.exists() and temporary.exists()
    assert sorted(path.name for path in folder.iterdir()) == [".lock", "other.npy"]


@pytest.mark.parametrize(("age", "left"), [(3600, 1), (8 * 86400, 0)])
def test_what_another_machine_began_is_left_for_a_week(tmp_path: Path, age: int, left: int) -> None:
    stray = tmp_path / f".pixels.npy.{'0' * 8}.{os.getpid()}.{'1' * 8}"
    stray.touch()
    os.utime(stray, (stray.stat().st_atime, stray.stat().st_mtime - age))
    remove_strays(tmp_path)
    assert len(list(tmp_path.iterdir())) == left


def test_a_folder_of_strangers_gets_the_mode_of_the_umask(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "model") as temporary:
        temporary.mkdir(mode=0o700)
        (temporary / "weights").touch(mode=0o600)
    umask = os.umask(0)
    os.umask(umask)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "model", tmp_path / "model" / "weights")}
    assert modes == {0o777 & ~umask, 0o666 & ~umask}


@pytest.mark.parametrize("make", [Path.touch, lambda path: path.symlink_to(path.parent / "nothing")], ids=["file", "link"])
def test_what_is_removed_is_gone(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "a")
    remove(tmp_path / "a")
    remove(tmp_path / "a")
    assert not (tmp_path / "a").is_symlink() and not (tmp_path / "a").exists()


@pytest.mark.parametrize("error", [ValueError, SyntaxError, ZeroDivisionError, UserError])
def test_a_cache_that_cannot_be_read_is_made_again(error: type[Exception]) -> None:
    held: list[int] = []

    def read() -> int:
        if not held:
            raise error("damaged")
        return held[0]

    assert kept(read, lambda: held.append(5)) == 5
    with pytest.raises(error):
        kept(lambda: int(held.clear() or read()), lambda: None)


def test_a_lock_is_no_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / ".lock")
    with pytest.raises(UserError, match=r"\.lock' is no regular file"):
        open_lock(tmp_path / ".lock")


def test_a_lock_is_no_link(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / ".lock").symlink_to(victim)
    with pytest.raises(UserError, match="symbolic link"):
        open_lock(tmp_path / ".lock")
    assert victim.read_text() == "mine"
