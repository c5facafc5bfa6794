"""How files of any origin are read: JSON and YAML by one reader each, regular files alone, each fault in a sentence."""

import errno
import json
import math
import os
import re
import stat
from io import BufferedReader
from itertools import chain
from pathlib import Path
from typing import Any

from crossalign.core.errors import UserError

LARGEST = 256 << 20
"""Bytes of a JSON file at most: what is larger is a list of rows, which is better written one a line."""
LARGEST_YAML = 1 << 20
"""Its reader takes ten seconds for so much."""
DEEPEST = 100
"""Lists and objects in one another."""
MOST_NODES = 100_000
"""Of a YAML file with its aliases written out, of which few bytes can make billions."""


_TURNED = "\u202a-\u202e\u2066-\u2069"  # characters that turn the direction of what follows them
_UNSHOWN = re.compile(rf"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff{_TURNED}]")


def shown(name: object) -> str:
    """A name of any origin as text that a terminal or a page shows and does not obey: control characters as their escapes."""
    return _UNSHOWN.sub(lambda match: match[0].encode("unicode_escape").decode(), str(name))


def without_login(text: str) -> str:
    """A text without the user and password of the addresses in it."""
    return re.sub(r"(?<=://)[^/\s\"']*@", "", text)


POINTER = b"version https://git-lfs.github.com/spec/"


def user_path(text: str | os.PathLike[str]) -> Path:
    """A path as a user wrote it, with ``~`` for a home folder; nothing need lie there.

    Raises:
        UserError: the system can have no such path: a NUL in it, a name too long, links that lead in a circle.
    """
    path = Path(os.path.expanduser(text))  # pathlib's own raises for the home of a user that there is not
    try:
        path.stat()
    except (OSError, ValueError) as error:
        number = getattr(error, "errno", None)
        if number in (None, errno.ENAMETOOLONG, errno.ELOOP):
            why = os.strerror(number) if number else "it holds a character that no path can have"
            name = repr(str(path)) if len(str(path)) < 100 else f"'{str(path)[:40]}…'"
            raise UserError(f"{name} can be no path here ({why}): choose another") from error
    return path


def open_regular(path: Path) -> BufferedReader:
    """A file, open for reading. A pipe or a device, which may never end, is none.

    Raises:
        OSError: there is none, or it cannot be read.
        UserError: it is a pointer of git-LFS, which stands where the file itself was not fetched.
    """
    number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # to open a pipe would wait for a writer
    if stat.S_ISREG(os.fstat(number).st_mode):
        file = os.fdopen(number, "rb")
        if file.peek(len(POINTER)).startswith(POINTER):
            file.close()
            raise UserError(f"'{path}' is a pointer of git-LFS, not the file itself: fetch that with 'git lfs pull'")
        return file
    is_folder = stat.S_ISDIR(os.fstat(number).st_mode)
    os.close(number)
    raise OSError(errno.EISDIR if is_folder else errno.EINVAL, "a folder" if is_folder else "no regular file", str(path))


def check_whole(path: Path) -> None:
    """Raise UserError where a file of weights is a pointer of git-LFS, or a safetensors file that was cut short."""
    try:
        with open_regular(path) as file:
            if path.suffix != ".safetensors":
                return
            size, start = os.fstat(file.fileno()).st_size, file.read(8)
            length = int.from_bytes(start, "little")
            if len(start) == 8 and 8 + length <= size:
                header = parse_json(file.read(min(length, LARGEST)), f"the header of '{path}'", "copy or fetch it again", dict)
                ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
                length += max(ends, default=0)
    except OSError as error:
        raise UserError(f"'{path}' cannot be read ({error.strerror}): copy or fetch it again") from error
    except (LookupError, TypeError) as error:
        raise UserError(f"the header of '{path}' is that of no safetensors file: copy or fetch it again") from error
    if len(start) < 8 or 8 + length > size:
        more = f" of {8 + length:,}" if len(start) == 8 and length < 1 << 50 else ""
        raise UserError(
            f"'{path}' was cut short, or is no safetensors file: it has {size:,}{more} bytes; copy or fetch it again"
        )


def read_bytes(path: Path, most: int = LARGEST, title: str = "") -> bytes:
    """A whole file, of at most so many bytes; ``title`` is what messages call it.

    Raises:
        UserError: it cannot be read, or is larger.
    """
    name = title or f"'{path}'"
    try:
        with open_regular(path) as file:
            size = min(os.fstat(file.fileno()).st_size, most)
            data = file.read(size + 1)  # asked for more, it would take room for all that
            if len(data) > size:  # it grows, or says nothing of its size, as those of the system
                data += file.read(most - size)
    except OSError as error:
        raise UserError(f"{name} cannot be read ({error.strerror}): name another file, or mend it") from error
    if len(data) > most:
        raise UserError(f"{name} is larger than {most >> 20} MB, which is more than is read of such a file")
    return data


def read_word(path: Path) -> str:
    """The identifier that is all that a small file holds: ASCII letters, digits and "_", so that it can name a folder or a run
    and lead nowhere else. Empty where the file holds anything else.

    Raises:
        UserError: it cannot be read, or is larger than an identifier.
    """
    text = read_bytes(path, most=1000).strip()
    return text.decode("ascii") if re.fullmatch(rb"\w+", text) else ""


def read_array(path: Path, mapped: bool = False) -> Any:
    """The numpy array of a .npy file, ``mapped`` or read; no pickle is ever opened.

    Raises:
        OSError: it is not there, or no regular file, at which ``np.load`` would wait. ValueError, EOFError: it is damaged.
    """
    import numpy as np  # not at the top: what only reads settings does without it

    with open_regular(path) as file:
        return np.load(path, mmap_mode="r", allow_pickle=False) if mapped else np.load(file, allow_pickle=False)


def read_json(path: Path, kind: type = dict, remedy: str = "restore or delete it", most: int = LARGEST, title: str = "") -> Any:
    """What a JSON file holds, UTF-8 with or without a byte order mark.

    Args:
        path: the file.
        kind: what it must hold, such as dict or list; object takes anything.
        remedy: what to do about a damaged one, for the message.
        most: bytes.
        title: what messages call it; empty for its path.

    Raises:
        UserError: it cannot be read, is no JSON, nested too deeply, or holds something else.
    """
    return parse_json(read_bytes(path, most, title), title or f"'{path}'", remedy, kind)


def parse_json(data: bytes | str, title: str, remedy: str, kind: type = object) -> Any:
    """What a text of JSON holds; see :func:`read_json`. ``title`` is what messages call it."""
    try:
        text = _decoded(data, title)
        value = json.loads(text)
        if text.count("[") + text.count("{") > DEEPEST and _too_deep(value):
            raise RecursionError
    except RecursionError as error:
        raise UserError(f"{title} is not valid JSON (nested more than {DEEPEST} deep): {remedy}") from error
    except ValueError as error:
        raise UserError(f"{title} is not valid JSON ({error}): {remedy}") from error
    return _of_kind(value, kind, title, remedy)


def read_yaml(path: Path, kind: type = dict, remedy: str = "restore or delete it", title: str = "") -> Any:
    """What a YAML file holds, of which plain values alone are ever made; see :func:`read_json`.

    Raises:
        UserError: it cannot be read, is no YAML, has a key twice or aliases without end, or holds something else.
    """
    return parse_yaml(read_bytes(path, LARGEST_YAML, title), title or f"'{path}'", remedy, kind)


def parse_yaml(data: bytes | str, title: str, remedy: str, kind: type = object) -> Any:
    """What a text of YAML holds; see :func:`read_yaml`. ``title`` is what messages call it."""
    import yaml

    try:
        loader = yaml.SafeLoader(_decoded(data, title))
        node = loader.get_single_node()
        sizes: dict[int, float] = {}
        if node is not None and _nodes(node, sizes) > MOST_NODES:  # before values are made, which aliases multiply
            raise UserError(f"{title} holds more than {MOST_NODES:,} values with its aliases written out: {remedy}")
        _check_keys(node, title)
        value = None if node is None else loader.construct_document(node)
    except RecursionError as error:
        raise UserError(f"{title} is no YAML: nested too deeply; {remedy}") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date or a number that cannot be
        raise UserError(f"{title} is no YAML: {' '.join(str(error).split())}; {remedy}") from error
    return _of_kind(value, kind, title, remedy)


def _decoded(data: bytes | str, title: str) -> str:
    try:
        return data if isinstance(data, str) else data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{title} is no UTF-8 text (byte {error.start}): save it as UTF-8") from error


def _of_kind(value: Any, kind: type, title: str, remedy: str) -> Any:
    if not isinstance(value, kind):
        names: dict[Any, str] = {dict: "settings or facts by name", list: "a list"}
        raise UserError(f"{title} holds {type(value).__name__}, not {names.get(kind, kind.__name__)}: {remedy}")
    return value


def _too_deep(value: Any) -> bool:
    """Whether lists and objects are nested deeper than ``DEEPEST``."""
    level = [value]
    for _ in range(DEEPEST):
        inside = (entry.values() if isinstance(entry, dict) else entry for entry in level if isinstance(entry, dict | list))
        level = [entry for entries in inside for entry in entries if isinstance(entry, dict | list)]
    return bool(level)


def _nodes(node: Any, sizes: dict[int, float]) -> float:
    """How many nodes there are with aliases written out; infinity for one that holds itself."""
    if id(node) not in sizes:
        sizes[id(node)] = math.inf
        inner = node.value if isinstance(node.value, list) else ()
        parts = chain(*inner) if node.id == "mapping" else inner
        sizes[id(node)] = 1 + sum(_nodes(part, sizes) for part in parts)
    return sizes[id(node)]


def _check_keys(node: Any, title: str) -> None:
    """Raise UserError for a key that stands twice: YAML keeps the last and says nothing."""
    inner = node.value if node is not None and isinstance(node.value, list) else []
    pairs = inner if inner and node.id == "mapping" else [(None, part) for part in inner]
    keys = [key.value for key, _ in pairs if key is not None and isinstance(key.value, str)]
    if len(set(keys)) < len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise UserError(f"{title} gives '{twice}' twice: keep one")
    for key, value in pairs:
        _check_keys(value, title if key is None else f"{title.removesuffix(',')}, field '{key.value}',")
