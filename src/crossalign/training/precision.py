"""How to compute a step, by the hardware or a short measurement: number format, compiled or not; and the memory used."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch

from crossalign.core.errors import UserError, unknown
from crossalign.core.files import cache_dir, content_key, write_json
from crossalign.core.machine import cpu_features, cpu_model, is_main_process

Name = Literal["fp32", "bf16", "fp16"]
Step = Callable[[torch.dtype | None], None]
C = TypeVar("C")
T = TypeVar("T")

DTYPES: dict[Name, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
TIMED_STEPS = 3
# A gain below this is within the noise of three steps, and fp32 is the safer of two equals.
LEAST_GAIN = 1.05
# Large models take half a minute a step on a CPU: then one timed step of each has to do.
PROBE_SECONDS = 60.0
# Compiling takes about a minute, and what it may save is a part of the run: shorter runs are not worth the look.
COMPILE_SECONDS = 900.0


@dataclass(frozen=True)
class Precision:
    """A number format and why it was chosen."""

    name: Name
    reason: str
    """One sentence, with both timings where they were measured."""

    @property
    def dtype(self) -> torch.dtype | None:
        """What to give ``torch.autocast``; None means no autocast."""
        return DTYPES[self.name]

    @property
    def mixed_precision(self) -> str:
        """The same in accelerate's words: "no", "bf16" or "fp16"."""
        return "no" if self.name == "fp32" else self.name


def choose_precision(requested: str, device: torch.device | str, step: Step, signature: str) -> Precision:
    """The format to train in on ``device``.

    ``requested`` "auto" gives bf16 on a CUDA GPU that computes it natively and fp16 on an older one, and fp32 on
    Apple's. On a CPU it times ``step`` both ways and takes bf16 if that is at least 5 % faster; the timings are
    cached for the processor, its threads, torch's version and ``signature``, which says what else decides the speed
    (model, shapes, batch size).

    Args:
        requested: "auto", "fp32", "bf16" or "fp16".
        device: where the model lies.
        step: does one forward and backward pass, under autocast to the given type unless it is None. It must hold no
            collective operation and change no parameter or buffer; it may leave gradients, which the caller clears.
        signature: names the measured work in the cache.

    With several processes, of which torch.distributed must know already, the first one measures and decides for all.
    The state of torch's random numbers is as before.

    Raises:
        UserError: an unknown name, or a format that the device cannot compute.
        RuntimeError: there are several processes, and torch.distributed is not initialised.
    """
    device = torch.device(device)
    if requested == "auto":
        return _automatic(device, step, signature)
    if requested not in DTYPES:
        raise unknown("precision", requested, ["auto", *DTYPES])
    if requested == "fp16" and device.type == "cpu":
        raise UserError("loop.precision is fp16, which a CPU cannot train in; use auto, bf16 or fp32")
    if requested == "bf16" and device.type == "cuda" and not _native_bf16():
        raise UserError("loop.precision is bf16, which this GPU only emulates, slowly; use auto, fp16 or fp32")
    return Precision(requested, "as configured")


def choose_compile(
    requested: bool | None, device: torch.device | str, step: Callable[[bool], None], steps: int, signature: str
) -> tuple[bool, str]:
    """Whether to compile the model for a run of ``steps`` steps, and the reason in one sentence.

    ``requested`` None decides by measurement: a run of less than a quarter of an hour is not compiled; of a longer one,
    steps are timed both ways, and it is compiled if that saves time over the whole run, compiling included. Timings are
    cached as in :func:`choose_precision`, and with several processes the first one decides.

    Args:
        requested: True, False, or None to find out.
        device: where the model lies.
        step: does one forward and backward pass, compiled or not, under the same terms as in :func:`choose_precision`.
        steps: optimiser steps of the run.
        signature: names the measured work in the cache.
    """
    if requested is not None:
        return requested, "as configured"
    if torch.device(device).type not in ("cpu", "cuda"):
        return False, f"torch.compile is not used on {torch.device(device).type}"
    return _from_first_process(lambda: _compiling_pays(torch.device(device), step, steps, signature))


def _compiling_pays(device: torch.device, step: Callable[[bool], None], steps: int, signature: str) -> tuple[bool, str]:
    eager, _ = _cached(lambda: {"eager": _seconds(device, step, False, 1)[1]}, f"eager {signature}", device)
    whole = steps * eager["eager"]
    if whole < COMPILE_SECONDS:
        return False, f"about {whole:.0f} s of steps are too few to repay compiling"
    try:
        both, origin = _cached(lambda: _time_compiled(device, step), f"compiled {signature}", device)
    except Exception as error:  # no C++ compiler, or a model that the compiler cannot take: the run is worth more
        return False, f"torch.compile does not work here ({type(error).__name__})"
    timings = f"{1000 * both['compiled']:.4g} ms a step compiled, {1000 * both['eager']:.4g} ms not, "
    timings += f"{both['compiling']:.0f} s to compile ({origin})"
    saved = steps * (both["eager"] - both["compiled"]) - both["compiling"]
    if both["eager"] >= LEAST_GAIN * both["compiled"] and saved > 0:
        return True, f"compiling saves about {saved / 60:.0f} min: {timings}"
    return False, f"compiling does not pay on this machine: {timings}"


def _time_compiled(device: torch.device, step: Callable[[bool], None]) -> dict[str, float]:
    eager, compiled = _seconds(device, step, False, TIMED_STEPS)[1], _seconds(device, step, True, TIMED_STEPS)
    return {"eager": eager, "compiled": compiled[1], "compiling": compiled[0]}


def _seconds(device: torch.device, step: Callable[[bool], None], compiled: bool, more: int) -> tuple[float, float]:
    """Seconds of the first step, and of the fastest of ``more`` steps after it."""
    times = []
    with torch.random.fork_rng(devices=[] if device.type == "cpu" else None):
        for _ in range(1 + more):
            before = time.perf_counter()
            step(compiled)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - before)
    return times[0], min(times[1:])


def resolve_speed(
    config: C, model: torch.nn.Module, forward: Callable[[Any], torch.Tensor], signature: str, steps: int, quiet: bool = False
) -> C:
    """``config`` with ``loop.precision`` and ``loop.compile``, where left open, as the hardware or a short measurement says.

    Args:
        config: has a section ``loop`` whose device is resolved.
        model: on that device; it is left without gradients.
        forward: (model, as it is or compiled) → a tensor of a pass on a typical micro-batch.
        signature: what else decides the speed: model, shapes, what trains.
        steps: forward and backward passes of the run.
        quiet: do not print the reasons.
    """
    loop = config.loop  # type: ignore[attr-defined]
    forms: dict[bool, Any] = {False: model}

    def step(dtype: torch.dtype | None, compiled: bool = False) -> None:
        forms.setdefault(compiled, torch.compile(model) if compiled else model)
        with torch.autocast(loop.device, dtype=dtype or torch.float32, enabled=dtype is not None):
            forward(forms[compiled]).float().square().mean().backward()
        model.zero_grad(set_to_none=True)

    precision = choose_precision(loop.precision, loop.device, step, signature)
    signature += f" {precision.name}"
    compiled, reason = choose_compile(loop.compile, loop.device, lambda c: step(precision.dtype, c), steps, signature)
    if is_main_process() and not quiet:
        print(f"precision {precision.name}: {precision.reason}\n{'compiled' if compiled else 'not compiled'}: {reason}")
    loop = dataclasses.replace(loop, precision=precision.name, compile=compiled)
    return dataclasses.replace(config, loop=loop)  # type: ignore[type-var]


def _automatic(device: torch.device, step: Step, signature: str) -> Precision:
    if device.type == "cuda":
        if _native_bf16():
            return Precision("bf16", "the GPU computes bf16 natively")
        return Precision("fp16", "the GPU has no native bf16")
    if device.type != "cpu":
        return Precision("fp32", f"mixed precision is not used on {device.type}")
    return _from_first_process(lambda: _faster_on_cpu(step, signature))


def _faster_on_cpu(step: Step, signature: str) -> Precision:
    seconds, origin = _cached(lambda: _time_steps(step), signature, torch.device("cpu"))
    timings = f"{1000 * seconds['bf16']:.4g} ms a step in bf16, {1000 * seconds['fp32']:.4g} ms in fp32 ({origin})"
    if seconds["fp32"] >= LEAST_GAIN * seconds["bf16"]:
        return Precision("bf16", f"bf16 is faster on this CPU: {timings}")
    return Precision("fp32", f"bf16 is not 5 % faster on this CPU: {timings}")


def _native_bf16() -> bool:
    return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def _from_first_process(choose: Callable[[], T]) -> T:
    """What the first process chooses, in every process: timings differ, and what is computed must not."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return choose()
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        raise RuntimeError("initialise torch.distributed before precision is chosen: the processes must agree on one")
    box: list[Any] = [choose() if distributed.get_rank() == 0 else None]
    distributed.broadcast_object_list(box, src=0)
    chosen: T = box[0]
    return chosen


def _cached(measure: Callable[[], dict[str, float]], signature: str, device: torch.device) -> tuple[dict[str, float], str]:
    """The seconds that ``measure`` finds, by name, and whether they were measured now or before."""
    key = content_key(
        cpu=cpu_model(),
        features=cpu_features(),
        threads=torch.get_num_threads(),
        gpu=torch.cuda.get_device_name(device) if device.type == "cuda" else "",
        torch=torch.__version__,
        signature=signature,
    )
    try:
        path = cache_dir("precision") / f"{key}.json"
    except OSError:  # a home folder that cannot be written to
        return measure(), "measured"
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return {str(name): float(value) for name, value in stored.items()}, "measured before"
    except (OSError, ValueError, AttributeError, TypeError):
        seconds = measure()
    with contextlib.suppress(OSError):  # a full disk
        write_json(path, seconds)
    return seconds, "measured"


def _time_steps(step: Step) -> dict[str, float]:
    """The fastest of a few alternating steps in each format, after one that warms up."""
    formats: tuple[Name, ...] = ("fp32", "bf16")
    times: dict[str, list[float]] = {name: [] for name in formats}
    started = time.perf_counter()
    with torch.random.fork_rng(devices=[]):
        for name in formats:
            step(DTYPES[name])
        while len(times["bf16"]) < TIMED_STEPS:
            for name in formats:
                before = time.perf_counter()
                step(DTYPES[name])
                times[name].append(time.perf_counter() - before)
            if time.perf_counter() - started > PROBE_SECONDS:
                break
    # The minimum: whatever else runs on the machine only ever adds time.
    return {name: min(values) for name, values in times.items()}
