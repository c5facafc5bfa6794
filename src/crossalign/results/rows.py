"""Rows of a table: runs that differ by their seed alone, in the study's order, and what a reader must be warned of."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from crossalign.core.refs import UNTRAINED, Ref
from crossalign.runs.records import Run, Study
from crossalign.stats import Mean, mean_and_error

METHODS = ("fpt", "lora", "full", "none", "vit")
WEIGHTS = ("pretrained", "shuffled", "random", "none")
ALIGNMENTS = ("none", "mse", "cosine", "mmd", "coral", "sinkhorn", "otdd")

TRAINING = {"pretrain": "pre-training", "finetune": "fine-tuning", "finetune lora": "LoRA fine-tuning"}
"""What a verb, or a verb with a method, does, whose rows are compared with none that were trained otherwise. Their weights are
no question: all of them learn text from the same ones."""
NO_IMAGES = ("captions", "l1", "l2", "koleo", "l1-weights", "l2-weights")
"""Terms that look at no image: controls of those that do."""

NOT_SETTINGS = ("output", "seed", "row", "overwrite", "tracking", "loop.checkpoint_minutes", "loop.log_every")
"""Configuration keys that do not change what a run computes, or that differ between seeds by design."""


class Fact:
    """A text that result.json has under this name, the same for all runs of a row."""

    def __init__(self, usual: str = "") -> None:
        self.usual = usual

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, row: Row, owner: type) -> str:
        return row.first.text(self.name) or self.usual


@dataclass(frozen=True)
class Row:
    """Complete runs of one setting, by seed."""

    label: str
    runs: tuple[Run, ...]
    verb = Fact()
    method = Fact()
    weights = Fact()
    teacher = Fact()
    data = Fact()
    align = Fact("none")
    mode = Fact("paired")
    """What the term pairs texts with: the images of its own captions, or others."""

    @property
    def first(self) -> Run:
        return self.runs[0]

    @property
    def backbone(self) -> str:
        return self.first.backbone

    @property
    def model(self) -> str:
        """The language model inside; empty for the controls that have none."""
        return "" if self.method in ("none", "vit") else self.backbone

    @property
    def control(self) -> bool:
        """Whether it shows what comes of it without images, or without pretrained weights."""
        blind = self.align in NO_IMAGES or self.mode != "paired" or Ref(self.teacher).control in UNTRAINED
        return blind or (self.weights != "pretrained" and self.verb not in TRAINING)

    @property
    def block(self) -> str:
        """The rows that it can be compared with: of one data set and backbone; of texts, also of one kind of training."""
        training = TRAINING.get(f"{self.verb} {self.method}") or TRAINING.get(self.verb, "training")
        return f"{Ref(self.backbone).short_name}, {training} on {self.data}"

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(run.seed for run in self.runs)

    def mean(self, *keys: str) -> Mean:
        """Mean and standard error over seeds of a number in result.json."""
        return mean_and_error([run.number(*keys) for run in self.runs])

    @property
    def accuracy(self) -> tuple[Mean, bool]:
        """Test accuracy with its standard error; of one seed (True) that is over test images, where their number is known."""
        accuracy, n = self.mean("test", "accuracy"), self.first.number("test", "n")
        if accuracy.n != 1 or not n > 0:
            return accuracy, False
        return replace(accuracy, error=math.sqrt(accuracy.mean * (1 - accuracy.mean) / n)), True

    def distinct(self, key: str) -> list[str]:
        """The values of a top-level key of result.json over the seeds, each once."""
        return list(dict.fromkeys(str((run.result or {}).get(key, "")) for run in self.runs))


def group_rows(study: Study, strict: bool = False) -> tuple[list[Row], list[str]]:
    """The study's complete runs as rows in order, and a sentence for each run that one of the same seed replaces.

    ``strict``: also apart by every setting, whatever the runs are called.
    """
    groups: dict[tuple[str, ...], dict[int, Run]] = {}
    warnings = []
    for run in study.complete:
        key = (*_identity(run), repr(sorted(settings(run).items()))) if strict else _identity(run)
        same_seed = groups.setdefault(key, {}).get(run.seed)
        if same_seed is not None:
            run, dropped = sorted((same_seed, run), key=lambda r: str(r.environment.get("started", "")), reverse=True)
            warnings.append(
                f"Two runs are called “{run.name}” with seed {run.seed}: {run.folder} is used and {dropped.folder} is left out."
            )
        groups[key][run.seed] = run
    return _order(study, groups), warnings


def _identity(run: Run) -> tuple[str, ...]:
    """What runs of one row share by name."""
    return run.name, run.backbone, run.text("data"), run.text("method"), run.text("weights"), run.text("align")


def _order(study: Study, groups: dict[tuple[str, ...], dict[int, Run]]) -> list[Row]:
    rows = [Row("", tuple(runs[seed] for seed in sorted(runs))) for runs in groups.values()]
    data = list(dict.fromkeys(row.data for row in rows))
    backbones = [name for name in dict.fromkeys(row.backbone for row in rows) if name] + [""]

    def position(known: Sequence[str], name: str) -> tuple[int, str]:
        return (known.index(name), "") if name in known else (len(known), name)

    def key(row: Row) -> tuple[Any, ...]:
        control = row.weights != "pretrained"
        natural = (control, position(METHODS, row.method), position(WEIGHTS, row.weights), position(ALIGNMENTS, row.align))
        block = (position(data, row.data), position(backbones, row.backbone))
        return (*block, position(study.rows, row.first.name)[0], *natural, row.first.name)

    rows.sort(key=key)
    return [Row(_label(row, rows), row.runs) for row in rows]


def _label(row: Row, rows: list[Row]) -> str:
    """The row's name, with whatever else tells it from rows of the same name."""
    twins = [other for other in rows if other.first.name == row.first.name and other is not row]
    identity = _identity(row.first)
    identities = [_identity(twin.first) for twin in twins]
    name, _, data, method, weights, align = identity
    backbone = Ref(row.backbone).short_name or "no backbone"
    parts = [name]
    texts = (backbone, data, f"method {method}", f"weights {weights}", f"align {align}")
    for i, text in enumerate(texts, start=1):
        if any(other[i] != identity[i] for other in identities):
            parts.append(text)
    alike = [twin.first for twin in twins if _identity(twin.first) == identity]
    row_settings = settings(row.first)
    parts += [f"{key} {row_settings.get(key)}" for key in differing([row.first, *alike])]
    return ", ".join(parts)


def by_block(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows that can be compared, of one kind of training of one model on the same data, under the name of their block."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.block, []).append(row)
    return groups


def blocks(rows: list[Row]) -> list[list[Row]]:
    """Rows that can be compared: of one data set and one backbone. Rows without a backbone belong to each of them."""
    keys = dict.fromkeys((row.data, row.backbone) for row in rows if row.backbone)
    for row in rows:
        if not row.backbone and not any(data == row.data for data, _ in keys):
            keys[row.data, ""] = None
    return [[row for row in rows if row.data == data and row.backbone in ("", backbone)] for data, backbone in keys]


def baseline(row: Row, rows: list[Row]) -> Row | None:
    """The FPT row without alignment, on pretrained weights, of the same data and backbone.

    None where there is none, or where a row without a backbone could mean several.
    """
    plain = [
        other
        for other in rows
        if (other.method, other.align, other.weights, other.data) == ("fpt", "none", "pretrained", row.data)
        and (other.backbone == row.backbone or not row.backbone)
    ]
    return plain[0] if len({other.backbone for other in plain}) == 1 else None


def best(rows: list[Row]) -> Row:
    """The row of the highest mean *validation* accuracy: the test set chooses nothing, not even what is shown first."""
    return max(rows, key=lambda row: float(np.nan_to_num(row.mean("validation", "accuracy").mean, nan=-1)))


def flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested settings as ``("optim.lr", 0.001)`` pairs."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def settings(run: Run) -> dict[str, Any]:
    """A run's configuration as flat keys, without those that do not change what it computes."""
    return {
        key: value
        for key, value in flat(run.config)
        if not any(key == name or key.startswith(f"{name}.") for name in NOT_SETTINGS)
    }


def differing(runs: Iterable[Run]) -> list[str]:
    """Settings that are not the same in all runs."""
    tables = [settings(run) for run in runs]
    keys = dict.fromkeys(key for table in tables for key in table)
    return [key for key in keys if len({repr(table.get(key)) for table in tables}) > 1]


def warnings(study: Study, rows: list[Row]) -> list[str]:
    """Sentences on what makes rows less comparable than the table makes them look."""
    texts = []
    data = list(dict.fromkeys(row.data for row in rows))
    if len(data) > 1:
        listed = "; ".join(f"“{name}”" for name in data)
        texts.append(f"The rows are from {len(data)} data sets and are compared only within each: {listed}.")
    for block in blocks(rows):
        texts += _uneven(block)
    for row in rows:
        changed = differing(row.runs)
        if changed:
            texts.append(f"Runs of “{row.label}” differ in more than their seed: {', '.join(changed)}.")
        # What the alignment stage itself warned of, such as a collapse.
        warned = {run.seed: ((run.result or {}).get("alignment") or {}).get("warning") for run in row.runs}
        warned = {seed: warning for seed, warning in warned.items() if warning}
        if warned:
            which = f"seed{'s' if len(warned) > 1 else ''} {', '.join(map(str, warned))}"
            texts.append(f"Alignment stage of “{row.label}”, {which}: {next(iter(warned.values()))}")
    for run in study.complete:
        _ = run.predictions, run.samples  # reading them leaves a note where they are damaged
    return list(dict.fromkeys([*texts, *(note for run in study.runs for note in run.notes)]))


def _uneven(block: list[Row]) -> Iterator[str]:
    """What rows that are compared do not share: how they were run, test images, seeds."""
    for key in ("precision", "device"):
        kinds: dict[str, list[str]] = {}
        for row in block:
            for kind in row.distinct(key):
                kinds.setdefault(kind or "not stated", []).append(row.label)
        if len(kinds) > 1:
            listed = "; ".join(f"{kind} ({', '.join(labels)})" for kind, labels in kinds.items())
            yield f"Compared rows were not run with the same {key}: {listed}."
    runs = [run for row in block for run in row.runs]
    images = {run.predictions.images for run in runs if run.predictions is not None}
    counts = {run.number("test", "n") for run in runs}
    if len(images) > 1 or len([n for n in counts if not math.isnan(n)]) > 1:
        yield (
            f"Runs on “{block[0].data}” were not all scored on the same test images; runs of different test images are not "
            "paired."
        )
    seeds = sorted({seed for row in block for seed in row.seeds})
    short = [f"“{row.label}” has {', '.join(map(str, row.seeds))}" for row in block if len(row.seeds) < len(seeds)]
    if short:
        yield f"Not every row has every seed ({', '.join(map(str, seeds))}): {'; '.join(short)}."
