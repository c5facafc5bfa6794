"""The alignment stage (CMDA §3.1.5): before training, move the image embeddings towards text embeddings.

Only the embedder and the new positions train; the backbone is never run, since both samples live where token vectors enter
it. A divergence is a function of the whole batch, so every process computes the whole step and none is cut up.
"""

import dataclasses
import warnings
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from crossalign.alignment import collapse_warning, get_divergence, health
from crossalign.config import AdaptConfig
from crossalign.core.errors import UserError
from crossalign.core.files import write_json
from crossalign.core.progress import announce
from crossalign.core.reading import read_json
from crossalign.data.batches import Batches, Step, ahead
from crossalign.data.images.batches import ImageRows, augment
from crossalign.data.images.load import ImageSplits
from crossalign.models.classifier.model import ImageClassifier
from crossalign.models.classifier.targets import TextTargets, text_targets
from crossalign.models.taps import masked_mean
from crossalign.runs.names import RunFolder
from crossalign.training.loop import Batch, Session, Stage, fit

Objective = Callable[[Tensor, Tensor, torch.Generator], Tensor]
HELD_OUT = 512  # validation images, and text sequences, on which health is measured


def align(config: AdaptConfig, model: ImageClassifier, splits: ImageSplits, run: Session) -> dict[str, Any]:
    """Run the stage, where one is asked for; its cost and the health of the embeddings before and after, in alignment.json too.

    Raises:
        UserError: unknown metric, or text targets that cannot be had.
    """
    file = RunFolder(run.folder).alignment
    if config.align.metric == "none":
        return {}
    if run.resume is not None and run.resume.stage == "train":  # the run is past it
        return dict(read_json(file, dict, "restore it, or delete the checkpoint to start over"))
    divergence = find_divergence(config)
    table = model.backbone.text_embedding_table().cpu()  # as sequences are before they are kept; labels are made of both
    targets = text_targets(model.language_model, table, config.align, labels=divergence.needs_labels, seed=config.seed)
    targets = targets.to(run.accelerator.device)
    held_out = torch.from_numpy(splits.validation.pixels[:HELD_OUT].copy()).to(run.accelerator.device)

    def measure(model_unused: nn.Module | None = None) -> dict[str, float]:
        generator = torch.Generator().manual_seed(config.seed)
        with torch.no_grad():
            x = _sample(model.embed(held_out), config, generator)
            text = _text(targets, HELD_OUT, config, generator)
            return {name: float(value) for name, value in health(x, text).items()}

    skipped = config.align.epochs if len(splits.train) % config.align.batch_size == 1 else 0
    if skipped:
        announce(f"alignment skips {skipped} steps, the last of each epoch: one image alone has no distribution")
    before = measure()
    objective = _objective(config, divergence, targets)
    done = fit(_stage(config, model, splits, run, objective, measure), run)
    after = measure()
    # Images fill few directions to begin with, and a collapse is to lose those: what can be asked of the embeddings is the
    # text's spread, or their own at the start if that was less.
    spread = {f"{name}_text": min(after[f"{name}_text"], before[name]) for name in ("std", "effective_rank")}
    warning = collapse_warning(after | spread | {"norm_ratio": after["norm_ratio"] / min(1.0, before["norm_ratio"])})
    if warning and run.accelerator.is_main_process:
        warnings.warn(f"alignment by {config.align.metric}: {warning}", stacklevel=2)
    facts = {"before": before, "after": after, "seconds": done.seconds, "warning": warning or ""}
    facts |= {"skipped_steps": skipped} if skipped else {}
    if run.accelerator.is_main_process:
        write_json(file, facts)
    return facts


def find_divergence(config: AdaptConfig) -> Any:
    """The function that ``config.align`` names.

    Raises:
        UserError: there is none, or it needs labels and single tokens have none.
    """
    settings = config.align
    if settings.metric == "mmd" and settings.mmd_estimator == "orca":
        return get_divergence("mmd-orca")
    try:
        divergence = get_divergence(settings.metric)
    except ValueError as error:
        raise UserError(f"--align.metric: {error}") from error
    if divergence.needs_labels and settings.level == "token":
        raise UserError(
            f"--align.metric {settings.metric} uses the labels of whole images and texts: set --align.level sequence"
        )
    return divergence


def _objective(config: AdaptConfig, divergence: Any, targets: TextTargets) -> Objective:
    """The loss of a step: image vectors against text drawn anew, or against fixed labelled text.

    A divergence that uses labels compares whole data sets, so its text side is one sample, kept with all that depends on
    it alone.
    """
    if not divergence.needs_labels:
        return lambda x, labels, generator: divergence(x, _text(targets, len(labels), config, generator))
    rows = torch.randperm(len(targets), generator=torch.Generator().manual_seed(config.seed))[: config.align.max_tokens]
    text, text_labels = targets.means()[rows.to(targets.ids.device)], cast(Tensor, targets.labels).cpu()[rows]
    if hasattr(divergence, "prepare"):
        against = divergence.prepare(text, text_labels)
        return lambda x, labels, generator: against(x, labels)
    return lambda x, labels, generator: divergence(x, labels, text, text_labels)


def _stage(
    config: AdaptConfig,
    model: ImageClassifier,
    splits: ImageSplits,
    run: Session,
    objective: Objective,
    measure: Callable[[nn.Module], dict[str, float]],
) -> Stage:
    device, settings, align = run.accelerator.device, config.data.augment, config.align
    batches = Batches(ImageRows(splits.train, settings, device), batch_size=align.batch_size, seed=config.seed + 1_000_003)

    def generator(epoch: int, step: int) -> torch.Generator:
        """Draws of one step, a function of its place, so that a resumed stage draws the same."""
        seed = (config.seed * 10_007 + epoch) * 1_000_003 + step
        return torch.Generator().manual_seed(seed % 2**64)  # more a generator does not take

    def steps(epoch: int, first: int) -> Iterator[Step]:
        for step in ahead(batches.epoch(epoch, first)):
            yield Step([{**batch, "generator": generator(epoch, step.step)} for batch in step.micro_batches], step.count)

    def loss(_: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        if len(batch["images"]) < 2:  # what is left of an epoch: one image has no distribution
            return sum(p.sum() for p in model.embedding.parameters()) * 0.0, {"divergence": torch.zeros(())}  # type: ignore[return-value]
        images = augment(batch["images"].to(device, non_blocking=True), batch["draw"], settings)
        x = _sample(model.embed(images), config, batch["generator"])
        value = objective(x, batch["labels"], batch["generator"])
        # The loop divides by the examples of the step; a divergence is one number a step.
        return value * len(images), {"divergence": value.detach() * len(images)}

    def state() -> dict[str, Tensor]:
        return {f"embedding.{name}": p.detach() for name, p in model.embedding.named_parameters()}

    def load(state: dict[str, Tensor]) -> None:
        model.embedding.load_state_dict({name.removeprefix("embedding."): tensor for name, tensor in state.items()})

    return Stage(
        name="align",
        model=model.embedding,
        loss=loss,
        steps=steps,
        steps_per_epoch=len(batches),
        epochs=align.epochs,
        # The training stage's optimiser with this stage's rate, schedule and decay.
        optim=dataclasses.replace(
            config.optim, lr=align.lr, schedule=align.schedule, warmup_fraction=0.0, weight_decay=align.weight_decay
        ),
        state=state,
        load=load,
        evaluate=measure,
        replicated=True,
    )


def _sample(x_BTD: Tensor, config: AdaptConfig, generator: torch.Generator) -> Tensor:
    """Image vectors to compare: (B, D) means of each sequence, or up to ``max_tokens`` single tokens (n, D)."""
    if config.align.level == "sequence":
        return x_BTD.mean(1)
    tokens = x_BTD.flatten(0, 1)
    rows = torch.randperm(len(tokens), generator=generator)[: config.align.max_tokens]
    return tokens[rows.to(tokens.device, non_blocking=True)]


def _text(targets: TextTargets, n: int, config: AdaptConfig, generator: torch.Generator) -> Tensor:
    """Text vectors to compare, of the same level: ``n`` sequence means (n, D), or ``max_tokens`` tokens."""
    if config.align.level == "token":
        return targets.tokens(config.align.max_tokens, generator)
    vectors_NLD, mask_NL, _ = targets.batch(n, generator)
    return masked_mean(vectors_NLD, mask_NL)
