"""What a folder of a saved classifier holds beside its weights: config.json and a model card."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from crossalign.config import BackboneConfig, EmbedderConfig, HeadConfig, TuneConfig
from crossalign.core.errors import UserError
from crossalign.data.model_files import read_config
from crossalign.models.classifier.freezing import FreezePlan
from crossalign.models.language.model import LanguageModel

FORMAT = "crossalign.ImageClassifier/1"


@dataclasses.dataclass(frozen=True)
class InputSpec:
    """What goes in and what comes out: enough to prepare a stranger's image and to name the answer."""

    shape: tuple[int, ...]
    """Channels first: (C, H, W) for images, (C, S) for series."""
    classes: tuple[str, ...]
    """Class names, in the order of the scores."""
    mean: tuple[float, ...]
    """Channel means to subtract, on a scale of 0 to 1 for images."""
    std: tuple[float, ...]
    """Channel standard deviations to divide by."""


@dataclasses.dataclass
class ModelSettings:
    """The sections of a run's configuration that shape the model."""

    backbone: BackboneConfig
    embedder: EmbedderConfig
    tune: TuneConfig
    head: HeadConfig


def read_saved(folder: Path) -> dict[str, Any]:
    """config.json of a saved classifier, or UserError where it is none."""
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(f"no saved classifier at '{folder}': it has no config.json; give the model/ folder of a finished run")
    saved = read_config(folder)
    if saved.get("format") != FORMAT:
        raise UserError(f"{file} is not a crossalign classifier of format {FORMAT!r}: give the model/ folder of a finished run")
    missing = {"backbone", "embedder", "tune", "head", "input", "fingerprint", "seed"} - saved.keys()
    if missing:
        raise UserError(f"{file} is damaged: it lacks {', '.join(sorted(missing))}")
    return saved


def model_card(
    spec: InputSpec, tune: TuneConfig, language_model: LanguageModel, plan: FreezePlan, facts: dict[str, Any]
) -> str:
    """A README.md with the hub's header: what the model is, how to use it, what was measured, what it cannot do."""
    results = "\n".join(f"- {name}: {value}" for name, value in facts.items()) or "- none recorded"
    classes = ", ".join(spec.classes[:20]) + (", …" if len(spec.classes) > 20 else "")
    return f"""---
library_name: crossalign
pipeline_tag: image-classification
tags: [crossalign, cross-modal, {tune.method}]
---

# A language model made an image classifier

Backbone `{language_model.ref}` ({language_model.kind} weights), method `{tune.method}`,
{plan.trainable:,} trained parameters, inputs of shape {tuple(spec.shape)}, {len(spec.classes)} classes: {classes}.

```python
from crossalign import ImageClassifier
ImageClassifier.from_pretrained("this folder").predict("picture.png")
```

## Recorded facts
{results}

## Limits
It knows its training classes alone and always answers with one of them. Scores are not calibrated unless the facts above
say so. A frozen backbone is not in this folder: it is opened from the reference above and checked by hash.

## Parameters
```
{plan}
```
"""
