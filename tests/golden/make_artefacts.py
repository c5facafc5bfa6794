"""How the archives in artefacts/ were made: by version 0.1.0 (commit 9d904fc), once. They are not to be made anew.

They stand for what lies on users' disks, so that later versions must open it: this file says how it came there, and no later
version runs it, since it reaches into the package to stop a search at a certain job.

    git worktree add ../first 9d904fc
    OMP_NUM_THREADS=1 PYTHONPATH=../first/src python tests/golden/make_artefacts.py

Everything runs in a temporary folder and by relative paths; then what is the machine's own (paths, processor, command, commit)
is replaced by neutral words, and archives are written only if nothing of it is left. expected.json holds what the archives
must answer.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import re
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from stored import (
    CLASSIFIERS,
    CONTINUED,
    EVALUATE,
    FEATURES,
    IDS,
    MEASURE,
    PREPARE,
    SEARCH,
    STUDY,
    answers,
    language_logits,
    plain_result,
)

import crossalign
from crossalign import cli
from crossalign.training.stops import Paused

HERE = Path(__file__).parent
ARCHIVES = {
    "inputs": ("llama", "vit", "images", "pairs.parquet", "text.txt", "tasks.jsonl", "evals", "space.yaml"),
    "classifiers": ("runs/fpt", "runs/lora", "runs/full", "runs/none", "runs/vit", "unfinished/adapt"),
    "language": ("corpus", "features.safetensors", "runs/pretrain", "unfinished/pretrain", "runs/finetune",
                 "unfinished/finetune", "measured"),
    "searches": ("searches",),
    "study": ("study",),
}  # fmt: skip
"""What each archive holds."""
CHANGED = 1_700_000_000
"""Time of change of every file, in seconds."""
WORDS = "the cat sat on a mat while two red dogs ran over wet grass and birds sang in old trees"
JOBS = 3
"""Jobs of a search before it is cut off."""


def main() -> None:
    assert crossalign.__version__ == "0.1.0", "only version 0.1.0 writes these"
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        os.environ["CROSSALIGN_CACHE"] = str(Path(folder) / "cache")
        write_inputs()
        expected = write_artefacts()
        neutral(Path(folder))
        (HERE / "artefacts").mkdir(exist_ok=True)
        for name, paths in ARCHIVES.items():
            archive(HERE / "artefacts" / f"{name}.tar.xz", paths)
        parts = [f' "{key}": {json.dumps(rounded(value), ensure_ascii=False)}' for key, value in expected.items()]
        (HERE / "artefacts" / "expected.json").write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")


def write_inputs() -> None:
    """A tiny Llama and a tiny vision transformer, digits as pictures, pairs, a text, instructions, questions and a space."""
    from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTImageProcessor, ViTModel

    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=31, num_key_value_heads=2, **shape)).save_pretrained("llama")
    shape = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    ViTModel(ViTConfig(image_size=8, patch_size=4, **shape), add_pooling_layer=False).save_pretrained("vit")
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained("vit")
    random = np.random.default_rng(0)
    Path("images").mkdir()
    for number, digit in enumerate(load_digits().images[-10:]):
        Image.fromarray((digit * 255 / 16).round().astype(np.uint8)).save(f"images/{number}.png")
    pictures, captions = [], []
    for _ in range(48):
        buffer, colour = io.BytesIO(), random.integers(0, 256, 3)
        Image.new("RGB", (4, 4), tuple(map(int, colour))).save(buffer, "PNG")
        pictures.append(buffer.getvalue())
        captions.append(f"{('dark', 'pale')[int(colour.sum() > 380)]} {('red', 'green', 'blue')[int(colour.argmax())]} field")
    ids = [f"picture {i}" for i in range(48)]
    splits = ["train"] * 32 + ["validation"] * 8 + ["test"] * 8
    pq.write_table(pa.table({"id": ids, "image": pictures, "caption": captions, "split": splits}), "pairs.parquet")
    words = WORDS.split()
    lines = (" ".join(random.choice(words, size=random.integers(4, 9))) for _ in range(240))
    Path("text.txt").write_text("".join(f"{line}.\n" for line in lines), encoding="utf-8")
    tasks = [{"prompt": f"Add {i} and {i}. ", "completion": f"The sum is {2 * i}."} for i in range(40)]
    Path("tasks.jsonl").write_text("".join(json.dumps(task) + "\n" for task in tasks), encoding="utf-8")
    copa = [
        {"id": i, "premise": f"My {words[i]} is {words[i + 1]}.", "choice1": f"A {words[-i]}.", "choice2": "Two old trees.",
         "question": ("cause", "effect")[i % 2], "label": i % 2} for i in range(6)
    ]  # fmt: skip
    Path("evals").mkdir()
    Path("evals/copa_dev_balanced.jsonl").write_text("".join(json.dumps(row) + "\n" for row in copa), encoding="utf-8")
    Path("space.yaml").write_text("optim.lr: {low: 1.0e-3, high: 1.0e-1, log: true}\noptim.weight_decay: [0.0, 0.1]\n")
    for path in Path().rglob("*"):
        os.utime(path, (CHANGED, CHANGED))


def write_artefacts() -> dict[str, Any]:
    """All that the archives hold; returns what expected.json holds."""
    expected: dict[str, Any] = {"classifiers": {}, "results": {}}
    for name, call in CLASSIFIERS.items():
        command(*call, "--output", f"runs/{name}")
        expected["classifiers"][name] = answers(f"runs/{name}/model")
        expected["results"][f"runs/{name}"] = plain_result(Path("runs") / name)
    command(*FEATURES)
    command(*PREPARE)
    for name, call in CONTINUED.items():
        if name in ("pretrain", "finetune"):
            command(*call, "--output", f"runs/{name}")
        else:
            command(*call, "--output", f"whole/{name}")
        folder = Path("runs" if name in ("pretrain", "finetune") else "whole") / name
        expected["results"][name] = plain_result(folder)
        stopped(call[0], folder / "config.yaml", Path("unfinished") / name)
    expected["logits"] = {name: language_logits(f"runs/{name}/model") for name in ("pretrain", "finetune")}
    expected["ids"] = IDS
    command(*EVALUATE)
    expected["evaluation"] = json.loads(Path("runs/finetune/evaluation/results.json").read_text())["tasks"]
    command(*MEASURE)
    expected["measure"] = json.loads(Path("measured/measure.json").read_text())
    expected["scores"] = {name: values.tolist() for name, values in load_file("measured/scores.safetensors").items()}
    with in_this_process(None):
        command(*SEARCH, "--output", "searches/whole")
    with in_this_process(JOBS):
        command(*SEARCH, "--output", "searches/cut", code=130)
    command(*STUDY)
    return expected


def command(*arguments: str, code: int = 0) -> None:
    sys.argv = ["crossalign", *arguments]
    assert cli.main(list(arguments)) == code, arguments


def stopped(verb: str, config_file: Path, output: Path) -> None:
    """The run of a configuration, stopped after the first of its epochs or evaluations."""
    kind = {"adapt": crossalign.AdaptConfig, "pretrain": crossalign.PretrainConfig, "finetune": crossalign.FinetuneConfig}[verb]
    from crossalign.training.run import read_config

    config = dataclasses.replace(read_config(kind(), config_file), output=output)
    try:
        getattr(crossalign, verb)(config, quiet=True, until=1)
    except Paused:
        return
    raise AssertionError("it was to stop")


@contextlib.contextmanager
def in_this_process(jobs: int | None) -> Iterator[None]:
    """Searches train here, one job after the other, and stop after so many as if the disk were full."""
    import crossalign.tune  # noqa: F401
    from crossalign.search import drive, work

    tune: Any = sys.modules["crossalign.tune"]
    train, pool, done = drive.train, tune._pool, list[str]()

    @contextlib.contextmanager
    def one_thread(config: Any) -> Iterator[Any]:
        with ThreadPoolExecutor(1) as executor:
            yield drive.Pool(executor, lambda: 1)

    def counted(job: Any) -> Any:
        if job.config.output.name != "base":
            done.append(job.config.output.name)
        return work.Outcome(stopped="stopped here") if jobs is not None and len(done) > jobs else train(job)

    drive.train, tune._pool = counted, one_thread
    try:
        yield
    finally:
        drive.train, tune._pool = train, pool


def neutral(root: Path) -> None:
    """Replace what is the machine's own, and make all times of change the same."""
    for path in sorted(root.rglob("*")):
        if path.suffix in (".json", ".jsonl", ".yaml", ".md", ".log", ".txt") and path.is_file() and "cache" not in path.parts:
            text = path.read_text(encoding="utf-8").replace(f"{root.resolve()}/", "")
            path.write_text(text, encoding="utf-8")
        if path.name == "environment.json":
            facts = json.loads(path.read_text(encoding="utf-8"))
            facts |= {"platform": "Linux", "cpu": "a processor", "cpu_features": [], "cores": 1, "memory_bytes": 8 * 2**30}
            facts |= {"git_commit": None, "git_changed": None, "command": "crossalign", "started": "2025-11-29T12:00:00+00:00"}
            path.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        finished = path.name == "checkpoints" and (path.parent / "result.json").is_file() and path.parent.name != "fpt"
        if finished or path.name in ("report.html", "figures"):  # large, and what nothing reads any more
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    own = re.compile(rb"/(work|tmp|root|home)\b|" + re.escape(str(root.resolve()).encode()))
    for path in root.rglob("*"):
        if path.is_file() and "cache" not in path.parts and (hit := own.search(path.read_bytes())):
            raise AssertionError(f"{path} holds {hit[0]!r}")


def rounded(value: Any) -> Any:
    """Numbers in seven digits, which is more than is compared."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return float(f"{value:.7g}") if isinstance(value, float) else value


def archive(file: Path, paths: tuple[str, ...]) -> None:
    """An archive of folders and files below the current folder, nobody's own and in a fixed order."""

    def plain(info: tarfile.TarInfo) -> tarfile.TarInfo:
        info.uid = info.gid = 0
        info.uname = info.gname = ""
        info.mtime = CHANGED
        return info

    with tarfile.open(file, "w:xz", preset=9) as whole:
        for path in paths:
            whole.add(path, filter=plain)


if __name__ == "__main__":
    main()
