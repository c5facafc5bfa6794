"""Cross-modal alignment regularisation (CMAR) as one object that no trainer knows and every trainer can call.

    regularizer = AlignmentRegularizer("cka-rbf", pairs=pairs, weight=10.0, every=20)
    for step, batch in enumerate(batches):
        loss = model(**batch).loss
        if regularizer.due(step):
            loss = loss + regularizer.loss(model)
        loss.backward()

Where the loop knows itself when the term is due, it may call ``loss`` alone: each call then takes the next pairs. A counter
that starts anew, as one of steps within an epoch does, takes the next pairs too, not the first ones again.

The term belongs to the whole step: with accumulation it is added to the last micro-batch alone, after that one's loss was
divided; under DDP it may also have a backward pass of its own, before the others and inside ``no_sync``.

Shapes: B pairs, p student features, q teacher features.
"""

import math
import re
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from crossalign.alignment import gather_features, penalties, similarities
from crossalign.alignment.health import participation_ratio
from crossalign.core.errors import BadArgument, UserError, unknown
from crossalign.data.pairs.batches import MODES, Mode, PairBatches
from crossalign.models.language.families import FAMILIES, longest_input
from crossalign.models.taps import Layer, Pool, Taps, unwrapped

Metric = Callable[[Tensor, Tensor], Tensor]
NAME = "align"
"""What the numbers of a trainer's callback begin with, unless it is given another name."""

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
        BadArgument: no such metric or mode, a metric without gradient, one that says nothing for the mean or is not defined
            for so many pairs, an option that it does not take, or a weight, an interval or a queue out of its range.
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
        if not isinstance(pairs, PairBatches):
            raise BadArgument(f"pairs must be PairBatches, made of texts and features; got a {type(pairs).__name__}")
        if not isinstance(every, int) or every < 1:
            raise BadArgument(f"the interval of the regulariser is {every} steps; it must be at least 1, a whole number")
        if not isinstance(weight, int | float) or not (weight >= 0 and math.isfinite(weight)):
            raise BadArgument(f"the weight of the regulariser is {weight}; it must be a number from 0 up, 0 turns the term off")
        if not isinstance(queue, int) or queue < 0:
            raise BadArgument(f"the queue of the regulariser is {queue} rows; it must be a whole number, 0 for none")
        if mode not in MODES:
            raise unknown("set-up of pairs", mode, MODES)
        self.of_weights = isinstance(metric, str) and metric in WEIGHT_PENALTIES
        self.penalty = self.of_weights or (isinstance(metric, str) and metric in penalties)
        function = find_metric(metric, mode)
        self.comparable = _flag(function, "comparable_across_batch_sizes")
        """Whether the score's expectation is the same for every number of pairs."""
        self.metric: Callable[..., Any] = partial(function, **options) if options else function
        if isinstance(metric, str) and metric in similarities:
            check_metric(self.metric, pairs.batch_size)
        self.name = name_of(metric)
        self.taps = Taps(layers, pool)
        self.weight, self.every, self.pairs, self.mode = weight, every, pairs, mode
        self.queue = 0 if self.penalty else queue  # rows without gradient would only water a penalty down
        if self.queue + pairs.batch_size > len(pairs.tokens):
            raise BadArgument(
                f"a queue of {queue} beside a batch of {pairs.batch_size} holds some of the {len(pairs.tokens)} pairs twice: "
                "lower one of them"
            )
        self._last: tuple[Tensor, Tensor, Tensor] | None = None  # student, teacher, and which pairs, on the host
        self._step: int | None = None
        self._before = 0  # batches of counters that have ended
        self._fits = 0  # id of the model that is known to take the texts
        self.numbers: dict[str, Tensor] = {}
        """What the last call found, as tensors: the score, the null score of the same batch, its pairs exchanged, how many
        directions the student's features fill (a score that rises with them is being gamed), and ``comparable``."""

    def due(self, step: int) -> bool:
        """Whether ``step``, counted from 0, has the term. Call it on every step: it also says which pairs are next.

        A step before the last one begins a new count.
        """
        if self._step is not None and step < self._step:
            self._before += self._step // self.every + 1
        self._step = step
        return self.weight != 0 and step % self.every == 0

    def _number(self, ahead: bool = False) -> int:
        """Which batch of pairs is due, or comes next."""
        step = self._step or 0
        return self._before + (-(-step // self.every) if ahead else step // self.every)

    def loss(self, model: nn.Module) -> Tensor:
        """The term, a scalar with gradient in the model's parameters; each process gives its share, as DDP averages them."""
        if self.of_weights:
            return self.weight * self._of_weights(model)
        number = self._number()
        if self._step is None:
            self._before += 1
        student, teacher, rows = self._with_queue(*self._features(model, number), number)
        value = self._value(student, teacher)
        if self.queue > 0:
            self._last = (student.detach()[: self.queue], teacher[: self.queue], rows[: self.queue])
        return self.weight * (value if self.penalty else 1 - value)

    def try_out(self, model: nn.Module) -> Tensor:
        """The value with its gradient's graph, by this process alone; nothing moves on. To find out early what cannot work.

        The metric is computed on the CPU, where it refuses what elsewhere it cannot see without waiting.
        """
        if self.of_weights:
            return self._of_weights(model)
        return self._value(*(side.cpu() for side in self._features(model, self._number(), alone=True)))

    @torch.no_grad()
    def score(self, model: nn.Module) -> Tensor:
        """The score without gradient; nothing moves on and no random number is drawn. For logs between the steps that are due.

        Between two due steps it is that of the pairs of the next one: those of the last one the model was just pulled at.
        """
        if self.of_weights:
            return self._of_weights(model)
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        number = self._number(ahead=True)
        with torch.random.fork_rng(devices=devices):
            features = self._features(model, number)
        return self._value(*self._with_queue(*features, number)[:2])

    def state_dict(self) -> dict[str, Any]:
        """The queue, which pairs it came from, and how far counters of steps had come."""
        counted = [self._before, -1 if self._step is None else self._step]
        return {"pairs": self.pairs.fingerprint, "queue": list(self._last) if self._last else [], "counted": counted}

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
        self._before, step = state.get("counted", (0, -1))
        self._step = None if step < 0 else step

    def _features(self, model: nn.Module, number: int, alone: bool = False) -> tuple[Tensor, Tensor]:
        """Student features (B, p) with gradient and teacher features (B, q) of a batch of pairs, over all processes."""
        rank, world = (0, 1) if alone else rank_and_world()
        if self._fits != id(model):
            check_extent(model, *self.pairs.extent)
            self._fits = id(model)
        batch = self.pairs.batch(number, mode=self.mode, rank=rank, world=world)
        device = next(model.parameters()).device
        ids, mask = (t.to(device, non_blocking=True) for t in (batch.input_ids, batch.attention_mask))
        student = self.taps(model, ids, mask)
        teacher = batch.features.detach().to(device, student.dtype, non_blocking=True)
        shares = [self.pairs.share(rank, world) for rank in range(world)]
        rows = [share.stop - share.start for share in shares]  # so that no process asks another one
        return (student, teacher) if alone else (gather_features(student, rows), gather_features(teacher, rows))

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


def check_metric(metric: Metric, pairs: int) -> None:
    """Call a similarity once on noise, so that options that it does not take and too few pairs are told at once.

    One that is undefined for features of one column is undefined for so many pairs of any width.

    Raises:
        BadArgument: what it says.
    """
    noise = torch.randn(2, pairs, 1, generator=torch.Generator().manual_seed(0))
    try:
        with warnings.catch_warnings(action="ignore"), torch.no_grad():
            metric(*noise)
    except (ValueError, TypeError) as error:
        raise BadArgument(str(error)) from error
    except RuntimeError:  # one of a user's own may want other widths
        return


def check_extent(model: nn.Module, largest: int, longest: int) -> None:
    """Hold tokens against what a language model can take.

    Raises:
        BadArgument: a token id without a row in its table, or texts longer than its table of positions.
    """
    model = unwrapped(model)
    rows = None
    with suppress(AttributeError, NotImplementedError):  # a model of another library
        rows = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    if rows is not None and largest >= rows:
        raise BadArgument(
            f"the texts have the token {largest}, but the model's table has {rows} rows: give PairBatches the model's own "
            "tokenizer, or resize the table (resize_token_embeddings)"
        )
    family = FAMILIES.get(getattr(getattr(model, "config", None), "model_type", ""))
    places = longest_input(model, family) if family is not None and family.positions == "learned" else None
    if places is not None and longest > places:
        raise BadArgument(f"a text has {longest} tokens, but the model takes {places}: give PairBatches max_length={places}")


def check_name(name: str) -> None:
    """Raise BadArgument unless a name can stand in keys of a log and in the name of a file."""
    if not isinstance(name, str) or not re.fullmatch(r"[\w-]+", name):
        raise BadArgument(f"name must be of letters, digits, _ and -; got {name!r}")


def find_metric(metric: str | Metric, mode: Mode) -> Any:
    """The function, checked to be of use as a loss in this set-up; what it says of itself counts however it is given."""
    function, name = _named(metric), name_of(metric)
    if not _flag(function, "differentiable", True):
        raise BadArgument(f"{name} has no gradient and cannot be a loss; soft-mutual-knn is its differentiable form")
    for flag, fault in (
        ("centred", "centres its features, so that it is 0 / 0"),
        ("ranks_rows", "asks which rows are nearest, which says nothing"),
    ):
        if mode == "mean" and _flag(function, flag):
            raise BadArgument(
                f"{name} {fault} where all texts have the mean of the images; use kernel-alignment, which does neither (the "
                "paper does not state the form that it used)"
            )
    return function


def _named(metric: str | Metric) -> Any:
    if callable(metric):
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
