"""What features come from: a language model that reads texts, and a vision model that sees images."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from crossalign.config import TeacherConfig, validate
from crossalign.core.errors import UserError
from crossalign.core.files import cache_dir, content_key, write_json
from crossalign.core.progress import followed
from crossalign.core.reading import read_json
from crossalign.core.refs import Ref
from crossalign.data.text.tokenizer import padded, padding_of, separator
from crossalign.features.store import Features, FeatureStore, Maker, own_file
from crossalign.models.language.model import LanguageModel, check_tokens, open_language_model, reference_key
from crossalign.models.taps import Layer, Pool, Taps, resolve_layers

if TYPE_CHECKING:
    from crossalign.data.pairs.load import Pairs
    from crossalign.models.vision.teacher import Teacher

VERSION = 1  # of what the features of a text are; count up when they would come out otherwise
Captions = Literal["first", "mean", "all"]


@dataclass(frozen=True)
class TextSource:
    """A language model as a source of features of texts, (N, sum of the layers' widths)."""

    ref: str
    layers: tuple[Layer, ...] = ("all",)
    pool: Pool = "mean"
    captions: Captions = "first"
    """Of an image with several texts: the first one, the mean of all their features, or all joined into one text."""
    max_length: int = 128
    batch_size: int = 32
    """Texts a forward pass; it does not change the features."""
    seed: int = 0
    """Of the weights of a control."""

    @cached_property
    def key(self) -> str:
        """A hash of all that decides the features of a text; nothing is loaded. "" for a file of features.

        Raises:
            UserError: nothing lies at ``ref``, or a model that reads no text.
        """
        if own_file(self.ref):
            return ""
        if Ref(self.ref).control in ("none", "vit"):
            raise UserError(f"'{self.ref}' reads no text: name a language model, or random:REF as a control")
        return content_key(
            model=reference_key(self.ref, self.seed),
            layers=[str(layer) for layer in self.layers],
            pool=self.pool,
            captions=self.captions,
            max_length=self.max_length,
            version=VERSION,
        )

    def open(self, pairs: Pairs, device: str, weights: bool) -> Maker:
        """The model on ``device``, always with its weights: the widths come from a pass.

        Raises:
            UserError: a model or a layer that is not there, or a model that sees fewer tokens.
        """
        opened = open_language_model(self.ref, seed=self.seed)
        check_tokens(opened.model, opened.tokenizer, self.ref)
        longest = getattr(opened.config, "max_position_embeddings", None)
        if longest is not None and self.max_length > longest:
            raise UserError(f"'{self.ref}' sees {longest} tokens: lower --max-length {self.max_length}")
        opened.model.to(device)
        taps = Taps(resolve_layers(opened.model, self.layers), self.pool)
        token = torch.zeros(1, 1, dtype=torch.long, device=device)
        with torch.no_grad():
            widths = [h.shape[-1] for h in taps.hidden_states(opened.model, token, torch.ones_like(token))]
        facts = {
            "layers": json.dumps([str(layer) for layer in taps.layers]),
            "widths": json.dumps(widths),
            "pool": self.pool,
            "captions": self.captions,
            "seed": str(self.seed),
        }

        def compute(indices: Tensor) -> Tensor:
            groups = [self._chosen(pairs.texts[int(i)]) for i in indices]
            flat = self._features(opened, taps, [text for group in groups for text in group])
            return torch.stack([part.mean(0) for part in flat.split([len(group) for group in groups])])

        return Maker(compute, facts, self.batch_size, "text")

    def _chosen(self, texts: tuple[str, ...]) -> tuple[str, ...]:
        if self.captions == "mean":
            return texts
        return (texts[0] if self.captions == "first" else " ".join(texts),)

    @torch.no_grad()
    def _features(self, opened: LanguageModel, taps: Taps, texts: list[str]) -> Tensor:
        """Features of texts (B, sum of D), fp32."""
        tokenizer, model = opened.tokenizer, opened.model
        encoded = [list(ids) for ids in tokenizer(texts, truncation=True, max_length=self.max_length)["input_ids"]]
        empty = [text for text, ids in zip(texts, encoded, strict=True) if not ids]
        if empty:
            raise UserError(f"the tokenizer of '{self.ref}' gives no token for the text '{empty[0][:40]}': drop that pair")
        rows, mask = (t.to(model.device) for t in padded(encoded, padding_of(tokenizer)))
        return taps(model, rows, mask).float()


@dataclass(frozen=True)
class ImageSource:
    """A teacher as a source of features of images."""

    teacher: TeacherConfig

    @property
    def ref(self) -> str:
        """The teacher's reference."""
        return self.teacher.ref

    @cached_property
    def key(self) -> str:
        """``Teacher.key``, without the weights in memory; "" for a file of features.

        Raises:
            UserError: the teacher, its layers or its file of features is not there.
        """
        if own_file(self.ref):
            return ""
        validate(self.teacher, "teacher.")
        return self._open(weights=False).key

    def open(self, pairs: Pairs, device: str, weights: bool) -> Maker:
        """The teacher on ``device``."""
        model, config = self._open(weights), self.teacher
        facts = {
            "teacher_fingerprint": model.fingerprint,
            "layers": json.dumps(model.layer_names),
            "widths": json.dumps(model.widths),
            "combine": config.combine,
            "weights": json.dumps(config.weights),
            "pool": config.pool,
            "seed": str(config.seed),
            "transform": json.dumps(model.transform, sort_keys=True, default=str),
        }
        return Maker(live_features(model.to(device) if weights else model, pairs), facts, config.batch_size, "image")

    def _open(self, weights: bool) -> Teacher:
        from crossalign.models.vision.teacher import open_teacher

        return open_teacher(self.ref, settings=self.teacher, seed=self.teacher.seed, weights=weights)


def teacher_features(teacher: TeacherConfig, pairs: Pairs, *, device: str = "auto") -> Features:
    """The features of pairs' images: from a file of one's own (``file:PATH``), from the cache, or made.

    Args:
        teacher: which model, layers and pooling.
        pairs: which images, see ``open_pairs``.
        device: auto, cpu, cuda or mps.

    Raises:
        UserError: a teacher that cannot be opened, a file that is not of these pairs, or features that are no finite numbers.
    """
    return FeatureStore(pairs, device).read(ImageSource(teacher))


def live_features(model: Teacher, pairs: Pairs) -> Callable[[Tensor], Tensor]:
    """A function of pairs' indices (B,) that gives their features (B, D) from a teacher in memory, without any file."""

    def compute(indices: Tensor) -> Tensor:
        device = next(model.parameters(), torch.empty(0)).device  # a plug-in's may have no parameters
        return model(model.preprocess(pairs.images(indices.tolist())).to(device))  # type: ignore[no-any-return]

    return compute


def bits_per_byte(
    ref: str, text: str, *, block: int = 512, batch_size: int = 8, seed: int = 0, device: str = "cpu"
) -> float | None:
    """How many bits a causal model needs for a byte of a text: comparable between tokenizers, as perplexity is not.

    None for an encoder, which predicts no text.

    Raises:
        UserError: the model's tokenizer does not keep the text, so that the number would be that of another one.
    """
    key = content_key(model=reference_key(ref, seed), text=text, block=block, version=VERSION)
    path = cache_dir("quality") / f"{key}.json"
    with suppress(UserError, KeyError):  # not there, or damaged
        saved: float | None = read_json(path)["bits_per_byte"]
        return saved
    from crossalign.data.text.tokens import EvaluationBlocks, as_stream
    from crossalign.models.language.causal import total_nll

    if open_language_model(ref, weights=False).family.attention != "causal":
        write_json(path, {"model": ref, "bits_per_byte": None})
        return None
    opened = open_language_model(ref, head="causal", seed=seed)
    check_tokens(opened.model, opened.tokenizer, ref)
    longest = getattr(opened.config, "max_position_embeddings", None) or block
    stream = as_stream(text, opened.tokenizer, separator(opened.tokenizer, ref))
    unknown = opened.tokenizer.unk_token_id
    lost = int((stream.tokens[1:-1] == unknown).sum()) if unknown is not None and unknown != stream.tokens[0] else 0
    if lost:
        raise UserError(f"the tokenizer of '{ref}' has no token for {lost} pieces of the text: give a text that it can spell")
    blocks = EvaluationBlocks(stream, min(block, longest), batch_size)
    batches = followed(blocks, len(blocks), f"bits a byte of {ref}", "batch")
    bits = blocks.metrics(total_nll(opened.model.to(device), batches, torch.device(device)))["bits_per_byte"]
    write_json(path, {"model": ref, "bits_per_byte": bits, "bytes": stream.bytes})
    return bits
