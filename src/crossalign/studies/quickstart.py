"""``quickstart``: both jobs in minutes, without a model hub."""

import time
from pathlib import Path

from crossalign.config.studies import ReproduceArgs
from crossalign.studies.reproduce import reproduce

QUICKSTART: dict[str, tuple[str, tuple[str, ...], str]] = {
    "quickstart": (
        "digits",
        (),
        "MiniLM, which never saw an image, learns to read 8 × 8 digits; controls have random weights.",
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
            "loop.batch_size=16",
            "loop.steps=300",
            "loop.evaluate_every=50",
        ),
        "A small GPT learns Python's documentation; every 20 steps emoji names are pulled towards their pictures.",
    ),
}
"""Each study's folder, settings, and what it is in a sentence."""


def quickstart(output: Path) -> int:
    """Both jobs in minutes, one seed, no hub; prints a table, the page's path and the time of each, and of choosing formats.

    Language → vision: six rows on digits. Vision → language: a small GPT on Python's own documentation, whose features of
    emoji names are pulled, or not, towards those of the pictures.
    """
    from crossalign.training.precision import timed

    codes = []
    before = timed["seconds"]
    for study, (folder, settings, title) in QUICKSTART.items():
        started = time.monotonic()
        print(title)
        codes.append(reproduce(ReproduceArgs(study, output / folder, seeds=1, set=settings)))
        print(f"{folder}: {(time.monotonic() - started) / 60:.1f} minutes\n")
    spent = timed["seconds"] - before
    print(f"of these, {spent:.1f} seconds went into timing steps, to choose number formats and whether to compile")
    return max(codes)
