"""The alignment term as a training verb uses it: the regulariser on due steps, its log, and alignment on held-out pairs.

Shapes: N pairs, p student features, q teacher features.
"""

import inspect
import re
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from crossalign.alignment import get_similarity, penalties, similarities
from crossalign.alignment.health import participation_ratio
from crossalign.config import FinetuneConfig, PretrainConfig, RegularizeConfig, TeacherConfig
from crossalign.core.errors import UserError, unknown
from crossalign.core.machine import is_main_process, world_size
from crossalign.core.reading import user_path
from crossalign.core.refs import UNTRAINED, Ref
from crossalign.data.batches import IGNORED
from crossalign.data.pairs.batches import PairBatch, PairBatches
from crossalign.data.pairs.load import Pairs, open_pairs
from crossalign.data.pairs.sources import check_source
from crossalign.features.regularizer import WEIGHT_PENALTIES, AlignmentRegularizer, check_metric, find_metric, rank_and_world
from crossalign.features.sources import ImageSource, teacher_features
from crossalign.models.language.causal import nll_sum
from crossalign.models.taps import Taps, unwrapped

Config = PretrainConfig | FinetuneConfig
PREFIX = "regularizer."
HELD_OUT = 512
BATCH = 64  # held-out captions a forward pass
FEWEST_HELD_OUT = 8
HELD_OUT_METRICS = ("cka-linear-debiased", "cka-rbf-debiased")


class CaptionExposure:
    """The pairs' captions as ordinary training text, without images: the control for what their text alone does.

    ``loss`` is the sum of their tokens' negative log-likelihoods over the tokens of a step of the text, so that at weight 1
    a token of a caption weighs as much as one of the text. The rest is as in ``AlignmentRegularizer``.
    """

    def __init__(self, pairs: PairBatches, weight: float, every: int, tokens: float) -> None:
        self.pairs, self.weight, self.every, self.tokens = pairs, weight, every, tokens
        self.numbers: dict[str, Tensor] = {}
        self._step = 0

    def due(self, step: int) -> bool:
        self._step = step
        return self.weight != 0 and step % self.every == 0

    def loss(self, model: nn.Module) -> Tensor:
        rank, world = rank_and_world()
        inputs = _as_text(self.pairs.batch(self._step // self.every, rank=rank, world=world))
        model = unwrapped(model)
        nll = nll_sum(model, inputs, next(model.parameters()).device)
        count = (inputs["targets"] != IGNORED).sum()
        sums = torch.stack([nll.detach(), count.to(nll.device, nll.dtype, non_blocking=True)])
        if world > 1:
            torch.distributed.all_reduce(sums)
        self.numbers = {"caption_loss": sums[0] / sums[1]}
        return nll * (self.weight * world / self.tokens)

    @torch.no_grad()
    def score(self, model: nn.Module) -> Tensor:
        with torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_available() else []):
            return self.loss(model)

    def try_out(self, model: nn.Module) -> Tensor:
        return nll_sum(model, _as_text(self.pairs.batch(0)), next(model.parameters()).device)


def _as_text(batch: PairBatch) -> dict[str, Tensor]:
    """Captions (B, T) as inputs and their next tokens."""
    ids, mask = batch.input_ids, batch.attention_mask
    targets = ids[:, 1:].masked_fill(mask[:, 1:] == 0, IGNORED)
    return {"input_ids": ids[:, :-1], "attention_mask": mask[:, :-1], "targets": targets}


@dataclass
class Term:
    """What ``Stage.extra`` calls."""

    regularizer: AlignmentRegularizer | CaptionExposure
    log_every: int
    warns: bool = False
    """Whether the metric warns on each call of what :meth:`check` tells once."""

    @property
    def fingerprint(self) -> str:
        """A hash of captions and features: a run goes on with the same ones only."""
        return self.regularizer.pairs.fingerprint

    def check(self, model: nn.Module) -> None:
        """Compute the term once, before any training, so that what cannot work is told then.

        Raises:
            UserError: a layer that the model does not have, a metric that is not defined for so many pairs, or layers that
                nothing that trains has a part in.
        """
        was_training = model.training
        try:
            self.regularizer.due(0)
            with warnings.catch_warnings(record=True) as warned:
                value = self.regularizer.try_out(model.eval())
        except UserError:
            raise
        except (ValueError, RuntimeError) as error:
            raise UserError(f"the alignment term cannot be computed: {error}") from error
        finally:
            model.train(was_training)
        for sentence in dict.fromkeys(str(warning.message) for warning in warned):
            _note(sentence)
        if not value.requires_grad:
            raise UserError("the alignment term has no gradient in what trains: tap another layer with --align.layers")

    def extra(self, model: nn.Module, step: int) -> tuple[Tensor, dict[str, Tensor]] | None:
        """The term of a step with numbers to log; where none is due, its score alone if that is to be logged."""
        with warnings.catch_warnings() if self.warns else nullcontext():
            if self.warns:
                warnings.filterwarnings("ignore", module="crossalign.features.regularizer")
            if self.regularizer.due(step):
                return self.regularizer.loss(model), self.regularizer.numbers
            if self.log_every and step % self.log_every == 0:
                return self.regularizer.score(model), self.regularizer.numbers
            return None

    def state(self) -> dict[str, Tensor]:
        """The feature queue, as tensors of a checkpoint."""
        queue = self.regularizer.state_dict()["queue"] if isinstance(self.regularizer, AlignmentRegularizer) else []
        return {f"{PREFIX}queue.{i}": tensor for i, tensor in enumerate(queue)}

    def load_state(self, saved: dict[str, Tensor]) -> dict[str, Tensor]:
        """Put :meth:`state` back and return what is left of ``saved``."""
        queue = [saved[name] for name in sorted(saved) if name.startswith(PREFIX)]
        if isinstance(self.regularizer, AlignmentRegularizer):
            self.regularizer.load_state_dict(self.regularizer.state_dict() | {"queue": queue})
        return {name: tensor for name, tensor in saved.items() if not name.startswith(PREFIX)}


@torch.no_grad()
def measure_held_out(pairs: PairBatch, taps: Taps, model: nn.Module, accelerator: Any) -> dict[str, float]:
    """Debiased CKA, whose value does not depend on N, and the number of directions that the student's features fill."""
    device = accelerator.device
    batches = zip(pairs.input_ids.split(BATCH), pairs.attention_mask.split(BATCH), strict=True)
    with accelerator.autocast():
        student = torch.cat([taps(model, ids.to(device), mask.to(device)) for ids, mask in batches])
    teacher = pairs.features.to(device, student.dtype)
    numbers = {f"held_out_{name}": get_similarity(name)(student, teacher) for name in HELD_OUT_METRICS}
    return {name: float(v) for name, v in (numbers | {"held_out_directions": participation_ratio(student)}).items()}


def check_sources(config: Config) -> None:
    """Find out before long work whether the pairs and the teachers are there; no image is looked at.

    Raises:
        UserError: a source of pairs, a list of ids, a teacher, or one of its layers does not exist.
    """
    align = config.align
    if not _has_term(align) and _held_out_count(align) < 1:
        return
    check_source(config.pairs.source)
    for name in filter(None, (config.pairs.split_file, align.held_out_file)):
        if not user_path(name).is_file():
            raise UserError(f"there is no split file '{name}': give a text file with one id a line")
    teachers = [config.teacher] if _has_term(align) and align.metric in similarities else []
    teachers += [_held_out_teacher(config)] if _held_out_count(align) > 0 else []
    for teacher in {teacher.ref: teacher for teacher in teachers}.values():
        _ = ImageSource(teacher).key  # it says what is not there


def _has_term(align: RegularizeConfig) -> bool:
    return align.metric != "none" and (align.weight != 0 or align.log_every > 0)


def reads_captions(align: RegularizeConfig) -> bool:
    """Whether captions are trained on or measured."""
    return align.metric != "none" or _held_out_count(align) > 0


def _held_out_count(align: RegularizeConfig) -> int:
    return align.held_out if align.held_out is not None else (HELD_OUT if align.metric != "none" else 0)


def _held_out_teacher(config: Config) -> TeacherConfig:
    """A control's teacher is for training: all rows of a table are measured with the same one."""
    return replace(config.teacher, ref=config.align.held_out_teacher or Ref(config.teacher.ref, UNTRAINED).base)


def open_term(config: Config, tokenizer: Any, tokens: float) -> Term | None:
    """The term that ``config.align`` asks for; None where it asks for none.

    Args:
        config: settings, with the device where the teacher computes, if its features are not in the cache.
        tokenizer: of the student.
        tokens: of the text, that a step trains on.

    Raises:
        UserError: pairs, a teacher or a metric that cannot be used.
    """
    align = config.align
    if not _has_term(align):
        return None
    opened, device = open_pairs(config.pairs), config.loop.device
    # Captions and penalties look at no image: zeros stand in for features.
    looks = align.metric in similarities
    features = teacher_features(config.teacher, opened, device=device).values if looks else torch.zeros(len(opened), 1)
    batches = PairBatches(
        opened.texts, features, tokenizer, batch_size=align.batch_size, seed=config.seed, max_length=align.max_length
    )
    if align.metric == "captions":
        return Term(CaptionExposure(batches, align.weight, align.every, tokens), align.log_every)
    regularizer = AlignmentRegularizer(
        align.metric,
        list(align.layers),
        align.weight,
        align.every,
        pairs=batches,
        mode=align.mode,
        pool=align.pool,
        queue=align.queue,
        **(_options(align) if looks else {}),
    )
    return Term(regularizer, align.log_every, warns=align.on_degenerate == "warn")


def open_held_out(config: Config, tokenizer: Any) -> Callable[[nn.Module, Any], dict[str, float]] | None:
    """:func:`measure_held_out` on the pairs that ``config.align`` asks for, never trained on; None where it asks for none.

    Raises:
        UserError: pairs or a teacher that cannot be used.
    """
    align, wanted = config.align, _held_out_count(config.align)
    if wanted < 1:
        return None
    held_out = open_pairs(replace(config.pairs, split="validation", split_file=align.held_out_file, limit=None))
    if align.metric != "none":
        shared = _image_ids(held_out) & _image_ids(open_pairs(config.pairs))
        if shared:
            raise UserError(
                f"{len(shared)} held-out pairs are trained on, such as {min(shared)}: list others in --align.held-out-file, "
                "choose another --pairs.split, or --align.held-out 0"
            )
    if len(held_out) < FEWEST_HELD_OUT:
        raise UserError(
            f"{held_out.source}: {len(held_out)} held-out pairs are too few to measure alignment on; give {FEWEST_HELD_OUT} "
            "or more"
        )
    if align.held_out is not None and wanted > len(held_out):
        _note(f"--align.held-out {wanted} is more than there are: all {len(held_out)} are used ({held_out.source})")
    teacher = _held_out_teacher(config)
    try:
        features = teacher_features(teacher, held_out, device=config.loop.device).values
    except UserError as error:
        if not Ref(teacher.ref).file:
            raise
        raise UserError(
            f"'{teacher.ref}' does not hold the features of the held-out pairs, on which alignment is measured too "
            f"({held_out.source}): give theirs with --align.held-out-teacher file:PATH, or leave that out with "
            "--align.held-out 0"
        ) from error
    rows = torch.randperm(len(held_out), generator=torch.Generator().manual_seed(0))[:wanted].sort().values
    texts = [held_out.texts[row][0] for row in rows.tolist()]
    batches = PairBatches(texts, features[rows], tokenizer, batch_size=len(texts), max_length=align.max_length)
    return partial(measure_held_out, batches.batch(0), Taps(list(align.layers), align.pool))


def _image_ids(pairs: Pairs) -> set[str]:
    """Ids without the mark of an image's further captions."""
    return {re.sub(r"#\d+$", "", name) for name in pairs.ids}


def _note(sentence: str) -> None:
    """Tell something that stops nothing, once for all processes."""
    if is_main_process():
        print(f"crossalign: {sentence}", file=sys.stderr)


def check_align(align: RegularizeConfig) -> None:
    """What can be known to be wrong with the term without pairs, teacher or model.

    Raises:
        UserError: no such metric, one that is no loss, or settings that do not go together.
    """
    known = ["none", *similarities, *penalties, *WEIGHT_PENALTIES, "captions"]
    if align.metric not in known and align.metric not in similarities:
        raise unknown("metric", align.metric, known)
    if align.held_out is not None and align.held_out != 0 and align.held_out < FEWEST_HELD_OUT:
        raise UserError(
            f"--align.held-out is {align.held_out}; it must be 0, or at least {FEWEST_HELD_OUT} pairs to measure on"
        )
    if not align.layers:
        raise UserError("--align.layers names no layer: give one, such as penultimate")
    world = world_size()
    if align.batch_size < world:
        raise UserError(f"--align.batch-size {align.batch_size} is smaller than the number of processes, {world}: raise it")
    if align.metric in ("none", "captions"):
        return
    metric = find_metric(align.metric, align.mode)
    if align.metric not in similarities:
        return
    try:
        check_metric(partial(metric, **_options(align)), align.batch_size)
    except UserError as error:
        raise UserError(f"--align.batch-size {align.batch_size}: {error}; raise it, or choose another metric") from error


def _options(align: RegularizeConfig) -> dict[str, Any]:
    """Arguments of a similarity that not all of them have."""
    takes = inspect.signature(get_similarity(align.metric)).parameters
    return {"on_degenerate": align.on_degenerate} if "on_degenerate" in takes else {}
