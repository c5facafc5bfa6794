"""A search on a Dask cluster: in one process, and with workers that share nothing but the scheduler's address."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from crossalign.core.files import cache_dir
from crossalign.runs.folder import InUse, locked
from crossalign.runs.names import SearchFolder
from crossalign.studies.reproduce import configured
from crossalign.studies.search import cluster
from crossalign.studies.search import jobs as work
from crossalign.studies.search.cluster import cluster_pool, halt
from crossalign.studies.search.jobs import JobResult, Work, pack, train, unpack, validations
from crossalign.training.stops import Interrupted

distributed = pytest.importorskip("distributed")
DASK = [sys.executable, "-m", "dask"]
SPACE = "optim.lr: {low: 1.0e-4, high: 1.0e-2, log: true}\noptim.weight_decay: [0.0, 0.1]\n"


def until(fulfilled: Callable[[], Any], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not fulfilled():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.fixture
def scheduler() -> Iterator[Any]:
    """A scheduler and a worker of one thread, in this process."""
    with distributed.LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address=":0") as local:
        yield local


@pytest.fixture
def long(tiny: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Work:
    """A job that takes minutes."""
    monkeypatch.setenv("CROSSALIGN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cluster, "LOOK_SECONDS", 0.1)
    home = tmp_path / "search"
    home.mkdir()
    SearchFolder(home).token.write_text("token")
    config = configured("small-fpt", (*tiny, "loop.epochs=5000", "tracking.mlflow=false"))
    return Work(dataclasses.replace(config, output=home / "trials" / "0000"), "small-fpt", None, home, "token")


def is_free(folder: Path) -> bool:
    try:
        with locked(folder):
            return True
    except InUse:
        return False


def test_jobs_are_told_to_save_and_end_when_the_search_stops(scheduler: Any, long: Work) -> None:
    folder = long.config.output
    queued = dataclasses.replace(long, config=dataclasses.replace(long.config, output=folder.with_name("0001")))
    with pytest.raises(KeyboardInterrupt), cluster_pool(scheduler.scheduler_address, 0, long.home) as pool:
        assert pool.free() == 1
        futures = [pool.executor.submit(train, job) for job in (long, queued)]  # Dask drops a job whose future is not kept
        until(lambda: validations(folder))
        assert not halt({"another search"}) and not is_free(folder) and not any(future.done() for future in futures)
        raise KeyboardInterrupt
    assert is_free(folder) and list(folder.glob("checkpoints/*")) and not queued.config.output.exists()
    assert not halt({"token"})
    done = len(validations(folder))
    again = train(dataclasses.replace(long, until=done + 1))
    assert len(again.curve) == done + 1 and not again.reason


def test_a_job_ends_when_its_driver_is_gone(scheduler: Any, long: Work) -> None:
    folder = long.config.output
    with distributed.Client(scheduler.scheduler_address) as client:
        future = client.submit(train, long)
        until(lambda: validations(folder))
        assert not future.done()
    until(lambda: is_free(folder), 10)
    assert list(folder.glob("checkpoints/*"))


def test_a_scheduler_that_goes_away_interrupts_the_search(scheduler: Any, long: Work) -> None:
    address = scheduler.scheduler_address
    with pytest.raises(Interrupted, match=f"the Dask scheduler at {address} has gone away"):  # noqa: SIM117
        with cluster_pool(address, 0, long.home) as pool:
            future = pool.executor.submit(train, long)
            until(lambda: validations(long.config.output))
            scheduler.close()
            until(lambda: pool.free() != 1)
    assert future.cancelled()
    until(lambda: is_free(long.config.output), 10)


def test_copies_are_deleted_at_the_end_of_a_search(scheduler: Any, long: Work) -> None:
    ours, other = cache_dir("search") / "token" / "trials", cache_dir("search") / "other"
    ours.mkdir(parents=True)
    other.mkdir()
    for name, token in {"method": "", "damaged": "../search/other"}.items():  # neither may name what is not a search's
        (long.home / name).mkdir()
        SearchFolder(long.home / name).token.write_text(token)
    with pytest.raises(RuntimeError), cluster_pool(scheduler.scheduler_address, 0, long.home):
        raise RuntimeError
    assert ours.is_dir()
    with cluster_pool(scheduler.scheduler_address, 0, long.home):
        pass
    assert not ours.parent.exists() and other.is_dir()


def test_an_archive_that_is_cut_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    there, here = tmp_path / "there", tmp_path / "here"
    for folder, text in ((there, "new" * 1000), (here, "old")):
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "config.yaml").write_text(text)
        (folder / "checkpoints" / "1").write_text(text)
    (here / "checkpoints" / "2").write_text("old")
    files = pack(there)
    for end in (0, 700, len(files) // 3, 4096, len(files) - 10240):
        with pytest.raises(tarfile.ReadError):
            unpack(files[:end], here)
        with pytest.raises(tarfile.ReadError):
            unpack(files[:end].ljust(end + 1024, b"\1"), here)
        assert (here / "checkpoints" / "2").read_text() == (here / "config.yaml").read_text() == "old"
    with locked(here), pytest.raises(InUse):
        unpack(files, here)
    unpack(files, here)
    assert sorted(path.name for path in here.rglob("*")) == ["1", "checkpoints", "config.yaml"]
    unpack(files, tmp_path / "deep" / "fresh")
    assert (tmp_path / "deep" / "fresh" / "config.yaml").read_text() == "new" * 1000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "here", "there"]


def test_a_job_waits_for_a_folder_in_use(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(work, "ORPHAN_SECONDS", -1.0)
    monkeypatch.setattr(work, "TELL_SECONDS", 0.0)
    calls = []

    def job() -> JobResult:
        calls.append(1)
        if len(calls) < 3:
            raise InUse("another process is running there")
        return JobResult(score=7.0)

    assert work._patiently(job, None).stopped == "another process is running there"
    assert work._patiently(job, threading.Event()).score == 7.0
    assert "another process is running there" in capsys.readouterr().out
    stop = threading.Event()
    stop.set()
    assert work._patiently(job, stop).died and len(calls) == 3


def test_a_job_computes_with_its_threads_and_raises_nothing(long: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, before = [], torch.get_num_threads()
    monkeypatch.setattr(work, "run_verb", lambda *_: seen.append(torch.get_num_threads()))
    for threads in (before + 1, 0):
        train(dataclasses.replace(long, threads=threads))
    assert seen == [before + 1, before] and torch.get_num_threads() == before
    elsewhere = dataclasses.replace(long, token="not here", files=b"cut")
    assert "ReadError" in train(elsewhere).stopped


# Real processes, each worker with a cache of its own.


@contextlib.contextmanager
def dask(folder: Path, shared: bool) -> Iterator[tuple[str, list[subprocess.Popen[bytes]], Callable[[str], None]]]:
    """The scheduler's address, its processes (the scheduler first, then two workers), and what starts another worker."""
    apart, file = folder / "apart.py", folder / "scheduler.json"
    apart.write_text("import crossalign.studies.search.jobs as work\nwork._shares = lambda job: False\n")
    address = ["--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", str(file)]
    processes = [subprocess.Popen([*DASK, "scheduler", *address], stderr=subprocess.DEVNULL)]

    def start(name: str) -> None:
        own = folder / name
        own.mkdir()
        preload = [] if shared else ["--preload", str(apart)]
        args = [*DASK, "worker", found, "--nthreads", "1", "--no-nanny", "--no-dashboard", "--name", name, *preload]
        env = {**os.environ, "CROSSALIGN_CACHE": str(own / "cache")}
        with (own / "log.txt").open("w") as log:
            processes.append(subprocess.Popen(args, cwd=own, env=env, stderr=log))

    try:
        until(lambda: file.exists() and file.read_text())
        found = json.loads(file.read_text())["address"]
        for name in ("one", "two"):
            start(name)
        yield found, processes, start
    finally:
        for process in processes:
            process.kill()
            process.wait()


def command(folder: Path, tiny: tuple[str, ...], address: str, *more: str) -> list[str]:
    space = folder.parent / "space.yaml"
    space.write_text(SPACE)
    args = ["--tracking.no-mlflow", "--seeds", "1", "--output", str(folder), "--space", str(space), "--rungs", "3"]
    args += ["--workers", "0", "--cluster", address, *more, "--set", *tiny]
    return [sys.executable, "-m", "crossalign.cli", "tune", "small-fpt", *args]


def started(args: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_for_scores(search: subprocess.Popen[str], folder: Path, count: int) -> None:
    while not (folder / "journal.log").exists() or (folder / "journal.log").read_text().count("scores") < count:
        assert search.poll() is None, search.communicate()
        time.sleep(0.1)


def check_whole(folder: Path, trials: int, rungs: list[int]) -> None:
    found = json.loads((folder / "search.json").read_text())
    assert [trial["state"] for trial in found["trials"]].count("failed") == 0 and len(found["trials"]) == trials
    assert all(len(trial["curve"]) == rungs[len(trial["rungs"]) - 1] for trial in found["trials"])
    assert len(list(folder.glob("winner/*/result.json"))) == 1
    for trial in found["trials"]:  # no epoch twice in the log, none lost
        rows = validations(folder / "trials" / f"{trial['number']:04d}")
        assert [row["epoch"] for row in rows] == list(range(1, len(trial["curve"]) + 1))


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("shared", [True, False])
def test_a_cluster_loses_a_worker_and_gets_it_back(tiny: tuple[str, ...], tmp_path: Path, shared: bool) -> None:
    folder = tmp_path / "found"
    with dask(tmp_path, shared) as (address, processes, start):
        search = started(command(folder, tiny, address, "--trials", "12"))
        wait_for_scores(search, folder, 3)
        processes[1].kill()
        processes[1].wait()
        start("three")
        _, err = search.communicate(timeout=600)
        assert search.returncode == 0, err
        check_whole(folder, 12, [1, 2, 4])
        assert not list(tmp_path.glob("t*/cache/search/*"))  # workers that are still there keep no copies


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("shared", [True, False])
def test_the_same_command_goes_on_at_once(tiny: tuple[str, ...], tmp_path: Path, shared: bool, how: signal.Signals) -> None:
    """The trials would take minutes; their workers must let go of them in seconds."""
    folder, long = tmp_path / "found", (*tiny, "loop.epochs=8000")
    with dask(tmp_path, shared) as (address, _, _):
        args = command(folder, long, address, "--trials", "2", "--resources", "2", "4000", "8000")
        search = started(args)
        wait_for_scores(search, folder, 2)
        runs = tmp_path.glob("*/cache/search/*/trials/0*") if not shared else folder.glob("trials/0*")
        busy = sorted(runs)
        assert busy
        until(lambda: any(not is_free(run) for run in busy))
        time.sleep(3)  # into the long rung
        search.send_signal(how)
        _, err = search.communicate(timeout=60)
        assert search.returncode == (130 if how == signal.SIGINT else -how), err
        assert "Traceback" not in err
        if how == signal.SIGINT:
            assert "the same command goes on" in err and all(is_free(run) for run in busy)
        until(lambda: all(is_free(run) for run in busy), 20)
        before = max(len(validations(run)) for run in busy)
        assert 2 < before < 4000
        search = started(args)
        until(lambda: max(len(validations(run)) for run in busy) > before, 60)
        assert search.poll() is None
        search.send_signal(signal.SIGINT)
        assert search.wait(60) == 130


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_scheduler_that_is_killed_costs_no_trial_anything(tiny: tuple[str, ...], tmp_path: Path) -> None:
    folder = tmp_path / "found"
    for place in ("first", "second"):
        (tmp_path / place).mkdir()
    with dask(tmp_path / "first", True) as (address, processes, _):
        search = started(command(folder, tiny, address, "--trials", "12"))
        wait_for_scores(search, folder, 3)
        processes[0].kill()
        _, err = search.communicate(timeout=60)
        assert search.returncode == 130 and address in err and "the same command goes on" in err, err
        assert "Traceback" not in err
        for worker in processes[1:]:
            worker.wait(60)  # nothing is left for them to do
    with dask(tmp_path / "second", True) as (address, _, _):
        subprocess.run(command(folder, tiny, address, "--trials", "12"), check=True, capture_output=True, timeout=600)
    check_whole(folder, 12, [1, 2, 4])
    assert "died" not in (folder / "journal.log").read_text()
