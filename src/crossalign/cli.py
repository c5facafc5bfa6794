"""The command line: ``crossalign VERB [RECIPE] [--key value …]``. Nothing heavy is imported before a verb runs."""

from __future__ import annotations

import dataclasses
import difflib
import errno
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from crossalign.config import AdaptConfig
from crossalign.errors import UserError, unknown


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
class ReportArgs:
    """Tables, figures and one HTML page from finished runs."""

    runs: list[Path]
    """Run folders, or folders that hold them."""
    html: Path | None = None
    """Where the page goes; report.html in the one folder given, or in the current folder for several."""
    markdown: Path | None = None
    """Also write the tables as Markdown, with figures in a folder beside it."""


@dataclass
class ReproduceArgs:
    """Run a whole table: each row at its own best learning rate, over seeds, in parallel processes; resumable."""

    study: str
    """Which rows: cmda-table1 (Table 1, cosine and the controls) or quickstart."""
    output: Path = Path("runs/table1")
    """Study folder; a second call goes on where the first stopped."""
    scale: Literal["small", "paper"] = "small"
    """Start from the small-* or the cmda-* recipes."""
    seeds: int = 3
    """Seeds a row."""
    lrs: tuple[float, ...] = ()
    """Learning rates to sweep on validation; empty keeps the recipe's."""
    sweep_epochs: int = 0
    """Epochs of a sweep run; 0 takes the recipe's."""
    workers: int = 1
    """Processes side by side, each with an equal share of the cores."""
    set: tuple[str, ...] = ()
    """Settings for every row, as key=value, such as data.source=FOLDER or loop.epochs=5."""
    rows: tuple[str, ...] = ()
    """Only these rows, by recipe suffix, such as fpt-mmd; empty runs all."""


@dataclass
class QuickstartArgs:
    """The main job in minutes on a CPU, without a model hub: MiniLM learns to read digits."""

    output: Path = Path("runs/quickstart")
    """Study folder."""


@dataclass(frozen=True)
class Verb:
    """One verb: the class that parses its arguments, and what runs them."""

    args: type
    run: Callable[[Any, str], int | None]
    summary: str
    takes_recipe: bool = False


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 done, 1 failed, 2 bad input, 130 stopped and saved."""
    args = sys.argv[1:] if argv is None else argv
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        return _dispatch(args) or 0
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":  # all processes of a distributed run say the same
            print(f"crossalign: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        print("crossalign: stopped; the run resumes from its last checkpoint", file=sys.stderr)
        return 128 + signal.SIGINT
    except (RuntimeError, OSError) as error:
        return _told(error)


def _told(error: Exception) -> int:
    """Exit codes of the loop's own exceptions, without importing the loop unless it ran; others stay tracebacks."""
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        print(
            f"crossalign: the disk is full ({error.filename or 'writing results'}); free some space, then run it again",
            file=sys.stderr,
        )
        return 1
    loop, checkpoint = sys.modules.get("crossalign.training.loop"), sys.modules.get("crossalign.training.checkpoint")
    if loop is not None and isinstance(error, loop.Interrupted):
        print(f"crossalign: {error}; the same command goes on from there", file=sys.stderr)
        return 130
    if loop is not None and isinstance(error, loop.Diverged | checkpoint.DiskFull):  # type: ignore[union-attr]
        print(f"crossalign: {error}", file=sys.stderr)
        return 1
    raise error


def _dispatch(args: list[str]) -> int | None:
    if not args or args[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if args[0] in ("-V", "--version"):
        from crossalign import __version__

        print(f"crossalign {__version__}")
        return 0
    name, rest = args[0], args[1:]
    if name not in VERBS:
        raise unknown("verb", name, VERBS)
    verb = VERBS[name]
    recipe = ""
    if verb.takes_recipe and rest and not rest[0].startswith("-"):
        recipe, rest = rest[0], rest[1:]
    if "--list" in rest and verb.takes_recipe:
        print(_recipe_list())
        return 0
    return verb.run(_parse(verb, name, recipe, rest), recipe)


def _parse(verb: Verb, name: str, recipe: str, args: list[str]) -> Any:
    """Arguments to a configuration: the recipe, then --config, then the keys, each over the one before."""
    import tyro

    from crossalign.recipes import get_recipe

    default: Any = None
    if verb.takes_recipe:
        default = get_recipe(recipe).make() if recipe else AdaptConfig()
        file, args = _take(args, "--config")
        if file:
            from crossalign.training.run import read_config

            default = read_config(default, Path(file))
        if verb.args is PlanArgs:
            default = PlanArgs(**{f.name: getattr(default, f.name) for f in dataclasses.fields(default)})
    _check_keys(verb.args, args)
    description = f"{verb.args.__doc__}" + ("\n\nRecipes: crossalign adapt --list" if verb.takes_recipe else "")
    kwargs = {} if default is None else {"default": default}
    return tyro.cli(
        verb.args,
        prog=f"crossalign {name}" + (" [RECIPE]" if verb.takes_recipe else ""),
        description=description,
        args=args,
        config=(tyro.conf.PositionalRequiredArgs,),
        **kwargs,
    )


def _take(args: list[str], name: str) -> tuple[str, list[str]]:
    """The value of ``--name VALUE`` and the arguments without it."""
    for i, arg in enumerate(args):
        if arg == name:
            if i + 1 == len(args):
                raise UserError(f"{name} wants a file")
            return args[i + 1], args[:i] + args[i + 2 :]
        if arg.startswith(f"{name}="):
            return arg.split("=", 1)[1], args[:i] + args[i + 1 :]
    return "", args


def _check_keys(cls: type, args: list[str]) -> None:
    """Name the nearest key for one that does not exist, in one sentence."""
    known = {"help", *_keys(cls)}
    for arg in args:
        key = arg[2:].split("=", 1)[0].replace("_", "-")
        if not arg.startswith("--") or arg == "--" or key in known:
            continue
        last = key.rpartition(".")[2]
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        near = near or [k for k in sorted(known) if k.rpartition(".")[2] == last][:1]
        hint = f"; did you mean --{near[0]}?" if near else ""
        raise UserError(f"unknown option --{key}{hint} (all options: --help)")


def _keys(cls: Any, prefix: str = "") -> list[str]:
    """Every option of an arguments class, as written on the command line."""
    import typing

    hints = typing.get_type_hints(cls)
    keys: list[str] = []
    for field in dataclasses.fields(cls):
        kind, name = hints[field.name], field.name.replace("_", "-")
        if dataclasses.is_dataclass(kind):
            keys += _keys(kind, f"{prefix}{name}.")
        else:
            keys += [prefix + name] + ([f"{prefix}no-{name}"] if kind is bool else [])
    return keys


def _overview() -> str:
    lines = [f"  {name:<12} {verb.summary}" for name, verb in VERBS.items()]
    return "\n".join(
        [
            "crossalign: move representations across modalities, and know whether it really helped.",
            "",
            "usage: crossalign VERB [RECIPE] [--key value ...]",
            "",
            *lines,
            "",
            "crossalign VERB --help lists the keys; crossalign adapt --list the recipes.",
        ]
    )


def _recipe_list() -> str:
    from crossalign.recipes import all_recipes

    return "\n".join(f"{name:<22} {recipe.summary}" for name, recipe in all_recipes().items())


def _adapt(config: AdaptConfig, recipe: str) -> None:
    from crossalign.adapt import adapt
    from crossalign.environment import is_main_process
    from crossalign.recipes import get_recipe

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


def _plan(args: PlanArgs, recipe: str) -> None:
    from crossalign.plan import plan

    print(plan(args, recipe, args.train_images, args.classes, args.hardware, args.utilization))


def _predict(args: PredictArgs, _: str) -> None:
    from crossalign.predict import predict_files

    predict_files(
        args.model,
        args.images,
        top_k=args.top_k,
        batch_size=args.batch_size,
        backbone=args.backbone,
        device=args.device,
    )


def _report(args: ReportArgs, _: str) -> None:
    from crossalign.report import report

    print(report(args.runs, html=args.html, markdown=args.markdown))


def _reproduce(args: ReproduceArgs, _: str) -> int:
    from crossalign.reproduce import reproduce

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


def _quickstart(args: QuickstartArgs, _: str) -> int:
    from crossalign.reproduce import quickstart

    return quickstart(args.output)


VERBS: dict[str, Verb] = {
    "quickstart": Verb(QuickstartArgs, _quickstart, "the main job in minutes on a CPU, without a model hub"),
    "adapt": Verb(AdaptConfig, _adapt, "make a language model an image classifier", takes_recipe=True),
    "plan": Verb(PlanArgs, _plan, "parameters, FLOPs, bytes and hours of a run, before it is paid for", takes_recipe=True),
    "predict": Verb(PredictArgs, _predict, "classify images with a trained model"),
    "report": Verb(ReportArgs, _report, "tables, figures and one HTML page from runs"),
    "reproduce": Verb(ReproduceArgs, _reproduce, "run a whole table with seeds, a learning-rate sweep and controls"),
}

if __name__ == "__main__":
    sys.exit(main())
