"""Opening images: one clear sentence for what is wrong, broken files, the cache, and real data."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pictures import THREE, check_rows, open_source, png, sizes

from crossalign.config import AugmentConfig, DataConfig
from crossalign.core.errors import UserError
from crossalign.data.images import cached
from crossalign.data.images import decode as decoding
from crossalign.data.images import load as opening
from crossalign.data.images.load import ImageSet, ImageSplits, channel_statistics
from crossalign.data.images.sources import list_source
from crossalign.data.images.splits import split_rows
from crossalign.recipes import get_recipe

# -- what is wrong, in one sentence --


@pytest.mark.parametrize(
    "source,words",
    [
        ("", "does not exist"),
        ("no/such/folder", "'no/such/folder' does not exist"),
        ("sklearn:digit", "did you mean 'digits'"),
        (__file__, "is a file but not .parquet"),
    ],
)
def test_no_such_source(source: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        open_source(source)


def test_folders_that_hold_no_classes(tmp_path: Path, write_folder: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match="holds no class folders"):
        open_source(tmp_path)
    write_folder(tmp_path, {"cat": 12})
    with pytest.raises(UserError, match=r"one class only .'cat'"):
        open_source(tmp_path)
    (tmp_path / "dog").mkdir()
    with pytest.raises(UserError, match="dog' holds no images"):
        open_source(tmp_path)
    write_folder(tmp_path, {"dog": 2})
    with pytest.raises(UserError, match="class 'dog' has 2 images, too few"):
        open_source(tmp_path)


def test_wrong_settings_come_before_any_decoding(
    tmp_path: Path, write_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_folder(tmp_path, THREE)

    def fail(*_: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(opening, "decode_listing", fail)
    for settings, words in [
        ({"limit_train": 39}, "--data.limit-train 39 is larger than the train split of 38"),
        ({"validation_fraction": 1.2}, "--data.validation-fraction is 1.2"),
        ({"augment": AugmentConfig(flip=2)}, "data.augment.flip is 2"),
    ]:
        with pytest.raises(UserError, match=words):
            open_source(folder, **settings)


def test_images_of_two_sizes(tmp_path: Path, write_folder: Callable[..., Path]) -> None:
    folder = write_folder(tmp_path / "zoo", THREE)
    write_folder(folder, {"dog": 10}, size=(20, 10), seed=900)
    words = r"ant/000.png is 12x12 and dog/000.png is 20x10 .*--data.image-size 32"
    with pytest.raises(UserError, match=words):
        open_source(folder)
    assert open_source(folder, image_size=16).train.pixels.shape[1:] == (3, 16, 16)
    good = write_folder(tmp_path / "good", THREE)
    other = write_folder(tmp_path / "other", {"cat": 5}, size=(9, 9), seed=800)
    with pytest.raises(UserError, match="good is 12x12 and other is 9x9"):
        open_source(good, test_source=str(other))


@pytest.mark.parametrize(
    "labels,words",
    [
        ([0, 1, None] * 5, "5 missing labels, the first at set.parquet row 2"),
        ([0, 1, -1] * 5, "negative label -1 at set.parquet row 2"),
        ([0.5, 1.0] * 5, "holds 0.5; labels are whole numbers or names"),
        ([], "has no rows"),
    ],
)
def test_labels_that_are_none(tmp_path: Path, write_parquet: Callable[..., Path], labels: list[Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        open_source(write_parquet(tmp_path / "set.parquet", labels))


def test_tables_that_cannot_be_read(tmp_path: Path, write_parquet: Callable[..., Path]) -> None:
    labels = [0, 1] * 5
    for options, words in [
        ({"image": "photo"}, r"no image column \(img or image\), only photo, label"),
        ({"label": "y"}, r"no label column .* only img, y"),
        ({"cells": list(range(10))}, "column 'img' of set.parquet holds int64"),
        ({"metadata": {"class_names": "only"}}, "has label 1, but 1 class names"),
    ]:
        with pytest.raises(UserError, match=words):
            open_source(write_parquet(tmp_path / "set.parquet", labels, **options))
    file = write_parquet(tmp_path / "set.parquet", labels)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"cannot read parquet file set\.parquet") as caught:
        open_source(file)
    assert "\n" not in str(caught.value)


# -- broken images and the cache --


def test_broken_images_stop_or_are_left_out(tmp_path: Path, write_folder: Callable[..., Path]) -> None:
    folder = write_folder(tmp_path / "zoo", THREE)
    whole = (folder / "bee" / "004.png").read_bytes()
    (folder / "bee" / "004.png").write_bytes(whole[: len(whole) // 2])
    (folder / "ant" / "000.png").write_bytes(b"")
    words = r"cannot read image ant/000\.png \(.*\) and 1 more; .*--data.on-error skip"
    for _ in range(2):  # the second time from the cache
        with pytest.raises(UserError, match=words):
            open_source(folder)
    splits = open_source(folder, on_error="skip")
    assert len(splits.skipped) == 2 and splits.skipped[1].startswith("bee/004.png (")
    assert sum(sizes(splits)) == 58 and "2 unreadable images left out" in splits.source
    for part in (splits.train, splits.validation, splits.test):
        check_rows(part, lambda n: (decoding.decode(folder / n, None, "rgb"), n.split("/")[0]))
    for file in folder.rglob("*.png"):
        file.write_bytes(b"x")
    with pytest.raises(UserError, match="none of the 60 images of zoo can be read"):
        open_source(folder, on_error="skip")


def test_broken_parquet_rows_are_named(tmp_path: Path, write_parquet: Callable[..., Path]) -> None:
    cells = [png(i) for i in range(20)]
    cells[3], cells[8] = cells[3][:50], None  # type: ignore[call-overload]
    file = write_parquet(tmp_path / "set.parquet", [0, 1] * 10, cells=cells)
    with pytest.raises(UserError, match=r"set\.parquet row 3 \(.*and 1 more"):
        open_source(file)
    splits = open_source(file, on_error="skip")
    assert splits.skipped[1] == "set.parquet row 8 (no image data)" and sum(sizes(splits)) == 18


def test_a_class_emptied_by_skipping_is_noticed(tmp_path: Path, write_folder: Callable[..., Path]) -> None:
    folder = write_folder(tmp_path, {"cat": 10, "dog": 4})
    for i in range(3):
        (folder / "dog" / f"{i:03}.png").write_bytes(b"x")
    with pytest.raises(UserError, match="class 'dog' has 1 images, too few"):
        open_source(folder, on_error="skip")


def test_images_are_decoded_once(tmp_path: Path, write_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_folder(tmp_path, THREE)
    calls: list[object] = []
    real = decoding.decode
    monkeypatch.setattr(cached, "decode", lambda *args: calls.append(args) or real(*args))
    first = open_source(folder)
    assert len(calls) == 60
    again = open_source(folder, validation_fraction=0.3, limit_train=10)
    assert len(calls) == 60 and len(again.train) == 10 and again.fingerprint != first.fingerprint
    assert open_source(folder).fingerprint == first.fingerprint
    open_source(folder, channels="gray")
    open_source(folder, image_size=8)
    assert len(calls) == 180
    file = folder / "cat" / "000.png"
    status = file.stat()
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 10_000_000))
    assert open_source(folder).fingerprint == first.fingerprint
    assert len(calls) == 240


def test_the_fingerprint_is_of_the_data_not_of_its_place(tmp_path: Path, write_folder: Callable[..., Path]) -> None:
    first = open_source(write_folder(tmp_path / "a", THREE))
    assert open_source(write_folder(tmp_path / "b", THREE)).fingerprint == first.fingerprint
    assert open_source(write_folder(tmp_path / "c", THREE, seed=1)).fingerprint != first.fingerprint
    assert open_source(tmp_path / "a", split_seed=1).fingerprint != first.fingerprint


def test_a_broken_off_decoding_leaves_nothing(
    tmp_path: Path, write_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CROSSALIGN_CACHE", str(tmp_path / "cache"))
    folder = write_folder(tmp_path / "zoo", THREE | {"dog": 5})
    write_folder(folder, {"dog": 1}, size=(5, 5))
    with pytest.raises(UserError, match="differ in size"):
        open_source(folder)
    assert list((tmp_path / "cache" / "images").iterdir()) == []


def test_a_full_disk_is_one_sentence(
    tmp_path: Path, write_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_folder(tmp_path / "zoo", THREE)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cached.np, "save", full)
    with pytest.raises(UserError, match=r"no room left .*CROSSALIGN_CACHE"):
        open_source(folder)


def test_splits_and_limits_are_rows_of_one_map(
    tmp_path: Path, write_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CROSSALIGN_CACHE", str(tmp_path / "cache"))
    folder = write_folder(tmp_path / "zoo", THREE)
    for limit in (None, 20, 10):
        splits = open_source(folder, limit_train=limit)
        for part in (splits.train, splits.validation, splits.test):
            check_rows(part, lambda n: (decoding.decode(folder / n, None, "rgb"), n.split("/")[0]))
            assert np.asarray(part.pixels).shape == part.pixels.shape == (len(part), 3, 12, 12)
            assert isinstance(part.pixels.store, np.memmap)  # type: ignore[union-attr]
    assert len(list((tmp_path / "cache" / "images").glob("*.npy"))) == 2  # pixels and hashes
    stored = sum(file.stat().st_size for file in (tmp_path / "cache" / "images").iterdir())
    assert stored < 1.1 * 60 * 3 * 12 * 12 + 1000


@pytest.mark.parametrize("size,needed", [(None, 60 * 432), (64, 60 * 3 * 64 * 64)])
def test_room_for_pixels_is_asked_for_before_any_is_decoded(
    tmp_path: Path, write_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, size: int | None, needed: int
) -> None:
    monkeypatch.setenv("CROSSALIGN_CACHE", str(tmp_path / "cache"))
    folder = write_folder(tmp_path / "zoo", THREE)
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
    with monkeypatch.context() as patch:
        patch.setattr(opening, "decode_listing", lambda *_: pytest.fail("decoded"))
        words = (
            rf"60 decoded images of zoo need {needed / 1e9:.2f} GB in .*/cache/images, where .* GB are free.*CROSSALIGN_CACHE"
        )
        with pytest.raises(UserError, match=words):
            open_source(folder, image_size=size)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed))
    open_source(folder, image_size=size)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=0))
    open_source(folder, image_size=size)  # they lie there already


def test_copies_of_training_images_in_the_test_set_are_counted(tmp_path: Path, write_folder: Callable[..., Path]) -> None:
    folder = write_folder(tmp_path / "zoo", THREE)
    other = write_folder(tmp_path / "other", {"cat": 5}, seed=500)
    shutil.copy(folder / "cat" / "001.png", other / "cat" / "900.png")
    shutil.copy(folder / "bee" / "001.png", other / "cat" / "901.png")
    assert "2 test images equal a training" in open_source(folder, test_source=str(other)).source
    assert "pixel for pixel" not in open_source(folder).source
    for file in sorted((folder / "ant").iterdir())[:6]:
        shutil.copy(file, folder / "ant" / f"copy-{file.name}")
    found = re.search("([0-9]+) validation images equal a training image pixel for pixel", open_source(folder).source)
    assert found and 0 < int(found[1]) <= 6


def test_equal_images_can_lie_in_one_split_or_be_dropped(tmp_path: Path, write_folder: Callable[..., Path]) -> None:
    folder = write_folder(tmp_path / "zoo", THREE)
    for name in THREE:
        for file in sorted((folder / name).iterdir())[:10]:
            shutil.copy(file, file.with_name(f"copy-{file.name}"))
    (folder / "ant" / "bad.png").write_bytes(b"")
    for setting, count in (("keep", 90), ("together", 90), ("drop", 60)):
        splits = open_source(folder, duplicates=setting, on_error="skip")
        assert sum(sizes(splits)) == count and ("pixel for pixel" in splits.source) == (setting == "keep")
        assert ("30 copies of images left out" in splits.source) == (setting == "drop")
        parts = [{pixels.tobytes() for pixels in part.pixels} for part in (splits.train, splits.validation, splits.test)]
        assert any(parts[a] & parts[b] for a, b in ((0, 1), (0, 2), (1, 2))) == (setting == "keep")
    other = write_folder(tmp_path / "other", {"cat": 5}, seed=500)
    shutil.copy(folder / "bee" / "012.png", other / "cat" / "900.png")
    splits = open_source(folder, duplicates="drop", on_error="skip", test_source=str(other))
    assert len(splits.test) == 6 and sum(sizes(splits)) == 65 and "pixel for pixel" not in splits.source


def test_images_of_one_group_lie_in_one_split(
    tmp_path: Path, write_folder: Callable[..., Path], write_parquet: Callable[..., Path]
) -> None:
    folder = write_folder(tmp_path / "zoo", THREE)
    for number, file in enumerate(sorted(folder.rglob("*.png"))):
        file.rename(file.with_name(f"patient{number % 12}-{file.name}"))

    def groups(splits: ImageSplits, pattern: str) -> list[set[str]]:
        parts = (splits.train.names, splits.validation.names, splits.test.names)
        return [{re.search(pattern, name)[1] for name in names or ()} for names in parts]  # type: ignore[index]

    found = groups(open_source(folder, group_by="patient[0-9]+"), "patient([0-9]+)-")
    assert sum(map(len, found)) == len(set.union(*found)) == 12
    found = groups(open_source(folder, group_by="patient[0-9]*([0-9])-"), "patient[0-9]*([0-9])-")
    assert sum(map(len, found)) == len(set.union(*found)) == 10
    file = write_parquet(tmp_path / "set.parquet", [0, 1] * 30, more={"video": [i // 5 for i in range(60)]})
    found = groups(open_source(file, group_by="video"), "row ([0-9]+)")
    videos = [{int(row) // 5 for row in part} for part in found]
    assert sum(map(len, videos)) == len(set.union(*videos)) == 12
    for source, group_by, words in (
        (folder, "patient[", r"--data.group-by 'patient\[' is no regular expression"),
        (folder, "film[0-9]", "finds nothing in the name 'ant/patient0-000.png': it must match all of them"),
        (file, "film", "has no column 'film', only img, label, video"),
    ):
        with pytest.raises(UserError, match=words):
            open_source(source, group_by=group_by)


def test_small_classes_can_be_left_out(tmp_path: Path, write_folder: Callable[..., Path]) -> None:
    folder = write_folder(tmp_path / "zoo" / "train", THREE | {"dog": 2, "elk": 1, "": 0})
    write_folder(tmp_path / "zoo" / "test", {"ant": 3, "dog": 4}, seed=900)
    (folder / "elk" / "000.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"class 'elk' has 1 images, too few .*--data.min-per-class"):
        open_source(folder)
    splits = open_source(tmp_path / "zoo", min_per_class=3)
    assert sizes(splits) == (48, 12, 3) and splits.test.classes == splits.train.classes == ("ant", "bee", "cat")
    assert "2 classes of fewer than 3 training images left out (7 images)" in splits.source and not splits.skipped
    for part in (splits.train, splits.validation):
        check_rows(part, lambda n: (decoding.decode(folder / n, None, "rgb"), n.split("/")[0]))
    with pytest.raises(UserError, match="has no image that can be used"):
        open_source(tmp_path / "zoo", min_per_class=100)


# -- sets --


def test_statistics() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (50, 3, 6, 5), dtype=np.uint8)
    images = ImageSet(pixels, torch.arange(50) % 2, ("a", "b"), tuple(map(str, range(50))))
    mean, std = channel_statistics(images)
    np.testing.assert_allclose(mean, (pixels / 255).mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(std, (pixels / 255).std((0, 2, 3)), rtol=1e-12)
    with pytest.raises(UserError, match="channel 0 has one value"):
        channel_statistics(ImageSet(np.zeros_like(pixels), images.labels, images.classes))


# -- real data --


def test_real_cifar_is_split_as_the_paper_says(shared_data: Path) -> None:
    """20 % of 50,000 for validation, exactly balanced (CMDA 3.1.1); from the labels alone."""
    source = shared_data / "images" / "cifar10_jpeg_train.parquet"
    listings = list_source(str(source))
    assert listings["train"].classes[0] == "airplane" and listings["train"].classes[9] == "truck"
    labels = {split: found.labels for split, found in listings.items()}
    rows = split_rows(labels, listings["train"].classes, DataConfig(source=str(source), validation_fraction=0.2))
    for split, origin, each in (("train", "train", 4000), ("validation", "train", 1000), ("test", "test", 1000)):
        assert np.bincount(listings[origin].labels[rows[split]]).tolist() == [each] * 10
    assert sorted(np.concatenate([rows["train"], rows["validation"]])) == list(range(50_000))
    assert sorted(rows["test"]) == list(range(10_000))


@pytest.mark.slow
def test_real_cifar_whole(shared_data: Path) -> None:
    splits = open_source(shared_data / "images" / "cifar10_jpeg_train.parquet")
    assert sizes(splits) == (40_000, 10_000, 10_000) and splits.train.pixels.shape[1:] == (3, 32, 32)
    assert "JPEG" in splits.source and not splits.skipped
    mean, std = channel_statistics(splits.train)
    paper = get_recipe("cmda-fpt").make().data
    np.testing.assert_allclose(mean, paper.mean, atol=2e-3)
    np.testing.assert_allclose(std, (0.247, 0.2435, 0.2616), atol=4e-3)
    own = splits.train.pixels[:2000].std((2, 3)).mean(0) / 255
    np.testing.assert_allclose(own, paper.std, atol=6e-3)  # the mean of each image's own deviation


def test_real_cifar_rows_and_limits(shared_data: Path, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    for split in ("train", "test"):
        table = pq.read_table(shared_data / "images" / f"cifar10_jpeg_{split}.parquet").slice(100, 400)
        pq.write_table(table, tmp_path / f"{split}.parquet")
    splits = open_source(tmp_path, limit_train=50, limit_validation=40, limit_test=30)
    assert sizes(splits) == (50, 40, 30)
    table = pq.read_table(tmp_path / "train.parquet").to_pylist()

    def expected(name: str) -> tuple[np.ndarray, str]:
        row = table[int(name.split()[-1])]
        return decoding.decode(row["img"], None, "rgb"), splits.train.classes[row["label"]]

    check_rows(splits.train, expected)
    check_rows(splits.validation, expected)
