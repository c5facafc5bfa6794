"""``predict``: classify image files with a trained model, one JSON line each."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

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
    output: Path | None = None
    """A .csv or .parquet file for the answers, in place of lines; with several classes an image, label_2, score_2 and so on."""


def run(args: PredictArgs, _: str) -> None:
    """Print ``{"file", "label", "score"}`` (or a list of classes for ``top_k`` > 1) for each file, as a line of JSON.

    A file that cannot be read costs its own line only: it is reported as ``{"file", "error"}``, and the rest goes on.

    Raises:
        UserError: no image is named, a path does not exist, a folder has no images, there is no such model or device, no
            image could be read, or ``output`` is no file of a kind that can be written.
    """
    from crossalign.core.device import resolve_device
    from crossalign.core.progress import progress
    from crossalign.models.classifier.model import ImageClassifier

    faults: dict[Path, str] = {}
    if args.output is not None and args.output.suffix not in (".csv", ".parquet"):
        raise UserError(f"--output {args.output} is neither a .csv nor a .parquet file: name one")
    files = list(_files(args.images, faults))
    if not files:
        raise UserError("no images: name files or folders of them after the model")
    device = resolve_device(args.device)
    classifier = ImageClassifier.from_pretrained(args.model, backbone=args.backbone or None).to(device)
    failed, total = 0, len(faults) + len(files)
    rows: list[dict[str, object]] = [{"file": str(file), "error": why} for file, why in faults.items()]
    kept = []
    with progress(len(files), "" if args.output is None else "predicting", unit="image") as bar:
        for start in range(0, len(files), args.batch_size):
            batch = files[start : start + args.batch_size]
            rows += [{"file": str(file), **answer} for file, answer in _answers(classifier, batch, args.top_k)]
            failed += sum("error" in row for row in rows)
            if args.output is None:
                print("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), flush=True)
            else:
                kept += rows
            rows = []
            bar.update(len(batch))
    if args.output is not None:
        _write(args.output, kept)
    if failed:
        print(f"crossalign: {failed} of {total} images could not be read", file=sys.stderr)
    if failed == total:
        raise UserError("none of the images could be read")


def _answers(classifier: ImageClassifier, files: list[Path], top_k: int) -> list[tuple[Path, dict[str, object]]]:
    """The answers for one batch in one pass; a file that cannot be read has its error."""
    import numpy as np

    answers: dict[Path, dict[str, object]] = {}
    pixels = []
    for file in files:
        try:
            pixels.append(classifier.spec.pixels(file))
        except UserError as error:
            answers[file] = {"error": str(error)}
    good = [file for file in files if file not in answers]
    predictions = classifier.predict(np.concatenate(pixels), batch_size=len(files), top_k=top_k) if pixels else []
    for file, classes in zip(good, predictions, strict=True):
        answers[file] = dict(classes[0]) if top_k == 1 else {"classes": classes}
    return [(file, answers[file]) for file in files]


def _write(path: Path, rows: list[dict[str, object]]) -> None:
    """The answers as a table: a row a file, its classes in columns."""
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet

    from crossalign.core.files import atomic_path

    table = []
    for row in rows:
        classes: Any = row.pop("classes", None) or [row]
        named = {f"{key}_{i}" if i > 1 else key: c.get(key) for i, c in enumerate(classes, 1) for key in ("label", "score")}
        table.append({"file": row["file"], **named, "error": row.get("error")})
    columns = {"file": pa.string()}
    for i in range(1, max((len(row) for row in table), default=4) // 2):
        columns |= {"label" if i == 1 else f"label_{i}": pa.string(), "score" if i == 1 else f"score_{i}": pa.float64()}
    data = pa.Table.from_pylist(table, schema=pa.schema(columns | {"error": pa.string()}))
    with atomic_path(path) as temporary:
        (pa.csv.write_csv if path.suffix == ".csv" else pa.parquet.write_table)(data, temporary)


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
