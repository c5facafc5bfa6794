"""Whatever predicts the next token, opened to be scored: models as they are published, and those that were made here; and the
harness's adapter of them, with batches that fit.

A run of ``pretrain`` or ``finetune``, LoRA adapters merged; and a run of ``adapt``, whose backbone is put back under its own
language head, to see what of its language is left (CMDA §4.1 warns of forgetting).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from crossalign.core.errors import UserError
from crossalign.core.files import content_key, files_hash
from crossalign.core.machine import free_memory
from crossalign.core.reading import read_json, read_yaml, user_path
from crossalign.data.model_files import Source, model_folder
from crossalign.data.text.tokenizer import read_tokenizer
from crossalign.models.classifier.model import FORMAT, read_saved
from crossalign.models.language.inner import add_lora
from crossalign.models.language.model import LanguageModel, check_tokens, open_language_model
from crossalign.models.loading import put_tensors, read_tensors
from crossalign.runs.names import RunFolder


@dataclass
class Scored:
    """A causal model with its tokenizer, in fp32, eval mode and uncompiled."""

    ref: str
    """What was opened."""
    model: Any
    """The PreTrainedModel with its language head."""
    tokenizer: Any
    """Its tokenizer; it puts the BOS token in front of a text if and only if ``bos``."""
    bos: bool
    """Whether texts start with the BOS token."""
    fingerprint: str
    """A hash of the weights."""
    run: Path | None = None
    """The folder of the run that made it."""
    before: str = ""
    """Of a classifier: the language model that it was made from."""


def open_scored(ref: str, bos: Literal["auto", "yes", "no"] = "auto") -> Scored:
    """Open ``ref``: a run folder, its model/ folder, or any reference of :func:`open_language_model`.

    Raises:
        UserError: it is no causal model, its run is not finished, or its tokenizer has no token to start a text with.
    """
    folder, run = _folder_of(ref)
    config = _json(folder / "config.json") if folder else {}
    before = ""
    if folder and config.get("format") == FORMAT:
        opened, before = _unadapted(folder)
    else:
        opened = open_language_model(str(folder) if run else ref, head="causal")
    tokenizer = read_tokenizer(Source(ref, folder)) if folder and (folder / "tokenizer.json").is_file() else opened.tokenizer
    model: Any = opened.model
    check_tokens(model, tokenizer, ref)
    model.config.use_cache = False
    began = _folder_of(before)[1] if before else run  # the language of a classifier starts as its backbone's did
    starts = _start_with_bos(tokenizer, opened.family.bos, bos, ref, trained_so=_pretrained_here(began))
    return Scored(ref, model, tokenizer, starts, opened.fingerprint, run, before)


def _folder_of(ref: str) -> tuple[Path | None, Path | None]:
    """The folder of a local model, and that of the run it belongs to."""
    path = user_path(ref)
    if not path.is_dir():
        return None, None
    folder = model_folder(path)
    return folder, folder.parent if RunFolder(folder.parent).config.is_file() and folder.name == "model" else None


def _pretrained_here(run: Path | None) -> bool:
    """Whether a run pre-trained the model, or fine-tuned one that was pre-trained here: each document began with BOS then."""
    verb = _json(RunFolder(run).result).get("verb") if run else None
    if run and verb == "finetune":
        return _pretrained_here(_folder_of(_model_of(run))[1])
    return verb == "pretrain"


def _model_of(run: Path) -> str:
    """What a run of ``finetune`` began with."""
    return str(read_yaml(RunFolder(run).config).get("model") or "")


def _json(file: Path) -> dict[str, Any]:
    try:
        return dict(read_json(file))
    except UserError:
        return {}  # whoever opens the model says what is wrong


def _unadapted(folder: Path) -> tuple[LanguageModel, str]:
    """The language model inside a saved classifier, and the reference of the one that it was made from.

    The backbone's trained tensors go back into the causal model; its token table and language head never trained.

    Raises:
        UserError: there was no pretrained causal model, so there is no language to forget; or its weights have changed.
    """
    saved = read_saved(folder)
    ref = saved.settings.backbone.ref
    opened = open_language_model(ref, head="causal", seed=saved.seed)
    if opened.kind != "pretrained":
        raise UserError(f"'{folder}' was made from '{ref}', a control without language: there is nothing to forget")
    if opened.fingerprint != saved.fingerprint:
        raise UserError(f"the backbone '{ref}' is not the one that '{folder}' was trained with: its weights differ")
    tune = saved.settings.tune
    base = opened.model.base_model
    peft = add_lora(base, tune) if tune.method == "lora" else None
    file = folder / "model.safetensors"
    # Without the embedder and the head of the classifier.
    state = {name: tensor for name, tensor in read_tensors([file]).items() if name.startswith("backbone.")}
    places = {f"backbone.model.{name}": parameter.data for name, parameter in base.named_parameters()}
    put_tensors({name: tensor for name, tensor in places.items() if name in state}, state, f"'{folder}'")
    if peft is not None:
        peft.merge_and_unload()
    opened.fingerprint = content_key(before=opened.fingerprint, trained=files_hash([file]))
    opened.model.eval()
    return opened, ref


def _start_with_bos(tokenizer: Any, family: str, asked: str, ref: str, trained_so: bool) -> bool:
    """Whether texts start with BOS, and the tokenizer made to do just that: many have the token and no rule that adds it.

    Raises:
        UserError: BOS is asked for and there is none; or there is neither BOS nor EOS, so that nothing predicts a first word.
    """
    from tokenizers.processors import TemplateProcessing

    bos = tokenizer.bos_token_id
    if bos is None and tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer of '{ref}' has neither a BOS nor an EOS token, so that nothing stands before the first word: "
            "name one of them in its tokenizer_config.json"
        )
    if asked == "yes" and bos is None:
        raise UserError(f"the tokenizer of '{ref}' has no BOS token: leave --bos out, and texts start without one")
    adds = tokenizer.encode("a")[:1] == [bos]
    wanted = {"yes": True, "no": False}.get(asked, bos is not None and (trained_so or family == "yes" or (not family and adds)))
    if wanted:
        token = tokenizer.bos_token
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{token} $A", special_tokens=[(token, bos)])
    return wanted


class Scorer(HFLM):
    """The harness's adapter of transformers, round an opened model.

    Batches hold as many tokens as fit, those of running text too; several processes share the documents; log-likelihoods are
    summed in fp32 whatever the weights are in. A text that starts with BOS starts with one also where it is running text: the
    parent puts a second before it, as the token that predicts the first.
    """

    def __init__(self, opened: Scored, batch_size: int = 0, max_length: int | None = None, accelerator: Any = None) -> None:
        super().__init__(
            pretrained=opened.model,
            tokenizer=opened.tokenizer,
            backend="causal",
            add_bos_token=opened.bos,
            batch_size=batch_size or "auto",
            max_length=max_length,
            softmax_dtype="float32",
        )
        self._ends: dict[int, int] = {}
        if accelerator is not None and accelerator.num_processes > 1:
            self.accelerator = accelerator
            self._rank, self._world_size = accelerator.process_index, accelerator.num_processes

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, each in pieces of ``max_length`` tokens. The token before the first is the prefix
        token alone, so no BOS is added to it."""
        owners, pieces = [], []
        for i, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1):
                owners.append(i)
                pieces.append((None, *make_disjoint_window(window)))
        totals = [0.0] * len(requests)
        for owner, (likelihood, _) in zip(owners, self._loglikelihood_tokens(pieces), strict=True):
            totals[owner] += likelihood
        return totals

    def _batch_scheduler(self, pos: int, n_reordered_requests: Sequence[Any]) -> int:
        """The size of the batch that ends at ``pos``; 0, which no batch has, where none ends. Requests come longest first."""
        if pos == 0:
            lengths = [len(request[1]) + len(request[2]) for request in n_reordered_requests]
            self._ends = batch_ends(lengths, self.tokens_per_batch())
        return self._ends.get(pos, 0)

    def _detect_batch_size(self, requests: Sequence[Any] | None = None, pos: int = 0) -> int:
        """For tasks that generate; the parent would try sizes until memory runs out, which on a CPU takes the machine down."""
        return max(1, self.tokens_per_batch() // int(self.max_length))

    def tokens_per_batch(self) -> int:
        """Tokens whose logits, log-probabilities and their copy take a fifth of the memory that is free; few on a CPU, where
        more gain nothing."""
        free, most = free_memory() or 4 << 30, 4096
        if self.device.type == "cuda":
            free, most = torch.cuda.mem_get_info(self.device)[0], 65_536
        return int(max(1, min(most, free // 5 // (12 * self.model.config.vocab_size))))


def batch_ends(lengths: Sequence[int], tokens: int) -> dict[int, int]:
    """Cut requests, longest first, into batches of at most ``tokens`` with padding: last index of each → its size."""
    ends, first = {}, 0
    for i, _ in enumerate(lengths):
        if i + 1 == len(lengths) or (i + 2 - first) * lengths[first] > tokens:
            ends[i] = i + 1 - first
            first = i + 1
    return ends
