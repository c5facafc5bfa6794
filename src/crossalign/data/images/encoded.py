"""Images in the cache as their files, one after the other, decoded by worker processes whenever a batch asks for them."""

import atexit
import io
import itertools
import json
import math
import mmap
import os
import signal
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from crossalign.core.errors import UserError
from crossalign.core.files import atomic_path, cache_dir, content_key, kept, naming_full_disk
from crossalign.core.machine import usable_threads
from crossalign.core.progress import followed
from crossalign.core.reading import parse_json, read_array, read_bytes
from crossalign.data.images.cached import Decoded, cached_hashes, full_cache, key_of, save_array, write_pixels
from crossalign.data.images.decode import MAX_BYTES, WHITE, Channels, Depth, Resize, decode, hash_of
from crossalign.data.sources import ImageListing, Raw

WORKERS = 16
"""Processes that decode, at most."""
ENDED = "a process that decodes ended"


class EncodedImages:
    """All images of a listing, uint8 (N, C, H, W) for whoever asks for some of them."""

    def __init__(self, key: str, shape: tuple[int, ...], look: tuple[Any, ...], bytes_key: str) -> None:
        """
        Args:
            key: of the listing with the look that is asked for.
            shape: (N, C, H, W)
            look: size, channels, white level and resize, as for ``decode_listing``.
            bytes_key: where the files lie in the cache.
        """
        self.key, self.shape = key, shape
        self._request = {"file": str(bytes_file(bytes_key)), "look": look, "shape": shape[1:]}

    def __getitem__(self, rows: Any, /) -> np.ndarray:
        pixels = _decoders().decode(self._request, np.atleast_1d(rows))
        return pixels if np.ndim(rows) else pixels[0]


def bytes_file(key: str) -> Path:
    """The file of bytes; where each image begins and ends stands beside it."""
    return cache_dir("images") / f"{key}.bytes"


def _ends_file(key: str) -> Path:
    return bytes_file(key).with_suffix(".ends.npy")


def bytes_key(listing: ImageListing) -> str:
    """What the files of a listing are called, whatever size is asked for."""
    return content_key(identity=listing.identity, encoded=1)


def encode_listing(
    listing: ImageListing, image_size: int | None, channels: Channels, white: int = WHITE, resize: Resize = "crop"
) -> Decoded:
    """Copy the images of ``listing`` into one file and check each, or find them in the cache.

    Pixels are those of ``decode_listing``, but for JPEGs of four times the size that is asked for and more, which are read
    smaller. Their hashes, and what is made of these, tell the difference.

    Raises:
        UserError: as ``decode_listing`` does.
    """
    source, look = bytes_key(listing), (image_size, channels, white, resize)
    key = key_of(listing, *look, encoded=1)
    depth, shapes = Depth(white), []

    def offsets() -> np.ndarray:
        ends = _offsets(bytes_file(source))
        if len(ends) != len(listing.labels) + 1:
            raise ValueError(len(ends))
        return ends

    def make(raw: Raw) -> np.ndarray:
        pixels = _decoded(raw, look, depth)
        shapes.append(pixels.shape)
        return pixels

    def check(hashes: np.ndarray, noted: dict[str, Any]) -> None:
        ends, data = offsets(), np.memmap(bytes_file(source), np.uint8, "r")
        for row in {0, len(hashes) // 2, len(hashes) - 1}:
            if hashes[row] and hash_or_0(data[ends[row] : ends[row + 1]].tobytes()) != int(hashes[row]):
                _ends_file(source).unlink()  # so that the files are copied again
                raise ValueError(row)
        shape = noted["shape"]
        whole = len(shape) == 3 and all(isinstance(side, int) and side > 0 for side in shape)
        if not whole or (shapes and tuple(shape) != shapes[0]) or not isinstance(noted.get("largest", -1), int):
            raise ValueError(noted)

    def hash_or_0(file: bytes) -> int:
        with suppress(Exception):  # a damaged file can raise anything inside an image library
            return hash_of(make(file).tobytes())
        return 0

    def compute() -> list[int | str]:
        ends = kept(offsets, lambda: _copy(listing, source))
        files = replace(listing, records=lambda: _records(bytes_file(source), ends))
        with open(os.devnull, "wb") as nowhere:
            return write_pixels(nowhere, files, make)

    rows, notes = range(len(listing.labels)), {"title": listing.title}
    facts = lambda: notes | {"largest": depth.largest, "shape": shapes[0]}  # noqa: E731
    hashes, bad, noted = cached_hashes("images", key, rows, compute, check, facts)
    pixels = EncodedImages(key, (len(rows), *noted["shape"]), look, source)
    return Decoded(pixels, hashes, bad, noted.get("largest", -1))


def _copy(listing: ImageListing, key: str) -> None:
    """Write the files of a listing into one, and where each ends."""
    file, ends = bytes_file(key), [0]
    with naming_full_disk(full_cache(file.parent)):
        with atomic_path(file) as temporary, temporary.open("wb") as stream:
            for raw in followed(listing.records(), len(listing.labels), f"copying {listing.title}", "image"):
                ends.append(ends[-1] + stream.write(_bytes(raw)))
        save_array(_ends_file(key), np.array(ends))


def _bytes(raw: Raw) -> bytes:
    """The file of an image; nothing where it cannot be read."""
    if isinstance(raw, Path):
        with suppress(UserError, OSError):
            return read_bytes(raw, MAX_BYTES)
        return b""
    if isinstance(raw, np.ndarray | Image.Image):
        stream = io.BytesIO()
        (Image.fromarray(raw) if isinstance(raw, np.ndarray) else raw).save(stream, "PNG")
        return stream.getvalue()
    return raw if isinstance(raw, bytes) else b""


def _offsets(file: Path) -> np.ndarray:
    """int64 (N + 1,): where each image begins, and the end.

    Raises:
        ValueError: they are not those of the file.
    """
    ends: np.ndarray = read_array(file.with_suffix(".ends.npy"))
    if ends.ndim != 1 or ends.dtype != np.int64 or ends[-1] != file.stat().st_size:
        raise ValueError(file)
    return ends


def _records(file: Path, ends: np.ndarray) -> Iterator[bytes | None]:
    data = np.memmap(file, np.uint8, "r") if ends[-1] else np.empty(0, np.uint8)
    for start, end in itertools.pairwise(ends):
        yield data[start:end].tobytes() or None


def _decoded(raw: Raw, look: Any, depth: Depth) -> np.ndarray:
    side, channels, _, resize = look
    return decode(raw, side and (side, side), channels, depth, resize, draft=True)


def _failed(why: str) -> UserError:
    return UserError(f"images in the cache cannot be decoded ({why}): run it again")


def _memory_file() -> int:
    """A file without a name that the processes that decode write pixels to; in memory where the system has that."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("pixels")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


class _Shared:
    """The memory that lies behind a file which several processes map."""

    def __init__(self, file: int) -> None:
        self.file = file
        self._map: mmap.mmap | None = None

    def make_room(self, size: int) -> None:
        """Let the file hold so many bytes at least, before others are asked to write them."""
        if size > os.fstat(self.file).st_size:
            os.truncate(self.file, size)

    def pixels(self, shape: tuple[int, ...]) -> np.ndarray:
        """uint8 of ``shape``, from the start of the file."""
        if self._map is None or len(self._map) < math.prod(shape):
            self._map = mmap.mmap(self.file, 0)  # the whole of it; arrays over an earlier one keep that
        return np.frombuffer(self._map, np.uint8, math.prod(shape)).reshape(shape)


class _Decoders:
    """Processes that decode images of the cache into memory that they share with this one. Each reads a request as a line of
    JSON and answers with a line; it ends with the pipe, so that none outlives this process, however that ends."""

    def __init__(self) -> None:
        share = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # the processes of a run on this machine
        self.process, self.lock = os.getpid(), threading.Lock()
        self.shared = _Shared(_memory_file())
        number = self.shared.file
        code = f"import sys; sys.path[:] = {sys.path!r}; from crossalign.data.images.encoded import serve; serve({number})"
        kept_blocks = {"PILLOW_BLOCKS_MAX": "8"}  # memory that an image has left is the next one's: two thirds of the time
        self.workers = [
            subprocess.Popen(  # a session of its own: Ctrl-C is for the run, which saves first
                [sys.executable, "-c", code],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,
                pass_fds=[number],
                env=kept_blocks | os.environ,
            )
            for _ in range(max(1, min(WORKERS, usable_threads() // share)))
        ]

    def decode(self, request: dict[str, Any], rows: np.ndarray) -> np.ndarray:
        """uint8 (n, C, H, W): the images at ``rows``."""
        shape = (len(rows), *request["shape"])
        parts = [part for part in np.array_split(np.arange(len(rows)), len(self.workers)) if len(part)]
        with self.lock:
            try:
                self.shared.make_room(math.prod(shape))
                for worker, part in zip(self.workers, parts, strict=False):
                    assert worker.stdin is not None
                    asked = {"rows": rows[part].tolist(), "first": int(part[0]), "batch": len(rows)}
                    worker.stdin.write(json.dumps(request | asked).encode() + b"\n")
                    worker.stdin.flush()
                for worker, _ in zip(self.workers, parts, strict=False):
                    assert worker.stdout is not None
                    if (answer := worker.stdout.readline().strip()) != b"ok":
                        raise _failed(answer.decode() or ENDED)
                return self.shared.pixels(shape).copy()
            except BrokenPipeError as error:  # which elsewhere says that nobody reads our output any more
                self.close()
                raise _failed(ENDED) from error
            except BaseException:  # what is under way belongs to nobody now
                self.close()
                raise

    def close(self) -> None:
        """End the processes."""
        workers, self.workers = self.workers, []
        for worker in workers if self.process == os.getpid() else []:
            worker.kill()
            for pipe in (worker.stdin, worker.stdout):
                with suppress(OSError):  # what was not written yet
                    pipe.close()  # type: ignore[union-attr]
            worker.wait()
        if workers:
            os.close(self.shared.file)


@lru_cache(maxsize=1)
def _started(process: int) -> _Decoders:
    """Those of this process: a fork has none of its parent's."""
    decoders = _Decoders()
    atexit.register(decoders.close)
    return decoders


_starting = threading.Lock()


def _decoders() -> _Decoders:
    with _starting:
        decoders = _started(os.getpid())
        if not decoders.workers:
            _started.cache_clear()
            decoders = _started(os.getpid())
        return decoders


@lru_cache(maxsize=8)
def _opened(file: str, changed: int) -> tuple[np.ndarray, np.ndarray]:
    return np.memmap(file, np.uint8, "r"), _offsets(Path(file))


def serve(file: int) -> None:
    """What a worker process does: answer requests until there are no more; pixels go to the ``file`` with that number."""
    shared = _Shared(file)
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # the run that asks saves first
        signal.signal(number, signal.SIG_IGN)
    warnings.simplefilter("ignore")  # Pillow's, of what was checked already
    for line in requests:
        try:
            request = parse_json(line, "a request", "ask again", dict)
            data, ends = _opened(request["file"], os.stat(request["file"]).st_mtime_ns)
            depth, batch = Depth(request["look"][2]), shared.pixels((request["batch"], *request["shape"]))
            for place, row in enumerate(request["rows"], request["first"]):
                pixels = _decoded(data[ends[row] : ends[row + 1]].tobytes() or None, request["look"], depth)
                if pixels.shape != batch[place].shape:
                    raise ValueError(f"image {row} has another size than it had")
                batch[place] = pixels
            answers.write(b"ok\n")
        except Exception as error:
            answers.write(" ".join(f"{type(error).__name__}: {error}".split()).encode() + b"\n")
        answers.flush()
