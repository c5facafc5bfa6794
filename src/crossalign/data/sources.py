"""What all sources of data have in common: one walk over folders, words in names that stand for splits, listings of images."""

import os
import re
import stat
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

from crossalign.core.errors import UserError
from crossalign.core.reading import shown, user_path
from crossalign.core.refs import Ref

Raw: TypeAlias = Path | bytes | np.ndarray | Image.Image | None
"""An image before decoding: a file, its bytes, uint8 values (H, W) or (H, W, 3), a picture; None where missing."""

EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm"})
SPLITS = {"train": "train", "training": "train", "val": "validation", "valid": "validation", "validation": "validation"}
SPLITS |= {"dev": "validation", "test": "test", "testing": "test"}
"""Names of splits in files and folders → ours."""
LITTER = frozenset({"__MACOSX", "@eaDir"})
"""Folders that programs leave beside a user's files; what is hidden is litter too."""


@dataclass(frozen=True)
class ImageListing:
    """One split of a source, as found: labels and names are known, pixels are still encoded."""

    title: str
    """For messages: the folder's or file's name."""
    labels: np.ndarray
    """int64 (N,)"""
    classes: tuple[str, ...]
    names: Sequence[str]
    """N names of files or rows, for messages."""
    records: Callable[[], Iterator[Raw]]
    """Goes through the N images in order."""
    identity: Any
    """JSON-able; changes when the images may have changed."""
    files: tuple[Path, ...] = ()
    """What it is read from."""
    faults: tuple[str, ...] = ()
    """What lies there and cannot be read, each with the reason; counted with the images that cannot be."""
    notes: tuple[str, ...] = ()
    """What else to know about the source: parts of the sentence that describes it."""
    column: Callable[[str], Sequence[Any]] | None = None
    """The N cells of another column, by its name, in a source that has columns."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", tuple(map(shown, self.classes)))
        object.__setattr__(self, "title", shown(self.title))


Listings: TypeAlias = dict[str, ImageListing]
"""By split, as far as the source has them: train, validation, test."""


def split_name(words: str) -> str | None:
    """The split that a file or folder name speaks of: ``cifar10_test.parquet`` → test; None if of none."""
    for word in re.split(r"[^a-z]+", words.lower()):
        if word in SPLITS:
            return SPLITS[word]
    return None


def by_split(folder: Path, files: Sequence[Path]) -> dict[str, list[Path]]:
    """Files by the split that their own name speaks of, else that of the nearest folder round them; "" where none does."""
    splits: dict[str, list[Path]] = {}
    for file in files:
        names = [file.stem, *reversed(file.relative_to(folder).parts[:-1])]
        splits.setdefault(next(filter(None, map(split_name, names)), ""), []).append(file)
    return splits


def is_litter(name: str) -> bool:
    """Whether a path within a folder or an archive is hidden or a program's own: ``._x.jpg``, ``__MACOSX/x.jpg``."""
    parts = PurePosixPath(name).parts
    return any(part in LITTER or (part.startswith(".") and part != "..") for part in parts)


def text_sources(
    names: Sequence[str], kind: str, suffixes: Collection[str], built_in: Sequence[str] = ()
) -> tuple[list[Path | str], list[str]]:
    """Files of text to train on and sets of the hub, in the order of their names, and the names of files left out.

    A folder gives its files, but for those of other splits: where one is named train, or lies in a folder of that name, these
    are those that are named test or validation likewise.

    Args:
        names: what the user names.
        kind: a word for messages, such as corpus.
        suffixes: of files that are read; "" also takes a file without one, if it is named itself.
        built_in: names of texts that need no file; they stay as they are, like those of sets of the hub.

    Raises:
        UserError: nothing is named or lies there, a kind of file that is not read, or something in a folder that cannot be.
    """
    kinds = ", ".join(filter(None, suffixes))
    sources: list[Path | str] = []
    left_out: list[str] = []
    known = f"a file ({kinds}), a folder of them, {', '.join([*built_in, 'or hf:ORG/NAME'])}"
    if not names:
        raise UserError(f"{kind} data has no source: give {known}")
    for name in names:
        path = user_path(name)
        if name in built_in or Ref(name, ()).kind == "hf":
            sources.append(name)
        elif name and path.is_dir():
            files = files_below(path, {*suffixes} - {""})
            if not files:
                raise UserError(f"{kind} folder '{name}' holds no {kinds}; fill it or name another")
            splits = by_split(path, files)
            held_out = {*splits.get("test", ()), *splits.get("validation", ())} if "train" in splits else set()
            sources += [file for file in files if file not in held_out]
            left_out += [file.name for file in files if file in held_out]
        elif not path.is_file():
            raise UserError(f"{kind} source '{name}' does not exist: give {known}")
        elif path.suffix.lower() not in suffixes:
            raise UserError(f"{kind} source '{name}' is no {kinds}: convert it to one")
        else:
            sources.append(path)
    return sources, left_out


def files_below(folder: Path, suffixes: Collection[str], faults: dict[Path, str] | None = None) -> list[Path]:
    """Files of some kinds in a folder and all those below it, sorted; no litter.

    Links are followed, but into each folder once, and out to none that holds this one: a circle of links ends.

    Args:
        folder: where to look.
        suffixes: of files that are wanted, in lower case.
        faults: is given what cannot be read, with the reason: folders without permission, links that lead nowhere, pipes and
            devices; with None the first of them is raised.

    Raises:
        UserError: something cannot be read, and ``faults`` is None.
    """
    files: list[Path] = []
    bad: dict[Path, str] = {}
    entered = {(status.st_dev, status.st_ino) for status in (path.stat() for path in folder.resolve().parents)}
    waiting = [folder]
    while waiting:
        current = waiting.pop()
        try:
            status = current.stat()
            entries = sorted(
                (entry for entry in os.scandir(current) if not is_litter(entry.name)), key=lambda entry: entry.name
            )
        except OSError as error:
            bad[current] = _why(error)
            continue
        if (status.st_dev, status.st_ino) in entered:
            continue
        entered.add((status.st_dev, status.st_ino))
        inside = []
        for entry in sorted(entries, key=lambda entry: entry.name):
            path, is_wanted = current / entry.name, os.path.splitext(entry.name)[1].lower() in suffixes
            try:
                if entry.is_dir():
                    inside.append(path)
                elif is_wanted and entry.is_file():
                    files.append(path)
                elif (is_wanted or entry.is_symlink()) and not stat.S_ISREG(entry.stat().st_mode):
                    bad[path] = "no regular file"  # a link that leads nowhere has raised
            except OSError as error:
                bad[path] = _why(error)
        waiting += reversed(inside)
    if faults is not None:
        faults |= bad
    elif bad:
        path, why = next(iter(bad.items()))
        raise UserError(f"cannot read '{path}' ({why}): mend or remove it")
    return sorted(files)


def _why(error: OSError) -> str:
    """Why something in a folder cannot be read."""
    return "a link that leads nowhere" if isinstance(error, FileNotFoundError) else (error.strerror or str(error)).lower()


def title_of(files: Sequence[Path]) -> str:
    """Some files in words."""
    return files[0].name if len(files) == 1 else f"{files[0].name} and {len(files) - 1} more"


def file_identity(files: Iterable[Path]) -> list[tuple[str, int, int]]:
    """Path, size and time of change of each file: what the cache of decoded images goes by."""
    rows = []
    for file in files:
        status = file.stat()
        rows.append((str(file.resolve()), status.st_size, status.st_mtime_ns))
    return rows
