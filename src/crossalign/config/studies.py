"""Settings of what trains no model of its own: evaluate, measure, tune and reproduce."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from crossalign.config.bounds import Count, Fraction, Limit, Positive, Seed, Size, Whole, at_least
from crossalign.config.common import TrackingConfig
from crossalign.config.text import PairsConfig

PAPER_TASKS = ("arc_easy", "arc_challenge", "copa", "lambada_openai", "swag", "commonsense_qa", "wikitext")
"""What CMAR §4 evaluates on."""


@dataclass
class EvaluateConfig:
    """Score a causal language model on benchmark tasks, through lm-evaluation-harness; resumable task by task."""

    model: str
    """A run folder, its model/ folder, package:NAME, a local folder, a .gguf file or hf:ORG/NAME. For a run of `adapt`,
    what its backbone still knows of language."""
    tasks: tuple[str, ...] = PAPER_TASKS
    """Names, with commas or spaces between them: of our tasks, of lm-evaluation-harness's tasks, groups and tags, and .yaml
    task files of your own."""
    data_dir: Path | None = None
    """Folder of local data, such as arc_easy_test.jsonl, for all tasks; without it each set is opened from the hub."""
    output: Path | None = None
    """Where results go; evaluation/ in the run's folder, or in runs/ for other models."""
    few_shot: Annotated[int, at_least(0, 1000)] = 0
    """Answered examples in front of each question: of the training split, where there is none of the other questions."""
    limit: Limit = None
    """Only the first documents of each task."""
    max_length: Annotated[int | None, at_least(2, 2**20)] = None
    """Tokens the model sees at most; None takes all that it can."""
    too_long: Literal["stop", "cut", "skip"] = "stop"
    """Questions longer than that: stop before scoring, cut their beginning off, or leave them out; what was cut or left out is
    counted. Texts are read in pieces."""
    bos: Literal["auto", "yes", "no"] = "auto"
    """Whether each text starts with the BOS token; auto: as the model's family was trained."""
    batch_size: Annotated[int, at_least(0, 2**20)] = 0
    """Texts a forward pass; 0 takes as many as their length and the memory allow. It does not change the scores."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Number format of the weights."""
    before: bool = True
    """Of a run of `adapt`: also score the language model that it began with, for what was forgotten."""
    seed: Seed = 1234
    """Seed that draws the examples of `few_shot`."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


@dataclass
class MeasureConfig:
    """How aligned language models are with vision models, layer by layer, beside what chance would give."""

    language: tuple[str, ...] = ("package:minilm",)
    """Language models: package:NAME, folders, .gguf files, hf:ORG/NAME, random:REF or shuffled:REF as controls, file:PATH of
    features of your own; or folders of runs of pretrain and finetune, with all the models kept during training."""
    vision: tuple[str, ...] = ("package:efficientnet_lite0",)
    """Vision models: package:NAME, timm:NAME, folders, hf:ORG/NAME, random:REF or shuffled:REF as controls, or file:PATH."""
    twins: bool = False
    """Also measure the random-weight twin of each model: the same architecture before any training. Not of a run's folder,
    whose own models before and after training stand side by side."""
    metric: str = "cka-linear-debiased"
    """A registered similarity, such as cka-linear-debiased, cka-rbf-debiased, mutual-knn or svcca."""
    neighbours: Size = 10
    """k of mutual-knn and soft-mutual-knn."""
    language_layers: tuple[str, ...] = ("all",)
    """Layers of the language models: indices, penultimate, last, all (with 0, the embeddings), or names of modules."""
    vision_layers: tuple[str, ...] = ("all", "penultimate")
    """Layers of the vision models: indices, all (every block), penultimate (the input of the classifier), or names."""
    pool: Literal["mean", "last"] = "mean"
    """How the tokens of a text become one vector: their mean, or the last one."""
    vision_pool: Literal["auto", "cls", "mean"] = "auto"
    """How the places of an image become one vector; auto: as the model's own classifier does."""
    captions: Literal["first", "mean", "all"] = "first"
    """Of an image with several texts: the first one, the mean of the features of all, or all joined into one text."""
    max_length: Size = 128
    """Tokens of a text; more are cut off."""
    permutations: Size = 200
    """Random orders of the images that tell what chance gives; the smallest p-value is 1 / (1 + permutations)."""
    level: Fraction = 0.05
    """Chance that a score of unrelated features counts as more than chance, over all layers of two models."""
    groups: Annotated[int, at_least(2, 2**20)] = 20
    """Groups of pairs that the jackknife leaves out in turn, for the intervals."""
    text: str = ""
    """A text file on which causal models are scored in bits a byte, for the plot of language quality against alignment."""
    text_kilobytes: Size = 64
    """How much of the text, from its start."""
    block: Size = 512
    """Tokens that a model sees at once in that text."""
    seed: Seed = 0
    """Seed of the orders, of the groups, and of the weights of random: and shuffled: models."""
    batch_size: Size = 32
    """Texts, or images, a forward pass; it does not change the features."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where models compute; scores are computed on the CPU."""
    output: Path = Path("runs/measure")
    """Folder of the measurement; a second call with the same settings writes it anew from cached features."""
    overwrite: bool = False
    """Replace a measurement with other settings that lies in `output`, once this one is done."""
    pairs: PairsConfig = field(default_factory=lambda: PairsConfig(split="test"))


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
    trials: Size = 64
    """Configurations to draw."""
    workers: Annotated[int, at_least(0, 1024)] = 1
    """Processes side by side; on a cluster 0 takes as many as are connected."""
    threads: Annotated[int, at_least(0, 1024)] = 0
    """Threads a worker computes with; 0 shares the cores out equally. On a cluster 0 leaves them as they are."""
    rungs: Annotated[int, at_least(1, 64)] = 4
    """Places at which only the better ones go on; 1 trains every configuration in full, which is random search."""
    factor: Annotated[int, at_least(2, 1024)] = 2
    """Of each rung one in this many goes on."""
    resources: tuple[Count, ...] = ()
    """Epochs (evaluations, of a text run) at the end of each rung; empty: the last is the recipe's, each before it a
    `factor` less, rounded up."""
    seed: Seed = 0
    """Seed of the configurations drawn; each depends on it and its own number alone."""
    seeds: Annotated[int, at_least(0, 1000)] = 3
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
    seeds: Annotated[int | None, at_least(1, 1000)] = None
    """Seeds a row; None takes 3, or 5 for cmar-pretrain at the paper's scale, as Table 3 has."""
    lrs: tuple[Positive, ...] = ()
    """Learning rates to sweep on validation; empty keeps the recipe's."""
    sweep_epochs: Whole = 0
    """Epochs of a sweep run; 0 takes the recipe's."""
    workers: Annotated[int, at_least(1, 1024)] = 1
    """Processes side by side."""
    threads: Annotated[int, at_least(0, 1024)] = 0
    """Threads each worker computes with; 0 shares out those that this process may use."""
    set: tuple[str, ...] = ()
    """Settings for every row, as key=value, such as data.source=FOLDER or loop.epochs=5."""
    rows: tuple[str, ...] = ()
    """Only these rows, by recipe suffix, such as fpt-mmd or lambda-5; any that has a recipe. Empty runs the table's."""
