"""Features of images: from a vision model, or from a file of the user's own in its place."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from crossalign.config import TeacherConfig, validate
from crossalign.features.own_files import own_file
from crossalign.features.store import Features, FeatureStore, Maker

if TYPE_CHECKING:
    from crossalign.data.pairs.load import Pairs
    from crossalign.models.vision.teacher import Teacher


@dataclass(frozen=True)
class ImageSource:
    """A teacher as a source of features of images."""

    teacher: TeacherConfig

    @property
    def ref(self) -> str:
        """The teacher's reference."""
        return self.teacher.ref

    @cached_property
    def key(self) -> str:
        """``Teacher.key``, without the weights in memory; "" for a file of features.

        Raises:
            UserError: the teacher, its layers or its file of features is not there.
        """
        if own_file(self.ref):
            return ""
        validate(self.teacher, "teacher.")
        return self._open(weights=False).key

    def open(self, pairs: Pairs, device: str, weights: bool) -> Maker:
        """The teacher on ``device``."""
        model, config = self._open(weights), self.teacher
        facts = {
            "teacher_fingerprint": model.fingerprint,
            "layers": json.dumps(model.layer_names),
            "widths": json.dumps(model.widths),
            "combine": config.combine,
            "weights": json.dumps(config.weights),
            "pool": config.pool,
            "seed": str(config.seed),
            "transform": json.dumps(model.transform, sort_keys=True, default=str),
        }
        return Maker(live_features(model.to(device) if weights else model, pairs), facts, config.batch_size, "image")

    def _open(self, weights: bool) -> Teacher:
        from crossalign.models.vision.teacher import open_teacher

        return open_teacher(self.ref, settings=self.teacher, seed=self.teacher.seed, weights=weights)


def teacher_features(teacher: TeacherConfig, pairs: Pairs, *, device: str = "auto") -> Features:
    """The features of pairs' images: from a file of one's own (``file:PATH``), from the cache, or made.

    Args:
        teacher: which model, layers and pooling.
        pairs: which images, see ``open_pairs``.
        device: auto, cpu, cuda or mps.

    Raises:
        UserError: a teacher that cannot be opened, a file that is not of these pairs, or features that are no finite numbers.
    """
    return FeatureStore(pairs, device).read(ImageSource(teacher))


def live_features(model: Teacher, pairs: Pairs) -> Callable[[Tensor], Tensor]:
    """A function of pairs' indices (B,) that gives their features (B, D) from a teacher in memory, without any file."""

    def compute(indices: Tensor) -> Tensor:
        device = next(model.parameters(), torch.empty(0)).device  # a plug-in's may have no parameters
        return model(model.preprocess(pairs.images(indices.tolist())).to(device))  # type: ignore[no-any-return]

    return compute
