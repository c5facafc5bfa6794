"""lm-evaluation-harness as we use it: our task files, local rows in place of the hub's, our models, quietly.

It is imported where a verb needs it: importing it takes seconds.
"""

import contextlib
import functools
import inspect
import io
import json
import logging
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from itertools import compress
from pathlib import Path
from typing import Any

import lm_eval.api.model
import lm_eval.api.task
import lm_eval.models.huggingface
from datasets import Dataset
from lm_eval.api.metrics import bits_per_byte, perplexity, stderr_for_metric, weighted_perplexity
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate as run_harness
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks._yaml_loader import load_yaml
from pyarrow import ArrowException

from crossalign.core.errors import UserError, cause, first_line
from crossalign.core.files import content_key
from crossalign.core.progress import progress
from crossalign.core.reading import user_path
from crossalign.data.model_files import quiet
from crossalign.data.text.evals import expected_file, local_rows
from crossalign.verbs.evaluate import TASKS
from crossalign.verbs.evaluate.model import Scorer

VERSION = metadata.version("lm_eval")
os.environ.setdefault("DISABLE_MULTIPROC", "1")  # its bootstrap would fork a process a core, next to torch's threads
BOOTSTRAP = 1000  # resamples for a standard error that has no formula
LOCAL_FORMATS = ("json", "csv", "text", "parquet", "arrow")
_SPLIT_KEYS = {"train": "training_split", "validation": "validation_split", "test": "test_split"}


@dataclass
class EvalTask:
    """A task of the harness with its documents."""

    name: str
    label: str
    """What tables call it: data set, split and what is special about it."""
    task: Any
    """The harness's ``ConfigurableTask``."""
    few_shot: int
    limit: int | None
    seed: int
    skipped: frozenset[int] = frozenset()
    """Places of documents that are left out."""

    def documents(self) -> list[dict[str, Any]]:
        """The documents that are scored, with those that are left out of them."""
        return list(self.task.eval_docs)[: self.limit]

    @property
    def fingerprint(self) -> str:
        """A hash of the prompt, the documents and the examples before them: of all that the scores depend on but the model."""
        rows = ("custom_dataset", "dataset_path", "dataset_name", "dataset_kwargs", "metadata")  # where they came from
        config = self.task.config.to_dict(keep_callable=True)
        task = json.loads(json.dumps({key: value for key, value in config.items() if key not in rows}, default=_source))
        examples = list(self.task.fewshot_docs() or []) if self.few_shot else []
        return content_key(
            config=task, documents=self.documents(), examples=examples, seed=self.seed if self.few_shot else 0, harness=VERSION
        )

    def __post_init__(self) -> None:
        self.task.build_all_requests = self.build  # what the harness calls
        self.task.doc_iterator = self.numbered

    def build(self, rank: int = 0, world_size: int = 1, **_: Any) -> list[Any]:
        """This process's requests. Examples are drawn for all documents in order, so that no number of processes and no
        earlier call changes them."""
        self.task.set_fewshot_seed(self.seed)
        ConfigurableTask.build_all_requests(self.task, limit=self.limit)
        keeps = (request.doc_id % world_size == rank and request.doc_id not in self.skipped for request in self.task._instances)
        self.task._instances = list(compress(self.task._instances, keeps))
        return list(self.task._instances)

    def numbered(self, *, rank: int = 0, world_size: int = 1, **_: Any) -> Iterator[tuple[int, Any]]:
        """This process's documents, each with its place."""
        for place, document in enumerate(self.documents()):
            if place % world_size == rank and place not in self.skipped:
                yield place, document


def _source(value: Any) -> str:
    """What JSON cannot hold: functions as their source, with that of the file they stand in, which they may call."""
    if not callable(value):
        return str(value)
    try:
        return inspect.getsource(value) + inspect.getsource(inspect.getmodule(value) or value)
    except (OSError, TypeError):
        return str(getattr(value, "__qualname__", repr(type(value))))


@functools.cache
def _of_harness() -> dict[tuple[str, str], list[Path]]:
    """The harness's task files by what each says that it is: ("task" | "group" | "tag", name).

    Its own index reads each file as YAML, and takes 25 seconds.
    """
    said = re.compile(r"^\"?(task|group|tag)\"?:[ \t]*(.*(?:\n[ \t]*-[ \t].*)*)", flags=re.MULTILINE)
    found: dict[tuple[str, str], list[Path]] = {}
    for file in sorted((Path(lm_eval.__file__).parent / "tasks").rglob("*.yaml")):
        text = file.read_text(encoding="utf-8", errors="replace")
        parts = said.findall(text)
        included = re.search(r"^\"?include\"?:[ \t]*[\"']?([^\s\"']+)", text, flags=re.MULTILINE)
        if included and "tag" not in dict(parts) and (base := file.parent / included[1]).is_file():  # a tag is taken over
            inherited = said.findall(base.read_text(encoding="utf-8", errors="replace"))
            parts += [part for part in inherited if part[0] == "tag"]
        for kind, names in parts:
            listed = kind == "task" and re.search(r"^group:", text, flags=re.MULTILINE)
            for name in [] if listed else re.findall(r"[\w.+-]*\w", names.split(" #")[0]):
                found.setdefault((kind, name), []).append(file)
    return found


def task_files(name: str) -> list[str]:
    """What :func:`open_task` takes for ``name``: itself, or the harness's file of that task, or those of its group or tag."""
    if Path(name).suffix in (".yaml", ".yml") or name in TASKS:
        return [name]
    files = _of_harness()
    if ("task", name) in files:
        return [str(files["task", name][0])]
    if ("group", name) in files:
        members = load_yaml(files["group", name][0]).get("task") or []
        names = [member if isinstance(member, str) else member.get("group") or member.get("task") for member in members]
        return list(dict.fromkeys(file for member in names if isinstance(member, str) for file in task_files(member)))
    return list(map(str, files.get(("tag", name)) or [TASKS[name]]))


def open_task(name: str, data: Path | None, few_shot: int = 0, limit: int | None = None, seed: int = 1234) -> EvalTask:
    """One of our tasks by name, or a user's .yaml file, with its documents from ``data`` or from where the file says.

    Raises:
        UserError: an unknown task, a file that is no task, data that are not there or not of the schema.
    """
    config = _read_task(user_path(name) if Path(name).suffix in (".yaml", ".yml") else TASKS[name])
    title = (config.get("metadata") or {}).get("title", config["task"])
    shots = config["num_fewshot"] = few_shot or config.get("num_fewshot") or 0
    if shots and config.get("output_type") == "loglikelihood_rolling":
        raise UserError(f"--few-shot {shots}: {config['task']} is running text and takes no examples: score it in a call apart")
    scored = "test" if config.get("test_split") else "validation"
    if data is not None and config.get("dataset_path") not in LOCAL_FORMATS and not config.get("custom_dataset"):
        title = f"{title} {_take_local(config, data, scored, shots)}"
    elif config["task"] in TASKS:
        title = f"{title} {scored}"
    if shots and not any(config.get(key) for key in ("training_split", "fewshot_split", "fewshot_config")):
        # Examples are the others of the scored split; it is named, so that the harness leaves out the one that is asked.
        split = config.get(f"{scored}_split")
        config.update(fewshot_split=split, test_split=split, validation_split=None)
    try:
        with quietly(name):
            task = ConfigurableTask(config=config)
    except Exception as error:  # the hub, the network and the files of others fail in many ways
        if config.get("custom_dataset"):  # the rows are here, so it is the first prompt that failed
            raise _no_prompts(config["task"], error) from error
        raise UserError(
            f"cannot open the data of {config['task']} ({cause(error)}): check the network, or "
            "name a folder of local data with --data-dir"
        ) from error
    if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
        raise UserError(f"{config['task']} runs what the model writes, or shows images: such tasks are not run here")
    if shots:
        asked_too = task.fewshot_cfg.split == task.config.test_split  # then the document that is asked is no example
        if shots > (examples := len(task.fewshot_docs()) - asked_too):
            raise UserError(f"--few-shot {shots} is more than the {examples} examples that {title} has")
    return EvalTask(config["task"], title, task, shots, limit, seed)


def _no_prompts(name: str, error: Exception) -> UserError:
    return UserError(f"the prompts of {name} cannot be made ({cause(error)}): mend its task file or its data")


def _read_task(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"no task file at '{path}'; tasks of our own: {', '.join(TASKS.names())}")
    try:
        config: dict[str, Any] = load_yaml(path)
    except Exception as error:  # YAML of others, and the Python that it names
        raise UserError(f"'{path}' is no task file of lm-evaluation-harness ({first_line(error)})") from error
    for key in ("tag", "group", "task_list"):
        config.pop(key, None)
    if not isinstance(config.get("task"), str):
        raise UserError(f"'{path}' names no task, or several: give the task files one by one")
    if not re.fullmatch(r"\w[\w.-]*", config["task"]):  # results are kept under it
        raise UserError(
            f"'{path}' names its task '{config['task']}': use letters, digits, '_', '-' and '.' alone, a letter or digit first"
        )
    return config


def _take_local(config: dict[str, Any], folder: Path, scored: str, shots: int) -> str:
    """Put local rows in place of the hub's; what the label says of them."""
    task = config["task"]
    wanted = [scored] + (["train"] if shots and config.get("training_split") else [])
    local = {split: part for split in wanted if (part := local_rows(task, split, folder))}
    if scored not in local:
        names = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise UserError(f"'{folder}' has no data of {task}: {expected_file(task, scored)} is expected (there: {names})")
    rows = {}
    for split, part in local.items():
        try:
            rows[split] = Dataset.from_list(part.rows)
        except (ArrowException, TypeError, ValueError) as error:
            mixed = f"the lines of '{part.path}' do not go into one table ({first_line(error)})"
            raise UserError(f"{mixed}: give each field one kind of value") from error
    for split, key in _SPLIT_KEYS.items():
        config[key] = split if split in rows else None
    config.update(
        fewshot_split=None, dataset_path=None, dataset_name=None, dataset_kwargs=None, custom_dataset=lambda **_: rows
    )
    return f"{local[scored].word} {local[scored].note}".rstrip()


@contextlib.contextmanager
def quietly(title: str) -> Iterator[None]:
    """The harness without its log, prints and bars; one bar of ours over the requests that the model answers."""

    def bar(items: Any = None, **given: Any) -> Any:
        return progress(given["total"], title, unit="request", leave=False) if items is None else items

    logger = logging.getLogger("lm_eval")
    modules: tuple[Any, ...] = (lm_eval.api.model, lm_eval.api.task, lm_eval.models.huggingface)
    level = logger.level
    bars = [module.tqdm for module in modules]
    logger.setLevel(logging.CRITICAL)
    for module in modules:
        module.tqdm = bar
    try:
        with quiet(), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
        for module, of_harness in zip(modules, bars, strict=True):
            module.tqdm = of_harness


def check_requests(opened: EvalTask, scorer: Scorer, too_long: str) -> int:
    """Count the documents of a task that are longer than the model sees; before anything is scored. With "skip" they are left
    out of it from now on.

    Raises:
        UserError: there are some and ``too_long`` is "stop", or no other; with "cut" an answer alone is longer; a question or
            an answer is empty; or the task's own file cannot make a prompt of a document.
    """
    with quietly(opened.name):
        try:
            requests = opened.build()
        except Exception as error:  # templates and Python of others, on data of others
            raise _no_prompts(opened.name, error) from error
        lengths = [(request.doc_id, *_lengths(request, scorer)) for request in requests]
    long: dict[int, int] = {}
    for document, question, answer in lengths:
        where = f"{opened.name}, document {document + 1}"
        if not question or not answer:
            raise UserError(f"{where}: its text is empty, or its answer, so there is nothing to score")
        if too_long == "cut" and answer > scorer.max_length:
            raise UserError(
                f"{where}: its answer alone takes {answer} tokens, and the model sees {scorer.max_length}: leave such "
                "documents out with --too-long skip"
            )
        if question + answer - 1 > scorer.max_length:
            long[document] = max(question + answer - 1, long.get(document, 0))
    if long and too_long == "skip":
        opened.skipped = frozenset(long)
        if len(long) == len(opened.documents()):
            raise UserError(
                f"all documents of {opened.name} are longer than the {scorer.max_length} tokens that the model sees"
            )
    elif long and too_long == "stop":
        first, examples = min(long), "leave examples out (--few-shot), or " if opened.few_shot else ""
        raise UserError(
            f"{len(long)} of {len(opened.documents())} documents of {opened.name} have more than the {scorer.max_length} "
            f"tokens that the model sees (document {first + 1}: {long[first]}): {examples}cut their "
            "beginning off with --too-long cut, or leave them out with --too-long skip"
        )
    return len(long)


def _lengths(request: Any, scorer: Scorer) -> tuple[int, int]:
    """Tokens of the question and of the answer, which go into the model at once but for the last; 1 of each where a text is
    read in pieces. 0 where there is none."""
    if request.request_type == "loglikelihood_rolling":
        return 1, int(bool(request.args[0].strip()))
    if request.request_type == "generate_until":
        room = normalize_gen_kwargs(dict(request.args[1]), scorer.max_gen_toks)["max_gen_toks"]
        return len(scorer.tok_encode(request.args[0])), room + 1  # its last token goes in as well
    question, answer = request.args
    if not question:  # the harness puts a token before the answer
        return 1, len(scorer.tok_encode(answer, add_special_tokens=False))
    before, after = scorer._encode_pair(question, answer)
    return len(before), len(after)


def score_task(opened: EvalTask, scorer: Scorer) -> tuple[dict[str, Any], list[dict[str, Any]]] | None:
    """Run one task; its summary and a row a document in their order, in the first process alone.

    Returns:
        ``{"metrics": {name: value}, "stderr": …, "higher_is_better": …}`` and the rows: ``doc_id``, what was measured, and
        under ``prompt``, ``answers``, ``loglikelihoods`` and ``target`` what the model was asked and said.
    """
    with quietly(opened.name):
        scored = run_harness(scorer, {"tasks": {opened.name: opened.task}}, limit=opened.limit, bootstrap_iters=0)
    if scored is None:
        return None
    samples = sorted(scored["samples"][opened.name], key=lambda sample: sample["doc_id"])
    first = samples[0]["filter"]
    summary: dict[str, Any] = {"metrics": {}, "stderr": {}, "higher_is_better": {}}
    for key, value in scored["results"][opened.name].items():
        metric, _, filtered = key.partition(",")
        if not filtered or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        name = metric if filtered in ("none", first) else f"{metric} ({filtered})"
        items = [sample[metric] for sample in samples if sample["filter"] == filtered and metric in sample]
        summary["metrics"][name] = float(value)
        summary["stderr"][name] = _stderr(opened.task.aggregation().get(metric), items, float(value))
        summary["higher_is_better"][name] = opened.task.higher_is_better().get(metric)
    rows = [_row(sample, opened.task.OUTPUT_TYPE) for sample in samples if sample["filter"] == first]
    if opened.task.OUTPUT_TYPE == "loglikelihood" and "loglikelihood" in rows[0]:  # LAMBADA's words are of many tokens
        items = [(row["loglikelihood"], row["bytes"]) for row in rows]
        value = bits_per_byte(items)
        summary["metrics"]["bits_per_byte"], summary["higher_is_better"]["bits_per_byte"] = value, False
        summary["stderr"]["bits_per_byte"] = _stderr(bits_per_byte, items, value)
    return summary, _with_ids(rows)


def _stderr(aggregation: Any, items: list[Any], value: float) -> float | None:
    """The standard error of a metric over documents: the harness's own, or by the delta method where it has none or
    resamples for minutes. None where there is none."""
    if len(items) < 2:
        return None
    if aggregation is perplexity:
        return value * _ratio_stderr([(item, 1.0) for item in items])
    if aggregation is weighted_perplexity:
        return value * _ratio_stderr(items)
    if aggregation is bits_per_byte:
        return _ratio_stderr(items) / math.log(2)
    formula = stderr_for_metric(aggregation, BOOTSTRAP)
    with quietly(""):
        return float(formula(items)) if formula else None


def _ratio_stderr(items: Sequence[tuple[float, float]]) -> float:
    """Standard error of Σx/Σw over documents (x, w), each a draw: √(n/(n−1) Σ(x − r w)²) / Σw (Cochran 1977, §6.3)."""
    n, total = len(items), sum(w for _, w in items)
    ratio = sum(x for x, _ in items) / total
    return math.sqrt(n / (n - 1) * sum((x - ratio * w) ** 2 for x, w in items)) / total


def _row(sample: dict[str, Any], kind: str) -> dict[str, Any]:
    """What was measured on one document, log-likelihoods with the words and bytes that they are of."""
    row: dict[str, Any] = {"document": sample["doc"]}
    for metric in sample["metrics"]:
        value = sample[metric]
        if kind == "loglikelihood" and metric == "perplexity":
            word = sample["arguments"][0][1]
            row |= {"loglikelihood": float(value), "words": float(len(word.split())), "bytes": float(len(word.encode()))}
        elif kind == "loglikelihood_rolling" and isinstance(value, tuple):
            row["loglikelihood"], counted = float(value[0]), float(value[1])
            row["words" if metric == "word_perplexity" else "bytes"] = counted
        elif isinstance(value, int | float):
            row[metric] = float(value)
    answers = [str(arguments[-1]) for arguments in sample["arguments"]]
    row["prompt"] = "" if kind == "loglikelihood_rolling" else str(sample["arguments"][0][0])
    row["answers"] = answers if kind in ("multiple_choice", "loglikelihood") else []
    responses = [response[0] if isinstance(response, list | tuple) else response for response in sample["filtered_resps"]]
    row["loglikelihoods"] = [float(value) for value in responses] if kind != "generate_until" else []
    row["said"] = str(responses[0]) if kind == "generate_until" else ""
    row["target"] = "" if kind == "loglikelihood_rolling" else str(sample["target"])
    return row


def _with_ids(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each row with an id that is a hash of its document, so that runs pair by it; the second of two equal ones gets a 2."""
    seen = Counter[str]()
    named = []
    for row in rows:
        key = content_key(document=json.dumps(row.pop("document"), sort_keys=True, default=str))[:16]
        seen[key] += 1
        named.append({"doc_id": key if seen[key] == 1 else f"{key}-{seen[key]}", **row})
    return named
