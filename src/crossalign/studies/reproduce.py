"""``reproduce``: run a whole table. Each row gets the same sweep of learning rates on validation, then its seeds.

Every run is a run folder of its own, so a study that was stopped goes on where it was, and ``report`` reads what is there.
"""

import dataclasses
import math
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from crossalign.config import AdaptConfig, FinetuneConfig, PretrainConfig, flatten, update, validate
from crossalign.config.effect import announce_unused
from crossalign.config.studies import ReproduceArgs
from crossalign.core.errors import UserError, cause, some, unknown
from crossalign.core.files import write_json
from crossalign.core.machine import command_line
from crossalign.core.progress import announce, doing, progress, say
from crossalign.core.reading import parse_yaml
from crossalign.core.refs import Ref
from crossalign.core.registry import Registry
from crossalign.recipes import all_recipes, get_recipe
from crossalign.recipes.cmar import TEACHERS
from crossalign.recipes.cmda import CONTROLS, METHODS, METRICS
from crossalign.runs.folder import alone, differences, saved_config
from crossalign.runs.names import RunFolder, StudyFolder
from crossalign.runs.records import read_study, read_sweep
from crossalign.runs.schema import read_result
from crossalign.studies.workers import hand_out, process_pool, run_verb
from crossalign.training.stops import Diverged, Interrupted

Config: TypeAlias = AdaptConfig | PretrainConfig | FinetuneConfig


@dataclasses.dataclass(frozen=True)
class StudyPlan:
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
        usual, prefix = self.usual_rows(scale), self.recipe("", scale)
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
    "cmda-table1": StudyPlan(
        "CMDA Table 1, with cosine and the controls",
        tuple(TABLE1),
        "small-{}",
        "cmda-{}",
        paper_rows=(*TABLE1, "fpt-matched"),
    ),
    "cmar-pretrain": StudyPlan(
        "CMAR: pre-training with and without alignment, with controls",
        TERMS,
        "small-pretrain-{}",
        "cmar-pretrain-{}",
        paper_rows=("baseline", *TEACHERS),  # Table 3 and Fig. 3
        paper_seeds=5,
    ),
    "cmar-finetune": StudyPlan("CMAR: fine-tuning with and without alignment, with controls", TERMS, "small-finetune-{}"),
    "quickstart": StudyPlan("MiniLM learns to read digits", ("fpt", "fpt-random"), "small-{}"),
    "quickstart-text": StudyPlan("A small GPT learns Python's documentation", ("baseline", "aligned"), "small-pretrain-{}"),
}
STUDIES: Registry[StudyPlan] = Registry("study", _STUDIES)


@dataclasses.dataclass(frozen=True)
class StudyRun:
    """One run of a study."""

    name: str
    row: str
    recipe: str
    config: Config


def reproduce(args: ReproduceArgs) -> int:
    """Run a study into its folder and write its report; returns 0, or 1 if a run failed (the others still finish).

    Raises:
        UserError: unknown study, row or setting; all before the first run.
    """
    table, output = STUDIES[args.study], args.output
    known = table.known_rows(args.scale)
    for row in args.rows:
        if row not in known:
            raise unknown("row", row, known, listed="rows are the ends of the names that crossalign plan --list gives")
    rows = [row for row in known if row in (args.rows or table.usual_rows(args.scale))]
    recipes = {row: table.recipe(row, args.scale) for row in rows}
    base = {row: _base(recipes[row], args) for row in rows}
    announce_unused(list(base.values()), [read_setting(text)[0] for text in args.set])
    _check_sources(list(base.values()))
    with alone(output):
        StudyFolder(output).refuse_links()
        earlier = read_sweep(output)
        _write_study(output, table.title, [config.row for config in base.values()], args.set)
        usual_seeds = table.paper_seeds if args.scale == "paper" else 3
        return _run_study(args, base, recipes, earlier, usual_seeds if args.seeds is None else args.seeds)


def _run_study(
    args: ReproduceArgs, base: dict[str, Config], recipes: dict[str, str], earlier: list[dict[str, Any]], seeds: int
) -> int:
    """Sweep, choose, train with seeds, report; returns the exit code.

    Args:
        base: each row's settings.
        recipes: each row's recipe.
        earlier: what sweep.json said before.
        seeds: runs a row.
    """
    output = args.output

    def run(name: str, row: str, lr: float, **settings: Any) -> StudyRun:
        optim = dataclasses.replace(base[row].optim, lr=lr)
        config = dataclasses.replace(base[row], output=output / name, optim=optim, **settings)
        return StudyRun(name, row, recipes[row], config)

    short = {row: _of_sweep(base[row], args.sweep_epochs) for row in base}
    rates = {row: list(args.lrs) for row in base}
    for row, asked in rates.items() if args.lrs else ():  # what an earlier call tried, or trained with, stays a candidate
        tried = _rates(dataclasses.replace(base[row], **short[row]), output.glob(f"sweep/{row}/*"))
        known = dict.fromkeys([*tried, *_rates(base[row], output.glob(f"{row}/seed-*"))])
        rates[row] = [lr for lr in known if lr not in asked] + asked
    most = max(map(len, rates.values()))
    pairs = [(row, listed[place]) for place in range(most) for row, listed in rates.items() if place < len(listed)]
    sweep = [run(f"sweep/{row}/lr-{lr:g}", row, lr, **short[row]) for row, lr in pairs]
    _, failed = _run_all(sweep, args.workers, args.threads)
    best = _choose(sweep, failed, earlier, output)
    finals = []
    for seed in range(seeds):
        for row in best if args.lrs else base:  # a row that chose none has no learning rate of its own
            job = run(f"{row}/seed-{seed}", row, best.get(row, base[row].optim.lr), seed=seed)
            job.config.overwrite = bool(args.lrs) and _differs_in_rate_alone(job.config)
            finals.append(job)
    done, failed_finals = _run_all(finals, args.workers, args.threads)
    for name, error in (failed | failed_finals).items():
        print(f"failed: {name}: {cause(error)}", file=sys.stderr)
    if done:
        from crossalign.report import report, summary_table

        with doing("writing the page"):
            page = report([output], html=output / "report.html", markdown=None)
        print(f"{summary_table([output])}\nreport: {page}", flush=True)
    return 1 if failed or failed_finals else 0


def read_setting(setting: str) -> tuple[str, str, Any]:
    """The key of ``key=value``, and its value as text and as YAML has it.

    Raises:
        UserError: no ``=``, or a value that is no YAML.
    """
    key, sign, text = setting.partition("=")
    if not sign:
        raise UserError(f"--set {setting}: write key=value, such as loop.epochs=5")
    return key, text, parse_yaml(text, f"--set {setting}: the value", "put it in quotes")


def configured(recipe: str, settings: tuple[str, ...]) -> Any:
    """The recipe with ``key=value`` settings put in, and its row named; raises UserError for a bad key or value."""
    from crossalign.alignment import similarities
    from crossalign.verbs.language_model import row_name

    config: Any = get_recipe(recipe).make()
    for setting in settings:
        key, text, value = read_setting(setting)
        if key == "backbone.ref":  # a control keeps its kind of weights: random:REF and so on
            if wrong := Ref(text).control:
                raise UserError(f"--set {setting}: name the pretrained model; the control rows put '{wrong}:' to it")
            value = Ref(config.backbone.ref).like(text)
        if key == "teacher.ref":
            value = Ref(config.teacher.ref).like(text)
        usual = isinstance(config, AdaptConfig) or (config.align.metric in similarities and config.align.mode != "mean")
        if key == "align.metric" and not usual:
            continue  # the baseline and the controls keep their own
        for part in reversed(key.split(".")):
            value = {part: value}
        config = update(config, value)
    validate(config)
    return dataclasses.replace(config, row=config.row or row_name(config))  # recipes of classifiers have one


def _base(recipe: str, args: ReproduceArgs) -> Config:
    """A row's settings, but for its learning rate and seed."""
    config: Config = configured(recipe, args.set)
    if config.tracking.mlflow and not config.tracking.mlflow_uri:  # one store for all runs, which lie in many folders
        uri = f"sqlite:///{(args.output / 'mlflow.db').resolve()}"
        return dataclasses.replace(config, tracking=dataclasses.replace(config.tracking, mlflow_uri=uri))
    return config


def _check_sources(configs: list[Config]) -> None:
    """Say once, before any run, what is wrong with data and models; no worker decodes the images again."""
    from crossalign.data.images.load import open_images
    from crossalign.models.language.model import open_language_model
    from crossalign.training.text import check_text_run
    from crossalign.verbs.adapt.job import check_settings
    from crossalign.verbs.adapt.sizes import sized

    images = [config for config in configs if isinstance(config, AdaptConfig)]
    as_run = [sized(config) for config in {repr((config.data, config.embedder)): config for config in images}.values()]
    for data in {repr(config.data): config.data for config in as_run}.values():
        open_images(data)
    for ref in {config.backbone.ref for config in images}:
        open_language_model(ref, weights=False)
    for config in configs:
        check_settings(config) if isinstance(config, AdaptConfig) else check_text_run(config)
        if isinstance(config, PretrainConfig) and not (config.prepared or config.corpus.source):
            raise UserError("the study has no text: give --set corpus.source=[novels.parquet], or prepared=FOLDER")
        if isinstance(config, FinetuneConfig) and not (config.model and config.data.source):
            raise UserError("the study has no model or no data: give --set model=FOLDER data.source=[tasks.jsonl]")


def _of_sweep(config: Config, epochs: int) -> dict[str, Any]:
    """Settings that a run of the sweep has of its own, beside the learning rate: it does not see the test set."""
    if not isinstance(config, AdaptConfig):
        return {}
    return {"loop": dataclasses.replace(config.loop, epochs=epochs or config.loop.epochs), "score_test": False}


def _choose(
    sweep: list[StudyRun], failed: dict[str, Exception], earlier: list[dict[str, Any]], output: Path
) -> dict[str, float]:
    """The learning rate of each row with the best validation number; the whole sweep goes into sweep.json.

    A rate at which training diverged has lost. Where a run failed for anything else, its row chooses none: what is left may
    well lack the best. What ``earlier`` calls wrote of other rows stays.
    """
    from crossalign.results.outcomes import chosen_by
    from crossalign.runs.records import read_run

    best: dict[str, float] = {}
    table: list[dict[str, Any]] = []
    for row in dict.fromkeys(job.row for job in sweep):
        of_row = [job for job in sweep if job.row == row]
        tried = {job.name: job for job in of_row if job.name not in failed}
        unknown_yet = [job.name for job in of_row if job.name in failed and not isinstance(failed[job.name], Diverged)]
        if unknown_yet or not tried:
            why = f"{some(unknown_yet)} failed" if unknown_yet else "training diverged at every rate"
            announce(f"{row} chooses no learning rate and is not trained further, since {why}")
            continue
        scores = {name: chosen_by(read_run(job.config.output)) for name, job in tried.items()}
        top = max(tried, key=lambda name: -math.inf if math.isnan(scores[name].value) else scores[name].goodness)
        best[row] = tried[top].config.optim.lr
        for name, job in tried.items():
            facts = {"row": job.config.row, "learning_rate": job.config.optim.lr}
            facts[f"validation_{scores[name].outcome.name}"] = scores[name].value
            table.append(facts | {"epochs": getattr(job.config.loop, "epochs", None), "chosen": name == top})
    if table:
        of_now = {entry["row"] for entry in table}
        write_json(StudyFolder(output).sweep, [entry for entry in earlier if entry["row"] not in of_now] + table)
    return best


def _rates(config: Config, folders: Iterable[Path]) -> Iterator[float]:
    """The learning rates of finished runs that differ from ``config`` in rate and seed at most."""
    for folder in sorted(folders):
        saved = saved_config(folder) if RunFolder(folder).result.exists() else {}
        rate = flatten(saved).get("optim.lr")
        if isinstance(rate, float) and {key for key, _, _ in differences(config, saved)} <= {"optim.lr", "seed"}:
            yield rate


def _run_all(jobs: list[StudyRun], workers: int, threads: int = 0) -> tuple[list[str], dict[str, Exception]]:
    """Run every job; the names of those that are done, and why others failed. A failed run costs no other."""
    done: list[str] = []
    failed: dict[str, Exception] = {}
    with (
        closing(_results(jobs, workers, threads)) as results,
        progress(len(jobs), "runs" if len(jobs) > 1 else "", unit="run") as bar,
    ):
        for job, result in results:
            try:
                seconds = result()
                done.append(job.name)
                say(f"[{len(done) + len(failed)}/{len(jobs)}] {job.name}: {_scored(job)}, {seconds:.0f} s")
            except (Interrupted, KeyboardInterrupt):
                raise
            except Exception as error:
                failed[job.name] = error
            bar.update(1)
    return done, failed


def _results(jobs: list[StudyRun], workers: int, threads: int) -> Generator[tuple[StudyRun, Callable[[], Any]]]:
    """Each job with what raises as it did: itself, to be run here, or its result from a worker."""
    if workers == 1 or not jobs:
        yield from ((job, partial(_run_job, job)) for job in jobs)
        return
    waiting = iter(jobs)
    with process_pool(workers, threads) as pool, closing(hand_out(pool, _run_job, lambda flying: next(waiting, None))) as done:
        for job, future in done:
            yield job, future.result


def _run_job(job: StudyRun) -> float:
    """Run it; how many seconds it took."""
    began = time.monotonic()
    run_verb(job.config, job.recipe)
    return time.monotonic() - began


def _scored(job: StudyRun) -> str:
    """What a run has come to, in a few words."""
    result = read_result(RunFolder(job.config.output).result)
    if not isinstance(job.config, AdaptConfig):
        return ", ".join(f"{text} perplexity {scores['perplexity']:.2f}" for text, scores in result["scores"].items())
    validation = f"validation {100 * result['validation']['accuracy']:.2f} %, epoch {result['best_epoch']}"
    return f"test {100 * result['test']['accuracy']:.2f} % ({validation})" if result["test"] else validation


def _write_study(output: Path, title: str, titles: list[str], settings: tuple[str, ...]) -> None:
    """study.json; rows and commands of earlier calls stay in it."""
    old = read_study(output)
    rows = titles + [row for row in old.get("rows") or [] if row not in titles]
    before = old.get("commands") or []
    commands = [*before, *({command_line()} - set(before))]
    note = "Settings of every row: " + ", ".join(settings) if settings else ""
    write_json(StudyFolder(output).study, {"title": title, "rows": rows, "commands": commands, "note": note})


def _differs_in_rate_alone(config: Config) -> bool:
    """Whether a run at another learning rate lies there: a wider sweep that finds a better one replaces it."""
    return [key for key, _, _ in differences(config, saved_config(config.output))] == ["optim.lr"]
