"""``pretrain`` and ``finetune``: a language model learns the next token, pulled towards a vision model or not."""

from crossalign.config import FinetuneConfig, PretrainConfig, RegularizeConfig, TeacherConfig, flatten, to_dict
from crossalign.config.effect import reason
from crossalign.core.progress import doing
from crossalign.core.refs import Ref
from crossalign.verbs import Verb


def run(config: PretrainConfig | FinetuneConfig, recipe: str) -> str:
    """Train, and tell the scores in a line."""
    with doing("loading PyTorch"):
        from crossalign.verbs.language_model.job import train

    result = train(config, recipe)
    parts = [f"{text} perplexity {scores['perplexity']:.2f}" for text, scores in result["scores"].items()]
    aligned = result["held_out"].get("held_out_cka-linear-debiased")
    parts += [] if aligned is None else [f"alignment of held-out pairs {aligned:.3f}"]
    return f"{result['row']}: {', '.join(parts)}; {config.output}"


def row_name(config: PretrainConfig | FinetuneConfig) -> str:
    """What a row of a table calls a run: "Pre-training + cka-rbf (unpaired)"."""
    align, teacher = config.align, config.teacher
    title = "Pre-training"
    if isinstance(config, FinetuneConfig):
        title = "LoRA fine-tuning" if config.tune.method == "lora" else "Fine-tuning"
    if align.metric == "none" or not align.weight:
        return title
    settings = flatten(to_dict(config)) | {"align.held_out": 0}  # what is measured beside training is no other training
    usual, ref = RegularizeConfig(), Ref(teacher.ref)
    looks, taps, queues = (not reason(settings, name) for name in ("teacher.ref", "align.layers", "align.queue"))
    notes: list[str] = [align.mode] if looks and align.mode != "paired" else []
    notes += [f"{ref.control} teacher"] if looks and ref.control else []
    notes += [ref.short_name] if looks and ref.base != TeacherConfig().ref else []
    notes += [f"teacher layers {' '.join(teacher.layers)}"] if looks and teacher.layers != TeacherConfig().layers else []
    notes += [f"λ = {align.weight:g}"] if align.weight != (1.0 if align.metric == "captions" else usual.weight) else []
    notes += [f"every {align.every}"] if align.every != usual.every else []
    notes += [f"layers {' '.join(align.layers)}"] if taps and align.layers != usual.layers else []
    notes += [f"queue {align.queue}"] if queues and align.queue else []
    return f"{title} + {align.metric}" + (f" ({', '.join(notes)})" if notes else "")


PRETRAIN = Verb(PretrainConfig, run, {PretrainConfig: PretrainConfig})
FINETUNE = Verb(FinetuneConfig, run, {FinetuneConfig: FinetuneConfig})
