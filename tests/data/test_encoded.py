"""Images kept as their files: the same as decoded ones, in no more room than the files take, decoded by processes that end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pictures import THREE, check_rows, encoded, open_source, sizes
from PIL import Image

from crossalign.core.errors import UserError
from crossalign.data.images import encoded as encoding
from crossalign.data.images import load as opening
from crossalign.data.images.decode import decode
from crossalign.data.images.load import ImageSplits, channel_statistics


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own."""
    monkeypatch.setenv("CROSSALIGN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "images"


def photographs(folder: Path, side: int, count: int = 16) -> Path:
    """JPEGs with structures of all sizes."""
    for number in range(count):
        rng = np.random.default_rng(number)
        small = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8))
        file = folder / "ab"[number % 2] / f"{number}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded(small.resize((side + 40, side), Image.Resampling.BICUBIC), "JPEG", quality=90))
    return folder


def same(one: ImageSplits, other: ImageSplits) -> bool:
    """Whether the pixels are the same, and so the fingerprints; they never disagree."""
    sets = ((getattr(one, split).pixels, getattr(other, split).pixels) for split in ("train", "validation", "test"))
    equal = all(np.array_equal(x, y) for x, y in sets)
    assert equal == (one.fingerprint == other.fingerprint)
    return equal


@pytest.mark.parametrize("resize", ["crop", "squash", "pad"])
@pytest.mark.parametrize("size", [None, 8, 32])
def test_pixels_are_those_of_decoded_images(
    tmp_path: Path, write_folder: Callable[..., Path], size: int | None, resize: str
) -> None:
    folder = write_folder(tmp_path / "zoo", THREE, (14, 10))
    kept = open_source(folder, cache="encoded", image_size=size, resize=resize)
    assert same(kept, open_source(folder, cache="decoded", image_size=size, resize=resize))
    look = (None if size is None else (size, size), "rgb", None, resize)
    check_rows(kept.train, lambda n: (decode(folder / n, *look), n.split("/")[0]))  # type: ignore[arg-type]
    assert channel_statistics(kept.train) == channel_statistics(open_source(folder, image_size=size, resize=resize).train)


def test_ways_to_resize(tmp_path: Path, write_folder: Callable[..., Path]) -> None:
    folder = write_folder(tmp_path / "zoo", THREE, (24, 12))
    found = {resize: open_source(folder, image_size=12, resize=resize) for resize in ("crop", "squash", "pad")}
    assert len({splits.fingerprint for splits in found.values()}) == 3
    pixels = {resize: splits.train.pixels[0] for resize, splits in found.items()}
    assert not pixels["pad"][:, :3].any() and not pixels["pad"][:, 9:].any() and pixels["pad"][:, 3:9].any()
    assert found["crop"].train.names is not None
    whole = Image.open(folder / found["crop"].train.names[0])
    assert np.array_equal(pixels["crop"], np.moveaxis(np.asarray(whole.crop((6, 0, 18, 12))), -1, 0))
    assert np.array_equal(pixels["squash"], np.moveaxis(np.asarray(whole.resize((12, 12), Image.Resampling.BILINEAR)), -1, 0))
    assert open_source(folder, image_size=12).fingerprint == found["crop"].fingerprint


@pytest.mark.parametrize("side,smaller", [(120, False), (136, True)])
def test_large_jpegs_are_read_smaller_and_the_fingerprint_tells(tmp_path: Path, side: int, smaller: bool) -> None:
    folder = photographs(tmp_path / "photographs", side)
    kept, decoded = (open_source(folder, cache=cache, image_size=32) for cache in ("encoded", "decoded"))
    assert same(kept, decoded) != smaller
    assert np.abs(kept.train.pixels[:].astype(float) - decoded.train.pixels[:]).mean() < 1.5


def test_the_cache_takes_no_more_than_the_files_and_serves_all_sizes(tmp_path: Path, cache: Path) -> None:
    folder = photographs(tmp_path / "photographs", 136, count=40)
    first = open_source(folder, cache="encoded", image_size=32)
    files = sum(file.stat().st_size for file in folder.rglob("*.jpg"))
    (stored,) = cache.glob("*.bytes")
    assert stored.stat().st_size == files
    changed = stored.stat().st_mtime_ns
    open_source(folder, cache="encoded", image_size=64, limit_train=10)
    assert open_source(folder, cache="encoded", image_size=32).fingerprint == first.fingerprint
    assert [file.stat().st_mtime_ns for file in cache.glob("*.bytes")] == [changed]


def test_arrays_are_kept_too() -> None:
    assert same(*(open_source("sklearn:digits", cache=cache, channels="gray") for cache in ("encoded", "decoded")))


def test_auto_goes_by_size_and_says_so(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = photographs(tmp_path / "photographs", 120)
    open_source(folder, image_size=120)
    assert not list(cache.glob("*.bytes")) and not capsys.readouterr().err
    monkeypatch.setattr(opening, "LARGE", 16 * 3 * 120 * 120 - 1)
    open_source(folder, image_size=120)
    assert "kept as their files" in capsys.readouterr().err and list(cache.glob("*.bytes"))
    monkeypatch.setattr(opening, "LARGE", 1)
    open_source(folder, image_size=8)  # pixels take less than files
    assert not capsys.readouterr().err


def test_broken_images_are_named_and_left_out(tmp_path: Path, write_folder: Callable[..., Path]) -> None:
    folder = write_folder(tmp_path / "zoo", THREE)
    (folder / "bee" / "004.png").write_bytes((folder / "bee" / "004.png").read_bytes()[:100])
    (folder / "ant" / "000.png").write_bytes(b"")
    for _ in range(2):
        with pytest.raises(UserError, match=r"cannot read image ant/000\.png \(.*\) and 1 more"):
            open_source(folder, cache="encoded")
    splits = open_source(folder, cache="encoded", on_error="skip")
    assert sum(sizes(splits)) == 58
    assert same(splits, open_source(folder, cache="decoded", on_error="skip"))


@pytest.mark.parametrize("suffix", [".bytes", ".ends.npy", ".hashes.npy", ".json", ".counts.npy"])
@pytest.mark.parametrize("harm", ["emptied", "halved", "gone", "garbled"])
def test_a_damaged_cache_is_made_again(
    tmp_path: Path, write_folder: Callable[..., Path], cache: Path, suffix: str, harm: str
) -> None:
    folder = write_folder(tmp_path / "zoo", THREE)
    first = open_source(folder, cache="encoded")
    numbers = channel_statistics(first.train)
    (file,) = cache.glob(f"*{suffix}")
    if harm == "gone":
        file.unlink()
    elif harm == "garbled":
        file.write_bytes(bytes(file.stat().st_size))
    else:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2 * (harm == "halved")])
    again = open_source(folder, cache="encoded")
    assert again.fingerprint == first.fingerprint and channel_statistics(again.train) == numbers
    assert np.array_equal(again.train.pixels, open_source(folder).train.pixels)


@pytest.mark.parametrize(
    "note",
    [{"largest": None}, {"shape": None}, {"shape": "x"}, {"shape": [3, 9]}, {"shape": [3, 9, None]}, {"shape": [3, 1, 1]}],
)
def test_damaged_notes_are_made_again(
    tmp_path: Path, write_folder: Callable[..., Path], cache: Path, note: dict[str, object]
) -> None:
    folder = write_folder(tmp_path / "zoo", THREE)
    first = open_source(folder, cache="encoded")
    (file,) = cache.glob("*[0-9a-f].json")
    whole = file.read_text()
    file.write_text(json.dumps(json.loads(whole) | note))
    assert same(open_source(folder, cache="encoded"), first) and json.loads(file.read_text()) == json.loads(whole)


def test_what_is_interrupted_is_not_mistaken_for_the_next(
    tmp_path: Path, write_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    splits = open_source(write_folder(tmp_path / "zoo", THREE), cache="encoded")
    expected = splits.train.pixels[:]
    decoders = encoding._decoders()
    workers = list(decoders.workers)
    with monkeypatch.context() as patch:

        def interrupted(*_: object) -> None:
            raise KeyboardInterrupt

        patch.setattr(workers[0], "stdout", type("Pipe", (), {"readline": interrupted, "close": workers[0].stdout.close}))  # type: ignore[union-attr]
        with pytest.raises(KeyboardInterrupt):
            splits.train.pixels[:4]
    assert all(worker.poll() is not None for worker in workers)
    assert np.array_equal(splits.train.pixels[:5], expected[:5])
    for wait in (False, True):  # for its pipe to be broken when it is asked
        victim = encoding._decoders().workers[0]
        victim.kill()  # as for want of memory
        if wait:
            victim.wait()
        with pytest.raises(UserError, match="a process that decodes ended"):
            splits.train.pixels[:4]
    assert np.array_equal(splits.train.pixels[3], expected[3])


def test_workers_end_with_a_process_that_is_killed(tmp_path: Path, write_folder: Callable[..., Path]) -> None:
    folder = write_folder(tmp_path / "zoo", THREE)
    code = (
        "import os, signal\n"
        "from crossalign.config import DataConfig\n"
        "from crossalign.data.images import encoded, load\n"
        f"load.open_images(DataConfig(source={str(folder)!r}, cache='encoded')).train.pixels[:4]\n"
        "print(*(worker.pid for worker in encoded._decoders().workers), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    workers = [int(word) for word in done.stdout.split()]
    assert workers and done.returncode == -9
    for worker in workers:
        for _ in range(100):
            try:
                os.kill(worker, 0)
            except ProcessLookupError:
                break
            if Path(f"/proc/{worker}/stat").is_file() and " Z " in Path(f"/proc/{worker}/stat").read_text():
                break
            time.sleep(0.1)
        else:
            pytest.fail(f"{worker} goes on")


def test_processes_that_decode_load_no_torch() -> None:
    code = "import sys, crossalign.data.images.encoded; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120, check=False).returncode == 0
