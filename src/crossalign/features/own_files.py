"""Features of pairs from the user's own file, made by whatever model, of whatever modality."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from crossalign.core.errors import UserError, unknown
from crossalign.core.refs import Ref
from crossalign.data.pairs.sources import ID_COLUMNS, unique

FEATURE_COLUMNS = ("features", "feature", "embedding", "embeddings", "vector")


def read_features_file(path: Path, ids: Sequence[str]) -> Tensor:
    """Features (N, D), fp32, one row for each of ``ids``.

    A .npy file holds an array (N, D), a .safetensors file such a tensor named features (or a single one), both in the
    order of the pairs. A .parquet file has a column of lists named features; with a column of ids (id, filename, …) its
    rows are found by those, else they are in the order of the pairs.

    Raises:
        UserError: other rows than pairs, a pair without features, or values that are no finite numbers.
    """
    try:
        values, names = READERS[path.suffix](path)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"cannot read features from '{path}' ({error})") from error
    if values.ndim != 2 or values.dtype.kind not in "fiu":
        raise UserError(f"'{path}' holds {values.dtype} values of shape {values.shape}; features are numbers (pairs, width)")
    if names is not None:
        place = {name: row for row, name in enumerate(unique(names))}
        absent = [name for name in ids if name not in place]
        if absent:
            raise UserError(f"'{path}' has no features of {len(absent)} of {len(ids)} pairs, such as {', '.join(absent[:3])}")
        values = values[[place[name] for name in ids]]
    elif len(values) != len(ids):
        raise UserError(
            f"'{path}' has {len(values)} rows for {len(ids)} pairs; without a column of ids there must be one a pair, in order"
        )
    found = torch.from_numpy(np.require(values, np.float32, ["C", "W"]))  # copies what is mapped from a file
    bad = (~found.isfinite().all(1)).nonzero().flatten().tolist()
    if bad:
        raise UserError(f"'{path}' holds values that are no finite numbers, first for {ids[bad[0]]} ({len(bad)} rows in all)")
    return found


def own_file(ref: str) -> Path | None:
    """The file that ``file:PATH`` names; None for a reference to a model.

    Raises:
        UserError: no file lies there that features are read from.
    """
    path = Ref(ref).file
    if path is not None and not path.is_file():
        raise UserError(f"there is no file of features '{path}': give file:PATH of a .npy, .safetensors or .parquet file")
    if path is not None and path.suffix not in READERS:
        raise unknown("kind of features file", path.suffix, READERS)
    return path


def _npy(path: Path) -> tuple[np.ndarray, None]:
    return np.load(path, mmap_mode="r", allow_pickle=False), None


def _safetensors(path: Path) -> tuple[np.ndarray, None]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    if "features" not in tensors and len(tensors) != 1:
        raise ValueError(f"no tensor named features, only {', '.join(sorted(tensors))}")
    return tensors.get("features", next(iter(tensors.values()))).float().numpy(), None


def _parquet(path: Path) -> tuple[np.ndarray, list[object] | None]:
    import pyarrow.parquet as pq

    table = pq.read_table(path)  # its errors are ValueErrors or OSErrors
    column = next((name for name in FEATURE_COLUMNS if name in table.column_names), None)
    if column is None:
        raise ValueError(f"no column named {' or '.join(FEATURE_COLUMNS)}, only {', '.join(table.column_names)}")
    rows = table.column(column).to_pylist()
    widths = {0 if row is None else len(row) for row in rows}
    if len(widths) > 1:
        raise ValueError(f"rows of {min(widths)} to {max(widths)} values in column '{column}'")
    key = next((name for name in ID_COLUMNS if name in table.column_names), None)
    return np.asarray(rows), table.column(key).to_pylist() if key else None


READERS: dict[str, Callable[[Path], tuple[np.ndarray, list[object] | None]]] = {
    ".npy": _npy,
    ".safetensors": _safetensors,
    ".parquet": _parquet,
}
"""By suffix: a file → values (N, D), and ids where it has them."""
