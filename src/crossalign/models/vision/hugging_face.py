"""Vision models in the format of transformers."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from crossalign.core.errors import UserError
from crossalign.core.registry import Registry
from crossalign.data.model_files import Source, quiet
from crossalign.models.loading import load_pretrained
from crossalign.models.taps import block_names
from crossalign.models.vision.body import GROUP, Files, Pool, Request, VisionBody, finish, pool_places


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
