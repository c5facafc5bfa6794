"""The verbs: what each takes from the command line, what it calls and what it prints. Nothing heavy is imported before."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from crossalign.config import (
    AdaptConfig,
    CorpusConfig,
    EvaluateConfig,
    FinetuneConfig,
    MeasureConfig,
    PairsConfig,
    PretrainConfig,
    SearchConfig,
    TeacherConfig,
)


@dataclass
class PlanArgs(AdaptConfig):
    """What a run will cost, from a model without memory: parameters by group, FLOPs, bytes, steps and hours."""

    train_images: int = 50_000
    """Training images before the validation split, where the data are not at hand."""
    classes: int = 10
    """Classes, where the data are not at hand."""
    hardware: str = "a100"
    """Device to estimate hours for."""
    utilization: float = 0.3
    """Share of the device's peak that training is assumed to reach."""


@dataclass
class PlanPretrainArgs(PretrainConfig):
    """What pre-training will cost, from a model without memory: parameters, tokens, FLOPs, bytes and hours."""

    hardware: str = "a100"
    """Device to estimate hours for."""
    utilization: float = 0.3
    """Share of the device's peak that training is assumed to reach."""


@dataclass
class PlanFinetuneArgs(FinetuneConfig):
    """What fine-tuning will cost, from a model without memory: parameters, tokens, FLOPs, bytes and hours."""

    hardware: str = "a100"
    """Device to estimate hours for."""
    utilization: float = 0.3
    """Share of the device's peak that training is assumed to reach."""


@dataclass
class PredictArgs:
    """Classify images with a trained model: one JSON line an image."""

    model: str
    """The model/ folder of a finished run, or hf:ORG/NAME."""
    images: list[Path]
    """Image files, or folders of them."""
    top_k: int = 1
    """Classes an image, best first."""
    batch_size: int = 64
    """Images a forward pass."""
    backbone: str = ""
    """Where the frozen backbone lies now, if it has moved."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute."""


@dataclass
class FeaturesArgs:
    """A vision model's features of images with texts, written once, so that training needs no vision model."""

    output: Path | None = None
    """The .safetensors file; in the cache by default, named by a hash of teacher and pairs."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute."""
    teacher: TeacherConfig = dataclasses.field(default_factory=TeacherConfig)
    pairs: PairsConfig = dataclasses.field(default_factory=PairsConfig)


@dataclass
class ReportArgs:
    """Tables, figures and one HTML page from finished runs."""

    runs: list[Path]
    """Run folders, or folders that hold them."""
    html: Path | None = None
    """Where the page goes; report.html in the one folder given, or in the current folder for several."""
    markdown: Path | None = None
    """Also write the tables as Markdown, with figures in a folder beside it."""


@dataclass
class CompareArgs:
    """Which rows differ, by how much and how surely: tests over seeds and over documents, corrected for their number."""

    runs: list[Path]
    """Run folders, or folders that hold them; runs that differ in their seed alone are one row."""
    by: Literal["seed", "sample"] = "seed"
    """What a star stands for: the test over seeds, which speaks of the method, or over samples, of these trained models."""
    reference: str = ""
    """The row that the others are compared with, by name or folder; the first folder's, or the one without alignment in it."""
    tasks: tuple[str, ...] = ()
    """Only these outcomes, such as accuracy, loss.validation or arc_easy.acc; * stands for any letters."""
    resamples: int = 5000
    """Resamples of the bootstrap, 200 or more."""
    markdown: Path | None = None
    """Also write the comparison as Markdown."""
    json: Path | None = None
    """Also write every number as JSON."""


@dataclass
class ReproduceArgs:
    """Run a whole table: each row at its own best learning rate, over seeds, in parallel processes; resumable."""

    study: str
    """Which rows: cmda-table1 (Table 1, cosine and the controls), cmar-pretrain, cmar-finetune or quickstart."""
    output: Path = Path("runs/table1")
    """Study folder; a second call goes on where the first stopped."""
    scale: Literal["small", "paper"] = "small"
    """Start from the small-* recipes, or from those with the papers' settings; cmar-pretrain then has the rows of CMAR
    Table 3, the baseline and seven teachers."""
    seeds: int | None = None
    """Seeds a row; None takes 3, or 5 for cmar-pretrain at the paper's scale, as Table 3 has."""
    lrs: tuple[float, ...] = ()
    """Learning rates to sweep on validation; empty keeps the recipe's."""
    sweep_epochs: int = 0
    """Epochs of a sweep run; 0 takes the recipe's."""
    workers: int = 1
    """Processes side by side, each with an equal share of the cores."""
    set: tuple[str, ...] = ()
    """Settings for every row, as key=value, such as data.source=FOLDER or loop.epochs=5."""
    rows: tuple[str, ...] = ()
    """Only these rows, by recipe suffix, such as fpt-mmd or lambda-5; any that has a recipe. Empty runs the table's."""


@dataclass
class QuickstartArgs:
    """Both jobs in minutes on a CPU, without a model hub: MiniLM learns to read digits, a small GPT learns text."""

    output: Path = Path("runs/quickstart")
    """Study folder."""


@dataclass
class PrepareArgs(CorpusConfig):
    """Token files from text, to train a language model on; a second call goes on where the first stopped."""

    output: Path = Path("runs/corpus")
    """Folder of the token files, the tokenizer and meta.json."""


@dataclass(frozen=True)
class Verb:
    """One verb: the class that parses its arguments, and what runs them."""

    args: type
    run: Callable[[Any, str], int | None]
    summary: str
    recipes: dict[type, type] = dataclasses.field(default_factory=dict)
    """Classes of configuration whose recipes it takes, each with the class that then parses the arguments; the first is
    for a call without a recipe."""
    names_recipe: bool = False
    """Whether its first word is the name of a recipe of any verb, which leaves its options as they are."""


def _adapt(config: AdaptConfig, recipe: str) -> None:
    from crossalign.core.machine import is_main_process
    from crossalign.recipes import get_recipe
    from crossalign.verbs.adapt.job import adapt

    made = get_recipe(recipe).make() if recipe else config
    if config.row == made.row and _kind(config) != _kind(made):
        config.row = ""  # the recipe's name of the row no longer says what runs
    result = adapt(config, recipe=recipe)
    if is_main_process() and result["test"] is None:
        print(f"{result['row']}: validation accuracy {result['validation']['accuracy']:.2%}; {config.output}")
    elif is_main_process():
        test = result["test"]
        print(
            f"{result['row']}: test accuracy {test['accuracy']:.2%} on {test['n']} images (epoch {result['best_epoch']}, ",
            end="",
        )
        print(f"validation {result['validation']['accuracy']:.2%}); {config.output}")


def _kind(config: AdaptConfig) -> tuple[str, ...]:
    """What names a row: method, metric, and which weights."""
    prefix = config.backbone.ref.partition(":")[0]
    return config.tune.method, config.align.metric, prefix if prefix in ("random", "shuffled", "none", "vit") else ""


def _pretrain(config: PretrainConfig, recipe: str) -> None:
    from crossalign.verbs.pretrain import pretrain

    _tell_text(pretrain(config, recipe=recipe), config.output)


def _finetune(config: FinetuneConfig, recipe: str) -> None:
    from crossalign.verbs.finetune import finetune

    _tell_text(finetune(config, recipe=recipe), config.output)


def _tell_text(result: dict[str, Any], output: Path) -> None:
    from crossalign.core.machine import is_main_process

    if is_main_process():
        told = [f"{place} perplexity {found['perplexity']:.2f}" for place, found in result["scores"].items()]
        aligned = result["held_out"].get("held_out_cka-linear-debiased")
        told += [] if aligned is None else [f"alignment of held-out pairs {aligned:.3f}"]
        print(f"{result['row']}: {', '.join(told)}; {output}")


def _plan(args: PlanArgs | PlanPretrainArgs | PlanFinetuneArgs, recipe: str) -> None:
    if not isinstance(args, PlanArgs):
        from crossalign.verbs.plan.text import plan_text

        print(plan_text(args, recipe, args.hardware, args.utilization))
        return
    from crossalign.verbs.plan.images import plan

    print(plan(args, recipe, args.train_images, args.classes, args.hardware, args.utilization))


def _predict(args: PredictArgs, _: str) -> None:
    from crossalign.verbs.adapt.predict import predict_files

    predict_files(
        args.model,
        args.images,
        top_k=args.top_k,
        batch_size=args.batch_size,
        backbone=args.backbone,
        device=args.device,
    )


def _features(args: FeaturesArgs, _: str) -> None:
    from crossalign.features.store import features, read_metadata

    path = features(args.teacher, args.pairs, args.output, device=args.device)
    told = read_metadata(path)
    print(f"{path}: {told['teacher']}, layers {' '.join(json.loads(told['layers']))}; {told['pairs']}")


def _evaluate(config: EvaluateConfig, _: str) -> None:
    from crossalign.core.machine import is_main_process
    from crossalign.verbs.evaluate.job import evaluate

    results = evaluate(config)
    for name, metrics in results.get("forgetting", {}).items() if is_main_process() else ():
        told = ", ".join(f"{metric} {value['before']:.4g} → {value['after']:.4g}" for metric, value in metrics.items())
        print(f"before and after it learned images, {results['tasks'][name]['label']}: {told}")


def _measure(config: MeasureConfig, _: str) -> None:
    from crossalign.verbs.measure.job import measure

    for one in measure(config)["alignment"]:
        low, high = one["interval"]
        print(f"{one['language']} × {one['vision']}: {one['score']:.3f} [{low:.3f}, {high:.3f}], ", end="")
        print(
            f"calibrated {one['calibrated']:.3f}, p = {one['p']:.2g} (layers {one['language_layer']} × {one['vision_layer']})"
        )
    print(config.output / "measure.md")


def _tune(config: SearchConfig, recipe: str) -> int:
    from crossalign.report import report, summary_table
    from crossalign.studies.tune import tune
    from crossalign.training.stops import Interrupted

    config.recipe = recipe or config.recipe
    try:
        failed = tune(config)
    except (Interrupted, KeyboardInterrupt) as error:
        if list(config.output.glob("search.json")) or list(config.output.glob("*/search.json")):
            print(summary_table([config.output]))
        raise (error if isinstance(error, Interrupted) else Interrupted("stopped by a signal")) from None
    if config.show_space:
        return 0
    print(summary_table([config.output]))
    for sentence in failed:
        print(sentence, file=sys.stderr)
    print(f"report: {report([config.output], html=config.output / 'report.html')}")
    return 1 if failed else 0


def _report(args: ReportArgs, _: str) -> None:
    from crossalign.report import report

    print(report(args.runs, html=args.html, markdown=args.markdown))


def _compare(args: CompareArgs, _: str) -> None:
    from crossalign.report.contrast_pages import as_text_page, write_markdown, write_numbers
    from crossalign.verbs.compare import compare

    found = compare(args.runs, args.by, args.reference, args.tasks, args.resamples)
    print(as_text_page(found))
    if args.markdown is not None:
        write_markdown(found, args.markdown)
    if args.json is not None:
        write_numbers(found, args.json)


def _reproduce(args: ReproduceArgs, _: str) -> int:
    from crossalign.studies.reproduce import reproduce

    return reproduce(
        args.study,
        args.output,
        scale=args.scale,
        seeds=args.seeds,
        lrs=args.lrs,
        sweep_epochs=args.sweep_epochs,
        workers=args.workers,
        settings=args.set,
        only=args.rows,
    )


def _data_prepare(args: PrepareArgs, _: str) -> None:
    from crossalign.core.machine import is_main_process
    from crossalign.data.text.corpus import prepare

    corpus = prepare(args, args.output)
    if not is_main_process():
        return
    for side in ("train", "validation"):
        told = corpus.meta[side]
        print(f"{side}: {told['documents']:,} documents, {told['bytes']:,} bytes, {told['tokens']:,} tokens")
    dropped = [f"{corpus.meta['empty_documents']:,} empty documents"] if corpus.meta["empty_documents"] else []
    if dropped + corpus.meta["left_out"]:
        print(f"left out: {', '.join(dropped + corpus.meta['left_out'])}")
    print(f"vocabulary of {corpus.vocabulary:,}; {args.output}")


def _quickstart(args: QuickstartArgs, _: str) -> int:
    from crossalign.studies.reproduce import quickstart

    return quickstart(args.output)


PLANS: dict[type, type] = {AdaptConfig: PlanArgs, PretrainConfig: PlanPretrainArgs, FinetuneConfig: PlanFinetuneArgs}
VERBS: dict[str, Verb] = {
    "quickstart": Verb(QuickstartArgs, _quickstart, "both jobs in minutes on a CPU, without a model hub"),
    "adapt": Verb(AdaptConfig, _adapt, "make a language model an image classifier", {AdaptConfig: AdaptConfig}),
    "plan": Verb(PlanArgs, _plan, "parameters, FLOPs, bytes and hours of a run, before it is paid for", PLANS),
    "pretrain": Verb(
        PretrainConfig,
        _pretrain,
        "pre-train a language model, pulled towards a vision model or not",
        {PretrainConfig: PretrainConfig},
    ),
    "finetune": Verb(
        FinetuneConfig,
        _finetune,
        "fine-tune a language model, pulled towards a vision model or not",
        {FinetuneConfig: FinetuneConfig},
    ),
    "data prepare": Verb(PrepareArgs, _data_prepare, "token files from text, to train a language model on"),
    "tune": Verb(SearchConfig, _tune, "search the settings of a recipe by ASHA, then train the winner", names_recipe=True),
    "evaluate": Verb(EvaluateConfig, _evaluate, "score a language model on benchmark tasks, or what a classifier's forgot"),
    "predict": Verb(PredictArgs, _predict, "classify images with a trained model"),
    "features": Verb(FeaturesArgs, _features, "a vision model's features of images with texts, written once"),
    "measure": Verb(MeasureConfig, _measure, "how aligned language and vision models are, layer by layer, against chance"),
    "report": Verb(ReportArgs, _report, "tables, figures and one HTML page from runs"),
    "compare": Verb(CompareArgs, _compare, "which rows differ, by how much and how surely"),
    "reproduce": Verb(ReproduceArgs, _reproduce, "run a whole table with seeds, a learning-rate sweep and controls"),
}
