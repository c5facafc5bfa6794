"""From files, bytes, pictures and arrays to uint8 pixels, once: the result is kept in the cache and memory-mapped."""

import errno
import hashlib
import io
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeAlias, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from crossalign.config import DataConfig
from crossalign.core.errors import BadArgument, UserError
from crossalign.core.files import atomic_path, cache_dir, content_key, kept, write_json
from crossalign.core.progress import progress
from crossalign.core.reading import read_bytes, read_json, user_path
from crossalign.data.sources import ImageListing, Raw

Channels: TypeAlias = Literal["rgb", "gray"]
T = TypeVar("T")
R = TypeVar("R")

VERSION = 1  # of what this file writes to the cache; count up when pixels would come out otherwise
MAX_PIXELS = 89_478_485  # Pillow's own bound: an RGB picture of a quarter of a gigabyte
MAX_BYTES = 1 << 30  # of an encoded one: so many pixels of three colours of 16 bits, and what a file says beside them
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
"""What is opened, by content: Pillow knows more, of which some start other programs (EPS) or hold no picture."""
WHITE = DataConfig.white_level
THREADS = min(8, os.cpu_count() or 1)
BLOCK = 32  # images a thread decodes at a time: small ones cost less than handing them over one by one


@dataclass(frozen=True)
class Decoded:
    """The images of one listing, as far as they could be read."""

    pixels: np.ndarray
    """uint8 (N, C, H, W), a read-only memory map; rows of unreadable images are zero."""
    hashes: np.ndarray
    """uint64 (N,): a hash of each image's pixels."""
    bad: dict[int, str]
    """Row of each unreadable image → why."""
    largest: int = -1
    """The largest value in images of more than 8 bits; -1 where there are none, or where 0.1.0 wrote the cache."""


class _BadImage(Exception):
    """Why one image cannot be used."""


@dataclass
class Depth:
    """How images of more than 8 bits become 8 bits, and what was seen of them."""

    white: int = WHITE
    """The value that becomes 255."""
    largest: int = -1
    """The largest value in any of them."""


def decode_listing(listing: ImageListing, image_size: int | None, channels: Channels, white: int = WHITE) -> Decoded:
    """Decode and check every image of ``listing``, or find them in the cache.

    The cache knows a listing by its files (path, size, time of change), the size, channels and white level asked for.
    Unreadable images are noted there too, so that the check is made once.

    Raises:
        UserError: images differ in size while ``image_size`` is None; no image can be read; the cache's disk is full.
    """
    level = {} if white == WHITE else {"white": white}
    key = content_key(identity=listing.identity, image_size=image_size, channels=channels, version=VERSION, **level)
    pixels_file = cache_dir("images") / f"{key}.npy"
    size = None if image_size is None else (image_size, image_size)
    depth = Depth(white)

    def write() -> list[int | str]:
        with atomic_path(pixels_file) as temporary, temporary.open("wb") as file:
            return _write_pixels(file, listing, lambda raw: decode(raw, size, channels, depth))

    def check(hashes: np.ndarray) -> None:
        pixels = np.load(pixels_file, mmap_mode="r")
        if pixels.ndim != 4 or len(pixels) != len(hashes):
            raise ValueError(pixels.shape)
        for row in {0, len(hashes) // 2, len(hashes) - 1}:
            if hashes[row] and hash_of(pixels[row].tobytes()) != int(hashes[row]):
                raise ValueError(row)

    rows = range(len(listing.labels))
    hashes, bad, facts = cached_hashes("images", key, rows, write, check, lambda: {"largest": depth.largest})
    return Decoded(np.load(pixels_file, mmap_mode="r"), hashes, bad, int(facts.get("largest", -1)))


def cached_hashes(
    kind: str,
    key: str,
    rows: Sequence[int] | np.ndarray,
    compute: Callable[[], list[int | str]],
    check: Callable[[np.ndarray], object] = len,
    facts: Callable[[], dict[str, Any]] = dict,
) -> tuple[np.ndarray, dict[int, str], dict[str, Any]]:
    """Hashes of images, computed once and kept in the cache.

    Args:
        kind: folder of the cache.
        key: what the entry is called.
        rows: the places of the images in their listing.
        compute: gives the hash of each, or why it cannot be read.
        check: looks at what else it writes; raises ValueError or OSError where that is not whole.
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
        hashes: np.ndarray = np.load(hashes_file)
        if hashes.shape != (len(rows),) or hashes.dtype != np.uint64:
            raise ValueError(hashes.shape)
        check(hashes)
        return hashes, {int(row): str(why) for row, why in bad.items()}, notes

    def make() -> None:
        done_file.unlink(missing_ok=True)
        try:
            results = compute()
            hashes = [0 if isinstance(result, str) else result for result in results]
            save_array(hashes_file, np.array(hashes, dtype=np.uint64))
            bad = {int(row): why for row, why in zip(rows, results, strict=True) if isinstance(why, str)}
            write_json(done_file, {"bad": bad} | facts())  # last: it says that the others are whole
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise UserError(f"no room left for images in {folder}: free some space or set CROSSALIGN_CACHE") from error

    return kept(read, make)


def checked(raws: Iterator[T | str], make: Callable[[T], R], total: int, title: str) -> Iterator[R | str]:
    """What ``make`` makes of each image in order, or why it cannot; a str among ``raws`` says why one could not be read.

    They are read by this thread and decoded by several, with a bar over them.
    """

    def decoded(raw: T | str) -> R | str:
        try:
            return raw if isinstance(raw, str) else make(raw)
        except _BadImage as error:
            return str(error)
        except Exception as error:  # a damaged file can raise anything inside an image library
            return f"{type(error).__name__}: {error}"

    with (
        warnings.catch_warnings(action="ignore"),  # Pillow warns about big images; they are refused by name instead
        ThreadPoolExecutor(THREADS) as pool,
        progress(total, f"checking {title}", unit="image", leave=False) as bar,
    ):
        while blocks := [block for _ in range(2 * THREADS) if (block := list(islice(raws, BLOCK)))]:
            for results in pool.map(lambda block: [decoded(raw) for raw in block], blocks):
                yield from results
                bar.update(len(results))


def hash_of(data: bytes) -> int:
    """A hash of an image below 2^64."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def save_array(path: Path, values: np.ndarray) -> None:
    """Write a .npy file, whole or not at all."""
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.save(file, values)


def _write_pixels(file: BinaryIO, listing: ImageListing, make: Callable[[Raw], np.ndarray]) -> list[int | str]:
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
            write_npy_header(file, (count, *shape))
            file.write(bytes(row * math.prod(shape)))
        elif result.shape != shape:
            raise sizes_differ(first, shape, listing.names[row], result.shape)
        data = result.tobytes()
        file.write(data)
        results.append(hash_of(data))
    if not shape:
        raise UserError(f"none of the {count} images of {listing.title} can be read; {listing.names[0]}: {results[0]}")
    return results


def write_npy_header(file: BinaryIO, shape: tuple[int, ...]) -> None:
    """Begin a .npy file of uint8 whose values are written after it, piece by piece."""
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})


def sizes_differ(name: str, shape: tuple[int, ...], other: str, other_shape: tuple[int, ...]) -> UserError:
    """The error for images (C, H, W) of two sizes where no size is asked for."""
    return UserError(
        f"images differ in size: {name} is {shape[2]}x{shape[1]} and {other} is {other_shape[2]}x{other_shape[1]} "
        "(width x height); give one size, for example --data.image-size 32"
    )


def decode(raw: Raw, size: tuple[int, int] | None, channels: Channels, depth: Depth | None = None) -> np.ndarray:
    """One image as uint8 (C, H, W): turned upright by EXIF, in 8 bits, on white where it is transparent.

    With ``size`` (width, height) it is resized to cover that (bilinear, antialiased) and the middle is kept.
    """
    image = picture(raw, channels, depth)
    if size is not None and image.size != size:
        image = ImageOps.fit(image, size, Image.Resampling.BILINEAR)
    array = np.asarray(image)
    return array[None] if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 0, 1))


def picture(raw: Raw, channels: Channels, depth: Depth | None = None) -> Image.Image:
    """One image in its own size: turned upright by EXIF, in 8 bits, on white where it is transparent.

    Every picture of every verb is opened here.
    """
    if raw is None:
        raise _BadImage("no image data")
    if isinstance(raw, np.ndarray):
        image: Image.Image = Image.fromarray(raw)
    elif isinstance(raw, Image.Image):
        image = raw.copy()
    else:
        try:
            image = Image.open(io.BytesIO(raw if isinstance(raw, bytes) else read_bytes(raw, MAX_BYTES)), formats=FORMATS)
        except UnidentifiedImageError as error:  # its own text names a buffer in memory
            raise _BadImage(f"empty, damaged or of an unknown image format; {', '.join(FORMATS)} are read") from error
    if image.width * image.height > MAX_PIXELS:
        raise _BadImage(f"{image.width}x{image.height} pixels, more than the {MAX_PIXELS:,} allowed")
    is_deep = any(";16" in str(part[3]) for part in getattr(image, "tile", ()))  # known until it is loaded
    ImageOps.exif_transpose(image, in_place=True)
    return _to_mode(image, "L" if channels == "gray" else "RGB", depth or Depth(), is_deep)


def _to_mode(image: Image.Image, mode: str, depth: Depth, is_deep: bool) -> Image.Image:
    """Pillow's own conversion clips 16-bit values and shows what transparency hides: both are put right here."""
    image.load()
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > depth.white:
            raise _BadImage(
                f"grey values from {values.min():,} to {values.max():,}, where {depth.white:,} is white: give "
                "--data.white-level, or convert it to 8 bits"
            )
        depth.largest = max(depth.largest, int(values.max()))
        image = Image.fromarray(((values * 255 + depth.white // 2) // depth.white).astype(np.uint8))
    elif image.mode == "F":
        raise _BadImage("floating-point grey values; convert it to 8 bits")
    elif is_deep:  # Pillow keeps the upper 8 bits of colours
        if depth.white != WHITE:
            raise _BadImage(f"colours of 16 bits, which are read with {WHITE:,} as white: convert it to 8 bits")
        depth.largest = max(depth.largest, int(np.asarray(image).max()) * 257)
    if image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == mode else image.convert(mode)


def to_pixels(images: Any, shape: tuple[int, ...], white: int = WHITE) -> np.ndarray:
    """Any images as a uint8 batch (B, C, H, W) of ``shape`` (C, H, W), as training would have seen them.

    Args:
        images: one image or many: paths, encoded bytes, PIL images, arrays or tensors (H, W), (H, W, C) or (C, H, W), or a
            batch (B, C, H, W); arrays hold uint8, or floats from 0 to 1, which are rounded to uint8.
        shape: what comes out; C is 3 (RGB) or 1 (gray). An image of another size is cut to the middle and resized.
        white: the value that becomes 255 in images of more than 8 bits.

    Raises:
        UserError: an image that cannot be read, named by its path or place. BadArgument: no images, or an array of another
            shape or other values.
    """
    channels, height, width = shape
    is_any = isinstance(images, os.PathLike | Image.Image) or hasattr(images, "__iter__")
    if not is_any or getattr(images, "ndim", 2) not in (2, 3, 4):
        given = f"shape {tuple(images.shape)}" if hasattr(images, "shape") else f"a {type(images).__name__}"
        raise BadArgument(f"images must be paths, pictures or arrays (H, W), (H, W, C), (C, H, W) or (B, C, H, W); got {given}")
    if isinstance(images, torch.Tensor | np.ndarray) and images.ndim == 4 and tuple(images.shape[1:]) == tuple(shape):
        return _to_array(images, "images")
    single = isinstance(images, str | bytes | os.PathLike | Image.Image) or getattr(images, "ndim", 0) in (2, 3)
    rows = []
    for number, item in enumerate([images] if single else images):
        name = str(item) if isinstance(item, str | os.PathLike) else f"image {number}"
        raw: Raw = user_path(item) if isinstance(item, str | os.PathLike) else item
        if isinstance(raw, torch.Tensor | np.ndarray):
            raw = _to_array(raw, name)
            if raw.ndim == 3 and raw.shape[-1] not in (1, 3, 4):
                raw = np.moveaxis(raw, 0, -1)
            raw = np.ascontiguousarray(raw[..., 0] if raw.ndim == 3 and raw.shape[-1] == 1 else raw)
        try:
            rows.append(decode(raw, (width, height), "gray" if channels == 1 else "rgb", Depth(white)))
        except Exception as error:  # a damaged file can raise anything inside an image library
            raise UserError(f"cannot read {name} as an image ({error})") from error
    if not rows:
        raise BadArgument("no images given: pass at least one path, picture or array")
    return np.stack(rows)


def _to_array(images: Any, name: str) -> np.ndarray:
    array = images.cpu().numpy() if isinstance(images, torch.Tensor) else np.asarray(images)
    if array.dtype.kind == "f" and array.size and array.min() >= 0 and array.max() <= 1:
        array = np.rint(array * 255).astype(np.uint8)
    if array.dtype != np.uint8:
        raise BadArgument(f"{name} holds {array.dtype} values; give whole numbers 0 to 255 as uint8, or floats from 0 to 1")
    return array
