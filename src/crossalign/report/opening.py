"""What a page opens with: its first sentences, a few large numbers, and where everything comes from."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from crossalign.core.refs import Ref
from crossalign.report.tables import plain
from crossalign.report.words import counted, duration, number, percent, size
from crossalign.results.frame import Results
from crossalign.results.questions import PREDICTS
from crossalign.results.rows import Row, by_block
from crossalign.runs.records import Run, Study
from crossalign.stats import wilson

if TYPE_CHECKING:
    from pandas import DataFrame

Named = list[tuple[str, str]]


def image_headline(rows: list[Row], top: Row) -> str:
    """The first sentence of a page of classifiers: one run with its interval over test images, or the best of the rows."""
    run = top.first
    where = f" with {Ref(top.model).short_name}" if top.model else ""
    accuracy, over_images = top.accuracy
    if accuracy.n == 0:  # as in a sweep
        validation = percent(top.mean("validation", "accuracy").mean)
        text = f"“{top.label}” classified {validation} % of the validation images correctly ({counted(len(top.runs), 'seed')})"
        return f"{text}; no test image was scored."
    if len(rows) == len(top.runs) == 1:
        text = f"“{run.name}”{where} classified {percent(accuracy.mean)} % of the test images correctly"
        n = run.number("test", "n")
        if not n > 0:
            return f"{text} (seed {run.seed})."
        low, high = wilson(round(accuracy.mean * n), int(n))
        return f"{text} ({counted(int(n), 'image')}, 95 % interval {percent(low, 1)} to {percent(high, 1)}; seed {run.seed})."
    spread = f" ± {percent(accuracy.error)}" if accuracy.error is not None else ""
    over = ", ± over test images" if over_images else ""
    chosen = f"; of {len(rows)} rows it has the highest validation accuracy" if len(rows) > 1 else ""
    return (
        f"“{top.label}”{where} classified {percent(accuracy.mean)}{spread} % of the test images correctly "
        f"({counted(accuracy.n, 'seed')}{over}{chosen})."
    )


def image_remarks(run: Run, single: bool) -> list[str]:
    """What answering without looking would give, and of a single run how sure it is; nothing where predictions are absent."""
    predictions = run.predictions
    if predictions is None or not len(predictions.label):
        return []
    commonest = np.unique(predictions.label, return_counts=True)[1].max() / len(predictions.label)
    remarks = [f"Always answering the commonest class would give {percent(float(commonest), 1)} %."]
    confidence, accuracy = float(predictions.confidence.mean()), float(predictions.correct.mean())
    if not single or math.isnan(confidence):
        return remarks
    gap = confidence - accuracy
    kind = "well calibrated on average" if abs(gap) < 0.01 else "overconfident" if gap > 0 else "underconfident"
    return [*remarks, f"It is {kind}: mean confidence {percent(confidence, 1)} % against {percent(accuracy, 1)} % correct."]


def text_headline(results: Results, contrasts: DataFrame) -> str:
    """The first sentence of a page of language models."""
    rows = counted(len(results.row), "row")
    if not len(contrasts):
        return f"{counted(len(results.study.complete), 'run')} of {rows}."
    seeds = {t.n for t in contrasts.t if t is not None}
    if not seeds:
        return f"{counted(len(results.study.complete), 'run')} of {rows}, of which none could be compared."
    if seeds == {1}:
        return f"{rows} of one seed: differences are shown, of chance nothing can be said."
    verdicts = list(contrasts.verdict[contrasts.question == PREDICTS.name])
    return (
        f"Of {counted(len(verdicts), 'comparison')} of losses with those of the row without any term, "
        f"{verdicts.count('gain')} show a lower loss and {verdicts.count('loss')} a higher one after correction; of the rest "
        "no difference could be shown."
    )


def run_facts(run: Run) -> Named:
    """Of the one run of a page of classifiers."""
    return [
        ("test accuracy", f"{percent(run.number('test', 'accuracy'), 1)} %"),
        ("calibration error", f"{percent(run.number('test', 'ece'), 1)} %"),
        ("best epoch", f"{run.number('best_epoch'):g} of {run.number('epochs'):g}"),
        ("parameters that train", number(run.number("parameters", "trainable"), 0)),
        ("training", duration(run.number("seconds", "train"))),
        ("peak memory", size(run.number("peak_memory_bytes"))),
    ]


def image_facts(study: Study, rows: list[Row], top: Row) -> Named:
    """Of several runs of classifiers."""
    seeds = sorted({len(row.runs) for row in rows})
    return [
        ("best validation accuracy", f"{percent(top.mean('validation', 'accuracy').mean, 1)} %"),
        ("its test accuracy", f"{percent(top.mean('test', 'accuracy').mean, 1)} %"),
        ("rows", str(len(rows))),
        ("seeds a row", " to ".join(dict.fromkeys((str(seeds[0]), str(seeds[-1]))))),
        ("test images", number(top.first.number("test", "n"), 0)),
        ("time of all runs", _time(study)),
    ]


def text_facts(study: Study, rows: list[Row]) -> Named:
    """Of language models."""
    models = [group[0].first for group in by_block(rows).values()]
    return [
        ("rows", str(len(rows))),
        ("runs", str(len(study.complete))),
        ("parameters", ", ".join(number(run.number("parameters", "total"), 0) for run in models)),
        ("tokens a run", ", ".join(number(run.number("tokens"), 0) for run in models)),
        ("time of all runs", _time(study)),
    ]


def _time(study: Study) -> str:
    seconds = [run.number("seconds", stage) for run in study.complete for stage in ("align", "train")]
    return duration(sum(s for s in seconds if not math.isnan(s)))


def provenance(study: Study) -> tuple[tuple[str, str], ...]:
    """Data, seeds, hardware, commit and time of the runs, each as distinct values."""
    runs = study.complete or study.runs
    times = sorted(filter(None, (str(run.environment.get("started") or "") for run in runs)))
    pairs = {
        "Data": _distinct(run.text("data") for run in runs),
        "Seeds": _distinct(str(seed) for seed in sorted({run.seed for run in runs})),
        "Device": _distinct(run.text("device") for run in runs),
        "Hardware": _distinct(_hardware(run.environment) for run in runs),
        "Commit": _distinct(
            f"{run.environment.get('git_commit') or 'not recorded'}"
            + (" with uncommitted changes" if run.environment.get("git_changed") else "")
            for run in runs
        ),
        "Started": " to ".join(dict.fromkeys((times[0], times[-1]))) if times else "",
    }
    return tuple((name, value) for name, value in pairs.items() if value)


def _distinct(values: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(filter(None, values)))


def _hardware(environment: dict[str, Any]) -> str:
    gpus = environment.get("gpus") or []
    parts = [plain(gpu) for gpu in gpus] if isinstance(gpus, list) else [str(gpus)]
    parts += [str(environment.get("cpu") or "")]
    for key, unit in (("cores", "cores"), ("threads", "threads"), ("memory_bytes", "memory")):
        parts += [f"{plain(environment[key], key)} {unit}"] if environment.get(key) else []
    return ", ".join(filter(None, parts))
