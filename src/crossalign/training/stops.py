"""How a stage of training ends: what it leaves behind, or what stopped it. Nothing heavy is imported here."""

from __future__ import annotations

from dataclasses import dataclass, field

from crossalign.core.errors import UserError


@dataclass
class StageResult:
    """What a stage leaves behind."""

    best_epoch: int
    best: dict[str, float]
    """Validation numbers of that epoch."""
    seconds: float
    """Time in training steps, without evaluation and checkpoints."""
    examples: int
    """Examples trained on in that time by this call."""
    history: list[dict[str, float]] = field(default_factory=list)


class Interrupted(RuntimeError):
    """Ctrl-C or SIGTERM: the run was saved and can be resumed."""


class Diverged(RuntimeError):
    """The loss or a weight is no longer a number, or a term of the loss cannot be computed any more."""


class DiskFull(RuntimeError):
    """The disk filled up while a checkpoint was written; the one before it is whole."""


class NoRoom(UserError):
    """Too little room on the disk for the checkpoints of a run that is about to begin."""


class Paused(RuntimeError):
    """The stage has reached the epoch that it was to be trained to; the run is saved and goes on when it is called again."""

    def __init__(self, result: StageResult) -> None:
        super().__init__(f"paused after epoch {len(result.history)}")
        self.result = result
