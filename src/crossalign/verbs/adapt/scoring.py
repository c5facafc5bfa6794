"""Scores of a classifier over a whole set: per image first, so that batching and the number of processes change nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crossalign.runs.records import Predictions


@dataclass(frozen=True)
class Scores:
    """What a classifier said about each of N images, in the order of the set; all tensors on the CPU."""

    labels: Tensor
    """int64 (N,)"""
    predicted: Tensor
    """int64 (N,)"""
    confidence: Tensor
    """float32 (N,): probability of the predicted class."""
    losses: Tensor
    """float32 (N,): cross-entropy in nats."""

    def summary(self) -> dict[str, float]:
        """Accuracy, mean loss and expected calibration error."""
        correct = (self.predicted == self.labels).double()
        return {
            "accuracy": correct.mean().item(),
            "loss": self.losses.double().mean().item(),
            "ece": expected_calibration_error(self.confidence, correct),
        }

    @property
    def predictions(self) -> Predictions:
        """As they are kept, to be compared with those of other runs."""
        index, confidence = np.arange(len(self.labels)), self.confidence.double().numpy()
        return Predictions(index, self.labels.numpy(), self.predicted.numpy(), confidence)

    def confusion(self, classes: int) -> list[list[int]]:
        """Counts by true class (row) and predicted class (column)."""
        cells = torch.bincount(self.labels * classes + self.predicted, minlength=classes * classes)
        return cells.reshape(classes, classes).tolist()


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
        index = batch["index"].to(device)  # of none, where the images only fill a place
        logits = model(batch["images"].to(device, non_blocking=True)).float()[: len(index)]
        confidence, predicted = logits.softmax(-1).max(-1)
        losses = F.cross_entropy(logits, labels[index], reduction="none")
        answers_3N[:, index] = torch.stack([predicted.float(), confidence, losses])
    if accelerator.num_processes > 1:
        answers_3N = accelerator.reduce(answers_3N, "sum")
    predicted, confidence, losses = answers_3N.cpu()
    return Scores(labels.cpu(), predicted.long(), confidence.float(), losses.float())
