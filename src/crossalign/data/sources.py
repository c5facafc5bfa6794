"""What all sources of data have in common: the words that names of files have for splits, and a listing of what was found."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

Raw: TypeAlias = "Path | bytes | np.ndarray | Image.Image | None"
"""An image before decoding: a file, its bytes, uint8 values (H, W) or (H, W, 3), a picture; None where missing."""

EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm"})
SPLITS = {"train": "train", "training": "train", "val": "validation", "valid": "validation", "validation": "validation"}
SPLITS |= {"dev": "validation", "test": "test", "testing": "test"}
"""Names of splits in files and folders → ours."""


@dataclass(frozen=True)
class Listing:
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


Listings: TypeAlias = dict[str, Listing]
"""By split, as far as the source has them: train, validation, test."""


def split_name(words: str) -> str | None:
    """The split that a file or folder name speaks of: ``cifar10_test.parquet`` → test; None if of none."""
    for word in re.split(r"[^a-z]+", words.lower()):
        if word in SPLITS:
            return SPLITS[word]
    return None


def without_other_splits(folder: Path, files: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Files to train on, and those left out: where one is named train, or lies in a folder of that name, those that are
    named test or validation likewise are others."""
    splits = {file: split_name(file.stem) or split_name(file.parent.name if file.parent != folder else "") for file in files}
    if "train" not in splits.values():
        return list(files), []
    others = [file for file in files if splits[file] in ("test", "validation")]
    return [file for file in files if file not in others], others


def file_identity(files: Iterable[Path]) -> list[tuple[str, int, int]]:
    """Path, size and time of change of each file: what the cache of decoded images goes by."""
    rows = []
    for file in files:
        status = file.stat()
        rows.append((str(file.resolve()), status.st_size, status.st_mtime_ns))
    return rows
