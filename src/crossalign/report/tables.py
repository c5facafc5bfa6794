"""The report's tables as plain text cells: the page, the Markdown file and the terminal each draw the same ones."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crossalign.core.refs import Ref
from crossalign.report.blocks import Table
from crossalign.report.words import UNKNOWN, difference_text, duration, mean_text, number, percent, size
from crossalign.results.contrasts import contrasts
from crossalign.results.frame import Results
from crossalign.results.outcomes import ACCURACY, HELD_OUT, Outcome
from crossalign.results.questions import before_and_after, beside_baseline
from crossalign.results.rows import Row, best, blocks, by_block, differing, flat, settings
from crossalign.runs.records import Run, Study
from crossalign.stats import mean_and_error

ONE_SEED = "† One seed: the ± is the standard error over {} and says nothing of other seeds."


def number_text(value: float) -> str:
    """A setting such as a learning rate, short: ``0.001``, ``3e-05``."""
    return UNKNOWN if math.isnan(value) else f"{value:g}"


def plain(value: Any, key: str = "") -> str:
    """A setting's value as one would type it; bytes, by the name of their ``key``, as MB or GB."""
    if isinstance(value, list | tuple):
        return ", ".join(plain(item) for item in value)
    if isinstance(value, int) and key.endswith("bytes"):
        return size(value)
    return "none" if value is None else "(empty)" if value == "" else str(value)


def accuracy_table(results: Results) -> Table:
    """CMDA's Table 1: test accuracy and its difference from the FPT row without alignment, each ± standard error."""
    rows = list(results.row.values())
    many = len({row.backbone for row in rows if row.backbone}) > 1
    changes = {
        contrast.other: change_text(ACCURACY, contrast)
        for contrast in contrasts(results, beside_baseline(results)).itertuples()
    }
    lines = []
    for row in rows:
        accuracy, over_images = row.accuracy
        backbone = {"Backbone": Ref(row.model).short_name or UNKNOWN} if many else {}
        lines.append(
            {"Method": row.label}
            | backbone
            | {
                "Test accuracy (%)": mean_text(accuracy, 2, 100) + "†" * over_images,
                "Δ from FPT baseline": changes.get(row.label, UNKNOWN),
                "Test loss": mean_text(row.mean("test", "loss"), 3),
                "ECE (%)": percent(row.mean("test", "ece").mean),
                "Validation accuracy (%)": percent(row.mean("validation", "accuracy").mean),
                "Learning rate": ", ".join(sorted({number_text(run.number("learning_rate")) for run in row.runs})),
                "Seeds": str(len(row.runs)),
            }
        )
    strong = [rows.index(best(block)) for block in blocks(rows)] if len(rows) > 1 else []
    notes = ["Mean ± standard error over seeds. Δ in percentage points, paired by seed. ECE: expected calibration error."]
    notes += ["Bold: the highest validation accuracy; the test set chose nothing."] * bool(strong)
    table = Table.of("Test results", lines, notes, ["Backbone"], strong)
    return table.noting("†", ONE_SEED.format("test images"))


def change_text(outcome: Outcome, contrast: Any) -> str:
    """A difference with its standard error over seeds, or over items (†) where there is one seed; a dash without either."""
    if contrast is None or contrast.t is None:
        return UNKNOWN if contrast is None else f"{UNKNOWN} ({contrast.reason})"
    if contrast.t.interval is None and contrast.over_items is None:
        return UNKNOWN
    error, mark = (contrast.t.error, "") if contrast.t.n > 1 else (contrast.over_items[0], "†")
    return difference_text(outcome, contrast.t.difference, error) + mark


def text_tables(results: Results) -> list[Table]:
    """For each model: perplexity of every text and alignment of held-out pairs, each mean ± standard error over seeds."""
    notes = [
        "Mean ± standard error over seeds. Alignment: debiased linear CKA of held-out captions with the teacher's features "
        "of their images; 0 for unrelated ones, however many pairs. Directions: participation ratio of the captions' features.",
        "Perplexities are of this vocabulary's tokens; bits a byte, comparable across tokenizers, are in result.json.",
    ]
    models = by_block(results.row.values())
    tables = []
    for model, rows in models.items():
        texts = dict.fromkeys(name for row in rows for run in row.runs for name in (run.result or {}).get("scores") or {})
        lines = [
            {"Row": row.label}
            | {f"Perplexity, {text}": mean_text(row.mean("scores", text, "perplexity")) for text in texts}
            | {f"Loss (nats a token), {text}": mean_text(row.mean("scores", text, "loss"), 4) for text in texts}
            | {"Alignment, held out": mean_text(row.mean("held_out", HELD_OUT), 3)}
            | {"Directions": mean_text(row.mean("held_out", "held_out_directions"), 1), "Seeds": str(len(row.runs))}
            for row in rows
        ]
        tables.append(Table.of(f"Results: {model}" if len(models) > 1 else "Results", lines, notes))
    return tables


def forgetting_table(results: Results) -> Table:
    """What a language model forgot when it became a classifier (CMDA §4.1): scores of text tasks before and after, by row."""
    lines = []
    for contrast in contrasts(results, before_and_after(results)).itertuples():
        if contrast.t is None:
            continue
        outcome = results.outcome[contrast.outcome]
        outcome = replace(outcome, digits=2 if outcome.share else 3)
        error, mark = contrast.t.error, ""
        if contrast.t.n == 1 and contrast.change is not None and not math.isnan(contrast.change.error):
            error, mark = contrast.change.error, "†"
        metric = outcome.name.rpartition(".")[2]
        task = outcome.label.removesuffix(f" {metric}")
        before, after = (
            mean_text(mean_and_error(values), outcome.digits, outcome.scale)
            for values in (contrast.reference_values, contrast.other_values)
        )
        lines.append(
            {
                "Method": contrast.other,
                "Task": f"{task} ({'acc, %' if outcome.share else outcome.unit})",
                "Before": before,
                "After": after,
                "Difference": difference_text(outcome, contrast.t.difference, error) + (" (no ±)" if error is None else mark),
                "Seeds": str(contrast.t.n),
            }
        )
    notes = ["`crossalign evaluate` of the backbone under its own language head. Mean ± standard error over seeds."]
    return Table.of("What the language model forgot", lines, notes, ["Task"]).noting("†", ONE_SEED.format("documents"))


def efficiency_table(rows: list[Row], rate: str = "images_per_second") -> Table:
    """CMDA's Table 2 and what it leaves out: counts, time, rate, memory, precision and device."""
    lines = []
    for row in rows:
        trainable, total = (row.mean("parameters", key).mean for key in ("trainable", "total"))
        align, train = row.mean("seconds", "align").mean, row.mean("seconds", "train").mean
        lines.append(
            {
                "Method": row.label,
                "Trainable": number(trainable, 0),
                "Total": number(total, 0),
                "Share": f"{number(100 * trainable / total)} %" if total > 0 else UNKNOWN,
                "Alignment": duration(align) if align > 0 else UNKNOWN,
                "Training": duration(train),
                f"{rate.split('_')[0].capitalize()}/s": number(row.mean(rate).mean, 0),
                "Peak memory": size(row.mean("peak_memory_bytes").mean),
                "Precision": ", ".join(row.distinct("precision")),
                "Device": ", ".join(row.distinct("device")),
            }
        )
    notes = [
        "Parameters are counted once each. Times, rates and memory are means over seeds, measured on the device named; runs "
        "that shared it with others are slower, so rows are compared in speed by a benchmark only."
    ]
    return Table.of("Efficiency", lines, notes, ["Precision", "Device"])


def parameter_table(run: Run) -> Table:
    """Trainable parameters by group, of one run."""
    groups = ((run.result or {}).get("parameters") or {}).get("groups")
    counts = [(str(name), count) for name, count in groups.items()] if isinstance(groups, dict) else []
    counts += [("all that train", run.number("parameters", "trainable"))] if counts else []
    lines = [{"Group": name, "Parameters": number(float(n), 0)} for name, n in counts if isinstance(n, int | float)]
    return Table.of("Trainable parameters", lines, strong=[len(lines) - 1], narrow=True)


def sweep_table(study: Study) -> Table:
    """Validation accuracy, or loss, at every learning rate tried; the chosen one is marked."""
    kinds = [(entry, next((key for key in entry if key.startswith("validation_")), "")) for entry in study.sweep]
    kinds = [(entry, kind) for entry, kind in kinds if {"row", "learning_rate", kind} <= set(entry)]
    many = len({entry["study"] for entry, _ in kinds}) > 1
    cells: dict[str, dict[float, tuple[str, Any]]] = {}
    for entry, kind in kinds:
        value = float(entry[kind]) if isinstance(entry[kind], int | float) else math.nan
        text = percent(value) if kind == "validation_accuracy" else number(value, 4)
        text += " ✓" if entry.get("chosen") else ""
        row = f"{entry['row']}, {entry['study']}" if many else str(entry["row"])
        cells.setdefault(row, {})[float(entry["learning_rate"])] = text, entry.get("epochs", UNKNOWN)
    measure = kinds[0][1].removeprefix("validation_") if kinds else ""
    measure += {"accuracy": " (%)", "loss": " (nats a token)"}.get(measure, "")
    rates = sorted({rate for own in cells.values() for rate in own})
    if len(rates) > 8:
        lines = [
            {"Row": row, "Learning rate": number_text(rate), f"Validation {measure}": text, "Epochs": str(epochs)}
            for row, own in cells.items()
            for rate, (text, epochs) in own.items()
        ]
        return Table.of("Learning-rate sweep", lines, ["✓: chosen by it."])
    lines = [
        {"Row": row} | {number_text(rate): own[rate][0] if rate in own else UNKNOWN for rate in rates}
        for row, own in cells.items()
    ]
    epochs = sorted({str(n) for own in cells.values() for _, n in own.values()} - {UNKNOWN, "None"})
    when = f" after {' or '.join(epochs)} epochs" if epochs else ""
    return Table.of("Learning-rate sweep", lines, [f"Validation {measure}{when}; ✓: chosen."])


def incomplete_table(runs: Sequence[Run]) -> Table:
    """Runs without a result: they are in no mean, and here so that none is lost without a word."""
    lines = []
    for run in runs:
        epochs = [row["epoch"] for row in run.metrics if row.get("stage") == "train" and "epoch" in row]
        reached = f"epoch {max(epochs):g}" if epochs else "alignment" if run.metrics else "no step"
        reached += f" of {dict(flat(run.config)).get('loop.epochs', '?')}" if epochs else ""
        lines.append({"Row": run.name, "Seed": str(run.seed), "Reached": reached, "Folder": str(run.folder)})
    notes = ["These runs have no result.json: they were stopped or are still running. No number above contains them."]
    return Table.of("Incomplete runs", lines, notes, ["Reached", "Folder"])


def setting_table(rows: list[Row]) -> Table:
    """What the rows' settings do not share."""
    keys = differing(row.first for row in rows)
    lines = []
    for row in rows if keys else ():
        own = settings(row.first)
        lines.append({"Row": row.label, "Settings": "; ".join(f"{key} = {plain(own[key])}" for key in keys if key in own)})
    return Table.of("Settings that differ between rows", lines, texts=["Settings"])


def shared_settings(rows: list[Row]) -> dict[str, Any]:
    """The settings that all rows have in common, as flat keys."""
    keys = set(differing(row.first for row in rows))
    return {key: value for key, value in settings(rows[0].first).items() if key not in keys}


def environment_table(runs: Iterable[Run]) -> Table:
    """Versions and hardware of all runs; what differs between them is listed value by value."""
    values: dict[str, dict[str, None]] = {}
    for key, value in (entry for run in runs for entry in flat(run.environment)):
        values.setdefault(key, {})[plain(value, key)] = None
    lines = [
        {"What": key, "Value": " / ".join(v) if len(v) <= 3 else f"{len(v)} values, from {min(v)} to {max(v)}"}
        for key, v in values.items()
        if key != "command"
    ]
    return Table.of("Environment", lines, texts=["Value"])


def confusion_table(labels: Sequence[str], counts: NDArray[np.int64], seeds: int = 1, most: int = 5) -> Table:
    """The pairs of classes that are mistaken for each other most often; ``counts``: (true class, predicted class)."""
    pairs = [(int(count), i, j) for (i, j), count in np.ndenumerate(counts) if i != j and count]
    pairs.sort(key=lambda pair: -pair[0])
    lines = [
        {"True class": labels[i], "Taken for": labels[j], "Images": f"{count:,} of {counts[i].sum():,}"}
        for count, i, j in pairs[:most]
    ]
    notes = [f"Counted over {seeds} seeds of the same test images."] if seeds > 1 else []
    return Table.of("Most frequent confusions", lines, notes, ["Taken for"])
