"""The models that ``measure`` looks at: which ones a list of references means, and the features of their layers."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from crossalign.config import MeasureConfig, TeacherConfig
from crossalign.core.errors import UserError
from crossalign.core.reading import user_path
from crossalign.core.refs import Ref
from crossalign.data.records import read_text
from crossalign.features.sources import ImageSource, TextSource, bits_per_byte
from crossalign.features.store import FeatureSource, FeatureStore
from crossalign.runs.names import RunFolder
from crossalign.runs.schema import read_result

if TYPE_CHECKING:
    from crossalign.data.pairs.load import Pairs


@dataclass(frozen=True)
class Measured:
    """A model with the features of its layers."""

    ref: str
    name: str = ""
    layers: dict[str, Tensor] = field(default_factory=dict)
    """By the layer's name: (n, width)."""
    run: str = ""
    """The training run that it was kept by: as much of the end of its folder's path as tells it from the others."""
    step: int | None = None
    """Optimiser steps of that run."""
    bits_per_byte: float | None = None
    source: FeatureSource | None = None
    """What gives its features."""

    def facts(self) -> dict[str, Any]:
        """What measure.json says of it."""
        facts = {"name": self.name, "ref": self.ref, "layers": list(self.layers)}
        return facts | {
            key: getattr(self, key) for key in ("run", "step", "bits_per_byte") if getattr(self, key) not in (None, "")
        }


def name_models(config: MeasureConfig) -> tuple[list[Measured], list[Measured]]:
    """The language models and the vision models that are meant, without their features; what is not there is said now.

    Raises:
        UserError: a reference that names no model, a run that kept none, one that is named twice, or a layer or pooling that
            a vision model does not have.
    """
    layers: tuple[Any, ...] = config.language_layers
    reading = layers, config.pool, config.captions, config.max_length, config.batch_size, config.seed
    teacher = TeacherConfig(
        layers=config.vision_layers, pool=config.vision_pool, seed=config.seed, batch_size=config.batch_size
    )
    language = _named(_with_twins(_in_runs(config.language), config.twins))
    vision = _named(_with_twins([Measured(ref) for ref in config.vision], config.twins))
    language = [replace(model, source=TextSource(model.ref, *reading)) for model in language]
    vision = [replace(model, source=ImageSource(replace(teacher, ref=model.ref))) for model in vision]
    for model in (*language, *vision):
        assert model.source
        _ = model.source.key  # which says whether all is there that it needs
    return language, vision


def look(models: list[Measured], pairs: Pairs, device: str) -> list[Measured]:
    """The models with the features of the pairs, of their texts or images.

    Raises:
        UserError: see :meth:`FeatureStore.read`; or a layer that a model does not have, or that gives all pairs the same.
    """
    store = FeatureStore(pairs, device)
    seen = []
    for model in models:
        assert model.source
        layers = store.read(model.source).by_layer()  # of the user's own file one, unless several lie in it side by side
        for name, values in layers.items():
            if not (values - values[0]).abs().max() > 1e-6 * values.abs().max():
                alike = f"layer {name} of '{model.ref}' gives all {len(values)} pairs the same features"
                raise UserError(f"{alike}: leave that layer out")
        seen.append(replace(model, layers=layers))
    return seen


def scored_text(config: MeasureConfig) -> str:
    """The first kilobytes of the text on which language models are scored, up to the end of a line; empty where none is named.

    Raises:
        UserError: a text that is empty.
    """
    if not config.text:
        return ""
    text = read_text(config.text)
    start = text.encode()[: 1024 * config.text_kilobytes].decode(errors="ignore")
    return start if len(start) == len(text) else start[: start.rfind("\n") + 1] or start


def with_quality(models: list[Measured], text: str, config: MeasureConfig, device: str) -> list[Measured]:
    """The language models with their bits a byte on ``text``, if there is any."""
    quality = partial(bits_per_byte, text=text, block=config.block, seed=config.seed, device=device)
    if not text:
        return models
    return [model if Ref(model.ref).file else replace(model, bits_per_byte=quality(model.ref)) for model in models]


def _in_runs(refs: tuple[str, ...]) -> list[Measured]:
    """The references, with the models that it kept in place of a training run."""
    folders = [user_path(ref) for ref in refs]
    names = _run_names(folder.resolve() for folder in folders if RunFolder(folder).config.is_file())
    models = []
    for ref, folder in zip(refs, folders, strict=True):
        models += _snapshots(folder, names[folder.resolve()]) if folder.resolve() in names else [Measured(ref)]
    return models


def _snapshots(folder: Path, run: str) -> list[Measured]:
    """The models of a training run: those kept during training, and the last one."""
    matches = {path: re.fullmatch(r"step-(\d{7,})", path.name) for path in RunFolder(folder).snapshots.glob("step-*")}
    models = [Measured(str(path), run=run, step=int(match[1])) for path, match in matches.items() if match]
    models.sort(key=lambda model: model.step or 0)
    last, result = RunFolder(folder).model, RunFolder(folder).result
    if not models and not last.is_dir():
        raise UserError(f"the run '{folder}' has no model yet: let it finish, or train with --loop.keep-every")
    if not models:
        return [Measured(str(last), run=run)]
    done = int(read_result(result).get("steps") or 0) if result.exists() else 0  # of which keep_every need be no divisor
    if last.is_dir() and done > (models[-1].step or 0):
        models.append(Measured(str(last), run=run, step=done))
    return models


def _run_names(folders: Iterable[Path]) -> dict[Path, str]:
    """As much of the end of each folder's path as tells it from the others."""
    ends = {folder: ["/".join(folder.parts[-count:]) for count in range(1, len(folder.parts) + 1)] for folder in folders}
    return {
        folder: next(end for end in own if sum(end in other for other in ends.values()) == 1) for folder, own in ends.items()
    }


def _with_twins(models: list[Measured], twins: bool) -> list[Measured]:
    """The models, and after each pretrained one its twin with random weights, unless that is given already.

    A training run has none: its own model before the first step is what its last one is compared with.
    """
    given, measured = {model.ref for model in models}, []
    for model in models:
        measured.append(model)
        twin, ref = f"random:{model.ref}", Ref(model.ref)
        if twins and not model.run and twin not in given and not (ref.control or ref.file):
            measured.append(Measured(twin))
    return measured


def _named(models: list[Measured]) -> list[Measured]:
    """The models with names that tell them apart.

    Raises:
        UserError: the same model twice.
    """
    named: dict[str, Measured] = {}
    taken = [_name(model) for model in models]
    for model, name in zip(models, taken, strict=True):
        name = name if taken.count(name) == 1 else model.ref
        if name in named:
            raise UserError(f"'{model.ref}' is named twice: once is enough")
        named[name] = replace(model, name=name)
    return list(named.values())


def _name(model: Measured) -> str:
    if model.run:
        return model.run if model.step is None else f"{model.run}, step {model.step:,}"
    ref = Ref(model.ref)
    return f"{ref.control} {ref.short_name}".strip().removesuffix(".gguf")
