"""Open a frozen vision model by one string: the teacher of CMAR §3.1, whose features a language model is pulled towards.

package:NAME          weights that a pip package carries: efficientnet_lite0, mobilenet_v2
timm:NAME             a model of timm, weights from the hub or its local cache
hf:ORG/NAME[@REV]     a hub page in the format of transformers or of timm
PATH                  a local folder in either format
random:REF            the same architecture with its own initialisation: the control
shuffled:REF          the pretrained tensors, each with its entries permuted

Layers: 0 is what enters the first block, i what leaves block i, up to L; negative ones count from the end. Blocks are those
of a transformer and the stages of a convolutional net. "penultimate" is what the model's own classifier is given: after
the final norm and its own pooling, the class token of most vision transformers, the pooled map of a convolutional net.
(CMAR §4.4.3 calls a layer of the language model penultimate; of the teacher the paper does not say.) "all" is 1 to L.

Shapes: B batch, T tokens, D width, H and W pixels or places.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.func import functional_call

from crossalign.config import TeacherConfig
from crossalign.core.errors import UserError, unknown
from crossalign.core.files import content_key
from crossalign.core.refs import UNTRAINED, Ref
from crossalign.models.loading import building
from crossalign.models.taps import Layer, choose_layers, watching
from crossalign.models.vision.body import Request, VisionBody, pool_places
from crossalign.models.vision.sources import OPENERS, open_local

VERSION = 1  # of what the features of a teacher are; count up when they would come out otherwise
PENULTIMATE = "penultimate"


def open_teacher(ref: str, *, settings: TeacherConfig | None = None, seed: int = 0, weights: bool = True) -> Teacher:
    """Open a frozen vision model.

    Args:
        ref: see the top of this file.
        settings: layers, their combination and pooling; its own ``ref`` is not looked at. None takes the defaults.
        seed: of the weights of ``random:`` and ``shuffled:``.
        weights: False builds it on the meta device: for widths and keys, without memory.

    Raises:
        UserError: nothing lies at ``ref``, a package is missing, weights do not fit or are pickles with more than
            tensors in them, or a layer, pooling or combination that the model does not have.
    """
    parts = Ref(ref, UNTRAINED).of_one_control()
    if parts.file:
        raise UserError(f"'{ref}' holds features, not a model: give it to `crossalign features` or to the regulariser")
    if not parts.base:
        raise UserError(f"'{ref}' names no teacher: give a folder, timm:NAME, hf:ORG/NAME or package:NAME")
    request = Request(ref, parts.control or "pretrained", seed, weights)  # type: ignore[arg-type]
    has_opener = parts.kind != "path" and parts.kind in OPENERS
    body = OPENERS[parts.kind](parts.rest, request) if has_opener else open_local(parts.base, request)
    return Teacher(body, settings or TeacherConfig(), ref)


class Teacher(nn.Module):
    """A frozen vision model: pixels (B, 3, H, W) → features (B, width) in fp32, the same whatever the batch and autocast.

    It stays in eval mode under ``.train()``, and no gradient flows through it (CMAR Fig. 2 freezes it, although Eq. 5
    minimises over it).
    """

    def __init__(self, body: VisionBody, settings: TeacherConfig, ref: str) -> None:
        super().__init__()
        self.ref = ref
        self.settings = settings
        self._body = body
        self.taps = _Taps(body, settings)
        self.layer_names: tuple[str, ...] = tuple(str(layer) for layer in self.taps.layers)
        """The layers chosen, in order: "penultimate", indices counted from 0, names of modules."""
        self.eval()
        pixels = body.preprocess([Image.new("RGB", (64, 64))]).to("meta")
        state = {name: t.to("meta") for name, t in (*self.taps.named_parameters(), *self.taps.named_buffers())}
        # A pass without values: it finds what a layer cannot give, and pictures that do not fit, before any long work.
        with torch.no_grad(), building(f"'{ref}'"):
            parts = functional_call(self.taps, state, (pixels,))
        self.widths: tuple[int, ...] = tuple(part.shape[-1] for part in parts)
        """Width of each layer: ``features.split(teacher.widths, dim=1)`` takes a concatenation apart."""
        self._weights = _combination(settings, self.layer_names, self.widths)
        self.requires_grad_(False)
        self.to(memory_format=torch.channels_last)  # a half faster for convolutions on a CPU

    @property
    def width(self) -> int:
        """Columns of the features."""
        return self.widths[0] if self.settings.combine == "sum" else sum(self.widths)

    @property
    def transform(self) -> Any:
        """JSON-able; what ``preprocess`` does."""
        return self._body.transform

    @property
    def fingerprint(self) -> str:
        """A hash of the weight files' content, or of the architecture and seed of a control.

        Raises:
            UserError: opened without weights, and their files are not at hand.
        """
        return self._body.fingerprint()

    @property
    def key(self) -> str:
        """A hash of all that decides features: weights, layers, combination, pooling, transform."""
        return content_key(
            fingerprint=self.fingerprint,
            layers=self.layer_names,
            combine=self.settings.combine if len(self.layer_names) > 1 or self._weights else "",
            weights=self._weights,
            pool=self.settings.pool,
            transform=self.transform,
            version=VERSION,
        )

    def preprocess(self, images: Sequence[Image.Image]) -> Tensor:
        """Pictures of any size → pixels (B, 3, H, W): the model's own resizing, crop, mean and deviation."""
        return self._body.preprocess([image if image.mode == "RGB" else image.convert("RGB") for image in images])

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        """Features (B, width), fp32, of pixels (B, 3, H, W) as ``preprocess`` gives them."""
        with torch.autocast(pixels.device.type if pixels.device.type != "meta" else "cpu", enabled=False):
            parts = self.taps(pixels.float().contiguous(memory_format=torch.channels_last))
            if self.settings.combine == "sum":
                return torch.stack([w * part for w, part in zip(self._weights, parts, strict=True)]).sum(0)
            return torch.cat(parts, dim=1)

    def train(self, mode: bool = True) -> Teacher:
        """Stays in eval mode."""
        return super().train(False)


class _Taps(nn.Module):
    """The model and its chosen layers: pixels → a list of (B, D), one a layer."""

    def __init__(self, body: VisionBody, settings: TeacherConfig) -> None:
        super().__init__()
        self.model = body.model
        self.body, self.pool = body, settings.pool
        if not settings.layers:
            raise UserError("no layer of the teacher is chosen: name one, such as penultimate")
        layers = [body.blocks.index(layer) + 1 if layer in body.blocks else layer for layer in settings.layers]
        aliases: dict[str, Sequence[Layer]] = {"all": range(1, len(body.blocks) + 1), PENULTIMATE: (PENULTIMATE,)}
        self.layers = choose_layers(body.model, layers, body.blocks, aliases, "the teacher")
        if self.pool not in ("auto", "cls", "mean"):
            raise unknown("pooling", str(self.pool), ("auto", "cls", "mean"))
        if self.pool == "cls" and not body.prefix:
            raise UserError("pool=cls: the teacher has no class token; use mean or auto")

    def forward(self, pixels: Tensor) -> list[Tensor]:
        last = len(self.body.blocks)
        watched = {*self.layers, last or PENULTIMATE} - {PENULTIMATE}
        names = {layer: layer if isinstance(layer, str) else self.body.blocks[max(layer - 1, 0)] for layer in watched}
        places = {layer: (self.model.get_submodule(name), layer == 0) for layer, name in names.items()}
        with watching(places, _features) as seen:
            final = self.body.penultimate(self.model, pixels, self.pool)
        # A module before the blocks may give places alone: the tokens that the blocks work on tell which.
        tokens = seen[last].shape[1] if last in seen and seen[last].ndim == 3 else None
        return [final.float() if layer == PENULTIMATE else self._pooled(layer, seen, tokens) for layer in self.layers]

    def _pooled(self, layer: Layer, seen: dict[Layer, Tensor], tokens: int | None) -> Tensor:
        if layer not in seen:
            raise UserError(f"layer {layer} of the teacher takes no part in its features: choose another")
        h = seen[layer]
        has_prefix = h.ndim == 3 and h.shape[1] == tokens
        pool = self.body.auto if self.pool == "auto" else self.pool
        if pool == "cls" and (layer == 0 or not has_prefix) and h.ndim > 2:
            raise UserError(f"layer {layer} of the teacher has no class token that has seen the image: use pool=mean")
        channels_last = getattr(self.model, "output_fmt", "NCHW") == "NHWC"
        return pool_places(h, pool, self.body.prefix if has_prefix else 0, channels_last)


def _features(layer: Layer, value: Any) -> Tensor:
    """What a layer of the teacher gives, if it can be pooled."""
    value = value[0] if isinstance(value, tuple) else value
    if not isinstance(value, Tensor) or value.ndim not in (2, 3, 4) or not value.is_floating_point():
        raise UserError(f"layer {layer} of the teacher gives no tokens, map or vector: choose another")
    # What follows a module of one's own choice may change its output in place.
    return value.clone() if isinstance(layer, str) else value


def _combination(settings: TeacherConfig, names: tuple[str, ...], widths: tuple[int, ...]) -> tuple[float, ...]:
    """One weight a layer for combine=sum, none for concat.

    Raises:
        UserError: layers of several widths, another number of weights than of layers, or weights without a use.
    """
    if settings.combine == "concat":
        if settings.weights:
            raise UserError("teacher.weights are given, but teacher.combine is concat, which has none: use combine=sum")
        return ()
    if settings.combine != "sum":
        raise unknown("combination of layers", str(settings.combine), ("concat", "sum"))
    if len(set(widths)) > 1:
        listed = ", ".join(f"{name} has {width}" for name, width in zip(names, widths, strict=True))
        raise UserError(f"teacher.combine=sum adds layers of one width, but {listed}: use concat")
    if settings.weights and len(settings.weights) != len(names):
        raise UserError(f"teacher.weights has {len(settings.weights)} values for the {len(names)} layers {', '.join(names)}")
    return tuple(float(w) for w in settings.weights) or (1 / len(names),) * len(names)
