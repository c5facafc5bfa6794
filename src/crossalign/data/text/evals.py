"""Benchmark data in local files, as the rows that the hub's data sets of the same names have.

A file is found by its name (``arc_easy_test.jsonl``, ``copa_dev.jsonl``, ``wikitext2_test.txt``) and checked line by line.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crossalign.core.errors import UserError
from crossalign.data.records import json_lines, whole_text

Row = dict[str, Any]
SPLITS = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}
"""The hub's names of splits, and the words that file names have for them."""


class _Wrong(Exception):
    """What is wrong with a line, in words."""


def _of_type(row: Row, name: str, kind: type | tuple[type, ...], words: str) -> Any:
    if name not in row:
        raise _Wrong(f"field '{name}' is missing")
    if not isinstance(row[name], kind) or isinstance(row[name], bool):
        raise _Wrong(f"field '{name}' holds {row[name]!r:.60}, but {words} is expected")
    return row[name]


def _text(row: Row, name: str, empty: bool = False) -> str:
    value: str = _of_type(row, name, str, "text")
    if not empty and not value.strip():
        raise _Wrong(f"field '{name}' is empty")
    return value


def _texts(row: Row, name: str, least: int = 2) -> list[str]:
    values: list[Any] = _of_type(row, name, list, "a list of texts")
    if len(values) < least:
        raise _Wrong(f"field '{name}' has {len(values)} entries, but at least {least} are expected")
    for value in values:
        if not isinstance(value, str) or not value.strip():
            raise _Wrong(f"field '{name}' has the entry {value!r:.60}, but text is expected")
    return values


def _index(row: Row, name: str, choices: int) -> int:
    value = _of_type(row, name, (int, str), f"a number from 0 to {choices - 1}")
    if not str(value).isdigit() or int(value) >= choices:
        raise _Wrong(f"field '{name}' holds {value!r:.60}, but a number from 0 to {choices - 1} is expected")
    return int(value)


def _answer(row: Row, choices: int) -> int:
    """The index of the right choice, under either of its names."""
    return _index(row, "answer" if "answer" in row else "label", choices)


def _spread(row: Row, names: tuple[str, ...]) -> Row:
    """A processed row, whose choices are one list, with them under the hub's ``names``; any other as it is."""
    listed = next((key for key in ("choices", "endings") if key in row), None)
    if listed is None or any(name in row for name in names):
        return row
    texts = _texts(row, listed, len(names))
    if len(texts) > len(names):
        raise _Wrong(f"field '{listed}' has {len(texts)} entries, but {len(names)} are expected")
    return row | dict(zip(names, texts, strict=True)) | {"label": _answer(row, len(names))}


def _lettered(row: Row, least: int) -> Row:
    """A question with lettered choices in the hub's form; processed, its choices are a list, and its answer an index."""
    if isinstance(row.get("choices"), list):
        texts = _texts(row, "choices", least)
        labels = [chr(ord("A") + i) for i in range(len(texts))]
        answer = labels[_answer(row, len(texts))]
        return {"question": _text(row, "question"), "choices": {"text": texts, "label": labels}, "answerKey": answer}
    choices = _of_type(row, "choices", dict, 'an object such as {"label": […], "text": […]}')
    texts, labels = _texts(choices, "text", least), _texts(choices, "label", least)
    if len(texts) != len(labels):
        raise _Wrong(f"field 'choices' has {len(texts)} texts and {len(labels)} labels")
    key = _text(row, "answerKey")
    if key not in labels:
        raise _Wrong(f"field 'answerKey' holds {key!r:.60}, but one of {', '.join(labels)} is expected")
    return {"question": _text(row, "question"), "choices": {"text": texts, "label": labels}, "answerKey": key}


def _arc(row: Row) -> Row:
    return _lettered(row, 2)


def _commonsense_qa(row: Row) -> Row:
    lettered = _lettered(row, 5)
    if lettered["choices"]["label"] != list("ABCDE"):
        raise _Wrong("field 'choices' has other labels than A, B, C, D and E, which the prompt names")
    return lettered


def _copa(row: Row) -> Row | None:
    if row.get("mirrored"):  # Balanced COPA's second half: the same question turned round, which COPA does not have
        return None
    row = _spread(row, ("choice1", "choice2"))
    question = _text(row, "question")
    if question not in ("cause", "effect"):
        raise _Wrong(f"field 'question' holds {question!r:.60}, but cause or effect is expected")
    texts = {name: _text(row, name) for name in ("premise", "choice1", "choice2")}
    return {**texts, "question": question, "label": _index(row, "label", 2)}


def _lambada(row: Row) -> Row:
    text = _text(row, "text")
    if not all(part.strip() for part in text.rsplit(" ", 1)) or " " not in text:
        raise _Wrong("field 'text' does not end in a space and a word to predict")
    return {"text": text}


def _swag(row: Row) -> Row:
    row = _spread(row, ("ending0", "ending1", "ending2", "ending3"))
    names = ("startphrase", "ending0", "ending1", "ending2", "ending3")
    return {**{name: _text(row, name) for name in names}, "label": _index(row, "label", 4)}


def _hellaswag(row: Row) -> Row:
    texts = {name: _text(row, name, empty=name == "ctx_b") for name in ("activity_label", "ctx_a", "ctx_b")}
    endings = _texts(row, "endings" if "endings" in row else "choices", 4)
    return {**texts, "endings": endings, "label": str(_answer(row, len(endings)))}


def _like_the_first() -> Callable[[Row], Row]:
    """A check that each line has the fields of the first, with the same kind of value or null: a table would fill what is
    missing with null, and a prompt would show it as the word None."""
    kinds: dict[str, type | None] = {}

    def check(row: Row) -> Row:
        kinds.update({} if kinds else dict.fromkeys(row))
        for name in kinds.keys() ^ row.keys():
            raise _Wrong(f"field '{name}' is missing" if name in kinds else f"field '{name}' is not in the lines before")
        for name, value in row.items():
            kind = float if type(value) is int else type(value)
            if value is not None and (kinds[name] or kind) is not kind:
                raise _Wrong(f"field '{name}' holds {value!r:.60}, which is of another kind than in the lines before")
            kinds[name] = kinds[name] if value is None else kind
        return row

    return check


ROWS: dict[str, Callable[[Row], Row | None]] = {
    "arc_easy": _arc,
    "arc_challenge": _arc,
    "copa": _copa,
    "lambada_openai": _lambada,
    "swag": _swag,
    "commonsense_qa": _commonsense_qa,
    "hellaswag": _hellaswag,
}
"""What turns a line of a task into the hub's row, or leaves it out (None)."""
STEMS = {"commonsense_qa": ("commonsenseqa", "commonsense_qa", "csqa"), "wikitext": ("wikitext2", "wikitext")}
"""How the files of a task begin; the others begin with its name."""


@dataclass(frozen=True)
class LocalRows:
    """The rows of one split, with the word that the file's name has for it and what is special about them."""

    path: Path
    rows: list[Row]
    word: str
    note: str


def local_rows(task: str, split: str, folder: Path) -> LocalRows | None:
    """One split of a task from the one file of ``folder`` that is named after both; None where there is none.

    A task that is none of ``ROWS`` gets the lines as they are, from files that begin with its name.

    Raises:
        UserError: there is no such folder, two files fit, or one holds a line that is not of the task's schema.
    """
    if not folder.is_dir():
        raise UserError(f"--data-dir {folder} is no folder: name the one that holds {task}'s files")
    stems, words = "|".join(map(re.escape, STEMS.get(task, (task,)))), "|".join(SPLITS[split])
    pattern = re.compile(rf"(?:{stems})[_-]({words})(?:[_-]\w+)?\.{'txt' if task == 'wikitext' else 'jsonl'}")
    matches = [(path, match) for path in sorted(folder.iterdir()) if (match := pattern.fullmatch(path.name))]
    if not matches:
        return None
    if len(matches) > 1:
        raise UserError(f"'{matches[0][0]}' and '{matches[1][0].name}' are both of {task}'s {split} split: take one away")
    path, match = matches[0]
    rows, note = _wikitext(path) if task == "wikitext" else (_rows(path, ROWS.get(task, _like_the_first())), "")
    if not rows:
        raise UserError(f"'{path}' holds no rows of {task}: copy it again")
    return LocalRows(path, rows, match[1], str(len(rows)) if task == "copa" else note)  # COPA has sets of 100 and of 500


def expected_file(task: str, split: str) -> str:
    """A name under which :func:`local_rows` finds a split of a task."""
    return f"{STEMS.get(task, (task,))[0]}_{SPLITS[split][-1]}.{'txt' if task == 'wikitext' else 'jsonl'}"


def _rows(path: Path, check: Callable[[Row], Row | None]) -> list[Row]:
    rows = []
    remedy = "mend the line, or copy the file again"  # without the line it would be another benchmark
    for record, where, *_ in json_lines(path, title=f"'{path}'", remedy=remedy):
        try:
            rows.append(check(record))
        except _Wrong as error:
            raise UserError(f"{where}: {error}; {remedy}") from error
    return [row for row in rows if row is not None]


def _wikitext(path: Path) -> tuple[list[Row], str]:
    """The articles of WikiText's plain file, cut before each top-level heading, as the hub's document-level set is.

    A heading is a line "= … =" that is not "= = … = =". The released file has <unk> for rare words, the raw one has not.
    """
    text = whole_text(path, lambda error: f"'{path}' cannot be read ({error}): give a UTF-8 file")
    pages: list[list[str]] = [[]]
    for line in text.split("\n"):
        heading = line.replace("= = =", "===").replace("= =", "==").strip()
        if heading.startswith("= ") and heading.endswith(" ="):
            pages.append([])
        pages[-1].append(line)
    rows = [{"page": page} for page in ("\n".join(lines) for lines in pages) if page.strip()]
    return rows, "with <unk>" if "<unk>" in text else "raw"
