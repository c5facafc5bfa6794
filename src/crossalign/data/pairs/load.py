"""Texts with images that belong to them, checked once, decoded only when they are looked at (CMAR §3.1)."""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from crossalign.config import PairsConfig, validate
from crossalign.core.errors import UserError
from crossalign.core.files import cache_dir, content_key, kept
from crossalign.core.reading import read_array, read_bytes, user_path
from crossalign.data.images.cached import cached_hashes, save_array
from crossalign.data.images.decode import MAX_BYTES, checked, hash_of, picture
from crossalign.data.pairs.sources import PairListing, list_pairs
from crossalign.data.records import whole_text
from crossalign.data.sources import SPLITS, Raw

VERSION = 1  # of what the check of images keeps in the cache
SHARES = {"train": 0.8, "validation": 0.9, "test": 1.0}
"""Where a source without splits is cut, on a scale of 0 to 1 that each picture is hashed to."""

CAPTION_KEYS = ("raw", "caption", "text")
"""What the text is called in captions that are objects."""

_REPEAT = re.compile(r"#\d+$")  # the further rows of one image


@dataclass(frozen=True)
class Pairs:
    """N images with one text or more each, in the order of their source."""

    ids: tuple[str, ...]
    texts: tuple[tuple[str, ...], ...]
    """At least one text an image, none of them empty."""
    fingerprint: str
    """Hash of ids, texts and encoded images: equal wherever the same pairs lie."""
    source: str
    """A sentence: what it is, and what to know about it."""
    skipped: tuple[str, ...]
    """What was left out, each with the reason."""
    rows: np.ndarray
    """int64 (N,): places in the source."""
    read: Callable[[int], Raw]
    """The encoded image at a place in the source."""
    repeated: int = 0
    """How many show the very image of an earlier one: some sets have a row for each caption."""

    def __len__(self) -> int:
        return len(self.ids)

    def image(self, index: int) -> Image.Image:
        """The picture of a pair, upright, RGB, in its own size; decoded now and not kept."""
        return picture(self.read(int(self.rows[index])), "rgb")

    def images(self, indices: Sequence[int]) -> list[Image.Image]:
        """The pictures of some pairs."""
        return [self.image(index) for index in indices]


def open_pairs(config: PairsConfig) -> Pairs:
    """Open and check the pairs of ``config.source``; see :class:`PairsConfig` for what it can be.

    Every image that is used is decoded once, to check it; that is noted in the cache, and the pixels are not kept.

    Raises:
        UserError: no such source, split or column; images that cannot be read or captions that are empty, unless
            ``config.on_error`` is skip.
    """
    validate(config, "pairs.")
    listing, is_split = list_pairs(config)
    if not len(listing.ids):
        raise UserError(f"'{config.source}' has no pairs")
    rows, bad = _split_rows(listing, is_split, config)
    bad += listing.faults
    captions = {int(row): _captions(listing.texts[row]) for row in rows}
    hashes, broken = _check_images(listing, rows)
    bad += [f"image of {listing.ids[row]}: {why}" for row, why in broken.items()]
    bad += [f"caption of {listing.ids[row]}: {why}" for row, (_, why) in captions.items() if why]
    if bad and config.on_error == "stop":
        some = "; ".join(bad[:3]) + (f"; and {len(bad) - 3} more" if len(bad) > 3 else "")
        count = f"{len(bad)} faults" if len(bad) > 1 else "1 fault"
        raise UserError(f"{count} in '{config.source}': {some}. Mend them, or go on without: --pairs.on-error skip")
    # A pair goes on without captions that are none, as long as it has another.
    good = {row: tuple(texts) for row, (texts, _) in captions.items() if texts and row not in broken}
    if not good:
        raise UserError(f"'{config.source}' has no pair that can be used; the first fault: {bad[0]}")
    keep = np.array(list(good), dtype=np.int64)
    ids = tuple(listing.ids[row] for row in keep)
    used = hashes[np.isin(rows, keep)]
    fingerprint = hashlib.sha256(repr((ids, tuple(good.values()))).encode() + used.tobytes()).hexdigest()[:20]
    source = _describe(listing, config, list(good.values()), len(bad), is_split)
    repeated = len(used) - len(np.unique(used))
    return Pairs(ids, tuple(good.values()), fingerprint, source, tuple(bad), keep, listing.read, repeated)


def _split_rows(listing: PairListing, is_split: bool, config: PairsConfig) -> tuple[np.ndarray, list[str]]:
    """Rows to use, in order, and names in the split file that the source lacks."""
    bad: list[str] = []
    if config.split_file:
        rows, bad = _listed_rows(listing, config)
    elif is_split:
        rows = np.arange(len(listing.ids))
    elif listing.splits is not None:
        rows = np.flatnonzero([SPLITS.get(str(split).lower()) == config.split for split in listing.splits])
    else:
        names = list(SHARES)
        edges = list(SHARES.values())
        part = np.searchsorted(edges, _places(listing), side="right")
        rows = np.flatnonzero(part == names.index(config.split))
    if not len(rows):
        raise UserError(f"the {config.split} split of '{config.source}' has no pairs ({len(listing.ids)} in all)")
    if config.limit is not None:
        if config.limit > len(rows):
            raise UserError(f"--pairs.limit {config.limit} is larger than the {config.split} split of {len(rows)} pairs")
        rows = np.sort(np.random.Generator(np.random.PCG64(0)).permutation(rows)[: config.limit])
    return rows, bad


def _listed_rows(listing: PairListing, config: PairsConfig) -> tuple[np.ndarray, list[str]]:
    path = user_path(config.split_file)
    text = whole_text(path, lambda error: f"cannot read the split file '{path}' ({error}): give a text file with one id a line")
    wanted = [line.strip() for line in text.splitlines() if line.strip()]
    by_name: dict[str, list[int]] = {}
    for row, name in enumerate(listing.ids):
        by_name.setdefault(_REPEAT.sub("", name), []).append(row)
    rows = [row for name in dict.fromkeys(wanted) for row in by_name.get(name, ())]
    if not rows:
        raise UserError(
            f"'{path}' lists no pair of '{config.source}': the first line is '{wanted[0] if wanted else ''}', "
            f"the first id '{listing.ids[0]}'"
        )
    return np.unique(rows), [f"{name}: listed in {path.name}, but not there" for name in wanted if name not in by_name]


def _places(listing: PairListing) -> np.ndarray:
    """A place between 0 and 1 for each row, float64 (N,), by a hash of its encoded image, noted in the cache.

    So all rows of one image fall on one side of a split, whatever their ids, and the order of the rows changes nothing.
    """
    path = cache_dir("pairs") / f"{content_key(identity=listing.identity, places=VERSION)}.places.npy"

    def read() -> np.ndarray:
        hashes: np.ndarray = read_array(path)
        if hashes.shape != (len(listing.ids),) or hashes.dtype != np.uint64:
            raise ValueError(hashes.shape)
        return hashes / 2.0**64

    def make() -> None:
        hashes = checked(_raws(listing, range(len(listing.ids))), _hash, len(listing.ids), listing.title)
        # 0 for one that cannot be read, which is told later
        save_array(path, np.array([0 if isinstance(value, str) else value for value in hashes], dtype=np.uint64))

    return kept(read, make)


def _check_images(listing: PairListing, rows: np.ndarray) -> tuple[np.ndarray, dict[int, str]]:
    """A hash of each encoded image, uint64 (R,), and why some rows cannot be decoded; noted in the cache."""
    key = content_key(identity=listing.identity, rows=hashlib.sha256(rows.tobytes()).hexdigest(), version=VERSION)

    def compute() -> list[int | str]:
        return list(checked(_raws(listing, rows), _hash_of_readable, len(rows), listing.title))

    return cached_hashes("pairs", key, rows, compute)[:2]


def _raws(listing: PairListing, rows: Iterable[int]) -> Iterator[Raw | str]:
    """The encoded images; a str says why one cannot be read."""
    for row in rows:
        try:
            raw = listing.read(int(row))
            yield read_bytes(raw, MAX_BYTES) if isinstance(raw, Path) else raw
        except UserError as error:
            yield str(error)
        except OSError as error:
            yield f"{type(error).__name__}: {error}"


def _hash(raw: Raw) -> int:
    return hash_of(raw if isinstance(raw, bytes) else picture(raw, "rgb").tobytes())


def _hash_of_readable(raw: Raw) -> int:
    image = picture(raw, "rgb")
    return hash_of(raw if isinstance(raw, bytes) else image.tobytes())


def _captions(cell: Any) -> tuple[list[str], str]:
    """A cell of a text column → its texts, stripped; and what is wrong with what is none, "" if nothing is."""
    texts: list[str] = []
    faults: list[str] = []

    def take(value: Any) -> None:
        if isinstance(value, list | tuple):
            for entry in value:
                take(entry)
        elif isinstance(value, dict):
            name = next((name for name in CAPTION_KEYS if name in value), None)
            if name is None:
                faults.append(f"it has {', '.join(map(str, value)) or 'no keys'}, none of {', '.join(CAPTION_KEYS)}")
            else:
                take(value[name])
        elif isinstance(value, bytes):
            try:
                take(value.decode("utf-8-sig"))
            except UnicodeDecodeError:
                faults.append("not UTF-8 text")
        elif isinstance(value, str) and value.strip():
            texts.append(value.strip())
        elif value is None or isinstance(value, str) or value != value:
            faults.append("empty")
        else:
            faults.append(str(value) if isinstance(value, UserError) else f"{value!r:.40} is no text")

    take(cell)
    return texts, faults[0] if faults else "" if texts else "empty"


def _describe(listing: PairListing, config: PairsConfig, texts: list[tuple[str, ...]], left_out: int, is_split: bool) -> str:
    """One sentence for run logs and tables."""
    name = f"those listed in {Path(config.split_file).name}" if config.split_file else f"{config.split} split"
    own = is_split or listing.splits is not None or config.split_file
    captions = sum(map(len, texts))
    parts = [f"{len(texts):,} images with {captions:,} texts", name + ("" if own else " (by a hash of each picture, 80/10/10)")]
    parts += [f"limited to {config.limit:,}"] if config.limit else []
    parts += [f"{left_out} faults left out"] if left_out else []
    return f"{listing.title}: {', '.join(parts)}"
