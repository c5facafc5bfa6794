"""The choice of number format: measured on a CPU, once, without touching random numbers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.multiprocessing

from crossalign.cli import leave_group
from crossalign.core.errors import UserError
from crossalign.core.files import cache_dir
from crossalign.training import precision
from crossalign.training.precision import choose_compile, choose_precision
from crossalign.training.session import peak_memory_bytes

CPU = torch.device("cpu")


class Clock:
    """A clock that only steps move, so that no other work on the machine decides a test."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


CLOCK = Clock()


class Sleeper:
    """A step whose two formats take known times, and which draws random numbers as dropout does."""

    def __init__(self, fp32: float, bf16: float) -> None:
        self.seconds: dict[torch.dtype | None, float] = {None: fp32, torch.bfloat16: bf16}
        self.calls: list[torch.dtype | None] = []

    def __call__(self, dtype: torch.dtype | None) -> None:
        torch.rand(3)
        self.calls.append(dtype)
        CLOCK.now += self.seconds[dtype]


@pytest.fixture(autouse=True)
def empty_cache_and_known_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CROSSALIGN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(precision, "time", CLOCK)


@pytest.mark.parametrize(("fp32", "bf16", "name"), [(0.02, 0.01, "bf16"), (0.01, 0.02, "fp32"), (0.02, 0.0198, "fp32")])
def test_the_faster_format_wins_by_five_percent(fp32: float, bf16: float, name: str) -> None:
    step = Sleeper(fp32, bf16)
    chosen = choose_precision("auto", CPU, step, "model")
    assert chosen.name == name
    assert step.calls == [None, torch.bfloat16] * 4, "one of each to warm up, then three, in turn"
    assert chosen.reason.count("ms") == 2 and chosen.reason.endswith("(measured)")


def test_it_is_measured_once_for_a_machine_and_a_signature() -> None:
    first = choose_precision("auto", "cpu", Sleeper(0.01, 0.001), "model a")
    again = Sleeper(0.001, 0.01)
    second = choose_precision("auto", "cpu", again, "model a")
    assert second.name == first.name == "bf16" and again.calls == []
    assert second.reason == first.reason.replace("(measured)", "(measured before)")
    assert choose_precision("auto", "cpu", again, "model b").name == "fp32"

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert choose_precision("auto", "cpu", again, "model a").name == "fp32", "other threads, another measurement"
    finally:
        torch.set_num_threads(threads)


def test_a_damaged_cache_is_measured_anew() -> None:
    choose_precision("auto", CPU, Sleeper(0.01, 0.001), "model")
    (file,) = cache_dir("precision").iterdir()
    file.write_text('{"fp32": ')
    step = Sleeper(0.001, 0.01)
    assert choose_precision("auto", CPU, step, "model").name == "fp32" and step.calls


def test_a_cache_that_cannot_be_made_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CROSSALIGN_CACHE", str(tmp_path / "file"))
    assert choose_precision("auto", CPU, Sleeper(0.01, 0.001), "model").name == "bf16"


def test_random_numbers_are_as_before() -> None:
    torch.manual_seed(0)
    expected = torch.rand(5)
    torch.manual_seed(0)
    choose_precision("auto", CPU, Sleeper(0.0, 0.0), "model")
    assert torch.equal(torch.rand(5), expected)


def test_a_slow_model_is_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "PROBE_SECONDS", 0.0)
    step = Sleeper(0.001, 0.001)
    choose_precision("auto", CPU, step, "model")
    assert step.calls == [None, torch.bfloat16] * 2


def test_a_real_model_under_autocast_runs_in_both_formats() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.GELU(), torch.nn.Linear(64, 4))
    x = torch.randn(8, 32)
    seen: set[torch.dtype] = set()

    def step(dtype: torch.dtype | None) -> None:
        with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            y = model(x)
        seen.add(y.dtype)
        y.float().square().mean().backward()
        model.zero_grad()

    chosen = choose_precision("auto", CPU, step, "mlp")
    assert seen == {torch.float32, torch.bfloat16}
    assert (chosen.name, chosen.mixed_precision, chosen.dtype) in {
        ("fp32", "no", None),
        ("bf16", "bf16", torch.bfloat16),
    }


class Compiler:
    """A step whose first compiled call takes long, and whose calls then take known times."""

    def __init__(self, eager: float, compiled: float, compiling: float = 60.0) -> None:
        self.seconds, self.compiling = {False: eager, True: compiled}, compiling
        self.calls: list[bool] = []

    def __call__(self, compiled: bool) -> None:
        CLOCK.now += self.seconds[compiled] + (self.compiling if compiled and True not in self.calls else 0.0)
        self.calls.append(compiled)


@pytest.mark.parametrize(
    ("eager", "compiled", "steps", "chosen", "why"),
    [
        (0.1, 0.05, 8_000, False, "too few to repay"),  # 800 s
        (0.1, 0.05, 10_000, True, "saves about 7 min"),  # half of 1,000 s, less a minute
        (0.1, 0.094, 9_500, False, "does not pay"),  # 57 s saved, 60 s to compile
        (0.1, 0.097, 100_000, False, "does not pay"),  # within the noise of few steps
    ],
)
def test_compiling_is_chosen_where_it_saves_time_over_the_run(
    eager: float, compiled: float, steps: int, chosen: bool, why: str
) -> None:
    step = Compiler(eager, compiled)
    assert choose_compile(None, CPU, step, steps, "model")[0] is chosen
    step.calls = []
    again, reason = choose_compile(None, CPU, step, steps, "model")
    assert again is chosen and why in reason and step.calls == [], "measured once"


def test_compiling_as_asked_for_and_where_it_fails() -> None:
    step = Compiler(1.0, 0.1)
    assert choose_compile(True, CPU, step, 1, "model")[0] and not choose_compile(False, CPU, step, 10**6, "model")[0]
    assert not choose_compile(None, "mps", step, 10**6, "model")[0] and step.calls == []

    def broken(compiled: bool) -> None:
        CLOCK.now += 1.0
        if compiled:
            raise FileNotFoundError("g++")

    assert choose_compile(None, CPU, broken, 10**6, "model") == (False, "torch.compile does not work here (FileNotFoundError)")


def test_what_is_asked_for_is_not_measured() -> None:
    step = Sleeper(0.0, 0.0)
    assert choose_precision("bf16", CPU, step, "model").dtype is torch.bfloat16
    assert choose_precision("fp32", CPU, step, "model").dtype is None
    assert choose_precision("fp16", torch.device("cuda"), step, "model").mixed_precision == "fp16"
    assert step.calls == []


def test_formats_that_cannot_be_are_refused() -> None:
    with pytest.raises(UserError, match="unknown precision 'bf61'; did you mean 'bf16'"):
        choose_precision("bf61", CPU, Sleeper(0, 0), "model")
    with pytest.raises(UserError, match="fp16, which a CPU cannot train in"):
        choose_precision("fp16", CPU, Sleeper(0, 0), "model")


@pytest.mark.parametrize(("native", "name"), [(True, "bf16"), (False, "fp16")])
def test_a_gpu_takes_bf16_only_where_it_is_native(native: bool, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # torch says that older GPUs support bf16 as well: it emulates it for them, several times slower than fp32.
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native)
    assert choose_precision("auto", "cuda", Sleeper(0, 0), "model").name == name
    assert choose_precision("auto", "mps", Sleeper(0, 0), "model").name == "fp32"
    if not native:
        with pytest.raises(UserError, match="only emulates"):
            choose_precision("bf16", "cuda", Sleeper(0, 0), "model")


def _rank(rank: int, folder: str) -> None:
    os.environ |= {"WORLD_SIZE": "2", "CROSSALIGN_CACHE": f"{folder}/{rank}"}
    precision.time = CLOCK  # type: ignore[assignment]
    step = Sleeper(0.01, 0.001) if rank == 0 else Sleeper(0.001, 0.01)
    with pytest.raises(RuntimeError, match=r"initialise torch\.distributed"):
        choose_precision("auto", CPU, step, "model")
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    Path(folder, f"{rank}.txt").write_text(choose_precision("auto", CPU, step, "model").name)
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
    script = "from crossalign.training.session import peak_memory_bytes as peak; print(peak('cpu'))"
    child = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert 1e7 < int(child.stdout) < 6e8
