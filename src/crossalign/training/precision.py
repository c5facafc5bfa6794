"""How to compute a step: in which number format, compiled or not. The hardware is asked first, and a clock only then.

The clock times steps in two forms, at little cost, and what it found is remembered.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch

from crossalign.core.errors import UserError, unknown
from crossalign.core.files import cache_dir, content_key, write_json
from crossalign.core.machine import computes_bf16, cpu_features, cpu_model, is_main_process
from crossalign.core.progress import announce
from crossalign.core.reading import read_json
from crossalign.training.session import agreed

C = TypeVar("C")
Format = Literal["fp32", "bf16", "fp16"]
Form = tuple[Format, bool]
"""How a step is computed: its number format, and whether compiled."""

LARGEST_SHARE = 0.03  # of a run, that timing may take
MOST_PAIRS = 3
LEAST_GAIN = 1.05  # less is within the noise of so few steps
FIRST_SPREAD = 0.15  # between steps of one form, as long as only one of each is timed
DTYPES: dict[Format, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""What to give ``torch.autocast``; None means no autocast."""
FEWEST_STEPS = 200  # a shorter run does not win back what some steps in another form cost
COMPILING_SECONDS = 60.0  # about; how long it takes is known only afterwards
timed = {"seconds": 0.0}
"""How long this process has timed steps."""


@dataclass
class Probe:
    """Times steps of one model on one device."""

    step: Callable[[Format, bool], None]
    """Does one forward and backward pass in a form. It must hold no collective operation and change no parameter or buffer; it
    may leave gradients, which the caller clears."""
    device: torch.device
    signature: str
    """Names the work in the cache: model, shapes, batch size."""
    steps: int
    """Forward and backward passes of the run."""
    times: dict[Form, list[float]] = field(default_factory=dict)
    """Seconds of each step by form; the first of a form warms up, or compiles."""

    def race(self, usual: Form, other: Form, names: tuple[str, str], prefix: str = "") -> tuple[dict[str, float], str]:
        """Seconds of a step in both forms, by ``names``, and of the other's ``first``; and whether measured now or before.

        They take turns until it is clear which is faster, at most ``MOST_PAIRS`` times after one of each that warms up, and no
        step begins that would pass ``LARGEST_SHARE`` of the run. There are no seconds where a run is too short for one of each.
        """

        def measure() -> dict[str, float]:
            announce(f"timing steps, {names[0]} against {names[1]}, to take the faster")
            for turn in range(2 + 2 * MOST_PAIRS):
                form = (usual, other)[turn % 2]
                if turn and not self._fits(form, usual):
                    break
                self._time(form)
                if turn % 2 and self._clear(usual, other):
                    break
            if len(self.times.get(other, ())) < 2:
                return {}
            return {names[0]: self._fastest(usual), names[1]: self._fastest(other), "first": self.times[other][0]}

        return self._remembered(measure, f"{prefix}{self.signature}")

    def seconds(self, form: Form, name: str) -> float:
        """Seconds of a step in one form, kept under ``name``."""

        def measure() -> dict[str, float]:
            for _ in range(0 if form in self.times else 2):
                self._time(form)
            return {name: self._fastest(form)}

        return self._remembered(measure, f"{name} {self.signature} {form[0]}")[0][name]

    def _time(self, form: Form) -> None:
        with torch.random.fork_rng(devices=[] if self.device.type == "cpu" else None):  # random numbers are as before
            before = time.perf_counter()
            self.step(*form)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            seconds = time.perf_counter() - before
        self.times.setdefault(form, []).append(seconds)
        timed["seconds"] += seconds

    def _fastest(self, form: Form) -> float:
        """Of the steps after the first, if there are any: whatever else runs on the machine only ever adds time."""
        return min(self.times[form][1:] or self.times[form])

    def _fits(self, form: Form, usual: Form) -> bool:
        """Whether another step keeps within ``LARGEST_SHARE`` of the run, compiling left out."""
        used = sum(sum(times[1:] if compiled else times) for (_, compiled), times in self.times.items())
        like = usual if form[1] or form not in self.times else form
        return used + self.times[like][-1] <= LARGEST_SHARE * self.steps * self._fastest(usual)

    def _clear(self, usual: Form, other: Form) -> bool:
        """Whether the gain is further from ``LEAST_GAIN`` than steps of one form are from one another."""
        times = [self.times[form][1:] for form in (usual, other)]
        if not times[1]:
            return False
        spread = max(max(t) / max(min(t), 1e-9) for t in times) - 1 if len(times[1]) > 1 else FIRST_SPREAD
        gain = min(times[0]) / max(min(times[1]), 1e-9)
        return not 1 / (1 + spread) < gain / LEAST_GAIN < 1 + spread

    def _remembered(self, measure: Callable[[], dict[str, float]], signature: str) -> tuple[dict[str, float], str]:
        """The seconds that ``measure`` gives, by name, and whether they were measured now or before, on such a machine."""
        key = content_key(
            cpu=cpu_model(),
            features=cpu_features(),
            threads=torch.get_num_threads(),
            gpu=torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "",
            torch=torch.__version__,
            signature=signature,
        )
        with contextlib.suppress(UserError, OSError, ValueError, TypeError):  # not there, or damaged
            stored = read_json(cache_dir("precision") / f"{key}.json")
            return {str(name): float(value) for name, value in stored.items()}, "measured before"
        if seconds := measure():
            with contextlib.suppress(OSError):  # a full disk, or a home folder that cannot be written to
                write_json(cache_dir("precision") / f"{key}.json", seconds)
        return seconds, "measured"


def choose_precision(requested: str, probe: Probe) -> tuple[Format, str]:
    """The number format to train in, and the reason in one sentence, with both timings where they were measured.

    ``requested`` "auto" gives bf16 on a CUDA GPU that computes it natively and fp16 on an older one; fp32 on Apple's, on a
    CPU without instructions for bf16, and in a run of less than ``FEWEST_STEPS`` steps. Elsewhere steps are timed both ways,
    and bf16 is taken if they are at least 5 % faster; the timings are cached for the processor, its threads, torch's version
    and the probe's signature. With several processes, of which torch.distributed must know already, the first one decides.

    Raises:
        UserError: an unknown name, or a format that the device cannot compute.
        RuntimeError: there are several processes, and torch.distributed is not initialised.
    """
    kind = probe.device.type
    native = kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if requested == "auto":
        if kind == "cuda":
            return ("bf16", "the GPU computes bf16 natively") if native else ("fp16", "the GPU has no native bf16")
        if kind != "cpu":
            return "fp32", f"mixed precision is not used on {kind}"
        return agreed(lambda: _faster_on_cpu(probe))
    if requested not in DTYPES:
        raise unknown("precision", requested, ["auto", *DTYPES])
    if requested == "fp16" and kind == "cpu":
        raise UserError("loop.precision is fp16, which a CPU cannot train in; use auto, bf16 or fp32")
    if requested == "bf16" and kind == "cuda" and not native:
        raise UserError("loop.precision is bf16, which this GPU only emulates, slowly; use auto, fp16 or fp32")
    return requested, "as configured"


def _faster_on_cpu(probe: Probe) -> tuple[Format, str]:
    if computes_bf16() is False:
        return "fp32", "this CPU has no instructions for bf16"
    seconds, origin = dict[str, float](), ""
    if probe.steps >= FEWEST_STEPS:
        seconds, origin = probe.race(("fp32", False), ("bf16", False), ("fp32", "bf16"))
    if not seconds:
        return "fp32", f"a run of {probe.steps:,} steps is too short to time bf16 in"
    timings = f"{1000 * seconds['bf16']:.4g} ms a step in bf16, {1000 * seconds['fp32']:.4g} ms in fp32 ({origin})"
    if seconds["fp32"] >= LEAST_GAIN * seconds["bf16"]:
        return "bf16", f"bf16 is faster on this CPU: {timings}"
    return "fp32", f"bf16 is not 5 % faster on this CPU: {timings}"


def choose_compile(requested: bool | None, precision: Format, probe: Probe) -> tuple[bool, str]:
    """Whether to compile the model for steps in the format ``precision``, and the reason in one sentence.

    ``requested`` None decides by measurement, where compiling, which takes about a minute, is a small part of the run: steps
    are timed both ways, and it is compiled if that saves time over the whole run, compiling included. Timings are cached, and
    the first of several processes decides, as in :func:`choose_precision`.
    """
    if requested is not None:
        return requested, "as configured"
    if probe.device.type not in ("cpu", "cuda"):
        return False, f"torch.compile is not used on {probe.device.type}"
    return agreed(lambda: _compiling_pays(precision, probe))


def _compiling_pays(precision: Format, probe: Probe) -> tuple[bool, str]:
    if probe.steps < FEWEST_STEPS:
        return False, f"{probe.steps:,} steps are too few to repay compiling"
    usual, other = (precision, False), (precision, True)
    whole = probe.steps * probe.seconds(usual, "eager")
    too_short = False, f"about {whole:.0f} s of steps are too few to repay compiling"
    if LARGEST_SHARE * whole < COMPILING_SECONDS:
        return too_short
    try:
        seconds, origin = probe.race(usual, other, ("eager", "compiled"), prefix=f"compiled in {precision}: ")
    except Exception as error:  # no C++ compiler, or a model that the compiler cannot take: the run is worth more
        return False, f"torch.compile does not work here ({type(error).__name__})"
    if not seconds:
        return too_short
    timings = f"{1000 * seconds['compiled']:.4g} ms a step compiled, {1000 * seconds['eager']:.4g} ms not, "
    timings += f"{seconds['first']:.0f} s to compile ({origin})"
    saved = probe.steps * (seconds["eager"] - seconds["compiled"]) - seconds["first"]
    if seconds["eager"] >= LEAST_GAIN * seconds["compiled"] and saved > 0:
        return True, f"compiling saves about {saved / 60:.0f} min: {timings}"
    return False, f"compiling does not pay on this machine: {timings}"


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

    def step(precision: Format, compiled: bool) -> None:
        forms.setdefault(compiled, torch.compile(model) if compiled else model)
        dtype = DTYPES[precision]
        with torch.autocast(loop.device, dtype=dtype or torch.float32, enabled=dtype is not None):
            forward(forms[compiled]).float().square().mean().backward()
        model.zero_grad(set_to_none=True)

    probe = Probe(step, torch.device(loop.device), signature, steps)
    precision, reason = choose_precision(loop.precision, probe)
    compiled, why = choose_compile(loop.compile, precision, probe)
    if is_main_process() and not quiet:
        print(f"precision {precision}: {reason}\n{'compiled' if compiled else 'not compiled'}: {why}")
    loop = dataclasses.replace(loop, precision=precision, compile=compiled)
    return dataclasses.replace(config, loop=loop)  # type: ignore[type-var]
