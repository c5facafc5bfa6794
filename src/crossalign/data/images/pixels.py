"""The pixels of a set of images: rows of what lies in one file, taken when they are asked for."""

from typing import Any, Protocol

import numpy as np


class Store(Protocol):
    """All images of a listing, uint8 (N, C, H, W)."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, rows: Any, /) -> np.ndarray: ...


class Pixels:
    """uint8 (n, C, H, W): some rows of a store, which every split shares; what is asked for is copied."""

    dtype = np.dtype(np.uint8)

    def __init__(self, store: Store, rows: np.ndarray) -> None:
        """
        Args:
            store: all images; an array, or what gives an array for int64 (n,) of its rows.
            rows: int64 (n,): which of them, in order.
        """
        self.store, self.rows = store, rows

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, C, H, W)"""
        return (len(self.rows), *self.store.shape[1:])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> np.ndarray:
        first, *others = index if isinstance(index, tuple) else (index,)
        rows = self.rows[first]
        pixels = np.asarray(self.store[np.atleast_1d(rows)])  # a copy, as always of numbered rows
        return (pixels if np.ndim(rows) else pixels[0])[(*[slice(None)] * np.ndim(rows), *others)]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype)
