"""Every kind of picture becomes the 8-bit pixels that a viewer would show; broken ones are named."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import encoded
from PIL import Image

from crossalign.core.errors import UserError
from crossalign.data.images import decode as decoding
from crossalign.data.images.decode import decode, to_pixels

GRADIENT = np.arange(256, dtype=np.uint8).reshape(16, 16)


def test_plain_pictures_come_out_as_they_are() -> None:
    colour = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    pixels = decode(encoded(Image.fromarray(colour)), None, "rgb")
    assert pixels.dtype == np.uint8 and pixels.shape == (3, 9, 7) and pixels.flags.c_contiguous
    assert np.array_equal(pixels, colour.transpose(2, 0, 1))
    assert np.array_equal(decode(encoded(Image.fromarray(GRADIENT)), None, "gray")[0], GRADIENT)
    assert np.array_equal(decode(GRADIENT, None, "rgb"), np.stack([GRADIENT] * 3))
    luma = decode(colour, None, "gray")[0].astype(float)
    assert np.abs(luma - colour @ [0.299, 0.587, 0.114]).max() <= 1


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    deep = Image.fromarray(GRADIENT.astype(np.uint16) * 257)
    for channels in ("gray", "rgb"):
        assert np.array_equal(decode(encoded(deep), None, channels)[0], GRADIENT)  # type: ignore[arg-type]
    assert np.array_equal(decode(encoded(deep, "TIFF"), None, "gray")[0], GRADIENT)


def test_palette_bilevel_and_cmyk() -> None:
    colour = Image.new("RGB", (8, 8), (255, 0, 0))
    assert (decode(encoded(colour.convert("P")), None, "rgb")[:, 0, 0] == [255, 0, 0]).all()
    assert (decode(encoded(colour, "GIF"), None, "rgb")[:, 0, 0] == [255, 0, 0]).all()
    assert (decode(encoded(Image.new("1", (8, 8), 1)), None, "rgb") == 255).all()
    cmyk = encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100)
    red = decode(cmyk, None, "rgb")[:, 4, 4].astype(int)
    assert red[0] > 200 and red[1] < 60 and red[2] < 60


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white(mode: str) -> None:
    """Not what lies hidden under it."""
    image = Image.new("RGBA", (8, 8), (10, 10, 10, 0))
    image.paste((10, 10, 10, 255), (0, 0, 4, 8))
    if mode == "P":
        image = image.quantize(4)
    pixels = decode(encoded(image if mode == "P" else image.convert(mode)), None, "rgb")
    assert (pixels[:, :, :4] == 10).all() and (pixels[:, :, 4:] == 255).all()


@pytest.mark.parametrize("orientation,corner", [(1, (0, 0)), (3, (-1, -1)), (6, (0, -1)), (8, (-1, 0))])
def test_exif_orientation_is_honoured(orientation: int, corner: tuple[int, int]) -> None:
    values = np.zeros((6, 4), dtype=np.uint8)
    values[0, 0] = 255
    image, exif = Image.fromarray(values), Image.Exif()
    exif[0x0112] = orientation
    pixels = decode(encoded(image, exif=exif), None, "gray")[0]
    assert pixels.shape == ((6, 4) if orientation in (1, 3) else (4, 6))
    assert pixels[corner] == 255 and (pixels > 0).sum() == 1


def test_resizing_keeps_the_middle_square_and_antialiases() -> None:
    wide = np.random.default_rng(0).integers(0, 256, (40, 120), dtype=np.uint8)
    whole = np.asarray(Image.fromarray(wide).resize((30, 10), Image.Resampling.BILINEAR))
    assert np.abs(decode(wide, (10, 10), "gray")[0].astype(int) - whole[:, 10:20]).max() <= 1
    upright = decode(np.ascontiguousarray(wide.T), (10, 10), "gray")[0]
    assert np.abs(upright.astype(int) - whole[:, 10:20].T).max() <= 1
    stripes = np.tile(np.array([0, 255], dtype=np.uint8), (64, 32))
    assert np.abs(decode(stripes, (8, 8), "gray").astype(int) - 127).max() <= 5
    assert decode(GRADIENT, (32, 32), "rgb").shape == (3, 32, 32)


def broken() -> dict[str, bytes]:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    jpeg, lossless = encoded(noise, "JPEG"), encoded(noise)
    return {
        "empty": b"",
        "text": b"not an image at all",
        "half a JPEG": jpeg[: len(jpeg) // 2],
        "JPEG without its end": jpeg[:-200],
        "half a PNG": lossless[: len(lossless) // 2],
        "a PNG with a wrong byte": lossless[:3000] + bytes([lossless[3000] ^ 255]) + lossless[3001:],
        "floating point": encoded(Image.fromarray(GRADIENT.astype(np.float32)), "TIFF"),
    }


@pytest.mark.parametrize("name", broken())
def test_broken_pictures_are_noticed(name: str) -> None:
    with pytest.raises(Exception, match=r"\w"):
        decode(broken()[name], None, "rgb")


def test_a_decompression_bomb_is_refused_before_it_opens(monkeypatch: pytest.MonkeyPatch) -> None:
    small = encoded(Image.new("1", (8, 8)))
    header = b"IHDR" + struct.pack(">II", 20_000, 20_000) + small[24:29]
    huge = small[:12] + header + struct.pack(">I", zlib.crc32(header)) + small[33:]
    with pytest.raises(UserError, match=r"cannot read image 0 as an image .*(bomb|20000x20000)"):
        to_pixels([huge], (3, 8, 8))
    monkeypatch.setattr(decoding, "MAX_PIXELS", 1000)
    with pytest.raises(UserError, match="64x64 pixels, more than the 1,000 allowed"):
        to_pixels([encoded(Image.new("L", (64, 64)))], (1, 8, 8))


def test_to_pixels_takes_what_users_have(tmp_path: Path) -> None:
    colour = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    file = tmp_path / "a.png"
    Image.fromarray(colour).save(file)
    expected = colour.transpose(2, 0, 1)[None]
    given = [file, str(file), file.read_bytes(), Image.fromarray(colour), colour, expected[0], torch.from_numpy(colour)]
    for item in given:
        assert np.array_equal(to_pixels(item, (3, 8, 8)), expected), type(item)
    assert np.array_equal(to_pixels(given, (3, 8, 8)), np.concatenate([expected] * len(given)))
    assert np.array_equal(to_pixels(torch.from_numpy(expected), (3, 8, 8)), expected)
    assert to_pixels([colour, GRADIENT, GRADIENT[None]], (1, 16, 12)).shape == (3, 1, 16, 12)
    assert np.array_equal(to_pixels(GRADIENT, (3, 16, 16))[0, 2], GRADIENT)


def test_to_pixels_names_what_it_cannot_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read .*nowhere\.png"):
        to_pixels(tmp_path / "nowhere.png", (3, 8, 8))
    with pytest.raises(UserError, match="image 1 holds float32 values"):
        to_pixels([GRADIENT, GRADIENT.astype(np.float32)], (3, 8, 8))
    with pytest.raises(UserError, match="no images given"):
        to_pixels([], (3, 8, 8))
