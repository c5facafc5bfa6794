"""Open a language model by one string, wherever it lies, and the controls made from it.

package:minilm        weights that a pip package carries
PATH                  a Hugging Face folder
FILE.gguf             a llama.cpp file, dequantised to fp32
hf:ORG/NAME[@REV]     the hub, or its local cache
random:REF            the same architecture with the model's own initialisation
shuffled:REF          the pretrained tensors, each with its entries permuted: same scale, no structure
none:REF              no backbone: the identity at the width of REF
vit:REF               a transformer encoder from scratch of REF's depth, width, heads and MLP width
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from crossalign.core.errors import UserError
from crossalign.core.files import content_key, files_hash, write_json
from crossalign.core.machine import free_memory
from crossalign.core.reading import read_json, read_yaml, user_path
from crossalign.core.refs import Ref
from crossalign.data.model_files import (
    ADAPTER,
    ADAPTER_CONFIG,
    COPY,
    Source,
    absolute,
    locate,
    quiet,
    read_config,
    weight_files,
)
from crossalign.data.text.tokenizer import read_tokenizer
from crossalign.models.language.families import Family, family_named, family_of
from crossalign.models.loading import building, built, load_pretrained, put_tensors, read_tensors, shuffle_weights

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

Head = Literal["none", "causal"]
Kind = Literal["pretrained", "random", "shuffled", "none", "vit"]

BASE = "base.json"
"""What tells, beside an adapter, of the model that it belongs to."""
# Parts of published checkpoints that a base model has no place for.
_HEADS = re.compile(
    r"(^|\.)(lm_head|embed_out|cls|pooler|classifier|pre_classifier|score|qa_outputs|vocab_(transform|layer_norm|projector))\."
)


@dataclass
class LanguageModel:
    """An opened model with what is known of it."""

    model: Any
    """The PreTrainedModel: base or causal, in fp32 and eval mode; on the meta device if weights=False."""
    config: PreTrainedConfig
    """The transformers configuration of ``model``."""
    ref: str
    """The reference that was opened."""
    kind: Kind
    """Pretrained, or which control."""
    seed: int
    """Seed of a control's weights."""
    source: Source
    """Where the files lie."""

    @property
    def family(self) -> Family:
        """The architecture's row in the table of families."""
        return family_of(self.config)

    @property
    def width(self) -> int:
        """Width D of the vectors that go in."""
        return _input_width(self.config)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the content: of the weight files, or of the configuration and seed that made the weights."""
        is_meta = any(parameter.is_meta for parameter in self.model.parameters())
        if self.kind in ("pretrained", "shuffled") and not is_meta:
            files = weight_files(self.source)
            config_file = self.source.folder / "config.json" if self.source.folder and not self.source.gguf else None
            if config_file is not None and config_file.is_file():
                files += [config_file]  # the same tensors are another model in another architecture
            weights = files_hash(files)
            return weights if self.kind == "pretrained" else content_key(shuffled=weights, seed=self.seed)
        config = {k: v for k, v in self.config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
        return content_key(kind=self.kind, config=config, seed=self.seed)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that lies beside the weights.

        Raises:
            UserError: there is none.
        """
        return read_tokenizer(self.source)


def open_language_model(ref: str, head: Head = "none", weights: bool = True, seed: int = 0) -> LanguageModel:
    """Open a language model, or a control made from one.

    Args:
        ref: see the top of this file.
        head: "none" for the base model, "causal" for the model that predicts the next token.
        weights: False builds it on the meta device: no memory, no weights at hand, for counting.
        seed: of the weights of ``random:``, ``shuffled:`` and ``vit:``.

    Raises:
        UserError: nothing lies at ``ref``, its architecture is not supported, it has no weights or weights that do not
            fit, or they are pickles of a kind that is never opened.
    """
    from transformers import AutoModel, AutoModelForCausalLM

    kind, base = _kind_and_base(ref)
    loads = weights and kind in ("pretrained", "shuffled")
    source = locate(base, weights=loads)
    if source.folder is not None and (source.folder / ADAPTER_CONFIG).is_file():
        return _open_adapter(source, ref, kind, head, weights, seed)
    config = _read_config(source, kind)
    family = family_of(config)
    if head == "causal" and family.attention != "causal":
        raise UserError(f"'{ref}' is a {family.name} model, which does not predict the next token: name a causal one")
    model_class: Any = AutoModel if head == "none" else AutoModelForCausalLM
    arguments: dict[str, Any] = {"attn_implementation": "sdpa"}
    if head == "none" and family.pooler:
        arguments["add_pooling_layer"] = False
    if loads:
        model = load_pretrained(model_class, source, config, _HEADS, **arguments)
        if kind == "shuffled":
            shuffle_weights(model, seed)
    else:

        def build() -> Any:
            return model_class.from_config(config, dtype=torch.float32, **arguments)

        with building(f"'{ref}'"):
            size = sum(4 * parameter.numel() for parameter in built(build, seed, meta=True).parameters()) if weights else 0
            if size > (free_memory() or size):
                raise UserError(f"'{ref}' takes {size / 1e9:,.1f} GB, more than the memory that is free: name a smaller model")
            model = built(build, seed, meta=not weights)
    return LanguageModel(model.eval(), model.config, ref, kind, seed, source)


def check_tokens(model: Any, tokenizer: Any, ref: str) -> None:
    """Raise UserError where a tokenizer gives tokens that the table of its model has no row for."""
    rows, largest = model.get_input_embeddings().weight.shape[0], max(tokenizer.get_vocab().values(), default=0)
    if largest >= rows:
        raise UserError(
            f"the tokenizer of '{ref}' gives tokens up to {largest}, but the model's table has {rows:,} rows: resize it to the "
            "tokenizer (resize_token_embeddings), or take the tokenizer without its added tokens"
        )


def save_base(opened: LanguageModel, folder: Path) -> None:
    """Write down, beside a LoRA adapter, the model that it belongs to: where it lies, and a hash of its weights."""
    facts = {"ref": absolute(opened.ref), "seed": opened.seed, "fingerprint": opened.fingerprint}
    write_json(folder / BASE, facts)


def adapter_base(folder: Path) -> tuple[str, int, str]:
    """Of the model that the adapter in a folder belongs to: reference, seed, and fingerprint where it is known.

    Raises:
        UserError: a damaged file, or one that names no model.
    """
    if (folder / BASE).is_file():
        saved = read_json(folder / BASE, remedy="write there where the model lies now, as 'ref'")
        ref, seed, fingerprint = (saved.get(name, default) for name, default in (("ref", ""), ("seed", 0), ("fingerprint", "")))
        if not (isinstance(ref, str) and ref and isinstance(seed, int) and isinstance(fingerprint, str)):
            raise UserError(f"'{folder / BASE}' names no model as its 'ref': write there where the model lies now")
        return ref, seed, fingerprint
    run = folder.with_name("config.yaml")  # an older run's configuration alone tells of a .gguf file
    ref = str(read_yaml(run).get("model") or "") if folder.name == "model" and run.is_file() else ""
    ref = ref or str(read_json(folder / ADAPTER_CONFIG, remedy=COPY).get("base_model_name_or_path") or "")
    if not ref:
        raise UserError(f"'{folder / ADAPTER_CONFIG}' names no base_model_name_or_path, the model that it belongs to: add it")
    return (f"hf:{ref}" if ":" not in ref and not user_path(ref).exists() else ref), 0, ""


def _open_adapter(source: Source, ref: str, kind: Kind, head: Head, weights: bool, seed: int) -> LanguageModel:
    """A LoRA adapter in PEFT's format, folded into the model that it belongs to; or a control made from that model.

    Raises:
        UserError: there is no such model, its weights are others than in training, or the adapter does not fit.
    """
    from peft import PeftModel, get_peft_model_state_dict

    folder: Any = source.folder
    base, base_seed, fingerprint = adapter_base(folder)
    if kind != "pretrained":  # what is random or shuffled has no use for an update
        return replace(open_language_model(f"{kind}:{Ref(base).base}", head, weights, seed), ref=ref)
    if not (folder / ADAPTER).is_file():
        raise UserError(f"'{folder}' has no {ADAPTER}: save the adapter as safetensors")
    try:
        opened = open_language_model(base, "causal", weights, base_seed)
    except UserError as error:
        raise UserError(
            f"the model that the adapter '{folder}' belongs to cannot be opened: {error}; if it has moved, write where it lies "
            f"now into '{folder / BASE}', as 'ref'"
        ) from error
    if weights:
        if fingerprint not in ("", opened.fingerprint):
            raise UserError(f"'{base}' is not the model that the adapter '{folder}' was trained with: its weights differ")
        state, files = read_tensors([folder / ADAPTER]), [folder / ADAPTER, folder / ADAPTER_CONFIG]
        with building(f"the adapter '{folder}'"):
            peft = PeftModel.from_pretrained(opened.model, str(folder))
            put_tensors(get_peft_model_state_dict(peft), state, f"'{folder}'")
        merged_print = content_key(base=opened.fingerprint, adapter=files_hash(files))
        opened.model = peft.merge_and_unload().eval()
        opened.fingerprint = merged_print
    opened.ref = ref
    if head == "none":
        opened.model = opened.model.base_model
    return opened


def reference_key(ref: str, seed: int = 0) -> str:
    """A hash of what a reference opens, tokenizer included, from its files alone: nothing is loaded.

    Raises:
        UserError: nothing lies at ``ref``.
    """
    kind, base = _kind_and_base(ref)
    loads = kind in ("pretrained", "shuffled")
    source = locate(base, weights=loads)
    if source.folder is not None and (source.folder / ADAPTER_CONFIG).is_file():
        ours, base_seed, _ = adapter_base(source.folder)
        if kind != "pretrained":
            return reference_key(f"{kind}:{Ref(ours).base}", seed)
        files = [source.folder / name for name in (ADAPTER, ADAPTER_CONFIG)]
        return content_key(base=reference_key(ours, base_seed), adapter=files_hash(files))
    files = weight_files(source) if loads or source.gguf else []
    if source.folder is not None and not source.gguf:
        if not source.published:
            _check_config(source)
        # Configuration, vocabulary and merges; a chat template and the like may be among them, which costs a new key at most.
        files += sorted(
            path for path in source.folder.iterdir() if path.suffix in (".json", ".txt", ".model") and path.is_file()
        )
    return content_key(kind=kind, files=files_hash(files), published=source.published, seed=0 if kind == "pretrained" else seed)


def _kind_and_base(ref: str) -> tuple[Kind, str]:
    """Which control a reference asks for, and of what."""
    parts = Ref(ref).of_one_control()
    if not parts.base:
        raise UserError(f"'{ref}' names no model: give a folder, a .gguf file, package:NAME or hf:ORG/NAME")
    return parts.control or "pretrained", parts.base  # type: ignore[return-value]


def _read_config(source: Source, kind: Kind) -> Any:
    """The configuration to build: the model's own, or that of the control which takes its place."""
    from transformers import AutoConfig

    from crossalign.models.language import scratch  # it also registers the controls' configurations

    if source.published:
        config = AutoConfig.for_model(**source.published)
    else:
        if not source.gguf:
            _check_config(source)
        gguf = {"gguf_file": source.gguf} if source.gguf else {}
        with quiet(f"read the configuration of '{source.ref}'"):
            config = AutoConfig.from_pretrained(str(source.folder), local_files_only=True, trust_remote_code=False, **gguf)
        if not source.gguf and getattr(config, "quantization_config", None):
            raise UserError(f"'{source.ref}' is quantized, so its weights cannot train: name the unquantized model")
    if kind == "vit":
        return scratch.vit_config_like(config)
    return scratch.NoBackboneConfig(hidden_size=_input_width(config)) if kind == "none" else config


def _check_config(source: Source) -> None:
    """Raise UserError unless the folder has a config.json of a supported architecture.

    Before transformers reads it, whose own message for a model with code in its folder tells how to run that code.
    """
    assert source.folder is not None
    config = read_config(source.folder)
    if str(config.get("format", "")).startswith("crossalign."):
        raise UserError(f"'{source.folder}' is an image classifier, no language model: give it to predict or evaluate")
    if not config.get("model_type"):
        raise UserError(
            f"'{source.folder / 'config.json'}' names no model_type: it is not the configuration of a transformers model"
        )
    family_named(str(config["model_type"]))


def _input_width(config: Any) -> int:
    return int(getattr(config, "word_embed_proj_dim", None) or config.hidden_size)  # OPT-350m's inputs are narrower
