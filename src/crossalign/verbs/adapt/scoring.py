"""Scores of a classifier over a whole set: per image first, so that batching and the number of processes change nothing."""

import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crossalign.core.files import atomic_path
from crossalign.data.images.load import ImageSet
from crossalign.runs.records import Predictions


@dataclass(frozen=True)
class Scores(Predictions):
    """What a classifier said about each of N images, in the order of the set."""

    losses: Tensor
    """float32 (N,): cross-entropy in nats."""

    def summary(self) -> dict[str, float]:
        """Accuracy, mean loss and expected calibration error."""
        correct = torch.from_numpy(self.correct).double()
        return {
            "accuracy": correct.mean().item(),
            "loss": self.losses.double().mean().item(),
            "ece": expected_calibration_error(torch.from_numpy(self.confidence), correct),
        }

    def test_numbers(self, classes: int) -> dict[str, Any]:
        """The summary with the number of images, and their counts by true class (row) and predicted class (column)."""
        cells = np.bincount(self.label * classes + self.predicted, minlength=classes * classes)
        return self.summary() | {"n": len(self.label), "confusion": cells.reshape(classes, classes).tolist()}


def expected_calibration_error(confidence: Tensor, correct: Tensor, bins: int = 15) -> float:
    """Mean gap between confidence and accuracy over equal-width bins, weighted by their size (Guo et al. 2017, Eq. 3).

    confidence, correct: (N,). 0 is perfect; an overconfident model (CMDA §3.2.3) has a large value.
    """
    index = (confidence.double() * bins).ceil().clamp(1, bins).long() - 1  # bins are open on the left, as in the paper
    gaps = torch.zeros(bins, dtype=torch.float64).index_add_(0, index, correct.double() - confidence.double())
    return (gaps.abs().sum() / len(confidence)).item()


@torch.no_grad()
def score(model: nn.Module, batches: Iterable[Mapping[str, Any]], labels: Tensor, accelerator: Any) -> Scores:
    """Run ``model`` over ``batches`` of {"images", "index"} and put the answers in the order of ``labels`` (N,).

    Every process scores its own rows; the answers are summed over processes, so each holds the whole. The host waits
    for the device once, at the end. The caller puts the model in eval mode.
    """
    device, n = accelerator.device, len(labels)
    answers_3N = torch.zeros(3, n, device=device)
    labels = labels.to(device)
    for batch in batches:
        index = batch["index"].to(device)  # empty in a process that has none left of this batch
        logits = model(batch["images"].to(device, non_blocking=True)).float()[: len(index)]
        confidence, predicted = logits.softmax(-1).max(-1)
        losses = F.cross_entropy(logits, labels[index], reduction="none")
        answers_3N[:, index] = torch.stack([predicted.float(), confidence, losses])
    if accelerator.num_processes > 1:
        answers_3N = accelerator.reduce(answers_3N, "sum")
    predicted, confidence, losses = answers_3N.cpu()
    seen = (labels.cpu().numpy(), predicted.long().numpy(), confidence.double().numpy())
    return Scores(np.arange(n), *seen, losses.float())


def write_predictions(path: Path, scores: Scores) -> None:
    """Write index, label, predicted and confidence of every image as parquet, so that runs can be compared image by image."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = {"index": np.int32, "label": np.int16, "predicted": np.int16, "confidence": np.float32}
    table = pa.table({name: getattr(scores, name).astype(kind) for name, kind in kinds.items()})
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
    wrong_rows, right_rows = (rng.permutation(np.flatnonzero(rows)) for rows in (~scores.correct, scores.correct))
    half = count // 2
    rows = [*right_rows[: max(half, count - len(wrong_rows))], *wrong_rows[: max(half, count - len(right_rows))]]
    table = pa.table(
        {
            "png": [_png(images.pixels[row]) for row in rows],
            "label": [images.classes[scores.label[row]] for row in rows],
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
