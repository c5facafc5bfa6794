"""``features``: a vision model's features of images with texts, written once."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from crossalign.config import PairsConfig, TeacherConfig
from crossalign.verbs import Verb


@dataclass
class FeaturesArgs:
    """A vision model's features of images with texts, written once, so that training needs no vision model."""

    output: Path | None = None
    """The .safetensors file; in the cache by default, named by a hash of teacher and pairs."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    pairs: PairsConfig = field(default_factory=PairsConfig)


def run(args: FeaturesArgs, _: str) -> None:
    """Write the features, and print where they are and what they are of."""
    from crossalign.features.store import features, read_metadata

    path = features(args.teacher, args.pairs, args.output, device=args.device)
    facts = read_metadata(path)
    print(f"{path}: {facts['teacher']}, layers {' '.join(json.loads(facts['layers']))}; {facts['pairs']}")


FEATURES = Verb(FeaturesArgs, run)
