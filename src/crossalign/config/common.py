"""Settings that every training verb has, and what turns settings into plain values and back."""

import contextlib
import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from crossalign.config.bounds import Amount, Count, Probability, Share, Size
from crossalign.core.errors import UserError, unknown
from crossalign.core.reading import without_login

T = TypeVar("T")


@dataclass
class OptimConfig:
    """Optimiser and schedule of the training stage."""

    optimizer: Literal["adam", "adamw"] = "adamw"
    """adam adds weight decay to the gradient; adamw decays the weights themselves."""
    lr: Amount = 1e-3
    """Peak learning rate."""
    weight_decay: Amount = 1e-2
    """Decay of matrices; norms, biases and positions are spared unless decay_all."""
    decay_all: bool = False
    """Decay every parameter, as a plain torch optimiser does."""
    betas: tuple[Probability, Probability] = (0.9, 0.999)
    """Decay of Adam's two moments."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls over the stage."""
    final_lr_fraction: Share = 0.0
    """Share of the peak that the learning rate falls to."""
    warmup_fraction: Share = 0.0
    """Share of the steps over which the learning rate rises from zero."""
    clip: Amount = 1.0
    """Largest gradient norm; 0 turns clipping off."""


@dataclass(frozen=True)
class Watched:
    """The validation number that a run or a search chooses by, and what it is taken after: an epoch, or an evaluation."""

    name: str
    unit: str
    larger_is_better: bool

    def better(self, numbers: dict[str, float], others: dict[str, float]) -> bool:
        """Whether it is better in ``numbers`` than in ``others``."""
        new, old = numbers[self.name], others[self.name]
        return new > old if self.larger_is_better else new < old


@dataclass
class BaseLoopConfig:
    """How long, on what, and how safely."""

    watched: ClassVar[Watched]
    batch_size: Size = 64
    """Images, or sequences of tokens, an optimiser step, over all processes and micro-batches."""
    accumulation: Size = 1
    """Micro-batches that a step is cut into, to save memory; but for the draws of dropout, results do not change."""
    eval_batch_size: Size = 256
    """Images, or sequences, a batch in evaluation, over all processes."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 (or fp16) on a GPU that has it; on a CPU that has its instructions, whichever is seen to be faster."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute."""
    compile: bool | None = None
    """Compile the model with torch.compile; None measures whether that saves time, in runs of more than half an hour."""
    checkpoint_minutes: Amount = 5.0
    """Write a checkpoint at least this often, and at the end of every epoch."""
    log_every: Count = 20
    """Steps between two training rows in metrics.jsonl."""
    deterministic: bool = False
    """Ask torch for deterministic kernels; slower on a GPU, no cost on a CPU."""


@dataclass
class TrackingConfig:
    """Where runs are recorded beside their own folder."""

    mlflow: bool = True
    """Also log to MLflow where it is installed."""
    mlflow_uri: str = ""
    """MLflow server or store; empty: the SQLite file mlflow.db beside the run folder."""
    experiment: str = "crossalign"
    """MLflow experiment name."""


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as nested plain values, what config.yaml holds: without the logins in its addresses."""
    return json.loads(without_login(json.dumps(dataclasses.asdict(config), default=os.fspath)))  # type: ignore[no-any-return]


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as ``section.key`` names."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def update(config: T, values: dict[str, Any], prefix: str = "") -> T:
    """A copy of ``config`` with nested ``values`` put in.

    Raises:
        UserError: a key that the configuration does not have (the nearest one is named), or a value of another type.
    """
    fields = {f.name: f for f in dataclasses.fields(config)}  # type: ignore[arg-type]
    hints = get_type_hints(type(config))
    changes: dict[str, Any] = {}
    for key, value in values.items():
        if key not in fields:
            raise unknown(f"setting in {prefix or 'the configuration'}", key, fields)
        old = getattr(config, key)
        if dataclasses.is_dataclass(old) and not isinstance(old, type):
            if not isinstance(value, dict):
                raise UserError(f"setting '{prefix}{key}' holds {value!r}; it is a section and takes settings under it")
            value = update(old, value, f"{prefix}{key}.")
        else:
            value = _typed(value, hints[key], prefix + key)
        changes[key] = value
    return dataclasses.replace(config, **changes)  # type: ignore[type-var]


def _typed(value: Any, hint: Any, name: str) -> Any:
    """``value`` as a field of type ``hint`` holds it; files and ``key=value`` settings bring lists and text."""
    options = get_args(hint)
    if get_origin(hint) is Literal:
        if value not in options:
            raise unknown(f"value for '{name}'", str(value), options)
        return value
    if get_origin(hint) in (Union, UnionType):  # X | None
        return None if value is None else _typed(value, next(o for o in options if o is not type(None)), name)
    if get_origin(hint) is tuple and isinstance(value, list | tuple):
        return tuple(_typed(item, options[0], name) for item in value)
    if hint in (str, Path) and isinstance(value, str | Path):
        return hint(value)
    with contextlib.suppress(TypeError, ValueError):
        if hint is float and not isinstance(value, bool):
            return float(value)  # YAML 1.1 reads 1e-3 as text
        if hint in (int, bool) and type(value) is hint:
            return value
    raise UserError(f"setting '{name}' holds {value!r}; it takes {getattr(hint, '__name__', hint)}")
