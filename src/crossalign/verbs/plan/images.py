"""``plan``: what a run will cost, from a model on the meta device: no memory, no weights, no data at hand.

Shapes: B batch, T tokens, L layers, D width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from crossalign.config import AdaptConfig, DataConfig
from crossalign.core.errors import unknown
from crossalign.models.classifier.model import ImageClassifier
from crossalign.recipes import RECIPES
from crossalign.recipes.space import open_space


@dataclass(frozen=True)
class Hardware:
    """Dense peak of a device, from its maker's data sheet."""

    name: str
    fp32: float
    """FLOP/s, in the precision that fp32 training uses (TF32 where there are tensor cores)."""
    bf16: float
    """FLOP/s."""
    memory: float
    """Bytes."""


HARDWARE = {
    "a100": Hardware("NVIDIA A100 80 GB", 156e12, 312e12, 80e9),
    "h100": Hardware("NVIDIA H100 SXM", 494e12, 989e12, 80e9),
    "h200": Hardware("NVIDIA H200", 494e12, 989e12, 141e9),
    "l4": Hardware("NVIDIA L4", 60e12, 121e12, 24e9),
    "rtx4090": Hardware("NVIDIA RTX 4090", 82.6e12, 165e12, 24e9),
    "t4": Hardware("NVIDIA T4 (fp16)", 8.1e12, 65e12, 16e9),
    "cpu": Hardware("2 CPU cores, AVX-512 (measured order)", 0.1e12, 0.2e12, 16e9),
}


@dataclass(frozen=True)
class Cost:
    """FLOPs, bytes and steps of one run."""

    flops_per_image: float
    """Forward and backward."""
    steps_per_epoch: int
    total_flops: float
    memory_bytes: float
    """Estimated peak of one process."""


def meta_model(config: AdaptConfig, classes: int) -> ImageClassifier:
    """The run's classifier on the meta device."""
    channels = 3 if config.data.channels == "rgb" else 1
    return ImageClassifier.from_backbone(
        config.backbone.ref,
        classes=[str(i) for i in range(classes)],
        image_size=config.data.image_size or _known_size(config.data),
        channels=channels,
        backbone=config.backbone,
        embedder=config.embedder,
        tune=config.tune,
        head=config.head,
        weights=False,
    )


def cost(model: ImageClassifier, config: AdaptConfig, train_images: int) -> Cost:
    """Estimate a run's cost.

    FLOPs: 2 per weight and token forward, the same again for the gradient of the activations, which has to pass through a
    frozen backbone too, and again for the gradient of each weight that trains; attention's 4 T² D a layer likewise.
    Memory: weights, gradients and Adam's two moments in fp32, and activations by Korthikanti et al. 2022, Eq. 2:
    34 B T D bytes a layer and 5 B T² heads without a fused attention; fused attention, as here, drops the second term.
    """
    hf = model.language_model.config
    layers, tokens, width = int(getattr(hf, "num_hidden_layers", 0)), model.embedding.tokens, model.backbone.width
    trained = sum(n for g, n in model.plan.groups().items() if g != "positions")
    used = model.plan.total - sum(r.parameters for r in model.plan.rows if r.group.startswith("unused"))
    attention = 4.0 * tokens * tokens * width * (layers if model.backbone.kind != "none" else 0)
    flops = tokens * (4.0 * used + 2.0 * trained) + 3 * attention
    images = round(train_images * (1 - config.data.validation_fraction))
    images = min(images, config.data.limit_train or images)
    steps = math.ceil(images / config.loop.batch_size)
    micro = math.ceil(config.loop.batch_size / config.loop.accumulation)
    per_layer = 34.0 * micro * tokens * width
    activations = per_layer * (1 if config.backbone.gradient_checkpointing else layers)
    memory = 4.0 * model.plan.total + 12.0 * model.plan.trainable + activations * (1 if config.loop.precision != "fp32" else 2)
    return Cost(flops, steps, flops * images * config.loop.epochs, memory)


def plan(config: AdaptConfig, recipe: str, train_images: int, classes: int, hardware: str, utilization: float) -> str:
    """The plan as text: settings that the paper leaves open, parameters by group, and the cost on ``hardware``.

    Raises:
        UserError: unknown hardware, or a backbone whose configuration is not at hand.
    """
    device = find_hardware(hardware)
    model = meta_model(config, classes)
    estimate = cost(model, config, train_images)
    used = model.plan.total - sum(r.parameters for r in model.plan.rows if r.group.startswith("unused"))
    trainable = f"{model.plan.trainable:,}"
    if config.tune.method == "full" and used != model.plan.total:
        with_table = model.plan.trainable + model.plan.total - used
        trainable += f" ({with_table:,} with the token table, which pixels never touch)"
    lines = [
        f"plan of {recipe or 'a custom configuration'}: {config.row or config.tune.method}, backbone {config.backbone.ref}",
        "",
        str(model.plan),
        "",
        f"trainable parameters   {trainable}",
        f"tokens an image        {model.embedding.tokens}",
        f"steps                  {estimate.steps_per_epoch:,} an epoch, {estimate.steps_per_epoch * config.loop.epochs:,} "
        f"in all ({config.loop.epochs} epochs, batch {config.loop.batch_size}, {train_images:,} images before the split)",
        f"FLOPs                  {estimate.flops_per_image:.3g} an image, {estimate.total_flops:.3g} in all",
        *memory_and_time(
            estimate.memory_bytes,
            estimate.total_flops,
            config.loop.precision,
            device,
            utilization,
            "raise --loop.accumulation, or take --backbone.gradient-checkpointing",
        ),
    ]
    assumed = assumptions(recipe)
    if assumed:
        space = (f"  {line}" for line in open_space("cmda", config).text().splitlines())
        assumed += ["", "the paper's search space (§3.1.4):", *space]
    return "\n".join([*lines, *assumed])


def find_hardware(name: str) -> Hardware:
    """The device called ``name``; raises UserError with the nearest one for a name that is not there."""
    if name not in HARDWARE:
        raise unknown("--hardware", name, HARDWARE)
    return HARDWARE[name]


def memory_and_time(
    memory: float, flops: float, precision: str, device: Hardware, utilization: float, remedy: str
) -> list[str]:
    """Two lines: bytes beside the device's, with ``remedy`` where they are more, and hours at a share of its peak."""
    too_much = f": does not fit; {remedy}" if memory > device.memory else ""
    seconds = flops / ((device.bf16 if precision != "fp32" else device.fp32) * utilization)
    return [
        f"peak memory            about {memory / 1e9:.1f} GB of {device.memory / 1e9:.0f} GB{too_much}",
        f"time                   about {seconds / 3600:.2f} h on {device.name} at {utilization:.0%} of its peak "
        "(an assumption: --utilization)",
    ]


def assumptions(recipe: str) -> list[str]:
    """The fields of a recipe that its paper leaves open, each with the reason for its value."""
    assumed = RECIPES[recipe].assumed if recipe in RECIPES else {}
    lines = [f"  {key}: {why}" for key, why in assumed.items()]
    return ["", "assumed where the paper is silent:", *lines] if lines else []


def _known_size(data: DataConfig) -> int:
    """Image side of a source whose images all have one known size; others need --data.image-size."""
    return {"sklearn:digits": 8}.get(data.source, 32)
