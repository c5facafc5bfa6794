"""Settings of vision → language: text, pairs, teachers, the regulariser, and the training of language models."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from crossalign.config.bounds import (
    Amount,
    Bound,
    Count,
    Finite,
    Fraction,
    Layers,
    Limit,
    Probability,
    Seed,
    Size,
    Whole,
    at_least,
)
from crossalign.config.common import BaseLoopConfig, OptimConfig, TrackingConfig, Watched
from crossalign.config.images import TuneConfig


@dataclass
class PairsConfig:
    """Texts with images that belong to them: what alignment between a language model and a vision model is measured on."""

    source: str = "openmoji"
    """openmoji (a pip package's pictures with their Unicode names), a .parquet file or folder with images and captions,
    WebDataset shards (.tar), or hf:ORG/NAME."""
    split: Literal["train", "validation", "test"] = "train"
    """Split of the source; a source without splits is cut 80/10/10 by a hash of each picture."""
    split_file: str = ""
    """A text file that lists the ids of the pairs to use, one file name a line, as Flickr8k has them, in place of `split`."""
    image_column: str = ""
    """Column of the image; empty finds it."""
    text_column: str = ""
    """Column of the caption or captions; empty finds it."""
    limit: Limit = None
    """Use this many pairs of the split, drawn by a fixed seed; a smaller limit draws some of a larger one's."""
    on_error: Literal["stop", "skip"] = "stop"
    """What to do with missing or unreadable images and empty captions: stop and name them, or go on without them and count."""


@dataclass
class TeacherConfig:
    """The frozen vision model that gives each image its features."""

    ref: str = "package:efficientnet_lite0"
    """package:NAME, timm:NAME, hf:ORG/NAME, a local folder, random:REF as a control, or file:PATH of your own features."""
    layers: tuple[str, ...] = ("penultimate",)
    """Layers by index, name, penultimate (the input of the classifier) or all; several are joined by `combine`."""
    combine: Literal["concat", "sum"] = "concat"
    """concat: layers side by side (CMAR Eqs. 2, 3); sum: a fixed linear combination with `weights`."""
    weights: tuple[Finite, ...] = ()
    """One weight a layer for combine=sum; empty takes the mean."""
    pool: Literal["auto", "cls", "mean"] = "auto"
    """cls: the class token; mean: the mean over places; auto: as the model's own classifier does."""
    seed: Seed = 0
    """Seed of the weights of a random: or shuffled: teacher."""
    batch_size: Size = 16
    """Images a forward pass; it does not change the features. A CPU is fastest with few, a GPU with many."""


EVERY_BYTE = "be at least 257: 256 bytes and <|endoftext|> need 257 entries"
Vocabulary = Annotated[int, Bound(EVERY_BYTE, 257, 1 << 24, too_large="be at most 2^24: no corpus fills more")]


@dataclass
class CorpusConfig:
    """Text to train a language model on, as one stream of tokens."""

    source: tuple[str, ...] = ()
    """Text files, .parquet or .jsonl files, folders of them, hf:ORG/NAME, or python:topics (Python's own documentation)."""
    text_column: str = "text"
    """Column or key of the text in parquet and jsonl."""
    tokenizer: str = ""
    """Folder, tokenizer.json, package:NAME or hf:ORG/NAME of a tokenizer; empty trains one on the corpus."""
    vocabulary: Vocabulary = 4096
    """Entries of a tokenizer that is trained here (byte-level BPE)."""
    validation_fraction: Fraction = 0.005
    """Share of the documents held out; a lone document is cut at this share of its text."""
    split_seed: Seed = 0
    """Seed of the split by document."""


@dataclass
class InstructConfig:
    """Instructions with their answers, to fine-tune a language model on; only the answers are learned."""

    source: tuple[str, ...] = ()
    """.json, .jsonl or .parquet files, folders of them, or hf:ORG/NAME, with instruction/output or prompt/completion."""
    block: Size = 512
    """Tokens of an example at most; longer answers are cut, examples without room for an answer are dropped."""
    packing: bool = False
    """Put several examples into each block, apart from one another: less padding."""
    padding: Literal["right", "left"] = "right"
    """Side that shorter examples are filled up on."""
    validation_fraction: Fraction = 0.1
    """Share of the examples held out, by prompt."""
    split_seed: Seed = 0
    """Seed of the split by prompt."""


@dataclass
class RegularizeConfig:
    """The alignment term: every k-th step pulls layers of the language model towards the teacher's features of pairs."""

    metric: str = "none"
    """none; a similarity such as cka-rbf or cka-linear-debiased; a penalty (l1, l2, koleo, l1-weights, l2-weights);
    captions: the same captions as ordinary training text, without images."""
    weight: Amount = 10.0
    """λ of CMAR Eq. 5; for captions, how much one of their tokens weighs beside one of the text."""
    every: Count = 20
    """Interval in steps; the first step has the term."""
    layers: tuple[str, ...] = ("penultimate",)
    """Layers of the language model: indices, penultimate, last, all, or names of modules; several stand side by side."""
    pool: Literal["mean", "last"] = "mean"
    """How the tokens of a caption become one vector: their mean, or the last one."""
    mode: Literal["paired", "unpaired", "mean"] = "paired"
    """Which features a caption is given: its image's, another image's, or the mean of all (CMAR §4.4.2)."""
    batch_size: Annotated[int, at_least(2, 2**20)] = 256
    """Pairs a term, over all processes."""
    queue: Annotated[int, at_least(0, 2**24)] = 0
    """Rows of earlier batches, without gradient, that the score also sees."""
    max_length: Size = 64
    """Tokens of a caption; more are cut off."""
    on_degenerate: Literal["raise", "warn"] = "raise"
    """What cca, svcca, pwcca and linear-regression do with too few pairs for their widths, where they are always 1."""
    log_every: Whole = 0
    """Log the score every this many steps, also between those that have the term; 0 logs those alone."""
    held_out: Annotated[int | None, at_least(0)] = None
    """Held-out pairs on which alignment is measured at each evaluation; None takes 512 where there is a term, else none."""
    held_out_file: str = ""
    """A file as `pairs.split_file` for the held-out pairs; empty takes the validation split."""
    held_out_teacher: str = ""
    """Reference of the teacher that held-out alignment is measured with; empty: `teacher`."""


@dataclass
class GPTConfig:
    """The language model that is trained from scratch: GPT-2's architecture at any size."""

    layers: Layers = 12
    """Blocks."""
    heads: Size = 12
    """Attention heads a block."""
    width: Size = 768
    """Width of the hidden states."""
    dropout: Probability = 0.0
    """Dropout of embeddings, attention and blocks."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""


@dataclass
class TextLoopConfig(BaseLoopConfig):
    """How long, on what, and how safely."""

    watched = Watched("loss", "evaluation", larger_is_better=False)
    steps: Count = 2000
    """Optimiser steps."""
    shard: bool = False
    """Share parameters, gradients and optimiser state out over the processes (FSDP2): for models too large for one device."""
    evaluate_every: Count = 250
    """Steps between two evaluations; it must divide `steps`."""
    evaluate_blocks: Limit = None
    """Sequences of the validation text at most, from its start, in evaluations during training; the scores at the end are of
    all of it."""
    keep_every: Whole = 0
    """Keep the whole model every this many steps, and the one before the first, for `crossalign measure`; 0 keeps none."""

    @property
    def validations(self) -> int:
        """How often the watched number is taken."""
        return self.steps // max(1, self.evaluate_every)


@dataclass
class PretrainConfig:
    """Vision → language: pre-train a language model, with or without the alignment term (CMAR)."""

    output: Path = Path("runs/pretrain")
    """Run folder; a second call with the same configuration resumes it."""
    seed: Seed = 0
    """Seed of initial weights, batch order, pairs and dropout."""
    row: str = ""
    """Name of the run's row in tables; empty: made from the alignment."""
    overwrite: bool = False
    """Delete a run of another configuration that lies in `output`."""
    prepared: str = ""
    """Folder of `crossalign data prepare`; empty prepares `corpus` in the cache."""
    block: Size = 1024
    """Tokens a sequence, and the longest that the model can see."""
    score: tuple[str, ...] = ()
    """Further text files whose perplexity is computed at the end."""
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    gpt: GPTConfig = field(default_factory=GPTConfig)
    align: RegularizeConfig = field(default_factory=RegularizeConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    pairs: PairsConfig = field(default_factory=PairsConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=6e-4, weight_decay=0.1, betas=(0.9, 0.95)))
    loop: TextLoopConfig = field(default_factory=TextLoopConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


@dataclass
class FinetuneConfig:
    """Vision → language: fine-tune a language model on instructions, with or without the alignment term (CMAR)."""

    output: Path = Path("runs/finetune")
    """Run folder; a second call with the same configuration resumes it."""
    seed: Seed = 0
    """Seed of batch order, pairs, LoRA's initial weights and dropout."""
    row: str = ""
    """Name of the run's row in tables; empty: made from method and alignment."""
    overwrite: bool = False
    """Delete a run of another configuration that lies in `output`."""
    model: str = ""
    """package:NAME, a local folder, a .gguf file or hf:ORG/NAME of a causal model; random:REF as a control."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    score: tuple[str, ...] = ()
    """Text files whose perplexity is computed at the end."""
    tune: TuneConfig = field(default_factory=lambda: TuneConfig(method="full"))
    data: InstructConfig = field(default_factory=InstructConfig)
    align: RegularizeConfig = field(default_factory=RegularizeConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    pairs: PairsConfig = field(default_factory=PairsConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-5))
    loop: TextLoopConfig = field(default_factory=lambda: TextLoopConfig(steps=500, evaluate_every=100, batch_size=8))
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
