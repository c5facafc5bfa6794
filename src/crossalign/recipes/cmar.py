"""The recipes of "Cross-Modal Alignment Regularization" (CMAR): published settings, ablations, controls, small siblings.

``cmar-*`` carry the paper's settings; where it is silent, ``ASSUMED`` says what was taken and why. ``small-pretrain*`` and
``small-finetune*`` are the same rows with our sounder defaults (debiased CKA, a pair batch of 256) on what a laptop can do.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
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
    to_dict,
)
from crossalign.core.refs import Ref
from crossalign.recipes import RECIPES, Recipe


@dataclass(frozen=True)
class PaperTeacher:
    """A row of CMAR's Table 2, with the weights that it most likely means: the paper gives no checkpoint names."""

    ref: str
    size: str
    """Parameters, as the table has them."""
    doubt: str = ""
    """What the table says that these weights do not."""


TEACHERS: dict[str, PaperTeacher] = {
    "dinov2-small": PaperTeacher("timm:vit_small_patch14_dinov2.lvd142m", "0.02B"),
    "dinov2-base": PaperTeacher("timm:vit_base_patch14_dinov2.lvd142m", "0.09B"),
    "dinov2-large": PaperTeacher("timm:vit_large_patch14_dinov2.lvd142m", "0.30B"),
    "dinov2-giant": PaperTeacher("timm:vit_giant_patch14_dinov2.lvd142m", "1.14B"),
    "mae": PaperTeacher(
        "timm:vit_large_patch16_224.mae", "0.30B", "; it says ImageNet-21K, the published MAE ViT-L has ImageNet-1k"
    ),
    "clip": PaperTeacher(
        "timm:vit_large_patch14_clip_224.laion2b_ft_in12k",
        "0.30B",
        "; it says patch 16, what there is of this size on these data has 14",
    ),
    "augreg": PaperTeacher("timm:vit_large_patch16_224.augreg_in21k", "0.33B"),
}
"""All seven, inferred from sizes and data. timm's transforms are used; the DINOv2 models then see 518 pixels a side."""

SMALL_TEACHERS = {"mobilenet": "package:mobilenet_v2", "random-teacher": "random:package:efficientnet_lite0"}
"""Another trained teacher that a pip package brings, and the control."""


@dataclass(frozen=True)
class Arm:
    """A row that changes the usual term."""

    term: dict[str, Any]
    """What of the term it changes."""
    where: str = "not in the paper"
    """Its place in the paper."""
    why: dict[str, str] = field(default_factory=dict)
    """What the paper leaves open of what it changes."""


FEATURES = "§4.4.4 does not say whether of features or of weights: of features here, see -{0}-weights"
WEIGHTS = "§4.4.4 does not say whether of features or of weights: of weights here, see -{0}"
PENALTY_WEIGHT = "not given for penalties; that of the alignment"
TERMS: dict[str, Arm] = {
    "cka-linear": Arm({"metric": "cka-linear"}, "§4.4.4, Fig. 7a"),
    "cka-linear-debiased": Arm({"metric": "cka-linear-debiased"}),
    "cka-rbf-debiased": Arm({"metric": "cka-rbf-debiased"}),
    "cca": Arm({"metric": "cca"}, "named in §3.2, in none of its results"),
    "svcca": Arm(
        {"metric": "svcca"}, "§4.4.4, Fig. 7a", {"align.metric": "the share of variance kept is not given; 99 %, its authors'"}
    ),
    "pwcca": Arm(
        {"metric": "pwcca"},
        "§4.4.4, Fig. 7a",
        {"align.metric": "not said whether the weights move with the features: they do, in pwcca-fixed they do not"},
    ),
    "linear-regression": Arm({"metric": "linear-regression"}, "Fig. 7a, A.7"),
    "dot-product": Arm(
        {"metric": "dot-product"},
        "Fig. 7a, A.7",
        {"align.metric": "A.7's is not defined for two widths: rows of length 1, the narrower filled up with zeros"},
    ),
    **{
        f"{norm}{of}": Arm(
            {"metric": f"{norm}{of}"},
            "§4.4.4, Fig. 7b",
            {"align.metric": open_question.format(norm), "align.weight": PENALTY_WEIGHT},
        )
        for of, open_question in (("", FEATURES), ("-weights", WEIGHTS))
        for norm in ("l1", "l2")
    },
    "koleo": Arm({"metric": "koleo"}, "Fig. 7b", {"align.weight": PENALTY_WEIGHT}),
    "unpaired": Arm(
        {"mode": "unpaired"},
        "§4.4.2, Fig. 5",
        {"align.mode": "randomly selected, says Fig. 5, not whether once: each text keeps one wrong image, drawn by the seed"},
    ),
    "mean": Arm(
        {"metric": "kernel-alignment", "mode": "mean"},
        "§4.4.2, Fig. 5, which do not state its form",
        {
            "align.metric": "the form of this row is not stated; CKA of a constant is 0/0, so kernel alignment, not centred",
            "align.mode": "the mean over all pairs; how it is aligned with is not stated",
        },
    ),
    "captions": Arm({"metric": "captions", "weight": 1.0}),
}
"""§4.4.2, §4.4.4 and controls that the paper lacks."""
IN_TEXT = "the text names {0} alone; the other points of {1} are not in it"
LAYERS = {"align.layers": "the text names the penultimate layer alone; those of Fig. 6 are not in it"}
ABLATIONS: dict[str, Arm] = {
    "lambda-5": Arm({"weight": 5.0}, "A.2, Fig. 8"),
    **{
        f"lambda-{value:g}": Arm({"weight": value}, "Fig. 8", {"align.weight": IN_TEXT.format("5 and 10", "Fig. 8")})
        for value in (1.0, 20.0, 50.0)
    },
    **{
        f"every-{value}": Arm({"every": value}, "Fig. 8", {"align.every": IN_TEXT.format("20", "Fig. 8")})
        for value in (5, 10, 50, 100)
    },
    "layers-first": Arm({"layers": ("1",)}, "§4.4.3, Fig. 6", LAYERS),
    "layers-middle": Arm({"layers": ("6",)}, "§4.4.3, Fig. 6", LAYERS),
    "layers-last": Arm({"layers": ("last",)}, "§4.4.3, Fig. 6", LAYERS),
    "layers-upper": Arm({"layers": ("9", "10", "11")}, "§4.4.3, Fig. 6", LAYERS),
    "layers-all": Arm({"layers": ("all",)}, "§4.4.3, Fig. 6", LAYERS),
}
"""A.2 and §4.4.3."""
DEGENERATE = {
    "cca": "1 at 32 pairs whatever the features",
    "svcca": "high at 32 pairs whatever the features",
    "pwcca": "1 at 32 pairs whatever the features",
    "linear-regression": "1 at 32 pairs whatever the features",
}
"""What has fewer pairs than features at the published batch: of unrelated features three are exactly 1, so that their gradient
says nothing, and SVCCA, which keeps 99 % of the variance, is as high as their spectrum is flat (.75 where the k-th standard
deviation is 1/k)."""
SMALL_LAYERS = {
    "layers-middle": Arm({"layers": ("2",)}),
    "layers-upper": Arm({"layers": ("2", "3")}),
}
"""The same places in the four blocks of a small GPT."""
SOUND_PAIRS = 2048  # more than the 768 and 384 features together
SMALL_PAIRS = 1024  # of OpenMoji's 1,114
SMALL_LAYER = "6"  # 192 features: with the last layer's 1,280 there would be fewer pairs than features

ASSUMED_TERM = {
    "align.metric": "§4.4.4 calls linear CKA additional and A.7 lists RBF first, so plain CKA is taken to be RBF",
    "align.layers": "not given for the main results; the best of §4.4.3",
    "align.pool": "not given; the mean over tokens",
    "align.batch_size": "not given; as many pairs as sequences of text",
    "align.max_length": "not given",
    "align.queue": "not mentioned, so none",
    "pairs.source": "not given; the 1,024 pairs of WIT on which the Platonic work, §2.1's source, measures alignment",
    "pairs.split": "not given; that set has one",
    "align.held_out": "that set is trained on whole, so there is none",
    "teacher.layers": "not given",
    "teacher.pool": "not given; as the model's own classifier does",
}
CHECKPOINT = "Table 2 names no checkpoint; this one fits its size and data"
ASSUMED_PRETRAIN = ASSUMED_TERM | {
    "block": "not given; nanoGPT's 1024",
    "corpus.source": "the hub's parquet copy of OpenWebText, whose own script datasets 4 refuses; not tried here",
    "corpus.tokenizer": "GPT-2's, as nanoGPT",
    "corpus.validation_fraction": "nanoGPT's",
    "gpt.dropout": "nanoGPT's 0 for pre-training",
    "optim.schedule": "nanoGPT's",
    "optim.warmup_fraction": "nanoGPT's 2,000 steps, of 8,000",
    "optim.final_lr_fraction": "nanoGPT's smallest rate, 6e-5",
    "optim.weight_decay": "nanoGPT's",
    "optim.betas": "nanoGPT's",
    "optim.clip": "nanoGPT's",
    "loop.batch_size": "§4.1 says 32, A.1 says 64: see the sibling -b64; sequences a step over all GPUs",
    "teacher.ref": f"§4.4 does not say which of the seven; the one of fine-tuning. {CHECKPOINT}",
    "seed": "five runs (Fig. 3), seeds not given; `reproduce cmar-pretrain --scale paper` takes 0 to 4",
}
ASSUMED_FINETUNE = ASSUMED_TERM | {
    "data.block": "not given; 512 as in Alpaca's pipeline, which §4.1 names",
    "data.validation_fraction": "not given",
    "tune.method": "not said to be anything but full",
    "optim.schedule": "not given; Alpaca's cosine to 0",
    "optim.final_lr_fraction": "not given; Alpaca's cosine to 0",
    "optim.warmup_fraction": "not given; Alpaca's",
    "optim.weight_decay": "not given; Alpaca's",
    "optim.betas": "not given; the defaults of transformers' Trainer, as Alpaca's pipeline",
    "optim.clip": "not given; the default of transformers' Trainer, as Alpaca's pipeline",
    "teacher.ref": CHECKPOINT,
    "seed": "neither seeds nor the number of runs are given",
}
UNUSED: dict[str, tuple[str, ...]] = {
    "none": ("align.", "pairs.", "teacher."),
    "captions": ("teacher.", "align.layers", "align.pool", "align.queue"),
    **dict.fromkeys(("l1", "l2", "koleo"), ("teacher.", "align.queue")),
    **dict.fromkeys(("l1-weights", "l2-weights"), ("align.", "pairs.", "teacher.")),
}
"""Settings that a metric does not look at."""


BASELINE = {"metric": "none"}
"""What a row without alignment changes of the usual term."""
PUBLISHED = RegularizeConfig(metric="cka-rbf", weight=10.0, every=20, layers=("penultimate",), batch_size=32, held_out=0)
SMALL = RegularizeConfig(metric="cka-linear-debiased", batch_size=256, max_length=32, held_out=128)


def pretraining(term: dict[str, Any], **changes: Any) -> PretrainConfig:
    """CMAR §4.1: GPT-2 124M on OpenWebText; ``term`` is what it changes of λ = 10 every 20 steps."""
    config = PretrainConfig(
        corpus=CorpusConfig(
            source=("hf:Skylion007/openwebtext@refs/convert/parquet",),
            tokenizer="hf:openai-community/gpt2",
            validation_fraction=0.0005,
        ),
        block=1024,
        gpt=GPTConfig(layers=12, heads=12, width=768, dropout=0.0),
        align=replace(PUBLISHED, **term),
        teacher=TeacherConfig(ref=TEACHERS["dinov2-small"].ref),
        pairs=PairsConfig(source="hf:minhuh/prh@wit_1024"),
        optim=OptimConfig(lr=6e-3, weight_decay=0.1, betas=(0.9, 0.95), warmup_fraction=0.25, final_lr_fraction=0.01, clip=1.0),
        loop=TextLoopConfig(steps=8000, evaluate_every=500, evaluate_blocks=256, batch_size=32, eval_batch_size=32),
    )
    return replace(config, **changes)


def finetuning(term: dict[str, Any], model: str) -> FinetuneConfig:
    """CMAR §4.1: a Llama on Alpaca-52k, 500 steps."""
    return FinetuneConfig(
        model=model,
        tune=TuneConfig(method="full"),
        data=InstructConfig(source=("hf:tatsu-lab/alpaca",), block=512, validation_fraction=0.01),
        align=replace(PUBLISHED, **{"batch_size": 8} | term),
        teacher=TeacherConfig(ref=TEACHERS["dinov2-small"].ref),
        pairs=PairsConfig(source="hf:minhuh/prh@wit_1024"),
        optim=OptimConfig(lr=1e-5, weight_decay=0.0, betas=(0.9, 0.999), warmup_fraction=0.03, final_lr_fraction=0.0, clip=1.0),
        loop=TextLoopConfig(steps=500, evaluate_every=100, batch_size=8, eval_batch_size=16),
    )


def small_pretraining(term: dict[str, Any], **changes: Any) -> PretrainConfig:
    """The same on a CPU in minutes: a small GPT on a text of one's own, OpenMoji and EfficientNet-Lite0."""
    config = PretrainConfig(
        corpus=CorpusConfig(vocabulary=2048, validation_fraction=0.05),
        block=128,
        gpt=GPTConfig(layers=4, heads=4, width=128),
        align=replace(SMALL, **term),
        optim=OptimConfig(lr=2e-3, weight_decay=0.1, betas=(0.9, 0.95), warmup_fraction=0.1, final_lr_fraction=0.1),
        loop=TextLoopConfig(steps=400, evaluate_every=100, evaluate_blocks=128, batch_size=32, eval_batch_size=32),
    )
    return replace(config, **changes)


def small_finetuning(term: dict[str, Any], **changes: Any) -> FinetuneConfig:
    """Fine-tuning on a CPU: name a model and instructions of your own."""
    config = FinetuneConfig(
        data=InstructConfig(block=256),
        align=replace(SMALL, **term),
        optim=OptimConfig(lr=1e-4, weight_decay=0.0, warmup_fraction=0.1),
        loop=TextLoopConfig(steps=200, evaluate_every=50, batch_size=8, eval_batch_size=32),
    )
    return replace(config, **changes)


def _adding(
    prefix: str, note: str, make: Callable[..., Any], assumed: dict[str, str] | None = None, **fixed: Any
) -> Callable[..., None]:
    """A function that registers a row ``cmar-pretrain-NAME``, or of another ``prefix``.

    Args:
        prefix: how the names of these recipes begin.
        note: how their summaries begin.
        make: builds a configuration from the changes of the term, ``fixed`` and the row's other changes.
        assumed: reasons for the settings of the usual row. What a row changes of that one has its reasons in its own ``why``
            or none.
        fixed: of ``make``, the same for all rows.
    """
    usual = to_dict(make({}, **fixed))
    sections = [section for section, values in usual.items() if isinstance(values, dict)]

    def add(name: str, summary: str, term: dict[str, Any], why: dict[str, str] | None = None, **changes: Any) -> None:
        build = partial(make, term, **fixed, **changes)
        config = build()
        settings = to_dict(config)
        changed = [f"{s}.{key}" for s in sections for key, value in settings[s].items() if value != usual[s][key]]
        gone = (*UNUSED.get(config.align.metric, ()), *changed)
        unchanged = {key: reason for key, reason in (assumed or {}).items() if not key.startswith(gone)}
        recipe = Recipe(f"{prefix}{name}", build, f"{note}{summary}", unchanged | (why or {}))
        RECIPES.register(recipe.name, recipe)

    return add


def _add_pretraining() -> None:
    add = _adding("cmar-pretrain", "GPT-2 124M on OpenWebText, ", pretraining, ASSUMED_PRETRAIN)
    loop = pretraining({}).loop
    rows: dict[str, tuple[dict[str, Any], str, str]] = {
        "": ({}, "CKA towards DINOv2-S", "Pre-training + cka-rbf"),
        "-baseline": (BASELINE, "no alignment", "Pre-training"),
    }
    for name, (term, title, row) in rows.items():
        add(name, f"{title} (§4.1)", term)
        why = {"loop.batch_size": "A.1 says 64, §4.1 32; sequences a step over all GPUs"}
        if term != BASELINE:
            why["align.batch_size"] = "not given; as many pairs as sequences of text, 64"
        loop_64, row_64 = replace(loop, batch_size=64), f"{row}, batch 64"
        add(f"{name}-b64", f"{title}, batch 64 (A.1)", term | {"batch_size": 64}, why, loop=loop_64, row=row_64)
        accumulated = "32 a micro-step under nanoGPT's accumulation of 40, as A.1's 10 hours suggest"
        why = {
            "loop.batch_size": "§4.1's 32 taken as that of a micro-step",
            "loop.accumulation": "inferred: taken literally the run is minutes long on 4 H100s, A.1 says 10 hours",
        }
        loop_40 = replace(loop, batch_size=32 * 40, accumulation=40)
        add(f"{name}-accumulated", f"{title}, {accumulated}", term, why, loop=loop_40, row=f"{row}, accumulated")
    for name, teacher in TEACHERS.items():
        why = {"teacher.ref": CHECKPOINT + teacher.doubt}
        add(f"-{name}", f"CKA towards {name} (Fig. 3)", {}, why, teacher=TeacherConfig(ref=teacher.ref))
    for name, arm in {**TERMS, **ABLATIONS}.items():
        term, why, note = arm.term, arm.why, ""
        if name in DEGENERATE:
            term = term | {"on_degenerate": "warn"}
            why = why | {"align.on_degenerate": f"degenerate at the published batch, {DEGENERATE[name]}; see -{name}-sound"}
            note = f" at the published batch, degenerate: {DEGENERATE[name]} (see -sound)"
        add(f"-{name}", f"{name}{note} ({arm.where})", term, why)
    for name in DEGENERATE:
        why = TERMS[name].why | {
            "align.batch_size": "not the paper's: as many as the metric needs",
            "align.held_out": "none, as in the other rows",
            "pairs.source": "not the paper's: so large",
            "pairs.split": "that set has one",
        }
        summary = f"{name} with {SOUND_PAIRS} pairs, more than features (not in the paper)"
        pairs = PairsConfig(source="hf:lmms-lab/flickr30k", split="test")
        row = f"Pre-training + {name}, {SOUND_PAIRS} pairs"
        add(f"-{name}-sound", summary, TERMS[name].term | {"batch_size": SOUND_PAIRS}, why, pairs=pairs, row=row)


def _add_finetuning() -> None:
    few = "8 pairs, where unrelated features score up to .99"
    for size, model in {"1b": "hf:meta-llama/Llama-3.2-1B", "8b": "hf:meta-llama/Llama-3.1-8B"}.items():
        note = f"{Ref(model).name} on Alpaca-52k, "
        add = _adding(f"cmar-finetune-{size}", note, finetuning, ASSUMED_FINETUNE, model=model)
        why = {"align.batch_size": f"not given; as many pairs as sequences of text: {few}, see -cka-rbf-debiased"}
        add("", f"CKA towards DINOv2-S on {few} (§4.3)", {}, why)
        add("-baseline", "no alignment (§4.3)", BASELINE)
        add("-cka-linear", f"linear CKA on {few} (not in the paper)", TERMS["cka-linear"].term, why)
        term = TERMS["cka-rbf-debiased"].term | {"batch_size": 256}
        why = {"align.batch_size": "not the paper's: enough to learn from"}
        add("-cka-rbf-debiased", "debiased CKA on 256 pairs (not in the paper)", term, why)


def _add_small(verb: str, make: Callable[..., Any]) -> None:
    add = _adding(f"small-{verb}", f"small sibling of cmar-{verb}", make)
    add("", ": debiased linear CKA", {})
    add("-baseline", ": no alignment", BASELINE)
    for name, arm in {**TERMS, **ABLATIONS, **SMALL_LAYERS}.items():
        if name in DEGENERATE:
            pairs = f"{SMALL_PAIRS} pairs towards layer {SMALL_LAYER} of the teacher, more pairs than features"
            term, teacher = arm.term | {"batch_size": SMALL_PAIRS}, TeacherConfig(layers=(SMALL_LAYER,))
            add(f"-{name}", f": {name} with {pairs}", term, teacher=teacher)
        elif name != "cka-linear-debiased":  # the sibling itself
            add(f"-{name}", f": {name}", arm.term)
    for name, ref in SMALL_TEACHERS.items():
        add(f"-{name}", f": {ref} as the teacher", {}, teacher=TeacherConfig(ref=ref))
    if verb == "pretrain":
        loop = make({}).loop
        batches = {
            "b64": ("batch 64", replace(loop, batch_size=64)),
            "accumulated": ("32 a micro-step, accumulation 4", replace(loop, batch_size=32 * 4, accumulation=4)),
        }
        rows: dict[str, tuple[dict[str, Any], str]] = {
            "": ({}, "Pre-training + cka-linear-debiased"),
            "-baseline": (BASELINE, "Pre-training"),
        }
        for suffix, (title, changed) in batches.items():
            for name, (term, row) in rows.items():
                add(f"{name}-{suffix}", f"{name}-{suffix}: {title}", term, loop=changed, row=f"{row}, {title}")


_add_pretraining()
_add_finetuning()
_add_small("pretrain", small_pretraining)
_add_small("finetune", small_finetuning)
