"""The recipes of "Cross Modal Domain Adaptation" (CMDA): Table 1 as published, its controls, and small siblings.

``cmda-*`` carry the paper's settings; where it is silent, ``ASSUMED`` says what was taken and why. ``small-*`` are the same
rows with our better defaults (scale matching, unbiased MMD, positions not twice) on what a laptop can do.
"""

from dataclasses import replace
from typing import Any, Literal

from crossalign.config import (
    AdaptConfig,
    AlignConfig,
    AugmentConfig,
    BackboneConfig,
    DataConfig,
    EmbedderConfig,
    HeadConfig,
    LoopConfig,
    Method,
    OptimConfig,
    TuneConfig,
)
from crossalign.recipes import RECIPES, Recipe

TINYLLAMA = "hf:nickypro/tinyllama-110M"
METHODS: dict[Method, str] = {"fpt": "FPT", "lora": "LoRA", "full": "Full fine-tuning"}
METRICS = {"none": "", "mse": " + alignment (MSE)", "cosine": " + alignment (cosine)", "mmd": " + alignment (MMD)"}
CONTROLS: dict[str, tuple[str, Method, str]] = {
    "fpt-random": ("random", "fpt", "FPT, random weights"),
    "full-random": ("random", "full", "Full fine-tuning, random weights"),
    "fpt-shuffled": ("shuffled", "fpt", "FPT, shuffled weights"),
    "none": ("none", "full", "No backbone"),
    "vit": ("vit", "full", "ViT from scratch"),
}
MATCHED = "FPT, input scale matched"  # alignment moves the scale too: what does the scale alone do?

ASSUMED = {
    "backbone.ref": "the paper says TinyLlama-110M; this is the 110 M Llama trained on TinyStories whose counts match Table 2",
    "backbone.dropout": "not given; the backbone's own configuration has 0",
    "backbone.attention": "not given; the backbone is causal and nothing says that it was changed",
    "backbone.position": "rotary attention is not said to be removed, so it stands beside the new positions of §3.1.2",
    "embedder.match_scale": "not mentioned, so off",
    "data.split_seed": "not given",
    "data.augment.fill": "not given; torchvision's default",
    "align.epochs": "15 to 20, tuned (§3.1.5); the lower end",
    "align.batch_size": "8, 16 or 32, tuned (§3.1.4); the largest",
    "align.lr": "1e-5, 1e-4 or 5e-4, tuned (§3.1.4); the middle one",
    "align.schedule": "not given for this stage; constant",
    "align.weight_decay": "not given for this stage; none",
    "align.level": "§3.1.5 compares mean-pooled embeddings for MSE, and ORCA's MMD pools over tokens",
    "align.sequence_length": "not given; as many tokens as an image has",
    "align.mmd_estimator": "§3.1.5 adapts ORCA's code: V-statistic, five bandwidths round the mean squared distance",
    "optim.optimizer": "Adam or AdamW, tuned (§3.1.4)",
    "optim.lr": "1e-5 to 1e-3, tuned (§3.1.4); the best value is not given",
    "optim.weight_decay": "0, 1e-4 or 1e-2, tuned (§3.1.4)",
    "optim.decay_all": "not given; torch's optimisers decay every parameter",
    "optim.schedule": "cosine or linear, tuned (§3.1.4)",
    "optim.warmup_fraction": "not mentioned, so none",
    "head.dropout": "0, 0.1 or 0.2, tuned (§3.1.4)",
    "loop.batch_size": "16 to 128, tuned (§3.1.4)",
    "loop.precision": "not given",
    "seed": "not given",
}

OF_A_BACKBONE = ("backbone.attention", "backbone.position")
"""Settings of a language model, which the rows without one have none of."""


def published(method: Method, metric: str = "none", weights: str = "") -> AdaptConfig:
    """CMDA §3.1 with ``method`` and alignment ``metric``; ``weights`` random, shuffled, none or vit makes it a control."""
    ref = f"{weights}:{TINYLLAMA}" if weights else TINYLLAMA
    language = weights not in ("none", "vit")  # those two have no direction and no positions of a language model
    return AdaptConfig(
        data=DataConfig(
            source="hf:uoft-cs/cifar10",
            image_size=32,
            validation_fraction=0.2,
            augment=AugmentConfig(flip=0.5, crop_padding=4, rotation_degrees=20.0),
            mean=(0.4914, 0.4822, 0.4465),
            std=(0.2023, 0.1994, 0.2010),  # the mean of each image's own deviation; over all pixels it is (0.247, 0.243, 0.262)
        ),
        backbone=BackboneConfig(ref=ref, attention="causal" if language else "auto", position="both" if language else "new"),
        embedder=EmbedderConfig(kind="linear", patch=4, match_scale=False),
        tune=TuneConfig(method=method, lora_rank=16, lora_alpha=32, lora_dropout=0.1),
        head=HeadConfig(pool="mean", dropout=0.1),
        align=AlignConfig(
            metric=metric,
            epochs=15,
            batch_size=32,
            lr=1e-4,
            level="sequence",
            target="vocabulary",
            sequences=50_000,
            sequence_length=64,
            mmd_estimator="orca",
        ),
        optim=OptimConfig(
            optimizer="adamw", lr=1e-4, weight_decay=1e-2, decay_all=True, schedule="cosine", warmup_fraction=0.0, clip=1.0
        ),
        loop=LoopConfig(epochs=50, batch_size=64),
    )


def small(method: Method, metric: str = "none", weights: str = "") -> AdaptConfig:
    """The same row on a CPU in a minute: MiniLM and the digits of scikit-learn, with the better defaults."""
    config = published(method, metric)
    data = DataConfig(
        source="sklearn:digits",
        channels="gray",
        augment=AugmentConfig(flip=0.0, crop_padding=1, rotation_degrees=10.0),
    )
    ref = f"{weights}:package:minilm" if weights else "package:minilm"
    embedder = EmbedderConfig(patch=2, match_scale=weights not in ("none", "vit"))  # those two have no text to match
    defaults: dict[str, Any] = {"embedder": embedder, "backbone": BackboneConfig(ref=ref), "head": HeadConfig()}
    level: Literal["token", "sequence"] = "sequence" if metric == "otdd" else "token"  # labels belong to whole images
    align = replace(config.align, epochs=3, level=level, sequences=2_000, mmd_estimator="unbiased", lr=5e-4)
    optim = replace(config.optim, lr=1e-3 if method != "full" else 1e-4, decay_all=False)
    return replace(config, data=data, align=align, optim=optim, loop=LoopConfig(epochs=6), **defaults)


def matched() -> AdaptConfig:
    """CMDA's FPT with the input scale matched to text and no alignment: the control for alignment's change of scale."""
    config = published("fpt")
    return replace(config, row=MATCHED, embedder=replace(config.embedder, match_scale=True))


def _add(prefix: str, make: Any, source: str, assumed: dict[str, str]) -> None:
    def recipe(name: str, row: str, *args: str) -> None:
        title = f"{prefix}-{name}"
        why = {key: reason for key, reason in assumed.items() if name not in ("none", "vit") or key not in OF_A_BACKBONE}
        RECIPES.register(title, Recipe(title, lambda: replace(make(*args), row=row), f"{row} ({source})", why))

    for method, title in METHODS.items():
        for metric, suffix in METRICS.items():
            name = method if metric == "none" else f"{method}-{metric}"
            recipe(name, title + suffix, method, metric)
        if prefix == "small":
            recipe(f"{method}-otdd", f"{title} + alignment (OTDD)", method, "otdd")
    for name, (weights, method, title) in CONTROLS.items():
        recipe(name, title, method, "none", weights)
    if prefix == "cmda":
        without = {key: why for key, why in assumed.items() if key != "embedder.match_scale"}
        RECIPES.register("cmda-fpt-matched", Recipe("cmda-fpt-matched", matched, f"{MATCHED} ({source})", without))


_add("cmda", published, "CMDA Table 1 or its control, as published", ASSUMED)
_add("small", small, "small sibling, digits and MiniLM", {})
