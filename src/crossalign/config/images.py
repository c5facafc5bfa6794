"""Settings of language → vision: images, the adapted model, the alignment before training."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from crossalign.config.bounds import (
    Amount,
    Count,
    Finite,
    Fraction,
    Limit,
    Probability,
    Scale,
    Seed,
    Side,
    Size,
    at_least,
    between,
)
from crossalign.config.common import BaseLoopConfig, OptimConfig, TrackingConfig, Watched

Method = Literal["fpt", "lora", "full"]


@dataclass
class AugmentConfig:
    """Random changes of training images, drawn for each image on its own."""

    flip: Annotated[float, between(0, 1)] = 0.5
    """Probability of a horizontal flip; use 0 for digits and text."""
    crop_padding: Annotated[int, between(0, 4096)] = 4
    """Pixels of border added on each side before a random crop back to the image size."""
    rotation_degrees: Annotated[float, between(0, 180)] = 20.0
    """Largest rotation either way, in degrees."""
    fill: Annotated[int, between(0, 255)] = 0
    """Pixel value, 0 to 255, of what a crop or rotation uncovers; 0 is black."""


@dataclass
class DataConfig:
    """Labelled images, split three ways: train, validation (selects), test (scored once)."""

    source: str = "sklearn:digits"
    """sklearn:digits, a folder of class folders, a .parquet file or folder, CIFAR-10's binary folder, or hf:ORG/NAME."""
    test_source: str = ""
    """Where the test images lie, if apart from `source`; empty: the source's own test split, else a part of it."""
    image_column: str = ""
    """Column of the image in a table; empty finds it."""
    label_column: str = ""
    """Column of the class in a table; empty finds it."""
    min_per_class: Count = 1
    """Leave out classes with fewer training images than this."""
    image_size: Side = None
    """Side in pixels that images are resized to; None keeps the source's own size, where that makes at most 256 tokens."""
    channels: Literal["rgb", "gray"] = "rgb"
    """Colour channels that the model sees."""
    resize: Literal["crop", "squash", "pad"] = "crop"
    """How an image gets its size: crop covers it and keeps the middle, squash gives up proportions, pad adds black borders."""
    cache: Literal["auto", "decoded", "encoded"] = "auto"
    """What is kept of the images: their pixels, or their files, which are decoded anew in each epoch; auto: the pixels, unless
    they take more than 16 GB and more than the files."""
    white_level: Annotated[int, between(1, 2**31 - 1)] = 65_535
    """Value that is white in grey images of more than 8 bits, such as 4095 where they have 12."""
    validation_fraction: Fraction = 0.2
    """Share of the training images held out for selection, stratified by class."""
    test_fraction: Fraction = 0.2
    """Share held out for testing where the source has no test split of its own."""
    split_seed: Seed = 0
    """Seed of the split, apart from the training seed, so that all seeds see one split."""
    group_by: str = ""
    """What images share that must lie in one split (a patient, a video, a burst): a column of the table, or a regular
    expression for file names, such as 'patient[0-9]+', of which the first group counts."""
    duplicates: Literal["keep", "together", "drop"] = "keep"
    """Images equal pixel for pixel: keep counts those in two splits, together puts them into one, drop uses one alone."""
    limit_train: Limit = None
    """Train on a stratified subset of this many images."""
    limit_validation: Limit = None
    """Validate on a stratified subset of this many images."""
    limit_test: Limit = None
    """Test on a stratified subset of this many images."""
    on_error: Literal["stop", "skip"] = "stop"
    """What to do with images that cannot be read: stop and name them, or go on without them and count."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """Random changes of training images."""
    mean: tuple[Finite, ...] | None = None
    """Channel means, on a scale of 0 to 1, to subtract; None measures them on the training images."""
    std: tuple[Scale, ...] | None = None
    """Channel standard deviations to divide by; None measures them on the training images."""


@dataclass
class BackboneConfig:
    """The pretrained language model in the middle."""

    ref: str = "package:minilm"
    """package:NAME, a local folder, a .gguf file, hf:ORG/NAME; random:REF or shuffled:REF for controls, none:REF, vit:REF."""
    attention: Literal["auto", "causal", "bidirectional"] = "bidirectional"
    """Who sees whom; bidirectional, so that every token that is pooled has seen the image; auto keeps the backbone's own."""
    position: Literal["auto", "backbone", "new", "both", "none"] = "auto"
    """Whose positions are used; auto: new ones, beside rotary attention if the backbone has it, instead of a learned table."""
    dropout: Probability = 0.0
    """Dropout inside the backbone, whatever its own configuration says."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""


@dataclass
class EmbedderConfig:
    """How an image becomes a sequence of token vectors."""

    kind: str = "linear"
    """linear: one projection of each patch (CMDA §3.1.2); conv: a convolutional stem (§4.2's deeper projection)."""
    patch: Annotated[int | None, at_least(1, 2**20)] = None
    """Side of a square patch in pixels; it must divide the image size. None takes 4, or what makes 256 tokens of an image."""
    match_scale: bool = True
    """Start the new embeddings at the RMS of the backbone's text embeddings, positions as strong as patches."""


@dataclass
class TuneConfig:
    """Which parameters train."""

    method: Method = "fpt"
    """fpt: norms and the new parts; lora: low-rank updates and the new parts; full: everything that is used."""
    lora_rank: Size = 16
    """Rank of each LoRA update."""
    lora_alpha: Size = 32
    """LoRA's scale: updates are multiplied by alpha / rank."""
    lora_dropout: Probability = 0.1
    """Dropout on the input of each LoRA update."""


@dataclass
class HeadConfig:
    """From the last hidden states to class scores."""

    pool: Literal["mean", "last", "cls"] = "mean"
    """mean of all tokens; last: the one token that sees the whole image under causal attention; cls: an added token."""
    dropout: Probability = 0.1
    """Dropout before the linear head."""


@dataclass
class AlignConfig:
    """The stage before training: move the image embeddings towards the text embeddings."""

    metric: str = "none"
    """none, or a divergence by name: mse, cosine, mmd, coral, sinkhorn, otdd, or one that you registered."""
    epochs: Count = 15
    """Passes over the training images in the alignment stage."""
    batch_size: Annotated[int, at_least(2, 2**20)] = 32
    """Images a step in the alignment stage, over all processes."""
    lr: Amount = 1e-4
    """Learning rate of the alignment stage."""
    schedule: Literal["cosine", "linear", "constant"] = "constant"
    """How the learning rate falls over the alignment stage."""
    weight_decay: Amount = 0.0
    """Decay of the embedder in the alignment stage; it pulls embeddings towards zero, away from the text's scale."""
    level: Literal["token", "sequence"] = "token"
    """Compare token vectors, or each sequence's mean over its tokens."""
    target: Literal["vocabulary", "corpus"] = "vocabulary"
    """Random token sequences from the vocabulary (CMDA §3.1.5), or whole sentences of `corpus`."""
    corpus: str = ""
    """A text file, one sentence or paragraph a line, for target=corpus."""
    sequences: Annotated[int, at_least(2, 2**24)] = 50_000
    """How many text sequences to draw targets from."""
    sequence_length: Size = 64
    """Tokens in a text sequence."""
    mmd_estimator: Literal["unbiased", "orca"] = "unbiased"
    """unbiased: the U-statistic; orca: V-statistic and bandwidths as in ORCA's published code, which CMDA adapts."""
    max_tokens: Annotated[int, at_least(2, 2**20)] = 1024
    """Token vectors drawn from each side in a step at token level, so that the cost of a step is bounded."""
    otdd_classes: Annotated[int, at_least(2, 2**20)] = 10
    """Clusters that label the text sequences for otdd."""


@dataclass
class LoopConfig(BaseLoopConfig):
    """How long, on what, and how safely."""

    watched = Watched("accuracy", "epoch", larger_is_better=True)
    epochs: Count = 10
    """Passes over the training images."""

    @property
    def validations(self) -> int:
        """How often the watched number is taken."""
        return self.epochs


@dataclass
class AdaptConfig:
    """Language → vision: make a language model an image classifier (CMDA)."""

    output: Path = Path("runs/adapt")
    """Run folder; a second call with the same configuration resumes it."""
    seed: Seed = 0
    """Seed of initial weights, batch order, augmentation and dropout."""
    row: str = ""
    """Name of the run's row in tables; empty: made from method and metric."""
    overwrite: bool = False
    """Delete a run of another configuration that lies in `output`."""
    score_test: bool = True
    """Score the test set, once, at the end; a search over settings turns it off."""
    data: DataConfig = field(default_factory=DataConfig)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    embedder: EmbedderConfig = field(default_factory=EmbedderConfig)
    tune: TuneConfig = field(default_factory=TuneConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    align: AlignConfig = field(default_factory=AlignConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
