"""Labelled images, opened once and split three ways: train, validation (selects), test (scored once)."""

import hashlib
import math
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from crossalign.config import DataConfig, validate
from crossalign.core.errors import UserError, some
from crossalign.core.files import cache_dir, content_key, kept
from crossalign.core.progress import announce
from crossalign.core.reading import read_array, shown
from crossalign.data.images.cached import Decoded, check_room, decode_listing, decoded_bytes, key_of, save_array, sizes_differ
from crossalign.data.images.encoded import EncodedImages, bytes_file, bytes_key, encode_listing
from crossalign.data.images.pixels import Pixels
from crossalign.data.images.sources import list_source
from crossalign.data.images.splits import copies, groups_of, joined, split_rows, without_small
from crossalign.data.sources import ImageListing, Listings

CHUNK_BYTES = 1 << 26  # of pixels looked at together where a whole set is gone through
LARGE = 16e9
"""Bytes of pixels beyond which ``data.cache = auto`` keeps the files instead."""


@dataclass(frozen=True)
class ImageSet:
    """N images of one size with their labels."""

    pixels: np.ndarray | Pixels
    """uint8 (N, C, H, W); an array, or rows of a memory map that all splits share."""
    labels: torch.Tensor
    """int64 (N,)"""
    classes: tuple[str, ...]
    names: tuple[str, ...] | None = None
    """File or row names, for messages."""

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class ImageSplits:
    """A source, split."""

    train: ImageSet
    validation: ImageSet
    test: ImageSet
    source: str
    """A sentence: what it is, how it was split, and what to know about it."""
    skipped: tuple[str, ...]
    """Images that could not be read and were left out, each with the reason."""
    fingerprint: str
    """Hash of all pixels, labels and class names in their splits: equal wherever the same data lies."""


def open_images(config: DataConfig) -> ImageSplits:
    """Open, check and split the images of ``config.source``; see :class:`DataConfig` for what it can be.

    Every image is decoded once and kept in the cache as uint8; later calls map that file. Processes that share a cache
    may call this at once: each does the whole work, and the results are the same.

    Raises:
        UserError: one sentence for whatever stands in the way; what needs no decoding is checked before any.
    """
    return decode_images(config, list_images(config))


def decode_images(config: DataConfig, listings: Listings) -> ImageSplits:
    """:func:`open_images` of what :func:`list_images` gave."""
    for split in ("validation", "test"):
        share = getattr(config, f"{split}_fraction")
        if split in listings and share != getattr(DataConfig(), f"{split}_fraction"):
            announce(f"--data.{split}-fraction has no effect: the images come with {split} images of their own")
    classes = listings["train"].classes
    labels = {split: listing.labels for split, listing in listings.items()}
    groups = groups_of(listings["train"], config.group_by)
    split_rows(labels, classes, config, groups=groups)  # raises now what would else be raised after the decoding
    decoded = _open(listings, config)
    shape = decoded["train"].pixels.shape[1:]
    for split, part in decoded.items():
        if part.pixels.shape[1:] != shape:
            raise sizes_differ(listings["train"].title, shape, listings[split].title, part.pixels.shape[1:])
    skipped, notes = _skipped(listings, decoded, config)
    unusable: dict[str, Collection[int]] = {split: part.bad for split, part in decoded.items()}
    if config.duplicates == "together":
        groups = joined(_distinct(decoded["train"]), groups)
    elif config.duplicates == "drop":
        dropped = copies({split: part.hashes for split, part in decoded.items()}, unusable)
        unusable = {split: [*rows, *dropped[split]] for split, rows in unusable.items()}
        notes.append(f"{sum(map(len, dropped.values()))} copies of images left out")
    try:
        rows = split_rows(labels, classes, config, unusable, groups)
    except UserError as error:
        if not skipped:
            raise
        raise UserError(f"{error}; {notes[0]}, first {skipped[0]}") from error
    origin = {split: split if split in listings else "train" for split in rows}
    sets = {split: _image_set(listings[origin[split]], decoded[origin[split]], rows[split]) for split in rows}
    hashes = {split: decoded[origin[split]].hashes[rows[split]] for split in rows}
    notes += [*_twins(hashes), *_unused_bits(decoded, config.white_level)]
    digest = hashlib.sha256()
    for split, images in sets.items():
        digest.update(repr((split, images.classes, images.pixels.shape)).encode())
        digest.update(images.labels.numpy().tobytes() + hashes[split].tobytes())
    source = _describe(config, listings, sets, notes)
    return ImageSplits(sets["train"], sets["validation"], sets["test"], source, skipped, digest.hexdigest()[:20])


def _open(listings: Listings, config: DataConfig) -> dict[str, Decoded]:
    """The images of each listing, kept as ``config.cache`` says.

    Raises:
        UserError: no room for what is not there yet.
    """
    look = (config.image_size, config.channels, config.white_level, config.resize)
    pixels = {split: decoded_bytes(listing, *look[:2]) for split, listing in listings.items()}
    files = {split: sum(file.stat().st_size for file in part.files) or pixels[split] for split, part in listings.items()}
    size, size_of_files = sum(pixels.values()), sum(files.values())
    encoded = config.cache == "encoded" or (config.cache == "auto" and size > max(LARGE, size_of_files))
    if encoded and config.cache == "auto":
        announce(
            f"images are kept as their files, {size_of_files / 1e9:.1f} GB, and decoded anew in each epoch: their pixels would "
            f"take {size / 1e9:.1f} GB (--data.cache decoded keeps those)"
        )
    folder, needed, count = cache_dir("images"), 0, 0
    for split, listing in listings.items():
        file = bytes_file(bytes_key(listing)) if encoded else folder / f"{key_of(listing, *look)}.npy"
        if not file.is_file():
            needed, count = needed + (files if encoded else pixels)[split], count + len(listing.labels)
    check_room(needed, f"{count:,} {'files' if encoded else 'decoded images'} of {listings['train'].title}")
    open_listing = encode_listing if encoded else decode_listing
    return {split: open_listing(listing, *look) for split, listing in listings.items()}


def _skipped(listings: Listings, decoded: Mapping[str, Decoded], config: DataConfig) -> tuple[tuple[str, ...], list[str]]:
    """What cannot be read, each with the reason, and a note that says how much of which class.

    Raises:
        UserError: there is something, and it is not to be skipped.
    """
    skipped = [fault for listing in listings.values() for fault in listing.faults]
    of_classes: Counter[str] = Counter()
    for split, part in decoded.items():
        listing = listings[split]
        bad = {row: why for row, why in part.bad.items() if listing.labels[row] >= 0}
        skipped += [f"{shown(listing.names[row])} ({why})" for row, why in bad.items()]
        of_classes.update(listing.classes[listing.labels[row]] for row in bad)
    if skipped and config.on_error == "stop":
        more = f" and {len(skipped) - 1} more" if len(skipped) > 1 else ""
        raise UserError(f"cannot read image {skipped[0]}{more}; replace or remove, or go on without: --data.on-error skip")
    words = some([f"{count} of {name}" for name, count in of_classes.most_common()])
    note = f"{len(skipped)} unreadable images left out" + (f" ({words})" if words else "")
    return tuple(skipped), [note] if skipped else []


def channel_statistics(images: ImageSet) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel over all pixels, on a scale of 0 to 1; exact, from counts of values.

    Raises:
        UserError: a channel has the same value everywhere, so that there is nothing to divide by.
    """
    channels = images.pixels.shape[1]
    counts = _counts(images.pixels, channels)
    values = np.arange(256) / 255
    share = counts / counts.sum(1, keepdims=True)
    mean = share @ values
    std = np.sqrt((share * (values - mean[:, None]) ** 2).sum(1))
    if not std.all():
        raise UserError(f"channel {int(np.argmin(std))} has one value in all training pixels: give --data.std")
    return tuple(mean.tolist()), tuple(std.tolist())


def _counts(pixels: np.ndarray | Pixels, channels: int) -> np.ndarray:
    """int64 (C, 256): how often each channel has each value; kept where pixels are decoded anew each time."""
    if isinstance(pixels, Pixels) and isinstance(pixels.store, EncodedImages):
        key = content_key(key=pixels.store.key, rows=hashlib.sha256(pixels.rows.tobytes()).hexdigest(), counts=1)
        path = cache_dir("images") / f"{key}.counts.npy"

        def read() -> np.ndarray:
            counts: np.ndarray = read_array(path)
            if counts.shape != (channels, 256) or counts.sum() != math.prod(pixels.shape):
                raise ValueError(counts.shape)
            return counts

        return kept(read, lambda: save_array(path, _counted(pixels, channels)))
    return _counted(pixels, channels)


def _counted(pixels: np.ndarray | Pixels, channels: int) -> np.ndarray:
    counts = np.zeros((channels, 256), dtype=np.int64)
    step = max(1, CHUNK_BYTES // math.prod(pixels.shape[1:]))
    for start in range(0, len(pixels), step):
        chunk = pixels[start : start + step]
        for channel in range(channels):
            counts[channel] += np.bincount(chunk[:, channel].ravel(), minlength=256)
    return counts


def list_images(config: DataConfig) -> Listings:
    """The listings to split, unread, with labels in terms of the training images' classes, matched by name.

    Raises:
        UserError: no such source, or one without training images.
    """
    validate(config, "data.")
    listings = list_source(config.source, config=config)
    train = listings.get("train")
    if train is None:
        raise UserError(f"'{config.source}' has no training images, only {', '.join(listings)}; name them train")
    if config.test_source:
        given = list_source(config.test_source, alone=True, config=config)
        test = next(given[split] for split in ("test", "train", "validation") if split in given)
        if test.identity == train.identity or set(test.files) & set(train.files):
            raise UserError(f"--data.test-source '{config.test_source}' is the training data; leave it empty to split it")
        listings = listings | {"test": test}
    listings = {split: _with_classes(listing, train.classes) for split, listing in listings.items()}
    return without_small(listings, config.min_per_class)


def _with_classes(listing: ImageListing, classes: tuple[str, ...]) -> ImageListing:
    """The listing with its labels in terms of ``classes``, matched by name, however its accents are encoded."""
    if listing.classes == classes:  # also where two classes have one name, as in ImageNet's short names
        return listing
    number_of = {unicodedata.normalize("NFC", name): number for number, name in enumerate(classes)}
    names = [unicodedata.normalize("NFC", name) for name in listing.classes]
    numbers = np.array([number_of.get(name, -1) for name in names], dtype=np.int64)
    labels = numbers[listing.labels]
    if (labels < 0).any():
        name = listing.classes[listing.labels[np.argmax(labels < 0)]]
        raise UserError(f"{listing.title} has class '{name}', which the training images lack ({some(classes)})")
    return replace(listing, labels=labels, classes=classes)


def _image_set(listing: ImageListing, decoded: Decoded, rows: np.ndarray) -> ImageSet:
    names = tuple(listing.names[row] for row in rows)
    return ImageSet(Pixels(decoded.pixels, rows), torch.from_numpy(listing.labels[rows]), listing.classes, names)


def _distinct(part: Decoded) -> np.ndarray:
    """uint64 (N,): hashes that are equal for equal images alone, not for those that cannot be read."""
    hashes = part.hashes.copy()
    hashes[list(part.bad)] = np.arange(len(part.bad), dtype=np.uint64)
    return hashes


def _twins(hashes: Mapping[str, np.ndarray]) -> Iterator[str]:
    """How many images lie in two splits."""
    for part, others, words in (
        ("test", ["train", "validation"], "test images equal a training or validation image"),
        ("validation", ["train"], "validation images equal a training image"),
    ):
        if count := int(np.isin(hashes[part], np.concatenate([hashes[other] for other in others])).sum()):
            yield f"{count} {words} pixel for pixel"


def _unused_bits(decoded: Mapping[str, Decoded], white: int) -> list[str]:
    """Whether images of more than 8 bits are nearly black for want of a white level."""
    largest = max(part.largest for part in decoded.values())
    if not 0 <= largest <= white // 2:
        return []
    level = max(255, (1 << largest.bit_length()) - 1)
    return [f"images of more than 8 bits hold {largest:,} at most, where {white:,} is white (--data.white-level {level})"]


def _describe(config: DataConfig, listings: Listings, sets: dict[str, ImageSet], notes: Sequence[str]) -> str:
    """One sentence for run logs, tables and model cards."""
    train = sets["train"]
    _, height, width = train.pixels.shape[1:]
    counts = ", ".join(f"{len(images):,} {split}" for split, images in sets.items())
    own = {"validation": "its own validation split", "test": "its own test split"}
    if config.test_source:
        own["test"] = f"test images from {Path(config.test_source).name or config.test_source}"
    parts = [
        own[split] if split in listings else f"{fraction:g} held out for {split} (stratified, seed {config.split_seed})"
        for split, fraction in (("test", config.test_fraction), ("validation", config.validation_fraction))
    ]
    limited = [split for split in sets if getattr(config, f"limit_{split}") is not None]
    parts += [f"{' and '.join(limited)} limited to a stratified subset"] if limited else []
    absent = len(train.classes) - len(torch.unique(train.labels))
    parts += [f"{absent} classes have no training image"] if absent else []
    parts += [note for listing in listings.values() for note in listing.notes]
    return (
        f"{listings['train'].title}: {counts} images of {len(train.classes)} classes, {width}x{height} "
        f"{config.channels}; {'; '.join([*parts, *notes])}"
    )
