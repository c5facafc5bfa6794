"""``adapt``: make a language model an image classifier, as CMDA §3 describes it.

Open the images three ways, put an embedder and a head round the backbone, align the embeddings with text for some epochs
where asked, train what the freeze plan lets train, keep the best validation epoch, and score the test set once.
"""

import dataclasses
import math
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.nn import functional as F

from crossalign.config import AdaptConfig
from crossalign.core.errors import UserError
from crossalign.core.files import atomic_path, content_key, write_json
from crossalign.core.machine import is_main_process, world_size
from crossalign.core.progress import doing, followed
from crossalign.data.batches import InOrder, ahead
from crossalign.data.images.batches import ImageRows, augment
from crossalign.data.images.load import ImageSet, ImageSplits, channel_statistics, decode_images, list_images
from crossalign.models.classifier.backbone import probe
from crossalign.models.classifier.model import ImageClassifier
from crossalign.models.classifier.targets import corpus_path
from crossalign.results.outcomes import classifier_outcomes
from crossalign.runs.folder import resolved
from crossalign.runs.names import RunFolder
from crossalign.training import checkpoint as ckpt
from crossalign.training import precision
from crossalign.training.loop import Batch, Session, Stage, fit
from crossalign.training.session import batches_of, in_folder, main_process_first, opened_run, run_result
from crossalign.training.tracking import summary
from crossalign.verbs.adapt import row_name
from crossalign.verbs.adapt.alignment import align, find_divergence
from crossalign.verbs.adapt.scoring import Scores, score, write_predictions, write_samples
from crossalign.verbs.adapt.sizes import outline, sized

EVAL_TOKENS = 1 << 15  # of the images that are scored together
MATCH_BATCH = 256  # training images on which the input scale is measured


@in_folder
def adapt(config: AdaptConfig, *, recipe: str = "", quiet: bool = False, until: int | None = None) -> dict[str, Any]:
    """Adapt a language model to images and return the result that result.json holds.

    A finished run is returned as it stands; an unfinished one with the same configuration goes on where it stopped.

    Raises:
        UserError: bad input, before any training. Interrupted, Diverged, DiskFull, and Paused where ``until`` is an
            epoch to pause after: see ``training.loop``.
    """
    check_settings(config)
    with doing(f"listing the images of {config.data.source}"):
        listings = list_images(config.data)
        config = sized(config, listings)
        before = outline(config, listings)
    if is_main_process() and not quiet:
        print(before, flush=True)
    with main_process_first(config.loop.device):  # the others then find the decoded images in the cache
        splits = decode_images(config.data, listings)
    config = _resolve(config, splits.train)
    with doing(f"opening {config.backbone.ref}"):
        model = build_model(config, splits.train)
    _check_before_training(_fitted(config, len(splits.train)), splits, model)
    config = resolve_speed(config, model, splits.train, quiet)
    if is_main_process() and not quiet:
        print(splits.source, flush=True)
        if config.loop.batch_size > len(splits.train):
            print(f"one batch of {len(splits.train)} images, where --loop.batch-size is {config.loop.batch_size} by default")
    identity = content_key(data=splits.fingerprint, backbone=model.language_model.fingerprint)
    with opened_run(
        config, identity, f"images at '{config.data.source}' or weights of '{config.backbone.ref}'", until, quiet
    ) as run:
        model.to(run.accelerator.device)
        config = _fitted(config, len(splits.train))  # after the settings are written down, which a later call must meet
        alignment = align(config, model, splits, run)
        own_seed = config.seed + 1 + 1_000_003 * run.accelerator.process_index  # each process drops its own units
        set_seed(own_seed % 2**32)
        trained = fit(training_stage(config, model, splits, run), run)
        with run.accelerator.autocast():
            scores = _score(model, splits.test, config, run.accelerator, model.embedding.tokens) if config.score_test else None
        kind, plan, classes = model.language_model.kind, model.plan, list(splits.test.classes)
        facts = {
            "method": config.tune.method if kind not in ("none", "vit") else kind,
            "align": config.align.metric,
            "backbone": config.backbone.ref,
            "weights": kind,
            "seed": config.seed,
            "data": splits.source,
            "data_fingerprint": splits.fingerprint,
            "classes": classes,
            "best_epoch": trained.best_epoch,
            "epochs": config.loop.epochs,
            "validation": trained.best,
            "test": scores and scores.test_numbers(len(classes)),
            "parameters": {"trainable": plan.trainable, "total": plan.total, "groups": plan.groups()},
            "learning_rate": config.optim.lr,
            "alignment": alignment,
        }
        result = run_result(config, "adapt", recipe, facts, trained, "images", align=alignment.get("seconds", 0.0))
        result["outcomes"] = classifier_outcomes(result, scores)
        if run.accelerator.is_main_process:
            _write(config, splits, model, scores, result)
            run.log.results = summary(result)
    return result


def _write(
    config: AdaptConfig, splits: ImageSplits, model: ImageClassifier, scores: Scores | None, result: dict[str, Any]
) -> None:
    """The model, the answers on the test set, and last the result, whose presence says that the run is complete."""
    folder = RunFolder(config.output)
    facts = {"data": splits.source, "validation accuracy": f"{result['validation']['accuracy']:.2%}", "seed": config.seed}
    if scores is not None:
        facts["test accuracy"] = f"{result['test']['accuracy']:.2%} on {result['test']['n']} images"
        write_predictions(folder.predictions, scores)
        write_samples(folder.samples, splits.test, scores, seed=config.data.split_seed)
    with atomic_path(folder.model) as temporary:
        model.save_pretrained(temporary, facts=facts)
    write_json(folder.result, result)


def build_model(config: AdaptConfig, train: ImageSet) -> ImageClassifier:
    """The classifier for resolved settings, its input scale matched on training images where asked."""
    shape = train.pixels.shape[1:]
    model = ImageClassifier.from_backbone(
        config.backbone.ref,
        classes=train.classes,
        input_shape=tuple(shape),
        mean=config.data.mean,
        std=config.data.std,
        white_level=config.data.white_level,
        resize=config.data.resize,
        backbone=config.backbone,
        embedder=config.embedder,
        tune=config.tune,
        head=config.head,
        seed=config.seed,
    )
    if model.backbone.attention != "none":
        probe(model.backbone)
    if config.embedder.match_scale:
        model.match_input_scale(torch.from_numpy(train.pixels[:MATCH_BATCH].copy()))
    return model


def _resolve(config: AdaptConfig, train: ImageSet) -> AdaptConfig:
    """Put in what was left to the data and the machine."""
    known = {"mean": config.data.mean, "std": config.data.std}
    if None in known.values():
        with doing("taking mean and deviation of the training images"):
            known = {name: known[name] or value for name, value in zip(known, channel_statistics(train), strict=True)}
    channels = train.pixels.shape[1]
    for name, values in known.items():
        if values is not None and len(values) != channels:
            raise UserError(f"--data.{name} has {len(values)} values, but the images have {channels} channels")
    return dataclasses.replace(resolved(config, data=known), row=config.row or row_name(config))


def _fitted(config: AdaptConfig, images: int) -> AdaptConfig:
    """Batch sizes that are left at their default and larger than the training set, as large as that."""
    sections: dict[str, Any] = {"loop": config.loop, "align": config.align}
    large = {name: part.batch_size for name, part in sections.items() if part.batch_size == type(part).batch_size > images}
    return resolved(config, **{name: {"batch_size": images} for name in large})


def check_settings(config: AdaptConfig) -> None:
    """What the settings alone show to fail later fails here, before any image is opened.

    Raises:
        UserError: settings that do not go together.
    """
    if config.loop.accumulation * world_size() > config.loop.batch_size:
        raise UserError(f"--loop.batch-size {config.loop.batch_size} has fewer images than processes x --loop.accumulation")
    if config.align.metric != "none":
        find_divergence(config)
        if config.align.target == "corpus":
            corpus_path(config.align)


def _check_before_training(config: AdaptConfig, splits: ImageSplits, model: ImageClassifier) -> None:
    """All else that can be known to fail later fails here, before any long work."""
    loop, aligns = config.loop, config.align.metric != "none"
    for name, size in {"loop": loop.batch_size, "align": config.align.batch_size if aligns else 0}.items():
        if size > len(splits.train):
            raise UserError(f"--{name}.batch-size {size} is larger than the {len(splits.train)} training images")
    if aligns:
        model.backbone.text_embedding_table()
    trained = model.trained_state().values()
    best_and_saved = 2 * sum(tensor.numel() for tensor in trained)  # the best ones of all epochs, and the model folder
    ckpt.check_room(config.output, trained, extra_numel=best_and_saved)


def resolve_speed(config: AdaptConfig, model: ImageClassifier, train: ImageSet, quiet: bool = False) -> AdaptConfig:
    """Number format and compiling, where left open, as the hardware or a short measurement on it says is best."""
    loop = config.loop
    share = loop.batch_size // loop.accumulation // world_size()  # of a step, in one pass
    images = torch.from_numpy(train.pixels[:share].copy()).to(loop.device)
    signature = f"2 {model.language_model.config.__class__.__name__} {model.plan} {tuple(images.shape)}"
    steps = loop.epochs * loop.accumulation * math.ceil(len(train) / loop.batch_size)
    return precision.resolve_speed(config, model.to(loop.device), lambda form: form(images), signature, steps, quiet)


def training_stage(config: AdaptConfig, model: ImageClassifier, splits: ImageSplits, run: Session) -> Stage:
    """Training proper (CMDA §3.1.3): cross-entropy on augmented images, validation after every epoch."""
    device, settings = run.accelerator.device, config.data.augment
    batches = batches_of(config, ImageRows(splits.train, settings, device), run.accelerator.process_index, run.world)

    def loss(wrapped: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        labels = batch["labels"].to(device, non_blocking=True)
        images = augment(batch["images"].to(device, non_blocking=True), batch["draw"], settings)
        logits = wrapped(images).float()
        correct = (logits.argmax(-1) == labels).sum()
        return F.cross_entropy(logits, labels, reduction="sum"), {"accuracy": correct}

    def evaluate(wrapped: nn.Module) -> dict[str, float]:
        return _score(wrapped, splits.validation, config, run.accelerator, model.embedding.tokens).summary()

    return Stage(
        name="train",
        model=model,
        loss=loss,
        steps=lambda epoch, first: ahead(batches.epoch(epoch, first)),
        steps_per_epoch=len(batches),
        epochs=config.loop.epochs,
        optim=config.optim,
        state=model.trained_state,
        load=model.load_trained_state,
        evaluate=evaluate,
        select=config.loop.watched,
    )


def _score(model: nn.Module, images: ImageSet, config: AdaptConfig, accelerator: Any, tokens: int) -> Scores:
    part = (accelerator.process_index, accelerator.num_processes)
    size = max(1, min(config.loop.eval_batch_size, EVAL_TOKENS // tokens))
    batches = InOrder(len(images), ImageRows(images, device=accelerator.device).gather, size, *part)
    return score(model, followed(ahead(batches), len(batches), "scoring images", "batch"), images.labels, accelerator)
