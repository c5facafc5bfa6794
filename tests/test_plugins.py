"""The package of docs/extend.md, installed: its parts reach the command line and the workers of studies and searches."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_docs import ROOT, blocks, commands

from crossalign import cli
from crossalign.alignment import divergences, similarities
from crossalign.core import registry
from crossalign.data.images import sources as image_sources
from crossalign.data.pairs import sources as pair_sources
from crossalign.data.text.tokenizer import save_tokenizer, train_tokenizer
from crossalign.features.store import read_metadata
from crossalign.models.language.families import FAMILIES
from crossalign.models.vision.sources import OPENERS

PAGE = ROOT / "docs" / "extend.md"
MODULE = "crossalign_shades"
REGISTRIES = (divergences, similarities, FAMILIES, OPENERS, image_sources.SOURCES, pair_sources.SOURCES)
PHI = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
TINY = (
    "loop.steps=4", "loop.evaluate_every=2", "loop.batch_size=4", "loop.log_every=1", "loop.precision=fp32", "loop.device=cpu",
    "data.block=32", "align.every=2", "align.batch_size=16", "align.max_length=12", "align.held_out=8", "tracking.mlflow=false",
)  # fmt: skip

Command = Callable[..., int]


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    """``command(verb, *options, settings=…)``: the page's command of that verb, with its model tiny, and more at its end.

    The package is built and installed as pip does it, and nothing of it is imported but by its entry points.
    """
    folder = tmp_path_factory.mktemp("plugin")
    (folder / "package").mkdir()
    (project,) = blocks(PAGE, "toml")
    (module,) = (block for block in blocks(PAGE, "python") if "VisionBody(" in block)
    (folder / "package" / "pyproject.toml").write_text(project)
    (folder / "package" / f"{MODULE}.py").write_text(module)
    pip = ["install", "--quiet", "--disable-pip-version-check", "--no-index", "--no-deps", "--no-build-isolation"]
    target = folder / "installed"
    subprocess.run([sys.executable, "-m", "pip", *pip, "--target", target, folder / "package"], check=True)

    (folder / "phi").mkdir()
    tasks = [{"prompt": f"Add {i} and {i}. ", "completion": f"It is {2 * i}."} for i in range(40)]
    tokenizer = train_tokenizer([json.dumps(tasks)], 300)
    save_tokenizer(tokenizer, folder / "phi")
    shape = {"model_type": "phi", "vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 0, **PHI}
    (folder / "phi" / "config.json").write_text(json.dumps(shape))
    (folder / "tasks.jsonl").write_text("\n".join(map(json.dumps, tasks)))

    def run(verb: str, *options: str, settings: tuple[str, ...] = ()) -> int:
        shown = next(line for line in commands(PAGE) if line.startswith(f"crossalign {verb} "))
        words = shlex.split(shown.replace("hf:microsoft/phi-1_5", f"random:{folder / 'phi'}"))[1:]
        end = words.index("--set") if settings else len(words)
        return cli.main([*words[:end], *options, *words[end:], *settings])

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(target)
        patch.chdir(folder)
        patch.setattr(registry, "_loaded", set())
        patch.setattr(registry, "_failures", {})
        for each in REGISTRIES:
            patch.setattr(each, "_entries", dict(each._entries))
        assert MODULE not in sys.modules
        yield run
        sys.modules.pop(MODULE, None)


def results(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(file.read_text()) for file in sorted(folder.rglob("result.json"))]


def test_its_parts_reach_the_command_line(command: Command, tmp_path: Path) -> None:
    assert command("features", "--output", str(tmp_path / "colours.safetensors"), "--device", "cpu") == 0
    facts = read_metadata(tmp_path / "colours.safetensors")
    assert facts["teacher"] == "colours:4" and "shades 400" in facts["pairs"]

    few = ["--permutations", "19", "--groups", "4", "--max-length", "12"]
    assert command("measure", *few, "--device", "cpu", "--output", str(tmp_path / "measure")) == 0
    assert "distance-correlation" in (tmp_path / "measure" / "measure.md").read_text()

    short = ["--align.epochs", "1", "--align.sequences", "100", "--align.sequence-length", "8", "--loop.epochs", "1"]
    same = ["--loop.precision", "fp32", "--loop.device", "cpu", "--tracking.no-mlflow", "--output", str(tmp_path / "adapt")]
    assert command("adapt", *short, *same) == 0
    (adapted,) = results(tmp_path / "adapt")
    assert adapted["align"] == "energy" and adapted["data"].startswith("shades")
    assert sys.modules[MODULE].paint(2)[1].tolist() == [0, 1]


def test_its_parts_reach_the_workers_of_a_study(command: Command, tmp_path: Path) -> None:
    assert command("reproduce", "--seeds", "1", "--output", str(tmp_path), settings=TINY) == 0
    aligned, baseline = results(tmp_path)
    assert (aligned["align"], baseline["align"]) == ("distance-correlation", "none")
    assert aligned["teacher"] == "colours:4" and aligned["backbone"].endswith("phi")
    assert 0 < aligned["held_out"]["held_out_cka-linear-debiased"] <= 1


def test_its_parts_reach_the_workers_of_a_search(command: Command, tmp_path: Path) -> None:
    options = ["--trials", "2", "--rungs", "1", "--seeds", "0", "--tracking.no-mlflow", "--output", str(tmp_path)]
    assert command("tune", *options, settings=TINY[:-1]) == 0
    found = json.loads((tmp_path / "search.json").read_text())
    assert [trial["state"] for trial in found["trials"]] == ["complete", "complete"]
