"""When a setting has an effect: one table for every verb. Searches and names of rows ask the same way."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from crossalign.config.common import flatten, to_dict
from crossalign.core.errors import UserError
from crossalign.core.progress import announce


@dataclass(frozen=True)
class When:
    """On which values of another setting, ``name``, a setting has an effect: on ``values``, or on all but them."""

    name: str
    equal: bool
    values: tuple[Any, ...]
    text: str
    """As it is written."""

    def holds(self, settings: Mapping[str, Any]) -> bool:
        """Whether it holds for settings by field name; it does not where the other field is out itself."""
        return self.name in settings and (settings[self.name] in self.values) == self.equal


TERM = "align.metric != none"
MEASURED = f"{TERM} or align.held_out != None|0"
TAPPED = "align.metric != none|captions|l1-weights|l2-weights or align.held_out != 0"
SEEN = "align.metric != none|captions|l1|l2|koleo|l1-weights|l2-weights"
STAGE = dict.fromkeys(
    (f"align.{name}" for name in ("epochs", "lr", "schedule", "weight_decay", "level", "target", "sequences")), (TERM,)
)
_RULES: dict[str, tuple[str, ...]] = STAGE | {
    "align.corpus": (TERM, "align.target == corpus"),
    "align.sequence_length": (TERM,),
    "align.mmd_estimator": (TERM, "align.metric == mmd"),
    "align.max_tokens": (TERM,),
    "align.otdd_classes": (TERM, "align.metric == otdd"),
    "align.weight": (TERM,),
    "align.every": (TERM,),
    "align.batch_size": (TERM,),
    "align.log_every": (TERM,),
    "align.layers": (MEASURED, TAPPED),
    "align.pool": (MEASURED, TAPPED),
    "align.max_length": (MEASURED,),
    "align.mode": (TERM, SEEN),
    "align.queue": (TERM, SEEN),
    "align.on_degenerate": (TERM, "align.metric == cca|svcca|pwcca|linear-regression"),
    "align.held_out_file": (MEASURED, "align.held_out != 0"),
    "align.held_out_teacher": (MEASURED, "align.held_out != 0"),
    "teacher": (MEASURED, f"{SEEN} or align.held_out != 0"),
    "teacher.weights": ("teacher.combine == sum",),
    "pairs": (MEASURED,),
    "pairs.split": ("pairs.split_file == empty",),
    "tune.lora_rank": ("tune.method == lora",),
    "tune.lora_alpha": ("tune.method == lora",),
    "tune.lora_dropout": ("tune.method == lora",),
    "corpus": ("prepared == empty",),
    "corpus.vocabulary": ("corpus.tokenizer == empty",),
    "vocabulary": ("tokenizer == empty",),
    "optim.final_lr_fraction": ("optim.schedule != constant",),
    "optim.decay_all": ("optim.weight_decay != 0.0",),
    "tracking.mlflow_uri": ("tracking.mlflow == True",),
    "tracking.experiment": ("tracking.mlflow == True",),
    "neighbours": ("metric == mutual-knn|soft-mutual-knn",),
    "text_kilobytes": ("text != empty",),
    "block": ("text != empty",),
    "seed": ("few_shot != 0",),
    "rungs": ("resources == empty",),
    "sweep_epochs": ("lrs != empty",),
}
"""A setting, or a section, has an effect only when all of these hold of the others that a verb has."""
REFUSED = ("corpus",)
"""What is recorded of the run as what it was made from: given without effect, it would be recorded falsely."""


def reason(settings: Mapping[str, Any], name: str) -> str:
    """Why the setting ``name`` has no effect beside the other ``settings`` by name; empty where it has one."""
    section = name.partition(".")[0] if "." in name else ""
    for rule in (*_RULES.get(section, ()), *_RULES.get(name, ())):
        options = [_read(text) for text in rule.split(" or ")]
        options = [option for option in options if option.name in settings]
        words = {option.name: _word(settings[option.name]) for option in options}
        if options and not any(option.holds(words) for option in options):
            needs = " or ".join(f"{_option(o.name)} is {'' if o.equal else 'not '}{_either(o.values)}" for o in options)
            return f"it matters only where {needs}, and {_option(options[0].name)} is {words[options[0].name]}"
    return ""


def announce_unused(configs: Sequence[Any], given: Iterable[str]) -> None:
    """Say in a line of each setting that was ``given``, by its name, where it changes nothing of any of ``configs``.

    Raises:
        UserError: one that says what a run is made from.
    """
    everything = [flatten(to_dict(config)) for config in configs]
    for name in given:
        reasons = [reason(settings, name) for settings in everything]
        if reasons and all(reasons):
            sentence = f"{_option(name)} has no effect: {reasons[0]}"
            if name.partition(".")[0] in REFUSED:
                raise UserError(f"{sentence}; leave one of them out")
            announce(sentence)


def _read(text: str) -> When:
    match = re.fullmatch(r"(\S+) (==|!=) (\S+)", text)
    assert match
    return When(match[1], match[2] == "==", tuple(match[3].split("|")), text)


def _word(value: Any) -> str:
    return "empty" if value in ("", [], ()) else str(value)


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _either(words: Sequence[str]) -> str:
    return " or ".join(words) if len(words) < 3 else f"one of {', '.join(words)}"
