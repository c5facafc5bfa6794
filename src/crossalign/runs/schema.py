"""What a run's files may hold: they are held against it once, where they are read, so that nothing behind need doubt it."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from crossalign.core.errors import UserError
from crossalign.core.reading import read_json

REMEDY = "restore it, or delete it and run that run again"
LARGEST = 1e150
"""Of a finite number: its square is one too."""


def number(value: Any) -> bool:
    """None, what is not finite, which readers take for none, or a number that can be computed with."""
    if value is None:
        return True
    return isinstance(value, int | float) and not isinstance(value, bool) and not LARGEST < abs(value) < math.inf


def finite(value: Any) -> bool:
    """A number, and not None."""
    return value is not None and number(value) and math.isfinite(value)


def share(value: Any) -> bool:
    """None, or a number from 0 to 1."""
    return value is None or (number(value) and 0 <= value <= 1)


def count(value: Any) -> bool:
    """None, or a whole number from 0 on that every array holds."""
    return value is None or (isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63)


def text(value: Any) -> bool:
    """None, or text that can be written: JSON's escapes can name half a character, which no file holds."""
    try:
        return value is None or (isinstance(value, str) and value.encode() is not None)
    except UnicodeEncodeError:
        return False


def plain(value: Any) -> bool:
    """None, text, a number, true or false."""
    return isinstance(value, bool) or number(value) or text(value)


Shape = Callable[[Any], bool] | dict[str, Any] | list[Any]
"""A test; by key, "*" for all others, "!" before one that must be there; or of each entry of a list."""
NUMBERS: Shape = {"*": number}
SCORES: Shape = {"accuracy": share, "n": count, "confusion": [[count]], "*": number}
RESULT: Shape = {
    "!row": text, "!seed": count, "test": SCORES, "validation": SCORES, "classes": [text],
    "scores": {"*": NUMBERS}, "held_out": NUMBERS, "parameters": {"groups": {"*": count}, "*": count},
    "seconds": NUMBERS, "alignment": {"before": NUMBERS, "after": NUMBERS, "warning": text, "*": number},
    **dict.fromkeys(("verb", "recipe", "method", "align", "mode", "teacher", "backbone", "weights", "data", "device"), text),
    **dict.fromkeys(("precision", "data_fingerprint"), text),
    **dict.fromkeys(("best_epoch", "epochs", "learning_rate", "peak_memory_bytes", "steps", "tokens"), number),
}  # fmt: skip
"""result.json; None stands for what a run does not have."""
ROW: Shape = {"stage": text, "split": text, "epoch": finite, "step": finite, "*": plain}
"""A line of metrics.jsonl."""
CONFIG: Shape = {"row": text, "seed": count, "align": {"metric": text}, "loop": {"evaluate_blocks": count}}
"""What readers look for in config.yaml."""
ENVIRONMENT: Shape = {
    "inputs": {"*": text},
    **dict.fromkeys(("identity", "command", "started", "git_commit", "git_changed", "cpu"), plain),
    **dict.fromkeys(("cores", "threads", "memory_bytes"), number),
}
STUDY: Shape = {"title": text, "note": text, "rows": [text], "commands": [text]}
SWEEP: Shape = [{"!row": text, "!learning_rate": number, "*": plain}]


def fault(value: Any, shape: Shape, place: str = "") -> str:
    """What a value has that is not of a shape, or lacks, for "it has …"; empty where it is of the shape."""
    if callable(shape):
        return "" if shape(value) else f"'{place}' of {str(value)[:40]!a}"
    if value is None and place:
        return ""
    if type(value) is not type(shape):
        return f"'{place}' of {str(value)[:40]!a}"
    if isinstance(shape, list):
        return next(filter(None, (fault(entry, shape[0], f"{place}[{i}]") for i, entry in enumerate(value))), "")
    return _fault_of_entries(value, shape, place)  # type: ignore[arg-type]


def _fault_of_entries(values: dict[str, Any], shape: dict[str, Any], place: str) -> str:
    for key in shape:
        if key.startswith("!") and values.get(key[1:]) is None:
            return f"no '{f'{place}.{key[1:]}'.strip('.')}'"
    parts = ((key, shape.get(key) or shape.get(f"!{key}") or shape.get("*")) for key in values)
    return next(filter(None, (fault(values[key], part, f"{place}.{key}".strip(".")) for key, part in parts if part)), "")


def shaped(value: Any, shape: Shape, path: Path, remedy: str = REMEDY) -> Any:
    """``value``, which a file holds.

    Raises:
        UserError: it is not of that shape.
    """
    if wrong := fault(value, shape):
        raise UserError(f"{path} has {wrong}; {remedy}")
    return value


def read_shaped(path: Path, shape: Shape, remedy: str = REMEDY) -> Any:
    """What a JSON file holds.

    Raises:
        UserError: it is damaged, or not of that shape.
    """
    return shaped(read_json(path, type(shape), remedy), shape, path, remedy)


def read_result(path: Path) -> dict[str, Any]:
    """The result.json of a finished run.

    Raises:
        UserError: it is damaged, or lacks what a finished run states.
    """
    result: dict[str, Any] = read_shaped(path, RESULT)
    wanted = () if "outcomes" in result else ("test",)
    missing = [key for key in wanted if key not in result]
    if not missing and result.get("test") is not None and "outcomes" not in result and "accuracy" not in result["test"]:
        missing = ["test.accuracy"]  # test is null where it was not scored, as in a sweep
    if missing:
        raise UserError(f"{path} has no '{missing[0]}'; it isn't the result of a finished run")
    return result
