"""What all sources of data have in common: the words that names of files have for splits, and a listing of what was found."""

import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
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
    """Files by the split that their own or their folder's name speaks of; "" where neither does."""
    splits: dict[str, list[Path]] = {}
    for file in files:
        split = split_name(file.stem) or split_name(file.parent.name if file.parent != folder else "")
        splits.setdefault(split or "", []).append(file)
    return splits


def text_sources(
    names: Sequence[str], kind: str, suffixes: Collection[str], levels: int = 0, built_in: Sequence[str] = ()
) -> tuple[list[Path | str], list[str]]:
    """Files of text to train on and sets of the hub, in the order of their names, and the names of files left out.

    A folder gives its files, but for those of other splits: where one is named train, or lies in a folder of that name, these
    are those that are named test or validation likewise.

    Args:
        names: what the user names.
        kind: a word for messages, such as corpus.
        suffixes: of files that are read; "" also takes a file without one, if it is named itself.
        levels: of folders, see :func:`files_below`.
        built_in: names of texts that need no file; they stay as they are, like those of sets of the hub.

    Raises:
        UserError: nothing is named or lies there, or a kind of file that is not read.
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
            files = [file for file in files_below(path, {*suffixes} - {""}, levels) if file.is_file()]
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


def files_below(folder: Path, suffixes: Collection[str], levels: int = 0) -> list[Path]:
    """Files of some kinds in a folder and those below it, ``levels`` in all or 0 for any depth; nothing hidden; sorted."""
    files: list[Path] = []
    for root, folders, names in os.walk(folder, followlinks=levels > 0):
        depth = 1 + len(Path(root).relative_to(folder).parts)
        folders[:] = [] if depth == levels else [name for name in folders if not name.startswith(".")]
        files += (Path(root, n) for n in names if os.path.splitext(n)[1].lower() in suffixes and not n.startswith("."))
    return sorted(files)


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
