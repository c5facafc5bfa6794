"""Models that are damaged, foreign or impossible are one sentence at every door; and one rule says what a model is."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from crossalign.config import TuneConfig
from crossalign.core.errors import UserError
from crossalign.models.classifier.model import ImageClassifier
from crossalign.models.language.causal import choose_trained, save_causal
from crossalign.models.language.model import check_tokens, open_language_model, reference_key

Folder = Callable[[str], Path]
VALUES: list[Any] = [None, "x", "", -1, 0, 1e308, 7, [], ["a", "a"], {}, {"a": 1}, True, 10**12, "\ud800\x1b]0;x\x07"]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every key of a JSON value, at any depth."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield (*path, key)
        yield from places(value[key], (*path, key))


def changed(whole: Any, path: tuple[Any, ...], value: Any, gone: bool = False) -> Any:
    copy = json.loads(json.dumps(whole))
    inner = copy
    for key in path[:-1]:
        inner = inner[key]
    if gone:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return copy


def test_any_value_in_a_classifiers_configuration_opens_it_or_is_one_sentence(tiny_folder: Folder, tmp_path: Path) -> None:
    """136 such mutations gave 50 tracebacks once."""
    made = ImageClassifier.from_backbone(str(tiny_folder("gpt2")), classes=["a", "b"], image_size=8)
    folder = made.save_pretrained(tmp_path / "m")
    whole, refused = json.loads((folder / "config.json").read_text()), 0
    cases = [changed(whole, path, None, gone=True) for path in places(whole)]
    cases += [changed(whole, path, value) for number, path in enumerate(places(whole)) for value in VALUES[number % 3 :: 3]]
    for case in [*cases, *VALUES]:
        (folder / "config.json").write_text(json.dumps(case))
        try:
            ImageClassifier.from_pretrained(folder)
        except UserError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 100


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("n_embd", "x", "read the configuration of|can be built"),
        ("n_head", 7, "can be built|read the weights of"),
        ("n_layer", 10_000_000, "says n_layer 10000000, more than the 1,000"),
        ("n_embd", 10**9, "says n_embd 1000000000, more than the"),
        ("vocab_size", -1, "can be built|read the configuration of|read the weights"),
        ("n_layer", None, "read the configuration of|can be built|read the weights"),
        ("activation_function", "no-such", "can be built|read the weights"),
    ],
)
@pytest.mark.parametrize("control", ["", "random:"])
def test_a_configuration_that_no_model_has(
    key: str, value: Any, sentence: str, control: str, tiny_folder: Folder, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_folder("gpt2"), tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(UserError, match=sentence) as caught:
        open_language_model(f"{control}{folder}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("places", [{"a": 5}, {"a": "../x.safetensors"}, [], 5, {}, {"a": None}])
def test_an_index_of_weights_that_names_no_files(places: Any, tiny_folder: Folder, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_folder("gpt2"), tmp_path / "m")
    (folder / "model.safetensors").rename(tmp_path / "x.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(UserError, match=r"is not a weight index|lacks '"):
        open_language_model(str(folder))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(value: float, tiny_folder: Folder, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_folder("gpt2"), tmp_path / "m")
    state = load_file(folder / "model.safetensors")
    name = next(name for name in state if "c_attn.weight" in name)
    state[name][0, 0] = value
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"values that are no finite numbers, in .*c_attn"):
        open_language_model(str(folder))


def test_a_pointer_of_git_lfs_in_place_of_weights_or_tokenizer(tiny_folder: Folder, tmp_path: Path) -> None:
    from crossalign.data.text.tokenizer import open_tokenizer

    folder = shutil.copytree(tiny_folder("gpt2"), tmp_path / "m")
    for name, door in (("model.safetensors", open_language_model), ("tokenizer.json", open_tokenizer)):
        (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
        with pytest.raises(UserError, match=rf"{name}' is a pointer of git-LFS"):
            door(str(folder))


def as_run(folder: Path, model: Path) -> Path:
    shutil.copytree(model, folder / "model")
    (folder / "config.yaml").write_text("row: x\n")
    return folder


def adapter(base: str, folder: Path) -> Path:
    opened = open_language_model(base, head="causal")
    peft = choose_trained(opened.model, TuneConfig(method="lora", lora_rank=2), seed=0)
    for name, parameter in opened.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)

    class Nothing:
        def save_pretrained(self, folder: str) -> None: ...

    save_causal(opened.model, peft, Nothing(), folder, base=opened)
    return folder


def hidden(ref: str, **arguments: Any) -> torch.Tensor:
    model = open_language_model(ref, **arguments).model
    with torch.no_grad():
        return model(torch.arange(8)[None])[0]  # type: ignore[no-any-return]


def test_a_run_a_model_and_an_adapter_are_models_at_every_door(
    tiny_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = tiny_folder("gpt2")
    run = as_run(tmp_path / "run", plain)
    assert torch.equal(hidden(str(run)), hidden(str(plain)))
    monkeypatch.chdir(plain.parent)
    folder = adapter("gpt2", tmp_path / "adapter")  # a relative name of the base
    tuned = as_run(tmp_path / "tuned", folder)
    monkeypatch.chdir(tmp_path)
    for ref in (str(folder), "tuned", str(tuned / "model")):
        assert torch.equal(hidden(ref), hidden(str(folder))) and not torch.allclose(hidden(ref), hidden(str(plain)))
        assert torch.equal(hidden(ref, head="causal"), hidden(str(folder), head="causal"))
        assert reference_key(ref) == reference_key(str(folder)) != reference_key(str(plain))
    assert torch.equal(hidden(f"random:{folder}", seed=3), hidden(f"random:{plain}", seed=3))
    shutil.rmtree(run / "model")
    with pytest.raises(UserError, match="finish it by its own command first"):
        open_language_model(str(run))
    classifier = ImageClassifier.from_backbone(str(plain), classes=["a", "b"], image_size=8).save_pretrained(run / "model")
    with pytest.raises(UserError, match="is an image classifier, no language model: give it to predict or evaluate"):
        open_language_model(str(run))
    assert ImageClassifier.from_pretrained(run).spec == ImageClassifier.from_pretrained(classifier).spec


def test_the_base_of_an_adapter_that_moved_or_was_replaced(tiny_folder: Folder, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_folder("gpt2"), tmp_path / "base")
    folder = adapter(str(base), tmp_path / "adapter")
    whole = hidden(str(folder))
    base.rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"write where it lies now into '.*base\.json', as 'ref'"):
        open_language_model(str(folder))
    facts = json.loads((folder / "base.json").read_text())
    (folder / "base.json").write_text(json.dumps({**facts, "ref": str(tmp_path / "moved")}))
    assert torch.equal(hidden(str(folder)), whole)
    state = load_file(tmp_path / "moved" / "model.safetensors")
    save_file({name: value + 1 for name, value in state.items()}, tmp_path / "moved" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"is not the model that the adapter .* was trained with: its weights differ"):
        open_language_model(str(folder))
    for content in ("{}", "[]", '{"ref": 5}', '{"ref": ""}'):
        (folder / "base.json").write_text(content)
        with pytest.raises(UserError, match="write there where the model lies now"):
            open_language_model(str(folder))


def test_a_classifier_made_from_a_relative_name_opens_anywhere(
    tiny_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_folder("gpt2").parent)
    folder = ImageClassifier.from_backbone("gpt2", classes=["a", "b"], image_size=8).save_pretrained(tmp_path / "m")
    monkeypatch.chdir(os.sep)
    assert ImageClassifier.from_pretrained(folder).spec.classes == ("a", "b")


def test_a_tokenizer_with_more_tokens_than_the_model_has_rows(tiny_folder: Folder) -> None:
    class Tokens:
        def get_vocab(self) -> dict[str, int]:
            return {"a": 0, "[PAD]": 61}

    with pytest.raises(UserError, match="gives tokens up to 61, but the model's table has 61 rows: resize it"):
        check_tokens(open_language_model(str(tiny_folder("gpt2"))).model, Tokens(), "x")


def test_names_in_a_card_are_text() -> None:
    from crossalign.models.classifier.model import _plain

    assert _plain("<script>\n## Heading `x` [a](b)") == "&lt;script&gt; \\#\\# Heading \\`x\\` \\[a\\](b)"
