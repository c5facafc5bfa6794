"""``pretrain``: a language model from scratch, pulled towards a vision model or not, as CMAR §3 and §4.2 describe it.

Next-token prediction on a corpus; on every k-th step the alignment term of paired captions and images is added (Eq. 5).
The text held out and the pairs held out are looked at in every evaluation and choose nothing: the last weights are kept.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from crossalign.config import PretrainConfig
from crossalign.core.errors import UserError
from crossalign.core.files import content_key, write_json
from crossalign.core.machine import is_main_process
from crossalign.data.batches import Batches
from crossalign.data.text.corpus import Corpus, cached_corpus, open_corpus
from crossalign.data.text.tokens import TextBatch, TokenRows, as_stream
from crossalign.models.language.causal import new_gpt2, save_causal
from crossalign.models.taps import resolve_layers
from crossalign.training import precision
from crossalign.training.loop import Run, StageResult, fit
from crossalign.training.session import device_name, in_folder, main_process_first, opened_run, seed_all
from crossalign.training.term import HeldOut, Term, check_sources, open_held_out, open_term, reads_captions, row_name
from crossalign.training.text import (
    blocks_of,
    check_room,
    check_text_run,
    read_texts,
    resolve_speed,
    score_streams,
    stream_metrics,
    text_stage,
    whole_state,
)


def pretrain(config: PretrainConfig, *, recipe: str = "", quiet: bool = False, until: int | None = None) -> dict[str, Any]:
    """Train a language model and return the result that result.json holds.

    A finished run is returned as it stands; an unfinished one with the same configuration goes on where it stopped.

    Raises:
        UserError: bad input, before any training. Interrupted, Diverged, DiskFull, and Paused where ``until`` is an
            epoch to pause after (an evaluation, of a text run): see ``training.loop``.
    """
    return in_folder(config, lambda claimed: _pretrain(claimed, recipe, quiet, until))


def _pretrain(config: PretrainConfig, recipe: str, quiet: bool, until: int | None) -> dict[str, Any]:
    check_text_run(config)
    _check_model(config)
    texts = read_texts(config.score)
    config.row = config.row or row_name(config)
    with main_process_first(config.loop.device):  # the others then find corpus and features in the cache
        check_sources(config.align, config.teacher, config.pairs)
        corpus = open_corpus(config.prepared) if config.prepared else cached_corpus(config.corpus)
        _batches(config, corpus, world=int(os.environ.get("WORLD_SIZE", "1")))  # refuses what cannot be
        term, held_out = _term(config, corpus)
    streams = {name: as_stream(text, corpus.tokenizer, corpus.separator) for name, text in texts.items()}
    streams = {"validation": corpus.validation, **streams}
    model = _model(config, corpus)
    check_room(config.output, model, config.loop)
    config = resolve_speed(config, model, config.block, quiet)
    if term:
        term.check(model)
    if is_main_process() and not quiet:
        count = sum(p.numel() for p in model.parameters())
        print(f"{len(corpus.train):,} tokens to train on, vocabulary {corpus.vocabulary:,}; {count:,} parameters")
    identity = content_key(corpus=corpus.fingerprint, term=term.fingerprint if term else "")
    with opened_run(config, identity, "text, captions or teacher's features", until) as run:
        model.to(run.accelerator.device)
        seed_all(config.seed + 1 + 1_000_003 * run.accelerator.process_index)  # each process drops its own units
        trained = fit(_stage(config, model, corpus, term, held_out, run), run)
        scores = score_streams(model, streams, config.block, config.loop.eval_batch_size, run, quiet)
        result = _result(config, recipe, corpus, model, trained, scores)
        state = whole_state(model, run)
        if run.accelerator.is_main_process:
            save_causal(model, None, corpus.tokenizer, config.output / "model", state)
            write_json(config.output / "result.json", result)
            run.log.summary({f"{place}/{n}": v for place, found in scores.items() for n, v in found.items()})
    return result


def _term(config: PretrainConfig, corpus: Corpus) -> tuple[Term | None, HeldOut | None]:
    settings = (config.align, config.teacher, config.pairs, corpus.tokenizer)
    tokens = config.loop.batch_size * config.block
    term = open_term(*settings, tokens=tokens, seed=config.seed, device=config.loop.device)
    return term, open_held_out(*settings, device=config.loop.device)


def _check_model(config: PretrainConfig) -> None:
    """What the model cannot be, or does not have, is told before a corpus is tokenised and a teacher looks at images."""
    if not config.prepared and not config.corpus.source:
        raise UserError(
            "--corpus.source names no text: give text files, folders of them, hf:ORG/NAME, or python:topics, which needs no "
            "file; or a prepared corpus with --prepared"
        )
    if reads_captions(config.align) and config.align.max_length > config.block:
        raise UserError(f"--align.max-length {config.align.max_length} is longer than --block {config.block}: lower it")
    model = new_gpt2(config.gpt, vocabulary=1, block=config.block, separator=0, seed=0, meta=True)
    resolve_layers(model, config.align.layers)


def _model(config: PretrainConfig, corpus: Corpus) -> Any:
    return new_gpt2(
        config.gpt,
        vocabulary=corpus.vocabulary,
        block=config.block,
        separator=corpus.separator,
        seed=config.seed,
    )


def _blocks(config: PretrainConfig, corpus: Corpus, run: Run, limit: int | None = None) -> Any:
    return blocks_of(corpus.validation, config.block, config.loop.eval_batch_size, run, limit)


def _batches(config: PretrainConfig, corpus: Corpus, rank: int = 0, world: int = 1) -> Batches[TextBatch]:
    return Batches(
        TokenRows(corpus.train.tokens, config.block),
        batch_size=config.loop.batch_size,
        seed=config.seed,
        accumulation=config.loop.accumulation,
        rank=rank,
        world=world,
    )


def _stage(config: PretrainConfig, model: Any, corpus: Corpus, term: Term | None, held_out: HeldOut | None, run: Run) -> Any:
    batches = _batches(config, corpus, run.accelerator.process_index, run.world)

    def evaluate(wrapped: torch.nn.Module) -> dict[str, float]:
        blocks = _blocks(config, corpus, run, config.loop.evaluate_blocks)
        found = stream_metrics(wrapped, blocks, run.accelerator, "evaluating")
        return found | (held_out.measure(wrapped, run.accelerator) if held_out else {})

    return text_stage(config, model, batches, evaluate, term, run, corpus.tokenizer)


def _result(
    config: PretrainConfig,
    recipe: str,
    corpus: Corpus,
    model: Any,
    trained: StageResult,
    scores: dict[str, dict[str, float]],
) -> dict[str, Any]:
    """result.json: the numbers of tables, with what is needed to compare them fairly."""
    parameters = sum(p.numel() for p in model.parameters())
    names = [name for name, _ in corpus.meta["settings"]["source"]]
    return {
        "verb": "pretrain",
        "recipe": recipe,
        "row": config.row,
        "align": config.align.metric if config.align.weight else "none",
        "mode": config.align.mode,
        "teacher": config.teacher.ref,
        "seed": config.seed,
        "method": "pretrain",
        "weights": "random",
        "backbone": f"gpt2-{config.gpt.layers}x{config.gpt.width}",
        "data": f"{', '.join(names[:3])} ({len(corpus.train):,} training tokens)",
        "data_fingerprint": corpus.fingerprint,
        "test": None,
        "steps": config.loop.steps,
        "tokens": trained.examples,
        "scores": scores,
        "held_out": {name: value for name, value in trained.best.items() if name.startswith("held_out")},
        "parameters": {"trainable": parameters, "total": parameters},
        "learning_rate": config.optim.lr,
        "seconds": {"train": trained.seconds},
        "tokens_per_second": trained.examples / max(trained.seconds, 1e-9),
        "peak_memory_bytes": precision.peak_memory_bytes(config.loop.device),
        "precision": config.loop.precision,
        "device": device_name(config.loop.device),
    }
