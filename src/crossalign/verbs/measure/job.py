"""``measure``: how aligned language models are with vision models, layer by layer, and whether that is more than chance.

Each model sees the same pairs, once: language models the captions, vision models the images. Every layer of the one kind is
scored against every layer of the other. What chance gives is told by permutations of the images, and the best of all layers
is compared with the best of all layers under each permutation, as Gröger, Wen and Brbić 2026 ("Revisiting the Platonic
Representation Hypothesis: an Aristotelian view") propose; intervals leave out groups of pairs in turn.
"""

import importlib.util
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from crossalign.alignment.registry import get_similarity, similarities
from crossalign.alignment.resampling import (
    FAST,
    calibrate,
    critical_value,
    jackknife_error,
    ordered_scores,
    p_values,
    random_groups,
    random_orders,
    scores_without,
)
from crossalign.config import MeasureConfig, validate
from crossalign.core.device import resolve_device
from crossalign.core.errors import UserError, missing_extra, unknown
from crossalign.core.files import write_json
from crossalign.core.machine import environment, free_memory
from crossalign.core.progress import progress
from crossalign.data.pairs.load import Pairs, open_pairs
from crossalign.models.loading import write_tensors
from crossalign.runs.folder import claim_folder, clear_folder, locked, replaces, saved_config, write_config
from crossalign.runs.names import RunFolder
from crossalign.stats import student_t
from crossalign.verbs.measure.models import Measured, look, name_models, scored_text, with_quality

HAVE_NEIGHBOURS = ("mutual-knn", "soft-mutual-knn")
ROOM = 2 * 2**30
"""Bytes that language models are scored together in: together they are faster, since each order is looked up once."""
MOST_REPEATED = 0.01
"""Share of the pairs that may show the image of another pair."""


@dataclass(frozen=True)
class Alignment:
    """One language model beside one vision model. Shapes: I and J layers, P permutations, G groups."""

    language: Measured
    vision: Measured
    scores: Tensor
    """(I, J)."""
    null: Tensor
    """(P, I, J): with the images in random orders."""
    replicates: Tensor
    """(G, I, J): without each group of pairs."""


def measure(config: MeasureConfig) -> dict[str, Any]:
    """Measure, write the folder ``config.output``, and return what its measure.json holds.

    Raises:
        UserError: bad input; as much as can be known is said before a model is opened.
    """
    _check(config)
    with locked(config.output):
        saved = saved_config(config.output)
        if saved and not {"language", "vision"} <= saved.keys():
            raise UserError(f"{config.output} holds a run that is no measurement: choose another --output")
        claim_folder(config)
        device = resolve_device(config.device, option="--device")
        language, vision = name_models(config)
        text = scored_text(config)
        pairs = open_pairs(config.pairs)  # which checks every image
        _check_pairs(config, pairs)
        language = with_quality(look(language, pairs, device), text, config, device)
        vision = look(vision, pairs, device)
        alignments = align(language, vision, config)
        result = {
            "verb": "measure",
            "pairs": pairs.source,
            "n": len(pairs),
            "language": [model.facts() for model in language],
            "vision": [model.facts() for model in vision],
            "alignment": [_summary(alignment, config) for alignment in alignments],
        }
        if replaces(config):
            clear_folder(config.output)
        RunFolder(config.output).refuse_links()
        _write(config, result, alignments)
    return result


def align(language: Sequence[Measured], vision: Sequence[Measured], config: MeasureConfig) -> list[Alignment]:
    """Every layer of every language model against every layer of every vision model.

    All models share the permutations and the groups. A few language models are scored together, so that memory does not grow
    with their number.

    Raises:
        UserError: features that the metric refuses, or more of them than fit into memory.
    """
    ys = _layers(vision)
    n = len(ys[0])
    metric, options = config.metric, _options(config)
    alignments: list[Alignment] = []
    batches = _batches(language, n, len(ys), metric)
    orders = torch.cat([torch.arange(n)[None], random_orders(n, config.permutations, config.seed)])
    groups = random_groups(n, config.groups, config.seed)
    total = len(batches) * (len(orders) + len(groups.unique()))
    title = f"{metric} of {len(_layers(language))} × {len(ys)} layers"
    try:
        with progress(total, title, unit="order", leave=False) as bar:
            for batch in batches:
                xs, tick = _layers(batch), lambda: bar.update(1)
                scores = ordered_scores(xs, ys, metric, orders, tick, **options)
                alignments += _by_pair(batch, vision, scores, scores_without(xs, ys, metric, groups, tick, **options))
    except ValueError as error:
        raise UserError(f"--metric {metric} cannot be computed of these features: {error}") from error
    return alignments


def _by_pair(
    language: Sequence[Measured], vision: Sequence[Measured], scores: Tensor, replicates: Tensor
) -> Iterator[Alignment]:
    """Each language model with each vision model, of which all layers were scored together.

    Args:
        scores: (1 + P, I, J), in the given order and in random ones; I counts the layers of all language models, J of all
            vision models.
        replicates: (G, I, J), without each group of pairs.

    Raises:
        ValueError: scores that are no numbers.
    """
    rows = [len(model.layers) for model in language]
    columns = [len(model.layers) for model in vision]
    for left, scores_of_left, replicates_of_left in zip(
        language, scores.split(rows, 1), replicates.split(rows, 1), strict=True
    ):
        parts = zip(vision, scores_of_left.split(columns, 2), replicates_of_left.split(columns, 2), strict=True)
        for right, ordered, without in parts:
            if not (ordered.isfinite().all() and without.isfinite().all()):
                raise ValueError(f"some scores of '{left.name}' with '{right.name}' are no finite numbers")
            yield Alignment(left, right, ordered[0], ordered[1:], without)


def _layers(models: Sequence[Measured]) -> list[Tensor]:
    return [layer for model in models for layer in model.layers.values()]


def _batches(models: Sequence[Measured], n: int, columns: int, metric: str) -> list[list[Measured]]:
    """The models in their order, those together that are scored together: as many as there is room for, or one alone."""

    def needed(batch: Sequence[Measured]) -> int:
        # A fast way holds two matrices of pairs × pairs a layer at its fullest, and some that do not depend on layers.
        return 4 * n * n * (2 * (len(_layers(batch)) + columns) + 8) if metric in FAST else 0

    free = free_memory() or math.inf
    batches: list[list[Measured]] = []
    for model in models:
        if batches and needed([*batches[-1], model]) <= min(ROOM, free):
            batches[-1].append(model)
        else:
            batches.append([model])
    largest = max(batches, key=needed)
    if needed(largest) > free:
        raise UserError(
            f"{n} pairs and {len(_layers(largest))} + {columns} layers need about {needed(largest) / 1e9:.1f} GB of memory, "
            f"and {free / 1e9:.1f} are free: lower --pairs.limit, or choose layers"
        )
    return batches


def _options(config: MeasureConfig) -> dict[str, Any]:
    return {"k": config.neighbours} if config.metric in HAVE_NEIGHBOURS else {}


def _summary(alignment: Alignment, config: MeasureConfig) -> dict[str, Any]:
    """The best of all layers, beside the best of all layers under chance."""
    best, null = alignment.scores.max(), alignment.null.amax((1, 2))
    row, column = divmod(int(alignment.scores.argmax()), alignment.scores.shape[1])
    critical = critical_value(best, null, config.level)
    # Each replicate takes the best of its own layers, so that the choice among them is part of what is uncertain.
    half = student_t(len(alignment.replicates) - 1) * jackknife_error(alignment.replicates.amax((1, 2)))
    interval = torch.stack([best - half, best + half])
    return {
        "language": alignment.language.name,
        "vision": alignment.vision.name,
        "language_layer": list(alignment.language.layers)[row],
        "vision_layer": list(alignment.vision.layers)[column],
        "score": float(best),
        "interval": interval.tolist(),
        "null_mean": float(null.mean()),
        "critical": float(critical),
        "calibrated": float(calibrate(best, critical)),
        "calibrated_interval": calibrate(interval, critical).tolist(),
        "p": float(p_values(best, null)),
    }


def _write(config: MeasureConfig, result: dict[str, Any], alignments: list[Alignment]) -> None:
    """config.yaml, environment.json, measure.json, scores.safetensors, figures/ and measure.md."""
    from crossalign.verbs.measure.page import write_page

    folder = config.output
    write_config(folder, config)
    write_json(RunFolder(folder).environment, environment())
    tensors: dict[str, Tensor] = {}
    for alignment in alignments:
        best = alignment.null.amax((1, 2))
        numbers = {
            "score": alignment.scores,
            "error": jackknife_error(alignment.replicates),
            "null mean": alignment.null.mean(0),
            "p": p_values(alignment.scores, best[:, None, None]),
            "null best": best,
        }
        tensors |= {f"{alignment.language.name} | {alignment.vision.name} | {name}": tensor for name, tensor in numbers.items()}
    write_tensors(RunFolder(folder).scores, tensors)
    write_json(RunFolder(folder).measurement, result)
    write_page(folder, config, result, {name: tensor.numpy() for name, tensor in tensors.items()})


def _check(config: MeasureConfig) -> None:
    """What can be known to be wrong before anything is opened."""
    validate(config)
    for package in ("matplotlib", "scipy"):  # not needed until all models have looked
        if importlib.util.find_spec(package) is None:
            raise missing_extra(package, "report", "crossalign measure")
    for name in ("language", "vision"):
        if not getattr(config, name):
            raise UserError(f"--{name} names no model: give one or more")
    if config.metric not in similarities:
        raise unknown("metric", config.metric, similarities)
    least = math.ceil(1 / config.level - 1e-9) - 1
    if config.permutations < least:
        raise UserError(
            f"--permutations {config.permutations} cannot show anything at --level {config.level}: take {least} or more"
        )


def _check_pairs(config: MeasureConfig, pairs: Pairs) -> None:
    """Whether the pairs stand for themselves, and the metric is defined for so many, and without a group of them."""
    n = len(pairs)
    if pairs.repeated > MOST_REPEATED * n:  # in another order they still have their like, and are their own neighbours
        raise UserError(
            f"{pairs.repeated} of {n} pairs repeat an image, and permutations and intervals need rows that stand alone: "
            "give one row an image, with a list of its texts"
        )
    fewest = n - -(-n // config.groups)
    try:
        if fewest < 2:
            raise ValueError(f"the jackknife leaves {fewest} pairs")
        get_similarity(config.metric)(torch.randn(fewest, 1), torch.randn(fewest, 1), **_options(config))
    except ValueError as error:
        raise UserError(
            f"{n} pairs are too few for --metric {config.metric} with --groups {config.groups} left out in turn ({error}): "
            f"give more pairs, or list all that are to count with --pairs.split-file ({pairs.source})"
        ) from error
