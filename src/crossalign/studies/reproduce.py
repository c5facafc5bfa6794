"""``reproduce``: run a whole table. Each row gets the same sweep of learning rates on validation, then its seeds.

Every run is a run folder of its own, so a study that was stopped goes on where it was, and ``report`` reads what is there.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Collection, Iterable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from crossalign.config import AdaptConfig, FinetuneConfig, PretrainConfig, update
from crossalign.core.errors import UserError, unknown
from crossalign.core.files import write_json
from crossalign.core.machine import command_line
from crossalign.core.refs import Ref
from crossalign.core.registry import Registry
from crossalign.recipes import all_recipes, get_recipe
from crossalign.recipes.cmar import TEACHERS
from crossalign.recipes.cmda import CONTROLS, METHODS, METRICS
from crossalign.results.outcomes import chosen_by
from crossalign.runs.folder import differences
from crossalign.runs.names import RunFolder, StudyFolder
from crossalign.runs.records import read_run
from crossalign.studies.workers import hand_out, process_pool, run_verb
from crossalign.training.stops import Interrupted

Config: TypeAlias = AdaptConfig | PretrainConfig | FinetuneConfig


@dataclasses.dataclass(frozen=True)
class Study:
    """A study: rows, and the recipe of each at either scale."""

    title: str
    rows: tuple[str, ...]
    small: str
    """Name of a row's recipe, with the row in place of ``{}``."""
    paper: str = ""
    """The same as published; "" where the paper has no such table."""
    paper_rows: tuple[str, ...] = ()
    """Rows of the published table; empty: ``rows``."""
    paper_seeds: int = 3
    """Runs a row of the published table."""

    def usual_rows(self, scale: str) -> tuple[str, ...]:
        """The rows that run unless others are asked for."""
        return (self.paper_rows if scale == "paper" else ()) or self.rows

    def known_rows(self, scale: str) -> tuple[str, ...]:
        """The usual rows, and every other one that a recipe of the same verb bears the name of."""
        usual = self.usual_rows(scale)
        prefix = (self.small if scale == "small" else self.paper).format("")
        names = all_recipes(type(get_recipe(self.recipe(usual[0], scale)).make()))
        return tuple(dict.fromkeys([*usual, *(name.removeprefix(prefix) for name in names if name.startswith(prefix))]))

    def recipe(self, row: str, scale: str) -> str:
        """The name of a row's recipe; the row "aligned" is the recipe without a suffix.

        Raises:
            UserError: a table that is not the paper's, at its scale.
        """
        pattern = self.small if scale == "small" else self.paper
        if not pattern:
            raise UserError(f"--scale {scale}: '{self.title}' is no table of a paper; leave --scale out")
        return pattern.format(row).removesuffix("-aligned")


TABLE1 = [m if a == "none" else f"{m}-{a}" for m in METHODS for a in METRICS] + list(CONTROLS)
TERMS = ("baseline", "aligned", "unpaired", "mean", "random-teacher", "l2", "captions")
_STUDIES = {
    "cmda-table1": Study(
        "CMDA Table 1, with cosine and the controls",
        tuple(TABLE1),
        "small-{}",
        "cmda-{}",
        paper_rows=(*TABLE1, "fpt-matched"),
    ),
    "cmar-pretrain": Study(
        "CMAR: pre-training with and without alignment, with controls",
        TERMS,
        "small-pretrain-{}",
        "cmar-pretrain-{}",
        paper_rows=("baseline", *TEACHERS),  # Table 3 and Fig. 3
        paper_seeds=5,
    ),
    "cmar-finetune": Study("CMAR: fine-tuning with and without alignment, with controls", TERMS, "small-finetune-{}"),
    "quickstart": Study(
        "MiniLM learns to read digits", ("fpt", "fpt-random", "lora", "lora-mmd", "full", "full-random"), "small-{}"
    ),
    "quickstart-text": Study(
        "A small GPT learns Python's documentation", ("baseline", "aligned", "unpaired"), "small-pretrain-{}"
    ),
}
STUDIES: Registry[Study] = Registry("study", _STUDIES)

QUICKSTART: dict[str, tuple[str, tuple[str, ...], str]] = {
    "quickstart": (
        "digits",
        (),
        "MiniLM, which never saw an image, learns to read 8 × 8 digits; controls have random weights.",
    ),
    "quickstart-text": (
        "text",
        (
            "corpus.source=[python:topics]",
            "corpus.validation_fraction=0.1",
            "corpus.vocabulary=1024",
            "gpt.layers=3",
            "gpt.width=96",
            "block=64",
            "loop.batch_size=16",
            "loop.steps=300",
            "loop.evaluate_every=50",
        ),
        "A small GPT learns Python's documentation; every 20 steps emoji names are pulled towards their pictures.",
    ),
}
"""Each study's folder, settings, and what it is in a sentence."""


@dataclasses.dataclass(frozen=True)
class StudyRun:
    """One run of a study."""

    name: str
    recipe: str
    config: Config


def reproduce(
    study: str,
    output: Path,
    *,
    scale: str = "small",
    seeds: int | None = None,
    lrs: tuple[float, ...] = (),
    sweep_epochs: int = 0,
    workers: int = 1,
    settings: tuple[str, ...] = (),
    only: tuple[str, ...] = (),
) -> int:
    """Run ``study`` into ``output`` and write its report; returns 0, or 1 if a run failed (the others still finish).

    ``only`` names rows: those of the table, or any other that has a recipe. ``seeds`` None takes as many as the published
    table has runs, or 3.

    Raises:
        UserError: unknown study, row or setting; all before the first run.
    """
    from crossalign.verbs.language_model import row_name

    table = STUDIES[study]
    known = table.known_rows(scale)
    for row in only:
        if row not in known:
            raise unknown("row", row, known, listed="rows are the ends of the names that crossalign plan --list gives")
    rows = [row for row in known if row in (only or table.usual_rows(scale))]
    recipes = {row: table.recipe(row, scale) for row in rows}
    base = {row: configured(recipes[row], settings) for row in rows}
    for row, config in base.items():
        if config.tracking.mlflow and not config.tracking.mlflow_uri:  # one store for all runs, which lie in many folders
            tracking = dataclasses.replace(config.tracking, mlflow_uri=f"sqlite:///{(output / 'mlflow.db').resolve()}")
            base[row] = dataclasses.replace(config, tracking=tracking)
        if not isinstance(config, AdaptConfig):
            base[row] = dataclasses.replace(base[row], row=config.row or row_name(config))
    _check_sources([config for config in base.values() if isinstance(config, AdaptConfig)])
    for config in base.values():
        if isinstance(config, PretrainConfig) and not (config.prepared or config.corpus.source):
            raise UserError("the study has no text: give --set corpus.source=[novels.parquet], or prepared=FOLDER")
        if isinstance(config, FinetuneConfig) and not (config.model and config.data.source):
            raise UserError("the study has no model or no data: give --set model=FOLDER data.source=[tasks.jsonl]")
    _write_study(output, table.title, [base[row].row for row in rows], settings)
    sweep = [
        StudyRun(f"sweep/{row}/lr-{lr:g}", recipes[row], _sweep_config(base[row], output, row, lr, sweep_epochs))
        for lr in lrs
        for row in rows
    ]
    swept, failed = _run_all(sweep, workers)
    best = _choose(rows, base, sweep, swept, output)
    rows = [row for row in rows if row in best or not lrs]  # a row whose sweep failed has no learning rate of its own
    finals = []
    for seed in range((table.paper_seeds if scale == "paper" else 3) if seeds is None else seeds):
        for row in rows:
            optim = dataclasses.replace(base[row].optim, lr=best.get(row, base[row].optim.lr))
            config = dataclasses.replace(base[row], seed=seed, optim=optim, output=output / row / f"seed-{seed}")
            config.overwrite = bool(lrs) and _differs_in_rate_alone(config)
            finals.append(StudyRun(f"{row}/seed-{seed}", recipes[row], config))
    done, failed_finals = _run_all(finals, workers)
    for name, reason in (failed | failed_finals).items():
        print(f"failed: {name}: {reason}", file=sys.stderr)
    if done:
        _show(output)
    return 1 if failed or failed_finals else 0


def quickstart(output: Path) -> int:
    """Both jobs in minutes, one seed, no hub; prints a table, the page's path and the time of each, and of choosing formats.

    Language → vision: six rows on digits. Vision → language: a small GPT on Python's own documentation, whose features of
    emoji names are pulled, or not, towards those of the pictures.
    """
    from crossalign.training.precision import timed

    codes, before = [], timed["seconds"]
    for study, (folder, settings, told) in QUICKSTART.items():
        started = time.monotonic()
        print(told)
        codes.append(reproduce(study, output / folder, seeds=1, workers=1, settings=settings))
        print(f"{folder}: {(time.monotonic() - started) / 60:.1f} minutes\n")
    spent = timed["seconds"] - before
    print(f"of these, {spent:.1f} seconds went into timing steps, to choose number formats and whether to compile")
    return max(codes)


def read_setting(setting: str) -> tuple[str, str, Any]:
    """The key of ``key=value``, and its value as text and as YAML has it.

    Raises:
        UserError: no ``=``, or a value that is no YAML.
    """
    key, sign, text = setting.partition("=")
    if not sign:
        raise UserError(f"--set {setting}: write key=value, such as loop.epochs=5")
    try:
        return key, text, yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"--set {setting}: the value is no YAML ({' '.join(str(error).split())})") from error


def configured(recipe: str, settings: tuple[str, ...]) -> Any:
    """The recipe with ``key=value`` settings put in; raises UserError for a key that does not exist."""
    config: Any = get_recipe(recipe).make()
    for setting in settings:
        key, text, _ = read_setting(setting)
        if key == "backbone.ref":  # a control keeps its kind of weights: random:REF and so on
            if wrong := Ref(text).control:
                raise UserError(f"--set {setting}: name the pretrained model; the control rows put '{wrong}:' to it")
            text = Ref(config.backbone.ref).like(text)
        if key == "teacher.ref":
            text = Ref(config.teacher.ref).like(text)
        if key == "align.metric" and isinstance(config, PretrainConfig | FinetuneConfig) and not _is_usual(config):
            continue  # the baseline and the controls keep their own
        value: Any = yaml.safe_load(text)
        for part in reversed(key.split(".")):
            value = {part: value}
        config = update(config, value)
    return config


def _is_usual(config: PretrainConfig | FinetuneConfig) -> bool:
    """Whether a row is one whose metric a study may choose: not the baseline, a penalty, captions or the mean."""
    from crossalign.alignment import similarities

    return config.align.metric in similarities and config.align.mode != "mean"


def _check_sources(configs: list[AdaptConfig]) -> None:
    """Say once, before any run, what is wrong with images and backbones; no worker decodes the images again."""
    from crossalign.data.images.load import open_images
    from crossalign.models.language.model import open_language_model

    for data in {repr(config.data): config.data for config in configs}.values():
        open_images(data)
    for ref in {config.backbone.ref for config in configs}:
        open_language_model(ref, weights=False)


def _sweep_config(config: Config, output: Path, row: str, lr: float, epochs: int) -> Config:
    folder, optim = output / "sweep" / row / f"lr-{lr:g}", dataclasses.replace(config.optim, lr=lr)
    if not isinstance(config, AdaptConfig):
        return dataclasses.replace(config, output=folder, optim=optim)
    loop = dataclasses.replace(config.loop, epochs=epochs or config.loop.epochs)
    return dataclasses.replace(config, output=folder, optim=optim, loop=loop, score_test=False)


def _choose(
    rows: list[str], base: dict[str, Config], sweep: list[StudyRun], done: Collection[str], output: Path
) -> dict[str, float]:
    """The learning rate of each row with the best validation number; the whole sweep goes into sweep.json.

    What that file says of rows that are not in this call stays.
    """
    best: dict[str, float] = {}
    file, titles = StudyFolder(output).sweep, {base[row].row for row in rows}
    table = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    table = [entry for entry in table if entry["row"] not in titles]
    for row in rows:
        tried = [(chosen_by(read_run(j.config.output)), j) for j in sweep if j.name in done and j.name.split("/")[1] == row]
        if not tried:
            continue
        top = max(tried, key=lambda pair: pair[0].value * (-1 if pair[0].outcome.lower_is_better else 1))[1]
        best[row] = top.config.optim.lr
        for score, job in tried:
            number = {f"validation_{score.outcome.name}": score.value}
            lr, epochs = job.config.optim.lr, getattr(job.config.loop, "epochs", None)
            table.append({"row": base[row].row, "learning_rate": lr, **number, "epochs": epochs, "chosen": job is top})
    if table:
        write_json(file, table)
    return best


def _run_all(jobs: list[StudyRun], workers: int) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Run every job; results and the reasons of failures, by name. A failed run costs no other."""
    if workers == 1 or not jobs:
        return _collect(((job, partial(_run_job, job)) for job in jobs), len(jobs))
    waiting = list(jobs)

    def more(flying: Collection[StudyRun]) -> StudyRun | None:
        return waiting.pop(0) if waiting else None

    with process_pool(workers) as pool, closing(hand_out(pool, _run_job, more)) as done:
        return _collect(((job, future.result) for job, future in done), len(jobs))


def _collect(
    done: Iterable[tuple[StudyRun, Callable[[], dict[str, Any]]]], total: int
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    from tqdm import tqdm

    results: dict[str, dict[str, Any]] = {}
    failed: dict[str, str] = {}
    for job, result in tqdm(done, total=total, desc="runs", unit="run", disable=total < 2):
        try:
            results[job.name] = result()
        except (Interrupted, KeyboardInterrupt):
            raise
        except Exception as error:
            failed[job.name] = f"{type(error).__name__}: {error}"
    return results, failed


def _run_job(job: StudyRun) -> dict[str, Any]:
    return run_verb(job.config, job.recipe)


def _write_study(output: Path, title: str, titles: list[str], settings: tuple[str, ...]) -> None:
    """study.json; rows and commands of earlier calls stay in it."""
    file = StudyFolder(output).study
    old = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"rows": [], "commands": []}
    rows = titles + [row for row in old["rows"] if row not in titles]
    commands = [*old["commands"], *({command_line()} - set(old["commands"]))]
    note = "Settings of every row: " + ", ".join(settings) if settings else ""
    write_json(file, {"title": title, "rows": rows, "commands": commands, "note": note})


def _differs_in_rate_alone(config: AdaptConfig) -> bool:
    """Whether a run at another learning rate lies there: a wider sweep that finds a better one replaces it."""
    file = RunFolder(config.output).config
    if not file.is_file():
        return False
    saved = yaml.safe_load(file.read_text(encoding="utf-8"))
    return [key for key, _, _ in differences(config, saved)] == ["optim.lr"]


def _show(output: Path) -> None:
    from crossalign.report import report, summary_table

    print(summary_table([output]))
    print(f"report: {report([output], html=output / 'report.html', markdown=None)}")
