"""Every kind of source gives each image its own label, in the splits that it has."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pictures import THREE, check_rows, open_source, png, sizes

from crossalign.core.errors import UserError
from crossalign.data.images import decode as decoding
from crossalign.data.records import load_hub

# -- digits --


def test_digits() -> None:
    from sklearn.datasets import load_digits

    splits = open_source("sklearn:digits", channels="gray")
    assert sizes(splits) == (1150, 288, 359)
    assert splits.train.pixels.shape == (1150, 1, 8, 8) and splits.train.pixels.dtype == np.uint8
    assert splits.train.labels.dtype == torch.int64 and splits.train.classes == tuple("0123456789")
    data = load_digits()
    grey = np.rint(data.images * 255 / 16).astype(np.uint8)
    for part in (splits.train, splits.validation, splits.test):
        check_rows(part, lambda name: (grey[int(name[6:])][None], str(data.target[int(name[6:])])))
    names = [set(part.names or ()) for part in (splits.train, splits.validation, splits.test)]
    assert len(names[0] | names[1] | names[2]) == 1797
    assert open_source("sklearn:digits", image_size=32).test.pixels.shape == (359, 3, 32, 32)
    assert "1,150 train, 288 validation, 359 test" in splits.source and "seed 0" in splits.source


def test_without_scikit_learn_the_install_line_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UserError, match=r"pip install 'crossalign\[offline\]'"):
        open_source("sklearn:digits")


def test_without_datasets_the_install_line_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'crossalign\[hub\]'"):
        open_source("hf:some/set")


# -- class folders --


def test_class_folders(tmp_path: Path, write_folder: Callable[..., Path]) -> None:
    folder = write_folder(tmp_path / "zoo", THREE)
    (folder / ".cache").mkdir()
    (folder / "cat" / ".hidden.png").write_bytes(b"no")
    (folder / "cat" / "notes.txt").write_text("no")
    (folder / "bee" / "deep").mkdir()
    shutil.move(str(folder / "bee" / "003.png"), str(folder / "bee" / "deep" / "x.PNG"))
    splits = open_source(folder)
    assert splits.train.classes == ("ant", "bee", "cat") and sum(sizes(splits)) == 60 and sizes(splits)[2] == 12
    for part in (splits.train, splits.validation, splits.test):
        check_rows(part, lambda n: (decoding.decode(folder / n, None, "rgb"), n.split("/")[0]))


def test_folders_with_splits_of_their_own(
    tmp_path: Path, write_folder: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for split, seed in {"train": 0, "valid": 1000, "test": 2000}.items():
        write_folder(tmp_path / "zoo" / split, THREE if split == "train" else {"ant": 3, "cat": 4}, seed=seed)
    splits = open_source(tmp_path / "zoo")
    assert sizes(splits) == (60, 7, 7) and splits.train.classes == splits.test.classes == ("ant", "bee", "cat")
    check_rows(splits.test, lambda n: (decoding.decode(tmp_path / "zoo" / "test" / n, None, "rgb"), n.split("/")[0]))
    assert "its own test split" in splits.source and "its own validation split" in splits.source
    open_source(tmp_path / "zoo", test_fraction=0.3)
    assert "--data.test-fraction has no effect: the images come with test images of their own" in capsys.readouterr().err


def test_a_class_may_be_called_train(tmp_path: Path, write_folder: Callable[..., Path]) -> None:
    folder = write_folder(tmp_path / "vehicles", {"car": 10, "train": 10})
    assert open_source(folder).train.classes == ("car", "train")


def layout(root: Path, files: str) -> Path:
    """Pictures at paths such as ``train/{cat,dog}/9``: so many in each of these folders."""
    for number, words in enumerate(files.split()):
        first, _, rest = words.partition("{")
        names, _, last = rest.partition("}/") if rest else ("", "", "")
        for name in names.split(",") if rest else [""]:
            folder, _, count = f"{first}{name}{'/' if rest else ''}{last}".rpartition("/")
            (root / folder).mkdir(parents=True, exist_ok=True)
            for i in range(int(count)):
                (root / folder / f"{i:03}.png").write_bytes(png(number * 10_000 + hash_of(name) + i))
    return root


def hash_of(name: str) -> int:
    return sum(map(ord, name)) * 17


@pytest.mark.parametrize(
    ("files", "found", "says"),
    [
        ("training_set/{cat,dog}/10 test_set/{cat,dog}/3", (16, 4, 6), "its own test split"),
        ("Train/{cat,dog}/10 Testing/{cat,dog}/3 my-validation/{cat,dog}/2", (20, 4, 6), "its own validation split"),
        ("{cat,dog}/5 train/{cat,dog}/10", (13, 3, 4), r"left out beside the splits: cat \(5 images\), dog \(5 images\)"),
        ("train/{cat,dog}/10 unlabelled/7", (13, 3, 4), r"left out beside the splits: unlabelled \(7 images\)"),
        ("train/{cat,dog}/10 train/4", (13, 3, 4), "4 images beside the class folders left out"),
        ("{cat,dog}/10 2", (13, 3, 4), "2 images beside the class folders left out"),
        ("{train_station,test_tube}/10", (13, 3, 4), "2 classes"),
        ("{cat,dog}/a/5 {cat,dog}/b/5 {bee}/c/10", (19, 5, 6), "3 classes"),
    ],
)
def test_folders_are_split_by_their_names(tmp_path: Path, files: str, found: tuple[int, ...], says: str) -> None:
    splits = open_source(layout(tmp_path, files))
    assert sizes(splits) == found and re.search(says, splits.source), splits.source


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (
            "val/{cat,dog}/10 test/{cat,dog}/5",
            "has no training images, only test, validation; name them train",
        ),
        ("fold1/{cat,dog}/5 fold2/{cat,dog}/5", r"fold1, fold2 hold the same folders \(cat, dog\)"),
        ("{cat,dog}/10 test/{cat,dog}/5", r"'test' holds the folders that lie beside it \(cat, dog\)"),
        ("train/{cat,dog}/5 training/{cat,dog}/5 test/{cat,dog}/5", "'train.*' and 'train.*' are both named train"),
        ("{cafe\u0301,caf\u00e9}/10", "has two folders 'caf\u00e9', of which accents are encoded in two ways"),
    ],
)
def test_folders_of_which_it_is_not_clear_what_they_are(tmp_path: Path, files: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        open_source(layout(tmp_path, files))


def test_accents_are_compared_however_they_are_encoded(tmp_path: Path) -> None:
    layout(tmp_path, "train/{caf\u00e9,tea}/10 test/{cafe\u0301,tea}/4")
    splits = open_source(tmp_path)
    assert sizes(splits) == (16, 4, 8) and splits.test.classes == splits.train.classes == ("caf\u00e9", "tea")
    assert np.bincount(splits.test.labels).tolist() == [4, 4]


def test_links_are_followed_once_and_litter_is_left(tmp_path: Path) -> None:
    root = layout(tmp_path / "zoo", "{cat,dog}/10 cat/deep/3")
    layout(tmp_path / "more", "inside/5")
    (root / "cat" / "linked").symlink_to(tmp_path / "more")
    (tmp_path / "more" / "back").symlink_to(tmp_path / "more")
    for place in ("cat/deep/round", "dog/up"):  # circles, and out to what holds them
        (root / place).symlink_to(root)
    shutil.copytree(root / "dog", root / "dog" / "__MACOSX", symlinks=True)
    shutil.copytree(root / "dog", root / "__MACOSX", symlinks=True)
    for name in ("._000.png", "a/._b.png", ".DS_Store"):
        (root / "cat" / name).parent.mkdir(exist_ok=True)
        (root / "cat" / name).write_bytes(b"litter")
    splits = open_source(root)
    assert sum(sizes(splits)) == 28 and splits.train.classes == ("cat", "dog") and not splits.skipped
    for part in (splits.train, splits.validation, splits.test):
        check_rows(part, lambda name: (decoding.decode(root / name, None, "rgb"), name.split("/")[0]))


@pytest.mark.parametrize(
    ("name", "make", "says"),
    [
        ("cat/gone.png", lambda path: path.symlink_to("/nowhere.png"), "cat/gone.png (a link that leads nowhere)"),
        ("cat/folder", lambda path: path.symlink_to("/nowhere"), "cat/folder (a link that leads nowhere)"),
        ("bird", lambda path: path.symlink_to("/nowhere"), "bird (a link that leads nowhere)"),
        ("cat/pipe.png", os.mkfifo, "cat/pipe.png (no regular file)"),
        ("cat/null.png", lambda path: path.symlink_to("/dev/null"), "cat/null.png (no regular file)"),
        ("cat/round.png", lambda path: path.symlink_to(path), "cat/round.png (too many levels of symbolic links)"),
        ("dog/shut", Path.mkdir, "dog/shut (permission denied)"),
        ("dog/broken.png", lambda path: path.write_bytes(b""), "dog/broken.png (empty, damaged"),
        ("dog/\x1b[31m.png", lambda path: path.write_bytes(b""), r"dog/\x1b[31m.png (empty, damaged"),
    ],
)
def test_what_cannot_be_read_in_a_folder_is_named_or_counted(
    tmp_path: Path, name: str, make: Callable[[Path], Any], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = layout(tmp_path / "zoo", "{cat,dog}/10")
    make(root / name)
    scan = os.scandir

    def guarded(path: Path) -> Any:
        if Path(path).name == "shut":  # for the superuser no folder is
            raise PermissionError(errno.EACCES, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", guarded)
    with pytest.raises(UserError, match=re.escape(says) + ".*--data.on-error skip"):
        open_source(root)
    splits = open_source(root, on_error="skip")
    assert sum(sizes(splits)) == 20 and len(splits.skipped) == 1 and says in splits.skipped[0]
    assert "1 unreadable images left out" in splits.source


def test_all_pictures_of_a_class_unreadable(tmp_path: Path) -> None:
    root = layout(tmp_path, "{cat,dog}/10")
    for file in (root / "dog").iterdir():
        file.write_bytes(b"x")
    with pytest.raises(
        UserError, match=r"one class only \('cat'\).*; 10 unreadable images left out \(10 of dog\), first dog/000"
    ):
        open_source(root, on_error="skip")


def test_hive_folders_of_any_depth(tmp_path: Path, write_parquet: Callable[..., Path]) -> None:
    for number, place in enumerate(["year=2024/month=1/day=1", "year=2024/month=2/day=1", "year=2025/month=1/day=3"]):
        write_parquet(tmp_path / "all" / place / "part-0.parquet", ["no", "yes"] * 10, seed=100 * number)
    assert sum(sizes(open_source(tmp_path / "all"))) == 60
    for number, place in enumerate(["split=train/year=2024/month=1", "split=test/year=2024/month=1"]):
        write_parquet(tmp_path / "split" / place / "part-0.parquet", ["no", "yes"] * 10, seed=100 * number)
    assert sizes(open_source(tmp_path / "split")) == (16, 4, 20)


def test_tables_beside_those_that_are_named_train_are_told(tmp_path: Path, write_parquet: Callable[..., Path]) -> None:
    write_parquet(tmp_path / "train.parquet", [0, 1] * 10)
    write_parquet(tmp_path / "extra.parquet", [0, 1] * 10, seed=100)
    assert "left out beside the files named train: extra.parquet" in open_source(tmp_path).source


def test_test_images_from_elsewhere(tmp_path: Path, write_folder: Callable[..., Path]) -> None:
    folder = write_folder(tmp_path / "zoo", THREE)
    other = write_folder(tmp_path / "photos", {"cat": 5, "bee": 5}, seed=500)
    splits = open_source(folder, test_source=str(other))
    assert sizes(splits) == (48, 12, 10) and "test images from photos" in splits.source
    check_rows(splits.test, lambda n: (decoding.decode(other / n, None, "rgb"), n.split("/")[0]))
    stranger = write_folder(tmp_path / "strangers", {"cat": 5, "dog": 5}, seed=600)
    with pytest.raises(UserError, match="has class 'dog', which the training images lack"):
        open_source(folder, test_source=str(stranger))
    with pytest.raises(UserError, match="is the training data"):
        open_source(folder, test_source=str(folder))
    small = write_folder(tmp_path / "small", {"cat": 5, "dog": 5}, size=(9, 9), seed=700)
    with pytest.raises(UserError, match="has class 'dog'"):
        open_source(folder, test_source=str(small))


# -- parquet --


def row_of(labels: list[Any], seed: int = 0) -> Callable[[str], tuple[np.ndarray, str]]:
    def expected(name: str) -> tuple[np.ndarray, str]:
        row = int(name.split()[-1])
        return decoding.decode(png(seed + row), None, "rgb"), str(labels[row])

    return expected


HUB = {"info": {"features": {"label": {"names": ["no", "yes"], "_type": "ClassLabel"}, "img": {"_type": "Image"}}}}


@pytest.mark.parametrize(
    "options,names",
    [
        ({}, ("0", "1")),
        ({"image": "image", "struct": True}, ("0", "1")),
        ({"label": "fine_label"}, ("0", "1")),
        ({"metadata": {"class_names": "no,yes"}}, ("no", "yes")),
        ({"metadata": {"huggingface": json.dumps(HUB)}, "struct": True}, ("no", "yes")),
        ({"metadata": {"huggingface": "not JSON"}}, ("0", "1")),
    ],
)
def test_parquet(tmp_path: Path, write_parquet: Callable[..., Path], options: dict[str, Any], names: tuple[str, ...]) -> None:
    labels = [0, 1, 1] * 10
    splits = open_source(write_parquet(tmp_path / "set.parquet", labels, **options))
    assert splits.train.classes == names and sum(sizes(splits)) == 30
    for part in (splits.train, splits.validation, splits.test):
        check_rows(part, row_of([names[label] for label in labels]))


ARROW = ["binary", "large_binary", "binary_view", "binary[20]", "dictionary of binary"]


def of_type(kind: str, cells: list[Any]) -> Any:
    """Cells as an array of one of Arrow's types."""
    import pyarrow as pa

    name, size = kind.removeprefix("dictionary of "), max(map(len, cells))
    if name.endswith("]"):
        return pa.array([cell.ljust(size, b"\0") for cell in cells], pa.binary(size))
    array = pa.array(cells, getattr(pa, name)())
    return pa.DictionaryArray.from_arrays(pa.array(range(len(cells))), array) if kind != name else array


@pytest.mark.parametrize("kind", ARROW)
def test_images_in_every_type_that_arrow_has_for_bytes(tmp_path: Path, write_parquet: Callable[..., Path], kind: str) -> None:
    labels = ["no", "yes"] * 10
    cells = of_type(kind, [png(i) for i in range(20)])
    splits = open_source(write_parquet(tmp_path / "set.parquet", labels, cells=cells))
    for part in (splits.train, splits.validation, splits.test):
        check_rows(part, row_of(labels))


@pytest.mark.parametrize(
    ("labels", "options", "classes"),
    [
        ([False, True] * 10, {}, ("False", "True")),
        ([True] * 5 + [False] * 15, {"metadata": {"class_names": "no,yes"}}, ("no", "yes")),
        ([False, True] * 10, {"kind": "dictionary"}, ("False", "True")),
        (["no", "yes"] * 10, {"kind": "string_view"}, ("no", "yes")),
        (["no", "yes"] * 10, {"kind": "dictionary"}, ("no", "yes")),
        ([3.0, 4.0] * 10, {}, ("3", "4")),
    ],
)
def test_labels_of_every_type(
    tmp_path: Path, write_parquet: Callable[..., Path], labels: list[Any], options: dict[str, Any], classes: tuple[str, ...]
) -> None:
    import pyarrow as pa

    kind, array = options.pop("kind", ""), pa.array(labels)
    array = array.dictionary_encode() if kind == "dictionary" else array.cast(kind) if kind else array
    splits = open_source(write_parquet(tmp_path / "set.parquet", array, **options))
    named = [classes[sorted(set(labels)).index(label)] for label in labels]
    assert splits.train.classes == classes
    for part in (splits.train, splits.validation, splits.test):
        check_rows(part, row_of(named))


def test_columns_can_be_named(tmp_path: Path, write_parquet: Callable[..., Path]) -> None:
    names = ["heron", "ibis"] * 10
    wrong = [png(900 + i) for i in range(20)]
    more = {"name": names, "image": [png(i) for i in range(20)]}
    file = write_parquet(tmp_path / "set.parquet", [0, 1] * 10, cells=wrong, more=more)
    for source in (file, f"hf:{tmp_path}"):
        if source != file:
            pytest.importorskip("datasets")
        assert open_source(source).train.classes == ("0", "1")
        splits = open_source(source, label_column="name", image_column="image")
        assert splits.train.classes == ("heron", "ibis")
        for part in (splits.train, splits.validation, splits.test):
            check_rows(part, row_of(names))
        for settings in ({"label_column": "nam"}, {"image_column": "nam"}):
            with pytest.raises(UserError, match="has no column 'nam', only img, label, name, image: say which it is"):
                open_source(source, **settings)


def test_two_classes_of_one_name_stay_two(tmp_path: Path, write_parquet: Callable[..., Path]) -> None:
    labels = [0, 1, 2] * 10  # ImageNet's short names have two cranes, a bird and a machine
    splits = open_source(write_parquet(tmp_path / "set.parquet", labels, metadata={"class_names": "crane,crane,dog"}))
    for part in (splits.train, splits.validation, splits.test):
        assert part.names is not None
        assert part.labels.tolist() == [labels[int(name.split()[-1])] for name in part.names]


@pytest.mark.parametrize(
    "train,test",
    [
        ("train.parquet", "test.parquet"),
        ("x_train_v2.parquet", "x_test_v2.parquet"),
        ("train-00000-of-00001.parquet", "test-00000-of-00001.parquet"),
    ],
)
def test_a_test_file_beside_the_training_file(
    tmp_path: Path, write_parquet: Callable[..., Path], train: str, test: str
) -> None:
    file = write_parquet(tmp_path / train, [0, 1] * 20)
    write_parquet(tmp_path / test, [0, 1] * 4, seed=100)
    write_parquet(tmp_path / "other.parquet", [0, 1] * 3, seed=200)
    for source in (file, tmp_path):
        splits = open_source(source)
        assert sizes(splits) == (32, 8, 8)
        check_rows(splits.test, row_of([0, 1] * 4, seed=100))
    splits = open_source(file, test_source=str(tmp_path / "other.parquet"))
    assert sizes(splits) == (32, 8, 6)
    with pytest.raises(UserError, match="is the training data"):
        open_source(file, test_source=str(file))
    with pytest.raises(UserError, match="is the training data"):
        open_source(tmp_path, test_source=str(file))


def test_parquet_folders_in_the_hubs_layouts(tmp_path: Path, write_parquet: Callable[..., Path]) -> None:
    write_parquet(tmp_path / "data" / "train-00000-of-00002.parquet", ["no", "yes"] * 10)
    write_parquet(tmp_path / "data" / "train-00001-of-00002.parquet", ["no", "yes"] * 10, seed=100)
    write_parquet(tmp_path / "data" / "validation-00000-of-00001.parquet", ["yes", "no"] * 3, seed=200)
    splits = open_source(tmp_path)
    assert sizes(splits) == (32, 6, 8) and splits.train.classes == ("no", "yes")
    check_rows(splits.validation, row_of(["yes", "no"] * 3, seed=200))
    write_parquet(tmp_path / "by_folder" / "train" / "0000.parquet", [0, 1] * 10)
    write_parquet(tmp_path / "by_folder" / "test" / "0000.parquet", [0, 1] * 5, seed=100)
    assert sizes(open_source(tmp_path / "by_folder")) == (16, 4, 10)


def test_files_of_one_set_must_have_the_same_columns(tmp_path: Path, write_parquet: Callable[..., Path]) -> None:
    write_parquet(tmp_path / "train-0.parquet", [0, 1] * 10)
    write_parquet(tmp_path / "train-1.parquet", [0, 1] * 10, label="target")
    with pytest.raises(UserError, match=r"train-1\.parquet has no 'label', which train-0\.parquet has, only img, target"):
        open_source(tmp_path)


def test_a_path_instead_of_bytes(tmp_path: Path, write_parquet: Callable[..., Path]) -> None:
    cells = [{"bytes": png(i), "path": None} for i in range(20)]
    (tmp_path / "seven.png").write_bytes(png(7))
    cells[7] = {"bytes": None, "path": "seven.png"}
    splits = open_source(write_parquet(tmp_path / "set.parquet", [0, 1] * 10, struct=True, cells=cells))
    for part in (splits.train, splits.validation, splits.test):
        check_rows(part, row_of([0, 1] * 10))


# -- the hub's library --


@pytest.mark.parametrize("embedded", [True, False])
def test_hub_sets_are_read_from_a_local_folder(tmp_path: Path, write_folder: Callable[..., Path], embedded: bool) -> None:
    datasets = pytest.importorskip("datasets")
    folder = write_folder(tmp_path / "zoo", THREE)
    files = sorted(folder.rglob("*.png"))
    labels = [file.parent.name for file in files]
    features = datasets.Features({"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["ant", "bee", "cat", "dog"])})
    cells = [{"bytes": f.read_bytes(), "path": None} if embedded else str(f) for f in files]
    rows = datasets.Dataset.from_dict({"picture": cells, "kind": labels}, features=features)
    parts = rows.train_test_split(test_size=0.25, seed=0)
    (tmp_path / "hub").mkdir()
    for split, part in parts.items():
        part.to_parquet(tmp_path / "hub" / f"{split}.parquet")
    hub = open_source(f"hf:{tmp_path / 'hub'}")
    assert sizes(hub) == (36, 9, 15) and hub.train.classes == ("ant", "bee", "cat", "dog")
    known = {decoding.decode(file, None, "rgb").tobytes(): label for file, label in zip(files, labels, strict=True)}
    for part in (hub.train, hub.validation, hub.test):
        found = [known[pixels.tobytes()] for pixels in part.pixels]
        assert found == [part.classes[label] for label in part.labels]
    assert "1 classes have no training image" in hub.source
    if not embedded:  # a table of one's own may not name files elsewhere
        with pytest.raises(UserError, match="leads out of"):
            open_source(tmp_path / "hub")
        return
    plain = open_source(tmp_path / "hub")
    assert plain.fingerprint == hub.fingerprint and np.array_equal(plain.train.pixels, hub.train.pixels)


@pytest.mark.parametrize(
    ("name", "path", "configuration", "revision"),
    [
        ("hf:Skylion007/openwebtext@refs/convert/parquet", "Skylion007/openwebtext", None, "refs/convert/parquet"),
        ("hf:minhuh/prh@wit_1024", "minhuh/prh", None, "wit_1024"),
        ("hf:some/set:plain@v1.0", "some/set", "plain", "v1.0"),
        ("hf:some/set:plain", "some/set", "plain", None),
    ],
)
def test_a_hub_name_holds_configuration_and_revision(
    monkeypatch: pytest.MonkeyPatch, name: str, path: str, configuration: str | None, revision: str | None
) -> None:
    datasets = pytest.importorskip("datasets")
    asked: list[Any] = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: asked.append((*args, options)))
    load_hub(name)
    assert asked == [(path, configuration, {"revision": revision})]


@pytest.mark.parametrize("name", ["nobody/no-such-set", "/no/such/folder"])
def test_a_hub_set_out_of_reach_is_one_sentence(name: str) -> None:
    pytest.importorskip("datasets")
    with pytest.raises(UserError, match=f"cannot open hf:{name}") as caught:
        open_source(f"hf:{name}")
    assert "\n" not in str(caught.value)


# -- CIFAR-10's binary version --


@pytest.fixture
def binary(tmp_path: Path) -> tuple[Path, np.ndarray]:
    rng = np.random.default_rng(0)
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    rows = rng.integers(0, 256, (6, 40, 3073), dtype=np.uint8)
    rows[:, :, 0] = np.arange(40) % 10
    for i, part in enumerate(rows[:5], start=1):
        part.tofile(folder / f"data_batch_{i}.bin")
    rows[5].tofile(folder / "test_batch.bin")
    (folder / "batches.meta.txt").write_text("airplane\nautomobile\nbird\ncat\ndeer\ndog\nfrog\nhorse\nship\ntruck\n\n")
    return folder, rows


def test_cifar_binary(binary: tuple[Path, np.ndarray]) -> None:
    folder, rows = binary
    splits = open_source(folder)
    assert sizes(splits) == (160, 40, 40) and splits.train.classes[9] == "truck"

    def expected(name: str) -> tuple[np.ndarray, str]:
        row = rows[5 if name.startswith("test") else int(name[11]) - 1][int(name.split()[-1])]
        return row[1:].reshape(3, 32, 32), splits.train.classes[row[0]]

    check_rows(splits.train, expected)
    check_rows(splits.test, expected)
    assert open_source(folder.parent).fingerprint == splits.fingerprint


def test_cifar_binary_cut_off_and_pickles(binary: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    folder, rows = binary
    (folder / "data_batch_3.bin").write_bytes(rows[2].tobytes()[:-1])
    with pytest.raises(UserError, match=r"data_batch_3\.bin' is not a whole"):
        open_source(folder)
    pickled = tmp_path / "py"
    pickled.mkdir()
    (pickled / "data_batch_1").write_bytes(b"cposix\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(UserError, match=r"pickles.* binary version"):
        open_source(pickled)
