"""The one training loop: every verb hands it stages, and it steps through them, logs, saves and resumes.

A stage's loss is a sum over examples; the loop divides by the number of examples of the whole step, over all processes and
micro-batches, so accumulation and world size change nothing, and the last partial batch counts for what it holds.
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from crossalign.config import BaseLoopConfig, OptimConfig
from crossalign.config.common import Watched
from crossalign.core.files import naming_full_disk
from crossalign.core.progress import announce, paused, progress, say
from crossalign.data.batches import Step
from crossalign.models.loading import write_tensors
from crossalign.runs.names import RunFolder
from crossalign.training import checkpoint as ckpt
from crossalign.training.meters import Meter, shown
from crossalign.training.optim import average, build_optimizer, gradients_of, lr_factor
from crossalign.training.sharding import load_optimizer_state, optimizer_state, reshard, shard, whole
from crossalign.training.stops import DiskFull, Diverged, Interrupted, Paused, StageResult, catch_signals
from crossalign.training.tracking import RunLog

Batch = Mapping[str, Any]
LARGEST_RATIO = 0.95
"""Of the term's gradient to that of the whole step; above it clipping leaves the term alone."""


@dataclass
class Stage:
    """One stage of a run, as the loop sees it."""

    name: str
    model: nn.Module
    """What trains; ``state`` and ``load`` say which of its tensors a checkpoint holds."""
    loss: Callable[[nn.Module, Batch], tuple[Tensor, dict[str, Tensor]]]
    """(model, micro-batch) → sum of the losses, and further sums over examples to report as means."""
    steps: Callable[[int, int], Iterable[Step]]
    """(epoch, first step) → the steps of that epoch from there on."""
    steps_per_epoch: int
    epochs: int
    optim: OptimConfig
    state: Callable[[], dict[str, Tensor]]
    load: Callable[[dict[str, Tensor]], None]
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None
    """Called at the end of every epoch, in eval mode, on all processes; its numbers become the validation row."""
    select: Watched | None = None
    """The validation number whose best value picks the weights to keep; None keeps the last."""
    extra: Callable[[nn.Module, int], tuple[Tensor, dict[str, Tensor]] | None] | None = None
    """(model, step of the stage) → a term of the whole step's loss with numbers to log, or None where none is due.

    Its gradient is added once, whatever the accumulation and the number of processes; each process gives its own share, as
    for DDP, which averages them."""
    unit: str = "images"
    """What examples are, in words."""
    keep: Callable[[int], None] = lambda done: None
    """Called with the number of steps done, before the first and after each, on all processes."""
    replicated: bool = False
    """Every process computes the whole step (batch-coupled losses of small modules): no sharding, no reduction."""


@dataclass
class Session:
    """What all stages of a run share."""

    folder: Path
    accelerator: Any
    loop: BaseLoopConfig
    log: RunLog
    identity: str
    """Hash of the data and the weights that the run began with; a checkpoint of others is not resumed."""
    resume: ckpt.Checkpoint | None = None
    quiet: bool = False
    """Print no line an epoch."""
    until: int | None = None
    """Pause the stage "train" when this many of its epochs are done; None trains it to its end, 0 trains no stage at all."""

    @property
    def sharded(self) -> bool:
        """Whether the model is in shares over the processes."""
        return bool(getattr(self.loop, "shard", False))

    @property
    def world(self) -> int:
        """Number of processes."""
        return int(self.accelerator.num_processes)


def fit(stage: Stage, run: Session) -> StageResult:
    """Train ``stage`` to its end, from the run's checkpoint if that one is of this stage.

    Raises:
        Interrupted: a signal came; the run is saved. Paused: ``run.until`` is reached.
        Diverged: the loss is not finite; says where it began, and the last checkpoint is from before. Or ``stage.extra`` has
            no value for what the model has become: the run is saved.
        DiskFull: no room for a checkpoint.
    """
    return _Fit(stage, run).run_all()


class _Fit:
    """The loop's working state; one object, so that saving and restoring are each one place."""

    def __init__(self, stage: Stage, run: Session) -> None:
        self.stage, self.run, self.loop = stage, run, run.loop
        if run.sharded:
            shard(stage.model.to(run.accelerator.device), run.accelerator.device)
        self.optimizer = build_optimizer(stage.model, stage.optim)
        self.parameters = [p for p in stage.model.parameters() if p.requires_grad]
        self.epoch, self.step, self.since = 0, 0, 0.0
        self.result = StageResult(best_epoch=-1, best={}, seconds=0.0, examples=0)
        self.best_state: dict[str, Tensor] | None = None
        shared = run.world > 1 and not stage.replicated
        self.epoch_meter, self.interval_meter = Meter(run.accelerator, shared), Meter(run.accelerator, shared)
        self.extra_rows: list[tuple[int, dict[str, Tensor]]] = []
        self.warned = False
        self.epoch_began = (0, 0.0)  # examples and seconds then
        self.bar = progress(0, "")
        if run.resume is not None and run.resume.stage == stage.name:
            with ckpt.reading(run.resume.path):
                self._restore(run.resume)
        accelerator = run.accelerator
        if stage.replicated:
            self.model = stage.model
        else:
            model = torch.compile(stage.model) if self.loop.compile else stage.model
            self.model = accelerator.prepare_model(model, evaluation_mode=run.sharded)  # sharded: autocast, no DDP
            self.optimizer = accelerator.prepare(self.optimizer)

    def run_all(self) -> StageResult:
        stage, total = self.stage, self.stage.steps_per_epoch * self.stage.epochs
        until = self.run.until if stage.name == "train" or self.run.until == 0 else None
        done = self.epoch * stage.steps_per_epoch + self.step
        self.saved_at, self.since = time.monotonic(), time.perf_counter()
        if not done:
            stage.keep(0)
        with catch_signals() as stopped, progress(total, stage.name, initial=done) as self.bar:
            while self.epoch < (stage.epochs if until is None else min(until, stage.epochs)):
                self.epoch_began = (self.result.examples, self.result.seconds)
                stage.model.train()
                for step in stage.steps(self.epoch, self.step):
                    self.since = time.perf_counter()
                    self._train_step(step, total)
                    self._count_time()
                    stage.keep(self.epoch * stage.steps_per_epoch + self.step)
                    self.bar.update(1)
                    if self._in_any_process(stopped.is_set()):
                        self._save()
                        self.run.log.status = "KILLED"
                        raise Interrupted(f"stopped by a signal and saved at step {self.step} of epoch {self.epoch + 1}")
                    late = time.monotonic() - self.saved_at > 60 * self.loop.checkpoint_minutes
                    if self.step < stage.steps_per_epoch and self._in_any_process(late):
                        self._save()
                with paused(self.bar):
                    self._end_epoch()
                    self._save()
        if until is not None:
            self.run.log.status = "SCHEDULED"
            raise Paused(self.result)
        self._finish()
        return self.result

    def _train_step(self, step: Step, total: int) -> None:
        accelerator, stage = self.run.accelerator, self.stage
        position = self.epoch * stage.steps_per_epoch + self.step
        for group in self.optimizer.param_groups:
            group["lr"] = stage.optim.lr * lr_factor(stage.optim, position, total)
        self.optimizer.zero_grad(set_to_none=True)
        extra = self._add_extra(position) if stage.extra is not None else {}
        scale = (1 if stage.replicated else self.run.world) / step.count  # DDP averages gradients over processes
        for i, batch in enumerate(step.micro_batches):
            last = i == len(step.micro_batches) - 1
            with nullcontext() if last or stage.replicated else accelerator.no_sync(self.model):
                loss_sum, sums = stage.loss(self.model, batch)
                if stage.replicated:
                    (loss_sum * scale).backward()
                else:
                    accelerator.backward(loss_sum * scale)
            self._count(loss=loss_sum.detach(), **sums)
        if stage.optim.clip > 0 or "extra_grad_norm" in extra:
            norm = self._clip() if stage.optim.clip > 0 else self._norm(gradients_of(stage.model))
            self.interval_meter.add(grad_norm=norm.detach(), steps=torch.ones_like(norm))
            if "extra_grad_norm" in extra:
                extra["extra_grad_ratio"] = extra["extra_grad_norm"] / norm.detach()  # of the whole step's
        self.optimizer.step()
        self._count(examples=torch.tensor(float(step.count) / (1 if stage.replicated else self.run.world)))
        self.step += 1
        self.result.examples += step.count
        if self.step % self.loop.log_every == 0:
            self._flush_interval()

    def _add_extra(self, position: int) -> dict[str, Tensor]:
        """The gradient of ``stage.extra``, by a backward pass of its own before the others: its graph is gone by then.

        A synchronised pass of its own would break DDP, and one after the synchronised pass would be left out of the mean.
        Returns the numbers to log, which may be added to.
        """
        assert self.stage.extra is not None
        try:
            with self.run.accelerator.autocast():  # a compiled model is called inside its wrapper, which alone would know
                extra = self.stage.extra(self.model, position)
        except (ValueError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
            self._save()  # all processes are here: they see the same features
            raise Diverged(
                f"the alignment term cannot be computed at step {position + 1} of stage '{self.stage.name}' ({error}); the run "
                "is saved as it was before that step: choose another metric or more pairs, in another --output"
            ) from error
        if extra is None:
            return {}
        value, logged = extra
        numbers = {name: number.detach() for name, number in logged.items()}
        if value.requires_grad:
            with self.run.accelerator.no_sync(self.model):
                self.run.accelerator.backward(value)
            gradients = gradients_of(self.stage.model)
            if self.run.world > 1 and not self.run.sharded:  # they are of this process alone
                gradients = [average(gradient.clone()) for gradient in gradients]
            numbers["extra_grad_norm"] = self._norm(gradients)
        self.extra_rows.append((position, numbers))
        return numbers

    def _norm(self, gradients: list[Tensor]) -> Tensor:
        """Norm of gradients, in the loss's own scale."""
        norm = whole(torch.nn.utils.get_total_norm(gradients))
        scaler = self.run.accelerator.scaler
        return norm / scaler.scale(torch.ones_like(norm)) if scaler is not None else norm  # its number would be waited for

    def _clip(self) -> Tensor:
        parameters = self.parameters
        if self.stage.replicated:
            return torch.nn.utils.clip_grad_norm_(parameters, self.stage.optim.clip)
        return whole(self.run.accelerator.clip_grad_norm_(parameters, self.stage.optim.clip))

    def _count(self, **sums: Tensor) -> None:
        self.epoch_meter.add(**sums)
        self.interval_meter.add(**sums)

    def _count_time(self) -> None:
        now = time.perf_counter()
        self.result.seconds += now - self.since
        self.since = now

    def _flush_interval(self) -> None:
        means = self.interval_meter.means()
        self._count_time()  # of all steps that examples are counted of: the device has done them now
        for position, tensors in self.extra_rows:
            numbers = {name: float(tensor) for name, tensor in tensors.items()}
            self._log("extra", numbers, step=position + 1)
            self._warn_of_ratio(numbers.get("extra_grad_ratio", 0.0), position + 1)
        self.extra_rows = []
        if not means:
            return
        self.interval_meter.sums = {}
        self._check_finite(means)
        self.bar.set_postfix_str(shown(means), refresh=False)
        speed = self.result.examples / max(self.result.seconds, 1e-9)
        self._log("train_step", means | {"lr": self.optimizer.param_groups[0]["lr"], "examples_per_second": speed})

    def _warn_of_ratio(self, ratio: float, step: int) -> None:
        if ratio > LARGEST_RATIO and self.stage.optim.clip > 0 and not self.warned:
            self.warned = True
            announce(
                f"at step {step} the alignment term makes {ratio:.0%} of the gradient (extra_grad_ratio), and clipping at "
                f"{self.stage.optim.clip:g} leaves hardly any of the text's: a step of alignment alone; lower --align.weight "
                "or --optim.clip 0 (docs/regularize.md)"
            )

    def _end_epoch(self) -> None:
        stage, result = self.stage, self.result
        self._flush_interval()
        means, numbers = self.epoch_meter.means(), dict[str, float]()
        self._log("train", means)
        self.epoch_meter.sums = {}
        self.epoch, self.step = self.epoch + 1, 0
        if stage.evaluate is not None:
            stage.model.eval()
            numbers = stage.evaluate(self.model)
            self._log("validation", numbers)
            result.history.append(numbers)
            if stage.select is None or not result.best or stage.select.better(numbers, result.best):
                result.best_epoch, result.best = self.epoch, numbers
                if stage.select is not None:
                    self._keep_best()
        if not self.run.quiet:
            say(self._epoch_line(means, numbers))
        self.run.log.flush()

    def _epoch_line(self, means: dict[str, float], numbers: dict[str, float]) -> str:
        stage, result = self.stage, self.result
        where = f"epoch {self.epoch} of {stage.epochs}"
        if stage.unit == "tokens":  # whose epochs are the intervals between evaluations
            where = f"step {self.epoch * stage.steps_per_epoch:,} of {stage.epochs * stage.steps_per_epoch:,}"
        examples, seconds = result.examples - self.epoch_began[0], result.seconds - self.epoch_began[1]
        speed = f"{examples / max(seconds, 1e-9):,.0f} {stage.unit}/s"
        return f"{stage.name}, {where}: {'; '.join(filter(None, (shown(means), shown(numbers, 'validation '), speed)))}"

    def _keep_best(self) -> None:
        self.best_state = {name: tensor.detach().cpu().clone() for name, tensor in self.stage.state().items()}
        if self.run.accelerator.is_main_process:
            file = ckpt.best_file(RunFolder(self.run.folder).checkpoints, self.stage.name, self.epoch)
            with naming_full_disk(DiskFull(f"no room left to write {file}")):
                write_tensors(file, self.best_state)

    def _log(self, split: str, numbers: dict[str, float], step: int | None = None) -> None:
        epoch = self.epoch + (split != "validation")
        step = self.epoch * self.stage.steps_per_epoch + self.step if step is None else step
        where = {"stage": self.stage.name, "split": split, "epoch": epoch, "step": step}
        self.run.log.log(where | {"seconds": round(self.result.seconds, 3)} | numbers)

    def _check_finite(self, means: dict[str, float]) -> None:
        # In fp16 a step whose gradient overflows is skipped, and the scale lowered: that is no divergence.
        expected = "grad_norm" if self.run.accelerator.scaler is not None else ""
        bad = [name for name, mean in means.items() if name != expected and not math.isfinite(mean)]
        if not bad:
            return
        weights = [n for n, p in self.stage.model.named_parameters() if p.requires_grad and not p.isfinite().all()]
        where = f"; the weights {', '.join(weights[:3])} are not finite" if weights else "; all weights are still finite"
        raise Diverged(
            f"{' and '.join(bad)} of stage '{self.stage.name}' stopped being a number within the {self.loop.log_every} steps "
            f"before step {self.step} of epoch {self.epoch + 1}{where}. Lower the learning rate ({self.stage.optim.lr:g}), "
            "turn clipping on, or use --loop.precision fp32; the last checkpoint is from before"
        )

    def _in_any_process(self, here: bool) -> bool:
        """Whether it is so ``here`` or in another process; they compare notes at logging steps and at the end of an epoch."""
        if self.run.world == 1:
            return here
        if self.step % self.loop.log_every and self.step != self.stage.steps_per_epoch:
            return False
        flag = torch.tensor(float(here), device=self.run.accelerator.device)
        return bool(self.run.accelerator.reduce(flag, "sum") > 0)

    def _save(self) -> None:
        self._check_finite(self.interval_meter.means())
        extra = vars(self.result) | {
            "extra_rows": [(step, {n: t.cpu() for n, t in row.items()}) for step, row in self.extra_rows],
            "epoch_sums": self.epoch_meter.state(),
            "interval_sums": self.interval_meter.state(),
            "rows": self.run.log.rows,
            "identity": self.run.identity,
            "scaler": self.run.accelerator.scaler.state_dict() if self.run.accelerator.scaler is not None else {},
        }
        if sharded := self.run.sharded:
            reshard(self.stage.model)
        state = {name: tensor.detach() for name, tensor in self.stage.state().items()}
        optimizer = optimizer_state(self.stage.model, self.optimizer) if sharded else self.optimizer.state_dict()
        now = ckpt.Checkpoint(self.stage.name, self.epoch, self.step, state, optimizer, ckpt.rng_state(), extra)
        ckpt.save(RunFolder(self.run.folder).checkpoints, now, rank=self.run.accelerator.process_index)
        self.run.log.flush()
        self.run.accelerator.wait_for_everyone()
        self.saved_at = time.monotonic()

    def _restore(self, saved: ckpt.Checkpoint) -> None:
        self.stage.load(saved.model)
        if self.run.sharded:
            load_optimizer_state(self.stage.model, self.optimizer, saved.optimizer)
        else:
            self.optimizer.load_state_dict(saved.optimizer)
        self.epoch, self.step = saved.epoch, saved.step
        extra = saved.extra
        self.result = StageResult(**{name: extra[name] for name in vars(self.result)})
        self.epoch_meter.load(extra["epoch_sums"])
        self.interval_meter.load(extra["interval_sums"])
        self.extra_rows = extra.get("extra_rows", [])
        if extra["scaler"] and self.run.accelerator.scaler is not None:
            self.run.accelerator.scaler.load_state_dict(extra["scaler"])
        if self.stage.select is not None and self.result.best_epoch > 0:
            self.best_state = ckpt.read_best(saved)
        ckpt.set_rng_state(saved.rng)

    def _finish(self) -> None:
        if not self.stage.replicated:
            self.run.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        if self.stage.select is not None and self.result.best_epoch > 0:
            assert self.best_state is not None
            self.stage.load(self.best_state)
        self.stage.model.eval()
