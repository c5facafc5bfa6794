"""The verbs of many runs on the command line: ``tune``, ``reproduce`` and ``quickstart``. Nothing heavy is imported here."""

import sys
from dataclasses import dataclass
from pathlib import Path

from crossalign.config import SearchConfig
from crossalign.config.studies import ReproduceArgs
from crossalign.core.progress import doing
from crossalign.runs.names import SearchFolder
from crossalign.training.stops import Interrupted
from crossalign.verbs import Verb


@dataclass
class QuickstartArgs:
    """Both jobs in minutes on a CPU, without a model hub: MiniLM learns to read digits, a small GPT learns text."""

    output: Path = Path("runs/quickstart")
    """Study folder."""


def run_reproduce(args: ReproduceArgs, _: str) -> int:
    """Run the table; see :func:`crossalign.studies.reproduce.reproduce`."""
    with doing("loading PyTorch"):
        from crossalign.studies.reproduce import reproduce

    return reproduce(args)


def run_quickstart(args: QuickstartArgs, _: str) -> int:
    """Run both jobs; see :func:`crossalign.studies.quickstart.quickstart`."""
    with doing("loading PyTorch"):
        from crossalign.studies.quickstart import quickstart

    return quickstart(args.output)


def run_tune(config: SearchConfig, recipe: str) -> int:
    """Search, and print the table, what failed, and where the page is; a search that is stopped prints what it has."""
    from crossalign.report import report, summary_table

    with doing("loading PyTorch"):
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
TUNE = Verb(SearchConfig, run_tune, {})
