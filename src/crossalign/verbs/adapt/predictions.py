"""The answers on the test set, kept so that runs can be compared image by image and looked at."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from crossalign.core.files import atomic_path
from crossalign.data.images.load import ImageSet
from crossalign.verbs.adapt.scoring import Scores


def write_predictions(path: Path, scores: Scores) -> None:
    """Write index, label, predicted and confidence of every image as parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table(
        {
            "index": np.arange(len(scores.labels), dtype=np.int32),
            "label": scores.labels.numpy().astype(np.int16),
            "predicted": scores.predicted.numpy().astype(np.int16),
            "confidence": scores.confidence.numpy().astype(np.float32),
        }
    )
    encodings = {"index": "DELTA_BINARY_PACKED", "confidence": "BYTE_STREAM_SPLIT"}  # half the size of plain values
    with atomic_path(path) as temporary:
        small = ["label", "predicted"]
        pq.write_table(table, temporary, compression="zstd", use_dictionary=small, column_encoding=encodings)


def write_samples(path: Path, images: ImageSet, scores: Scores, *, seed: int, count: int = 12) -> None:
    """Write ``count`` test images as PNG with what was said of them: half right, half wrong, drawn with ``seed``.

    The draw depends on the test set and the answers alone, so that rows of one table show comparable pictures.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = np.random.default_rng(seed)
    right = (scores.predicted == scores.labels).numpy()
    wrong_rows, right_rows = rng.permutation(np.flatnonzero(~right)), rng.permutation(np.flatnonzero(right))
    half = count // 2
    rows = [*right_rows[: max(half, count - len(wrong_rows))], *wrong_rows[: max(half, count - len(right_rows))]]
    table = pa.table(
        {
            "png": [_png(images.pixels[row]) for row in rows],
            "label": [images.classes[scores.labels[row]] for row in rows],
            "predicted": [images.classes[scores.predicted[row]] for row in rows],
            "confidence": np.array([scores.confidence[row] for row in rows], dtype=np.float32),
        }
    )
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def _png(pixels: np.ndarray) -> bytes:
    """uint8 (C, H, W), gray or RGB → PNG bytes."""
    from PIL import Image

    picture = Image.fromarray(pixels[0] if len(pixels) == 1 else np.moveaxis(pixels, 0, -1))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()
