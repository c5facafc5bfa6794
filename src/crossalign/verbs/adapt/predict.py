"""``predict``: classify image files with a trained model, one JSON line each."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from crossalign.config.bounds import Count, Size
from crossalign.core.errors import UserError
from crossalign.verbs import Verb

if TYPE_CHECKING:
    from crossalign.models.classifier.model import ImageClassifier


@dataclass
class PredictArgs:
    """Classify images with a trained model: one JSON line an image."""

    model: str
    """A finished run, its model/ folder, or hf:ORG/NAME."""
    images: list[Path]
    """Image files, or folders of them."""
    top_k: Count = 1
    """Classes an image, best first."""
    batch_size: Size = 64
    """Images a forward pass."""
    backbone: str = ""
    """Where the frozen backbone lies now, if it has moved."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute."""


def run(args: PredictArgs, _: str) -> None:
    """Print ``{"file", "label", "score"}`` (or a list of classes for ``top_k`` > 1) for each file, as a line of JSON.

    A file that cannot be read costs its own line only: it is reported as ``{"file", "error"}``, and the rest goes on.

    Raises:
        UserError: no image is named, a path does not exist, a folder has no images, there is no such model or device, or no
            image could be read.
    """
    from crossalign.core.device import resolve_device
    from crossalign.models.classifier.model import ImageClassifier

    faults: dict[Path, str] = {}
    files = list(_files(args.images, faults))
    if not files:
        raise UserError("no images: name files or folders of them after the model")
    device = resolve_device(args.device)
    classifier = ImageClassifier.from_pretrained(args.model, backbone=args.backbone or None).to(device)
    for file, why in faults.items():
        print(json.dumps({"file": str(file), "error": why}, ensure_ascii=False))
    failed, total = len(faults), len(faults) + len(files)
    for start in range(0, len(files), args.batch_size):
        for file, answer in _answers(classifier, files[start : start + args.batch_size], args.top_k):
            failed += "error" in answer
            print(json.dumps({"file": str(file), **answer}, ensure_ascii=False))
    if failed:
        print(f"crossalign: {failed} of {total} images could not be read", file=sys.stderr)
    if failed == total:
        raise UserError("none of the images could be read")


def _answers(classifier: ImageClassifier, files: list[Path], top_k: int) -> Iterator[tuple[Path, dict[str, object]]]:
    """The answers for one batch; if a file in it is bad, file by file."""
    try:
        predictions = classifier.predict(list(files), batch_size=len(files), top_k=top_k)
    except UserError as error:
        if len(files) == 1:
            yield files[0], {"error": str(error)}
            return
        for file in files:
            yield from _answers(classifier, [file], top_k)
        return
    for file, classes in zip(files, predictions, strict=True):
        yield file, classes[0] if top_k == 1 else {"classes": classes}


def _files(paths: list[Path], faults: dict[Path, str]) -> Iterator[Path]:
    """The files that are named, and the pictures below folders; ``faults`` is given what cannot be read there."""
    from crossalign.data.sources import EXTENSIONS, files_below

    for path in paths:
        if path.is_dir():
            inside = files_below(path, EXTENSIONS, faults)
            if not inside:
                raise UserError(f"no images in the folder {path} (looked for {', '.join(sorted(EXTENSIONS))})")
            yield from inside
        elif path.is_file():
            yield path
        else:
            raise UserError(f"no such file or folder: {path}")


PREDICT = Verb(PredictArgs, run)
