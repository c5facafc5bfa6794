"""From files, bytes, pictures and arrays to uint8 pixels."""

import hashlib
import io
import os
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, TypeAlias, TypeVar

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from crossalign.config import DataConfig
from crossalign.core.errors import BadArgument, UserError
from crossalign.core.progress import progress
from crossalign.core.reading import read_bytes, user_path
from crossalign.data.sources import Raw

Channels: TypeAlias = Literal["rgb", "gray"]
Resize: TypeAlias = Literal["crop", "squash", "pad"]
T = TypeVar("T")
R = TypeVar("R")

MAX_PIXELS = 89_478_485  # Pillow's own bound: an RGB picture of a quarter of a gigabyte
MAX_BYTES = 1 << 30  # of an encoded one: so many pixels of three colours of 16 bits, and what a file says beside them
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
"""What is opened, by content: Pillow knows more, of which some start other programs (EPS) or hold no picture."""
WHITE = DataConfig.white_level
DRAFT = 2
"""How many times larger than asked for a JPEG stays that is read smaller, so that resizing hides the difference."""
THREADS = min(8, os.cpu_count() or 1)
BLOCK = 32  # images a thread decodes at a time: small ones cost less than handing them over one by one


class _BadImage(Exception):
    """Why one image cannot be used."""


@dataclass
class Depth:
    """How images of more than 8 bits become 8 bits, and what was seen of them."""

    white: int = WHITE
    """The value that becomes 255."""
    largest: int = -1
    """The largest value in any of them."""


def checked(raws: Iterator[T | str], make: Callable[[T], R], total: int, title: str) -> Iterator[R | str]:
    """What ``make`` makes of each image in order, or why it cannot; a str among ``raws`` says why one could not be read.

    They are read by this thread and decoded by several, with a bar over them.
    """

    def decoded(raw: T | str) -> R | str:
        try:
            return raw if isinstance(raw, str) else make(raw)
        except (_BadImage, UserError) as error:
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


def decode(
    raw: Raw,
    size: tuple[int, int] | None,
    channels: Channels,
    depth: Depth | None = None,
    resize: Resize = "crop",
    draft: bool = False,
) -> np.ndarray:
    """One image as uint8 (C, H, W): turned upright by EXIF, in 8 bits, on white where it is transparent.

    With ``size`` (width, height) it is resized (bilinear, antialiased): "crop" covers that and keeps the middle, "squash" gives
    up its proportions, "pad" puts the whole of it on black. With ``draft`` a large JPEG is read smaller, see :func:`picture`.
    """
    image = picture(raw, channels, depth, (DRAFT * size[0], DRAFT * size[1]) if draft and size else None)
    if size is not None and image.size != size:
        if resize == "squash":
            image = image.resize(size, Image.Resampling.BILINEAR)
        else:
            image = (ImageOps.fit if resize == "crop" else ImageOps.pad)(image, size, Image.Resampling.BILINEAR)
    array = np.asarray(image)
    return array[None] if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 0, 1))


def picture(raw: Raw, channels: Channels, depth: Depth | None = None, at_least: tuple[int, int] | None = None) -> Image.Image:
    """One image in its own size: turned upright by EXIF, in 8 bits, on white where it is transparent.

    Every picture of every verb is opened here. With ``at_least`` (width, height) a JPEG is read at a half, a quarter or an
    eighth of its size, as long as it is no smaller than that: several times as fast.
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
    if at_least is not None and image.format == "JPEG":
        image.draft(None, at_least)
    is_deep = any(";16" in str(part[3]) for part in getattr(image, "tile", ()))  # known until it is loaded
    ImageOps.exif_transpose(image, in_place=True)
    return _to_mode(image, "L" if channels == "gray" else "RGB", depth or Depth(), is_deep)


def header_size(raw: Raw) -> tuple[int, int] | None:
    """Width and height of an image, upright, from its first bytes alone; None where they do not tell."""
    if raw is None or isinstance(raw, np.ndarray):
        return None if raw is None else (raw.shape[1], raw.shape[0])
    try:
        with Image.open(io.BytesIO(raw) if isinstance(raw, bytes) else raw, formats=FORMATS) as image:  # type: ignore[arg-type]
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) > 4
            return (image.height, image.width) if turned else image.size
    except Exception:  # a damaged file can raise anything inside an image library; the decoding will say what it is
        return raw.size if isinstance(raw, Image.Image) else None


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


def to_pixels(images: Any, shape: tuple[int, ...], white: int = WHITE, resize: Resize = "crop") -> np.ndarray:
    """Any images as a uint8 batch (B, C, H, W) of ``shape`` (C, H, W), as training would have seen them.

    Args:
        images: one image or many: paths, encoded bytes, PIL images, arrays or tensors (H, W), (H, W, C) or (C, H, W), or a
            batch (B, C, H, W); arrays hold uint8, or floats from 0 to 1, which are rounded to uint8.
        shape: what comes out; C is 3 (RGB) or 1 (gray). An image of another size is resized.
        white: the value that becomes 255 in images of more than 8 bits. resize: how, see :func:`decode`.

    Raises:
        UserError: an image that cannot be read, named by its path or place. BadArgument: no images, or an array of another
            shape or other values.
    """
    import torch  # not at the top: processes that only decode do without it

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
            rows.append(decode(raw, (width, height), "gray" if channels == 1 else "rgb", Depth(white), resize))
        except Exception as error:  # a damaged file can raise anything inside an image library
            raise UserError(f"cannot read {name} as an image ({error})") from error
    if not rows:
        raise BadArgument("no images given: pass at least one path, picture or array")
    return np.stack(rows)


def _to_array(images: Any, name: str) -> np.ndarray:
    if hasattr(images, "detach"):  # a tensor; numpy has no bfloat16
        images = images.detach().cpu()
        images = images.float() if images.is_floating_point() and images.element_size() < 4 else images
    array = np.asarray(images)
    if array.dtype.kind == "f" and array.size and array.min() >= 0 and array.max() <= 1:
        array = np.rint(array * 255).astype(np.uint8)
    if array.dtype != np.uint8:
        raise BadArgument(f"{name} holds {array.dtype} values; give whole numbers 0 to 255 as uint8, or floats from 0 to 1")
    return array
