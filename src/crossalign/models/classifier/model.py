"""The adapted model: embedder → language backbone → pool → dropout → linear head (CMDA §3.1.2).

Shapes: B batch, C channels, H and W sides, T tokens, D backbone width, K classes.
"""

from __future__ import annotations

import dataclasses
import html
import re
from collections.abc import Iterable, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from crossalign.config import BackboneConfig, DataConfig, EmbedderConfig, HeadConfig, TuneConfig, update, validate
from crossalign.core.errors import BadArgument, UserError, first_line
from crossalign.core.files import as_umask, write_json, write_text
from crossalign.core.reading import shown, user_path
from crossalign.core.refs import Ref
from crossalign.data.model_files import absolute, fetch_page, model_folder, read_config
from crossalign.models.classifier.backbone import Backbone
from crossalign.models.classifier.embedding import InputEmbedding, InputSpec, check_inputs
from crossalign.models.classifier.freezing import apply_freeze_plan
from crossalign.models.language.inner import add_lora
from crossalign.models.language.model import LanguageModel, open_language_model
from crossalign.models.loading import building, built, put_tensors, read_tensors, trained_state, write_tensors

FORMAT = "crossalign.ImageClassifier/1"


@dataclasses.dataclass
class ModelSettings:
    """The sections of a run's configuration that shape the model."""

    backbone: BackboneConfig = dataclasses.field(default_factory=BackboneConfig)
    embedder: EmbedderConfig = dataclasses.field(default_factory=EmbedderConfig)
    tune: TuneConfig = dataclasses.field(default_factory=TuneConfig)
    head: HeadConfig = dataclasses.field(default_factory=HeadConfig)


class ImageClassifier(nn.Module):
    """A language model made an image classifier.

    ``forward``: images (B, C, H, W), uint8 or floats on a scale of 0 to 1, unnormalised → class scores (B, K).
    Build one with :meth:`from_backbone`, open a saved one with :meth:`from_pretrained`.
    """

    peft: Any

    def __init__(self, language_model: LanguageModel, spec: InputSpec, settings: ModelSettings) -> None:
        super().__init__()
        self.spec, self.language_model, self.settings = spec, language_model, settings
        embedder, tune, head = settings.embedder, settings.tune, settings.head
        self.backbone = Backbone(language_model, settings.backbone)
        width = self.backbone.width
        self.pool = head.pool
        self.embedding = InputEmbedding(
            embedder, spec.shape, width, positions=self.backbone.uses_new_positions, cls=self.pool == "cls"
        )
        self.backbone.check_length(self.embedding.tokens)
        self.dropout = nn.Dropout(head.dropout)
        self.head = nn.Linear(width, len(spec.classes))
        channels = (-1, *(1 for _ in spec.shape[1:]))
        self.register_buffer("mean", torch.tensor(spec.mean).reshape(channels), persistent=False)
        self.register_buffer("std", torch.tensor(spec.std).reshape(channels), persistent=False)
        adapts = tune.method == "lora" and self.backbone.family.attention != "none"
        # Past nn.Module: PEFT's wrapper must be no submodule, its parameters are the backbone's own.
        self.__dict__["peft"] = add_lora(self.backbone.model, tune) if adapts else None
        self.plan = apply_freeze_plan(self)

    @classmethod
    def from_backbone(
        cls,
        ref: str,
        *,
        classes: Sequence[str],
        image_size: int = 32,
        channels: int = 3,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        input_shape: tuple[int, ...] | None = None,
        white_level: int = DataConfig.white_level,
        resize: Literal["crop", "squash", "pad"] = DataConfig.resize,
        backbone: BackboneConfig | None = None,
        embedder: EmbedderConfig | None = None,
        tune: TuneConfig | None = None,
        head: HeadConfig | None = None,
        weights: bool = True,
        seed: int = 0,
    ) -> ImageClassifier:
        """Put a classifier round the language model ``ref``.

        Args:
            ref: any model reference, such as ``package:minilm``, a folder, ``hf:ORG/NAME``, ``random:REF``.
            classes: class names. image_size, channels: of the images; ``input_shape`` overrides both (series, spectra).
            mean, std: per channel, on a scale of 0 to 1; 0.5 and 0.25 unless given.
            white_level: the value that is white in images of more than 8 bits. resize: how an image gets its size.
            backbone, embedder, tune, head: settings; see ``crossalign.config``.
            weights: False builds the model on the meta device: no memory, no weights at hand, for counting.
            seed: of the new parts, and of a ``random:`` or ``shuffled:`` backbone.

        Raises:
            UserError: the backbone cannot be opened, or the patch does not divide the image. BadArgument: a value out of
                its range, such as classes that are not different names or a ``std`` of 0.
        """
        backbone = dataclasses.replace(backbone or BackboneConfig(), ref=ref)
        shape = input_shape or (channels, image_size, image_size)
        mean = (0.5,) * shape[0] if mean is None else tuple(mean)
        std = (0.25,) * shape[0] if std is None else tuple(std)
        names = tuple(classes) if not isinstance(classes, str) else ()
        spec = InputSpec(tuple(shape), names, mean, std, white_level, resize)
        settings = ModelSettings(backbone, embedder or EmbedderConfig(), tune or TuneConfig(), head or HeadConfig())
        language_model = open_language_model(ref, weights=weights, seed=seed)
        return built(lambda: cls(language_model, spec, settings), seed, meta=not weights)

    def normalize(self, inputs: Tensor) -> Tensor:
        """uint8 or 0-to-1 floats (B, \\*shape) → floats of mean 0 and variance 1 over the training set."""
        x = inputs.float() / 255 if inputs.dtype == torch.uint8 else inputs.to(self.mean.dtype)  # type: ignore[arg-type]
        return (x - self.mean) / self.std  # type: ignore[operator]

    def embed(self, inputs: Tensor) -> Tensor:
        """Token vectors as they enter the backbone: (B, \\*shape) → (B, T, D). What the alignment stage moves.

        Raises:
            BadArgument: inputs of another shape or dtype or, where floats lie on the CPU, on another scale.
        """
        check_inputs(inputs, self.spec.shape)
        return self.embedding(self.normalize(inputs))  # type: ignore[no-any-return]

    def features(self, inputs: Tensor) -> Tensor:
        """Pooled last hidden states: (B, \\*shape) → (B, D)."""
        hidden_BTD = self.backbone(self.embed(inputs))
        return hidden_BTD.mean(1) if self.pool == "mean" else hidden_BTD[:, -1]  # type: ignore[no-any-return]

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.dropout(self.features(inputs)))  # type: ignore[no-any-return]

    @torch.no_grad()
    def match_input_scale(self, inputs: Tensor) -> float:
        """Rescale the new embeddings to the RMS of the backbone's text embeddings, measured on ``inputs``; see
        :meth:`InputEmbedding.match_scale`."""
        check_inputs(inputs, self.spec.shape)
        return self.embedding.match_scale(self.normalize(inputs), self.backbone.text_embedding_table())

    def trained_state(self) -> dict[str, Tensor]:
        """The tensors that training changes; a checkpoint holds these alone."""
        return trained_state(self)

    def load_trained_state(self, state: dict[str, Tensor], place: str = "the checkpoint") -> None:
        """Put :meth:`trained_state` back; names and shapes must be the same.

        Raises:
            UserError: a tensor is missing, unexpected or of another shape (nothing is ever left at its init silently).
        """
        put_tensors(self.trained_state(), state, place)

    def save_pretrained(self, folder: str | Path, *, facts: dict[str, Any] | None = None) -> Path:
        """Write the model as a folder: config.json, model.safetensors (only what was trained) and a model card.

        A fully fine-tuned model also carries its backbone's configuration and so opens without the original.
        ``facts`` (results, data, recipe) go into the card. Returns the folder.
        """
        folder = Path(folder)
        backbone = dataclasses.replace(self.settings.backbone, ref=absolute(self.settings.backbone.ref))
        settings = dataclasses.replace(self.settings, backbone=backbone)
        write_tensors(folder / "model.safetensors", self.trained_state(), metadata={"format": "pt"})
        if self.settings.tune.method == "full":
            self.language_model.config.save_pretrained(folder / "backbone")
        described = dataclasses.asdict(self.spec)
        for name in ("white_level", "resize"):
            if described[name] == getattr(DataConfig, name):  # as every model of 0.1.0 has it
                del described[name]
        write_json(
            folder / "config.json",
            {
                "format": FORMAT,
                **dataclasses.asdict(settings),
                "input": described,
                "fingerprint": self.language_model.fingerprint,
                "seed": self.language_model.seed,
            },
        )
        write_text(folder / "README.md", _card(self, facts or {}))
        return folder

    @classmethod
    def from_pretrained(cls, path: str | Path, *, backbone: str | None = None) -> ImageClassifier:
        """Open a folder that :meth:`save_pretrained` wrote, that of its run, or ``hf:ORG/NAME`` of one that was pushed.

        ``backbone`` overrides where the frozen language model lies, should it have moved.

        Raises:
            UserError: no such model, tensors that do not fit, or a backbone whose weights are not those of training.
        """
        files = ["*.json", "*.safetensors", "README.md"]
        folder = fetch_page(str(path), files) if Ref(str(path), ()).kind == "hf" else model_folder(user_path(path))
        saved = read_saved(folder)
        settings, spec = saved.settings, saved.spec
        whole = (folder / "backbone").is_dir()
        ref = backbone or (f"random:{folder / 'backbone'}" if whole else settings.backbone.ref)
        try:
            language_model = open_language_model(ref, seed=saved.seed)
        except UserError as error:
            raise UserError(
                f"the backbone of {folder} cannot be opened: {error}; name where it lies now with --backbone"
            ) from error
        if not whole and language_model.fingerprint != saved.fingerprint:
            raise UserError(f"the backbone '{ref}' is not the one that {folder} was trained with: its weights differ")
        with building(f"'{folder}'"):
            model = cls(language_model, spec, settings)
        model.load_trained_state(read_tensors([folder / "model.safetensors"]), f"'{folder}'")
        return model.eval()

    def merge_lora(self) -> ImageClassifier:
        """Fold the LoRA updates into the backbone's weights, in place: the same outputs, no adapter layers.

        The result is saved whole, as a fully fine-tuned model is.
        """
        if self.peft is None:
            raise UserError("only a model trained with --tune.method lora has an adapter to merge")
        self.backbone.model = self.peft.merge_and_unload()
        self.__dict__["peft"] = None
        self.settings.tune = dataclasses.replace(self.settings.tune, method="full")
        self.plan = apply_freeze_plan(self)
        return self

    def export_lora(self, folder: str | Path) -> Path:
        """Write the LoRA adapter of the backbone in PEFT's format, for ``PeftModel.from_pretrained``."""
        if self.peft is None:
            raise UserError("only a model trained with --tune.method lora has an adapter to export")
        self.peft.save_pretrained(str(folder), safe_serialization=True)
        as_umask(Path(folder))
        return Path(folder)

    def push_to_hub(self, repo: str, *, private: bool = True, token: str | None = None) -> str:
        """Save to a temporary folder and upload it as ``repo`` (``ORG/NAME``); returns the commit's address."""
        import tempfile

        from huggingface_hub import HfApi

        api = HfApi(token=token)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            api.create_repo(repo, private=private, exist_ok=True)
            return str(api.upload_folder(repo_id=repo, folder_path=folder))

    @torch.no_grad()
    def predict(self, images: Any, *, batch_size: int = 64, top_k: int = 1) -> list[list[dict[str, Any]]]:
        """Class names and scores of any images, as an image-classification pipeline gives them.

        Args:
            images: one image or many: paths, PIL images, arrays (H, W), (H, W, C) or (C, H, W), or a batch (B, C, H, W);
                of uint8, or of floats from 0 to 1.
            batch_size: images a forward pass.
            top_k: classes an image, best first.

        Returns:
            For each image a list of ``{"label": str, "score": float}``, the ``top_k`` best classes; scores are probabilities.

        Raises:
            BadArgument: no images, or a number below 1. UserError: an image that cannot be read.
        """
        for name, value in (("batch_size", batch_size), ("top_k", top_k)):
            if not isinstance(value, Integral) or value < 1:
                raise BadArgument(f"{name} must be a whole number, at least 1; got {value!r}")
        pixels = self.spec.pixels(images)
        was_training, device = self.training, self.head.weight.device
        self.eval()
        try:
            batches: Iterable[Tensor] = torch.from_numpy(np.ascontiguousarray(pixels)).split(batch_size)
            scores_BK = torch.cat([self(batch.to(device)).float().softmax(-1).cpu() for batch in batches])
        finally:
            self.train(was_training)
        best = scores_BK.topk(min(top_k, scores_BK.shape[1]))
        return [
            [{"label": self.spec.classes[i], "score": s} for s, i in zip(row_s, row_i, strict=True)]
            for row_s, row_i in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]


@dataclasses.dataclass(frozen=True)
class SavedClassifier:
    """What config.json of a saved classifier says."""

    settings: ModelSettings
    spec: InputSpec
    fingerprint: str
    """Of the backbone that it was trained with."""
    seed: int


def read_saved(folder: Path) -> SavedClassifier:
    """config.json of a saved classifier, checked.

    Raises:
        UserError: there is none, or a value in it that no classifier has.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(f"no saved classifier at '{folder}': it has no config.json; give the model/ folder of a finished run")
    saved = read_config(folder)
    if saved.get("format") != FORMAT:
        raise UserError(f"{file} is not a crossalign classifier of format {FORMAT!r}: give the model/ folder of a finished run")
    sections = [section.name for section in dataclasses.fields(ModelSettings)]
    missing = {*sections, "input", "fingerprint", "seed"} - saved.keys()
    if missing:
        raise UserError(f"{file} is damaged: it lacks {', '.join(sorted(missing))}")
    try:
        settings = update(ModelSettings(), {name: saved[name] for name in sections})
        validate(settings)
        shape, names, mean, std = (tuple(saved["input"].get(name)) for name in ("shape", "classes", "mean", "std"))
        white, resize = (saved["input"].get(name, getattr(DataConfig, name)) for name in ("white_level", "resize"))
        spec = InputSpec(shape, tuple(map(shown, names)), mean, std, white, resize)
        return SavedClassifier(settings, spec, str(saved["fingerprint"]), int(saved["seed"]))
    except (UserError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{file} is damaged ({first_line(error)}): copy the model again") from error


def _card(model: ImageClassifier, facts: dict[str, Any]) -> str:
    """A README.md with the hub's header: what the model is, how to use it, what was measured, what it cannot do."""
    spec, method = model.spec, model.settings.tune.method
    results = "\n".join(f"- {_plain(name)}: {_plain(value)}" for name, value in facts.items()) or "- none recorded"
    classes = ", ".join(map(_plain, spec.classes[:20])) + (", …" if len(spec.classes) > 20 else "")
    return f"""---
library_name: crossalign
pipeline_tag: image-classification
tags: [crossalign, cross-modal, {method}]
---

# A language model made an image classifier

Backbone {_plain(model.language_model.ref)} ({model.language_model.kind} weights), method `{method}`,
{model.plan.trainable:,} trained parameters, inputs of shape {tuple(spec.shape)}, {len(spec.classes)} classes: {classes}.

```python
from crossalign import ImageClassifier
ImageClassifier.from_pretrained("this folder").predict("picture.png")
```

## Recorded facts
{results}

## Limits
It knows its training classes alone and always answers with one of them. Scores are not calibrated unless the facts above
say so. A frozen backbone is not in this folder: it is opened from the reference above and checked by hash.

## Parameters
```
{model.plan}
```
"""


def _plain(value: Any) -> str:
    """A text of unknown origin as Markdown that shows it: on one line, and no markup, of HTML neither."""
    return re.sub(r"([\\`*_\[\]#|~])", r"\\\1", html.escape(" ".join(str(value).split()), quote=False))
