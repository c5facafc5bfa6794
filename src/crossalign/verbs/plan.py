"""``plan``: what a run will cost, from a model on the meta device: no memory, no weights, no data at hand.

Shapes: B images or sequences, T tokens, L layers, D width, V vocabulary.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crossalign.config import AdaptConfig, FinetuneConfig, PretrainConfig, validate
from crossalign.config.bounds import Count, PositiveShare, Size
from crossalign.core.registry import Registry
from crossalign.recipes import all_recipes
from crossalign.verbs import Verb

TRAIN_IMAGES, CLASSES = 50_000, 10  # of CIFAR-10
DEVICE, UTILIZATION = "a100", 0.3
VOCABULARIES = {"hf:openai-community/gpt2": 50_257}
"""Entries of published tokenizers, to plan without a network."""
IMAGE_SIZES = {"sklearn:digits": 8}
"""Side of the images of sources that have one size, and not 32; others need --data.image-size."""


@dataclass
class DeviceArgs:
    """What hours are estimated for."""

    hardware: str = DEVICE
    """Device to estimate hours for."""
    utilization: PositiveShare = UTILIZATION
    """Share of the device's peak that training is assumed to reach."""


@dataclass
class PlanArgs(DeviceArgs, AdaptConfig):
    """What a run will cost, from a model without memory: parameters by group, FLOPs, bytes, steps and hours."""

    train_images: Count = TRAIN_IMAGES
    """Training images before the validation split, where the data are not at hand."""
    classes: Size = CLASSES
    """Classes, where the data are not at hand."""


@dataclass
class PlanPretrainArgs(DeviceArgs, PretrainConfig):
    """What pre-training will cost, from a model without memory: parameters, tokens, FLOPs, bytes and hours."""


@dataclass
class PlanFinetuneArgs(DeviceArgs, FinetuneConfig):
    """What fine-tuning will cost, from a model without memory: parameters, tokens, FLOPs, bytes and hours."""


def run(args: PlanArgs | PlanPretrainArgs | PlanFinetuneArgs, recipe: str) -> str:
    """The plan."""
    names = ("hardware", "utilization", "train_images", "classes")
    return plan(args, recipe=recipe, **{name: getattr(args, name) for name in names if hasattr(args, name)})


PLAN = Verb(PlanArgs, run, {AdaptConfig: PlanArgs, PretrainConfig: PlanPretrainArgs, FinetuneConfig: PlanFinetuneArgs})


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


_HARDWARE = {
    "a100": Hardware("NVIDIA A100 80 GB", 156e12, 312e12, 80e9),
    "h100": Hardware("NVIDIA H100 SXM", 494e12, 989e12, 80e9),
    "h200": Hardware("NVIDIA H200", 494e12, 989e12, 141e9),
    "l4": Hardware("NVIDIA L4", 60e12, 121e12, 24e9),
    "rtx4090": Hardware("NVIDIA RTX 4090", 82.6e12, 165e12, 24e9),
    "t4": Hardware("NVIDIA T4 (fp16)", 8.1e12, 65e12, 16e9),
    "cpu": Hardware("2 CPU cores, AVX-512 (measured order)", 0.1e12, 0.2e12, 16e9),
}
HARDWARE: Registry[Hardware] = Registry("--hardware", _HARDWARE)


@dataclass(frozen=True)
class Cost:
    """What one run costs, whatever the device."""

    lines: list[str]
    """Parameters, steps and FLOPs, as the plan prints them."""
    flops: float
    """Of the whole run."""
    memory: float
    """Bytes; estimated peak of one process."""
    remedy: str
    """What to do where that is too much."""
    states: float = 0.0
    """Bytes of weights, gradients and moments alone, where a run can share them out over devices."""


def plan(
    config: AdaptConfig | PretrainConfig | FinetuneConfig,
    *,
    recipe: str = "",
    hardware: str = DEVICE,
    utilization: float = UTILIZATION,
    train_images: int = TRAIN_IMAGES,
    classes: int = CLASSES,
) -> str:
    """What a run of ``config`` will cost, as text: parameters, steps, FLOPs, memory, hours, and what its paper leaves open.

    Args:
        config: of ``adapt``, ``pretrain`` or ``finetune``.
        recipe: the name of the one that it comes from; its assumed settings are listed with their reasons.
        hardware: the device to estimate hours for: a100, h100, h200, l4, rtx4090, t4 or cpu.
        utilization: share of the device's peak that training is assumed to reach.
        train_images, classes: of an image run, whose data are not looked at; images are counted before the validation split.

    Raises:
        UserError: a setting out of its bounds, unknown hardware, or a model or tokenizer whose configuration is not at hand.
    """
    validate(config)
    device = HARDWARE[hardware]
    cost = _of_images(config, train_images, classes) if isinstance(config, AdaptConfig) else _of_text(config)
    remedy = cost.remedy
    if cost.states > device.memory:
        remedy = f"weights, gradients and moments alone are {cost.states / 1e9:.1f} GB: several devices and --loop.shard"
    too_much = f": does not fit; {remedy}" if cost.memory > device.memory else ""
    seconds = cost.flops / ((device.bf16 if config.loop.precision != "fp32" else device.fp32) * utilization)
    return "\n".join(
        [
            f"plan of {recipe or 'a custom configuration'}: {cost.lines[0]}",
            "",
            *cost.lines[1:],
            f"peak memory            about {cost.memory / 1e9:.1f} GB of {device.memory / 1e9:.0f} GB{too_much}",
            f"time                   about {seconds / 3600:.2f} h on {device.name} at {utilization:.0%} of its peak "
            "(an assumption: --utilization)",
            *_assumptions(config, recipe),
        ]
    )


def _assumptions(config: AdaptConfig | PretrainConfig | FinetuneConfig, recipe: str) -> list[str]:
    """The fields of a recipe that its paper leaves open, each with the reason for its value, and what CMDA searched over."""
    known = all_recipes()
    assumed = known[recipe].assumed if recipe in known else {}
    if not assumed:
        return []
    lines = ["", "assumed where the paper is silent:", *(f"  {key}: {why}" for key, why in assumed.items())]
    if isinstance(config, AdaptConfig):
        from crossalign.recipes.space import open_space

        space = (f"  {line}" for line in open_space("cmda", config).text().splitlines())
        lines += ["", "the paper's search space (§3.1.4):", *space]
    return lines


def _of_images(config: AdaptConfig, train_images: int, classes: int) -> Cost:
    """The cost of ``adapt``.

    FLOPs: 2 per weight and token forward, the same again for the gradient of the activations, which has to pass through a
    frozen backbone too, and again for the gradient of each weight that trains; attention's 4 T² D a layer likewise.
    Memory: weights, gradients and Adam's two moments in fp32, and activations by Korthikanti et al. 2022, Eq. 2:
    34 B T D bytes a layer and 5 B T² heads without a fused attention; fused attention, as here, drops the second term.
    """
    from crossalign.models.classifier.freezing import UNUSED
    from crossalign.models.classifier.model import ImageClassifier
    from crossalign.verbs.adapt.job import check_settings

    check_settings(config)
    model = ImageClassifier.from_backbone(
        config.backbone.ref,
        classes=[str(i) for i in range(classes)],
        image_size=config.data.image_size or IMAGE_SIZES.get(config.data.source, 32),
        channels=3 if config.data.channels == "rgb" else 1,
        backbone=config.backbone,
        embedder=config.embedder,
        tune=config.tune,
        head=config.head,
        weights=False,
    )
    loop = config.loop
    hf, plan = model.language_model.config, model.plan
    layers = int(getattr(hf, "num_hidden_layers", 0))
    tokens, width = model.embedding.tokens, model.backbone.width
    trained = sum(n for g, n in plan.groups().items() if g != "positions")
    used = plan.total - plan.parameters.get(UNUSED, 0)
    attention = 4.0 * tokens * tokens * width * (layers if model.backbone.kind != "none" else 0)
    flops = tokens * (4.0 * used + 2.0 * trained) + 3 * attention
    images = round(train_images * (1 - config.data.validation_fraction))
    images = min(images, config.data.limit_train or images)
    steps = math.ceil(images / loop.batch_size)
    micro = math.ceil(loop.batch_size / loop.accumulation)
    activations = 34.0 * micro * tokens * width * (1 if config.backbone.gradient_checkpointing else layers)
    trainable = f"{plan.trainable:,}"
    if config.tune.method == "full" and used != plan.total:
        with_table = plan.trainable + plan.total - used
        trainable += f" ({with_table:,} with the token table, which pixels never touch)"
    lines = [
        f"{config.row or config.tune.method}, backbone {config.backbone.ref}",
        str(plan),
        "",
        f"trainable parameters   {trainable}",
        f"tokens an image        {tokens}",
        f"steps                  {steps:,} an epoch, {steps * loop.epochs:,} in all ({loop.epochs} epochs, "
        f"batch {loop.batch_size}, {train_images:,} images before the split)",
        f"FLOPs                  {flops:.3g} an image, {flops * images * loop.epochs:.3g} in all",
    ]
    memory = 4.0 * plan.total + 12.0 * plan.trainable + activations * (1 if loop.precision != "fp32" else 2)
    remedy = "raise --loop.accumulation, or take --backbone.gradient-checkpointing"
    return Cost(lines, flops * images * loop.epochs, memory, remedy)


def _of_text(config: PretrainConfig | FinetuneConfig) -> Cost:
    """The cost of ``pretrain`` or ``finetune``.

    FLOPs: 6 a weight and token that it meets (4 for a frozen weight), 12 L D T a token for attention (Kaplan et al. 2020,
    §2.1), and the same for the captions of the alignment term. The teacher looks at each image once; that is left out.
    Memory of one process without sharding: weights, gradients and Adam's moments in fp32, activations by Korthikanti et al.
    2022, Eq. 2, and the logits with their gradient; of a micro-batch or of the captions of a term, whichever needs more, since
    each has a backward pass of its own. Similarities ask for no logits.
    """
    from crossalign.features.regularizer import WEIGHT_PENALTIES
    from crossalign.models.loading import count_parameters
    from crossalign.training.text import check_model, check_text_run
    from crossalign.verbs.language_model import row_name

    check_text_run(config)
    model = _language_model(config)
    check_model(config, model)
    block = config.block if isinstance(config, PretrainConfig) else config.data.block
    hf, loop, align = model.config, config.loop, config.align
    layers, width, vocabulary = int(hf.num_hidden_layers), int(hf.hidden_size), int(hf.vocab_size)
    parameters = count_parameters(model)
    trains, total = parameters["trainable"], parameters["total"]
    tables = sum(m.weight.numel() for m in model.modules() if type(m).__name__ == "Embedding")
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    met = total - tables + (vocabulary * width if tied else 0)  # a look-up costs nothing, the head does
    per_weight = 6.0 if trains == total else 4.0 + 2.0 * trains / total

    def flops(tokens: int, length: int) -> float:
        return float(tokens * (per_weight * met + 12.0 * layers * width * length))

    tokens = loop.steps * loop.batch_size * block
    looks = align.metric not in ("none", *WEIGHT_PENALTIES) and align.weight != 0
    terms = -(-loop.steps // align.every) if looks else 0
    captions = terms * align.batch_size * align.max_length
    micro = -(-loop.batch_size // loop.accumulation)
    checkpointed = config.gpt.gradient_checkpointing if isinstance(config, PretrainConfig) else config.gradient_checkpointing

    def activations(tokens: int, logits: bool) -> float:
        return 34.0 * tokens * width * (1 if checkpointed else layers) + 10.0 * tokens * vocabulary * logits

    passes = [activations(micro * block, logits=True)]
    passes += [activations(align.batch_size * align.max_length, logits=align.metric == "captions")] if terms else []
    states = 4.0 * total + 12.0 * trains
    memory = states + max(passes) * (1 if loop.precision != "fp32" else 2)
    remedy = "raise --loop.accumulation" if passes[0] == max(passes) else "lower --align.batch-size"
    remedy += f" or take {'--gpt.' if isinstance(config, PretrainConfig) else '--'}gradient-checkpointing"
    text, term = flops(tokens, block), flops(captions, align.max_length)
    more = f", and {100 * term / text:.2g} % more for {terms:,} terms of {align.batch_size} captions" if terms else ""
    lines = [
        config.row or row_name(config),
        f"parameters             {total:,}, of which {trains:,} train",
        f"steps                  {loop.steps:,} of {loop.batch_size:,} sequences of {block:,} tokens",
        f"tokens                 {tokens:,} at the most",
        f"FLOPs                  {text / tokens:.3g} a token, {text:.3g} in all{more}",
    ]
    return Cost(lines, text + term, memory, remedy, states)


def _language_model(config: PretrainConfig | FinetuneConfig) -> Any:
    """The run's model on the meta device."""
    from crossalign.data.text.prepared import open_corpus
    from crossalign.data.text.tokenizer import open_tokenizer
    from crossalign.models.language.causal import choose_trained, new_gpt2
    from crossalign.models.language.model import open_language_model

    if isinstance(config, FinetuneConfig):
        model: Any = open_language_model(config.model, head="causal", weights=False).model
        choose_trained(model, config.tune, config.seed)
        return model
    tokenizer, vocabulary = config.corpus.tokenizer, config.corpus.vocabulary
    if config.prepared:
        vocabulary = open_corpus(Path(config.prepared)).vocabulary
    elif tokenizer:
        vocabulary = VOCABULARIES.get(tokenizer) or len(open_tokenizer(tokenizer))
    return new_gpt2(config.gpt, vocabulary=vocabulary, block=config.block, separator=0, seed=0, meta=True)
