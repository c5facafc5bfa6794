"""Settings of the measurement: which models, on which pairs, by which score, and how chance is told from it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from crossalign.config.bounds import Count, Fraction, Seed, at_least
from crossalign.config.text import PairsConfig


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
    neighbours: Count = 10
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
    max_length: Count = 128
    """Tokens of a text; more are cut off."""
    permutations: Count = 200
    """Random orders of the images that tell what chance gives; the smallest p-value is 1 / (1 + permutations)."""
    level: Fraction = 0.05
    """Chance that a score of unrelated features counts as more than chance, over all layers of two models."""
    groups: Annotated[int, at_least(2)] = 20
    """Groups of pairs that the jackknife leaves out in turn, for the intervals."""
    text: str = ""
    """A text file on which causal models are scored in bits a byte, for the plot of language quality against alignment."""
    text_kilobytes: Count = 64
    """How much of the text, from its start."""
    block: Count = 512
    """Tokens that a model sees at once in that text."""
    seed: Seed = 0
    """Seed of the orders, of the groups, and of the weights of random: and shuffled: models."""
    batch_size: Count = 32
    """Texts, or images, a forward pass; it does not change the features."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where models compute; scores are computed on the CPU."""
    output: Path = Path("runs/measure")
    """Folder of the measurement; a second call with the same settings writes it anew from cached features."""
    overwrite: bool = False
    """Replace a measurement with other settings that lies in `output`, once this one is done."""
    pairs: PairsConfig = field(default_factory=lambda: PairsConfig(split="test"))
