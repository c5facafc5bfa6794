"""One process and two give the same losses, metrics and weights."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from crossalign.config import AdaptConfig
from crossalign.core.errors import UserError
from crossalign.runs.folder import write_config
from crossalign.training.sharding import shard
from crossalign.verbs.adapt.job import adapt


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def launch(file: Path, processes: int = 2) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", f"--master-port={free_port()}"]
    done = subprocess.run(
        [*command, "--master-addr=127.0.0.1", "-m", "crossalign.cli", "adapt", "--config", str(file)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("recipe", ["small-full-mmd"])
def test_two_processes_give_what_one_gives(tiny_run: Callable[..., AdaptConfig], tmp_path: Path, recipe: str) -> None:
    # 11 divides neither the set nor into two: the last batch is partial and the shares are unequal.
    settings = ("loop.batch_size=11", "loop.accumulation=2", "loop.epochs=2", "loop.device=cpu")
    alone, pair = tiny_run(recipe, *settings, output="alone"), tiny_run(recipe, *settings, output="pair")
    adapt(alone, quiet=True)
    write_config(tmp_path / "file", pair)
    launch(tmp_path / "file" / "config.yaml")
    one, two = (
        [json.loads(line) for line in (config.output / "metrics.jsonl").read_text().splitlines()] for config in (alone, pair)
    )
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        assert (a["stage"], a["split"], a["step"]) == (b["stage"], b["split"], b["step"])
        for name in a.keys() - {"stage", "split", "seconds", "examples_per_second"}:
            assert a[name] == pytest.approx(b[name], rel=2e-3, abs=2e-5), (name, a, b)
    weights_one, weights_two = (load_file(config.output / "model" / "model.safetensors") for config in (alone, pair))
    for name, tensor in weights_one.items():
        torch.testing.assert_close(weights_two[name], tensor, rtol=1e-2, atol=1e-4)
    results = [json.loads((config.output / "result.json").read_text()) for config in (alone, pair)]
    assert results[0]["test"]["confusion"] == results[1]["test"]["confusion"]


def test_a_model_whose_blocks_are_not_known_is_not_shared_out() -> None:
    """Sharded at its root alone it would be gathered whole in every pass, which is what --loop.shard is to spare."""
    with pytest.raises(UserError, match=r"and Sequential has no list of as many blocks .*: leave --loop\.shard out"):
        shard(torch.nn.Sequential(torch.nn.Linear(2, 2)), torch.device("cpu"))
