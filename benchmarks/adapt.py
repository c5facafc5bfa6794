"""Throughput and peak memory of our training step beside the bare backbone and Hugging Face's Trainer with PEFT.

    python benchmarks/adapt.py [--stories FOLDER] [--methods fpt lora full] [--precisions fp32 bf16] [--threads 2]
                               [--seconds 12] [--repeats 5] [--out FILE.md] [--quick]

Three contestants train on random 32 x 32 colour images with one batch size and one thread count:

ours     the training stage of ``adapt`` in its real loop: batches, augmentation, clipping, optimiser, metrics, log.
bare     forward and backward of the backbone, pool and head on token vectors made beforehand, with the same parameters
         training; the vectors ask for a gradient, as a trained embedder does. No data, no embedder, no optimiser.
Trainer  ``transformers.Trainer`` and PEFT on the same architecture, its images augmented one by one in its dataset by
         torchvision v2 (as PIL images, which are faster there than tensors). A check of each cell shows that both
         models give the same scores and train the same number of parameters.

Rows "fp32" and "bf16" compare at equal precision. The row "defaults" has ours as it comes (precision chosen by its own
probe, MLflow on) beside Trainer as it comes (fp32, no tracker); both keep the batch size. Every measurement is a
process of its own; contestants alternate, in turned order every second time; warm-up steps do not count. Figures are
medians, ratios medians of the ratios within a repetition (least to greatest in brackets), memory is the process's peak.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crossalign import config as settings
from crossalign.core.device import peak_memory_bytes
from crossalign.core.machine import environment
from crossalign.data.images.load import ImageSet, ImageSplits
from crossalign.data.model_files import locate
from crossalign.models.language.families import family_of
from crossalign.training.loop import Session, fit
from crossalign.training.session import make_accelerator
from crossalign.training.tracking import RunLog
from crossalign.verbs.adapt.job import build_model, resolve_speed, training_stage

WARM_UP = 5  # steps
SIDE, CLASSES, STEPS = 32, 10, 10_000
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.262)
Figures = dict[str, Any]
AUGMENT = settings.AugmentConfig(flip=0.5, crop_padding=4, rotation_degrees=20.0)
LR = 1e-4


@dataclasses.dataclass(frozen=True)
class Job:
    """One measurement, done by a process of its own."""

    contestant: str
    """ours, bare, trainer, or check: whether ours and Trainer's models are the same."""
    precision: str
    """fp32, bf16, or auto: ours as it comes."""
    backbone: str
    patch: int
    method: settings.Method
    batch: int
    threads: int
    seconds: float

    @property
    def tokens(self) -> int:
        return (SIDE // self.patch) ** 2

    @property
    def cell(self) -> str:
        return f"{Path(self.backbone).name.removeprefix('package:')}, {self.tokens} tokens, {self.method}"


class Clock:
    """Counts steps from the end of the warm-up on, until the time is over; then notes the peak of memory."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.steps, self.elapsed, self.peak = seconds, -WARM_UP, 0.0, 0
        self._started = 0.0  # by the clock, at the end of the warm-up

    def tick(self) -> bool:
        """Call at the end of each step. True: enough."""
        now = time.perf_counter()
        self.steps += 1
        if self.steps == 0:
            self._started = now
        self.elapsed = now - self._started
        if self.steps < 1 or self.elapsed < self.seconds:
            return False
        self.peak = peak_memory_bytes("cpu")
        return True


def ours_as_configured(job: Job, folder: Path) -> settings.AdaptConfig:
    """Our defaults, with CMDA's augmentation. MLflow is on where defaults are measured; Trainer's default has no tracker."""
    return settings.AdaptConfig(
        output=folder,
        data=settings.DataConfig(augment=AUGMENT, mean=MEAN, std=STD),
        backbone=settings.BackboneConfig(ref=job.backbone, attention="auto"),  # as Trainer's: causal where it is causal
        embedder=settings.EmbedderConfig(patch=job.patch),
        tune=settings.TuneConfig(method=job.method),
        optim=settings.OptimConfig(lr=LR),
        loop=settings.LoopConfig(batch_size=job.batch, precision=job.precision, epochs=1, device="cpu"),  # type: ignore[arg-type]
        tracking=settings.TrackingConfig(mlflow=job.precision == "auto"),
    )


def random_images(job: Job) -> ImageSet:
    """More than a measurement goes through, so that no epoch ends in it."""
    random = np.random.default_rng(0)
    count = 128 * job.batch
    pixels = random.integers(0, 256, (count, 3, SIDE, SIDE), dtype=np.uint8)
    labels = torch.from_numpy(random.integers(0, CLASSES, count))
    return ImageSet(pixels, labels, tuple(f"class {i}" for i in range(CLASSES)))


def run_ours(job: Job, clock: Clock, folder: Path) -> str:
    """What ``adapt`` does between opening the images and scoring, with a clock round the stage's steps."""
    config, images = ours_as_configured(job, folder), random_images(job)
    splits = ImageSplits(images, images, images, "random images", (), "")
    model = build_model(config, images)
    longer = dataclasses.replace(config, loop=dataclasses.replace(config.loop, epochs=4))  # one epoch alone is not timed
    config = dataclasses.replace(config, loop=dataclasses.replace(resolve_speed(longer, model, images).loop, epochs=1))
    with RunLog(folder, config.tracking, "benchmark", {}) as log:
        run = Session(folder, make_accelerator(config.loop), config.loop, log, identity="")
        stage = training_stage(config, model, splits, run)
        epoch = stage.steps

        def timed(_epoch: int, _first: int) -> Iterator[Any]:
            for step in itertools.chain.from_iterable(epoch(e, 0) for e in itertools.count()):
                yield step
                if clock.tick():  # the loop has done all that belongs to the step, and asks for the next
                    return

        fit(dataclasses.replace(stage, steps=timed, steps_per_epoch=STEPS, evaluate=None, select=None), run)
    return config.loop.precision


def run_bare(job: Job, clock: Clock, folder: Path) -> str:
    images = random_images(job)
    model = build_model(ours_as_configured(job, folder), images).train()
    dtype = torch.bfloat16 if job.precision == "bf16" else torch.float32
    precision = partial(torch.autocast, "cpu", dtype=dtype, enabled=dtype != torch.float32)
    with torch.no_grad(), precision():
        tokens = model.embed(torch.from_numpy(images.pixels[: job.batch]))  # of the type that the embedder gives
    tokens.requires_grad_()
    labels = images.labels[: job.batch]
    while True:
        with precision():
            logits = model.head(model.backbone(tokens).mean(1)).float()
            loss = F.cross_entropy(logits, labels)
        loss.backward()
        model.zero_grad(set_to_none=True)
        tokens.grad = None
        if clock.tick():
            return job.precision


class Peer(nn.Module):
    """The same architecture as a user of Trainer and PEFT would write it."""

    def __init__(self, job: Job) -> None:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoConfig, AutoModel

        super().__init__()
        folder = str(locate(job.backbone, weights=True).folder)
        config = AutoConfig.from_pretrained(folder)
        bert = {"add_pooling_layer": False} if config.model_type == "bert" else {}
        self.backbone = AutoModel.from_pretrained(folder, dtype=torch.float32, **bert)
        for module in self.backbone.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if config.model_type == "bert":  # the new positions take the place of the old ones, as in ours
            nn.init.zeros_(self.backbone.embeddings.position_embeddings.weight)
        for name, parameter in self.backbone.named_parameters():
            unused = name.endswith(("word_embeddings.weight", "embed_tokens.weight", "position_embeddings.weight"))
            parameter.requires_grad_(not unused and (job.method == "full" or "norm" in name.lower()))
        if job.method == "lora":
            targets = list(family_of(config).lora_targets)
            lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.1, target_modules=targets)
            self.backbone = get_peft_model(self.backbone, lora)
        width = config.hidden_size
        self.patches = nn.Conv2d(3, width, job.patch, stride=job.patch)
        self.positions = nn.Parameter(0.02 * torch.randn(job.tokens, width))
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        tokens = self.patches(pixel_values).flatten(2).transpose(1, 2) + self.positions
        hidden = self.backbone(inputs_embeds=tokens).last_hidden_state
        logits = self.head(self.dropout(hidden.mean(1)))
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class PeerImages(torch.utils.data.Dataset[dict[str, Any]]):
    """Images augmented one by one, as in torchvision's and transformers' own examples."""

    def __init__(self, images: ImageSet) -> None:
        from torchvision.transforms import v2

        self.pixels, self.labels = np.ascontiguousarray(np.asarray(images.pixels).transpose(0, 2, 3, 1)), images.labels.tolist()
        crop, turn = v2.RandomCrop(SIDE, padding=AUGMENT.crop_padding), v2.RandomRotation(AUGMENT.rotation_degrees)
        to_float = (v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD))
        self.transform = v2.Compose([v2.RandomHorizontalFlip(AUGMENT.flip), crop, turn, *to_float])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        from PIL import Image

        return {"pixel_values": self.transform(Image.fromarray(self.pixels[index])), "labels": self.labels[index]}


def run_trainer(job: Job, clock: Clock, folder: Path) -> str:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Tick(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            control.should_training_stop = clock.tick()

    same = {"per_device_train_batch_size": job.batch, "learning_rate": LR, "bf16": job.precision == "bf16"}
    arguments = TrainingArguments(str(folder), max_steps=STEPS, save_strategy="no", use_cpu=True, **same)
    images = PeerImages(random_images(job))
    Trainer(model=Peer(job), args=arguments, train_dataset=images, callbacks=[Tick()]).train()
    return job.precision


@torch.no_grad()
def run_check(job: Job, clock: Clock, folder: Path) -> str:
    """Fail unless ours and Trainer's model give the same scores and train as many parameters."""
    images = random_images(job)
    ours: Any = build_model(ours_as_configured(job, folder), images).eval()
    peer: Any = Peer(job).eval()
    projection = ours.embedding.embedder.projection
    peer.patches.weight.copy_(projection.weight.view_as(peer.patches.weight))
    peer.patches.bias.copy_(projection.bias)
    peer.positions.copy_(ours.embedding.positions)
    peer.head.load_state_dict(ours.head.state_dict())
    pixels = torch.from_numpy(images.pixels[:8])
    scores = peer(ours.normalize(pixels), images.labels[:8])["logits"]
    torch.testing.assert_close(scores, ours(pixels), rtol=1e-3, atol=1e-4)
    counts = [sum(p.numel() for p in model.parameters() if p.requires_grad) for model in (ours, peer)]
    if counts[0] != counts[1]:
        raise SystemExit(f"{job.cell}: ours trains {counts[0]:,} parameters, Trainer {counts[1]:,}")
    return job.precision


RUNS = {"ours": run_ours, "bare": run_bare, "trainer": run_trainer, "check": run_check}


def child(job: Job) -> None:
    """Do one job and print its figures as the last line."""
    torch.set_num_threads(job.threads)
    torch.manual_seed(0)
    clock = Clock(job.seconds)
    with tempfile.TemporaryDirectory() as folder:
        precision = RUNS[job.contestant](job, clock, Path(folder) / "run")
    rate = clock.steps * job.batch / clock.elapsed if clock.elapsed else 0.0
    print(f"\n{json.dumps({'rate': rate, 'peak': clock.peak, 'precision': precision, 'steps': clock.steps})}")


def measure(job: Job) -> Figures:
    """Run ``job`` in a fresh process, with a cache of its own: a probe of precision is part of it."""
    with tempfile.TemporaryDirectory() as cache:
        variables = {"OMP_NUM_THREADS": str(job.threads), "CROSSALIGN_CACHE": cache, "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, __file__, "--child", json.dumps(dataclasses.asdict(job))]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **variables})
    if done.returncode:
        raise SystemExit(f"{job.contestant} failed on {job.cell}:\n{done.stderr[-4000:]}")
    figures: Figures = json.loads(done.stdout.splitlines()[-1])
    print(f"{job.cell}: {job.contestant} {job.precision}: {figures}", file=sys.stderr, flush=True)
    return figures


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table: ours beside the other two."""

    cell: str
    precision: str
    ours: list[Figures]
    trainer: list[Figures]
    bare: list[Figures] | None = None

    def ratio(self, other: str, figure: str = "rate") -> list[float]:
        """Ours over the other contestant's, in each repetition."""
        return [a[figure] / b[figure] for a, b in zip(self.ours, getattr(self, other), strict=True)]

    def __str__(self) -> str:
        rates = [_median(runs, "rate", 1.0) if runs else "" for runs in (self.ours, self.bare, self.trainer)]
        peaks = [_median(runs, "peak", 1e6) for runs in (self.ours, self.trainer)]
        bare = _spread(self.ratio("bare")) if self.bare else ""
        speed, memory = _spread(self.ratio("trainer")), _spread(self.ratio("trainer", "peak"))
        return f"| {' | '.join([self.cell, self.precision, *rates, bare, speed, *peaks, memory])} |"


def measure_cell(job: Job, precisions: list[str], repeats: int) -> list[Row]:
    """The lines of one cell: each precision, then both as they come."""
    measure(dataclasses.replace(job, contestant="check"))
    entries = [(name, precision) for precision in precisions for name in ("bare", "ours", "trainer")]
    entries += [entry for entry in (("ours", "auto"), ("trainer", "fp32")) if entry not in entries]
    found: dict[tuple[str, str], list[Figures]] = {entry: [] for entry in entries}
    for repeat in range(repeats):
        for name, precision in entries if repeat % 2 == 0 else entries[::-1]:
            found[name, precision].append(measure(dataclasses.replace(job, contestant=name, precision=precision)))
    rows = [Row(job.cell, p, found["ours", p], found["trainer", p], found["bare", p]) for p in precisions]
    chosen = "/".join(sorted({figures["precision"] for figures in found["ours", "auto"]}))
    return [*rows, Row(job.cell, f"defaults ({chosen}, fp32)", found["ours", "auto"], found["trainer", "fp32"])]


def goals(rows: list[Row]) -> list[str]:
    """Which goals are met, and where they are not."""
    equal, defaults = [r for r in rows if r.bare], [r for r in rows if not r.bare and "minilm" in r.cell]

    def line(title: str, among: list[Row], met: Callable[[Row], bool]) -> str:
        missed = [f"{r.cell}, {r.precision}" for r in among if not met(r)]
        return f"- {title}: {len(among) - len(missed)} of {len(among)}{'; not in ' if missed else ''}{'; '.join(missed)}"

    median = statistics.median
    return [
        line("at least 0.95 of the bare backbone", equal, lambda r: median(r.ratio("bare")) >= 0.95),
        line("not slower than Trainer at equal precision", equal, lambda r: median(r.ratio("trainer")) >= 1),
        line("no more memory than Trainer at equal precision", equal, lambda r: median(r.ratio("trainer", "peak")) <= 1),
        line("at least 1.3 times Trainer on MiniLM, both as they come", defaults, lambda r: median(r.ratio("trainer")) >= 1.3),
    ]


def report(rows: list[Row], options: argparse.Namespace, machine: Figures) -> str:
    """The table, with what it was measured on above and the goals below."""
    packages = ", ".join(f"{n} {machine['packages'].get(n)}" for n in ("torch", "transformers", "peft", "accelerate"))
    commit = f"commit {machine['git_commit']}{' with changes' if machine['git_changed'] else ''}"
    columns = ["cell", "precision", *(f"{name}, images/s" for name in ("ours", "bare", "Trainer")), "ours / bare"]
    columns += ["ours / Trainer", "ours, peak MB", "Trainer, peak MB", "memory, ours / Trainer"]
    head = f"""{machine["cpu"]}, {machine["cores"]} cores, {options.threads} threads; {packages}; {commit}.
Batch {options.batch}, {options.repeats} repetition(s) of {options.seconds:g} s: `python benchmarks/{machine["command"]}`

| {" | ".join(columns)} |
|{" --- |" * 2}{" ---: |" * 8}"""
    return "\n".join([head, *map(str, rows), "", *goals(rows)])


def _median(runs: list[Figures], figure: str, unit: float) -> str:
    return f"{statistics.median(r[figure] for r in runs) / unit:,.0f}"


def _spread(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stories", help="folder of stories260K, for its cells of 64 tokens")
    parser.add_argument("--no-minilm", action="store_true", help="leave out the cells of MiniLM (16 tokens)")
    parser.add_argument("--methods", nargs="+", default=["fpt", "lora", "full"], choices=["fpt", "lora", "full"])
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=64, help="images a step, for all contestants")
    parser.add_argument("--seconds", type=float, default=12.0, help="measured in each process, after the warm-up")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write the table here, and all figures beside it as .json")
    parser.add_argument("--quick", action="store_true", help="one repetition of 3 seconds, to see that it works")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.repeats, options.seconds = 1, 3.0
    return options


def main(options: argparse.Namespace) -> None:
    backbones = ([(options.stories, 4)] if options.stories else []) + ([] if options.no_minilm else [("package:minilm", 8)])
    rows: list[Row] = []
    for (backbone, patch), method in itertools.product(backbones, options.methods):
        job = Job("ours", "fp32", backbone, patch, method, options.batch, options.threads, options.seconds)
        rows += measure_cell(job, options.precisions, options.repeats)
    machine = environment()
    text = report(rows, options, machine)
    print(text)
    if options.out:
        options.out.with_suffix(".md").write_text(text + "\n")
        figures = {"environment": machine, "rows": [dataclasses.asdict(row) for row in rows]}
        options.out.with_suffix(".json").write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    arguments = parse()
    child(Job(**json.loads(arguments.child))) if arguments.child else main(arguments)
