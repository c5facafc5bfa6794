"""The model card that goes with a saved classifier."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from crossalign.models.classifier.model import ImageClassifier


def model_card(model: ImageClassifier, facts: dict[str, Any]) -> str:
    """A README.md with the hub's header: what the model is, how to use it, what was measured, what it cannot do."""
    spec, tune = model.spec, model.settings.tune
    results = "\n".join(f"- {name}: {value}" for name, value in facts.items()) or "- none recorded"
    classes = ", ".join(spec.classes[:20]) + (", …" if len(spec.classes) > 20 else "")
    return f"""---
library_name: crossalign
pipeline_tag: image-classification
tags: [crossalign, cross-modal, {tune.method}]
---

# A language model made an image classifier

Backbone `{model.language_model.ref}` ({model.language_model.kind} weights), method `{tune.method}`,
{model.plan.trainable:,} trained parameters, inputs of shape {tuple(spec.shape)}, {len(spec.classes)} classes: {classes}.

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
{model.plan}
```
"""
