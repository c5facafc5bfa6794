"""The stage in which a language model learns the next token, for pre-training and fine-tuning alike."""

from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from crossalign.config import FinetuneConfig, PretrainConfig, TextLoopConfig
from crossalign.core.errors import UserError
from crossalign.core.machine import world_size
from crossalign.core.progress import followed
from crossalign.data.batches import Batches
from crossalign.data.records import read_text
from crossalign.data.text.tokens import EvaluationBlocks, TextBatch, TokenFile
from crossalign.features.regularizer import WEIGHT_PENALTIES
from crossalign.models.language.causal import nll_sum, save_causal, total_nll
from crossalign.models.loading import count_parameters, put_tensors, trained_state
from crossalign.models.taps import resolve_layers
from crossalign.runs.folder import resolved
from crossalign.runs.names import RunFolder
from crossalign.training import precision
from crossalign.training.loop import Session, Stage
from crossalign.training.sharding import put, reshard, whole
from crossalign.training.term import Term, check_align, reads_captions

C = TypeVar("C")
OWN_SCORES = ("validation", "answers")
"""Names under which a run keeps the scores of its own held-out text."""


def text_stage(
    config: PretrainConfig | FinetuneConfig,
    model: nn.Module,
    batches: Batches[TextBatch],
    evaluate: Callable[[nn.Module], dict[str, float]],
    term: Term | None,
    run: Session,
    tokenizer: Any,
) -> Stage:
    """``config.loop.steps`` optimiser steps of next-token prediction, with the alignment term on the steps that are due.

    An "epoch" of the loop is the interval between two evaluations. The sum of the losses is divided by the targets of the
    whole step, over all processes and micro-batches, so that each token weighs the same (trap of Trainer's GPT-2 loss).
    """
    every = config.loop.evaluate_every

    def load(saved: dict[str, Tensor]) -> None:
        put_tensors(trained_state(model), term.load_state(saved) if term else saved, "the checkpoint", put)

    def keep(done: int) -> None:
        """Write the model as it is now, whole or not at all; one that a resumed run has written already stays."""
        if not config.loop.keep_every or done % config.loop.keep_every:
            return
        folder = RunFolder(run.folder).snapshots / f"step-{done:07d}"
        whole_model = whole_state(model, run)  # of all processes together
        if run.accelerator.is_main_process and not folder.exists():
            save_causal(model, None, tokenizer, folder, whole_model)

    return Stage(
        name="train",
        model=model,
        loss=lambda wrapped, batch: (nll_sum(wrapped, batch, run.accelerator.device), {}),
        steps=lambda interval, first: islice(batches.steps(interval * every + first), every - first),
        steps_per_epoch=every,
        epochs=config.loop.steps // every,
        optim=config.optim,
        state=lambda: _gathered(trained_state(model), run) | (term.state() if term else {}),
        load=load,
        evaluate=evaluate,
        extra=term.extra if term else None,
        unit="tokens",
        keep=keep,
    )


def resolve_speed(config: C, model: Any, block: int, quiet: bool) -> C:
    """Number format and compiling, where left open, as the hardware or a short measurement on it says is best."""
    loop: TextLoopConfig = config.loop  # type: ignore[attr-defined]
    if loop.shard:  # too large, it may be, to be measured whole
        chosen = {"cuda": "bf16"}.get(loop.device, "fp32") if loop.precision == "auto" else loop.precision
        return resolved(config, loop={"precision": chosen, "compile": bool(loop.compile)})
    rows = max(1, loop.batch_size // loop.accumulation // world_size())
    ids = torch.zeros(rows, block, dtype=torch.int64, device=loop.device)
    signature = f"{type(model).__name__} {model.num_parameters()} {count_parameters(model)['trainable']} {tuple(ids.shape)}"
    steps = loop.steps * loop.accumulation
    model.to(loop.device)
    return precision.resolve_speed(config, model, lambda form: form(ids, use_cache=False).logits, signature, steps, quiet)


def whole_state(model: nn.Module, run: Session) -> dict[str, Tensor] | None:
    """Every tensor of a model in shares, which all processes ask for together; None of one that is whole."""
    if not run.sharded:
        return None
    reshard(model)
    return _gathered(model.state_dict(), run)


def _gathered(state: dict[str, Tensor], run: Session) -> dict[str, Tensor]:
    """The whole of tensors in shares, on the first process's CPU, one by one: together they need not fit on a device."""
    if not run.sharded:
        return state
    tensors = {}
    for name, tensor in state.items():
        value = whole(tensor)
        if run.accelerator.is_main_process:
            tensors[name] = value.cpu()
    return tensors


def stream_metrics(model: nn.Module, blocks: EvaluationBlocks, accelerator: Any, title: str) -> dict[str, float]:
    """Loss a token, perplexity and bits a byte of a stream of text; ``title`` is that of a bar, "" for none."""
    return blocks.metrics(total_nll(model, followed(blocks, len(blocks), title, "batch"), accelerator.device, accelerator))


def score_streams(
    model: nn.Module, streams: dict[str, TokenFile], block: int, batch_size: int, run: Session, quiet: bool
) -> dict[str, dict[str, float]]:
    """:func:`stream_metrics` of whole streams by a trained model, in the run's precision."""
    with run.accelerator.autocast():
        return {
            name: stream_metrics(
                model, blocks_of(stream, block, batch_size, run), run.accelerator, "" if quiet else f"scoring {name}"
            )
            for name, stream in streams.items()
        }


def blocks_of(stream: TokenFile, block: int, batch_size: int, run: Session, limit: int | None = None) -> EvaluationBlocks:
    """This process's share of the blocks of ``stream``, or of its first ``limit`` blocks."""
    if limit is not None and limit * block + 1 < len(stream):
        share = (limit * block + 1) / len(stream)  # of the bytes, nearly: bits per byte is exact for the whole alone
        stream = TokenFile(stream.tokens[: limit * block + 1], stream.documents, max(1, round(stream.bytes * share)))
    return EvaluationBlocks(stream, block, batch_size, run.accelerator.process_index, run.world)


def read_texts(paths: Sequence[str]) -> dict[str, str]:
    """The texts to score at the end, by the names of their files.

    Raises:
        UserError: one cannot be read, holds no text, or would be kept under the name of another score.
    """
    texts: dict[str, str] = {}
    for path in paths:
        name = Path(path).name
        if name in texts or name in OWN_SCORES:
            whose = "another text to score" if name in texts else "the run's own held-out text"
            raise UserError(f"--score {path}: scores are kept by file name, and '{name}' is that of {whose}: rename the file")
        texts[name] = read_text(path)
    return texts


def check_text_run(config: PretrainConfig | FinetuneConfig) -> None:
    """What can be known to fail later fails here.

    Raises:
        UserError: settings that do not go together.
    """
    loop = config.loop
    if loop.keep_every and isinstance(config, FinetuneConfig) and config.tune.method == "lora":
        raise UserError("--loop.keep-every keeps whole models, and LoRA trains none: use --tune.method full, or leave it out")
    if loop.steps % loop.evaluate_every:
        near = max(d for d in range(1, loop.evaluate_every + 1) if loop.steps % d == 0)
        raise UserError(f"--loop.evaluate-every {loop.evaluate_every} does not divide --loop.steps {loop.steps}; {near} would")
    if loop.shard and config.align.metric in WEIGHT_PENALTIES:
        raise UserError(f"--align.metric {config.align.metric} looks at whole weights: leave --loop.shard out")
    if loop.accumulation * world_size() > loop.batch_size:
        raise UserError(f"--loop.batch-size {loop.batch_size} has fewer sequences than processes x --loop.accumulation")
    check_align(config.align)
    if loop.evaluate_blocks is not None and isinstance(config, FinetuneConfig):
        raise UserError("--loop.evaluate-blocks is for pre-training; here hold out less with --data.validation-fraction")


def check_model(config: PretrainConfig | FinetuneConfig, model: Any) -> None:
    """What a run asks of its model, on whatever device this is.

    Raises:
        UserError: more tokens than it sees, or a layer that it does not have.
    """
    resolve_layers(model, config.align.layers)
    if isinstance(config, PretrainConfig):
        if reads_captions(config.align) and config.align.max_length > config.block:
            raise UserError(f"--align.max-length {config.align.max_length} is longer than --block {config.block}: lower it")
        return
    longest = getattr(model.config, "max_position_embeddings", None)
    asked = {"--data.block": config.data.block, "--align.max-length": config.align.max_length}
    too_long = [f"{name} {value}" for name, value in asked.items() if longest is not None and value > longest]
    if too_long:
        raise UserError(f"'{config.model}' sees {longest} tokens: lower {' and '.join(too_long)}")
