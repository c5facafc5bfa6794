"""The choice of number format and compiling: asked of the hardware first, timed briefly, without touching random numbers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.multiprocessing

from crossalign.cli import leave_group
from crossalign.core.device import peak_memory_bytes
from crossalign.core.errors import UserError
from crossalign.core.files import cache_dir
from crossalign.training import precision
from crossalign.training.precision import Format, Probe, choose_compile, choose_precision, timed

LONG = 10_000
BOTH = [("fp32", False), ("bf16", False)]


class Clock:
    """A clock that only steps move, so that no other work on the machine decides a test."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


CLOCK = Clock()


class Steps:
    """Steps that take known seconds, by format or "compiled", the first of a form some more; they draw as dropout does."""

    def __init__(self, first: dict[str, float] | None = None, **seconds: float) -> None:
        self.seconds, self.first = seconds, first or {}
        self.calls: list[tuple[str, bool]] = []

    def __call__(self, name: Format, compiled: bool) -> None:
        torch.rand(3)
        form = "compiled" if compiled else name
        CLOCK.now += self.seconds[form] + (0.0 if (name, compiled) in self.calls else self.first.get(form, 0.0))
        self.calls.append((name, compiled))

    def probe(self, signature: str = "model", steps: int = LONG, device: str = "cpu") -> Probe:
        return Probe(self, torch.device(device), signature, steps)


@pytest.fixture(autouse=True)
def a_new_machine_with_bf16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CROSSALIGN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(precision, "time", CLOCK)
    monkeypatch.setattr(precision, "computes_bf16", lambda: True)


def test_a_processor_without_bf16_takes_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "computes_bf16", lambda: False)
    steps = Steps(fp32=1.0, bf16=28.0)
    assert choose_precision("auto", steps.probe()) == ("fp32", "this CPU has no instructions for bf16")
    assert choose_compile(None, "fp32", steps.probe(steps=199)) == (False, "199 steps are too few to repay compiling")
    assert steps.calls == []


def test_a_processor_that_does_not_tell_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "computes_bf16", lambda: None)
    assert choose_precision("auto", Steps(fp32=0.02, bf16=0.01).probe())[0] == "bf16"


def test_a_short_run_takes_no_step() -> None:
    steps = Steps(fp32=0.02, bf16=0.01)
    name, reason = choose_precision("auto", steps.probe(steps=199))
    assert name == "fp32" and "199 steps is too short" in reason and steps.calls == []
    assert choose_precision("auto", steps.probe(steps=200))[0] == "bf16"


@pytest.mark.parametrize(
    ("fp32", "bf16", "name", "pairs"),
    [
        (0.02, 0.01, "bf16", 1),
        (0.01, 0.02, "fp32", 1),
        (0.01, 0.28, "fp32", 1),
        (0.02, 0.0185, "bf16", 2),
        (0.02, 0.0198, "fp32", 2),
    ],
)
def test_the_faster_format_wins_by_five_percent_once_that_is_clear(fp32: float, bf16: float, name: str, pairs: int) -> None:
    steps, before = Steps(fp32=fp32, bf16=bf16), timed["seconds"]
    chosen, reason = choose_precision("auto", steps.probe())
    assert chosen == name
    assert steps.calls == BOTH * (1 + pairs), "one of each to warm up, then in turn"
    assert reason.count("ms") == 2 and reason.endswith("(measured)")
    assert timed["seconds"] - before == pytest.approx((1 + pairs) * (fp32 + bf16))


def test_times_that_scatter_are_compared_three_times() -> None:
    steps = Steps(fp32=0.02, bf16=0.0185)

    def scattered(name: Format, compiled: bool) -> None:
        CLOCK.now += 0.004 * (len(steps.calls) // 2 % 2)  # in every other pair
        steps(name, compiled)

    choose_precision("auto", Probe(scattered, torch.device("cpu"), "model", LONG))
    assert steps.calls == BOTH * 4


@pytest.mark.parametrize(
    ("count", "first", "bf16"), [(200, {}, 0.0098), (200, {"fp32": 0.1, "bf16": 0.1}, 0.005), (1000, {}, 0.28)]
)
def test_no_step_begins_that_would_pass_three_percent_of_the_run(count: int, first: dict[str, float], bf16: float) -> None:
    steps, before = Steps(first, fp32=0.01, bf16=bf16), CLOCK.now
    choose_precision("auto", steps.probe(steps=count))
    warming = sum(first.values()) + bf16  # a first step of each, whose time nobody knows before
    assert CLOCK.now - before <= 0.03 * count * 0.01 + warming
    assert len(steps.calls) < 8


def test_what_was_too_short_to_find_out_is_not_kept() -> None:
    slow_at_first = {"fp32": 0.3, "bf16": 0.3}
    assert "200 steps is too short" in choose_precision("auto", Steps(slow_at_first, fp32=0.01, bf16=0.005).probe(steps=200))[1]
    assert choose_precision("auto", Steps(slow_at_first, fp32=0.01, bf16=0.005).probe())[0] == "bf16"


def test_it_is_measured_once_for_a_machine_and_a_signature() -> None:
    first = choose_precision("auto", Steps(fp32=0.01, bf16=0.001).probe("model a"))
    again = Steps(fp32=0.001, bf16=0.01)
    second = choose_precision("auto", again.probe("model a"))
    assert second[0] == first[0] == "bf16" and again.calls == []
    assert second[1] == first[1].replace("(measured)", "(measured before)")
    assert choose_precision("auto", again.probe("model b"))[0] == "fp32"

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert choose_precision("auto", again.probe("model a"))[0] == "fp32", "other threads, another measurement"
    finally:
        torch.set_num_threads(threads)


def test_a_damaged_cache_is_measured_anew() -> None:
    choose_precision("auto", Steps(fp32=0.01, bf16=0.001).probe())
    (file,) = cache_dir("precision").iterdir()
    file.write_text('{"fp32": ')
    steps = Steps(fp32=0.001, bf16=0.01)
    assert choose_precision("auto", steps.probe())[0] == "fp32" and steps.calls


def test_a_cache_that_cannot_be_made_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CROSSALIGN_CACHE", str(tmp_path / "file"))
    assert choose_precision("auto", Steps(fp32=0.01, bf16=0.001).probe())[0] == "bf16"


def test_random_numbers_are_as_before() -> None:
    torch.manual_seed(0)
    expected = torch.rand(5)
    torch.manual_seed(0)
    choose_precision("auto", Steps(fp32=0.0, bf16=0.0).probe())
    assert torch.equal(torch.rand(5), expected)


def test_a_line_says_what_is_timed_while_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    said: list[str] = []

    def step(name: Format, compiled: bool) -> None:
        said.append(capsys.readouterr().err)
        CLOCK.now += 0.01

    for _ in range(2):
        choose_precision("auto", Probe(step, torch.device("cpu"), "model", LONG))
    assert said[0] == "crossalign: timing steps, fp32 against bf16, to take the faster\n"
    assert not any(said[1:]) and capsys.readouterr().err == "", "once, and not where it was measured before"


def test_a_real_model_under_autocast_runs_in_both_formats() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.GELU(), torch.nn.Linear(64, 4))
    x = torch.randn(8, 32)
    seen: set[torch.dtype] = set()

    def step(name: Format, compiled: bool) -> None:
        dtype = precision.DTYPES[name]
        with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            y = model(x)
        seen.add(y.dtype)
        y.float().square().mean().backward()
        model.zero_grad()
        CLOCK.now += 0.01

    assert choose_precision("auto", Probe(step, torch.device("cpu"), "mlp", LONG))[0] == "fp32"
    assert seen == {torch.float32, torch.bfloat16}


@pytest.mark.parametrize(
    ("eager", "compiled", "steps", "chosen", "why"),
    [
        (0.1, 0.05, 19_000, False, "too few to repay"),  # of 1,900 s, a minute is more than 3 %
        (0.1, 0.05, 21_000, True, "saves about 16 min"),  # half of 2,100 s, less a minute
        (0.1, 0.094, 21_000, True, "saves about 1 min"),
        (0.1, 0.097, 100_000, False, "does not pay"),  # within the noise of few steps
    ],
)
def test_compiling_is_chosen_where_it_saves_time_over_the_run(
    eager: float, compiled: float, steps: int, chosen: bool, why: str
) -> None:
    work = Steps({"compiled": 60.0}, fp32=eager, compiled=compiled)
    assert choose_compile(None, "fp32", work.probe(steps=steps))[0] is chosen
    assert len([call for call in work.calls if call[1]]) in ((0,) if "few" in why else (2, 3))
    work.calls = []
    again, reason = choose_compile(None, "fp32", work.probe(steps=steps))
    assert again is chosen and why in reason and work.calls == [], "measured once"


def test_one_timer_serves_both_choices() -> None:
    work = Steps(fp32=0.01, bf16=0.005)
    measuring = work.probe()
    name, _ = choose_precision("auto", measuring)
    calls = list(work.calls)
    assert choose_compile(None, name, measuring) == (False, "about 50 s of steps are too few to repay compiling")
    assert work.calls == calls


def test_compiling_as_asked_for_and_where_it_fails() -> None:
    steps = Steps(fp32=1.0, compiled=0.1)
    assert choose_compile(True, "fp32", steps.probe(steps=1))[0]
    assert not choose_compile(False, "fp32", steps.probe(steps=10**6))[0]
    assert not choose_compile(None, "fp32", steps.probe(steps=10**6, device="mps"))[0] and steps.calls == []

    def broken(name: Format, compiled: bool) -> None:
        CLOCK.now += 1.0
        if compiled:
            raise FileNotFoundError("g++")

    refused = choose_compile(None, "fp32", Probe(broken, torch.device("cpu"), "model", 10**6))
    assert refused == (False, "torch.compile does not work here (FileNotFoundError)")


def test_what_is_asked_for_is_not_measured() -> None:
    steps = Steps(fp32=0.0, bf16=0.0)
    assert choose_precision("bf16", steps.probe()) == ("bf16", "as configured")
    assert choose_precision("fp32", steps.probe())[0] == "fp32"
    assert choose_precision("fp16", steps.probe(device="cuda"))[0] == "fp16"
    assert steps.calls == []


def test_formats_that_cannot_be_are_refused() -> None:
    with pytest.raises(UserError, match="unknown precision 'bf61'; did you mean 'bf16'"):
        choose_precision("bf61", Steps().probe())
    with pytest.raises(UserError, match="fp16, which a CPU cannot train in"):
        choose_precision("fp16", Steps().probe())


@pytest.mark.parametrize(("native", "name"), [(True, "bf16"), (False, "fp16")])
def test_a_gpu_takes_bf16_only_where_it_is_native(native: bool, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # torch says that older GPUs support bf16 as well: it emulates it for them, several times slower than fp32.
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native)
    assert choose_precision("auto", Steps().probe(device="cuda"))[0] == name
    assert choose_precision("auto", Steps().probe(device="mps"))[0] == "fp32"
    if not native:
        with pytest.raises(UserError, match="only emulates"):
            choose_precision("bf16", Steps().probe(device="cuda"))


def _rank(rank: int, folder: str) -> None:
    os.environ |= {"WORLD_SIZE": "2", "CROSSALIGN_CACHE": f"{folder}/{rank}"}
    precision.time = CLOCK  # type: ignore[assignment]
    precision.computes_bf16 = lambda: True
    steps = Steps(fp32=0.01, bf16=0.001) if rank == 0 else Steps(fp32=0.001, bf16=0.01)
    with pytest.raises(RuntimeError, match=r"initialise torch\.distributed"):
        choose_precision("auto", steps.probe())
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    Path(folder, f"{rank}.txt").write_text(choose_precision("auto", steps.probe())[0])
    leave_group(0)


def test_processes_agree_although_their_timings_do_not(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_rank, (str(tmp_path),), nprocs=2)
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)] == ["bf16", "bf16"]


def test_peak_memory_sees_what_was_freed_and_not_the_parent() -> None:
    before = peak_memory_bytes("cpu")
    hog = torch.ones(200_000_000)  # 800 MB, touched
    del hog
    assert peak_memory_bytes("cpu") >= max(before, 8e8)
    # A child of a large process starts with its parent's peak in getrusage.
    script = "from crossalign.core.device import peak_memory_bytes as peak; print(peak('cpu'))"
    child = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert 1e7 < int(child.stdout) < 6e8
