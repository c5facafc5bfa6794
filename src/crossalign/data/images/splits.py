"""Which images are for training, validation (selects) and testing (scored once).

Splits are by construction: stratified, seeded, the same on each platform, and nested.
"""

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from crossalign.config import DataConfig
from crossalign.core.errors import UserError


def split_rows(
    labels: Mapping[str, np.ndarray],
    classes: Sequence[str],
    config: DataConfig,
    bad: Mapping[str, Collection[int]] | None = None,
) -> dict[str, np.ndarray]:
    """Rows of each split in its listing, by train, validation and test.

    A part that the source does not give is carved out of its training images: first the test part, then the share
    for validation of what is left. Each split is in a stratified order, so a limit is a prefix and limits nest.

    Args:
        labels: int64 (N,) of each split that the source gives.
        classes: names of all classes.
        config: shares, limits and seed.
        bad: rows of each of these splits that cannot be used.

    Raises:
        UserError: fewer than two classes, a class that would be missing from a split, a limit beyond the split's size.
    """
    rng = np.random.Generator(np.random.PCG64(config.split_seed))
    usable = {}
    for split in labels:
        unusable = list(bad.get(split, ())) if bad else []
        usable[split] = np.setdiff1d(np.arange(len(labels[split])), unusable)
    labels = {split: labels[split][rows] for split, rows in usable.items()}
    train = labels["train"]
    present = np.flatnonzero(np.bincount(train, minlength=len(classes)))
    if len(present) < 2:
        raise UserError(
            f"'{config.source}' has one class only ('{classes[present[0]]}'); classification needs two or more"
            if len(present)
            else f"'{config.source}' has no image that can be used"
        )
    parts: dict[str, np.ndarray] = {}
    rest = stratified_order(train, rng)
    for split, fraction in (("test", config.test_fraction), ("validation", config.validation_fraction)):
        if split in labels:
            parts[split] = usable[split][stratified_order(labels[split], rng)]
        else:
            count = round(len(rest) * fraction)
            carved, rest = rest[:count], stratified_order(train, rng, rest[count:])
            _check_classes(split, train[carved], train, classes, config)
            parts[split] = usable["train"][carved]
    _check_classes("train", train[rest], train, classes, config)
    parts["train"] = usable["train"][rest]
    for split, rows in parts.items():
        limit: int | None = getattr(config, f"limit_{split}")
        if limit is not None and limit > len(rows):
            raise UserError(f"--data.limit-{split} {limit} is larger than the {split} split of {len(rows)} images")
    return {split: parts[split][: getattr(config, f"limit_{split}")] for split in ("train", "validation", "test")}


def stratified_order(labels: np.ndarray, rng: np.random.Generator, rows: np.ndarray | None = None) -> np.ndarray:
    """A random order of ``rows`` (all by default) in which every prefix holds the classes in their proportions.

    The k-th image of a class of n goes to place (k + 1/2) / n of the whole; images at the same place are shuffled.
    Equal classes come out exactly equal in any prefix that their number divides.
    """
    rows = np.arange(len(labels)) if rows is None else rows
    rows = rng.permutation(np.sort(rows))
    position = np.empty(len(rows))
    for label in np.unique(labels[rows]):
        members = np.flatnonzero(labels[rows] == label)
        position[members] = (np.arange(len(members)) + 0.5) / len(members)
    return rows[np.argsort(position, kind="stable")]


def _check_classes(split: str, part: np.ndarray, whole: np.ndarray, classes: Sequence[str], config: DataConfig) -> None:
    counts = np.bincount(whole, minlength=len(classes))
    missing = np.flatnonzero((counts > 0) & (np.bincount(part, minlength=len(classes)) == 0))
    if len(missing):
        worst = missing[np.argmin(counts[missing])]
        raise UserError(
            f"class '{classes[worst]}' has {counts[worst]} images, too few to be split three ways (none is left for "
            f"{split}): add images, remove the class, or change --data.validation-fraction "
            f"{config.validation_fraction:g} and --data.test-fraction {config.test_fraction:g}"
        )
