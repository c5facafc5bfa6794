"""What a run folder holds is never lost, nor taken for what it is not."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import shutil
import signal
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from crossalign import cli
from crossalign.config import AdaptConfig, FinetuneConfig, PretrainConfig
from crossalign.core.errors import UserError
from crossalign.runs.folder import write_config
from crossalign.training import checkpoint as ckpt
from crossalign.training.stops import catch_signals
from crossalign.verbs.adapt.job import adapt
from crossalign.verbs.language_model.job import finetune, pretrain

Make = Callable[..., AdaptConfig]


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Finished runs by the test that made them first."""
    return {}


@pytest.fixture
def finished(tiny_run: Make, made: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> AdaptConfig:
    """A finished run of three epochs, in a folder of this test's own."""
    config = tiny_run("small-fpt", output="finished")
    if "run" not in made:
        adapt(config, quiet=True)
        made["run"] = shutil.copytree(config.output, tmp_path_factory.mktemp("made") / "run")
    else:
        shutil.copytree(made["run"], config.output)
    return config


@pytest.mark.parametrize(
    "settings",
    [
        ["data.source=/nope"],
        ["backbone.ref=/nope"],
        ["embedder.patch=3"],
        ["loop.epochs=0"],
        ["optim.lr=-1"],
        ["align.metric=mdd"],
        ["loop.batch_size=5000"],
        pytest.param(["loop.device=cuda"], marks=pytest.mark.skipif(torch.cuda.is_available(), reason="it is here")),
    ],
    ids=lambda settings: settings[0],
)
def test_a_mistake_with_overwrite_leaves_the_old_run(finished: AdaptConfig, tiny_run: Make, settings: list[str]) -> None:
    before = contents(finished.output)
    with pytest.raises(UserError):
        adapt(tiny_run("small-fpt", "seed=5", *settings, output="finished", overwrite=True), quiet=True)
    assert contents(finished.output) == before


@pytest.mark.parametrize(
    ("verb", "config"),
    [
        (pretrain, PretrainConfig(seed=1)),
        (finetune, FinetuneConfig(seed=1, model="/nope")),
    ],
    ids=["pretrain", "finetune"],
)
def test_a_mistake_with_overwrite_leaves_the_old_run_of_text(verb: Any, config: Any, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    write_config(folder, type(config)(output=folder))
    (folder / "model").mkdir()
    (folder / "model" / "weights").write_text("weights")
    before = contents(folder)
    config.output, config.overwrite = folder, True
    with pytest.raises(UserError):
        verb(config, quiet=True)
    assert contents(folder) == before


def test_overwrite_removes_links_and_not_what_they_lead_to(finished: AdaptConfig, tiny_run: Make, tmp_path: Path) -> None:
    victim = tmp_path / "elsewhere"
    shutil.move(finished.output / "model", victim)
    (finished.output / "model").symlink_to(victim)
    before = contents(victim)
    adapt(tiny_run("small-fpt", "loop.epochs=1", output="finished", overwrite=True), quiet=True)
    model = finished.output / "model"
    assert contents(victim) == before and not model.is_symlink() and (model / "model.safetensors").is_file()


@pytest.mark.parametrize("name", [".lock", "metrics.jsonl", "config.yaml", "model", "checkpoints", "mlflow_run.txt"])
def test_nothing_is_written_through_a_link(tiny_run: Make, tmp_path: Path, name: str) -> None:
    config = tiny_run()
    victim = tmp_path / "victim"
    if name in ("model", "checkpoints"):
        victim.mkdir()
        (victim / "README.md").write_text("mine")
    else:
        write_config(tmp_path, config, victim.name)
    before = contents(victim) or victim.read_bytes()
    write_config(config.output, config)
    (config.output / name).unlink(missing_ok=True)
    (config.output / name).symlink_to(victim)
    with pytest.raises(UserError, match="is a symbolic link"):
        adapt(config, quiet=True)
    assert (contents(victim) or victim.read_bytes()) == before


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_are_as_the_umask_says(tiny_run: Make, umask: int) -> None:
    before = os.umask(umask)
    try:
        config = tiny_run("small-fpt", "loop.epochs=1")
        adapt(config, quiet=True)
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in config.output.rglob("*") if path.is_file()}
    assert "model.safetensors" in modes and "state.pt" in modes
    assert {name: oct(mode) for name, mode in modes.items() if mode != 0o666 & ~umask} == {}


def best_of(config: AdaptConfig, monkeypatch: pytest.MonkeyPatch, accuracies: list[float], stop: bool = False) -> Any:
    """The result of a run whose validation says these accuracies; ``stop``: killed as it writes its second checkpoint."""
    module = importlib.import_module("crossalign.verbs.adapt.job")
    score, saved, told = module._score, ckpt.save, iter(accuracies)

    class Told:
        def __init__(self, scores: Any, accuracy: float) -> None:
            self.scores, self.accuracy = scores, accuracy

        def summary(self) -> dict[str, float]:
            return self.scores.summary() | {"accuracy": self.accuracy}

    def scored(*args: Any) -> Any:
        accuracy = next(told, None)
        return score(*args) if accuracy is None else Told(score(*args), accuracy)

    def save(folder: Path, checkpoint: ckpt.Checkpoint, **options: Any) -> Path:
        if stop and checkpoint.epoch == 2:
            raise KeyboardInterrupt
        return saved(folder, checkpoint, **options)

    with monkeypatch.context() as patch:
        patch.setattr(module, "_score", scored)
        patch.setattr(ckpt, "save", save)
        return adapt(config, quiet=True)


@pytest.mark.parametrize("layout", ["now", "before"])
def test_the_best_weights_are_those_of_the_epoch_that_the_checkpoint_knows(
    tiny_run: Make, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    """Killed between the best weights of the second epoch and its checkpoint; it is none of the best when done again."""
    settings = ("optim.schedule=constant", "optim.lr=0.01")
    one = tiny_run("small-fpt", *settings, "loop.epochs=1", output="one")
    adapt(one, quiet=True)
    config = tiny_run("small-fpt", *settings, "loop.epochs=3")
    with pytest.raises(KeyboardInterrupt):
        best_of(config, monkeypatch, [0.5, 0.9], stop=True)
    folder = config.output / "checkpoints"
    if layout == "before":  # a version that named the file by its stage alone
        (folder / "best-train-0002.safetensors").unlink()
        (folder / "best-train-0001.safetensors").rename(folder / "best-train.safetensors")
    assert best_of(config, monkeypatch, [0.4, 0.3])["best_epoch"] == 1
    a, b = (load_file(run.output / "model" / "model.safetensors") for run in (config, one))
    assert all(torch.equal(a[name], b[name]) for name in a)


def _stopped(config: AdaptConfig, monkeypatch: pytest.MonkeyPatch) -> Path:
    with pytest.raises(KeyboardInterrupt):
        best_of(config, monkeypatch, [0.5, 0.4], stop=True)
    return config.output


def _without(key: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (file,) = folder.glob("checkpoints/train-*/state.pt")
        state = torch.load(file, weights_only=True)
        (state if key in state else state["extra"]).pop(key)
        torch.save(state, file)

    return change


def _best(change: Callable[[Path], Any]) -> Callable[[Path], Any]:
    return lambda folder: change(folder / "checkpoints" / "best-train-0001.safetensors")


def _halve(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


DAMAGE: dict[str, tuple[str, Callable[[Path], Any]]] = {
    **{
        f"state.pt without {key}": ("train-", _without(key))
        for key in ("optimizer", "rng", "extra", "identity", "rows", "best", "scaler")
    },
    "best weights cut": ("best-train", _best(_halve)),
    "best weights gone": ("best-train", _best(Path.unlink)),
    "best weights a folder": ("best-train", _best(lambda file: (file.unlink(), file.mkdir()))),
    "weights cut": ("train-", lambda folder: _halve(next(folder.glob("checkpoints/train-*/model.safetensors")))),
    **{
        f"config.yaml {name}": ("config.yaml", lambda folder, content=content: (folder / "config.yaml").write_bytes(content))
        for name, content in {
            "empty": b"",
            "a list": b"- 1\n",
            "not UTF-8": b"row: \xff\xfe\n",
            "a section null": b"loop: null\n",
            "out of its bounds": b"data: {mean: [.nan, .nan, .nan]}\n",
            "of aliases": b"a: &a [x,x,x,x,x,x,x,x,x]\n" + b"".join(
                b"%c: &%c [%s]\n" % (98 + i, 98 + i, b",".join([b"*%c" % (97 + i)] * 9)) for i in range(9)
            ),
        }.items()
    },
    **{
        f"result.json {content[:9]}": ("result.json", lambda folder, text=content: (folder / "result.json").write_text(text))
        for content in ("{}", '"x"', "[" * 100_000, "", '{"row": "FPT", "seed": "one", "test": null}', '{"row": 5, "seed": 0}')
    },
    "environment.json": ("environment.json", lambda folder: (
        (folder / "result.json").write_text('{"row": "a", "seed": 0, "test": null}'),
        (folder / "environment.json").write_text("{"),
    )),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_what_is_damaged_in_a_run_folder_is_named_before_training(
    tiny_run: Make, monkeypatch: pytest.MonkeyPatch, made: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, kind: str
) -> None:
    config = tiny_run()
    if "stopped" in made:
        shutil.copytree(made["stopped"], config.output)
    else:
        made["stopped"] = shutil.copytree(_stopped(config, monkeypatch), tmp_path_factory.mktemp("made") / "stopped")
    named, change = DAMAGE[kind]
    change(config.output)
    rows = (config.output / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=named) as caught:
        adapt(config, quiet=True)
    assert "\n" not in str(caught.value)
    assert rows.startswith((config.output / "metrics.jsonl").read_bytes())


@pytest.fixture
def own_pictures(pictures: Path, tmp_path: Path) -> Path:
    return shutil.copytree(pictures, tmp_path / "pictures")


def test_a_finished_run_of_other_data_is_not_the_run_of_these(tiny_run: Make, own_pictures: Path) -> None:
    setting = f"data.source={own_pictures}"
    config = tiny_run("small-fpt", "loop.epochs=1", setting)
    result = adapt(config, quiet=True)
    for file in (own_pictures / "noise").iterdir():  # of other times, and the same
        os.utime(file, (0, 0))
    written = (config.output / "result.json").stat().st_mtime_ns
    assert adapt(config, quiet=True) == result and adapt(config, quiet=True) == result
    assert (config.output / "result.json").stat().st_mtime_ns == written
    for file in (own_pictures / "noise").iterdir():
        shutil.copy(own_pictures / "down" / file.name, file)
    before = contents(config.output)
    with pytest.raises(UserError, match="made from other images"):
        adapt(config, quiet=True)
    assert contents(config.output) == before
    other = adapt(dataclasses.replace(config, overwrite=True), quiet=True)
    assert other["data_fingerprint"] != result["data_fingerprint"]
    shutil.rmtree(own_pictures)
    assert adapt(config, quiet=True) == other


def test_a_finished_run_says_that_its_model_is_gone(finished: AdaptConfig, capsys: pytest.CaptureFixture[str]) -> None:
    adapt(finished, quiet=True)
    assert capsys.readouterr().err == ""
    shutil.rmtree(finished.output / "model")
    adapt(finished, quiet=True)
    assert "its model/ is gone" in capsys.readouterr().err


def test_a_disk_that_is_full_at_the_end_costs_nothing(
    tiny_run: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors import SafetensorError

    config = tiny_run()
    write_config(config.output.parent, config)
    call = ["adapt", "--config", str(config.output.parent / "config.yaml")]

    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    real = importlib.import_module("safetensors.torch").save_file

    def save_file(tensors: Any, path: Any, *rest: Any) -> None:
        real(tensors, path, *rest) if "checkpoints" in str(path) else full()

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", save_file)
        assert cli.main(call) == 1
    assert "the disk is full" in capsys.readouterr().err
    assert not (config.output / "model").exists() and not list(config.output.glob(".model*"))
    rows = (config.output / "metrics.jsonl").read_bytes()
    assert cli.main(call) == 0
    assert (config.output / "metrics.jsonl").read_bytes() == rows and (config.output / "model").is_dir()


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_at_the_next_step_unless_it_is_ignored(number: int) -> None:
    for before, expected in ((signal.SIG_DFL, True), (signal.SIG_IGN, False)):
        usual = signal.signal(number, before)
        try:
            with catch_signals() as stopped:
                os.kill(os.getpid(), number)
            assert stopped.is_set() is expected and signal.getsignal(number) == before
        finally:
            signal.signal(number, usual)


def test_a_terminal_that_is_closed_ends_in_a_checkpoint(tiny_run: Make) -> None:
    """The system sends SIGHUP, and nothing more can be shown."""
    import pty
    import time

    config = tiny_run("small-fpt", "loop.epochs=3000")
    write_config(config.output.parent, config)
    command = [sys.executable, "-m", "crossalign.cli", "adapt", "--config", str(config.output.parent / "config.yaml")]
    process, terminal = pty.fork()
    if not process:
        os.execv(command[0], command)
    metrics = config.output / "metrics.jsonl"
    deadline = time.monotonic() + 100
    while not (metrics.exists() and metrics.stat().st_size > 20_000) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.close(terminal)
    _, status = os.waitpid(process, 0)
    assert os.waitstatus_to_exitcode(status) == 130
    checkpoint = ckpt.latest(config.output / "checkpoints")
    assert checkpoint is not None and json.loads(metrics.read_text().splitlines()[-1])["step"] <= checkpoint.extra["rows"] * 100
