"""The adapted model over architectures × methods: what trains, what is saved, what comes back."""

from __future__ import annotations

import json
import threading
from base64 import b64decode
from collections.abc import Callable
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from crossalign.config import BackboneConfig, EmbedderConfig, HeadConfig, TuneConfig
from crossalign.core.errors import UserError
from crossalign.models.classifier.model import ImageClassifier
from crossalign.models.language.families import is_norm

FAMILIES = ["gpt2", "llama", "qwen3", "bert", "roberta", "opt", "gpt_neox", "distilbert"]
METHODS = ["fpt", "lora", "full"]
Folder = Callable[[str], Path]


def build(ref: str | Path, method: str = "fpt", **changes: Any) -> ImageClassifier:
    settings: dict[str, Any] = {
        "tune": TuneConfig(method=method, lora_rank=2, lora_alpha=4, lora_dropout=0.0),  # type: ignore[arg-type]
        "head": HeadConfig(dropout=0.0),
        "embedder": EmbedderConfig(patch=4),
    }
    return ImageClassifier.from_backbone(str(ref), classes=["cat", "dog", "owl"], image_size=8, **{**settings, **changes})


def train_a_little(model: ImageClassifier, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    images, labels = torch.rand(6, 3, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2])
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    model.eval()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_exactly_the_planned_parameters_change(tiny_folder: Folder, family: str, method: str) -> None:
    model = build(tiny_folder(family), method)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train_a_little(model)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    planned = {name for name, p in model.named_parameters() if p.requires_grad}
    assert changed <= planned
    # A key's bias shifts all scores of a query alike, so softmax cancels it; its gradient is rounding noise.
    assert {n for n in planned - changed if "key.bias" not in n and "k_proj.bias" not in n} == set()
    norms = {id(p) for m in model.backbone.modules() if is_norm(m) for p in m.parameters(recurse=False)}
    in_backbone = {n: p for n, p in model.named_parameters() if n.startswith("backbone.") and p.requires_grad}
    assert norms, family
    if method == "fpt":
        assert {id(p) for p in in_backbone.values()} == norms
    elif method == "lora":
        assert all("lora_" in name for name in in_backbone)
        roles = [*model.backbone.family.attention_targets, *model.backbone.family.mlp_targets]
        for role in roles:
            assert any(f"{role}.lora_A" in name for name in in_backbone), (family, role)
    else:
        unused = {f"backbone.{n}" for n in model.backbone.unused_parameters()}
        assert planned == set(before) - unused
    assert model.plan.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert model.plan.total == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
@pytest.mark.parametrize("method", METHODS)
def test_saved_model_gives_the_same_scores_and_holds_only_what_was_trained(
    tiny_folder: Folder, tmp_path: Path, family: str, method: str
) -> None:
    model = build(tiny_folder(family), method)
    train_a_little(model)
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    folder = model.save_pretrained(tmp_path / "model")
    with torch.no_grad():
        torch.testing.assert_close(ImageClassifier.from_pretrained(folder)(images), model(images), rtol=0, atol=0)
    saved = sum(t.numel() for t in load_file(folder / "model.safetensors").values())
    assert saved == model.plan.trainable
    assert not list(folder.rglob("*.bin")) and not list(folder.rglob("*.pt"))
    assert "from_pretrained" in (folder / "README.md").read_text()


@pytest.mark.parametrize("kind", ["vit", "none", "random", "shuffled"])
def test_controls_train_and_reopen(tiny_folder: Folder, tmp_path: Path, kind: str) -> None:
    method = "full" if kind in ("vit", "none") else "fpt"
    model = build(f"{kind}:{tiny_folder('llama')}", method)
    train_a_little(model)
    images = torch.rand(2, 3, 8, 8)
    again = ImageClassifier.from_pretrained(model.save_pretrained(tmp_path / "m"))
    with torch.no_grad():
        torch.testing.assert_close(again(images), model(images), rtol=0, atol=0)


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_lora_merges_to_the_same_scores_and_exports_to_peft(tiny_folder: Folder, tmp_path: Path, family: str) -> None:
    from peft import PeftModel
    from transformers import AutoModel

    model = build(tiny_folder(family), "lora")
    train_a_little(model)
    images, tokens = torch.rand(2, 3, 8, 8), torch.randn(2, 5, 32)
    model.export_lora(tmp_path / "adapter")
    with torch.no_grad():
        scores = model(images)
        extra = {"add_pooling_layer": False} if family == "bert" else {}
        plain = AutoModel.from_pretrained(tiny_folder(family), **extra)
        adapted = PeftModel.from_pretrained(plain, str(tmp_path / "adapter")).eval()
        ours = model.language_model.model(inputs_embeds=tokens).last_hidden_state
        if family == "llama":  # the others' own positions are silenced in ours
            torch.testing.assert_close(adapted(inputs_embeds=tokens).last_hidden_state, ours)
        merged = model.merge_lora()
        torch.testing.assert_close(merged(images), scores, rtol=1e-4, atol=1e-5)
        again = ImageClassifier.from_pretrained(merged.save_pretrained(tmp_path / "merged"))
        torch.testing.assert_close(again(images), merged(images), rtol=0, atol=0)
    assert not any("lora" in name for name, _ in again.named_parameters())


def test_frozen_dropout_is_off_and_the_heads_is_on(tiny_folder: Folder) -> None:
    images = torch.rand(2, 3, 8, 8)
    frozen = build(tiny_folder("gpt2")).train()
    torch.testing.assert_close(frozen(images), frozen(images), rtol=0, atol=0)
    dropping = build(tiny_folder("gpt2"), head=HeadConfig(dropout=0.5)).train()
    assert not torch.equal(dropping(images), dropping(images))


def test_input_scale_is_matched_to_text(tiny_folder: Folder) -> None:
    model = build(tiny_folder("llama"))
    with torch.no_grad():
        model.embedding.embedder.projection.weight.mul_(40)
    images = torch.rand(16, 3, 8, 8)
    model.match_input_scale(images)
    text, image = model.backbone.text_embedding_table(), model.embed(images)
    ratio = image.pow(2).mean().sqrt() / text.pow(2).mean().sqrt()
    assert ratio.item() == pytest.approx(1.0, rel=1e-4)
    patches, positions = model.embedding.embedder(model.normalize(images)), model.embedding.positions
    assert positions is not None
    assert positions.pow(2).mean().sqrt().item() == pytest.approx(patches.pow(2).mean().sqrt().item(), rel=1e-4)


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("pool", ["mean", "last", "cls"])
def test_gradients_reach_every_pixel_and_new_part(tiny_folder: Folder, kind: str, pool: str) -> None:
    model = build(tiny_folder("llama"), embedder=EmbedderConfig(kind=kind, patch=4), head=HeadConfig(pool=pool, dropout=0.0))  # type: ignore[arg-type]
    images = torch.rand(2, 3, 8, 8, requires_grad=True)
    model(images).square().sum().backward()
    assert images.grad is not None and (images.grad.abs().sum((0, 1)) > 0).all()
    assert all(p.grad is not None for p in model.embedding.parameters())


def test_linear_embedder_equals_a_convolution_over_patches() -> None:
    from crossalign.models.classifier.embedding import PatchEmbedding

    embed = PatchEmbedding((3, 8, 8), 4, 16)
    conv = nn.Conv2d(3, 16, 4, stride=4)
    with torch.no_grad():
        conv.weight.copy_(embed.projection.weight.reshape(16, 3, 4, 4))
        conv.bias.copy_(embed.projection.bias)  # type: ignore[union-attr]
    images = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(embed(images), conv(images).flatten(2).transpose(1, 2))


def test_a_series_is_one_embedder_away(tiny_folder: Folder) -> None:
    torch.manual_seed(0)
    phase = torch.rand(60, 1, 1) * 6.28
    time = torch.linspace(0, 12.56, 32).reshape(1, 1, 32)
    series = torch.cat([torch.sin(time + phase[:30]), torch.sin(3 * time + phase[30:])])
    labels = torch.arange(60) // 30
    model = ImageClassifier.from_backbone(
        str(tiny_folder("llama")),
        classes=["slow", "fast"],
        input_shape=(1, 32),
        mean=(0.0,),
        std=(1.0,),
        embedder=EmbedderConfig(kind="series", patch=4),
        tune=TuneConfig(method="full"),
        head=HeadConfig(dropout=0.0),
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(80):
        optimizer.zero_grad()
        F.cross_entropy(model(series), labels).backward()
        optimizer.step()
    assert (model(series).argmax(-1) == labels).float().mean() > 0.9


def test_predict_takes_files_arrays_and_pictures(tiny_folder: Folder, tmp_path: Path) -> None:
    model = build(tiny_folder("llama")).eval()
    array = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(array).save(tmp_path / "a.png")
    answers = [
        model.predict(tmp_path / "a.png"),
        model.predict(Image.fromarray(array)),
        model.predict(array),
        model.predict(np.moveaxis(array, -1, 0)),
        model.predict([str(tmp_path / "a.png")]),
        model.predict(torch.from_numpy(np.moveaxis(array, -1, 0).copy())[None]),
    ]
    assert all(a == answers[0] for a in answers)
    (top3,) = model.predict(array, top_k=3)
    assert sum(c["score"] for c in top3) == pytest.approx(1.0, abs=1e-5)
    assert [c["score"] for c in top3] == sorted((c["score"] for c in top3), reverse=True)


def test_what_does_not_fit_is_refused(tiny_folder: Folder, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--embedder.patch 3 does not divide the input side 8"):
        build(tiny_folder("llama"), embedder=EmbedderConfig(patch=3))
    with pytest.raises(UserError, match="did you mean 'linear'"):
        build(tiny_folder("llama"), embedder=EmbedderConfig(kind="liner"))
    with pytest.raises(UserError, match="no saved classifier"):
        ImageClassifier.from_pretrained(tmp_path)
    folder = build(tiny_folder("llama")).save_pretrained(tmp_path / "m")
    state = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in state.items() if "head.bias" not in k}, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"lack tensors of the model: head\.bias$"):
        ImageClassifier.from_pretrained(folder)


def test_a_damaged_folder_is_one_sentence(tiny_folder: Folder, tmp_path: Path) -> None:
    folder = build(tiny_folder("llama")).save_pretrained(tmp_path / "m")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="was cut short"):
        ImageClassifier.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model.safetensors' cannot be read"):
        ImageClassifier.from_pretrained(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="is not valid JSON"):
        ImageClassifier.from_pretrained(folder)


def test_a_backbone_that_moved_is_named(tiny_folder: Folder, tmp_path: Path) -> None:
    import shutil

    moved = shutil.copytree(tiny_folder("llama"), tmp_path / "llama")
    folder = build(moved).save_pretrained(tmp_path / "m")
    shutil.rmtree(moved)
    with pytest.raises(UserError, match="name where it lies now with --backbone"):
        ImageClassifier.from_pretrained(folder)
    ImageClassifier.from_pretrained(folder, backbone=str(tiny_folder("llama")))


def test_another_backbone_under_the_same_name_is_noticed(tiny_folder: Folder, tmp_path: Path) -> None:
    model = build(tiny_folder("llama"))
    folder = model.save_pretrained(tmp_path / "m")
    saved = json.loads((folder / "config.json").read_text())
    saved["fingerprint"] = "0" * 20
    (folder / "config.json").write_text(json.dumps(saved))
    with pytest.raises(UserError, match="its weights differ"):
        ImageClassifier.from_pretrained(folder)


def test_causal_attention_hides_later_patches_from_earlier_tokens(tiny_folder: Folder) -> None:
    for attention, sees in (("causal", False), ("bidirectional", True)):
        model = build(tiny_folder("llama"), backbone=BackboneConfig(attention=attention)).eval()  # type: ignore[arg-type]
        images = torch.rand(1, 3, 8, 8)
        changed = images.clone()
        changed[..., 4:, 4:] = torch.rand(1, 3, 4, 4)  # the last patch
        with torch.no_grad():
            first, other = (model.backbone(model.embed(x))[:, 0] for x in (images, changed))
        assert torch.equal(first, other) is not sees


@pytest.mark.parametrize("method", ["fpt", "full"])
def test_a_group_that_matches_nothing_fails(tiny_folder: Folder, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    monkeypatch.setattr("crossalign.models.classifier.freezing.is_norm", lambda module: False)
    with pytest.raises(RuntimeError, match=f"method '{method}' trains the group 'norms', but no parameter is in it"):
        build(tiny_folder("llama"), method)


class _Hub(BaseHTTPRequestHandler):
    """As much of the model hub as an upload needs; keeps what is sent."""

    commits: ClassVar[list[list[dict[str, Any]]]] = []

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        repo = f"http://{self.headers['Host']}/me/it"
        answer: dict[str, Any] = {"url": repo, "id": "me/it", "name": "me/it"}
        if "/preupload/" in self.path:
            answer = {"files": [{**f, "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]]}
        elif "/commit/" in self.path:
            self.commits.append([json.loads(line) for line in body.splitlines()])
            answer = {"commitUrl": f"{repo}/commit/1", "commitOid": "1", "success": True}
        self._send(answer)

    def do_GET(self) -> None:
        self._send({"id": "me/it", "sha": "1", "siblings": [], "private": True, "tags": [], "modelId": "me/it", "downloads": 0})

    def _send(self, answer: dict[str, Any]) -> None:
        text = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: Any) -> None:
        pass


def test_what_is_pushed_is_what_is_saved(tiny_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    with ThreadingHTTPServer(("127.0.0.1", 0), _Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        api = partial(huggingface_hub.HfApi, endpoint=f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(huggingface_hub, "HfApi", api)
        model = build(tiny_folder("llama"))
        address = model.push_to_hub("me/it", token="hf_test")
        server.shutdown()
    assert address.endswith("commit/1")
    (lines,) = _Hub.commits
    sent = {line["value"]["path"]: b64decode(line["value"]["content"]) for line in lines if line["key"] == "file"}
    saved = model.save_pretrained(tmp_path / "saved")
    assert sent == {path.name: path.read_bytes() for path in saved.iterdir()}


IMAGES = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
WRONG_INPUTS: dict[str, tuple[Any, str]] = {
    "floats of 0 to 255": (IMAGES.float(), "scale of 0 to 1, not normalised; got 0 to 255: give pixels of 0 to 255 as uint8"),
    "normalised": (IMAGES.float() / 64 - 2, "scale of 0 to 1"),
    "whole numbers": (IMAGES.long(), r"uint8, or floats on a scale of 0 to 1; got torch.int64"),
    "grey": (IMAGES[:, :1], r"shape \(B, 3, 8, 8\); got \(4, 1, 8, 8\)"),
    "none": (IMAGES[:0], r"shape \(B, 3, 8, 8\); got \(0, 3, 8, 8\)"),
    "one image": (IMAGES[0], r"shape \(B, 3, 8, 8\); got \(3, 8, 8\)"),
    "larger": (IMAGES.repeat(1, 1, 2, 2), r"shape \(B, 3, 8, 8\); got \(4, 3, 16, 16\)"),
    "channels last": (IMAGES.movedim(1, -1), r"shape \(B, 3, 8, 8\)"),
    "array": (IMAGES.numpy(), r"must be a tensor, a batch of shape \(B, 3, 8, 8\); got a ndarray"),
    "list": ([[1.0]], "must be a tensor.*got a list"),
}


@pytest.mark.parametrize("name", WRONG_INPUTS)
def test_inputs_that_would_give_a_wrong_number_are_refused(tiny_folder: Folder, name: str) -> None:
    model = build(f"none:{tiny_folder('llama')}", "full")
    inputs, message = WRONG_INPUTS[name]
    for call in (model, model.embed, model.features, model.match_input_scale):
        with pytest.raises(ValueError, match=message):
            call(inputs)
    assert torch.equal(model(IMAGES), model(IMAGES.float() / 255))


@pytest.mark.parametrize(
    "settings,message",
    [
        ({"classes": ["a", "a"]}, "classes must differ, and 'a' stands there twice"),
        ({"classes": []}, "classes must be names, at least one"),
        ({"classes": "ab"}, "classes must be names"),
        ({"classes": [1, 2]}, "classes must be names"),
        ({"std": [0, 0, 0]}, "std must be numbers above 0, one for each of 3 channels"),
        ({"std": [0.2, float("nan"), 0.2]}, "std must be numbers above 0"),
        ({"std": [0.2]}, "one for each of 3 channels"),
        ({"std": []}, "one for each of 3 channels"),
        ({"mean": [0.5, 0.5]}, "mean must be finite numbers, one for each of 3 channels"),
        ({"mean": [float("inf")] * 3}, "mean must be finite numbers"),
        ({"image_size": 0}, "shape must be channels and sides, whole numbers from 1 to 65536"),
        ({"channels": -1}, "shape must be channels and sides"),
        ({"input_shape": (3,)}, "shape must be channels and sides"),
    ],
)
def test_what_no_classifier_can_be_is_refused_by_name(tiny_folder: Folder, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageClassifier.from_backbone(f"none:{tiny_folder('llama')}", **{"classes": ["a", "b"], "image_size": 8, **settings})


def test_predict_takes_floats_and_refuses_what_is_no_image(tiny_folder: Folder) -> None:
    model = build(f"none:{tiny_folder('llama')}", "full")
    for images in (IMAGES, IMAGES.numpy(), IMAGES[0], IMAGES[0].movedim(0, -1)):
        floats = images / 255 if isinstance(images, torch.Tensor) else images.astype("float32") / 255
        assert model.predict(floats) == model.predict(images)
    assert len(model.predict((IMAGES / 255).bfloat16())) == len(IMAGES), "numpy has no such numbers"
    assert torch.allclose(model((IMAGES / 255).double()), model(IMAGES / 255), atol=1e-5)
    for wrong in (IMAGES[0, 0, 0], IMAGES[0, 0, 0].numpy(), IMAGES.numpy()[None], 5, None):
        with pytest.raises(ValueError, match="images must be paths, pictures or arrays"):
            model.predict(wrong)
    for floats in (IMAGES.float(), IMAGES / 255 - 0.5, torch.full((3, 8, 8), torch.nan)):
        with pytest.raises(ValueError, match="as uint8, or floats from 0 to 1"):
            model.predict(floats)
    for name in ("top_k", "batch_size"):
        for value in (0, -1, 1.5, None):
            with pytest.raises(ValueError, match=f"{name} must be a whole number, at least 1"):
                model.predict(IMAGES, **{name: value})
