"""The loop through its first verb: exact resume, accumulation, signals, what stops a run, and what a run leaves."""

from __future__ import annotations

import dataclasses
import importlib
import json
import multiprocessing
import os
import random
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file

from crossalign import cli
from crossalign.config import AdaptConfig
from crossalign.core.errors import UserError
from crossalign.models.classifier.model import ImageClassifier
from crossalign.runs.folder import write_config
from crossalign.training import checkpoint as ckpt
from crossalign.training.loop import Diverged, Interrupted
from crossalign.verbs.adapt.job import adapt

Make = Callable[..., AdaptConfig]
CLOCK = ("seconds", "examples_per_second")


def rows(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what a clock measured."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in CLOCK} for line in lines]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def assert_same_run(one: Path, other: Path) -> None:
    assert rows(one) == rows(other)
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert (one / "predictions.parquet").read_bytes() == (other / "predictions.parquet").read_bytes()


def run_quietly(config: AdaptConfig) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    adapt(config, quiet=True)


def in_child(config: AdaptConfig) -> multiprocessing.Process:
    child = multiprocessing.get_context("fork").Process(target=run_quietly, args=(config,), daemon=True)  # type: ignore[attr-defined]
    child.start()
    return child  # type: ignore[no-any-return]


def wait_for_rows(folder: Path, count: int, child: multiprocessing.Process) -> None:
    file = folder / "metrics.jsonl"
    while child.is_alive() and not (file.exists() and len(file.read_bytes().splitlines()) >= count):
        time.sleep(0.001)


@pytest.mark.parametrize("recipe", ["small-fpt-mmd", "small-lora"])
def test_a_run_killed_at_any_step_resumes_to_the_same_bits(tiny_run: Make, recipe: str) -> None:
    settings = ("head.dropout=0.1", "loop.checkpoint_minutes=0")
    whole = tiny_run(recipe, *settings, output="whole")
    adapt(whole, quiet=True)
    killed = tiny_run(recipe, *settings, output="killed")
    kills = 0
    for _ in range(3):
        done = len(rows(killed.output)) if (killed.output / "metrics.jsonl").exists() else 0
        child = in_child(killed)
        wait_for_rows(killed.output, done + random.randint(1, 6), child)
        if child.is_alive():
            os.kill(child.pid, signal.SIGKILL)  # type: ignore[arg-type]
            kills += 1
        child.join()
    assert kills, "every child finished before it could be killed"
    adapt(killed, quiet=True)
    assert_same_run(whole.output, killed.output)


def test_images_kept_as_files_give_the_same_run_and_resume(tiny_run: Make) -> None:
    whole = tiny_run("small-fpt-mmd", "loop.checkpoint_minutes=0", output="whole")
    adapt(whole, quiet=True)
    kept = tiny_run("small-fpt-mmd", "loop.checkpoint_minutes=0", "data.cache=encoded", output="kept")
    child = in_child(kept)
    wait_for_rows(kept.output, 4, child)
    os.kill(child.pid, signal.SIGKILL)  # type: ignore[arg-type]
    child.join()
    assert child.exitcode == -signal.SIGKILL
    adapt(kept, quiet=True)
    assert_same_run(whole.output, kept.output)


def test_a_signal_saves_and_the_same_command_goes_on(tiny_run: Make) -> None:
    whole = tiny_run("small-full", output="whole")
    adapt(whole, quiet=True)
    stopped = tiny_run("small-full", output="stopped")
    child = in_child(stopped)
    wait_for_rows(stopped.output, 2, child)
    os.kill(child.pid, signal.SIGTERM)  # type: ignore[arg-type]
    child.join()
    assert child.exitcode == 1  # Interrupted reached the top of the child
    assert ckpt.latest(stopped.output / "checkpoints") is not None
    assert not (stopped.output / "result.json").exists()
    adapt(stopped, quiet=True)
    assert_same_run(whole.output, stopped.output)


def test_ctrl_c_on_the_command_line_exits_with_130(tiny_run: Make, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_run(output="line")
    written = config.output.parent / "config.yaml"
    write_config(config.output.parent, config)

    def press() -> None:
        while not (config.output / "metrics.jsonl").exists() or not rows(config.output):
            time.sleep(0.001)
        os.kill(os.getppid(), signal.SIGINT)

    finger = multiprocessing.get_context("fork").Process(target=press, daemon=True)  # type: ignore[attr-defined]
    finger.start()
    code = cli.main(["adapt", "--config", str(written)])
    finger.join()
    assert code == 130
    assert "goes on from there" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["fpt", "full"])
def test_accumulation_changes_nothing(tiny_run: Make, method: str) -> None:
    whole = tiny_run(f"small-{method}", output="whole")
    parts = tiny_run(f"small-{method}", "loop.accumulation=4", output="parts")
    one, other = adapt(whole, quiet=True), adapt(parts, quiet=True)
    assert one["best_epoch"] == other["best_epoch"]
    for a, b in zip(rows(whole.output), rows(parts.output), strict=True):
        assert (a.pop("stage"), a.pop("split")) == (b.pop("stage"), b.pop("split"))
        assert a == pytest.approx(b, rel=2e-3, abs=1e-5)
    a, b = weights(whole.output), weights(parts.output)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-2, atol=1e-4)


def test_metrics_are_those_of_the_whole_set_whatever_the_batches(tiny_run: Make) -> None:
    small = adapt(tiny_run("small-fpt", "loop.eval_batch_size=7", output="a"), quiet=True)
    large = adapt(tiny_run("small-fpt", "loop.eval_batch_size=500", output="b"), quiet=True)
    for split in ("validation", "test"):
        assert small[split]["accuracy"] == large[split]["accuracy"]
        assert small[split]["loss"] == pytest.approx(large[split]["loss"], rel=1e-6)


def test_what_a_run_leaves(tiny_run: Make) -> None:
    config = tiny_run("small-fpt-mmd")
    result = adapt(config, quiet=True, recipe="small-fpt-mmd")
    folder = config.output
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    assert saved["loop"]["device"] == "cpu" and saved["data"]["mean"] is not None
    assert json.loads((folder / "result.json").read_text()) == result
    table = pq.read_table(folder / "predictions.parquet").to_pydict()
    right = np.mean(np.array(table["label"]) == np.array(table["predicted"]))
    assert right == pytest.approx(result["test"]["accuracy"])
    confusion = np.array(result["test"]["confusion"])
    assert confusion.sum() == result["test"]["n"] and np.trace(confusion) / confusion.sum() == pytest.approx(right)
    samples = pq.read_table(folder / "samples.parquet").to_pydict()
    assert samples["png"][0].startswith(b"\x89PNG")
    stages = {row["stage"] for row in rows(folder)}
    assert stages == {"align", "train"}
    assert {"heldout_mmd", "std", "effective_rank", "norm_ratio"} <= result["alignment"]["after"].keys()
    best = max(r["accuracy"] for r in rows(folder) if r["split"] == "validation" and r["stage"] == "train")
    assert result["validation"]["accuracy"] == best
    model = ImageClassifier.from_pretrained(folder / "model")
    again = model.predict([Path(p) for p in sorted((Path(config.data.source) / "down").glob("*.png"))[:2]])
    assert again[0][0]["label"] in model.spec.classes


def test_a_finished_run_is_returned_and_the_test_set_not_scored_again(tiny_run: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = importlib.import_module("crossalign.verbs.adapt.job")
    sizes: list[int] = []
    score = module.score
    monkeypatch.setattr(module, "score", lambda m, b, labels, a: (sizes.append(len(labels)), score(m, b, labels, a))[1])
    config = tiny_run()
    first = adapt(config, quiet=True)
    assert sizes.count(first["test"]["n"]) == 1 and sizes[-1] == first["test"]["n"]
    count = len(sizes)
    assert adapt(config, quiet=True) == first
    assert len(sizes) == count


def test_a_seed_decides_everything_and_another_changes_it(tiny_run: Make) -> None:
    one, two, three = tiny_run(output="1"), tiny_run(output="2"), tiny_run(output="3", seed=1)
    for config in (one, two, three):
        adapt(config, quiet=True)
    assert_same_run(one.output, two.output)
    assert rows(three.output) != rows(one.output)
    assert (
        pq.read_table(three.output / "predictions.parquet")["label"]
        == pq.read_table(one.output / "predictions.parquet")["label"]
    )


def test_divergence_stops_with_a_diagnosis(tiny_run: Make) -> None:
    with pytest.raises(Diverged, match=r"loss.*stage 'train' stopped being a number.*Lower the learning rate \(1e\+20\)"):
        adapt(tiny_run("small-full", "optim.lr=1e20", "optim.clip=0", "optim.schedule=constant"), quiet=True)


def test_a_folder_is_never_mixed_or_shared(tiny_run: Make, tmp_path: Path) -> None:
    config = tiny_run()
    adapt(config, quiet=True)
    other = dataclasses.replace(config, seed=7)
    with pytest.raises(UserError, match=r"another configuration \(seed is 0 there and 7 here\)"):
        adapt(other, quiet=True)
    assert adapt(dataclasses.replace(other, overwrite=True), quiet=True)["seed"] == 7
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="not empty and not a run folder"):
        adapt(tiny_run(output="mine", overwrite=True), quiet=True)
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_only_what_a_run_measured_may_be_left_open_when_it_is_resumed(tiny_run: Make) -> None:
    config = tiny_run("small-fpt", "data.limit_train=40", row="")
    first = adapt(config, quiet=True)
    assert first["row"] == "FPT"
    assert adapt(config, quiet=True) == first  # no row given, mean and std not given
    with pytest.raises(UserError, match=r"data\.limit_train is 40 there and None here"):
        adapt(dataclasses.replace(config, data=dataclasses.replace(config.data, limit_train=None)), quiet=True)


def test_overwrite_spares_a_run_of_the_same_configuration(tiny_run: Make) -> None:
    config = tiny_run(overwrite=True)
    adapt(config, quiet=True)
    written = (config.output / "result.json").stat().st_mtime_ns
    adapt(config, quiet=True)
    assert (config.output / "result.json").stat().st_mtime_ns == written
    assert "overwrite" not in yaml.safe_load((config.output / "config.yaml").read_text())


def test_a_checkpoint_of_other_images_is_not_resumed(tiny_run: Make, pictures: Path, tmp_path: Path) -> None:
    import shutil

    mine = shutil.copytree(pictures, tmp_path / "mine")
    config = tiny_run("small-fpt", "loop.epochs=300", f"data.source={mine}")
    child = in_child(config)
    wait_for_rows(config.output, 30, child)
    child.terminate()
    child.join()
    for file in (mine / "noise").iterdir():
        shutil.copy(mine / "down" / file.name, file)
    with pytest.raises(UserError, match="made from other images"):
        adapt(config, quiet=True)


def test_the_largest_seed_trains(tiny_run: Make) -> None:
    adapt(tiny_run("small-fpt-mmd", "seed=4294967295", "loop.epochs=1", "align.epochs=1"), quiet=True)


def test_steps_of_alignment_that_have_one_image_alone_are_counted(tiny_run: Make, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ("align.epochs=2", "align.batch_size=8", "data.limit_train=17", "loop.batch_size=8", "loop.epochs=1")
    assert adapt(tiny_run("small-fpt-mmd", *settings), quiet=True)["alignment"]["skipped_steps"] == 2
    assert "alignment skips 2 steps" in capsys.readouterr().err


def test_without_the_test_score_validation_is_reported(tiny_run: Make, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_run(score_test=False)
    write_config(config.output.parent, config)
    assert cli.main(["adapt", "--config", str(config.output.parent / "config.yaml")]) == 0
    assert "validation accuracy" in capsys.readouterr().out
    assert not (config.output / "predictions.parquet").exists()


def test_two_processes_cannot_write_one_folder(tiny_run: Make) -> None:
    config = tiny_run("small-fpt", "loop.epochs=500")
    child = in_child(config)
    wait_for_rows(config.output, 1, child)
    try:
        with pytest.raises(UserError, match="another process is running"):
            adapt(config, quiet=True)
    finally:
        child.kill()
        child.join()


def test_a_full_disk_keeps_the_last_checkpoint_whole(tmp_path: Path) -> None:
    def point(step: int, size: int) -> ckpt.Checkpoint:
        return ckpt.Checkpoint("train", 0, step, {"w": torch.zeros(size)}, {}, ckpt.rng_state(), {"rows": step})

    ckpt.save(tmp_path, point(1, 1000))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(ckpt.DiskFull, match="the checkpoint before it is whole"):
            ckpt.save(tmp_path, point(2, 1_000_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    saved = ckpt.latest(tmp_path)
    assert saved is not None and saved.step == 1 and saved.model["w"].numel() == 1000
    assert [p.name for p in tmp_path.iterdir()] == ["train-0000-0000001"]


def test_a_default_batch_larger_than_the_set_is_the_set(
    tiny_run: Make, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, file in enumerate(sorted(pictures.rglob("*.png"))[::4][:26]):
        (tmp_path / "few" / file.parent.name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "few" / file.parent.name / f"{number}.png").write_bytes(file.read_bytes())
    settings = [f"data.source={tmp_path / 'few'}", "loop.epochs=2", "loop.batch_size=64", "align.metric=mse"]
    for _ in range(2):  # the second time it is finished
        result = adapt(tiny_run("small-fpt", *settings, "align.batch_size=32"))
    assert "one batch of 17 images, where --loop.batch-size is 64 by default" in capsys.readouterr().out
    assert result["epochs"] == 2 and "17 train" in result["data"]
    for key in ("loop", "align"):
        with pytest.raises(UserError, match=f"--{key}.batch-size 40 is larger than the 17 training images"):
            adapt(tiny_run("small-fpt", *settings, f"{key}.batch_size=40", output=key))


def test_too_little_disk_is_said_before_training(tiny_run: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1_000_000))
    with pytest.raises(UserError, match=r"need up to \d+ MB, but 1 MB are free"):
        adapt(tiny_run(), quiet=True)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["loop.batch_size=5000"], "larger than the"),
        (["embedder.patch=3"], "does not divide"),
        (["data.source=/nowhere"], "/nowhere"),
        (["backbone.ref=/nowhere"], "/nowhere"),
        (["align.metric=mdd"], "mmd"),
        (["align.metric=mmd", "align.batch_size=1"], "--align.batch-size is 1; it must be at least 2"),
        (["align.metric=mmd", "align.epochs=0"], "--align.epochs is 0; it must be at least 1"),
        (["data.mean=[0.5]"], "--data.mean has 1 values"),
        (["loop.precision=fp16"], "fp16"),
        (["loop.log_every=0"], "--loop.log-every is 0"),
        (["loop.accumulation=11"], "--loop.accumulation"),
        (["align.metric=mmd", "align.target=corpus", "align.corpus=/nowhere.txt"], "/nowhere.txt"),
    ],
)
def test_bad_settings_stop_before_training(tiny_run: Make, tmp_path: Path, settings: list[str], says: str) -> None:
    with pytest.raises(UserError) as caught:
        adapt(tiny_run("small-fpt", *settings), quiet=True)
    assert says in str(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("metrics.jsonl"))


def test_interrupted_is_no_user_error() -> None:
    assert not issubclass(Interrupted, UserError)


@pytest.mark.parametrize("metric", ["mse", "cosine", "mmd", "coral", "sinkhorn", "otdd"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_alignment_moves_the_embeddings_towards_text(tiny_run: Make, metric: str, level: str) -> None:
    settings = (f"align.metric={metric}", f"align.level={level}", "align.epochs=15", "align.lr=5e-4", "loop.epochs=1")
    config = tiny_run("small-fpt", *settings)
    if metric == "otdd" and level == "token":
        with pytest.raises(UserError, match=r"set --align\.level sequence"):
            adapt(config, quiet=True)
        return
    found = adapt(config, quiet=True)["alignment"]
    steps = [r["divergence"] for r in rows(config.output) if r["stage"] == "align" and r["split"] == "train"]
    assert steps[-1] < 0.8 * steps[0]
    if metric == "mmd":
        assert found["after"]["heldout_mmd"] < found["before"]["heldout_mmd"]


def test_alignment_leaves_the_backbone_alone_and_the_published_mmd_is_orcas(tiny_run: Make) -> None:
    from crossalign.alignment import mmd, mmd_orca
    from crossalign.recipes import get_recipe
    from crossalign.verbs.adapt.alignment import find_divergence

    assert find_divergence(get_recipe("cmda-fpt-mmd").make()) is mmd_orca
    assert find_divergence(get_recipe("small-fpt-mmd").make()) is mmd
    with_stage, without = tiny_run("small-fpt-mmd", output="a"), tiny_run("small-fpt", output="b")
    for config in (with_stage, without):
        adapt(config, quiet=True)
    first = [next(r for r in rows(c.output) if r["stage"] == "train") for c in (with_stage, without)]
    assert first[0]["loss"] != first[1]["loss"]


def test_the_test_set_is_scored_with_the_best_validation_epoch(tiny_run: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ("optim.schedule=constant", "optim.lr=0.01")  # an epoch is then the same, however many follow
    first_epoch = tiny_run("small-fpt", *settings, "loop.epochs=1", output="one")
    adapt(first_epoch, quiet=True)
    accuracies = iter([0.9, 0.3, 0.3])
    module = importlib.import_module("crossalign.verbs.adapt.job")
    score = module._score

    class Told:
        """Scores that say another accuracy; validation falls after the first epoch."""

        def __init__(self, scores: Any, accuracy: float) -> None:
            self.scores, self.accuracy = scores, accuracy

        def summary(self) -> dict[str, float]:
            return self.scores.summary() | {"accuracy": self.accuracy}

    def told(*args: Any) -> Any:
        accuracy = next(accuracies, None)
        return score(*args) if accuracy is None else Told(score(*args), accuracy)

    monkeypatch.setattr(module, "_score", told)
    three = tiny_run("small-fpt", *settings, "loop.epochs=3", output="three")
    assert adapt(three, quiet=True)["best_epoch"] == 1
    assert (three.output / "predictions.parquet").read_bytes() == (first_epoch.output / "predictions.parquet").read_bytes()
    a, b = weights(three.output), weights(first_epoch.output)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_means_of_sequences_leave_the_scale_of_tokens_free(tiny_run: Make) -> None:
    from crossalign.alignment import mmd
    from crossalign.verbs.adapt.alignment import _sample

    x = torch.randn(16, 8, 32)
    spread = 10 * torch.randn(16, 8, 32)
    louder = x + spread - spread.mean(1, keepdim=True)  # the same mean of each sequence, other tokens
    text = torch.randn(128, 32)

    def distance(level: str, images: torch.Tensor) -> float:
        config = tiny_run("small-fpt-mmd", f"align.level={level}")
        return float(mmd(_sample(images, config, torch.Generator().manual_seed(0)), text))

    assert distance("sequence", louder) == pytest.approx(distance("sequence", x), abs=1e-4)
    assert distance("token", louder) > distance("token", x) + 0.1
