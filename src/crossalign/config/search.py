"""Settings of the verbs of many runs: ``tune`` and ``reproduce``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from crossalign.config.bounds import Count, Limit, Positive, Seed, Whole, at_least
from crossalign.config.common import TrackingConfig


@dataclass
class SearchConfig:
    """Search the settings of a recipe by ASHA: many configurations begin, the better half of each rung goes on; resumable."""

    recipe: str = ""
    """What to search over: a recipe of adapt, pretrain or finetune; on the command line the first word."""
    methods: tuple[str, ...] = ()
    """Several recipes instead, with commas or spaces between them: each gets a search of the same size."""
    output: Path = Path("runs/search")
    """Search folder; a second call with the same settings goes on where the first stopped, or further with more trials."""
    space: str = ""
    """A YAML file of fields and what they may be, or the name of one that comes along; empty: that of the recipe's verb."""
    show_space: bool = False
    """Print the space that applies to the recipe, in the form of such a file, and do nothing else."""
    trials: Count = 64
    """Configurations to draw."""
    workers: Whole = 1
    """Processes side by side; on a cluster 0 takes as many as are connected."""
    threads: Whole = 0
    """Threads a worker computes with; 0 shares the cores out equally. On a cluster 0 leaves them as they are."""
    rungs: Count = 4
    """Places at which only the better ones go on; 1 trains every configuration in full, which is random search."""
    factor: Annotated[int, at_least(2)] = 2
    """Of each rung one in this many goes on."""
    resources: tuple[Count, ...] = ()
    """Epochs (evaluations, of a text run) at the end of each rung; empty: the last is the recipe's, each before it a
    `factor` less, rounded up."""
    seed: Seed = 0
    """Seed of the configurations drawn; each depends on it and its own number alone."""
    seeds: Whole = 3
    """Seeds that the winner is trained with again, apart from the search's own; only these score the test set. 0 for none."""
    set: tuple[str, ...] = ()
    """Settings of every trial, as key=value, such as data.source=FOLDER or loop.epochs=50."""
    cluster: str = ""
    """Address of a Dask scheduler, such as tcp://host:8786, whose workers then train instead of processes here."""
    keep_checkpoints: bool = False
    """Keep the checkpoints of all trials when the search is over; without them a longer search trains some from the start."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


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
