"""Files that can be made again: one folder, content-hash names, atomic writes."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from crossalign.core.errors import UserError
from crossalign.core.reading import open_regular, read_bytes, user_path

T = TypeVar("T")


def cache_dir(kind: str) -> Path:
    """The folder for one kind of cached file, made if need be: ``$CROSSALIGN_CACHE`` or ``~/.cache/crossalign``."""
    root = os.environ.get("CROSSALIGN_CACHE") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "crossalign"
    folder = user_path(root) / kind
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def kept(read: Callable[[], T], make: Callable[[], object]) -> T:
    """What ``read`` gives of a cache; where nothing lies there, or nothing whole, ``make`` writes it first."""
    with suppress(UserError, OSError, ValueError, TypeError, AttributeError, LookupError, EOFError):
        return read()
    make()
    return read()


def content_key(**parts: Any) -> str:
    """A short hash of JSON-able parts: the same parts, the same key."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its place when the block ends well, and vanishes when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    umask = os.umask(0)  # mkstemp lets nobody else read; this is a file like any other
    os.umask(umask)
    os.chmod(name, 0o666 & ~umask)
    temporary = Path(name)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


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
            value = hashlib.file_digest(file, "sha256").hexdigest()
        with atomic_path(remembered) as temporary:
            temporary.write_text(value)

    return kept(read, make)


def files_hash(paths: Iterable[Path]) -> str:
    """One hash of the contents of several files, in the order given."""
    return content_key(files=[file_hash(path) for path in paths])
