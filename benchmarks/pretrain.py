"""What regularising costs, and what our loop costs beside nanoGPT's.

    python benchmarks/pretrain.py [--threads 2] [--seconds 20] [--repeats 5] [--precision fp32] [--out FILE.md] [--quick]

Contestants train one GPT-2 (HF's module, the same for all) on random tokens from a memory map:

bare         forward, backward, fused AdamW on one batch made beforehand: no data, no clipping, no log.
nanogpt      the structure of nanoGPT's train.py: batches drawn with replacement by torch.stack over the memory map,
             learning rate set each step, clip 1, fused AdamW, zero_grad, the loss read every 10 steps.
plain        the stage of ``pretrain`` in its real loop: without replacement, clip 1, metrics, log.
regularised  the same with λ = 10 every 20 steps: debiased linear CKA of 256 captions with cached features.
naive        the same, written as one would first: on due steps all hidden states are kept, and the teacher looks at the
             images again.
captions     one forward and backward pass on the 256 captions up to the tapped layer: what a due step must cost more.

Every measurement is a process of its own; contestants alternate, in turned order every second time. Figures are medians,
ratios medians of the ratios within a repetition (least to greatest in brackets).
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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from crossalign.config import (
    GPTConfig,
    PretrainConfig,
    RegularizeConfig,
    TextLoopConfig,
    TrackingConfig,
)
from crossalign.core.machine import environment
from crossalign.data.batches import Batches
from crossalign.data.pairs.batches import PairBatches
from crossalign.data.text.tokens import TokenRows
from crossalign.features.regularizer import AlignmentRegularizer
from crossalign.models.language.causal import new_gpt2
from crossalign.models.taps import Taps
from crossalign.models.vision.teacher import open_teacher
from crossalign.training.loop import Session, fit
from crossalign.training.optim import build_optimizer
from crossalign.training.session import make_accelerator
from crossalign.training.term import Term
from crossalign.training.text import text_stage
from crossalign.training.tracking import RunLog

VOCABULARY, BLOCK, BATCH, PAIRS, CAPTION, WIDTH = 4096, 128, 32, 256, 24, 1280
EVERY, STEPS = 20, 100_000
SIZE = GPTConfig(layers=4, heads=4, width=128)
CONTESTANTS = ("bare", "nanogpt", "plain", "regularised", "naive", "captions")
Figures = dict[str, float]


class Words:
    """A tokenizer of words that are numbers."""

    pad_token_id, eos_token_id = None, 0

    def __call__(self, texts: list[str], **_: Any) -> dict[str, Any]:
        return {"input_ids": [[int(word) for word in text.split()] for text in texts]}


def make_pairs(features: Any = None) -> PairBatches:
    random = np.random.default_rng(1)
    texts = [" ".join(map(str, random.integers(1, VOCABULARY, random.integers(8, CAPTION)))) for _ in range(4 * PAIRS)]
    features = torch.from_numpy(random.normal(size=(len(texts), WIDTH))).float() if features is None else features
    return PairBatches(texts, features, Words(), batch_size=PAIRS)


class Clock:
    """Counts steps from the end of a warm-up on, in whole intervals of the term, until the time is over."""

    def __init__(self, seconds: float, whole: int) -> None:
        self.seconds, self.whole, self.steps, self.elapsed = seconds, whole, -whole, 0.0
        self._started = 0.0

    def tick(self) -> bool:
        """Call at the end of each step. True: enough."""
        self.steps += 1
        if self.steps == 0:
            self._started = time.perf_counter()
        self.elapsed = time.perf_counter() - self._started
        return self.steps > 0 and self.steps % self.whole == 0 and self.elapsed >= self.seconds


def autocast(precision: str) -> Any:
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16")


def nll(model: Any, inputs: torch.Tensor, targets: torch.Tensor, precision: str) -> torch.Tensor:
    with autocast(precision):
        logits = model(input_ids=inputs, use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def run_bare(model: Any, tokens: np.ndarray, clock: Clock, precision: str, folder: Path) -> None:
    optimizer = build_optimizer(model, PretrainConfig().optim)
    batch = torch.from_numpy(tokens[: BATCH * BLOCK + 1].astype(np.int64))
    inputs, targets = batch[:-1].view(BATCH, BLOCK), batch[1:].view(BATCH, BLOCK)
    while True:
        nll(model, inputs, targets, precision).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if clock.tick():
            return


def run_nanogpt(model: Any, tokens: np.ndarray, clock: Clock, precision: str, folder: Path) -> None:
    optimizer = build_optimizer(model, PretrainConfig().optim)
    file = folder / "tokens.bin"
    for step in itertools.count():
        for group in optimizer.param_groups:
            group["lr"] = 1e-4
        data = np.memmap(file, dtype=np.uint16, mode="r")  # anew for each batch, as nanoGPT does
        places = torch.randint(len(data) - BLOCK, (BATCH,))
        inputs = torch.stack([torch.from_numpy(data[i : i + BLOCK].astype(np.int64)) for i in places])
        targets = torch.stack([torch.from_numpy(data[i + 1 : i + 1 + BLOCK].astype(np.int64)) for i in places])
        loss = nll(model, inputs, targets, precision)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 10 == 0:
            loss.item()
        if clock.tick():
            return


def run_stage(model: Any, tokens: np.ndarray, clock: Clock, precision: str, folder: Path, regularizer: Any = None) -> None:
    """The stage of ``pretrain`` with a clock round its steps."""
    loop = TextLoopConfig(steps=STEPS, evaluate_every=STEPS, batch_size=BATCH, device="cpu", precision=precision)  # type: ignore[arg-type]
    config = PretrainConfig(block=BLOCK, gpt=SIZE, align=RegularizeConfig(), loop=loop, tracking=TrackingConfig(mlflow=False))
    batches = Batches(TokenRows(tokens, BLOCK), batch_size=BATCH, seed=0)
    term = Term(regularizer, 0) if regularizer else None
    with RunLog(folder / "run", config.tracking, "benchmark", {}) as log:
        run = Session(folder / "run", make_accelerator(loop), loop, log, identity="")
        stage = text_stage(config, model, batches, lambda _: {}, term, run, tokenizer=None)  # which only kept models need
        steps = stage.steps

        def timed(interval: int, first: int) -> Iterator[Any]:
            for step in steps(interval, first):
                yield step
                if clock.tick():
                    return

        fit(dataclasses.replace(stage, steps=timed, evaluate=None), run)


class Naive(AlignmentRegularizer):
    """The term as one would write it first: all hidden states, and the teacher in the loop."""

    def __init__(self) -> None:
        super().__init__("cka-linear-debiased", every=EVERY, pairs=make_pairs())
        self.teacher = open_teacher("random:package:efficientnet_lite0")
        self.images = torch.randn(PAIRS, 3, 224, 224)

    def loss(self, model: Any) -> torch.Tensor:
        batch = self.pairs.batch(self._number())
        out = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True)
        mask = batch.attention_mask[..., None].float()
        student = (out.hidden_states[-2].float() * mask).sum(1) / mask.sum(1)
        teacher = torch.cat([self.teacher(images) for images in self.images.split(16)])
        loss: torch.Tensor = 10 * (1 - self.metric(student, teacher))
        return loss


def run_captions(model: Any, tokens: np.ndarray, clock: Clock, precision: str, folder: Path) -> None:
    taps, pairs = Taps(), make_pairs()
    for number in itertools.count():
        batch = pairs.batch(number)
        with autocast(precision):
            features = taps(model, batch.input_ids, batch.attention_mask)
        features.square().mean().backward()
        if clock.tick():
            return


def child(name: str, seconds: float, threads: int, precision: str) -> None:
    """Measure one contestant and print its figures as the last line."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = new_gpt2(SIZE, vocabulary=VOCABULARY, block=BLOCK, separator=0, seed=0).train()
    clock = Clock(seconds, 1 if name == "captions" else EVERY)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tokens.bin"
        np.random.default_rng(0).integers(0, VOCABULARY, 20_000_000, dtype=np.uint16).tofile(file)
        tokens = np.memmap(file, dtype=np.uint16, mode="r")
        if name == "regularised":
            run_stage(
                model,
                tokens,
                clock,
                precision,
                Path(folder),
                AlignmentRegularizer("cka-linear-debiased", every=EVERY, pairs=make_pairs()),
            )
        elif name == "naive":
            run_stage(model, tokens, clock, precision, Path(folder), Naive())
        else:
            run = {"bare": run_bare, "nanogpt": run_nanogpt, "plain": run_stage, "captions": run_captions}[name]
            run(model, tokens, clock, precision, Path(folder))
    print(f"\n{json.dumps({'seconds': clock.elapsed / clock.steps, 'steps': clock.steps})}")


def measure(name: str, options: argparse.Namespace) -> Figures:
    command = [sys.executable, __file__, "--child", name, "--seconds", str(options.seconds)]
    command += ["--threads", str(options.threads), "--precision", options.precision]
    variables = {"OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **variables})
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-4000:]}")
    figures: Figures = json.loads(done.stdout.splitlines()[-1])
    print(f"{name}: {figures}", file=sys.stderr, flush=True)
    return figures


def report(found: dict[str, list[Figures]], options: argparse.Namespace) -> list[str]:
    """The table, and which goals are met."""
    seconds = {name: [figures["seconds"] for figures in runs] for name, runs in found.items()}
    tokens = BATCH * BLOCK

    def ratio(of: list[float], to: list[float]) -> tuple[float, str]:
        values = sorted(b / a for a, b in zip(of, to, strict=True))
        middle = statistics.median(values)
        return middle, f"{middle:.3f} ({values[0]:.3f}-{values[-1]:.3f})"

    least = [plain + captions / EVERY for plain, captions in zip(seconds["plain"], seconds["captions"], strict=True)]
    facts = environment()
    lines = [
        f"{facts['cpu']}, {options.threads} threads, {options.precision}; torch {torch.__version__}; "
        f"commit {facts['git_commit']}.",
        f"GPT-2 of {SIZE.layers} layers, width {SIZE.width}, vocabulary {VOCABULARY:,}; {BATCH} x {BLOCK} tokens a step; "
        f"{PAIRS} pairs every {EVERY} steps; {options.repeats} repetition(s) of {options.seconds:g} s.",
        "",
        "| contestant | ms a step | tokens/s | of bare | of plain |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name in CONTESTANTS[:-1]:
        middle = statistics.median(seconds[name])
        of_bare, of_plain = ratio(seconds[name], seconds["bare"])[1], ratio(seconds[name], seconds["plain"])[1]
        lines.append(f"| {name} | {1000 * middle:.1f} | {tokens / middle:,.0f} | {of_bare} | {of_plain} |")
    captions = 1000 * statistics.median(seconds["captions"])
    plain, bound = ratio(seconds["plain"], seconds["bare"]), ratio(seconds["regularised"], least)
    nano = ratio(seconds["plain"], seconds["nanogpt"])
    lines += [
        "",
        f"One pass on the captions takes {captions:.0f} ms: the term costs {captions / EVERY:.1f} ms a step at the least.",
        "",
        f"- plain at least 0.97 of bare: {plain[1]}, {'met' if plain[0] >= 0.97 else 'missed'}",
        f"- regularised within 2 % of plain with those passes: {bound[1]} of it, {'met' if bound[0] >= 0.98 else 'missed'}",
        f"- plain beside nanoGPT's loop: {nano[1]} of its speed",
    ]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--quick", action="store_true", help="one repetition of 2 seconds, to see that it works")
    parser.add_argument("--child", choices=CONTESTANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.seconds, options.threads, options.precision)
        return
    if options.quick:
        options.seconds, options.repeats = 2.0, 1
    found: dict[str, list[Figures]] = {name: [] for name in CONTESTANTS}
    for repeat in range(options.repeats):
        for name in CONTESTANTS if repeat % 2 == 0 else CONTESTANTS[::-1]:
            found[name].append(measure(name, options))
    text = "\n".join(report(found, options)) + "\n"
    print(text)
    if options.out:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
