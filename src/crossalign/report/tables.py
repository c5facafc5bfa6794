"""The report's tables as plain text cells: the page, the Markdown file and the terminal each draw the same ones."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crossalign.report.blocks import Table
from crossalign.report.words import UNKNOWN, duration, number, percent, size
from crossalign.results.rows import Row, differing, flat, settings
from crossalign.runs.records import Run, Study


def number_text(value: float) -> str:
    """A setting such as a learning rate, short: ``0.001``, ``3e-05``."""
    return UNKNOWN if math.isnan(value) else f"{value:g}"


def efficiency_table(rows: list[Row], rate: str = "images_per_second") -> Table:
    """CMDA's Table 2 and what it leaves out: counts, time, rate, memory, precision and device."""
    shown = []
    for row in rows:
        trainable, total = (row.mean("parameters", key).mean for key in ("trainable", "total"))
        align, train = row.mean("seconds", "align").mean, row.mean("seconds", "train").mean
        shown.append(
            [
                row.label,
                number(trainable, 0),
                number(total, 0),
                f"{number(100 * trainable / total)} %" if total > 0 else UNKNOWN,
                duration(align) if align > 0 else UNKNOWN,
                duration(train),
                number(row.mean(rate).mean, 0),
                size(row.mean("peak_memory_bytes").mean),
                ", ".join(row.distinct("precision")),
                ", ".join(row.distinct("device")),
            ]
        )
    columns = ["Method", "Trainable", "Total", "Share", "Alignment", "Training"]
    columns += [f"{rate.split('_')[0].capitalize()}/s", "Peak memory", "Precision"]
    notes = [
        "Parameters are counted once each. Times, rates and memory are means over seeds, measured on the device named; runs "
        "that shared it with others are slower, so rows are compared in speed by a benchmark only."
    ]
    return Table("Efficiency", [*columns, "Device"], shown, notes, frozenset({8, 9}))


def parameter_table(run: Run) -> Table | None:
    """Trainable parameters by group, of one run."""
    groups = ((run.result or {}).get("parameters") or {}).get("groups") or {}
    if not isinstance(groups, dict) or not groups:
        return None
    shown = [[str(name), number(float(count), 0)] for name, count in groups.items() if isinstance(count, int | float)]
    shown.append(["all that train", number(run.number("parameters", "trainable"), 0)])
    return Table("Trainable parameters", ["Group", "Parameters"], shown, strong=frozenset({len(shown) - 1}), narrow=True)


def sweep_table(study: Study) -> Table | None:
    """Validation accuracy, or loss, at every learning rate tried; the chosen one is marked."""
    entries = [entry for entry in study.sweep if {"row", "learning_rate"} <= set(entry) and _sweep_kind(entry)]
    if not entries:
        return None
    kind = _sweep_kind(entries[0])
    units = {"validation_accuracy": "accuracy (%)", "validation_loss": "loss (nats a token)"}
    what = units.get(kind, kind.removeprefix("validation_"))
    many = len({entry["study"] for entry in entries}) > 1
    rows = list(dict.fromkeys(_sweep_name(entry, many) for entry in entries))
    rates = sorted({float(entry["learning_rate"]) for entry in entries})
    if len(rates) > 8:
        shown = [
            [
                _sweep_name(e, many),
                number_text(float(e["learning_rate"])),
                *_sweep_cell(e),
                str(e.get("epochs", UNKNOWN)),
            ]
            for e in entries
        ]
        columns = ["Row", "Learning rate", f"Validation {what}", "Epochs"]
        return Table("Learning-rate sweep", columns, shown, ["✓: chosen by it."])
    held: dict[tuple[str, float], list[str]] = {
        (_sweep_name(entry, many), float(entry["learning_rate"])): _sweep_cell(entry) for entry in entries
    }
    shown = [[name, *("".join(held.get((name, rate), [UNKNOWN])) for rate in rates)] for name in rows]
    epochs = sorted({str(entry.get("epochs")) for entry in entries if entry.get("epochs") is not None})
    when = f" after {' or '.join(epochs)} epochs" if epochs else ""
    notes = [f"Validation {what}{when}; ✓: chosen."]
    return Table("Learning-rate sweep", ["Row", *map(number_text, rates)], shown, notes)


def _sweep_name(entry: dict[str, Any], many: bool) -> str:
    return f"{entry['row']}, {entry['study']}" if many else str(entry["row"])


def _sweep_kind(entry: dict[str, Any]) -> str:
    return next((key for key in entry if key.startswith("validation_")), "")


def _sweep_cell(entry: dict[str, Any]) -> list[str]:
    kind = _sweep_kind(entry)
    value = float(entry[kind]) if isinstance(entry[kind], int | float) else math.nan
    shown = percent(value) if kind == "validation_accuracy" else number(value, 4)
    return [shown + (" ✓" if entry.get("chosen") else "")]


def incomplete_table(runs: Sequence[Run]) -> Table | None:
    """Runs without a result: they are in no mean, and here so that none is lost without a word."""
    if not runs:
        return None
    shown = []
    for run in runs:
        epochs = [row["epoch"] for row in run.metrics if row.get("stage") == "train" and "epoch" in row]
        reached = f"epoch {max(epochs):g}" if epochs else "alignment" if run.metrics else "no step"
        wanted = next((value for key, value in flat(run.config) if key == "loop.epochs"), "?")
        shown.append([run.name, str(run.seed), f"{reached} of {wanted}" if epochs else reached, str(run.folder)])
    notes = ["These runs have no result.json: they were stopped or are still running. No number above contains them."]
    return Table("Incomplete runs", ["Row", "Seed", "Reached", "Folder"], shown, notes, frozenset({2, 3}))


def setting_table(rows: list[Row]) -> Table | None:
    """What the rows' settings do not share."""
    keys = differing(row.first for row in rows)
    if not keys:
        return None
    shown = []
    for row in rows:
        held = settings(row.first)
        shown.append([row.label, "; ".join(f"{key} = {plain(held[key])}" for key in keys if key in held)])
    return Table("Settings that differ between rows", ["Row", "Settings"], shown, texts=frozenset({1}))


def shared_settings(rows: list[Row]) -> dict[str, Any]:
    """The settings that all rows have in common, as flat keys."""
    keys = set(differing(row.first for row in rows))
    return {key: value for key, value in settings(rows[0].first).items() if key not in keys}


def plain(value: Any, key: str = "") -> str:
    """A setting's value as one would type it; bytes, by the name of their ``key``, as MB or GB."""
    if isinstance(value, list | tuple):
        return ", ".join(plain(item) for item in value)
    if isinstance(value, int) and key.endswith("bytes"):
        return size(value)
    return "none" if value is None else "(empty)" if value == "" else str(value)


def environment_table(runs: Iterable[Run]) -> Table | None:
    """Versions and hardware of all runs; what differs between them is listed value by value."""
    held: dict[str, dict[str, None]] = {}
    for run in runs:
        for key, value in flat(run.environment):
            if key != "command":
                held.setdefault(key, {})[plain(value, key)] = None
    if not held:
        return None
    shown = [
        [key, " / ".join(values) if len(values) <= 3 else f"{len(values)} values, from {min(values)} to {max(values)}"]
        for key, values in held.items()
    ]
    return Table("Environment", ["What", "Value"], shown, texts=frozenset({1}))


def confusion_table(labels: Sequence[str], counts: NDArray[np.int64], seeds: int = 1, most: int = 5) -> Table | None:
    """The pairs of classes that are mistaken for each other most often; ``counts``: (true class, predicted class)."""
    pairs = [(int(count), i, j) for (i, j), count in np.ndenumerate(counts) if i != j and count]
    if not pairs:
        return None
    pairs.sort(key=lambda found: -found[0])
    shown = [[labels[i], labels[j], f"{count:,} of {counts[i].sum():,}"] for count, i, j in pairs[:most]]
    notes = [f"Counted over {seeds} seeds of the same test images."] if seeds > 1 else []
    return Table("Most frequent confusions", ["True class", "Taken for", "Images"], shown, notes, frozenset({1}))
