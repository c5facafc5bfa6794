"""Vision models in the format of transformers."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from crossalign.core.errors import UserError, first_line
from crossalign.core.registry import Registry
from crossalign.data.model_files import Source, quiet, weight_files
from crossalign.models.loading import check_keys
from crossalign.models.vision.body import GROUP, Body, Pool, Request, finish, pool_places


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


def open_transformers(folder: Path, model_type: str, request: Request, files: Callable[[], list[Path]] | None = None) -> Body:
    """A folder with config.json, preprocessor_config.json and weights.

    ``files`` finds the weights where they are not in the folder yet. ViT-MAE hides three quarters of the patches at random,
    even in eval mode; here it sees all of them, in order.

    Raises:
        UserError: an architecture without a row in ``FAMILIES``, or files that are missing or do not fit.
    """
    import transformers

    family = FAMILIES[model_type]
    base = getattr(transformers, family.base)
    config = _config(folder, base)
    preprocess, transform = _processor(folder)
    source = Source(request.ref, folder)
    extra = {"add_pooling_layer": False} if family.pooler else {}

    def build() -> nn.Module:
        if not request.loads:
            return base._from_config(config, dtype=torch.float32, **extra)  # type: ignore[no-any-return]
        return _load(base, config, source, extra)

    identity = {k: v for k, v in config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    found = files or (lambda: weight_files(source))
    model, fingerprint = finish(request, build, found, lambda model, files: None, identity)
    prefix = family.prefix(config)

    def penultimate(model: Any, pixels: Tensor, pool: Pool) -> Tensor:
        out = model(pixel_values=pixels, **_in_order(model, pixels))
        if family.pooled:
            return out.pooler_output.flatten(1)  # type: ignore[no-any-return]
        tokens_BTD = out.last_hidden_state
        if family.norm:
            tokens_BTD = model.get_submodule(family.norm)(tokens_BTD)
        return pool_places(tokens_BTD, "cls" if pool == "auto" else pool, prefix)

    return Body(model, penultimate, _blocks(model), prefix, "cls" if prefix else "mean", preprocess, transform, fingerprint)


def _config(folder: Path, base: Any) -> Any:
    try:
        with quiet():
            config = base.config_class.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read '{folder / 'config.json'}': {first_line(error)}") from error
    if hasattr(config, "mask_ratio"):
        config.mask_ratio = 0.0
    return config


def _load(base: Any, config: Any, source: Source, extra: dict[str, Any]) -> nn.Module:
    """Pretrained weights in fp32, every tensor of the model found in the files."""
    from safetensors import SafetensorError

    files = weight_files(source)
    try:
        with quiet():
            model, info = base.from_pretrained(
                source.folder,
                config=config,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # to be told of them, and to refuse them, in a sentence
                local_files_only=True,
                weights_only=True,  # of a .bin
                use_safetensors=files[0].suffix == ".safetensors",
                **extra,
            )
    except pickle.UnpicklingError as error:
        raise UserError(f"'{files[0]}' holds more than tensors, so it was not opened: save it as safetensors") from error
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise UserError(f"cannot load the weights of '{source.ref}': {first_line(error)}") from error
    check_keys(source.ref, info, _HEADS)
    return model  # type: ignore[no-any-return]


def _processor(folder: Path) -> tuple[Callable[[Sequence[Image.Image]], Tensor], Any]:
    from transformers import AutoImageProcessor

    if not (folder / "preprocessor_config.json").is_file():
        raise UserError(f"'{folder}' has no preprocessor_config.json, so its input size and scale are unknown: copy it there")
    try:
        with quiet():
            processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(f"cannot read '{folder / 'preprocessor_config.json'}': {first_line(error)}") from error

    def preprocess(images: Sequence[Image.Image]) -> Tensor:
        return processor(images=list(images), return_tensors="pt")["pixel_values"]  # type: ignore[no-any-return]

    return preprocess, {"transformers": processor.to_dict()}


def _in_order(model: Any, pixels: Tensor) -> dict[str, Tensor]:
    """For ViT-MAE: a rising "noise", by which it sorts the patches, so that they stay where they are."""
    if getattr(model.config, "mask_ratio", None) is None:
        return {}
    count = model.embeddings.patch_embeddings.num_patches
    return {"noise": torch.arange(count, device=pixels.device, dtype=torch.float32).expand(len(pixels), -1)}


def _blocks(model: Any) -> tuple[str, ...]:
    """Names of the blocks, or stages: the one list of modules that is as long as the configuration says."""
    depths = getattr(model.config, "depths", None)
    count = len(depths) if depths else model.config.num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return tuple(f"{name}.{i}" for i in range(count))
    return ()
