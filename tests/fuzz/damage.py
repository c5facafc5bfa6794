"""How a file is damaged: what it holds cut, flipped, changed at one place or nested, or something else put in its place."""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from hypothesis import strategies as st

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0000\nsize 12345\n"
VALUES: tuple[Any, ...] = (
    None,
    "x",
    "",
    -1,
    0,
    7,
    1e308,
    10**12,
    0.5,
    [],
    ["a", "a"],
    {},
    {"a": 1},
    True,
    "\ud800\x1b]0;x\x07",
)
GONE = object()


def pieces(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every key of nested dictionaries and lists, at any depth; of a long list the first ones."""
    keys = list(value) if isinstance(value, dict) else range(min(3, len(value))) if isinstance(value, list) else ()
    for key in keys:
        yield (*path, key)
        yield from pieces(value[key], (*path, key))


def put(value: Any, path: tuple[Any, ...], entry: Any) -> Any:
    """``value`` with one entry changed, or GONE."""
    if not path:
        return entry
    copy = value.copy()
    if len(path) == 1 and entry is GONE:
        del copy[path[0]]
    else:
        copy[path[0]] = put(value[path[0]], path[1:], entry)
    return copy


def of_lines(data: bytes) -> list[Any]:
    return [json.loads(line) for line in data.decode().splitlines()]


def tensors_header(data: bytes) -> tuple[Any, bytes]:
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def torch_bytes(value: Any) -> bytes:
    torch.save(value, file := io.BytesIO())
    return file.getvalue()


def table_bytes(value: dict[str, list[Any]]) -> bytes:
    pq.write_table(pa.table(value), file := io.BytesIO())
    return file.getvalue()


def changed(data: bytes, suffix: str, choose: Callable[[list[Any]], Any]) -> bytes:
    """A structured file with one value of another type, or one key gone; ``choose`` draws one of a list."""

    def one(value: Any) -> Any:
        return put(value, choose(list(pieces(value)) or [()]), choose([GONE, *VALUES]))

    if suffix == ".json":
        return json.dumps(one(json.loads(data))).encode()
    if suffix in (".jsonl", ".log"):
        return "".join(json.dumps(row) + "\n" for row in one(of_lines(data)) or []).encode()
    if suffix == ".yaml":
        return json.dumps(one(yaml.safe_load(data))).encode()  # which is YAML
    if suffix == ".pt":
        return torch_bytes(one(torch.load(io.BytesIO(data), weights_only=True)))
    if suffix == ".safetensors":
        header, rest = tensors_header(data)
        text = json.dumps(one(header)).encode()
        return struct.pack("<Q", len(text)) + text + rest
    table = pq.read_table(io.BytesIO(data)).to_pydict()
    name = choose(list(table))
    if (entry := choose([GONE, *VALUES])) is GONE:
        del table[name]
    else:
        table[name] = [entry] * len(table[name]) if choose([True, False]) else [entry, *table[name][1:]]
    return table_bytes(table)


STRUCTURED = (".json", ".jsonl", ".log", ".yaml", ".pt", ".safetensors", ".parquet")
KINDS = ("empty", "half", "flip", "deep", "pointer", "link", "pipe", "folder", "absent", *("changed",) * 6)


def damage(path: Path, victim: Path, data: st.DataObject) -> str:
    """Damage a file; ``victim`` is what a link leads to. Returns what was done, in a word."""
    kinds = KINDS if path.suffix in STRUCTURED else KINDS[:9]
    kind = data.draw(st.sampled_from(kinds), "damage")
    content = damaged_bytes(path.read_bytes(), path.suffix, kind, data)
    path.unlink()  # once all is drawn: a drawing may end the example
    if kind == "link":
        path.symlink_to(victim)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind != "absent":
        path.write_bytes(content)
    return kind


def damaged_bytes(held: bytes, suffix: str, kind: str, data: st.DataObject) -> bytes:
    if kind == "flip" and held:
        place = data.draw(st.integers(0, len(held) - 1), "byte")
        return held[:place] + bytes([held[place] ^ (1 << data.draw(st.integers(0, 7), "bit"))]) + held[place + 1 :]
    if kind == "changed":
        try:
            return changed(held, suffix, lambda options: options[data.draw(st.integers(0, len(options) - 1))])
        except (pa.ArrowException, UnicodeError, OverflowError):  # no such table can be
            return b""
        except ValueError:  # a log whose lines are no JSON
            return held[: len(held) // 2]
    return {"half": held[: len(held) // 2], "deep": b"[" * 100_000, "pointer": POINTER}.get(kind, b"")


def restore(path: Path, whole: Path) -> None:
    """Put back what lies at ``whole``, or nothing."""
    if path.is_symlink() or path.is_file() or path.is_fifo():
        path.unlink()
    elif path.is_dir():
        shutil.rmtree(path)
    if whole.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(whole, path)
