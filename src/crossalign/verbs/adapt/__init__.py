"""``adapt``: a language model becomes an image classifier; and ``predict``, which uses one."""

from crossalign.config import AdaptConfig
from crossalign.core.progress import doing
from crossalign.core.refs import Ref
from crossalign.recipes import get_recipe
from crossalign.verbs import Verb


def run(config: AdaptConfig, recipe: str) -> str:
    """Train, and tell the accuracy in a line."""
    with doing("loading PyTorch"):
        from crossalign.verbs.adapt.job import adapt

    preset = get_recipe(recipe).make() if recipe else config
    if config.row == preset.row and row_name(config) != row_name(preset):
        config.row = ""  # the recipe's name of the row no longer says what runs
    result = adapt(config, recipe=recipe)
    validation, test = f"{result['validation']['accuracy']:.2%}", result["test"]
    if test is None:
        return f"{result['row']}: validation accuracy {validation}; {config.output}"
    accuracy = f"test accuracy {test['accuracy']:.2%} on {test['n']} images"
    return f"{result['row']}: {accuracy} (epoch {result['best_epoch']}, validation {validation}); {config.output}"


def row_name(config: AdaptConfig) -> str:
    """What a row of a table calls a run: "LoRA, random weights + alignment (mmd)"."""
    method = {"fpt": "FPT", "lora": "LoRA", "full": "Full fine-tuning"}[config.tune.method]
    weights = Ref(config.backbone.ref).control
    if weights in ("none", "vit"):
        return {"none": "No backbone", "vit": "ViT from scratch"}[weights]
    control = f", {weights} weights" if weights else ""
    return method + control + ("" if config.align.metric == "none" else f" + alignment ({config.align.metric})")


ADAPT = Verb(AdaptConfig, run, {AdaptConfig: AdaptConfig})
