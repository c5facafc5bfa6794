"""What goes wrong in a search: trials that fail, workers that die, a machine that cannot train."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from searching import record, settings

from crossalign.config import AdaptConfig, SearchConfig
from crossalign.core.errors import UserError
from crossalign.runs.names import SearchFolder
from crossalign.studies.search import jobs as work
from crossalign.studies.tune import tune
from crossalign.studies.workers import WorkerPool, Workers
from crossalign.training.stops import Interrupted


@pytest.mark.usefixtures("here")
def test_a_failing_trial_ends_with_its_reason_and_the_search_goes_on(tmp_path: Path, tiny: tuple[str, ...]) -> None:
    text = "optim.lr: [1.0e-3, 1.0e+30]\nhead.dropout: [0.0, 0.1]\n"
    config = settings(tmp_path, (*tiny, "optim.clip=0"), space_text=text, trials=9, seeds=1)
    assert tune(config) == []
    found = record(config)
    assert len(found["trials"]) == 4  # the space holds no more, and none is drawn twice
    failed = [trial for trial in found["trials"] if trial["state"] == "failed"]
    assert len(failed) == 2 and all("stopped being a number" in trial["reason"] for trial in failed)
    assert all(trial["settings"]["optim.lr"] == 1e30 for trial in failed)
    assert found["trials"][found["winner"]]["settings"]["optim.lr"] == 1e-3


@pytest.mark.usefixtures("here")
def test_settings_that_no_draw_can_mend_stop_the_search_early(tmp_path: Path, tiny: tuple[str, ...]) -> None:
    config = settings(tmp_path, (*tiny[:1], "data.source=nowhere", *tiny[2:]))
    with pytest.raises(UserError, match="nowhere"):
        tune(config)
    assert not list((config.output / "trials").glob("0*"))


@pytest.mark.usefixtures("here")
def test_trials_that_fail_by_their_own_settings_do_not_stop_the_others(tmp_path: Path, tiny: tuple[str, ...]) -> None:
    """Three in a row, so that the base is tried again: it can be trained."""
    space = "embedder.patch: [2, 3, 5, 6, 7]\n"
    config = settings(tmp_path, [key for key in tiny if "patch" not in key], space_text=space, seeds=0)
    tune(config)
    found = record(config)
    failed = [trial for trial in found["trials"] if trial["state"] == "failed"]
    assert [t["settings"]["embedder.patch"] for t in found["trials"] if t not in failed] == [2]
    assert len(failed) == 4 and all("patch" in trial["reason"] for trial in failed)
    assert found["winner"] is not None and not (config.output / "trials" / "base").exists()


@pytest.mark.usefixtures("here")
def test_a_fault_of_the_machine_fails_no_trial(tmp_path: Path, tiny: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """The data are gone in the middle of a search, then come back; and the disk is nearly full."""
    pictures = Path(tiny[1].partition("=")[2])
    mine = tmp_path / "pictures"
    shutil.copytree(pictures, mine)
    config = settings(tmp_path, (tiny[0], f"data.source={mine}", *tiny[2:]), seeds=0)
    train, jobs = work.train, list[str]()

    def counted(job: work.Work) -> work.JobResult:
        jobs.append(job.config.output.name)
        if len(jobs) == 6:
            mine.rename(tmp_path / "away")
        return train(job)

    monkeypatch.setattr("crossalign.studies.search.drive.train", counted)
    with pytest.raises(UserError, match="pictures"):
        tune(config)
    assert jobs[-1] == "base"
    before = record(config)
    assert not [trial for trial in before["trials"] if trial["state"] == "failed"]
    with pytest.raises(UserError, match="pictures"):  # the next call tells at once
        tune(config)
    assert jobs[-2:] == ["base", "base"]
    (tmp_path / "away").rename(mine)
    with monkeypatch.context() as patch:
        patch.setattr("crossalign.core.files.shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
        with pytest.raises(Interrupted, match="are free"):
            tune(config)
    tune(config)
    found = record(config)
    assert found["winner"] is not None and not [trial for trial in found["trials"] if trial["state"] == "failed"]
    other = settings(tmp_path, (tiny[0], f"data.source={mine}", *tiny[2:]), seeds=0, output=tmp_path / "whole")
    tune(other)
    assert [trial["curve"] for trial in record(other)["trials"]] == [trial["curve"] for trial in found["trials"]]


class Dying(Executor):
    """Does the work, but for the ``deaths`` first jobs of trial 1, whose worker is killed."""

    def __init__(self, deaths: int) -> None:
        self.deaths = deaths
        self.inner = ThreadPoolExecutor(1)

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        if args[0].config.output.name == "0001" and self.deaths:
            self.deaths -= 1
            broken: Future[Any] = Future()
            broken.set_exception(BrokenProcessPool("killed"))
            return broken
        return self.inner.submit(fn, *args, **kwargs)


@pytest.mark.parametrize("deaths", [1, 2])
@pytest.mark.usefixtures("here")
def test_a_killed_worker_costs_a_trial_at_its_second_death(
    tmp_path: Path, tiny: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, deaths: int
) -> None:
    @contextmanager
    def dying(config: SearchConfig) -> Iterator[WorkerPool]:
        yield WorkerPool(Dying(deaths), lambda: 1)

    monkeypatch.setattr(sys.modules["crossalign.studies.tune"], "_pool", dying)
    config = settings(tmp_path, tiny, trials=4, seeds=0)
    tune(config)
    states = [trial["state"] for trial in record(config)["trials"]]
    assert (states[1] == "failed") == (deaths == 2)
    assert "failed" not in states[:1] + states[2:]


@pytest.mark.usefixtures("here")
def test_a_base_that_failed_can_be_mended(tmp_path: Path, tiny: tuple[str, ...]) -> None:
    config = settings(tmp_path, (*tiny, "loop.batch_size=500"), trials=1, seeds=0, rungs=2)
    with pytest.raises(UserError, match="batch-size 500"):
        tune(config)
    (config.output / "trials" / "base").mkdir(parents=True, exist_ok=True)
    (config.output / "trials" / "base" / "config.yaml").write_text("seed: 5\n")  # as a call leaves it that is killed there
    tune(dataclasses.replace(config, set=tiny))
    assert record(config)["winner"] == 0


@pytest.mark.parametrize("error", [MemoryError("no room"), torch.OutOfMemoryError("CUDA out of memory")])
@pytest.mark.usefixtures("here")
def test_a_trial_out_of_memory_fails_alone(
    tmp_path: Path, tiny: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    verb = work.run_verb

    def short_of_memory(config: Any, recipe: str, until: int | None) -> Any:
        if config.output.name == "0001":
            raise error
        return verb(config, recipe, until)

    monkeypatch.setattr(work, "run_verb", short_of_memory)
    config = settings(tmp_path, tiny, trials=3, seeds=0, rungs=2)
    tune(config)
    reasons = [trial["reason"] for trial in record(config)["trials"]]
    assert reasons == ["", f"out of memory: {error}", ""]
    assert "OutOfMemory" in (trace := (config.output / "trials" / "0001.error.txt").read_text()) or "MemoryError" in trace


def test_gpu_memory_of_a_job_is_given_back_once_nothing_holds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Held:
        """What a model on a GPU is: part of a cycle, so that only the collector ends it."""

    kept: list[weakref.ref[Any]] = []
    alive: list[bool] = []

    def out_of_memory(*_: Any) -> None:
        model = Held()
        model.mine = model  # type: ignore[attr-defined]
        kept.append(weakref.ref(model))
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(work, "run_verb", out_of_memory)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: alive.append(kept[0]() is not None))
    SearchFolder(tmp_path).token.write_text("mine")
    job = work.Work(AdaptConfig(output=tmp_path / "run"), "small-fpt", 1, tmp_path, "mine")
    assert work.train(job).reason == "out of memory: CUDA out of memory"
    assert alive == [False]


def on_a_failing_gpu(job: work.Work) -> work.JobResult:
    """A job in a worker where a kernel has failed, after which every other call on the GPU fails too."""

    def failing(*_: Any) -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    torch.cuda.is_initialized = lambda: True
    torch.cuda.synchronize = torch.cuda.empty_cache = work.run_verb = failing  # type: ignore[assignment]
    return work.train(job)


def test_a_worker_whose_gpu_failed_tells_why_and_does_no_other_job(tmp_path: Path) -> None:
    SearchFolder(tmp_path).token.write_text("mine")
    job = work.Work(AdaptConfig(output=tmp_path / "run"), "small-fpt", 1, tmp_path, "mine")
    workers = Workers(1, 1)
    try:
        outcome = workers.submit(on_a_failing_gpu, job).result(timeout=100)
        assert outcome.reason == "RuntimeError: CUDA error: device-side assert triggered"
        assert isinstance(workers.submit(work.train, job).exception(timeout=100), BrokenProcessPool)
        assert workers.submit(pow, 2, 10).result(timeout=100) == 1024  # a new one
    finally:
        workers.shutdown()


@pytest.mark.usefixtures("here")
def test_a_validation_score_that_is_no_number_keeps_its_curve(
    tmp_path: Path, tiny: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = work._outcome

    def no_number(job: work.Work) -> work.JobResult:
        found = outcome(job)
        if job.config.output.name == "0000" and found.curve:
            return dataclasses.replace(found, curve=[*found.curve[:-1], float("nan")], reason="the validation accuracy is nan")
        return found

    monkeypatch.setattr(work, "_outcome", no_number)
    config = settings(tmp_path, tiny, trials=2, seeds=0, rungs=2)
    for _ in range(2):  # from the journal too
        tune(config)
        assert record(config)["trials"][0]["curve"][-1] is None and record(config)["epochs"] == 6


def kill_self(_: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_breaks_its_own_pool_alone() -> None:
    workers = Workers(2, 1)
    try:
        good, bad = workers.submit(pow, 2, 10), workers.submit(kill_self, 0)
        assert isinstance(bad.exception(timeout=100), BrokenProcessPool)
        assert good.result(timeout=100) == 1024
        assert [workers.submit(pow, 2, n).result(timeout=100) for n in (3, 4)] == [8, 16]
    finally:
        workers.shutdown()


def threads_of(_: int) -> int:
    return torch.get_num_threads()


def test_a_worker_computes_with_its_share_of_the_cores() -> None:
    workers = Workers(1, 3)
    try:
        assert workers.submit(threads_of, 0).result(timeout=100) == 3
    finally:
        workers.shutdown()


def test_a_worker_whose_driver_is_killed_while_it_starts_is_gone() -> None:
    script = "import time; from crossalign.studies.workers import Workers; w = Workers(1, 1); w.submit(time.sleep, 99).result()"
    driver = subprocess.Popen([sys.executable, "-c", f"if __name__ == '__main__': exec({script!r})"])
    found: list[int] = []
    while not found:
        time.sleep(0.05)
        output = subprocess.run(
            ["pgrep", "-P", str(driver.pid), "-f", "spawn_main"], capture_output=True, text=True, check=False
        )
        found = [int(line) for line in output.stdout.split()]
    driver.kill()
    driver.wait()
    until = time.monotonic() + 60
    while (alive := [pid for pid in found if Path(f"/proc/{pid}").exists()]) and time.monotonic() < until:
        time.sleep(0.2)
    assert not alive


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *(("search.yaml", content) for content in ("", "- 1", "recipe: small-fpt", "resolved: 5")),
        *(("search.json", content) for content in ("", "5", "{}", "[" * 100_000)),
        *(("journal.log", content) for content in ("garbage\n", "5\n", '{"op_code": 0}\n', "[" * 100_000 + "\n")),
    ],
    ids=lambda text: text[:12],
)
@pytest.mark.usefixtures("here")
def test_a_damaged_file_of_a_search_is_named_before_any_trial(
    tmp_path: Path, tiny: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, name: str, content: str
) -> None:
    config = settings(tmp_path, tiny, trials=1, seeds=0, rungs=2)
    tune(config)
    file = config.output / name
    file.write_text(content if name != "journal.log" else file.read_text() + content)
    monkeypatch.setattr("crossalign.studies.search.drive.train", lambda job: pytest.fail("it trained"))
    with pytest.raises(UserError, match=name.replace(".", r"\.")) as caught:
        tune(config)
    assert "\n" not in str(caught.value)
