"""Files that can be made again: one folder, content-hash names, atomic writes."""

import contextlib
import errno
import functools
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO, TypeVar

from crossalign.core.errors import UserError
from crossalign.core.reading import open_regular, read_bytes, user_path

T = TypeVar("T")
STRAY_SECONDS = 7 * 86400.0  # without a change, after which a temporary file of another machine is nobody's
_TEMPORARY = re.compile(r"\..+\.([0-9a-f]{8})\.(\d{1,8})\.[0-9a-f]{8}")
_cleaned: set[Path] = set()


def cache_root() -> Path:
    """``$CROSSALIGN_CACHE`` or ``~/.cache/crossalign``."""
    return user_path(os.environ.get("CROSSALIGN_CACHE") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "crossalign")


def cache_dir(kind: str) -> Path:
    """The folder for one kind of cached file, made if need be."""
    folder = cache_root() / kind
    folder.mkdir(parents=True, exist_ok=True)
    if folder not in _cleaned:
        _cleaned.add(folder)
        remove_strays(folder)
    return folder


def kept(read: Callable[[], T], make: Callable[[], object]) -> T:
    """What ``read`` gives of a cache; where nothing lies there, or nothing whole, ``make`` writes it first."""
    with contextlib.suppress(Exception):  # each format has errors of its own; one that is not the file's comes again below
        return read()
    make()
    return read()


def content_key(**parts: Any) -> str:
    """A short hash of JSON-able parts: the same parts, the same key."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A path beside ``path`` for a file or a folder to be made, which takes its place when the block ends well, and vanishes
    when it does not. Its mode is what the umask says; where ``path`` is a link, the link is replaced.

    Raises:
        OSError: ENOSPC with ``path``, where the disk is full, whatever a library made of that.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    try:
        yield temporary
        as_umask(temporary)
        if temporary.is_dir() and (path.is_dir() or path.is_symlink()):
            old = _beside(path)
            os.rename(path, old)  # a folder cannot be replaced in one step
            os.rename(temporary, path)
            remove(old)
        else:
            os.replace(temporary, path)
    except Exception as error:
        if is_full(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise
    finally:
        remove(temporary)


def is_full(error: BaseException) -> bool:
    """ENOSPC, a quota or a size limit, however deep a library wrapped it."""
    codes = errno.ENOSPC, errno.EDQUOT, errno.EFBIG
    return getattr(error, "errno", None) in codes or any(os.strerror(code) in str(error) for code in codes)


@contextmanager
def naming_full_disk(error: Exception) -> Iterator[None]:
    """Raise ``error`` where something within fails for want of room."""
    try:
        yield
    except Exception as cause:
        if is_full(cause):
            raise error from cause
        raise


def free_bytes(folder: Path) -> int:
    """Room on the disk of a folder, which need not be there yet."""
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free


def as_umask(path: Path) -> None:
    """Give a file, or all that lies in a folder, the mode that the umask says: some libraries let nobody else read."""
    umask = os.umask(0)
    os.umask(umask)
    for entry in (path, *path.rglob("*")):
        if not entry.is_symlink():
            entry.chmod((0o777 if entry.is_dir() else 0o666) & ~umask)


def remove(path: Path) -> None:
    """Remove a file, a link or a whole folder, if it is there; what a link leads to stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_strays(folder: Path) -> None:
    """Remove what :func:`atomic_path` began in ``folder`` by processes that are gone."""
    for path in folder.glob(".*"):
        if not (match := _TEMPORARY.fullmatch(path.name)):
            continue
        with contextlib.suppress(OSError):  # another process removes it too
            old = time.time() - path.lstat().st_mtime > STRAY_SECONDS  # of another machine, whose processes are not seen here
            if old or (match[1] == _machine() and not _runs(int(match[2]))):
                remove(path)


def open_lock(path: Path) -> TextIO:
    """A file to be locked with ``fcntl.flock``, made if need be, not emptied and through no link.

    Raises:
        UserError: it is a link, or no regular file.
    """
    try:
        number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UserError(f"'{path}' is a symbolic link, through which nothing is written: remove it") from error
        raise
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise UserError(f"'{path}' is no regular file, which a lock must be: remove it")
    return os.fdopen(number, "r+")


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{_machine()}.{os.getpid()}.{secrets.token_hex(4)}")


@functools.cache
def _machine() -> str:
    """This machine, and its numbering of processes: a container has one of its own."""
    try:
        numbering = os.readlink("/proc/self/ns/pid")
    except OSError:
        numbering = ""
    return content_key(machine=platform.node(), numbering=numbering)[:8]


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def write_text(path: Path, text: str) -> None:
    """Write a file of text, whole or not at all; a lone surrogate, as damaged files hold, is written as JSON escapes it."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def file_hash(path: Path) -> str:
    """SHA-256 of a file's content; remembered by path, size and time of change, so that large weights are read once."""
    status = path.stat()
    key = content_key(path=str(path.resolve()), size=status.st_size, changed=status.st_mtime_ns)
    remembered = cache_dir("hashes") / key

    def read() -> str:
        if not re.fullmatch("[0-9a-f]{64}", text := read_bytes(remembered).decode()):
            raise ValueError(text)
        return text

    def make() -> None:
        with open_regular(path) as file:
            write_text(remembered, hashlib.file_digest(file, "sha256").hexdigest())

    return kept(read, make)


def files_hash(paths: Iterable[Path]) -> str:
    """One hash of the contents of several files, in the order given."""
    return content_key(files=[file_hash(path) for path in paths])
