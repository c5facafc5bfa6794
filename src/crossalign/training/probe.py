"""A clock for training steps: which of two forms is faster, found out at little cost and remembered."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch

from crossalign.core.files import cache_dir, content_key, write_json
from crossalign.core.machine import cpu_features, cpu_model
from crossalign.core.progress import announce

Format = Literal["fp32", "bf16", "fp16"]
Form = tuple[Format, bool]
"""How a step is computed: its number format, and whether compiled."""

LARGEST_SHARE = 0.03  # of a run, that timing may take
MOST_PAIRS = 3
LEAST_GAIN = 1.05  # less is within the noise of so few steps
FIRST_SPREAD = 0.15  # between steps of one form, as long as only one of each is timed

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
        try:
            path = cache_dir("precision") / f"{key}.json"
        except OSError:  # a home folder that cannot be written to
            return measure(), "measured"
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            return {str(name): float(value) for name, value in stored.items()}, "measured before"
        except (OSError, ValueError, AttributeError, TypeError):
            seconds = measure()
        if seconds:
            with contextlib.suppress(OSError):  # a full disk
                write_json(path, seconds)
        return seconds, "measured"
