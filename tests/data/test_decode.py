"""Every kind of picture becomes the 8-bit pixels that a viewer would show; broken ones are named."""

from __future__ import annotations

import contextlib
import struct
import subprocess
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import encoded, open_source
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


@pytest.mark.parametrize("kind,values,white", [("PNG", np.uint16, 4095), ("TIFF", np.uint16, 1023), ("TIFF", np.int32, 255)])
def test_values_of_fewer_bits_than_their_file_are_told_and_read_by_a_white_level(
    tmp_path: Path, kind: str, values: type, white: int
) -> None:
    for i in range(40):
        levels = np.random.default_rng(i).integers(0, white + 1, (8, 8)).astype(values)
        levels[0, :2] = 0, white
        (tmp_path / "ab"[i % 2]).mkdir(exist_ok=True)
        (tmp_path / "ab"[i % 2] / f"{i}.{kind.lower()}").write_bytes(encoded(Image.fromarray(levels), kind))
    dark = open_source(tmp_path)
    assert f"hold {white:,} at most, where 65,535 is white (--data.white-level {white})" in dark.source
    for _ in range(2):  # the second time from the cache
        right = open_source(tmp_path, white_level=white)
        assert right.train.pixels[0, 0, 0, :2].tolist() == [0, 255] and "at most" not in right.source
    assert dark.train.pixels[:].max() <= 16
    file = next((tmp_path / "a").iterdir())
    assert to_pixels(file, (1, 8, 8), white)[0, 0, 0, 1] == 255
    with pytest.raises(UserError, match=rf"to {white:,}, where 100 is white: give --data.white-level"):
        open_source(tmp_path, white_level=100)


def test_colours_of_sixteen_bits_are_told_when_nearly_black() -> None:
    rows = np.full((8, 8, 3), 4095, dtype=">u2").tobytes()
    data = b"".join(b"\0" + rows[i : i + 48] for i in range(0, len(rows), 48))
    picture = chunks(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0), b"IDAT", zlib.compress(data), b"IEND", b"")
    depth = decoding.Depth()
    assert (decode(picture, None, "rgb", depth) == 15).all() and depth.largest == 15 * 257
    with pytest.raises(Exception, match="colours of 16 bits"):
        decode(picture, None, "rgb", decoding.Depth(4095))


def chunks(*parts: bytes) -> bytes:
    """A PNG of chunks, each a name and its data."""
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in pairs
    )


READ = {"PNG": "RGB", "JPEG": "RGB", "BMP": "RGB", "GIF": "P", "WEBP": "RGB", "TIFF": "RGB", "PPM": "RGB", "MPO": "RGB"}


@pytest.mark.parametrize("kind", READ)
def test_named_formats_are_read_by_content_whatever_the_name(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(encoded(Image.new(READ[kind], (8, 8)), kind))
    assert to_pixels(file, (3, 8, 8)).shape == (1, 3, 8, 8)


@pytest.mark.parametrize("kind", ["EPS", "PDF", "ICO", "TGA", "PCX", "DDS", "ICNS", "SGI", "IM", "MSP"])
def test_no_other_format_is_opened(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """EPS starts Ghostscript, others start other programs."""
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("another program is started"))
    file = tmp_path / "evil.png"
    file.write_bytes(encoded(Image.new("1" if kind == "MSP" else "RGB", (32, 32)), kind))
    for raw in (file, file.read_bytes()):
        with pytest.raises(UserError, match="unknown image format; PNG, JPEG, BMP, GIF, WEBP, TIFF, PPM are read"):
            to_pixels([raw], (3, 8, 8))


def test_texts_in_a_picture_cannot_fill_the_memory() -> None:
    bomb = zlib.compress(bytes(1 << 27))  # 128 MB of one letter
    head = struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0)
    for name, start in ((b"zTXt", b"k\0\0"), (b"iTXt", b"k\0\1\0\0\0"), (b"iCCP", b"k\0\0")):
        picture = chunks(b"IHDR", head, name, start + bomb, b"IDAT", zlib.compress(b"\0\0"), b"IEND", b"")
        tracemalloc.start()
        with contextlib.suppress(UserError):
            to_pixels([picture], (1, 1, 1))
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert most < 32 << 20, name


def test_a_file_that_is_no_picture_is_not_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "MAX_BYTES", 1 << 20)
    with (tmp_path / "a.png").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(UserError, match=r"a\.png.* is larger than 1 MB"):
        to_pixels(tmp_path / "a.png", (3, 8, 8))


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
