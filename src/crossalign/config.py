"""Every setting of every verb, as plain dataclasses: the text under a field is its help on the command line."""

from __future__ import annotations

import contextlib
import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from crossalign.errors import UserError, unknown

Method = Literal["fpt", "lora", "full"]
T = TypeVar("T")


@dataclass
class AugmentConfig:
    """Random changes of training images, drawn for each image on its own."""

    flip: float = 0.5
    """Probability of a horizontal flip; use 0 for digits and text."""
    crop_padding: int = 4
    """Pixels of border added on each side before a random crop back to the image size."""
    rotation_degrees: float = 20.0
    """Largest rotation either way, in degrees."""
    fill: int = 0
    """Pixel value, 0 to 255, of what a crop or rotation uncovers; 0 is black."""


@dataclass
class DataConfig:
    """Labelled images, split three ways: train, validation (selects), test (scored once)."""

    source: str = "sklearn:digits"
    """sklearn:digits, a folder of class folders, a .parquet file or folder, CIFAR-10's binary folder, or hf:ORG/NAME."""
    test_source: str = ""
    """Where the test images lie, if apart from `source`; empty: the source's own test split, else a part of it."""
    image_size: int | None = None
    """Side in pixels that images are resized to; None keeps the source's own size."""
    channels: Literal["rgb", "gray"] = "rgb"
    """Colour channels that the model sees."""
    validation_fraction: float = 0.2
    """Share of the training images held out for selection, stratified by class."""
    test_fraction: float = 0.2
    """Share held out for testing where the source has no test split of its own."""
    split_seed: int = 0
    """Seed of the split, apart from the training seed, so that all seeds see one split."""
    limit_train: int | None = None
    """Train on a stratified subset of this many images."""
    limit_validation: int | None = None
    """Validate on a stratified subset of this many images."""
    limit_test: int | None = None
    """Test on a stratified subset of this many images."""
    on_error: Literal["stop", "skip"] = "stop"
    """What to do with images that cannot be read: stop and name them, or go on without them and count."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """Random changes of training images."""
    mean: tuple[float, ...] | None = None
    """Channel means, on a scale of 0 to 1, to subtract; None measures them on the training images."""
    std: tuple[float, ...] | None = None
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
    dropout: float = 0.0
    """Dropout inside the backbone, whatever its own configuration says."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""


@dataclass
class EmbedderConfig:
    """How an image becomes a sequence of token vectors."""

    kind: str = "linear"
    """linear: one projection of each patch (CMDA §3.1.2); conv: a convolutional stem (§4.2's deeper projection)."""
    patch: int = 4
    """Side of a square patch in pixels; it must divide the image size."""
    match_scale: bool = True
    """Start the new embeddings at the RMS of the backbone's text embeddings, positions as strong as patches."""


@dataclass
class TuneConfig:
    """Which parameters train."""

    method: Method = "fpt"
    """fpt: norms and the new parts; lora: low-rank updates and the new parts; full: everything that is used."""
    lora_rank: int = 16
    """Rank of each LoRA update."""
    lora_alpha: int = 32
    """LoRA's scale: updates are multiplied by alpha / rank."""
    lora_dropout: float = 0.1
    """Dropout on the input of each LoRA update."""


@dataclass
class HeadConfig:
    """From the last hidden states to class scores."""

    pool: Literal["mean", "last", "cls"] = "mean"
    """mean of all tokens; last: the one token that sees the whole image under causal attention; cls: an added token."""
    dropout: float = 0.1
    """Dropout before the linear head."""


@dataclass
class AlignConfig:
    """The stage before training: move the image embeddings towards the text embeddings."""

    metric: str = "none"
    """none, or a divergence by name: mse, cosine, mmd, coral, sinkhorn, otdd, or one that you registered."""
    epochs: int = 15
    """Passes over the training images in the alignment stage."""
    batch_size: int = 32
    """Images a step in the alignment stage, over all processes."""
    lr: float = 1e-4
    """Learning rate of the alignment stage."""
    level: Literal["token", "sequence"] = "token"
    """Compare token vectors, or each sequence's mean over its tokens."""
    target: Literal["vocabulary", "corpus"] = "vocabulary"
    """Random token sequences from the vocabulary (CMDA §3.1.5), or whole sentences of `corpus`."""
    corpus: str = ""
    """A text file, one sentence or paragraph a line, for target=corpus."""
    sequences: int = 50_000
    """How many text sequences to draw targets from."""
    sequence_length: int = 64
    """Tokens in a text sequence."""
    mmd_estimator: Literal["unbiased", "orca"] = "unbiased"
    """unbiased: the U-statistic; orca: V-statistic and bandwidths as in ORCA's published code, which CMDA adapts."""
    max_tokens: int = 1024
    """Token vectors drawn from each side in a step at token level, so that the cost of a step is bounded."""
    otdd_classes: int = 10
    """Clusters that label the text sequences for otdd."""


@dataclass
class PairsConfig:
    """Texts with images that belong to them: what alignment between a language model and a vision model is measured on."""

    source: str = "openmoji"
    """openmoji (a pip package's pictures with their Unicode names), a .parquet file or folder with images and captions,
    WebDataset shards (.tar), or hf:ORG/NAME."""
    split: str = "train"
    """Split of the source: train, validation or test; a source without splits is cut 80/10/10 by a seeded hash of its rows."""
    split_file: str = ""
    """A text file that lists the images of the split, one file name a line, as Flickr8k has them."""
    image_column: str = ""
    """Column of the image; empty finds it."""
    text_column: str = ""
    """Column of the caption or captions; empty finds it."""
    limit: int | None = None
    """Use the first this many pairs, in a seeded order."""
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
    weights: tuple[float, ...] = ()
    """One weight a layer for combine=sum; empty takes the mean."""
    pool: Literal["auto", "cls", "mean"] = "auto"
    """cls: the class token; mean: the mean over places; auto: as the model's own classifier does."""
    batch_size: int = 64
    """Images a forward pass."""


@dataclass
class CorpusConfig:
    """Text to train a language model on, as one stream of tokens."""

    source: tuple[str, ...] = ()
    """Text files, .parquet or .jsonl files, folders of them, or hf:ORG/NAME."""
    text_column: str = "text"
    """Column or key of the text in parquet and jsonl."""
    tokenizer: str = ""
    """Folder, tokenizer.json, package:NAME or hf:ORG/NAME of a tokenizer; empty trains one on the corpus."""
    vocabulary: int = 4096
    """Entries of a tokenizer that is trained here (byte-level BPE)."""
    validation_fraction: float = 0.005
    """Share of the documents held out; a lone document is cut at this share of its text."""
    split_seed: int = 0
    """Seed of the split by document."""


@dataclass
class OptimConfig:
    """Optimiser and schedule of the training stage."""

    optimizer: Literal["adam", "adamw"] = "adamw"
    """adam adds weight decay to the gradient; adamw decays the weights themselves."""
    lr: float = 1e-3
    """Peak learning rate."""
    weight_decay: float = 1e-2
    """Decay of matrices; norms, biases and positions are spared unless decay_all."""
    decay_all: bool = False
    """Decay every parameter, as a plain torch optimiser does."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Decay of the learning rate to zero over the stage."""
    warmup_fraction: float = 0.0
    """Share of the steps over which the learning rate rises from zero."""
    clip: float = 1.0
    """Largest gradient norm; 0 turns clipping off."""


@dataclass
class LoopConfig:
    """How long, on what, and how safely."""

    epochs: int = 10
    """Passes over the training images."""
    batch_size: int = 64
    """Images an optimiser step, over all processes and micro-batches."""
    accumulation: int = 1
    """Micro-batches that a step is cut into, to save memory; but for the draws of dropout, results do not change."""
    eval_batch_size: int = 256
    """Images a batch in evaluation, over all processes."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 (or fp16) on a GPU that has it; on a CPU, whichever a short probe finds faster."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute."""
    compile: bool | None = None
    """Compile the model with torch.compile; None measures whether that saves time, in runs of a quarter of an hour or more."""
    checkpoint_minutes: float = 5.0
    """Write a checkpoint at least this often, and at the end of every epoch."""
    log_every: int = 20
    """Steps between two training rows in metrics.jsonl."""
    deterministic: bool = False
    """Ask torch for deterministic kernels; slower on a GPU, no cost on a CPU."""


@dataclass
class TrackingConfig:
    """Where runs are recorded beside their own folder."""

    mlflow: bool = True
    """Also log to MLflow where it is installed."""
    mlflow_uri: str = ""
    """MLflow server or store; empty: the SQLite file mlflow.db beside the run folder."""
    experiment: str = "crossalign"
    """MLflow experiment name."""


@dataclass
class AdaptConfig:
    """Language → vision: make a language model an image classifier (CMDA)."""

    output: Path = Path("runs/adapt")
    """Run folder; a second call with the same configuration resumes it."""
    seed: int = 0
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


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as nested plain values: what config.yaml holds."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, Path) else value

    return plain(dataclasses.asdict(config))  # type: ignore[no-any-return]


def update(config: T, values: dict[str, Any], place: str = "") -> T:
    """A copy of ``config`` with nested ``values`` put in.

    Raises:
        UserError: a key that the configuration does not have (the nearest one is named), or a value of another type.
    """
    fields = {f.name: f for f in dataclasses.fields(config)}  # type: ignore[arg-type]
    hints = get_type_hints(type(config))
    changes: dict[str, Any] = {}
    for key, value in values.items():
        if key not in fields:
            raise unknown(f"setting in {place or 'the configuration'}", key, fields)
        old = getattr(config, key)
        if dataclasses.is_dataclass(old) and not isinstance(old, type):
            if not isinstance(value, dict):
                raise UserError(f"setting '{place}{key}' holds {value!r}; it is a section and takes settings under it")
            value = update(old, value, f"{place}{key}.")
        else:
            value = _typed(value, hints[key], place + key)
        changes[key] = value
    return dataclasses.replace(config, **changes)  # type: ignore[type-var]


def _typed(value: Any, hint: Any, place: str) -> Any:
    """``value`` as a field of type ``hint`` holds it; files and ``key=value`` settings bring lists and text."""
    options = get_args(hint)
    if get_origin(hint) is Literal:
        if value not in options:
            raise unknown(f"value for '{place}'", str(value), options)
        return value
    if get_origin(hint) is UnionType:  # X | None
        return None if value is None else _typed(value, next(o for o in options if o is not type(None)), place)
    if get_origin(hint) is tuple and isinstance(value, list | tuple):
        return tuple(_typed(item, options[0], place) for item in value)
    if hint in (str, Path) and isinstance(value, str | Path):
        return hint(value)
    with contextlib.suppress(TypeError, ValueError):
        if hint is float and not isinstance(value, bool):
            return float(value)  # YAML 1.1 reads 1e-3 as text
        if hint in (int, bool) and type(value) is hint:
            return value
    raise UserError(f"setting '{place}' holds {value!r}; it takes {getattr(hint, '__name__', hint)}")
