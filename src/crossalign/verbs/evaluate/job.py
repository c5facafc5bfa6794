"""``evaluate``: score a causal language model on benchmark tasks, through lm-evaluation-harness (CMAR §4).

Open and check the data, then the model; check that every question fits; score task by task, each kept as soon as it is done,
and skip what an earlier call scored with the same data, prompts and weights. Of a classifier that ``adapt`` made, the
language model inside is scored, beside the one that it was made from: the difference is what was forgotten (CMDA §4.1).
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from crossalign.config import EvaluateConfig, LoopConfig, validate
from crossalign.core.device import device_name, resolve_device
from crossalign.core.errors import UserError, missing_extra
from crossalign.core.files import atomic_path, content_key, write_json
from crossalign.core.machine import environment, is_main_process
from crossalign.core.reading import read_json
from crossalign.runs.names import EvaluationFolder, RunFolder

if TYPE_CHECKING:
    from crossalign.verbs.evaluate.harness import EvalTask
    from crossalign.verbs.evaluate.model import Scored, Scorer

ASKED = ("prompt", "answers", "loglikelihoods", "said", "target")  # columns of outputs/, all others are scores


def evaluate(config: EvaluateConfig, *, quiet: bool = False) -> dict[str, Any]:
    """Score a model and return what results.json holds: ``{"tasks": {name: {"label", "n", "metrics", "stderr", …}}, …}``.

    Of several processes the first alone has what was just scored.

    Raises:
        UserError: bad input, before anything is scored.
    """
    validate(config)
    names = list(dict.fromkeys(name.strip() for given in config.tasks for name in given.split(",") if name.strip()))
    if not names:
        raise UserError("--tasks names no task: give some, such as arc_easy,copa")
    if importlib.util.find_spec("lm_eval") is None:
        raise missing_extra("lm-eval", "eval", "crossalign evaluate")
    from crossalign.verbs.evaluate.harness import open_task, task_files
    from crossalign.verbs.evaluate.model import open_scored

    device: Any = resolve_device(config.device, "--device")
    config = dataclasses.replace(config, device=device)
    tasks = [
        open_task(name, config.data_dir, config.few_shot, config.limit, config.seed)
        for given in names
        for name in task_files(given)
    ]
    if len({task.name for task in tasks}) < len(tasks):
        raise UserError("--tasks names two task files of one task: results are kept by task, so give them in two calls")
    opened = open_scored(config.model, config.bos)
    named = "".join(c if c.isalnum() or c in "-." else "-" for c in Path(config.model).name)
    folder = config.output or (RunFolder(opened.run).evaluation if opened.run else Path("runs") / f"evaluation-{named}")
    folder.mkdir(parents=True, exist_ok=True)
    EvaluationFolder(folder).refuse_links()
    try:
        with FileLock(folder / f".lock{os.environ.get('RANK', '0')}", blocking=False):
            before = None
            if opened.before and config.before:
                unchanged = open_scored(opened.before, config.bos)
                before = _score(unchanged, tasks, config, EvaluationFolder(folder).before, quiet)
            results = _score(opened, tasks, config, folder, quiet, before)
    except Timeout as error:
        raise UserError(f"another process is evaluating into {folder}: wait for it, or choose another --output") from error
    if is_main_process():
        _track(results, folder, opened, config)
    return results


def _score(
    opened: Scored,
    tasks: list[EvalTask],
    config: EvaluateConfig,
    folder: Path,
    quiet: bool,
    before: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Score the tasks that ``folder`` does not hold yet, or holds of something else."""
    from crossalign.data.text.tokenizer import fingerprint
    from crossalign.verbs.evaluate.harness import VERSION, check_requests, score_task

    scorer = _open_scorer(opened, config)
    seen = {"bos": opened.bos, "precision": config.precision, "max_length": scorer.max_length}
    depends = {"weights": opened.fingerprint, "tokenizer": fingerprint(opened.tokenizer), "too_long": config.too_long, **seen}
    keys = {task.name: content_key(task=task.fingerprint, **depends) for task in tasks}
    done = _done(folder, opened, keys)
    waiting = [task for task in tasks if task.name not in done]
    for task in waiting:  # all of them, before the first is scored
        if len(task.documents()) < scorer.world_size:
            raise UserError(f"{task.name} has fewer documents than there are processes: start fewer, or raise --limit")
    cut = {task.name: check_requests(task, scorer, config.too_long) for task in waiting}
    facts = {"model": opened.ref, "fingerprint": opened.fingerprint, "harness": f"lm-eval {VERSION}"}
    for task in tasks:
        started = time.monotonic()
        scored = score_task(task, scorer) if task in waiting else None
        if scored is not None:  # in the first process, which writes
            summary, rows = scored
            _write_rows(folder, task.name, rows)
            done[task.name] = {
                "label": task.label,
                "n": len(rows),
                "documents": len(task.task.eval_docs),
                "few_shot": task.few_shot,
                **summary,
                "cut": 0 if task.skipped else cut[task.name],
                **({"skipped": len(task.skipped)} if task.skipped else {}),
                **seen,
                "seconds": round(time.monotonic() - started, 3),
                "device": device_name(config.device),
                "processes": scorer.world_size,
                "harness": VERSION,
                "data_fingerprint": task.fingerprint,
                "model_fingerprint": opened.fingerprint,
                "key": keys[task.name],
            }
            write_json(EvaluationFolder(folder).results, {"tasks": done, **facts})
        if is_main_process() and not quiet:
            print(describe(done[task.name]), flush=True)
    results = {"tasks": done, **facts} | ({"forgetting": _forgetting(before, done)} if before else {})
    if is_main_process():
        write_json(EvaluationFolder(folder).results, results)
        write_json(RunFolder(folder).environment, environment())
    scorer.barrier()
    return results


def _open_scorer(opened: Scored, config: EvaluateConfig) -> Scorer:
    """The harness's adapter of the opened model, on its device."""
    import torch

    from crossalign.training.session import make_accelerator
    from crossalign.verbs.evaluate.harness import quietly
    from crossalign.verbs.evaluate.model import Scorer

    longest = getattr(opened.model.config, "max_position_embeddings", None)
    if config.max_length and longest and config.max_length > longest:
        raise UserError(f"'{opened.ref}' sees {longest} tokens: lower --max-length {config.max_length}")
    accelerator = make_accelerator(LoopConfig(device=config.device, precision="fp32"))
    opened.model.to(accelerator.device, torch.bfloat16 if config.precision == "bf16" else torch.float32)
    with quietly("opening"):
        return Scorer(opened, config.batch_size, config.max_length, accelerator)


def _done(folder: Path, opened: Scored, keys: dict[str, str]) -> dict[str, Any]:
    """What an earlier call scored of the same model: tasks of the same key, and those not asked for now.

    Raises:
        UserError: there is a results.json of something else, or a damaged one.
    """
    file = EvaluationFolder(folder).results
    try:
        tasks = read_json(file)["tasks"] if file.exists() else {}
        return {
            name: entry
            for name, entry in tasks.items()
            if entry["model_fingerprint"] == opened.fingerprint
            and entry["key"] == keys.get(name, entry["key"])
            and all(_count_rows(folder / part / f"{name}.parquet") == entry["n"] for part in ("samples", "outputs"))
        }
    except (UserError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"'{file}' is damaged or not of crossalign evaluate: take it away, or choose another --output"
        ) from error


def _count_rows(file: Path) -> int:
    """Rows of a parquet file; -1 of one that is not there or damaged."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return int(pq.read_metadata(file).num_rows)
    except (OSError, pa.ArrowException):
        return -1


def _write_rows(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    """A row a document: scores in samples/, what the model was asked and answered in outputs/."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    scores = [{key: value for key, value in row.items() if key not in ASKED} for row in rows]
    asked = [{key: row[key] for key in ("doc_id", *ASKED)} for row in rows]
    for part, table in (("samples", scores), ("outputs", asked)):
        with atomic_path(folder / part / f"{name}.parquet") as temporary:
            pq.write_table(pa.Table.from_pylist(table), temporary)


def _forgetting(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Each metric of each task before and after the language model became a classifier, where both were scored alike."""
    alike = ("data_fingerprint", "bos", "precision", "max_length")
    return {
        name: {
            metric: {"before": old, "after": after[name]["metrics"][metric]}
            for metric, old in entry["metrics"].items()
            if metric in after[name]["metrics"]
        }
        for name, entry in before["tasks"].items()
        if name in after and all(entry.get(key) == after[name].get(key) for key in alike)
    }


def _track(results: dict[str, Any], folder: Path, opened: Scored, config: EvaluateConfig) -> None:
    """Show the numbers on the MLflow run of the training that made the model, or on one of their own."""
    from crossalign.training.tracking import log_results

    numbers: dict[str, float] = {}
    for name, entry in results["tasks"].items():
        numbers |= {f"evaluation/{name}/{metric}": value for metric, value in entry["metrics"].items()}
        errors = {metric: error for metric, error in entry["stderr"].items() if error is not None}
        numbers |= {f"evaluation/{name}/{metric}_stderr": error for metric, error in errors.items()}
    for name, metrics in results.get("forgetting", {}).items():
        numbers |= {f"evaluation/before/{name}/{metric}": value["before"] for metric, value in metrics.items()}
    home = opened.run if opened.run and folder.parent == opened.run else folder
    params = {"model": opened.ref, "harness": results["harness"], "bos": opened.bos}
    log_results(home, config.tracking, f"evaluation of {opened.ref}", params, numbers)


def describe(entry: dict[str, Any]) -> str:
    """One task's scores in a line, with their standard errors."""
    scores = [
        f"{metric} {value:.4g}" + (f" ± {error:.2g}" if (error := entry["stderr"].get(metric)) is not None else "")
        for metric, value in entry["metrics"].items()
    ]
    shots = f", {entry['few_shot']}-shot" if entry["few_shot"] else ""
    cut = f", {entry['cut']} cut at their beginning" if entry["cut"] else ""
    cut += f", {entry['skipped']} too long and left out" if entry.get("skipped") else ""
    return f"{entry['label']} ({entry['n']:,} documents{shots}{cut}): {', '.join(scores)}; {entry['seconds']:.0f} s"
