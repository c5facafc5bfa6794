"""How fast images are read, beside torchvision's transforms and a DataLoader over files, and how long training waits for them.

    python benchmarks/reading.py [--threads 2] [--seconds 10] [--batch 64] [--out FILE.md] [--quick]

Photographs are drawn at random and written as JPEG files; those of 1,024 pixels are read at 224. All contestants flip, crop and
rotate alike, on as many cores and threads, and take turns in one run:

decoded     ours, from the cache of pixels: rows of the map, changed together.
encoded     ours, from the cache of files (``data.cache = encoded``): decoded by worker processes, large JPEGs at a lower
            resolution; then as above.
transforms  torchvision's v2 transforms, image by image, on pixels that lie in memory.
DataLoader  the same transforms on files that PIL decodes and resizes, in as many worker processes as there are threads.

The share of waiting is what the training loop spends asking for its next batch: MiniLM by FPT, 224 pixels, patch 16.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2

from crossalign import config as settings
from crossalign.core.machine import environment
from crossalign.data.batches import Batches, ahead
from crossalign.data.images.batches import ImageRows, augment
from crossalign.data.images.load import ImageSplits, open_images
from crossalign.training.loop import Session, fit
from crossalign.training.session import make_accelerator
from crossalign.training.tracking import RunLog
from crossalign.verbs.adapt.job import build_model, training_stage

AUGMENT = settings.AugmentConfig(flip=0.5, crop_padding=4, rotation_degrees=20.0)
SIDES = {32: 2048, 224: 512, 1024: 192}
"""Side of the files → how many."""
WARM_UP = 2  # steps of training
ROUNDS = 5


def photographs(folder: Path, side: int, count: int) -> Path:
    """JPEG files in two class folders, a third wider than high."""
    for number in range(count):
        random = np.random.default_rng(number)
        image = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(
            (side * 4 // 3, side), Image.Resampling.BICUBIC
        )
        noise = random.normal(0, 6, (side, side * 4 // 3, 3))
        file = folder / "ab"[number % 2] / f"{number}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8)).save(file, quality=90)
    return folder


def opened(folder: Path, side: int, cache: Any) -> ImageSplits:
    """Nearly all of the images for training."""
    data = settings.DataConfig(
        source=str(folder), image_size=min(side, 224), cache=cache, validation_fraction=0.1, test_fraction=0.1
    )
    return open_images(data)


def rates(contestants: Sequence[Callable[[], Iterable[Any]]], seconds: float) -> list[float]:
    """The median rate of each over rounds in which all take their turn, as a machine is not as fast at any time."""
    for contestant in contestants:
        rate(contestant, 0.1)  # processes start, files come into memory
    rounds = [[rate(contestant, seconds / ROUNDS) for contestant in contestants] for _ in range(ROUNDS)]
    return [statistics.median(turns) for turns in zip(*rounds, strict=True)]


def rate(batches: Callable[[], Iterable[Any]], seconds: float) -> float:
    """Images a second, over whole epochs until the time is over: none begins or leaves work that another turn counts."""
    count, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        count += sum(len(images) for images in batches())
    return count / elapsed


def ours(splits: ImageSplits, batch: int) -> Callable[[], Iterator[torch.Tensor]]:
    """Batches as the training loop gets and changes them."""
    batches = Batches(ImageRows(splits.train, AUGMENT), batch_size=min(batch, len(splits.train)), seed=0)

    def epoch() -> Iterator[torch.Tensor]:
        for step in ahead(batches.epoch(0)):
            for part in step.micro_batches:
                yield augment(part["images"], part["draw"], AUGMENT)

    return epoch


class Files(torch.utils.data.Dataset[torch.Tensor]):
    """Images of files, or of pixels in memory, changed one by one."""

    def __init__(self, items: list[Any], side: int) -> None:
        self.items = items
        resize = (v2.Resize(side), v2.CenterCrop(side)) if isinstance(items[0], Path) else ()
        crop, turn = v2.RandomCrop(side, padding=AUGMENT.crop_padding), v2.RandomRotation(AUGMENT.rotation_degrees)
        self.transform = v2.Compose([*resize, v2.RandomHorizontalFlip(AUGMENT.flip), crop, turn, v2.PILToTensor()])

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> torch.Tensor:
        item = self.items[index]
        image = Image.open(item).convert("RGB") if isinstance(item, Path) else item
        return self.transform(image)  # type: ignore[no-any-return]


def theirs(files: Files, batch: int, workers: int) -> Callable[[], Iterable[torch.Tensor]]:
    """A DataLoader over them; its workers stay."""
    loader = torch.utils.data.DataLoader(
        files, min(batch, len(files)), shuffle=True, num_workers=workers, persistent_workers=workers > 0
    )
    return lambda: loader


def waiting(splits: ImageSplits, folder: Path, seconds: float, batch: int = 32) -> tuple[float, float]:
    """Share of the training loop's time in which it asks for the next batch; and images a second."""
    steps, figures = 10_000, {"waited": 0.0, "elapsed": 0.0, "images": 0.0}
    config = settings.AdaptConfig(
        output=folder,
        data=settings.DataConfig(augment=AUGMENT, mean=(0.5,) * 3, std=(0.25,) * 3),
        embedder=settings.EmbedderConfig(patch=16),
        loop=settings.LoopConfig(batch_size=min(batch, len(splits.train)), precision="fp32", epochs=1, device="cpu"),
        tracking=settings.TrackingConfig(mlflow=False),
    )
    model = build_model(config, splits.train)
    with RunLog(folder, config.tracking, "benchmark", {}) as log:
        run = Session(folder, make_accelerator(config.loop), config.loop, log, identity="")
        stage = training_stage(config, model, splits, run)

        def timed(_epoch: int, _first: int) -> Iterator[Any]:
            done, start = -WARM_UP, 0.0
            while True:
                batches = iter(stage.steps(0, 0))
                while True:
                    asked = time.perf_counter()
                    step = next(batches, None)
                    now = time.perf_counter()
                    if step is None:
                        break
                    if done == 0:
                        start = asked
                    if done >= 0:
                        figures["waited"] += now - asked
                    yield step
                    done += 1
                    figures["images"] += step.count if done > 0 else 0
                    figures["elapsed"] = time.perf_counter() - start
                    if done > 0 and figures["elapsed"] > seconds:
                        return

        fit(dataclasses.replace(stage, steps=timed, steps_per_epoch=steps, evaluate=None, select=None), run)
    return figures["waited"] / figures["elapsed"], figures["images"] / figures["elapsed"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="threads, worker processes, and cores that may be used")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement, after the warm-up")
    parser.add_argument("--out", type=Path, help="write the table here")
    parser.add_argument("--quick", action="store_true", help="few images and a second each, to see that it works")
    options = parser.parse_args()
    if options.quick:
        options.seconds = 1.0
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    torch.set_num_threads(options.threads)
    lines = []
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["CROSSALIGN_CACHE"] = f"{temporary}/cache"
        shares = []
        for side, count in SIDES.items():
            folder = photographs(Path(temporary) / str(side), side, count // 8 if options.quick else count)
            size, splits = min(side, 224), {cache: opened(folder, side, cache) for cache in ("decoded", "encoded")}
            memory = [Image.fromarray(np.moveaxis(pixels, 0, -1)) for pixels in splits["decoded"].train.pixels[:]]
            contestants = [
                ours(splits["decoded"], options.batch),
                ours(splits["encoded"], options.batch),
                theirs(Files(memory, size), options.batch, 0),
                theirs(Files(sorted(folder.rglob("*.jpg")), size), options.batch, options.threads),
            ]
            cells = rates(contestants, options.seconds)
            lines.append(f"| {side} → {size} | {' | '.join(f'{cell:,.0f}' for cell in cells)} |")
            print(lines[-1], flush=True)
            if side >= 224:
                shares += [
                    (
                        side,
                        cache,
                        waiting(part, Path(temporary) / f"{side}{cache}", options.seconds, 4 if options.quick else 32),
                    )
                    for cache, part in splits.items()
                ]
    machine = environment()
    print(report := page(lines, shares, machine, options))
    if options.out:
        options.out.write_text(report + "\n", encoding="utf-8")


def page(lines: list[str], shares: list[Any], machine: dict[str, Any], options: argparse.Namespace) -> str:
    """Both tables, with what they were measured on."""
    packages = ", ".join(f"{name} {machine['packages'].get(name)}" for name in ("torch", "torchvision", "pillow"))
    waits = "\n".join(
        f"| {side} → 224 | {cache} | {100 * share:.2f} | {speed:,.1f} |" for side, cache, (share, speed) in shares
    )
    return f"""{machine["cpu"]}, {options.threads} threads and cores; {packages}; commit {machine["git_commit"]}.
Batch {options.batch}, {options.seconds:g} s each: `python benchmarks/{machine["command"]}`

Images a second:

| pixels | decoded | encoded | transforms, in memory | DataLoader over files |
| --- | ---: | ---: | ---: | ---: |
{chr(10).join(lines)}

What a training step of MiniLM waits for data (FPT, fp32, 196 tokens, batch 32):

| pixels | cache | waits, % of the step | images/s |
| --- | --- | ---: | ---: |
{waits}"""


if __name__ == "__main__":
    main()
