"""The recipes of "Cross-Modal Alignment Regularization" (CMAR): published settings, ablations, controls, small siblings.

``cmar-*`` carry the paper's settings; where it is silent, ``ASSUMED`` says what was taken and why. ``small-pretrain*`` and
``small-finetune*`` are the same rows with our sounder defaults (debiased CKA, a pair batch of 256) on what a laptop can do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from crossalign.config import (
    CorpusConfig,
    FinetuneConfig,
    GPTConfig,
    InstructConfig,
    OptimConfig,
    PairsConfig,
    PretrainConfig,
    RegularizeConfig,
    TeacherConfig,
    TextLoopConfig,
    TuneConfig,
)
from crossalign.recipes import RECIPES, Recipe

TEACHERS = {
    "dinov2-small": "timm:vit_small_patch14_dinov2.lvd142m",
    "dinov2-base": "timm:vit_base_patch14_dinov2.lvd142m",
    "dinov2-large": "timm:vit_large_patch14_dinov2.lvd142m",
    "dinov2-giant": "timm:vit_giant_patch14_dinov2.lvd142m",
    "mae": "timm:vit_large_patch16_224.mae",
    "clip": "timm:vit_large_patch14_clip_224.laion2b_ft_in12k",
    "augreg": "timm:vit_large_patch16_224.augreg_in21k",
}
"""The seven of Table 2; see ``models.vision.TABLE2`` for what is doubtful of them."""

SMALL_TEACHERS = {"mobilenet": "package:mobilenet_v2", "random-teacher": "random:package:efficientnet_lite0"}
"""Another trained teacher that a pip package brings, and the control."""

TERMS: dict[str, dict[str, Any]] = {
    "cka-linear": {"metric": "cka-linear"},
    "cka-linear-debiased": {"metric": "cka-linear-debiased"},
    "cka-rbf-debiased": {"metric": "cka-rbf-debiased"},
    "cca": {"metric": "cca", "on_degenerate": "warn"},
    "svcca": {"metric": "svcca", "on_degenerate": "warn"},
    "pwcca": {"metric": "pwcca", "on_degenerate": "warn"},
    "linear-regression": {"metric": "linear-regression", "on_degenerate": "warn"},
    "dot-product": {"metric": "dot-product"},
    "l1": {"metric": "l1"},
    "l2": {"metric": "l2"},
    "l1-weights": {"metric": "l1-weights"},
    "l2-weights": {"metric": "l2-weights"},
    "koleo": {"metric": "koleo"},
    "unpaired": {"mode": "unpaired"},
    "mean": {"metric": "kernel-alignment", "mode": "mean"},
    "captions": {"metric": "captions", "weight": 1.0},
}
"""§4.4.2, §4.4.4 and the control that the paper lacks: what of the usual term each row changes."""
ABLATIONS: dict[str, dict[str, Any]] = {
    **{f"lambda-{value:g}": {"weight": value} for value in (1.0, 5.0, 20.0, 50.0)},
    **{f"every-{value}": {"every": value} for value in (5, 10, 50, 100)},
    "layers-first": {"layers": ("1",)},
    "layers-middle": {"layers": ("6",)},
    "layers-last": {"layers": ("last",)},
    "layers-upper": {"layers": ("9", "10", "11")},
    "layers-all": {"layers": ("all",)},
}
"""A.2 and §4.4.3; the figures' axes give no more than λ = 5 and 10 and an interval of 20."""
DEGENERATE = ("cca", "svcca", "pwcca", "linear-regression")
"""Always 1 at the pair batch of the published runs, where there are fewer pairs than features: their gradient says nothing."""
SMALL_LAYERS = {
    "layers-middle": {"layers": ("2",)},
    "layers-upper": {"layers": ("2", "3")},
}
"""The same places in the four blocks of a small GPT."""
SOUND_PAIRS = 2048  # more than the 768 and 384 features together

ASSUMED_TERM = {
    "align.metric": "§4.4.4 calls linear CKA additional and A.7 lists RBF first, so plain CKA is taken to be RBF",
    "align.layers": "the best of §4.4.3",
    "align.pool": "not given; the mean over tokens",
    "align.batch_size": "not given; as many pairs as sequences of text",
    "align.max_length": "not given",
    "align.queue": "not mentioned, so none",
    "align.on_degenerate": "the published setting is degenerate where this says warn",
    "pairs.source": "not given; the 1,024 pairs of WIT on which the Platonic work, §2.1's source, measures alignment",
    "pairs.split": "not given; that set has one",
    "align.held_out": "that set is trained on whole, so there is none",
    "teacher.layers": "not given",
    "teacher.pool": "not given; as the model's own classifier does",
    "optim.final_lr_fraction": "nanoGPT's smallest rate, 6e-5",
    "seed": "five runs (Fig. 3), seeds not given; 0 to 4",
}
ASSUMED_PRETRAIN = ASSUMED_TERM | {
    "block": "not given; nanoGPT's 1024",
    "corpus.tokenizer": "GPT-2's, as nanoGPT",
    "corpus.validation_fraction": "nanoGPT's",
    "gpt.dropout": "nanoGPT's 0 for pre-training",
    "optim.warmup_fraction": "nanoGPT's 2,000 steps, of 8,000",
    "optim.weight_decay": "nanoGPT's",
    "optim.betas": "nanoGPT's",
    "optim.clip": "nanoGPT's",
    "loop.batch_size": "§4.1 says 32, A.1 says 64: see the sibling -b64; sequences a step over all GPUs",
    "teacher.ref": "§4.4 does not say which of the seven; the one of fine-tuning",
}
ASSUMED_FINETUNE = ASSUMED_TERM | {
    "data.block": "not given",
    "data.validation_fraction": "not given",
    "tune.method": "not said to be anything but full",
    "optim.weight_decay": "not given",
    "optim.schedule": "not given",
}


def pretraining(term: dict[str, Any] | None, **changes: Any) -> PretrainConfig:
    """CMAR §4.1: GPT-2 124M on OpenWebText; ``term`` None is the baseline, else what it changes of λ = 10 every 20 steps."""
    config = PretrainConfig(
        corpus=CorpusConfig(
            source=("hf:Skylion007/openwebtext",), tokenizer="hf:openai-community/gpt2", validation_fraction=0.0005
        ),
        block=1024,
        gpt=GPTConfig(layers=12, heads=12, width=768, dropout=0.0),
        align=published_term(term),
        teacher=TeacherConfig(ref=TEACHERS["dinov2-small"]),
        pairs=PairsConfig(source="hf:minhuh/prh@wit_1024"),
        optim=OptimConfig(lr=6e-3, weight_decay=0.1, betas=(0.9, 0.95), warmup_fraction=0.25, final_lr_fraction=0.01, clip=1.0),
        loop=TextLoopConfig(steps=8000, evaluate_every=500, evaluate_blocks=256, batch_size=32, eval_batch_size=32),
    )
    return replace(config, **changes)


def published_term(term: dict[str, Any] | None) -> RegularizeConfig:
    """λ = 10, every 20 steps, on the penultimate layer; nothing where ``term`` is None."""
    usual = RegularizeConfig(metric="cka-rbf", weight=10.0, every=20, layers=("penultimate",), batch_size=32, held_out=0)
    return replace(usual, **term) if term is not None else replace(usual, metric="none")


def finetuning(model: str, term: dict[str, Any] | None) -> FinetuneConfig:
    """CMAR §4.1: a Llama on Alpaca-52k, 500 steps."""
    return FinetuneConfig(
        model=model,
        tune=TuneConfig(method="full"),
        data=InstructConfig(source=("hf:tatsu-lab/alpaca",), block=512, validation_fraction=0.01),
        align=replace(published_term(term), batch_size=8),
        teacher=TeacherConfig(ref=TEACHERS["dinov2-small"]),
        pairs=PairsConfig(source="hf:minhuh/prh@wit_1024"),
        optim=OptimConfig(lr=1e-5, weight_decay=0.0),
        loop=TextLoopConfig(steps=500, evaluate_every=100, batch_size=8, eval_batch_size=16),
    )


def small_pretraining(term: dict[str, Any] | None, **changes: Any) -> PretrainConfig:
    """The same on a CPU in minutes: a small GPT on a text of one's own, OpenMoji and EfficientNet-Lite0."""
    align = RegularizeConfig(metric="cka-linear-debiased", batch_size=256, max_length=32, held_out=128)
    config = PretrainConfig(
        corpus=CorpusConfig(vocabulary=2048, validation_fraction=0.05),
        block=128,
        gpt=GPTConfig(layers=4, heads=4, width=128),
        align=replace(align, **term) if term is not None else replace(align, metric="none"),
        optim=OptimConfig(lr=2e-3, weight_decay=0.1, betas=(0.9, 0.95), warmup_fraction=0.1, final_lr_fraction=0.1),
        loop=TextLoopConfig(steps=400, evaluate_every=100, evaluate_blocks=128, batch_size=32, eval_batch_size=32),
    )
    return replace(config, **changes)


def small_finetuning(term: dict[str, Any] | None, **changes: Any) -> FinetuneConfig:
    """Fine-tuning on a CPU: name a model and instructions of your own."""
    align = RegularizeConfig(metric="cka-linear-debiased", batch_size=256, max_length=32, held_out=128)
    config = FinetuneConfig(
        data=InstructConfig(block=256),
        align=replace(align, **term) if term is not None else replace(align, metric="none"),
        optim=OptimConfig(lr=1e-4, weight_decay=0.0, warmup_fraction=0.1),
        loop=TextLoopConfig(steps=200, evaluate_every=50, batch_size=8, eval_batch_size=32),
    )
    return replace(config, **changes)


def _add(name: str, summary: str, assumed: dict[str, str], make: Callable[..., Any], *args: Any, **changes: Any) -> None:
    RECIPES[name] = Recipe(name, partial(make, *args, **changes), summary, assumed)


def _add_pretraining() -> None:
    note, assumed = "GPT-2 124M on OpenWebText", ASSUMED_PRETRAIN
    inferred = {"loop.accumulation": "inferred: taken literally the run is minutes long on 4 H100s, A.1 says 10 hours"}
    arms: list[tuple[str, dict[str, Any] | None, str]]
    arms = [("cmar-pretrain", {}, "CKA towards DINOv2-S"), ("cmar-pretrain-baseline", None, "no alignment")]
    for name, term, title in arms:
        loop = pretraining(term).loop
        larger, many = replace(loop, batch_size=64), replace(loop, batch_size=32 * 40, accumulation=40)
        more = replace(published_term(term), batch_size=64)  # as many pairs as sequences
        told = "32 a micro-step under nanoGPT's accumulation of 40, as A.1's 10 hours suggest"
        _add(name, f"{note}, {title} (§4.1)", assumed, pretraining, term)
        _add(f"{name}-b64", f"{note}, {title}, batch 64 (A.1)", assumed, pretraining, term, loop=larger, align=more)
        _add(f"{name}-accumulated", f"{note}, {title}, {told}", assumed | inferred, pretraining, term, loop=many)
    for teacher, ref in TEACHERS.items():
        summary = f"{note}, CKA towards {teacher} (Fig. 3)"
        _add(f"cmar-pretrain-{teacher}", summary, assumed, pretraining, {}, teacher=TeacherConfig(ref=ref))
    for name, term in {**TERMS, **ABLATIONS}.items():
        told = " as published, degenerate: always 1 at 32 pairs (see -sound)" if name in DEGENERATE else ""
        _add(f"cmar-pretrain-{name}", f"{note}, {name}{told} (§4.4, A.2)", assumed, pretraining, term)
    for name in DEGENERATE:
        own = {"align.batch_size": "not the paper's: as many as the metric needs", "pairs.source": "not the paper's: so large"}
        pairs = PairsConfig(source="hf:lmms-lab/flickr30k", split="test")
        summary = f"{note}, {name} with {SOUND_PAIRS} pairs, more than features"
        term = {"metric": name, "batch_size": SOUND_PAIRS}
        _add(f"cmar-pretrain-{name}-sound", summary, assumed | own, pretraining, term, pairs=pairs)


def _add_finetuning() -> None:
    for size, model in {"1b": "hf:meta-llama/Llama-3.2-1B", "8b": "hf:meta-llama/Llama-3.1-8B"}.items():
        note = f"{model.removeprefix('hf:')} on Alpaca-52k"
        _add(f"cmar-finetune-{size}", f"{note}, CKA towards DINOv2-S (§4.3)", ASSUMED_FINETUNE, finetuning, model, {})
        _add(f"cmar-finetune-{size}-baseline", f"{note}, no alignment (§4.3)", ASSUMED_FINETUNE, finetuning, model, None)
        linear = {"metric": "cka-linear"}
        _add(f"cmar-finetune-{size}-cka-linear", f"{note}, linear CKA (§4.3)", ASSUMED_FINETUNE, finetuning, model, linear)


def _add_small(verb: str, make: Callable[[dict[str, Any] | None], Any]) -> None:
    note = f"small sibling of cmar-{verb}"
    _add(f"small-{verb}", f"{note}: debiased linear CKA", {}, make, {})
    _add(f"small-{verb}-baseline", f"{note}: no alignment", {}, make, None)
    for name, term in {**TERMS, **ABLATIONS, **SMALL_LAYERS}.items():
        told = ", degenerate as published: fewer pairs than features" if name in DEGENERATE else ""
        if name != "cka-linear-debiased":  # the sibling itself
            _add(f"small-{verb}-{name}", f"{note}: {name}{told}", {}, make, term)
    for name, ref in SMALL_TEACHERS.items():
        _add(f"small-{verb}-{name}", f"{note}: {ref} as the teacher", {}, make, {}, teacher=TeacherConfig(ref=ref))


_add_pretraining()
_add_finetuning()
_add_small("pretrain", small_pretraining)
_add_small("finetune", small_finetuning)
