"""Text embeddings to align to: token sequences of the backbone's vocabulary or of a corpus (CMDA §3.1.5).

Token ids are kept and their vectors looked up batch by batch: 50,000 sequences of 64 tokens take 13 MB, not 10 GB.

Shapes: N sequences, L tokens, V vocabulary, D width, K clusters.
"""

from __future__ import annotations

import hashlib
import re
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from crossalign.config import AlignConfig, validate
from crossalign.core.errors import UserError
from crossalign.core.files import cache_dir, content_key, file_hash
from crossalign.core.reading import user_path
from crossalign.data.records import whole_text
from crossalign.models.language.model import LanguageModel
from crossalign.models.loading import read_tensors, write_tensors

_PLACEHOLDER = re.compile(r"^\[unused\d+\]$")  # BERT's spare rows, which no text ever trained
_CHUNK = 4096


@dataclass
class TextTargets:
    """Sequences of token ids with their mask, and the table that makes vectors of them."""

    table: Tensor
    """(V, D) text embeddings, as :meth:`Backbone.text_embedding_table` gives them."""
    ids: Tensor
    """(N, L) int32; 0 where masked."""
    mask: Tensor
    """(N, L) bool: True on tokens, False on padding, which is always on the right."""
    labels: Tensor | None = None
    """(N,) int64, for divergences that compare classes: from the corpus, or clusters of the sequences' means."""

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: torch.device | str) -> TextTargets:
        """The same targets with everything on ``device``."""
        labels = None if self.labels is None else self.labels.to(device)
        return TextTargets(self.table.to(device), self.ids.to(device), self.mask.to(device), labels)

    def batch(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor | None]:
        """``n`` sequences, drawn evenly with replacement by a CPU ``generator``.

        Returns:
            vectors (n, L, D), zero on padding; mask (n, L); labels (n,), or None where the targets have none.
        """
        rows = torch.randint(len(self), (n,), generator=generator).to(self.ids.device, non_blocking=True)
        mask = self.mask[rows]
        vectors = F.embedding(self.ids[rows], self.table) * mask.unsqueeze(-1)
        return vectors, mask, None if self.labels is None else self.labels[rows]

    def tokens(self, n: int, generator: torch.Generator) -> Tensor:
        """(n, D): vectors of real tokens, each token of each sequence equally likely, drawn with replacement."""
        drawn = torch.randint(self._total, (n,), generator=generator).to(self._ends.device, non_blocking=True)
        rows = torch.searchsorted(self._ends, drawn, right=True)
        columns = drawn - self._ends[rows] + self.mask[rows].sum(1)
        return F.embedding(self.ids[rows, columns], self.table)

    @cached_property
    def _ends(self) -> Tensor:
        """(N,): how many tokens there are up to the end of each sequence."""
        return self.mask.sum(1).cumsum(0)

    @cached_property
    def _total(self) -> int:
        return int(self._ends[-1])

    def means(self) -> Tensor:
        """(N, D): each sequence's mean over its tokens."""
        return torch.cat(
            [
                F.embedding_bag(ids, self.table, mode="sum", per_sample_weights=mask.to(self.table.dtype))
                / mask.sum(1, keepdim=True)
                for ids, mask in zip(self.ids.split(_CHUNK), self.mask.split(_CHUNK), strict=True)
            ]
        )


def text_targets(
    language_model: LanguageModel, table: Tensor, config: AlignConfig, *, labels: bool = False, seed: int = 0
) -> TextTargets:
    """Draw ``config.sequences`` text sequences from the vocabulary or from ``config.corpus``; cached by content.

    Args:
        language_model: whose tokenizer reads the corpus and names the special tokens.
        table: (V, D) text embeddings of the same model.
        config: ``target``, ``corpus``, ``sequences``, ``sequence_length`` and ``otdd_classes`` are used.
        labels: also label the sequences: by the first column of a ``.tsv`` corpus (label, tab, text), else by k-means
            with ``otdd_classes`` clusters of the sequences' means.
        seed: of the draw and of the clusters.

    Raises:
        UserError: a missing, empty or malformed corpus, no tokenizer for it, or settings that give no sequence.
    """
    validate(config, "align.")
    corpus = corpus_path(config) if config.target == "corpus" else None
    key = content_key(
        version=1,
        model=language_model.fingerprint,
        tokenizer=_tokenizer_hash(language_model),
        target=config.target,
        corpus=[corpus.suffix, file_hash(corpus)] if corpus else "",
        settings=[config.sequences, config.sequence_length, config.otdd_classes if labels else 0],
        seed=seed,
    )
    path = cache_dir("targets") / f"{key}.safetensors"
    with suppress(UserError, KeyError):  # not there, or damaged: it is made again
        saved = read_tensors([path])
        return TextTargets(table, saved["ids"], saved["mask"], saved.get("labels"))
    generator = torch.Generator().manual_seed(seed)
    if corpus:
        targets = _from_corpus(language_model, table, corpus, config, generator)
    else:
        targets = _from_vocabulary(language_model, table, config, generator)
    if not labels:
        targets = replace(targets, labels=None)
    elif targets.labels is None:
        targets = replace(targets, labels=kmeans(targets.means().float(), config.otdd_classes, generator))
    tensors = {"ids": targets.ids, "mask": targets.mask, "labels": targets.labels}
    write_tensors(path, {name: tensor for name, tensor in tensors.items() if tensor is not None})
    return targets


def _from_vocabulary(
    language_model: LanguageModel, table: Tensor, config: AlignConfig, generator: torch.Generator
) -> TextTargets:
    """Every token of every sequence drawn evenly from those that stand for text.

    Without a tokenizer those are all but the ones that the configuration names.
    """
    tokenizer = _tokenizer(language_model)
    if tokenizer is None:
        special: set[int] = set()
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(language_model.config, name, None)
            special.update(value if isinstance(value, list) else [value] if value is not None else [])
        ids = set(range(len(table))) - special
    else:
        words = tokenizer.get_vocab()
        spare = {i for word, i in words.items() if _PLACEHOLDER.match(word)}
        ids = {i for i in words.values() if 0 <= i < len(table)} - set(tokenizer.all_special_ids) - spare
    if not ids:
        raise UserError(f"the vocabulary of '{language_model.ref}' has no token but special ones: use --align.target corpus")
    shape = (config.sequences, config.sequence_length)
    drawn = torch.tensor(sorted(ids))[torch.randint(len(ids), shape, generator=generator)]
    return TextTargets(table, drawn.to(torch.int32), torch.ones(shape, dtype=torch.bool))


def _from_corpus(
    language_model: LanguageModel, table: Tensor, corpus: Path, config: AlignConfig, generator: torch.Generator
) -> TextTargets:
    """Whole lines through the tokenizer, without special tokens, cut at the sequence length; all of them or a draw."""
    tokenizer = language_model.tokenizer
    texts, names = _read_corpus(corpus)
    if len(texts) > config.sequences:
        chosen = torch.randperm(len(texts), generator=generator)[: config.sequences].sort().values.tolist()
        texts, names = [texts[i] for i in chosen], names and [names[i] for i in chosen]
    encoded = tokenizer(texts, add_special_tokens=False, truncation=True, max_length=config.sequence_length)["input_ids"]
    rows = [i for i, ids in enumerate(encoded) if ids]
    if not rows:
        raise UserError(f"--align.corpus '{corpus}' gives no tokens with the tokenizer of '{language_model.ref}'")
    length = config.sequence_length
    ids = torch.tensor([encoded[i] + [0] * (length - len(encoded[i])) for i in rows], dtype=torch.int32)
    mask = torch.arange(length) < torch.tensor([len(encoded[i]) for i in rows])[:, None]
    if int(ids.max()) >= len(table):
        raise UserError(f"the tokenizer of '{language_model.ref}' gives ids beyond its {len(table)} embeddings")
    classes = {name: number for number, name in enumerate(sorted(set(names)))}
    labels = torch.tensor([classes[names[i]] for i in rows]) if names else None
    return TextTargets(table, ids, mask, labels)


def corpus_path(config: AlignConfig) -> Path:
    """The corpus file of ``config``; raises UserError if there is none."""
    if not config.corpus:
        raise UserError("--align.target corpus needs --align.corpus FILE, a text file with a sentence a line")
    path = user_path(config.corpus)
    if not path.is_file():
        raise UserError(f"--align.corpus '{path}' is no file: give a text file with a sentence a line")
    return path


def _read_corpus(path: Path) -> tuple[list[str], list[str]]:
    """The lines that hold text and, for a .tsv, their labels."""
    text = whole_text(path, lambda error: f"--align.corpus '{path}' is not text in UTF-8: convert it first")
    lines = [line.strip() for line in text.splitlines()]
    if path.suffix != ".tsv":
        texts, labels = [line for line in lines if line], []
    else:
        pairs = [line.split("\t", 1) for line in lines if line]
        bad = next((pair[0] for pair in pairs if len(pair) < 2), None)
        if bad is not None:
            raise UserError(f"--align.corpus '{path}' has a line without a tab ('{bad[:40]}'): write label, tab, text")
        labels, texts = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    if not texts:
        raise UserError(f"--align.corpus '{path}' is empty: give a text file with a sentence a line")
    return texts, labels


def kmeans(points: Tensor, clusters: int, generator: torch.Generator, iterations: int = 20) -> Tensor:
    """Lloyd's algorithm from a k-means++ start: points (N, D) → labels (N,) int64, every cluster used.

    Raises:
        UserError: fewer distinct points than clusters.
    """
    centres = points[torch.randint(len(points), (1,), generator=generator)]
    while len(centres) < clusters:
        far = torch.cdist(points, centres).amin(1).square()
        if not far.any():
            raise UserError(f"--align.otdd-classes {clusters} is more than the {len(centres)} distinct text sequences")
        centres = torch.cat([centres, points[torch.multinomial(far.cpu(), 1, generator=generator)]])
    for _ in range(iterations):
        labels = torch.cdist(points, centres).argmin(1)
        counts = torch.bincount(labels, minlength=clusters).unsqueeze(1)
        sums = torch.zeros_like(centres).index_add_(0, labels, points)
        centres = torch.where(counts > 0, sums / counts.clamp(min=1), centres)
    return torch.cdist(points, centres).argmin(1)


def _tokenizer(language_model: LanguageModel) -> Any:
    try:
        return language_model.tokenizer
    except UserError:
        return None


def _tokenizer_hash(language_model: LanguageModel) -> str:
    tokenizer = _tokenizer(language_model)
    if tokenizer is None:
        return ""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    text = fast.to_str() if fast is not None else repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(text.encode()).hexdigest()
