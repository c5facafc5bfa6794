"""``pretrain`` and ``finetune``: a language model learns text, pulled towards a vision model or not (CMAR §3, §4.2, §4.3).

Next-token prediction, from scratch on a corpus, or of the answers of instruction data, in full or by LoRA; on every k-th step
the alignment term of paired captions and images is added (Eq. 5). The text held out and the pairs held out are looked at in
every evaluation and choose nothing: the last weights are kept.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.utils import set_seed
from torch import nn

from crossalign.config import FinetuneConfig, PretrainConfig
from crossalign.core.errors import UserError
from crossalign.core.files import content_key, write_json
from crossalign.core.machine import is_main_process, world_size
from crossalign.core.progress import doing, followed
from crossalign.core.refs import Ref
from crossalign.data.batches import InOrder, Rows
from crossalign.data.text.corpus import prepare
from crossalign.data.text.instructions import ExampleRows, open_instructions
from crossalign.data.text.prepared import open_corpus
from crossalign.data.text.tokenizer import separator
from crossalign.data.text.tokens import TextBatch, TokenFile, TokenRows, as_stream
from crossalign.models.language.causal import choose_trained, new_gpt2, perplexity, save_causal, total_nll
from crossalign.models.language.inner import attend_with_mask, attend_without_mask, checkpoint_gradients
from crossalign.models.language.model import LanguageModel, check_tokens, open_language_model
from crossalign.models.loading import count_parameters, trained_state
from crossalign.results.outcomes import language_model_outcomes
from crossalign.runs.names import RunFolder
from crossalign.training import checkpoint as ckpt
from crossalign.training.loop import Session, fit
from crossalign.training.session import batches_of, in_folder, main_process_first, opened_run, run_result
from crossalign.training.term import check_sources, open_held_out, open_term
from crossalign.training.text import (
    blocks_of,
    check_model,
    check_text_run,
    read_texts,
    resolve_speed,
    score_streams,
    stream_metrics,
    text_stage,
    whole_state,
)
from crossalign.training.tracking import summary
from crossalign.verbs.language_model import row_name


def pretrain(config: PretrainConfig, *, recipe: str = "", quiet: bool = False, until: int | None = None) -> dict[str, Any]:
    """Train a language model and return the result that result.json holds.

    A finished run is returned as it stands; an unfinished one with the same configuration goes on where it stopped.

    Raises:
        UserError: bad input, before any training. Interrupted, Diverged, DiskFull, and Paused where ``until`` is an
            epoch to pause after (an evaluation, of a text run): see ``training.loop``.
    """
    return train(config, recipe, quiet, until)


def finetune(config: FinetuneConfig, *, recipe: str = "", quiet: bool = False, until: int | None = None) -> dict[str, Any]:
    """Fine-tune a language model and return the result that result.json holds.

    A finished run is returned as it stands; an unfinished one with the same configuration goes on where it stopped.

    Raises:
        UserError: bad input, before any training. Interrupted, Diverged, DiskFull, and Paused where ``until`` is an
            epoch to pause after (an evaluation, of a text run): see ``training.loop``.
    """
    return train(config, recipe, quiet, until)


@dataclass(frozen=True)
class Text:
    """What a run learns, read and ready, with the model that learns it."""

    model: Any
    tokenizer: Any
    amount: str
    """How much there is to train on, in words."""
    rows: Rows[TextBatch]
    tokens: float
    """That a step predicts, on average."""
    evaluate: Callable[[nn.Module, Session], dict[str, float]]
    """Loss and perplexity of what is held out, over all processes."""
    held_out: dict[str, TokenFile]
    """Streams held out, which are scored whole at the end; none where every evaluation looks at all that is held out."""
    identity: dict[str, Any]
    """What the data and the first weights are known by."""
    made_of: str
    """What ``identity`` is of, in words."""
    facts: dict[str, Any]
    """What result.json says of method, model, term and data."""
    peft: Any = None
    """LoRA's updates of the model; None where it trains in full."""
    base: LanguageModel | None = None
    """The opened model that those belong to."""


@in_folder
def train(config: Any, recipe: str, quiet: bool = False, until: int | None = None) -> dict[str, Any]:
    """:func:`pretrain` or :func:`finetune`, as the class of ``config`` says."""
    new = isinstance(config, PretrainConfig)
    verb, block = ("pretrain", config.block) if new else ("finetune", config.data.block)
    check_text_run(config)
    if config.loop.shard and world_size() == 1:
        raise UserError("--loop.shard needs several processes: start them with torchrun --nproc-per-node 2 -m crossalign.cli …")
    if new:
        _check_new_model(config)
    strings = read_texts(config.score)
    config.row = config.row or row_name(config)
    with main_process_first(config.loop.device):
        check_sources(config)
    text = _corpus(config) if new else _instructions(config)
    with main_process_first(config.loop.device):  # the others then find the features in the cache
        term = open_term(config, text.tokenizer, text.tokens)
        held_out = open_held_out(config, text.tokenizer)
    model = text.model
    streams = {name: as_stream(string, text.tokenizer, separator(text.tokenizer)) for name, string in strings.items()}
    parameters = count_parameters(model)
    models = 1  # the finished one; and those kept, the one before the first step among them
    if config.loop.keep_every:
        models += 1 + config.loop.steps // config.loop.keep_every
    ckpt.check_room(config.output, trained_state(model).values(), extra_numel=models * parameters["total"])
    config = resolve_speed(config, model, block, quiet)
    if term:
        with doing("computing the alignment term once"):
            term.check(model)
    if is_main_process() and not quiet:
        share = "{total:,} parameters" if new else "{trainable:,} of {total:,} parameters train"
        print(f"{text.amount}; {share.format(**parameters)}")
    identity = content_key(**text.identity, term=term.fingerprint if term else "")
    with opened_run(config, identity, f"{text.made_of}, captions or teacher's features", until, quiet) as run:

        def evaluate(wrapped: nn.Module) -> dict[str, float]:
            return text.evaluate(wrapped, run) | (held_out(wrapped, run.accelerator) if held_out else {})

        model.to(run.accelerator.device)
        own_seed = config.seed + 1 + 1_000_003 * run.accelerator.process_index  # each process drops its own units
        set_seed(own_seed % 2**32)
        batches = batches_of(config, text.rows, run.accelerator.process_index, run.world)
        trained = fit(text_stage(config, model, batches, evaluate, term, run, text.tokenizer), run)
        scores = {} if text.held_out else {"answers": {name: trained.best[name] for name in ("loss", "perplexity")}}
        streams = text.held_out | streams
        scores |= score_streams(model, streams, block, config.loop.eval_batch_size, run, quiet)
        facts = text.facts | {
            "steps": config.loop.steps,
            "tokens": trained.examples,
            "scores": scores,
            "held_out": {name: value for name, value in trained.best.items() if name.startswith("held_out")},
            "parameters": parameters,
            "learning_rate": config.optim.lr,
        }
        result = run_result(config, verb, recipe, facts, trained, "tokens")
        result["outcomes"] = language_model_outcomes(result, config.align.held_out_teacher)
        state = whole_state(model, run)
        if run.accelerator.is_main_process:
            save_causal(model, text.peft, text.tokenizer, RunFolder(config.output).model, state, text.base)
            write_json(RunFolder(config.output).result, result)
            run.log.results = summary(result)
    return result


def _check_new_model(config: PretrainConfig) -> None:
    """What the model cannot be, or does not have, is told before a corpus is tokenised and a teacher looks at images."""
    if not config.prepared and not config.corpus.source:
        raise UserError(
            "--corpus.source names no text: give text files, folders of them, hf:ORG/NAME, or python:topics, which needs no "
            "file; or a prepared corpus with --prepared"
        )
    check_model(config, new_gpt2(config.gpt, vocabulary=1, block=config.block, separator=0, seed=0, meta=True))


def _corpus(config: PretrainConfig) -> Text:
    """A stream of text, and a new GPT-2."""
    loop = config.loop
    with main_process_first(loop.device):  # the others then find the corpus in the cache
        corpus = open_corpus(config.prepared) if config.prepared else prepare(config.corpus)

    def evaluate(model: nn.Module, run: Session) -> dict[str, float]:
        blocks = blocks_of(corpus.validation, config.block, loop.eval_batch_size, run, loop.evaluate_blocks)
        return stream_metrics(model, blocks, run.accelerator, "evaluating")

    rows = TokenRows(corpus.train.tokens, config.block)
    batches_of(config, rows)  # refuses what cannot be
    gpt = new_gpt2(config.gpt, vocabulary=corpus.vocabulary, block=config.block, separator=corpus.separator, seed=config.seed)
    return Text(
        model=gpt,
        tokenizer=corpus.tokenizer,
        amount=f"{len(corpus.train):,} tokens to train on, vocabulary {corpus.vocabulary:,}",
        rows=rows,
        tokens=loop.batch_size * config.block,
        evaluate=evaluate,
        held_out={"validation": corpus.validation},
        identity={"corpus": corpus.fingerprint},
        made_of="text",
        facts={
            **_term_facts(config),
            "seed": config.seed,
            "method": "pretrain",
            "weights": "random",
            "backbone": f"gpt2-{config.gpt.layers}x{config.gpt.width}",
            "data": f"{', '.join(corpus.names[:3])} ({len(corpus.train):,} training tokens)",
            "data_fingerprint": corpus.fingerprint,
            "test": None,
        },
    )


def _instructions(config: FinetuneConfig) -> Text:
    """Instructions with their answers, and a model to learn them."""
    loop = config.loop
    with doing(f"opening {config.model}"):
        opened = _open_model(config)
    model, tokenizer = opened.model, opened.tokenizer
    check_model(config, model)  # told before a teacher looks at images
    peft = choose_trained(model, config.tune, config.seed)
    with main_process_first(loop.device):
        data = open_instructions(config.data, tokenizer)

    def evaluate(model: nn.Module, run: Session) -> dict[str, float]:
        part = (run.accelerator.process_index, run.world)
        held_out = ExampleRows(data.validation, padding=config.data.padding)
        batches = InOrder(len(held_out), held_out.gather, loop.eval_batch_size, *part)
        seen = followed(batches, len(batches), "evaluating", "batch")
        nll = total_nll(model, seen, run.accelerator.device, run.accelerator)
        loss = nll / int(data.validation.targets.sum())
        return {"loss": loss, "perplexity": perplexity(loss)}

    rows = ExampleRows(data.train, config.data.block if config.data.packing else 0, config.data.padding)
    batches_of(config, rows)  # refuses what cannot be
    notes = {"without an answer": data.empty, "with the answer cut": data.train.truncated, "too long": data.train.dropped}
    left_out = "".join(f", {count:,} {why}" for why, count in notes.items() if count)
    names = [Path(name).name for name in config.data.source]
    return Text(
        model=model,
        tokenizer=tokenizer,
        amount=f"{len(data.train):,} examples to train on{left_out}",
        rows=rows,
        tokens=loop.batch_size * int(data.train.targets.sum()) / len(rows),
        evaluate=evaluate,
        held_out={},
        identity={"data": data.fingerprint, "model": opened.fingerprint, "seed": opened.seed},
        made_of=f"instructions, weights of '{config.model}'",
        facts={
            "method": config.tune.method,
            **_term_facts(config),
            "backbone": config.model,
            "weights": "random" if Ref(config.model).control == "random" else "pretrained",
            "data": f"{', '.join(names[:3])} ({len(data.train):,} training examples)",
            "test": None,
            "seed": config.seed,
            "data_fingerprint": data.fingerprint,
        },
        peft=peft,
        base=opened,
    )


def _open_model(config: FinetuneConfig) -> LanguageModel:
    """The model with its weights, told whether rows need a mask."""
    if not config.model:
        raise UserError("--model names no language model: give package:NAME, a folder, a .gguf file or hf:ORG/NAME")
    opened = open_language_model(config.model, head="causal", seed=config.seed)
    model: Any = opened.model
    check_tokens(model, opened.tokenizer, config.model)
    model.config.use_cache = False
    if config.data.padding == "right" and not config.data.packing:
        attend_without_mask(model)  # no real token sees what stands on its right
    else:
        attend_with_mask(model)
    if config.gradient_checkpointing:
        checkpoint_gradients(model)
    return opened


def _term_facts(config: PretrainConfig | FinetuneConfig) -> dict[str, Any]:
    align = config.align
    return {"align": align.metric if align.weight else "none", "mode": align.mode, "teacher": config.teacher.ref}
