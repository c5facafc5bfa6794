"""Tokenizers for a corpus: opened by one string, or trained on it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crossalign.core.errors import UserError, first_line
from crossalign.core.files import atomic_path, write_json
from crossalign.core.reading import check_whole, read_json, user_path
from crossalign.core.refs import Ref
from crossalign.data.model_files import Source, hub_folder, locate, quiet

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

END = "<|endoftext|>"
"""The one special token of a tokenizer that is trained here: it starts, ends and separates documents."""
_ENDS = (END, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")


def open_tokenizer(ref: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, a tokenizer.json, a .gguf file, package:NAME or hf:ORG/NAME.

    Raises:
        UserError: there is none, it is not of the fast kind, or it has no token to separate documents with.
    """
    path = user_path(ref)
    if path.is_file() and path.name == "tokenizer.json" and (path.parent / "tokenizer_config.json").is_file():
        path = path.parent  # its special tokens are named there
    if path.is_file() and path.suffix == ".json":
        tokenizer = _open_file(path)
    elif (path / "tokenizer_config.json").is_file() and not (path / "config.json").is_file():
        tokenizer = read_tokenizer(Source(ref, path))
    elif Ref(ref, ()).kind == "hf":  # of a published configuration only that is known, not the tokenizer
        tokenizer = read_tokenizer(Source(ref, hub_folder(ref, weights=False)))
    else:
        tokenizer = read_tokenizer(locate(str(path) if path.exists() else ref, weights=False))
    if not tokenizer.is_fast:
        raise UserError(f"the tokenizer of '{ref}' is not of the fast kind: save it with a tokenizer.json")
    separator(tokenizer, ref)
    return tokenizer


def read_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """The tokenizer that lies beside a model's weights, or in their GGUF file.

    Raises:
        UserError: there is none.
    """
    from transformers import AutoTokenizer

    folder, gguf = source.folder, source.gguf
    files = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model")
    if folder is None or not (gguf or any((folder / name).is_file() for name in files)):
        raise UserError(f"'{source.ref}' has no tokenizer (tokenizer.json) beside its configuration")
    for name in () if gguf else files:
        if (folder / name).is_file():
            check_whole(folder / name)
    with quiet(f"open the tokenizer of '{source.ref}'"):
        return AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, **({"gguf_file": gguf} if gguf else {})
        )


def _open_file(path: Path) -> Any:
    """A lone tokenizer.json: which of its tokens ends a text is not written there, so the usual names are tried."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    try:
        backend = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises Exception itself
        raise UserError(f"'{path}' is not a tokenizer.json ({first_line(error)})") from error
    ends = [token for token in _ENDS if backend.token_to_id(token) is not None]
    return PreTrainedTokenizerFast(tokenizer_object=backend, **({"eos_token": ends[0]} if ends else {}))


def separator(tokenizer: Any, ref: str = "") -> int:
    """The token between documents: the one that starts a text, so that the first word is predicted from it, else the end.

    Raises:
        UserError: the tokenizer has neither.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise UserError(
        f"the tokenizer{f' of {ref!r}' if ref else ''} has no bos and no eos token to separate documents with: it is not a "
        "causal model's; name another, or leave it empty to train one"
    )


def padding_of(tokenizer: Any) -> int:
    """The token that fills up short texts; the mask hides it, so that any will do."""
    pad = tokenizer.pad_token_id
    return int(pad if pad is not None else tokenizer.eos_token_id or 0)


def padded(texts: Sequence[list[int]], padding: int) -> tuple[Tensor, Tensor]:
    """Texts as tokens → (B, T) long, filled up on the right, and their mask (B, T) long: 1 for tokens."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    rows = [torch.tensor(text, dtype=torch.int64) for text in texts]
    return pad_sequence(rows, True, padding), pad_sequence([torch.ones_like(row) for row in rows], True)


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer (GPT-2's pattern) of at most ``vocabulary`` entries; the same texts give the same one.

    Each byte has an entry, and so has END: decoding what it encodes gives back any text exactly.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=END, eos_token=END, clean_up_tokenization_spaces=False)


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write a folder that ``AutoTokenizer.from_pretrained`` opens, whole or not at all."""
    with atomic_path(folder) as temporary:
        tokenizer.save_pretrained(temporary)
        config = temporary / "tokenizer_config.json"
        facts = read_json(config)
        if facts.get("tokenizer_class") == "TokenizersBackend":  # the name since transformers 5; older ones know this alone
            write_json(config, facts | {"tokenizer_class": "PreTrainedTokenizerFast"})


def fingerprint(tokenizer: Any) -> str:
    """A hash of everything that the tokenizer does to a text."""
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()[:20]


@contextmanager
def ordinary_text(tokenizer: Any) -> Iterator[Any]:
    """The backend, with special tokens that a text spells out taken as text: only we write separators."""
    backend = tokenizer.backend_tokenizer
    before = backend.encode_special_tokens
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()
    try:
        yield backend
    finally:
        backend.encode_special_tokens = before


def is_separable(backend: Any) -> bool:
    """Whether a text cut at the end of a line or word has the tokens of the whole; not so where each text gets a space."""
    for left, right in (
        ("One line.\n", "Another"),
        ("one\n", "(two)"),
        ("one", " two"),
        ("one.", " 2"),
        ("a:\n", "/usr"),
        ("一\n", "二"),
    ):
        ids = [backend.encode(text, add_special_tokens=False).ids for text in (left + right, left, right)]
        if ids[0] != ids[1] + ids[2]:
            return False
    return True
