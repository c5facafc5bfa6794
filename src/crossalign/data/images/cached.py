"""Decoded images in the cache: made once, checked, and memory-mapped."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from crossalign.core.errors import UserError
from crossalign.core.files import atomic_path, cache_dir, content_key, free_bytes, kept, naming_full_disk, write_json
from crossalign.core.reading import read_array, read_json
from crossalign.data.images.decode import WHITE, Channels, Depth, Resize, checked, decode, hash_of, header_size
from crossalign.data.images.pixels import Store
from crossalign.data.sources import ImageListing, Raw

VERSION = 1  # of the pixels in the cache; count up when they would come out otherwise


@dataclass(frozen=True)
class Decoded:
    """The images of one listing, as far as they could be read."""

    pixels: Store
    """uint8 (N, C, H, W), a read-only memory map, or what decodes rows of it; those of unreadable images are not to be used."""
    hashes: np.ndarray
    """uint64 (N,): a hash of each image's pixels."""
    bad: dict[int, str]
    """Row of each unreadable image → why."""
    largest: int = -1
    """The largest value in images of more than 8 bits; -1 where there are none, or where 0.1.0 wrote the cache."""


def decode_listing(
    listing: ImageListing, image_size: int | None, channels: Channels, white: int = WHITE, resize: Resize = "crop"
) -> Decoded:
    """Decode and check every image of ``listing``, or find them in the cache.

    The cache knows a listing by its files (path, size, time of change), and the size, channels, white level and way to resize
    that are asked for. Unreadable images are noted there too, so that the check is made once.

    Raises:
        UserError: images differ in size while ``image_size`` is None; no image can be read; the cache's disk is full.
    """
    key = key_of(listing, image_size, channels, white, resize)
    pixels_file = cache_dir("images") / f"{key}.npy"
    size = None if image_size is None else (image_size, image_size)
    depth = Depth(white)

    def write() -> list[int | str]:
        with atomic_path(pixels_file) as temporary, temporary.open("wb") as file:
            return write_pixels(file, listing, lambda raw: decode(raw, size, channels, depth, resize))

    def check(hashes: np.ndarray, noted: dict[str, Any]) -> None:
        if not isinstance(noted.get("largest", -1), int):
            raise ValueError(noted)
        pixels = read_array(pixels_file, mapped=True)
        if pixels.ndim != 4 or len(pixels) != len(hashes):
            raise ValueError(pixels.shape)
        for row in {0, len(hashes) // 2, len(hashes) - 1}:
            if hashes[row] and hash_of(pixels[row].tobytes()) != int(hashes[row]):
                raise ValueError(row)

    rows, notes = range(len(listing.labels)), {"title": listing.title}
    hashes, bad, facts = cached_hashes("images", key, rows, write, check, lambda: notes | {"largest": depth.largest})
    return Decoded(read_array(pixels_file, mapped=True), hashes, bad, facts.get("largest", -1))


def decoded_bytes(listing: ImageListing, image_size: int | None, channels: Channels) -> int:
    """What the pixels of a listing take; without a size, as the first image says whose header tells."""
    planes = 3 if channels == "rgb" else 1
    if image_size is not None:
        return len(listing.labels) * planes * image_size**2
    for raw in listing.records():
        if size := header_size(raw):
            return len(listing.labels) * planes * size[0] * size[1]
    return 0


def check_room(needed: int, words: str) -> None:
    """Fail before long work whose result would not fit on the cache's disk.

    Raises:
        UserError: names what is needed, what is free, and what moves the cache.
    """
    folder = cache_dir("images")
    free = free_bytes(folder)
    if needed > free:
        raise UserError(
            f"{words} need {needed / 1e9:.2f} GB in {folder}, where {free / 1e9:.2f} GB are free: free some space (crossalign "
            "cache), set CROSSALIGN_CACHE to a folder on another disk, or take a smaller --data.image-size"
        )


def key_of(
    listing: ImageListing, image_size: int | None, channels: Channels, white: int, resize: Resize, **more: object
) -> str:
    """What the entry of a listing is called; settings as they always were are left out, so that older entries stay."""
    if white != WHITE:
        more["white"] = white
    if resize != "crop":
        more["resize"] = resize
    return content_key(identity=listing.identity, image_size=image_size, channels=channels, version=VERSION, **more)


def full_cache(folder: Path) -> UserError:
    """What to say when the cache's disk is full."""
    return UserError(f"no room left for images in {folder}: free some space or set CROSSALIGN_CACHE")


def cached_hashes(
    kind: str,
    key: str,
    rows: Sequence[int] | np.ndarray,
    compute: Callable[[], list[int | str]],
    check: Callable[[np.ndarray, dict[str, Any]], object] = lambda hashes, notes: None,
    facts: Callable[[], dict[str, Any]] = dict,
) -> tuple[np.ndarray, dict[int, str], dict[str, Any]]:
    """Hashes of images, computed once and kept in the cache.

    Args:
        kind: folder of the cache.
        key: what the entry is called.
        rows: the places of the images in their listing.
        compute: gives the hash of each, or why it cannot be read.
        check: looks at what else it writes and notes; raises where that is not whole.
        facts: gives what else to note once all is computed.

    Returns:
        Hashes, uint64 (N,), 0 for an image that cannot be read; by row why it cannot; and all that was noted.

    Raises:
        UserError: the cache's disk is full.
    """
    folder = cache_dir(kind)
    hashes_file, done_file = folder / f"{key}.hashes.npy", folder / f"{key}.json"

    def read() -> tuple[np.ndarray, dict[int, str], dict[str, Any]]:
        notes = read_json(done_file)
        bad = notes.get("bad", notes)  # 0.1.0 wrote it bare for pairs
        hashes: np.ndarray = read_array(hashes_file)
        if hashes.shape != (len(rows),) or hashes.dtype != np.uint64:
            raise ValueError(hashes.shape)
        bad = {int(row): str(why) for row, why in bad.items()}
        if bad.keys() != set(np.asarray(rows)[hashes == 0].tolist()):
            raise ValueError(f"{done_file} does not fit {hashes_file}")
        check(hashes, notes)
        return hashes, bad, notes

    def make() -> None:
        done_file.unlink(missing_ok=True)
        with naming_full_disk(full_cache(folder)):
            results = compute()
            hashes = [0 if isinstance(result, str) else result for result in results]
            save_array(hashes_file, np.array(hashes, dtype=np.uint64))
            bad = {int(row): why for row, why in zip(rows, results, strict=True) if isinstance(why, str)}
            write_json(done_file, {"bad": bad} | facts())  # last: it says that the others are whole

    return kept(read, make)


def save_array(path: Path, values: np.ndarray) -> None:
    """Write a .npy file, whole or not at all."""
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.save(file, values)


def write_pixels(file: BinaryIO, listing: ImageListing, make: Callable[[Raw], np.ndarray]) -> list[int | str]:
    """Write the images one after the other as one .npy array, whose shape the first readable one tells; those that cannot be
    read are zero. Return a hash of each, or why it cannot be read."""
    count = len(listing.labels)
    results: list[int | str] = []
    shape: tuple[int, ...] = ()
    for row, result in enumerate(checked(listing.records(), make, count, listing.title)):
        if isinstance(result, str):
            file.write(bytes(math.prod(shape) if shape else 0))
            results.append(result)
            continue
        if not shape:
            shape, first = result.shape, listing.names[row]
            np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (count, *shape)})
            file.write(bytes(row * math.prod(shape)))
        elif result.shape != shape:
            raise sizes_differ(first, shape, listing.names[row], result.shape)
        data = result.tobytes()
        file.write(data)
        results.append(hash_of(data))
    if not shape:
        raise UserError(f"none of the {count} images of {listing.title} can be read; {listing.names[0]}: {results[0]}")
    return results


def sizes_differ(name: str, shape: tuple[int, ...], other: str, other_shape: tuple[int, ...]) -> UserError:
    """The error for images (C, H, W) of two sizes where no size is asked for."""
    return UserError(
        f"images differ in size: {name} is {shape[2]}x{shape[1]} and {other} is {other_shape[2]}x{other_shape[1]} "
        "(width x height); give one size, for example --data.image-size 32"
    )
