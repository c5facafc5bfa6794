"""A corpus: read whatever its form, tokenised once and exactly, resumed to the same bytes, and seen once an epoch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from crossalign import cli
from crossalign.config import CorpusConfig
from crossalign.core.errors import UserError
from crossalign.core.files import _machine
from crossalign.data.text import corpus as corpora
from crossalign.data.text import documents
from crossalign.data.text.corpus import prepare
from crossalign.data.text.documents import list_files, stream
from crossalign.data.text.prepared import Corpus, open_corpus
from crossalign.data.text.tokenizer import END, open_tokenizer, ordinary_text, save_tokenizer, train_tokenizer

WORDS = [
    "the",
    "cat",
    "sat on",
    "a mat;",
    "私は猫です.",
    "Straße",
    "naïve\u00a0café",
    "—",
    "“so”",
    "12 345",
    "e\u0301",
    "👩‍👩‍👧",
]
WORDS += ["\t", "x", "", "y\r\n"]
ODD = [
    "",
    " ",
    "\n\n \t\r\n",
    "don't  DON'T 'll\u2019s",
    f"a{END}b <|endof",
    "\x00\x01\x7f\ufeff\u200b\u200d\u2028\u00ad",
    "e\u0301 é ﬁ ﷺ ẛ̣ ꙮ 𐍈 𝔘 \U0010ffff",
    "👩‍👩‍👧‍👦🏳️‍🌈🇺🇳",
    "हिन्दी العربية עברית ไทย 中文 한국어",
    "".join(chr(c) for c in range(0x20, 0x3000, 7) if unicodedata.category(chr(c)) != "Cs"),
]


def text_of(seed: int, words: int = 200) -> str:
    rng = np.random.default_rng(seed)
    return f"Story {seed}\n" + "".join(WORDS[i] + " \n"[int(i % 7 == 0)] for i in rng.integers(0, len(WORDS), words))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces and chunks small enough that a few pages have many."""
    monkeypatch.setattr(documents, "PIECE", 700)
    monkeypatch.setattr(corpora, "CHUNK", 3000)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """All kinds of files: 12 documents and 3 empty ones."""
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("\ufeff" + text_of(0, 600), encoding="utf-8", newline="")
    (folder / "b.txt").write_text(" \n", encoding="utf-8")
    rows = [{"text": text_of(i, 300), "id": i} for i in range(1, 6)] + [{"text": " "}]
    (folder / "c.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8")
    values = [text_of(i, 300) for i in range(6, 12)]
    pq.write_table(pa.table({"text": [*values[:3], None, *values[3:]]}), folder / "d.parquet", row_group_size=2)
    return folder


def config_of(source: Path | str, **settings: Any) -> CorpusConfig:
    return CorpusConfig(source=(str(source),), **{"vocabulary": 400, "validation_fraction": 0.2} | settings)


def content(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def texts_of(corpus: Corpus, side: str) -> list[str]:
    tokens = getattr(corpus, side).tokens.tolist()
    assert tokens[0] == tokens[-1] == corpus.separator
    found, held = [], []
    for token in tokens[1:]:
        if token == corpus.separator:
            found.append(corpus.tokenizer.decode(held))
            held = []
        else:
            held.append(token)
    return found


def test_every_document_comes_back_on_one_side(folder: Path, tmp_path: Path, small: None) -> None:
    corpus = prepare(config_of(folder), tmp_path / "out")
    train, validation = texts_of(corpus, "train"), texts_of(corpus, "validation")
    assert sorted(train + validation) == sorted([text_of(0, 600), *(text_of(i, 300) for i in range(1, 12))])
    assert (len(train), len(validation)) == (corpus.train.documents, corpus.validation.documents)
    assert validation and len(train) > len(validation)
    assert corpus.meta["empty_documents"] == 3
    assert corpus.train.bytes == sum(len(text.encode()) for text in train)
    assert corpus.train.tokens.dtype == np.uint16 and isinstance(corpus.train.tokens, np.memmap)
    whole = corpus.tokenizer(train, add_special_tokens=False)["input_ids"]  # pieces have the tokens of the whole
    assert corpus.train.tokens[1:].tolist() == [token for ids in whole for token in [*ids, corpus.separator]]


def test_the_split_goes_by_the_text_alone(folder: Path, tmp_path: Path) -> None:
    first = prepare(config_of(folder), tmp_path / "first")
    rows = [{"body": text} for text in [*texts_of(first, "train"), *texts_of(first, "validation")][::-1]]
    (tmp_path / "same.jsonl").write_text("\n".join(map(json.dumps, rows + rows)), encoding="utf-8")
    second = prepare(config_of(tmp_path / "same.jsonl", text_column="body"), tmp_path / "second")
    assert set(texts_of(second, "validation")) == set(texts_of(first, "validation"))
    assert second.validation.documents == 2 * first.validation.documents  # copies stay on their side
    others = [prepare(config_of(folder, split_seed=seed), tmp_path / f"seed-{seed}") for seed in (1, 2, 3)]
    assert len({tuple(sorted(texts_of(corpus, "validation"))) for corpus in [first, *others]}) > 1
    assert len({corpus.fingerprint for corpus in [first, second, *others]}) == 5


@pytest.mark.parametrize("fraction", [0.001, 0.999])
def test_neither_side_is_ever_empty(folder: Path, tmp_path: Path, fraction: float) -> None:
    corpus = prepare(config_of(folder, validation_fraction=fraction), tmp_path / "out")
    assert min(corpus.train.documents, corpus.validation.documents) == 1


@pytest.mark.parametrize("newlines", [True, False])
def test_a_lone_document_is_cut(tmp_path: Path, small: None, newlines: bool) -> None:
    text = text_of(3, 3000) if newlines else text_of(3, 3000).replace("\n", " ")
    (tmp_path / "book.txt").write_text(text, encoding="utf-8", newline="")
    corpus = prepare(config_of(tmp_path / "book.txt", validation_fraction=0.1), tmp_path / "out")
    (head,), (tail,) = texts_of(corpus, "train"), texts_of(corpus, "validation")
    assert head + tail == text
    assert abs(len(tail.encode()) / len(text.encode()) - 0.1) < 0.05
    assert corpus.train.tokens[1:-1].tolist() == corpus.tokenizer(head)["input_ids"]


def test_a_lone_document_is_cut_where_a_piece_ends(tmp_path: Path, small: None) -> None:
    (tmp_path / "x.txt").write_text("x" * 1400)
    corpus = prepare(config_of(tmp_path / "x.txt", validation_fraction=0.5), tmp_path / "out")
    assert texts_of(corpus, "train") == texts_of(corpus, "validation") == ["x" * 700]


@pytest.mark.parametrize("lone", [False, True])
def test_a_call_stopped_anywhere_is_finished_to_the_same_bytes(
    folder: Path, tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch, lone: bool
) -> None:
    """Stopped before each write of the state in turn, with half of what it was to append already in the file."""
    if lone:
        folder = folder / "a.txt"
        folder.write_text(text_of(0, 4000), encoding="utf-8", newline="")
    expected = prepare(config_of(folder), tmp_path / "whole").folder
    real_write, left = corpora.write_json, 0

    def write(path: Path, value: Any) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            for file in path.parent.glob("*.bin"):
                file.write_bytes(file.read_bytes() + b"\x01\x02\x03")
            (path.parent / f".meta.json.{_machine()}.{1 << 23}.00000000").write_bytes(b"")  # of a process that is gone
            raise MemoryError
        real_write(path, value)

    monkeypatch.setattr(corpora, "write_json", write)
    for calls in range(100):
        left = 1 + calls % 3  # none, one or two writes of a call come to pass
        try:
            prepare(config_of(folder), tmp_path / "stopped")
        except MemoryError:
            with pytest.raises(UserError, match=r"is not finished|no meta\.json"):
                open_corpus(tmp_path / "stopped")
        else:
            break
    assert calls >= 6
    assert content(tmp_path / "stopped") == content(expected)


KILLED = """
import os, signal, sys
from crossalign.config import CorpusConfig
from crossalign.data.text import corpus, documents
documents.PIECE, corpus.CHUNK = 700, 3000
append, calls = corpus.Preparation._append, []
def dying(self, side, tokens):
    calls.append(side)
    if len(calls) == 9:
        with (self.output / f"{side}.bin").open("ab") as file:
            file.write(b"half")
            file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    append(self, side, tokens)
corpus.Preparation._append = dying
corpus.prepare(CorpusConfig(source=(sys.argv[1],), vocabulary=400, validation_fraction=0.2), sys.argv[2])
"""


def test_kill_9_and_go_on(folder: Path, tmp_path: Path, small: None) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(folder), str(tmp_path / "killed")], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-500:]
    state = json.loads((tmp_path / "killed" / "meta.json").read_text())["state"]
    assert state["train"]["tokens"] > 1 and state["place"] > [0, 0, 0]
    prepare(config_of(folder), tmp_path / "killed")
    prepare(config_of(folder), tmp_path / "whole")
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


def test_a_finished_folder_is_opened_and_others_are_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare(config_of(folder), tmp_path / "out")
    monkeypatch.setattr(corpora.Preparation, "run", lambda self: pytest.fail("works again"))
    os.utime(folder / "a.txt")  # the content counts, not the time
    assert prepare(config_of(folder), tmp_path / "out").fingerprint == first.fingerprint
    for changes, says in (
        ({"vocabulary": 300, "split_seed": 4}, "vocabulary is 400 there and 300 here; split_seed is 0 there and 4 here"),
        ({"tokenizer": str(tmp_path / "out" / "tokenizer")}, "tokenizer is 'trained' there"),
    ):
        with pytest.raises(UserError, match=says):
            prepare(config_of(folder, **changes), tmp_path / "out")
    with pytest.raises(UserError, match=r"source is a.txt, b.txt, c.jsonl and 1 more there and a.txt here"):
        prepare(config_of(folder / "a.txt"), tmp_path / "out")
    (folder / "a.txt").write_text("other")
    with pytest.raises(UserError, match=r"source: a\.txt has changed"):
        prepare(config_of(folder), tmp_path / "out")
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    (tmp_path / "out" / "meta.json").write_text(json.dumps(meta | {"settings": {}}))
    with pytest.raises(UserError, match=r"source is nothing there and a.txt, b.txt, c.jsonl and 1 more here"):
        prepare(config_of(folder), tmp_path / "out")


def test_a_tokenizer_trained_here_round_trips_any_text_and_repeats(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    texts = [text_of(i) for i in range(20)]
    tokenizer = train_tokenizer(texts, 340)
    save_tokenizer(tokenizer, tmp_path / "tokenizer")
    opened = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert opened.bos_token == opened.eos_token == END and len(opened) == 340
    assert opened.convert_tokens_to_ids(END) == 0
    for text in [*ODD, "\n".join(ODD), *texts]:
        ids = opened(text)["input_ids"]
        assert opened.decode(ids) == text
        with ordinary_text(opened) as backend:
            plain = backend.encode(text, add_special_tokens=False).ids
        assert 0 not in plain and opened.decode(plain) == text
    again = train_tokenizer(iter(texts), 340)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    for ref in (tmp_path / "tokenizer", tmp_path / "tokenizer" / "tokenizer.json"):
        assert open_tokenizer(str(ref)).eos_token_id == 0
    lone = tmp_path / "tokenizer.json"
    lone.write_bytes((tmp_path / "tokenizer" / "tokenizer.json").read_bytes())
    assert open_tokenizer(str(lone)).eos_token == END


def test_a_tokenizer_file_that_is_missing_is_not_made_up_from_its_neighbours(tmp_path: Path) -> None:
    train_tokenizer([text_of(0)], 340).save_pretrained(tmp_path)
    parts = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(parts["vocab"]))
    (tmp_path / "merges.txt").write_text("\n".join(" ".join(pair) for pair in parts["merges"]))
    (tmp_path / "tokenizer.json").unlink()
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": "GPT2TokenizerFast"}))
    assert open_tokenizer(str(tmp_path)).eos_token == END
    with pytest.raises(UserError, match=r"no model folder at .*tokenizer\.json"):
        open_tokenizer(str(tmp_path / "tokenizer.json"))


def test_a_separator_spelled_out_in_a_text_is_text(tmp_path: Path) -> None:
    rows = [{"text": f"one{END}two {i}"} for i in range(6)]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    corpus = prepare(config_of(tmp_path / "t.jsonl"), tmp_path / "out")
    assert np.count_nonzero(corpus.train.tokens == corpus.separator) == corpus.train.documents + 1
    assert f"one{END}two" in texts_of(corpus, "train")[0]


def test_a_tokenizer_that_cannot_be_cut_gets_whole_documents(shared_data: Path, tmp_path: Path, small: None) -> None:
    """stories260K puts a space before each text that it is given, so pieces would gain spaces."""
    texts = [text_of(i, 400) for i in range(4)]
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    corpus = prepare(config_of(tmp_path / "t.jsonl", tokenizer=str(shared_data / "models/stories260K")), tmp_path / "out")
    opened = open_tokenizer(str(shared_data / "models/stories260K"))
    assert corpus.separator == opened.bos_token_id
    expected = Counter(tuple(opened(text, add_special_tokens=False)["input_ids"]) for text in texts)
    joined = [corpus.train.tokens.tolist(), corpus.validation.tokens.tolist()]
    assert sum(map(len, joined)) == sum(len(ids) + 1 for ids in expected) + 2
    assert all(any(str(list(ids))[1:-1] in str(side) for side in joined) for ids in expected)


def test_novels(shared_data: Path, tmp_path: Path) -> None:
    """A slice of real text: split by novel, read exactly, and better compressed than by bytes."""
    table = pq.read_table(shared_data / "text" / "english_novels_100.parquet").slice(10, 5)
    table = table.set_column(1, "text", [[text[:60_000] for text in table["text"].to_pylist()]])
    pq.write_table(table, tmp_path / "novels.parquet")
    corpus = prepare(CorpusConfig(source=(str(tmp_path / "novels.parquet"),), vocabulary=1024), tmp_path / "out")
    assert sorted(texts_of(corpus, "train") + texts_of(corpus, "validation")) == sorted(table["text"].to_pylist())
    assert (corpus.train.documents, corpus.validation.documents) == (4, 1)
    assert 2.5 < corpus.train.bytes / len(corpus.train) < 4


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "dictionary"])
def test_texts_in_every_type_that_arrow_has(tmp_path: Path, kind: str) -> None:
    texts = [text_of(i, 300) for i in range(6)]
    array = pa.array(texts).dictionary_encode() if kind == "dictionary" else pa.array(texts, getattr(pa, kind)())
    pq.write_table(pa.table({"text": array}), tmp_path / "a.parquet")
    corpus = prepare(config_of(tmp_path / "a.parquet"), tmp_path / "out")
    assert sorted(texts_of(corpus, "train") + texts_of(corpus, "validation")) == sorted(texts)


def test_a_hub_set_is_read_like_any_other(tmp_path: Path, folder: Path) -> None:
    pytest.importorskip("datasets", reason="needs the extra hub")
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "train.jsonl").write_text("\n".join(json.dumps({"text": text_of(i)}) for i in range(5)))
    files, _ = list_files([f"hf:{tmp_path / 'hub'}"], "text")
    pieces = list(stream(files))
    assert [piece.text for piece in pieces] == [text_of(i) for i in range(5)]
    assert [piece.text for piece in stream(files, pieces[2].after)] == [text_of(i) for i in (3, 4)]
    with pytest.raises(UserError, match="has no 'body', only text"):
        list_files([f"hf:{tmp_path / 'hub'}"], "body")


@pytest.mark.parametrize("size", [40, 700, 1 << 16])
def test_reading_goes_on_from_every_piece(folder: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(documents, "PIECE", size)
    files, _ = list_files([str(folder)], "text")
    pieces = list(stream(files))
    for number in range(0, len(pieces), 1 + len(pieces) // 40):
        assert list(stream(files, pieces[number].after)) == pieces[number + 1 :]
    assert max(len(piece.text) for piece in pieces) <= size


def test_files_named_test_are_not_trained_on(tmp_path: Path) -> None:
    for name in ("wiki.train.tokens", "wiki.valid.tokens", "wiki.test.tokens"):
        (tmp_path / name).write_text(name)
    files, left_out = list_files([str(tmp_path)], "text")
    assert [f.name for f in files] == ["wiki.train.tokens"] and sorted(left_out) == ["wiki.test.tokens", "wiki.valid.tokens"]
    (tmp_path / "wiki.train.tokens").unlink()
    assert len(list_files([str(tmp_path)], "text")[0]) == 2  # the names then say nothing of a split


def write_bad(folder: Path) -> Iterator[tuple[str, str]]:
    def put(name: str, data: bytes) -> str:
        (folder / name).write_bytes(data)
        return str(folder / name)

    yield put("a.jsonl", b'{"text": "x"}\n{"body": "y", "id": 1}\n'), "a.jsonl line 2 has no 'text', only body, id"
    yield put("b.jsonl", b'{"text": 3}'), "b.jsonl line 1, 'text', holds int, not text"
    yield put("c.jsonl", b'{"text": "x"}\n{"te'), "c.jsonl line 2 is not valid JSON"
    yield put("d.jsonl", b"[1]"), "d.jsonl line 1 holds list"
    yield put("e.jsonl", b'{"text": "\\ud800"}'), "e.jsonl line 1.*lone surrogate"
    yield put("f.txt", b"caf\xc3\xa9 \xff"), r"f.txt is not UTF-8 text \(byte 6\)"
    yield put("g.parquet", b"PAR1 cut off"), "cannot read parquet file g.parquet"
    yield put("h.txt", b" \n"), "the corpus has no text: its 1 documents are empty"
    yield put("i.csv", b"a,b"), r"corpus source .*i.csv' is no .txt"
    pq.write_table(pa.table({"text": [1], "body": ["x"]}), folder / "j.parquet")
    yield str(folder / "j.parquet"), "column 'text' of j.parquet holds int64, not text; the columns are text, body"
    pq.write_table(pa.table({"body": ["x"]}), folder / "k.parquet")
    yield str(folder / "k.parquet"), "k.parquet has no 'text', only body"
    (folder / "empty").mkdir()
    yield str(folder / "empty"), "holds no .txt"
    yield str(folder / "nowhere"), "does not exist"
    yield "", "corpus source '' does not exist"


def test_bad_input_is_told_before_long_work(tmp_path: Path, folder: Path) -> None:
    for number, (source, says) in enumerate(write_bad(tmp_path)):
        with pytest.raises(UserError, match=says):
            prepare(config_of(source), tmp_path / f"out-{number}")
        assert not (tmp_path / f"out-{number}" / "meta.json").exists()
    for settings, says in (
        ({"validation_fraction": 1.0}, "must lie between 0 and 1"),
        ({"vocabulary": 100}, "--vocabulary is 100; it must be at least 257"),
        ({"split_seed": -1}, "--split-seed is -1; it must be a whole number from 0"),
        ({"tokenizer": str(folder)}, "is not a Hugging Face model folder|has no tokenizer"),
    ):
        with pytest.raises(UserError, match=says):
            prepare(config_of(folder, **settings), tmp_path / "bad")
    with pytest.raises(UserError, match="has no source"):
        prepare(CorpusConfig(), tmp_path / "bad")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "train.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"holds train\.bin but no meta\.json"):
        prepare(config_of(folder), tmp_path / "taken")


def test_open_corpus_tells_what_is_wrong(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no prepared corpus"):
        open_corpus(tmp_path)
    out = prepare(config_of(folder), tmp_path / "out").folder
    with (out / "train.bin").open("ab") as file:
        file.write(b"12")
    with pytest.raises(UserError, match=r"but its meta\.json says"):
        open_corpus(out)
    (out / "train.bin").unlink()
    with pytest.raises(UserError, match=r"lacks its token file train\.bin"):
        open_corpus(out)
    (out / "meta.json").write_text("{}")
    with pytest.raises(UserError, match="was not written by"):
        open_corpus(out)


def test_the_command_prepares_and_says_so(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["data", "prepare", "--source", str(folder), "--vocabulary", "300", "--output", str(tmp_path / "out")]
    assert cli.main(args) == 0
    assert "left out: 3 empty documents" in capsys.readouterr().out
    assert open_corpus(tmp_path / "out").vocabulary == 300
    for wrong, says in (
        (["data", "prepar"], "unknown verb 'data prepar'; did you mean 'data prepare'?"),
        (["data", "prepare", "--sorce", "x"], "did you mean --source?"),
    ):
        assert cli.main(wrong) == 2
        assert says in capsys.readouterr().err
    assert cli.main(["data"]) == cli.main(["data", "--help"]) == 0
    assert "data prepare" in capsys.readouterr().out
