"""What the fuzzers work on: the stored artefacts, and calls of every verb among them, all quick enough for thousands."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from damage import restore
from fuzzing import Ending, call

sys.path.append(str(Path(__file__).parents[1] / "golden"))
from stored import EVALUATE, FEATURES, MEASURE, OPTIONS, PREPARE, SEARCH, STEPS, STUDY, TERM, unpack


@dataclass(frozen=True)
class Reading:
    """A call, what it reads that is damaged in turn, and where it may write."""

    arguments: tuple[str, ...]
    reads: tuple[str, ...]
    writes: tuple[str, ...] = ()
    slow: bool = False
    """Too slow for the short run."""


def going_on(verb: str, folder: str) -> Reading:
    """The call that a run's own configuration stands for."""
    return Reading((verb, "--config", f"{folder}/config.yaml"), (folder, "cache"), (folder,))


NEW = ("--output", "new")
UNFINISHED = "unfinished/pretrain"
FPT, MODEL, ADAPTER, WHOLE, CUT = "runs/fpt", "runs/pretrain/model", "runs/finetune", "searches/whole", "searches/cut"
COMPARED = ("--resamples", "200", "--json", "new/numbers.json", "--markdown", "new/page.md")
REPORTED = ("--html", "new/page.html", "--markdown", "new/page.md")
CPU = ("--device", "cpu")
GPT = ("--block", "48", "--gpt.layers", "1", "--gpt.heads", "2", "--gpt.width", "4")
PRETRAIN = ("pretrain", *GPT, *TERM, "--align.held-out", "0", *STEPS, *NEW)
TEXT = ("--corpus.source", "text.txt", "--corpus.vocabulary", "300")
FINETUNE = ("finetune", "--tune.method", "lora", "--tune.lora-rank", "2", "--data.block", "48", *TERM, "--align.held-out", "0",
            "--data.source", "tasks.jsonl", *STEPS, *NEW)  # fmt: skip
CALLS = {
    "predict with a saved classifier": Reading(("predict", f"{FPT}/model", "images", *CPU), (f"{FPT}/model", "llama", "cache")),
    "predict with one trained whole": Reading(("predict", "runs/full", "images", *CPU), ("runs/full",)),
    "predict of damaged pictures": Reading(("predict", "runs/none/model", "images", *CPU), ("images", "runs/none/model")),
    "adapt, finished": going_on("adapt", FPT),
    "adapt, unfinished": going_on("adapt", "unfinished/adapt"),
    "adapt, new": Reading(("adapt", "small-fpt", *OPTIONS, "--loop.epochs", "1", *NEW), ("llama", "cache")),
    "pretrain, finished": going_on("pretrain", "runs/pretrain"),
    "pretrain, unfinished": going_on("pretrain", "unfinished/pretrain"),
    "pretrain of a prepared corpus": Reading(
        (*PRETRAIN, "--prepared", "corpus"), ("corpus", "features.safetensors", "pairs.parquet", "cache")
    ),
    "pretrain of a text": Reading((*PRETRAIN, *TEXT), ("text.txt", "cache")),
    "finetune, finished": going_on("finetune", ADAPTER),
    "finetune, unfinished": going_on("finetune", "unfinished/finetune"),
    "finetune of a model": Reading((*FINETUNE, "--model", MODEL), (MODEL, "tasks.jsonl", "cache")),
    "finetune of an adapter": Reading((*FINETUNE, "--model", ADAPTER), (f"{ADAPTER}/model", MODEL)),
    "plan of a language model": Reading(
        ("plan", "small-pretrain", "--config", f"{UNFINISHED}/config.yaml"), (f"{UNFINISHED}/config.yaml", "cache")
    ),
    "plan": Reading(("plan", "--config", f"{FPT}/config.yaml"), (f"{FPT}/config.yaml", "llama")),
    "cache": Reading(("cache",), ("cache",)),
    "compare": Reading(("compare", FPT, "runs/lora", *COMPARED), (FPT,)),
    "compare of language models": Reading(("compare", "runs/pretrain", ADAPTER, *COMPARED), ("runs/pretrain", ADAPTER)),
    "compare of a study": Reading(("compare", "study", *COMPARED), ("study",)),
    "report": Reading(("report", FPT, "runs/lora", *REPORTED), (FPT,), slow=True),
    "report of a study": Reading(("report", "study", "searches/whole", *REPORTED), ("study", "searches/whole"), slow=True),
    "report of language models": Reading(("report", ADAPTER, "runs/pretrain", *REPORTED), (ADAPTER,), slow=True),
    "reproduce": Reading(STUDY, ("study", "cache"), ("study",), slow=True),
    "tune, finished": Reading((*SEARCH, "--output", WHOLE), (WHOLE, "space.yaml"), (WHOLE,), slow=True),
    "tune, unfinished": Reading((*SEARCH, "--output", CUT), (CUT,), (CUT,), slow=True),
    "evaluate": Reading(EVALUATE, (ADAPTER, "evals", "cache"), (f"{ADAPTER}/evaluation",), slow=True),
    "features": Reading(FEATURES, ("features.safetensors", "vit", "pairs.parquet"), ("features.safetensors",)),
    "features, new": Reading((*FEATURES[:-2], "--output", "new/f.safetensors"), ("vit", "pairs.parquet", "cache")),
    "data prepare": Reading(PREPARE, ("corpus", "text.txt"), ("corpus",)),
    "measure": Reading((*MEASURE[:-2], *NEW), ("runs/pretrain", "features.safetensors", "cache"), slow=True),
    "measure again": Reading(MEASURE, ("measured",), ("measured",), slow=True),
}  # fmt: skip
OWN = (".lock", ".lock0", "environment.json", "report.html", "README.md")
"""Files that hold no result: any call may write them where it may write."""
State = dict[str, tuple[int, int, int]]


class Material:
    """The stored artefacts, whole and as they are worked on, and what each call says of them undamaged."""

    def __init__(self, folder: Path) -> None:
        self.whole, self.work, self.victim = folder / "whole", folder / "work", folder / "victim"
        self.work.mkdir(parents=True)
        unpack(self.work)
        self.victim.write_text('{"a": 1}\n')
        shutil.copytree(self.work, self.whole)
        self.state = self.look()
        self.usual: dict[str, Ending] = {}

    def look(self) -> State:
        """Every file with its inode, size and time of change."""
        paths = (os.path.join(root, name) for root, _, names in os.walk(self.work) for name in names)
        states = ((os.path.relpath(path, self.work), os.lstat(path)) for path in paths)
        return {path: (status.st_ino, status.st_size, status.st_mtime_ns) for path, status in states}

    def changes(self) -> set[str]:
        """Files that are others than before, or new, or gone."""
        now = self.look()
        return {path for path in now.keys() | self.state.keys() if now.get(path) != self.state.get(path)}

    def reset(self, keep: tuple[str, ...] = ()) -> None:
        """Put all back as it was, but for what lies in ``keep``, which is whole from now on."""
        for path in self.changes():
            if path.startswith(keep) and keep:
                restore(self.whole / path, self.work / path)
            else:
                restore(self.work / path, self.whole / path)
        for root, folders, _ in os.walk(self.work, topdown=False):
            for name in folders:
                inside = Path(root, name)
                if not (self.whole / inside.relative_to(self.work)).is_dir():
                    shutil.rmtree(inside)
        self.state = self.look()

    def first(self, name: str) -> Ending:
        """How a call ends with nothing damaged; what it puts into the cache stays there."""
        if name not in self.usual:
            call(*CALLS[name].arguments)  # the first, which fills the cache and says so
            self.reset(keep=("cache",))
            self.usual[name] = call(*CALLS[name].arguments)
            self.reset(keep=("cache",))
            assert self.usual[name].code == 0, self.usual[name].errors
        return self.usual[name]

    def files(self, roots: tuple[str, ...]) -> list[str]:
        return sorted(path for path in self.state if path.startswith(tuple(f"{root}/" for root in roots)) or path in roots)
