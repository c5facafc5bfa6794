"""``cache``: what was kept so that it is not made again, and how to be rid of it."""

import itertools
import re
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from crossalign.config.bounds import Amount
from crossalign.core.errors import UserError
from crossalign.core.files import cache_root, remove
from crossalign.verbs import Verb

Kind = Literal["images", "pairs", "features", "corpora", "targets", "hashes", "precision", "quality", "gguf"]
DAY = 86_400.0
_ENTRY = re.compile(r"(?:openmoji-)?[0-9a-f]{20}(?=\.|$)")  # a folder of the user's own may lie there too


@dataclass
class CacheArgs:
    """List what lies in the cache, or delete some of it. All of it is made again when it is wanted."""

    prune: bool = False
    """Delete what would be listed, after asking."""
    yes: bool = False
    """Delete without asking."""
    kind: Kind | None = None
    """Only entries of this kind."""
    older_than: Amount = 0.0
    """Only entries that did not change for so many days."""
    larger_than: Amount = 0.0
    """Only entries of at least so many MB."""


@dataclass(frozen=True)
class Entry:
    """The files of one thing in the cache."""

    kind: str
    name: str
    files: tuple[Path, ...]
    size: int
    """Bytes."""
    days: float
    """Since the last change."""


def run(args: CacheArgs, _: str) -> str:
    """List the entries asked for, or delete them."""
    chosen = [e for e in entries() if args.kind in (None, e.kind) and e.size >= 1e6 * args.larger_than]
    chosen = [entry for entry in chosen if entry.days >= args.older_than]
    total = f"{len(chosen):,} entries, {sum(entry.size for entry in chosen) / 1e6:,.1f} MB, in {cache_root()}"
    if not args.prune:
        return "\n".join([*_lines(chosen), total])
    if not args.yes and chosen:
        if not sys.stdin.isatty():
            raise UserError(f"nothing is deleted without a yes: add --yes to delete {total}")
        if input(f"delete {total}? [y/N] ").strip().lower() not in ("y", "yes"):
            return "nothing is deleted"
    for entry in chosen:
        for file in sorted(entry.files, key=lambda file: file.suffix != ".json"):  # first what says that the rest is whole
            remove(file)
    return f"deleted {total}"


def entries() -> Iterator[Entry]:
    """What lies in the cache, kind by kind, the largest first; nothing that is not ours."""
    for kind in get_args(Kind):
        files: dict[str, list[Path]] = {}
        for path in sorted((cache_root() / kind).glob("*")):
            if (match := _ENTRY.match(path.name)) and path.suffix != ".lock" and not path.is_symlink():
                files.setdefault(path.name if ".part." in path.name else match[0], []).append(path)
        yield from sorted((_entry(kind, name, paths) for name, paths in files.items()), key=lambda entry: -entry.size)


def _entry(kind: str, name: str, paths: list[Path]) -> Entry:
    size, changed = 0, 0.0
    for path in itertools.chain.from_iterable((top, *top.rglob("*")) for top in paths):
        with suppress(OSError):  # another process removed it
            status = path.stat()
            size, changed = size + (0 if path.is_dir() else status.st_size), max(changed, status.st_mtime)
    return Entry(kind, name, tuple(paths), size, (time.time() - changed) / DAY)


def _lines(chosen: list[Entry]) -> Iterator[str]:
    """A line an entry; those of a kind that are small make one line together."""
    for kind in dict.fromkeys(entry.kind for entry in chosen):
        of_kind = [entry for entry in chosen if entry.kind == kind]
        large = [entry for entry in of_kind if entry.size >= 1e6] if len(of_kind) > 1 else of_kind
        for entry in large:
            yield f"{kind:<10} {entry.name:<34} {entry.size / 1e6:>11,.1f} MB {entry.days:>7.1f} days  {_words(entry)}"
        if rest := of_kind[len(large) :]:
            size, days = sum(entry.size for entry in rest) / 1e6, min(entry.days for entry in rest)
            yield f"{kind:<10} {f'{len(rest):,} of less than 1 MB':<34} {size:>11,.1f} MB {days:>7.1f} days"


def _words(entry: Entry) -> str:
    """What it is."""
    from crossalign.core.reading import read_json, shown

    if ".part." in entry.name:
        return "a copy of a part, of an earlier version; no longer used"
    if any(file.suffix == ".bytes" for file in entry.files):
        return "files of images"
    with suppress(UserError):
        notes: Any = next((read_json(file) for file in entry.files if file.suffix == ".json"), {})
        if isinstance(title := notes.get("title"), str):
            return shown(title)
    return {
        "images": "pixels of images",
        "pairs": "checks of images with texts" if "-" not in entry.name else "drawings of OpenMoji",
        "features": "a vision model's features",
        "corpora": "text as tokens",
        "targets": "text to align images with",
        "hashes": "the hash of a file",
        "precision": "timings of number formats",
        "quality": "a language model's quality",
        "gguf": "a .gguf file's weights, dequantised",
    }[entry.kind]


CACHE = Verb(CacheArgs, run)
