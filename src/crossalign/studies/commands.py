"""The verbs of many runs on the command line: ``tune``, ``reproduce`` and ``quickstart``. Nothing heavy is imported here."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from crossalign.config import SearchConfig
from crossalign.config.bounds import Count, Limit, Positive, Whole
from crossalign.runs.names import SearchFolder
from crossalign.training.stops import Interrupted
from crossalign.verbs import Verb


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
    seeds: Limit = None
    """Seeds a row; None takes 3, or 5 for cmar-pretrain at the paper's scale, as Table 3 has."""
    lrs: tuple[Positive, ...] = ()
    """Learning rates to sweep on validation; empty keeps the recipe's."""
    sweep_epochs: Whole = 0
    """Epochs of a sweep run; 0 takes the recipe's."""
    workers: Count = 1
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


def run_reproduce(args: ReproduceArgs, _: str) -> int:
    """Run the table; see :func:`crossalign.studies.reproduce.reproduce`."""
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


def run_quickstart(args: QuickstartArgs, _: str) -> int:
    """Run both jobs; see :func:`crossalign.studies.reproduce.quickstart`."""
    from crossalign.studies.reproduce import quickstart

    return quickstart(args.output)


def run_tune(config: SearchConfig, recipe: str) -> int:
    """Search, and print the table, what failed, and where the page is; a search that is stopped prints what it has."""
    from crossalign.report import report, summary_table
    from crossalign.studies.tune import tune

    config.recipe = recipe or config.recipe
    try:
        failed = tune(config)
    except (Interrupted, KeyboardInterrupt) as error:
        if any(file for start in ("", "*/") for file in config.output.glob(f"{start}{SearchFolder.record.name}")):
            print(summary_table([config.output]))
        raise (error if isinstance(error, Interrupted) else Interrupted("stopped by a signal")) from None
    if config.show_space:
        return 0
    print(summary_table([config.output]))
    for sentence in failed:
        print(sentence, file=sys.stderr)
    print(f"report: {report([config.output], html=config.output / 'report.html')}")
    return 1 if failed else 0


REPRODUCE = Verb(ReproduceArgs, run_reproduce)
QUICKSTART = Verb(QuickstartArgs, run_quickstart)
TUNE = Verb(SearchConfig, run_tune, names_recipe=True)
