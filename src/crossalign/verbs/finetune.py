"""``finetune``: a causal language model learns to answer, pulled towards a vision model or not (CMAR §4.3).

The answers of instruction data are learned, in full or by LoRA; on every k-th step the alignment term of paired captions
and images is added (Eq. 5). What is held out is looked at in every evaluation and chooses nothing: the last weights are kept.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import nn

from crossalign.config import FinetuneConfig
from crossalign.core.errors import UserError
from crossalign.core.files import content_key, write_json
from crossalign.core.machine import is_main_process
from crossalign.core.progress import followed
from crossalign.core.refs import Ref
from crossalign.data.batches import Batches
from crossalign.data.text.examples import ExampleRows, evaluation_examples
from crossalign.data.text.instructions import Instructions, open_instructions
from crossalign.data.text.tokenizer import separator
from crossalign.data.text.tokens import TextBatch, as_stream
from crossalign.models.language.causal import choose_trained, save_causal
from crossalign.models.language.inner import attend_without_mask, checkpoint_gradients
from crossalign.models.language.likelihood import perplexity, total_nll
from crossalign.models.language.model import LanguageModel, open_language_model
from crossalign.models.taps import resolve_layers
from crossalign.training import precision
from crossalign.training.loop import Run, Stage, StageResult, fit
from crossalign.training.session import device_name, in_folder, main_process_first, opened_run, seed_all
from crossalign.training.term import HeldOut, Term, check_sources, open_held_out, open_term, row_name
from crossalign.training.text import (
    check_room,
    check_text_run,
    read_texts,
    resolve_speed,
    score_streams,
    text_stage,
    whole_state,
)


def finetune(config: FinetuneConfig, *, recipe: str = "", quiet: bool = False, until: int | None = None) -> dict[str, Any]:
    """Fine-tune a language model and return the result that result.json holds.

    A finished run is returned as it stands; an unfinished one with the same configuration goes on where it stopped.

    Raises:
        UserError: bad input, before any training. Interrupted, Diverged, DiskFull, and Paused where ``until`` is an
            epoch to pause after (an evaluation, of a text run): see ``training.loop``.
    """
    return in_folder(config, lambda claimed: _finetune(claimed, recipe, quiet, until))


def _finetune(config: FinetuneConfig, recipe: str, quiet: bool, until: int | None) -> dict[str, Any]:
    check_text_run(config)
    if config.loop.evaluate_blocks is not None:
        raise UserError("--loop.evaluate-blocks is for pre-training; here hold out less with --data.validation-fraction")
    texts = read_texts(config.score)
    config.row = config.row or row_name(config)
    with main_process_first(config.loop.device):
        check_sources(config.align, config.teacher, config.pairs)
    opened = _open(config)
    model, tokenizer = opened.model, opened.tokenizer
    resolve_layers(model, config.align.layers)  # told before a teacher looks at images
    peft = choose_trained(model, config.tune, config.seed)
    with main_process_first(config.loop.device):  # the others then find the features in the cache
        data = open_instructions(config.data, tokenizer)
        batches = _batches(config, data, world=int(os.environ.get("WORLD_SIZE", "1")))  # refuses what cannot be
        settings = (config.align, config.teacher, config.pairs, tokenizer)
        tokens = config.loop.batch_size * int(data.train.targets.sum()) / len(batches.rows)
        term = open_term(*settings, tokens=tokens, seed=config.seed, device=config.loop.device)
        held_out = open_held_out(*settings, device=config.loop.device)
    streams = {name: as_stream(text, tokenizer, separator(tokenizer)) for name, text in texts.items()}
    check_room(config.output, model, config.loop)
    config = resolve_speed(config, model, config.data.block, quiet)
    if term:
        term.check(model)
    if is_main_process() and not quiet:
        print(_describe(data, model))
    identity = content_key(
        data=data.fingerprint, model=opened.fingerprint, term=term.fingerprint if term else "", seed=opened.seed
    )
    made_of = f"instructions, weights of '{config.model}', captions or teacher's features"
    with opened_run(config, identity, made_of, until) as run:
        model.to(run.accelerator.device)
        seed_all(config.seed + 1 + 1_000_003 * run.accelerator.process_index)  # each process drops its own units
        trained = fit(_stage(config, model, data, term, held_out, run, tokenizer), run)
        scores = {"answers": {name: trained.best[name] for name in ("loss", "perplexity")}}
        scores |= score_streams(model, streams, config.data.block, config.loop.eval_batch_size, run, quiet)
        result = _result(config, recipe, data, model, trained, scores)
        state = whole_state(model, run)
        if run.accelerator.is_main_process:
            save_causal(model, peft, tokenizer, config.output / "model", state)
            write_json(config.output / "result.json", result)
            run.log.summary({f"{place}/{n}": v for place, found in scores.items() for n, v in found.items()})
    return result


def _open(config: FinetuneConfig) -> LanguageModel:
    """The model with its weights, told whether rows need a mask."""
    if not config.model:
        raise UserError("--model names no language model: give package:NAME, a folder, a .gguf file or hf:ORG/NAME")
    opened = open_language_model(config.model, head="causal", seed=config.seed)
    model: Any = opened.model
    model.config.use_cache = False
    longest = getattr(model.config, "max_position_embeddings", None)
    asked = {"--data.block": config.data.block, "--align.max-length": config.align.max_length}
    too_long = [f"{name} {value}" for name, value in asked.items() if longest is not None and value > longest]
    if too_long:
        raise UserError(f"'{config.model}' sees {longest} tokens: lower {' and '.join(too_long)}")
    if config.data.padding == "right" and not config.data.packing:
        attend_without_mask(model)  # no real token sees what stands on its right
    if config.gradient_checkpointing:
        checkpoint_gradients(model)
    return opened


def _describe(data: Instructions, model: nn.Module) -> str:
    trains = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    notes = {"without an answer": data.empty, "with the answer cut": data.train.truncated, "too long": data.train.dropped}
    told = "".join(f", {count:,} {what}" for what, count in notes.items() if count)
    return f"{len(data.train):,} examples to train on{told}; {trains:,} of {total:,} parameters train"


def _batches(config: FinetuneConfig, data: Instructions, rank: int = 0, world: int = 1) -> Batches[TextBatch]:
    return Batches(
        ExampleRows(data.train, config.data.block if config.data.packing else 0, config.data.padding),
        batch_size=config.loop.batch_size,
        seed=config.seed,
        accumulation=config.loop.accumulation,
        rank=rank,
        world=world,
    )


def _stage(
    config: FinetuneConfig,
    model: nn.Module,
    data: Instructions,
    term: Term | None,
    held_out: HeldOut | None,
    run: Run,
    tokenizer: Any,
) -> Stage:
    accelerator, loop = run.accelerator, config.loop
    batches = _batches(config, data, accelerator.process_index, run.world)

    def evaluate(wrapped: nn.Module) -> dict[str, float]:
        rows = evaluation_examples(
            data.validation, loop.eval_batch_size, config.data.padding, accelerator.process_index, run.world
        )
        rows = followed(rows, -(-len(data.validation) // max(loop.eval_batch_size, run.world)), "evaluating", "batch")
        loss = total_nll(wrapped, rows, accelerator.device, accelerator) / int(data.validation.targets.sum())
        found = {"loss": loss, "perplexity": perplexity(loss)}
        return found | (held_out.measure(wrapped, accelerator) if held_out else {})

    return text_stage(config, model, batches, evaluate, term, run, tokenizer)


def _result(
    config: FinetuneConfig,
    recipe: str,
    data: Instructions,
    model: nn.Module,
    trained: StageResult,
    scores: dict[str, dict[str, float]],
) -> dict[str, Any]:
    """result.json: the numbers of tables, with what is needed to compare them fairly."""
    return {
        "verb": "finetune",
        "recipe": recipe,
        "row": config.row,
        "method": config.tune.method,
        "align": config.align.metric if config.align.weight else "none",
        "mode": config.align.mode,
        "teacher": config.teacher.ref,
        "backbone": config.model,
        "weights": "random" if Ref(config.model).control == "random" else "pretrained",
        "data": f"{', '.join(Path(name).name for name in config.data.source[:3])} ({len(data.train):,} training examples)",
        "test": None,
        "seed": config.seed,
        "data_fingerprint": data.fingerprint,
        "steps": config.loop.steps,
        "tokens": trained.examples,
        "scores": scores,
        "held_out": {name: value for name, value in trained.best.items() if name.startswith("held_out")},
        "parameters": {
            "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "total": sum(p.numel() for p in model.parameters()),
        },
        "learning_rate": config.optim.lr,
        "seconds": {"train": trained.seconds},
        "tokens_per_second": trained.examples / max(trained.seconds, 1e-9),
        "peak_memory_bytes": precision.peak_memory_bytes(config.loop.device),
        "precision": config.loop.precision,
        "device": device_name(config.loop.device),
    }
