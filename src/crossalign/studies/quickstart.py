"""``quickstart``: both jobs in minutes, without a model hub."""

import time
from pathlib import Path
from statistics import mean
from typing import Any

from crossalign.config.studies import ReproduceArgs
from crossalign.runs.names import RunFolder
from crossalign.runs.schema import read_result
from crossalign.studies.reproduce import reproduce

SEEDS = 3
QUICKSTART: dict[str, tuple[str, tuple[str, ...], str]] = {
    "quickstart": (
        "digits",
        ("data.limit_train=900", "loop.epochs=3", "loop.precision=fp32", "loop.compile=false"),
        "MiniLM, which never saw an image, learns to read 8 × 8 digits; the control has random weights.",
    ),
    "quickstart-text": (
        "text",
        (
            "corpus.source=[python:topics]",
            "corpus.validation_fraction=0.1",
            "corpus.vocabulary=1024",
            "gpt.layers=3",
            "gpt.width=96",
            "block=64",
            "align.weight=0.2",
            "align.every=5",
            "loop.batch_size=16",
            "loop.steps=300",
            "loop.evaluate_every=100",
            "loop.precision=fp32",
            "loop.compile=false",
        ),
        "A small GPT learns Python's documentation; every 5 steps emoji names are pulled towards their pictures, or are not.",
    ),
}
"""Each study's folder, settings, and what it is in a sentence; no time goes into timing number formats."""


def quickstart(output: Path) -> int:
    """Both jobs in minutes, without a hub; prints a table for each, its seconds, and at the end what was shown, where the
    pages are, and what to type next.

    Language → vision: MiniLM and its twin of random weights on digits. Vision → language: a small GPT on Python's own
    documentation, whose features of emoji names are pulled, or not, towards those of the pictures.
    """
    from crossalign.training.precision import timed

    codes, seconds, before = [], {}, timed["seconds"]
    for study, (folder, settings, title) in QUICKSTART.items():
        started = time.monotonic()
        print(title, flush=True)
        codes.append(reproduce(ReproduceArgs(study, output / folder, seeds=SEEDS, set=settings)))
        seconds[folder] = time.monotonic() - started
        print(f"{folder}: {seconds[folder]:.0f} seconds\n", flush=True)
    print(f"{timed['seconds'] - before:.1f} seconds went into timing steps to choose number formats\n")
    if not any(codes):
        print(f"shown: {_shown(output)}")
    pages = " and ".join(str(output / folder / "report.html") for folder in seconds)
    print(f"pages: {pages} ({sum(seconds.values()):.0f} seconds)")
    print(
        "next: crossalign adapt --data.source FOLDER --output runs/pictures, with a folder of pictures for each class in FOLDER"
    )
    return max(codes)


def _shown(output: Path) -> str:
    """What the runs say, in a sentence."""

    def means(folder: str, row: str, *keys: str) -> float:
        values = []
        for seed in range(SEEDS):
            value: Any = read_result(RunFolder(output / folder / row / f"seed-{seed}").result)
            for key in keys:
                value = value[key]
            values.append(float(value))
        return mean(values)

    read, random = (100 * means("digits", row, "test", "accuracy") for row in ("fpt", "fpt-random"))
    loss = [means("text", row, "scores", "validation", "loss") for row in ("baseline", "aligned")]
    aligned = [means("text", row, "held_out", "held_out_cka-linear-debiased") for row in ("baseline", "aligned")]
    return (
        f"MiniLM reads {read:.0f} % of unseen digits, with random weights {random:.0f} %; the term moves the alignment with "
        f"unseen pictures from {aligned[0]:.2f} to {aligned[1]:.2f}, and the loss by {loss[1] - loss[0]:+.3f} nats a token "
        f"({SEEDS} seeds)"
    )
