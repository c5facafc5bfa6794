"""Which images are for training, validation (selects) and testing (scored once).

Splits are by construction: stratified, seeded, the same on each platform, and nested.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np

from crossalign.config import DataConfig
from crossalign.core.errors import UserError
from crossalign.core.reading import shown
from crossalign.data.sources import ImageListing, Listings


def split_rows(
    labels: Mapping[str, np.ndarray],
    classes: Sequence[str],
    config: DataConfig,
    bad: Mapping[str, Collection[int]] | None = None,
    groups: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Rows of each split in its listing, by train, validation and test.

    A part that the source does not give is carved out of its training images: first the test part, then the share
    for validation of what is left. Each split is in a stratified order, so a limit is a prefix and limits nest.

    Args:
        labels: int64 (N,) of each split that the source gives; rows with a negative one are not used.
        classes: names of all classes.
        config: shares, limits and seed.
        bad: rows of each of these splits that cannot be used.
        groups: int64 (N,), of the training images: those with one number stay in one split.

    Raises:
        UserError: fewer than two classes, a class that would be missing from a split, a limit beyond the split's size.
    """
    rng = np.random.Generator(np.random.PCG64(config.split_seed))
    usable = {}
    for split in labels:
        unusable = list(bad.get(split, ())) if bad else []
        usable[split] = np.setdiff1d(np.flatnonzero(labels[split] >= 0), unusable)
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
    group = np.arange(len(train)) if groups is None else np.unique(groups[usable["train"]], return_inverse=True)[1]
    _, first, sizes = np.unique(group, return_index=True, return_counts=True)

    def rows_of(chosen: np.ndarray) -> np.ndarray:
        """Places in ``train`` of the images of some groups, in the order of the groups."""
        place = np.full(len(first), len(first))
        place[chosen] = np.arange(len(chosen))
        return np.argsort(place[group], kind="stable")[: sizes[chosen].sum()]

    rest = stratified_order(train[first], rng)  # of groups, each in the class of its first image
    for split, fraction in (("test", config.test_fraction), ("validation", config.validation_fraction)):
        if split in labels:
            parts[split] = usable[split][stratified_order(labels[split], rng)]
        else:
            filled = np.cumsum(sizes[rest])
            count = int(np.searchsorted(filled, round(filled[-1] * fraction), side="right"))
            carved, rest = rows_of(rest[:count]), stratified_order(train[first], rng, rest[count:])
            _check_classes(split, train[carved], train, classes, config)
            parts[split] = usable["train"][carved]
    _check_classes("train", train[rows_of(rest)], train, classes, config)
    parts["train"] = usable["train"][rows_of(rest)]
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


def without_small(listings: Listings, least: int) -> Listings:
    """The listings without classes of fewer training images than ``least``; images of these get the label -1."""
    train = listings["train"]
    keep = np.bincount(train.labels, minlength=len(train.classes)) >= least
    if least == 1 or keep.all():
        return listings
    numbers = np.where(keep, np.cumsum(keep) - 1, -1)
    classes = tuple(name for name, is_large in zip(train.classes, keep, strict=True) if is_large)
    found = {split: replace(part, labels=numbers[part.labels], classes=classes) for split, part in listings.items()}
    count = sum(int((part.labels < 0).sum()) for part in found.values())
    note = f"{(~keep).sum()} classes of fewer than {least} training images left out ({count} images)"
    return found | {"train": replace(found["train"], notes=(*train.notes, note))}


def groups_of(listing: ImageListing, group_by: str) -> np.ndarray | None:
    """int64 (N,): one number for images that share what ``group_by`` names; None where that is empty.

    Raises:
        UserError: there is no such column, or it is no regular expression, or finds nothing in a name.
    """
    if not group_by:
        return None
    if listing.column is not None:
        shared = [str(value) for value in listing.column(group_by)]
    else:
        try:
            matches = [re.search(group_by, name) for name in listing.names]
        except re.error as error:
            raise UserError(f"--data.group-by '{group_by}' is no regular expression ({error}): mend it") from error
        if None in matches:
            name = shown(listing.names[matches.index(None)])
            raise UserError(f"--data.group-by '{group_by}' finds nothing in the name '{name}': it must match all of them")
        shared = [str(match[1] if match.re.groups else match[0]) for match in matches if match]
    groups: np.ndarray = np.unique(shared, return_inverse=True)[1]
    return groups


def joined(*keys: np.ndarray | None) -> np.ndarray:
    """int64 (N,): rows that share a value of any of the ``keys`` (N,), directly or by way of others, have one number."""
    numbers = [np.unique(key, return_inverse=True)[1] for key in keys if key is not None]
    groups = np.arange(len(numbers[0]))
    before = groups - 1
    while (groups != before).any():
        before = groups
        for number in numbers:
            least = np.full(number.max() + 1, len(groups))
            np.minimum.at(least, number, groups)
            groups = least[number]
    return groups


def copies(hashes: Mapping[str, np.ndarray], bad: Mapping[str, Collection[int]]) -> dict[str, np.ndarray]:
    """By split the rows whose pixels (``hashes``, uint64 (N,)) are those of an earlier row, or of a split that is scored: of
    equal images one is used, for testing sooner than for validation, and for that sooner than for training."""
    found, seen = {}, np.zeros(0, dtype=np.uint64)
    for split in ("test", "validation", "train"):
        if split in hashes:
            rows = np.setdiff1d(np.arange(len(hashes[split])), list(bad[split]))
            first = rows[np.unique(hashes[split][rows], return_index=True)[1]]
            found[split] = np.setdiff1d(rows, first[~np.isin(hashes[split][first], seen)])
            seen = np.concatenate([seen, hashes[split][rows]])
    return found


def _check_classes(split: str, part: np.ndarray, whole: np.ndarray, classes: Sequence[str], config: DataConfig) -> None:
    counts = np.bincount(whole, minlength=len(classes))
    missing = np.flatnonzero((counts > 0) & (np.bincount(part, minlength=len(classes)) == 0))
    if len(missing):
        worst = missing[np.argmin(counts[missing])]
        raise UserError(
            f"class '{classes[worst]}' has {counts[worst]} images, too few to be split three ways (none is left for "
            f"{split}): add images, remove the class, or change --data.validation-fraction "
            f"{config.validation_fraction:g} and --data.test-fraction {config.test_fraction:g}, or leave small classes out "
            "with --data.min-per-class"
        )
