"""``plan`` of ``pretrain`` and ``finetune``: what a run will cost, from a model on the meta device.

Shapes: B sequences, T tokens, L layers, D width, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from crossalign.config import FinetuneConfig, PretrainConfig
from crossalign.data.text.corpus import open_corpus
from crossalign.data.text.tokenizer import open_tokenizer
from crossalign.features.regularizer import WEIGHT_PENALTIES
from crossalign.models.language.causal import choose_trained, new_gpt2
from crossalign.models.language.model import open_language_model
from crossalign.training.term import row_name
from crossalign.verbs.plan.images import assumptions, find_hardware, memory_and_time

VOCABULARIES = {"hf:openai-community/gpt2": 50_257}
"""Entries of published tokenizers, to plan without a network."""


def plan_text(config: PretrainConfig | FinetuneConfig, recipe: str, hardware: str, utilization: float) -> str:
    """The plan as text: parameters, tokens, FLOPs, memory and hours on ``hardware``.

    FLOPs: 6 a weight and token that it meets (4 for a frozen weight), 12 L D T a token for attention (Kaplan et al. 2020,
    §2.1), and the same for the captions of the alignment term. The teacher looks at each image once; that is left out.
    Memory of one process without sharding: weights, gradients and Adam's moments in fp32, activations by Korthikanti et al.
    2022, Eq. 2, and the logits with their gradient; of a micro-batch or of the captions of a term, whichever needs more, since
    each has a backward pass of its own. Similarities ask for no logits.

    Raises:
        UserError: unknown hardware, or a model or tokenizer whose configuration is not at hand.
    """
    device = find_hardware(hardware)
    model, block = _meta_model(config), config.block if isinstance(config, PretrainConfig) else config.data.block
    hf, loop, align = model.config, config.loop, config.align
    layers, width, vocabulary = int(hf.num_hidden_layers), int(hf.hidden_size), int(hf.vocab_size)
    total = sum(p.numel() for p in model.parameters())
    trains = sum(p.numel() for p in model.parameters() if p.requires_grad)
    tables = sum(m.weight.numel() for m in model.modules() if type(m).__name__ == "Embedding")
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    met = total - tables + (vocabulary * width if tied else 0)  # a look-up costs nothing, the head does
    per_weight = 6.0 if trains == total else 4.0 + 2.0 * trains / total

    def flops(tokens: int, length: int) -> float:
        return float(tokens * (per_weight * met + 12.0 * layers * width * length))

    tokens = loop.steps * loop.batch_size * block
    looks = align.metric not in ("none", *WEIGHT_PENALTIES) and align.weight != 0
    terms = -(-loop.steps // align.every) if looks else 0
    captions = terms * align.batch_size * align.max_length
    micro = -(-loop.batch_size // loop.accumulation)
    checkpointed = config.gpt.gradient_checkpointing if isinstance(config, PretrainConfig) else config.gradient_checkpointing

    def activations(tokens: int, logits: bool) -> float:
        return 34.0 * tokens * width * (1 if checkpointed else layers) + 10.0 * tokens * vocabulary * logits

    passes = [activations(micro * block, logits=True)]
    passes += [activations(align.batch_size * align.max_length, logits=align.metric == "captions")] if terms else []
    states = 4.0 * total + 12.0 * trains
    memory = states + max(passes) * (1 if loop.precision != "fp32" else 2)
    if states > device.memory:
        remedy = f"weights, gradients and moments alone are {states / 1e9:.1f} GB: several devices and --loop.shard"
    else:
        remedy = "raise --loop.accumulation" if passes[0] == max(passes) else "lower --align.batch-size"
        remedy += f" or take {'--gpt.' if isinstance(config, PretrainConfig) else '--'}gradient-checkpointing"
    text, term = flops(tokens, block), flops(captions, align.max_length)
    more = f", and {100 * term / text:.2g} % more for {terms:,} terms of {align.batch_size} captions" if terms else ""
    return "\n".join(
        [
            f"plan of {recipe or 'a custom configuration'}: {config.row or row_name(config)}",
            "",
            f"parameters             {total:,}, of which {trains:,} train",
            f"steps                  {loop.steps:,} of {loop.batch_size:,} sequences of {block:,} tokens",
            f"tokens                 {tokens:,} at the most",
            f"FLOPs                  {text / tokens:.3g} a token, {text:.3g} in all{more}",
            *memory_and_time(memory, text + term, loop.precision, device, utilization, remedy),
            *assumptions(recipe),
        ]
    )


def _meta_model(config: PretrainConfig | FinetuneConfig) -> Any:
    """The run's model without memory."""
    if isinstance(config, FinetuneConfig):
        model: Any = open_language_model(config.model, head="causal", weights=False).model
        choose_trained(model, config.tune, config.seed)
        return model
    vocabulary = config.corpus.vocabulary
    if config.prepared:
        vocabulary = open_corpus(Path(config.prepared)).vocabulary
    elif config.corpus.tokenizer:
        known = VOCABULARIES.get(config.corpus.tokenizer)
        vocabulary = known or len(open_tokenizer(config.corpus.tokenizer))
    return new_gpt2(config.gpt, vocabulary=vocabulary, block=config.block, separator=0, seed=0, meta=True)
