"""Benchmark data in local files: found by name, checked line by line, in the hub's schema."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from crossalign.core.errors import UserError
from crossalign.data.text.evals import expected_file, local_rows

ARC = {"question": "Why?", "choices": ["a", "b"], "answer": 1}
COPA = {"premise": "It rained.", "choice1": "A.", "choice2": "B.", "question": "cause", "label": 0}
SWAG = {"startphrase": "He", **{f"ending{i}": f"did {i}" for i in range(4)}, "label": 3}
CSQA = {"question": "Where?", "choices": {"label": list("ABCDE"), "text": list("vwxyz")}, "answerKey": "C"}
HELLA = {"activity_label": "Run", "ctx_a": "A man.", "ctx_b": "", "endings": list("abcd"), "label": 2}


def write(folder: Path, name: str, *rows: Any) -> Path:
    path = folder / name
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_rows_have_the_hub_s_schema(tmp_path: Path) -> None:
    hub = {"question": "Why?", "choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answerKey": "2"}
    write(tmp_path, "arc_easy_test.jsonl", ARC, "", {"id": "x", **hub})
    write(tmp_path, "copa_dev_balanced.jsonl", {**COPA, "mirrored": False}, {**COPA, "mirrored": True}, COPA)
    write(tmp_path, "hellaswag-val.jsonl", HELLA)
    found = local_rows("arc_easy", "test", tmp_path)
    assert found is not None and found.word == "test"
    assert found.rows == [{"question": "Why?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B"}, hub]
    copa = local_rows("copa", "validation", tmp_path)
    assert copa is not None and (len(copa.rows), copa.word, copa.note) == (2, "dev", "2")
    hella = local_rows("hellaswag", "validation", tmp_path)
    assert hella is not None and hella.rows[0]["label"] == "2"
    assert local_rows("arc_easy", "train", tmp_path) is None
    assert local_rows("arc_challenge", "test", tmp_path) is None


def test_files_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    for name, content in (("arc_easy_test.jsonl", json.dumps(ARC) + "\n"), ("wikitext2_test.txt", " = A = \n a b \n")):
        (tmp_path / name).write_text(content)
        plain = local_rows(name.split("_")[0].replace("2", "") + ("_easy" if "arc" in name else ""), "test", tmp_path)
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content.encode())
        marked = local_rows(name.split("_")[0].replace("2", "") + ("_easy" if "arc" in name else ""), "test", tmp_path)
        assert plain is not None and marked == plain


def test_wikitext_is_cut_at_top_level_headings(tmp_path: Path) -> None:
    text = " \n = One = \n \n Text . \n = = Part = = \n More = text . \n = Two = \n \n End <unk> . \n"
    (tmp_path / "wikitext2_test.txt").write_text(text)
    found = local_rows("wikitext", "test", tmp_path)
    assert found is not None and found.note == "with <unk>"
    assert [row["page"].split()[1] for row in found.rows] == ["One", "Two"]
    assert "\n".join(row["page"] for row in found.rows) == text.removeprefix(" \n")


def test_the_real_files(shared_data: Path) -> None:
    counts = {}
    for task, split in (("arc_easy", "test"), ("arc_challenge", "test"), ("copa", "validation"), ("wikitext", "test")):
        found = local_rows(task, split, shared_data / "evals")
        assert found is not None
        counts[task] = len(found.rows)
    # COPA's 500 originals of 1,000; and as many articles as the hub's EleutherAI/wikitext_document_level has
    assert counts == {"arc_easy": 2376, "arc_challenge": 1172, "copa": 500, "wikitext": 62}


@pytest.mark.parametrize(
    ("task", "split", "row", "says"),
    [
        ("arc_easy", "test", {**ARC, "answer": 2}, "line 2: field 'answer' holds 2, but a number from 0 to 1 is expected"),
        ("arc_easy", "test", {**ARC, "answer": True}, "field 'answer' holds True"),
        ("arc_easy", "test", {**ARC, "question": " "}, "line 2: field 'question' is empty; mend the line"),
        ("arc_easy", "test", {**ARC, "choices": ["a", 3]}, "field 'choices' has the entry 3"),
        ("arc_easy", "test", {"question": "Why?", "answer": 0}, "field 'choices' is missing"),
        (
            "arc_easy",
            "test",
            '{"question": ',
            "line 2 is not valid JSON (Expecting value: line 1 column 14 (char 13)): mend the line, or copy the file again",
        ),
        ("arc_easy", "test", "[1]", "line 2 holds list; each line is an object"),
        ("copa", "validation", {**COPA, "question": "why"}, "field 'question' holds 'why', but cause or effect is expected"),
        ("swag", "validation", {**SWAG, "ending2": None}, "field 'ending2' holds None, but text is expected"),
        ("commonsense_qa", "validation", {**CSQA, "answerKey": "F"}, "field 'answerKey' holds 'F', but one of A, B, C, D, E"),
        ("hellaswag", "validation", {**HELLA, "endings": ["a"]}, "field 'endings' has 1 entries, but at least 4"),
        ("lambada_openai", "test", {"text": "one "}, "does not end in a space and a word"),
        ("lambada_openai", "test", {"text": ""}, "field 'text' is empty"),
    ],
)
def test_a_line_of_another_schema_is_told_with_file_line_and_field(
    tmp_path: Path, task: str, split: str, row: Any, says: str
) -> None:
    good = {"arc_easy": ARC, "copa": COPA, "swag": SWAG, "commonsense_qa": CSQA, "hellaswag": HELLA}
    path = write(tmp_path, expected_file(task, split), good.get(task, {"text": "two words"}), row)
    with pytest.raises(UserError) as told:
        local_rows(task, split, tmp_path)
    assert says in str(told.value) and str(path) in str(told.value)


def test_files_that_leave_no_rows_or_a_doubt_are_told(tmp_path: Path) -> None:
    write(tmp_path, "copa_dev.jsonl", {**COPA, "mirrored": True})
    with pytest.raises(UserError, match="holds no rows of copa"):
        local_rows("copa", "validation", tmp_path)
    write(tmp_path, "copa_val.jsonl", COPA)
    with pytest.raises(UserError, match=r"copa_dev.jsonl' and 'copa_val.jsonl' are both"):
        local_rows("copa", "validation", tmp_path)
    (tmp_path / "wikitext2_test.txt").write_text(" \n")
    with pytest.raises(UserError, match="holds no rows of wikitext"):
        local_rows("wikitext", "test", tmp_path)
    with pytest.raises(UserError, match="is no folder"):
        local_rows("copa", "validation", tmp_path / "nowhere")


LISTED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "arc_challenge": ("test", {"question": "Why?", "choices": ["a", "b"], "label": 1}, {**ARC, "choices": ["a", "b"]}),
    "commonsense_qa": ("validation", {"question": "Where?", "choices": list("vwxyz"), "answer": 2}, CSQA),
    "copa": ("validation", {"premise": "It rained.", "question": "cause", "choices": ["A.", "B."], "answer": 0}, COPA),
    "swag": ("validation", {"startphrase": "He", "endings": [f"did {i}" for i in range(4)], "label": 3}, SWAG),
    "hellaswag": ("validation", {**{k: HELLA[k] for k in HELLA if k != "endings"}, "choices": list("abcd")}, HELLA),
}


@pytest.mark.parametrize("task", LISTED)
def test_processed_files_have_a_list_of_choices_and_an_index(task: str, tmp_path: Path) -> None:
    split, listed, plain = LISTED[task]
    folders = [tmp_path / "listed", tmp_path / "plain"]
    for folder, row in zip(folders, (listed, plain), strict=True):
        folder.mkdir()
        write(folder, expected_file(task, split), row)
    found = [local_rows(task, split, folder) for folder in folders]
    assert found[0] is not None and found[1] is not None and found[0].rows == found[1].rows
    index = "answer" if "answer" in listed else "label"
    write(folders[0], expected_file(task, split), listed, listed | {index: 7})
    with pytest.raises(UserError, match=rf"{expected_file(task, split)}' line 2: field '{index}' holds 7, but a number"):
        local_rows(task, split, folders[0])
