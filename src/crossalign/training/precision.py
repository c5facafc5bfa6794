"""Which number format to train in, found by the hardware or by a short measurement; and how much memory was used."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from crossalign.cache import cache_dir, content_key, write_json
from crossalign.environment import cpu_features, cpu_model
from crossalign.errors import UserError, unknown

Name = Literal["fp32", "bf16", "fp16"]
Step = Callable[[torch.dtype | None], None]

DTYPES: dict[Name, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
TIMED_STEPS = 3
# A gain below this is within the noise of three steps, and fp32 is the safer of two equals.
LEAST_GAIN = 1.05
# Large models take half a minute a step on a CPU: then one timed step of each has to do.
PROBE_SECONDS = 60.0


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


def reset_peak_memory(device: str) -> None:
    """Begin a new measurement for :func:`peak_memory_bytes`: several runs may share a process."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError):  # Linux has it
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory_bytes(device: torch.device | str) -> int:
    """The most memory held so far: by torch's allocator on a CUDA device, else by the whole process."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    # What getrusage reports outlives exec: a small program started by a large one would show the large one's peak.
    status = Path("/proc/self/status")
    if status.exists():
        found = re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), flags=re.MULTILINE)
        if found:
            return int(found.group(1)) * 1024
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _automatic(device: torch.device, step: Step, signature: str) -> Precision:
    if device.type == "cuda":
        if _native_bf16():
            return Precision("bf16", "the GPU computes bf16 natively")
        return Precision("fp16", "the GPU has no native bf16")
    if device.type != "cpu":
        return Precision("fp32", f"mixed precision is not used on {device.type}")
    return _from_first_process(lambda: _faster_on_cpu(step, signature))


def _faster_on_cpu(step: Step, signature: str) -> Precision:
    seconds, origin = _cached_timings(step, signature)
    timings = f"{1000 * seconds['bf16']:.4g} ms a step in bf16, {1000 * seconds['fp32']:.4g} ms in fp32 ({origin})"
    if seconds["fp32"] >= LEAST_GAIN * seconds["bf16"]:
        return Precision("bf16", f"bf16 is faster on this CPU: {timings}")
    return Precision("fp32", f"bf16 is not 5 % faster on this CPU: {timings}")


def _native_bf16() -> bool:
    return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def _from_first_process(choose: Callable[[], Precision]) -> Precision:
    """What the first process chooses, in every process: timings differ, and formats must not."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return choose()
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        raise RuntimeError("initialise torch.distributed before precision is chosen: the processes must agree on one")
    box: list[Any] = [choose() if distributed.get_rank() == 0 else None]
    distributed.broadcast_object_list(box, src=0)
    chosen: Precision = box[0]
    return chosen


def _cached_timings(step: Step, signature: str) -> tuple[dict[str, float], str]:
    """Seconds a step by format, and whether they were measured now or before."""
    key = content_key(
        cpu=cpu_model(),
        features=cpu_features(),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        signature=signature,
    )
    try:
        path = cache_dir("precision") / f"{key}.json"
    except OSError:  # a home folder that cannot be written to
        return _time_steps(step), "measured"
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return {"fp32": float(stored["fp32"]), "bf16": float(stored["bf16"])}, "measured before"
    except (OSError, ValueError, KeyError, TypeError):
        seconds = _time_steps(step)
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
