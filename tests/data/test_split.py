"""Stratified, seeded, nested splits."""

from __future__ import annotations

import numpy as np
import pytest

from crossalign.config import DataConfig, validate
from crossalign.core.errors import UserError
from crossalign.data.images.splits import copies, joined, split_rows, stratified_order

CLASSES = tuple("abcdefghij")


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


def split(labels: np.ndarray, **settings: object) -> dict[str, np.ndarray]:
    return split_rows({"train": labels}, CLASSES, DataConfig(**settings))  # type: ignore[arg-type]


def test_every_prefix_holds_the_classes_in_proportion() -> None:
    labels = rng().permutation(np.repeat(np.arange(4), [400, 200, 100, 7]))
    order = stratified_order(labels, rng(1))
    assert sorted(order) == list(range(707))
    for length in range(1, 708, 13):
        counts = np.bincount(labels[order[:length]], minlength=4)
        assert (np.abs(counts - length * np.array([400, 200, 100, 7]) / 707) < 1.51).all()
    equal = rng().permutation(np.repeat(np.arange(10), 50))
    for length in range(10, 500, 10):
        assert (np.bincount(equal[stratified_order(equal, rng(2))[:length]]) == length // 10).all()


def test_order_is_random_within_and_between_classes() -> None:
    labels = np.repeat(np.arange(10), 50)
    first, second = stratified_order(labels, rng(0)), stratified_order(labels, rng(1))
    assert not np.array_equal(first, second)
    assert len({tuple(labels[first[i : i + 10]]) for i in range(0, 500, 10)}) > 40
    assert np.array_equal(first, stratified_order(labels, rng(0)))


def test_the_split_of_a_seed_is_this_one_on_every_platform() -> None:
    found = split(np.arange(20) % 2, split_seed=7)
    assert {name: rows.tolist() for name, rows in found.items()} == {
        "train": [17, 4, 5, 10, 15, 14, 1, 2, 9, 6, 7, 18, 19],
        "validation": [0, 11, 16],
        "test": [3, 8, 12, 13],
    }


@pytest.mark.parametrize("seed", [0, 1])
def test_three_ways_without_overlap(seed: int) -> None:
    labels = rng().integers(0, 10, 1000)
    found = split(labels, split_seed=seed)
    assert {name: len(rows) for name, rows in found.items()} == {"train": 640, "validation": 160, "test": 200}
    assert sorted(np.concatenate(list(found.values()))) == list(range(1000))
    whole = np.bincount(labels) / 1000
    for rows in found.values():
        assert (np.abs(np.bincount(labels[rows]) - whole * len(rows)) <= 1.51).all()


def test_the_seed_decides_and_the_fractions_are_kept() -> None:
    labels = rng().integers(0, 10, 1000)
    assert set(split(labels, split_seed=0)["test"]) != set(split(labels, split_seed=1)["test"])
    found = split(labels, validation_fraction=0.1, test_fraction=0.5)
    assert {name: len(rows) for name, rows in found.items()} == {"train": 450, "validation": 50, "test": 500}


def test_limits_are_stratified_and_nest() -> None:
    labels = np.arange(1000) % 10
    whole = split(labels)
    for name in ("train", "validation", "test"):
        small, large = (split(labels, **{f"limit_{name}": n}) for n in (50, 120))
        assert np.array_equal(small[name], large[name][:50]) and np.array_equal(large[name], whole[name][:120])
        assert (np.bincount(labels[small[name]]) == 5).all()
        others = {"train", "validation", "test"} - {name}
        assert all(np.array_equal(small[other], whole[other]) for other in others)


def test_the_sources_own_splits_are_kept() -> None:
    labels = np.arange(200) % 10
    given = {"train": labels, "test": labels[:50], "validation": labels[:30]}
    found = split_rows(given, CLASSES, DataConfig())
    assert {name: sorted(rows) for name, rows in found.items()} == {
        "train": list(range(200)),
        "validation": list(range(30)),
        "test": list(range(50)),
    }
    found = split_rows({"train": labels, "test": labels[:50]}, CLASSES, DataConfig())
    assert len(found["test"]) == 50 and len(found["validation"]) == 40 and len(found["train"]) == 160


def test_rows_left_out_stay_out() -> None:
    labels, rows = np.arange(200) % 10, np.arange(100) * 2
    found = split_rows({"train": labels // 2 * 2}, CLASSES, DataConfig(), {"train": rows + 1})
    assert sorted(np.concatenate(list(found.values()))) == rows.tolist()


@pytest.mark.parametrize("seed", range(5))
def test_groups_stay_in_one_split(seed: int) -> None:
    sizes = rng(seed).integers(1, 8, 300)
    groups = rng(seed + 9).permutation(np.repeat(np.arange(300), sizes))
    labels = rng(1).integers(0, 3, 300)[groups]
    found = split_rows({"train": labels}, CLASSES, DataConfig(split_seed=seed), groups=groups)
    assert sorted(np.concatenate(list(found.values()))) == list(range(len(groups)))
    parts = [set(groups[rows]) for rows in found.values()]
    assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]
    assert len(found["test"]) == pytest.approx(0.2 * len(groups), abs=8)
    assert len(found["validation"]) == pytest.approx(0.16 * len(groups), abs=8)
    whole = np.bincount(labels) / len(labels)
    for rows in found.values():
        assert np.abs(np.bincount(labels[rows]) / len(rows) - whole).max() < 0.12


def test_groups_of_one_are_split_as_images_are() -> None:
    labels = rng().integers(0, 10, 300)
    found = split_rows({"train": labels}, CLASSES, DataConfig(), groups=rng().permutation(300))
    assert {name: len(rows) for name, rows in found.items()} == {name: len(rows) for name, rows in split(labels).items()}


def test_what_is_joined_by_way_of_others_has_one_number() -> None:
    first, second = np.array([5, 5, 1, 2, 3, 9]), np.array([7, 8, 8, 4, 4, 6], dtype=np.uint64)
    assert joined(first, second).tolist() == [0, 0, 0, 3, 3, 5] and joined(first, None).tolist() == [0, 0, 2, 3, 4, 5]
    chain = np.arange(100)
    assert set(joined(chain // 2, (chain + 1) // 2).tolist()) == {0}


def test_of_equal_images_the_one_that_is_scored_stays() -> None:
    hashes = {"train": [1, 2, 2, 3, 4, 0], "validation": [3, 5, 5], "test": [4, 6, 5]}
    found = copies({name: np.array(values, dtype=np.uint64) for name, values in hashes.items()}, dict.fromkeys(hashes, ()))
    assert {name: rows.tolist() for name, rows in found.items()} == {"test": [], "validation": [1, 2], "train": [2, 3, 4]}


@pytest.mark.parametrize(
    "labels,settings,words",
    [
        ([3] * 50, {}, "one class only .'d'"),
        ([], {}, "no image that can be used"),
        ([0] * 50 + [1] * 2, {}, r"class 'b' has 2 images, too few to be split three ways"),
        ([0] * 50 + [1] * 50, {"limit_train": 65}, "--data.limit-train 65 is larger than the train split of 64"),
        ([0] * 50 + [1] * 50, {"limit_test": 21}, "--data.limit-test 21 is larger"),
        ([0] * 50 + [1] * 50, {"limit_validation": 17}, "--data.limit-validation 17 is larger"),
    ],
)
def test_splits_that_cannot_be_are_refused(labels: list[int], settings: dict[str, int], words: str) -> None:
    with pytest.raises(UserError, match=words):
        split(np.array(labels, dtype=np.int64), **settings)


@pytest.mark.parametrize(
    "settings,words",
    [
        ({"validation_fraction": 0.0}, "--data.validation-fraction is 0.0"),
        ({"validation_fraction": 1.0}, "between 0 and 1"),
        ({"test_fraction": float("nan")}, "--data.test-fraction"),
        ({"limit_train": 0}, "--data.limit-train is 0; it must be at least 1"),
        ({"image_size": -3}, "--data.image-size"),
        ({"split_seed": -1}, "--data.split-seed"),
        ({"channels": "rgba"}, "unknown value for --data.channels 'rgba'; did you mean 'rgb'"),
        ({"on_error": "ignore"}, "--data.on-error"),
    ],
)
def test_settings_without_a_meaning_are_refused(settings: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        validate(DataConfig(**settings), "data.")  # type: ignore[arg-type]
