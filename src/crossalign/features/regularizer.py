"""Cross-modal alignment regularisation (CMAR) as one object that no trainer knows and every trainer can call.

    regularizer = AlignmentRegularizer("cka-rbf", pairs=pairs, weight=10.0, every=20)
    for step, batch in enumerate(batches):
        loss = model(**batch).loss
        if regularizer.due(step):
            loss = loss + regularizer.loss(model)
        loss.backward()

The term belongs to the whole step: with accumulation it is added to the last micro-batch alone, after that one's loss was
divided; under DDP it may also have a backward pass of its own, before the others and inside ``no_sync``.

Shapes: B pairs, p student features, q teacher features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from crossalign.alignment import gather_features, penalties, similarities
from crossalign.alignment.health import participation_ratio
from crossalign.core.errors import UserError, unknown
from crossalign.data.pairs.batches import MODES, Mode, PairBatches
from crossalign.models.taps import Layer, Pool, Taps

Metric = Callable[[Tensor, Tensor], Tensor]


WEIGHT_PENALTIES = ("l1-weights", "l2-weights")
"""L1 and L2 of what trains of the model, instead of its features: CMAR §4.4.4 does not say which it compares with."""


class AlignmentRegularizer:
    """``loss(model)`` = weight · (1 - A(teacher, student)), CMAR Eqs. 4 and 5, on the steps that are due.

    The teacher is frozen: Fig. 2 shows it so, although Eq. 5 minimises over it. The term is counted once a step, whatever
    the accumulation, the number of processes, the number of pairs and the interval.

    Args:
        metric: a registered similarity or penalty by name, or a function of (student (B, p), teacher (B, q)). A penalty
            looks at the student's features alone, or, as l1-weights and l2-weights, at its weights; λ multiplies it as it is.
        layers: what is tapped in the student; see ``models.taps.Taps``.
        weight: λ; 0 turns everything off.
        every: interval in steps; step 0 is due.
        pairs: texts with the teacher's features.
        mode: "paired", "unpaired" or "mean" (CMAR §4.4.2).
        pool: how the tokens of a text become one vector: "mean" or "last".
        queue: rows of earlier batches, without gradient, that the score also sees: for small batches. Those whose pair is
            in the batch again, as after an epoch's end, are left out.
        options: further arguments of the metric, such as ``on_degenerate="warn"``.

    Raises:
        UserError: no such metric or mode, a metric without gradient, one that says nothing for the mean, or a weight, an
            interval or a queue out of its range.
    """

    def __init__(
        self,
        metric: str | Metric = "cka-rbf",
        layers: Layer | Sequence[Layer] = "penultimate",
        weight: float = 10.0,
        every: int = 20,
        *,
        pairs: PairBatches,
        mode: Mode = "paired",
        pool: Pool = "mean",
        queue: int = 0,
        **options: Any,
    ) -> None:
        if not isinstance(every, int) or every < 1:
            raise UserError(f"the interval of the regulariser is {every} steps; it must be at least 1, a whole number")
        if not isinstance(weight, int | float) or not (weight >= 0 and math.isfinite(weight)):
            raise UserError(f"the weight of the regulariser is {weight}; it must be a number from 0 up, 0 turns the term off")
        if not isinstance(queue, int) or queue < 0:
            raise UserError(f"the queue of the regulariser is {queue} rows; it must be a whole number, 0 for none")
        if mode not in MODES:
            raise unknown("set-up of pairs", mode, MODES)
        self.of_weights = metric in WEIGHT_PENALTIES
        self.penalty = self.of_weights or (isinstance(metric, str) and metric in penalties)
        function = find_metric(metric, mode)
        self.comparable = _flag(function, "comparable_across_batch_sizes")
        """Whether the score's expectation is the same for every number of pairs."""
        self.metric: Callable[..., Any] = partial(function, **options) if options else function
        self.name = name_of(metric)
        self.taps = Taps(layers, pool)
        self.weight, self.every, self.pairs, self.mode = weight, every, pairs, mode
        self.queue = 0 if self.penalty else queue  # rows without gradient would only water a penalty down
        if self.queue + pairs.batch_size > len(pairs.tokens):
            raise UserError(
                f"a queue of {queue} beside a batch of {pairs.batch_size} holds some of the {len(pairs.tokens)} pairs twice: "
                "lower one of them"
            )
        self._last: tuple[Tensor, Tensor, Tensor] | None = None  # student, teacher, and which pairs, on the host
        self._step = 0
        self.numbers: dict[str, Tensor] = {}
        """What the last call found, as tensors: the score, the null score of the same batch, its pairs exchanged, how many
        directions the student's features fill (a score that rises with them is being gamed), and ``comparable``."""

    def due(self, step: int) -> bool:
        """Whether ``step``, counted from 0, has the term. Call it on every step: it also says which pairs are next."""
        self._step = step
        return self.weight != 0 and step % self.every == 0

    def loss(self, model: nn.Module) -> Tensor:
        """The term, a scalar with gradient in the model's parameters; each process gives its share, as DDP averages them."""
        if self.of_weights:
            return self.weight * self._of_weights(model)
        number = self._step // self.every
        student, teacher, rows = self._with_queue(*self._features(model, number), number)
        value = self._value(student, teacher)
        if self.queue > 0:
            self._last = (student.detach()[: self.queue], teacher[: self.queue], rows[: self.queue])
        return self.weight * (value if self.penalty else 1 - value)

    def try_out(self, model: nn.Module) -> Tensor:
        """The value with its gradient's graph, by this process alone; nothing moves on. To find out early what cannot work."""
        if self.of_weights:
            return self._of_weights(model)
        return self._value(*self._features(model, self._step // self.every, alone=True))

    @torch.no_grad()
    def score(self, model: nn.Module) -> Tensor:
        """The score without gradient; nothing moves on and no random number is drawn. For logs between the steps that are due.

        Between two due steps it is that of the pairs of the next one: those of the last one the model was just pulled at.
        """
        if self.of_weights:
            return self._of_weights(model)
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        number = -(-self._step // self.every)
        with torch.random.fork_rng(devices=devices):
            features = self._features(model, number)
        return self._value(*self._with_queue(*features, number)[:2])

    def state_dict(self) -> dict[str, Any]:
        """The queue, and which pairs it came from. Which pairs are next follows from the step."""
        return {"pairs": self.pairs.fingerprint, "queue": list(self._last) if self._last else []}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put :meth:`state_dict` back.

        Raises:
            UserError: it was saved with other texts or other features.
        """
        if state["pairs"] != self.pairs.fingerprint:
            raise UserError(
                "the run was saved with other pairs or other teacher features than are given now: put those back, or start anew"
            )
        if len(state["queue"]) == 2:
            raise UserError("the run was saved before a queue told which pairs it holds: start anew")
        self._last = (*state["queue"][:2], state["queue"][2].cpu()) if state["queue"] else None

    def _features(self, model: nn.Module, number: int, alone: bool = False) -> tuple[Tensor, Tensor]:
        """Student features (B, p) with gradient and teacher features (B, q) of a batch of pairs, over all processes."""
        rank, world = (0, 1) if alone else rank_and_world()
        batch = self.pairs.batch(number, mode=self.mode, rank=rank, world=world)
        device = next(model.parameters()).device
        ids, mask = (t.to(device, non_blocking=True) for t in (batch.input_ids, batch.attention_mask))
        student = self.taps(model, ids, mask)
        teacher = batch.features.detach().to(device, student.dtype, non_blocking=True)
        return (student, teacher) if alone else (gather_features(student), gather_features(teacher))

    def _with_queue(self, student: Tensor, teacher: Tensor, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """The batch's rows, then the queue's of other pairs; and which pairs these are."""
        rows = self.pairs.rows(number)
        if self._last is None:
            return student, teacher, rows
        # Indices and no mask, and found on the host: so that nothing waits for a device.
        others = (~torch.isin(self._last[2], rows)).nonzero().flatten()
        drawn = others.to(student.device, non_blocking=True)
        old_student, old_teacher = (tensor.to(student.device)[drawn] for tensor in self._last[:2])
        return torch.cat([student, old_student]), torch.cat([teacher, old_teacher]), torch.cat([rows, self._last[2][others]])

    def _of_weights(self, model: nn.Module) -> Tensor:
        value: Tensor = self.metric([p for p in model.parameters() if p.requires_grad])
        self.numbers = {"score": value.detach()}
        return value

    def _value(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The metric, noted with what it gives for the same rows with their pairs exchanged."""
        value: Tensor = self.metric(student) if self.penalty else self.metric(student, teacher)
        if not isinstance(value, Tensor) or value.shape != ():
            given = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise UserError(f"{self.name} gives {given}; a score is a tensor with one number, of shape ()")
        if student.requires_grad and torch.is_grad_enabled() and not value.requires_grad:
            raise UserError(
                f"{self.name} gives a score without gradient and cannot be a loss: compute it by differentiable steps"
            )
        self.numbers = {"score": value.detach()}
        self.numbers["comparable"] = torch.tensor(float(self.comparable))
        with torch.no_grad():
            self.numbers["directions"] = participation_ratio(student.detach())
            if not self.penalty:
                self.numbers["null_score"] = self.metric(student.detach(), teacher.roll(1, 0))
        return value


def find_metric(metric: str | Metric, mode: Mode) -> Any:
    """The function, checked to be of use as a loss in this set-up; what it says of itself counts however it is given."""
    function, name = _named(metric), name_of(metric)
    if not _flag(function, "differentiable", True):
        raise UserError(f"{name} has no gradient and cannot be a loss; soft-mutual-knn is its differentiable form")
    for flag, fault in (
        ("centred", "centres its features, so that it is 0 / 0"),
        ("ranks_rows", "asks which rows are nearest, which says nothing"),
    ):
        if mode == "mean" and _flag(function, flag):
            raise UserError(
                f"{name} {fault} where all texts have the mean of the images; use kernel-alignment, which does neither (the "
                "paper does not state the form that it used)"
            )
    return function


def _named(metric: str | Metric) -> Any:
    if not isinstance(metric, str):
        return metric
    if metric in WEIGHT_PENALTIES:
        return penalties[metric.removesuffix("-weights")]
    if metric in penalties:
        return penalties[metric]
    if metric not in similarities:
        raise unknown("metric", metric, [*similarities, *penalties, *WEIGHT_PENALTIES])
    return similarities[metric]


def name_of(metric: str | Metric) -> str:
    """What messages call it."""
    while isinstance(metric, partial):
        metric = metric.func
    return metric if isinstance(metric, str) else getattr(metric, "__name__", type(metric).__name__)


def _flag(function: Any, flag: str, default: bool = False) -> bool:
    """What ``register_similarity`` noted on a function, or on the one that it is a partial call of."""
    while isinstance(function, partial) and not hasattr(function, flag):
        function = function.func
    return bool(getattr(function, flag, default))


def rank_and_world() -> tuple[int, int]:
    """Rank and number of processes."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1
