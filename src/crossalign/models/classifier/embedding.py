"""From pixels or samples to token vectors: patch embedders, new positions, and the match of input scale.

Shapes: B batch, C channels, H and W image sides, S samples of a series, P patch side, T tokens, D backbone width.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import pairwise
from numbers import Integral, Real
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from crossalign.config import DataConfig, EmbedderConfig
from crossalign.core.errors import BadArgument, UserError
from crossalign.core.registry import Registry

Builder = Callable[[EmbedderConfig, tuple[int, ...], int], nn.Module]
EMBEDDERS: Registry[Builder] = Registry("--embedder.kind", group="crossalign.backbones")
"""``build(config, input_shape, width)`` by the value of ``--embedder.kind``: a module that maps inputs (B, \\*input_shape) to
token vectors (B, tokens, D), and says how many ``tokens`` there are."""

MOST_TOKENS = 256
"""Of an image, where its size or its patches are chosen for it."""
LOWEST, HIGHEST = -0.5, 1.5  # of pixels on a scale of 0 to 1, which a resize may overshoot


def register_embedder(kind: str) -> Callable[[Builder], Builder]:
    """Decorator: make a function of settings, the inputs' shape and the backbone's width usable as an embedder by ``kind``."""
    return EMBEDDERS.register(kind)


def _grid(shape: tuple[int, ...], patch: int, axes: int) -> tuple[int, ...]:
    """Patches along each axis of an input (C, \\*sides); an uneven division is the user's to mend."""
    if len(shape) != axes + 1:
        raise UserError(f"this embedder takes inputs of {axes + 1} axes (channels first), not of shape {shape}")
    if patch < 1 or any(side % patch for side in shape[1:]):
        common = math.gcd(*shape[1:])
        near = [p for p in range(1, common + 1) if common % p == 0]
        raise UserError(
            f"--embedder.patch {patch} does not divide the input side {' x '.join(map(str, shape[1:]))}: "
            f"take one of {', '.join(map(str, near))} or change --data.image-size"
        )
    return tuple(side // patch for side in shape[1:])


def fitting_patch(kind: str, sides: Sequence[int], most: int = MOST_TOKENS) -> int | None:
    """The smallest patch of 4 pixels or more, at least two a side, that makes at most so many tokens; None where none does."""
    if not sides:
        return None
    most_pixels = max(4, math.gcd(*sides) // 2)
    patches = [1 << power for power in range(2, 16)] if kind == "conv" else range(4, 1 + most_pixels)
    patches = [patch for patch in patches if patch <= most_pixels and not any(side % patch for side in sides)]
    return next((patch for patch in patches if math.prod(side // patch for side in sides) <= most), None)


def _patch(config: EmbedderConfig, shape: tuple[int, ...]) -> int:
    return config.patch or fitting_patch(config.kind, shape[1:]) or 4


class PatchEmbedding(nn.Module):
    """One linear projection of each P × P patch, as CMDA §3.1.2 has it: (B, C, H, W) → (B, HW/P², D).

    With one axis, for series and spectra, of each run of P samples: (B, C, S) → (B, S/P, D).
    """

    def __init__(self, shape: tuple[int, ...], patch: int, width: int, axes: int = 2) -> None:
        super().__init__()
        self.patch, self.grid = patch, _grid(shape, patch, axes)
        self.tokens = math.prod(self.grid)
        self.projection = nn.Linear(shape[0] * patch**axes, width)

    def forward(self, inputs: Tensor) -> Tensor:
        b, c, *_ = inputs.shape
        # Each side is cut in two axes, which patch and where in it: of an image (B, C, H/P, P, W/P, P).
        cut = inputs.reshape(b, c, *(size for count in self.grid for size in (count, self.patch)))
        which_patch, where_in_it = range(2, cut.ndim, 2), range(3, cut.ndim, 2)
        patches_BTX = cut.permute(0, *which_patch, 1, *where_in_it).reshape(b, self.tokens, -1)
        return self.projection(patches_BTX)  # type: ignore[no-any-return]


class ConvStem(nn.Module):
    """A stack of stride-2 convolutions down to one vector a patch (Xiao et al. 2021, "Early Convolutions"):
    CMDA §4.2's deeper projection. (B, C, H, W) → (B, HW/P², D); P is a power of two."""

    def __init__(self, shape: tuple[int, ...], patch: int, width: int) -> None:
        super().__init__()
        if patch < 2 or patch & (patch - 1):
            raise UserError(
                f"--embedder.kind conv halves the image again and again: --embedder.patch {patch} must be 2, 4, 8, …"
            )
        self.tokens = math.prod(_grid(shape, patch, axes=2))
        halvings = patch.bit_length() - 1
        channels = [shape[0], *(max(16, width // 2 ** (halvings - i)) for i in range(halvings))]
        layers: list[nn.Module] = []
        for before, after in pairwise(channels):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False), nn.GroupNorm(1, after), nn.GELU()]
        self.stem = nn.Sequential(*layers, nn.Conv2d(channels[-1], width, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.stem(images).flatten(2).transpose(1, 2)  # type: ignore[no-any-return]


for _name, _class in {"linear": PatchEmbedding, "conv": ConvStem, "series": partial(PatchEmbedding, axes=1)}.items():
    EMBEDDERS.register(_name, lambda config, shape, width, build=_class: build(shape, _patch(config, shape), width))


class InputEmbedding(nn.Module):
    """Token vectors for the backbone: an embedder and, where asked for, a class token and new positions (CMDA §3.1.2).

    ``forward``: inputs (B, \\*input_shape) → (B, T, D). These are the only parameters that the alignment stage trains.
    """

    def __init__(
        self, config: EmbedderConfig, input_shape: tuple[int, ...], width: int, *, positions: bool, cls: bool = False
    ) -> None:
        super().__init__()
        self.embedder = EMBEDDERS[config.kind](config, input_shape, width)
        self.cls = nn.Parameter(torch.empty(1, 1, width).normal_(std=0.02)) if cls else None
        self.tokens = int(cast(Any, self.embedder).tokens) + cls
        self.positions = nn.Parameter(torch.empty(self.tokens, width).normal_(std=0.02)) if positions else None

    def forward(self, inputs: Tensor) -> Tensor:
        x_BTD: Tensor = self.embedder(inputs)
        if self.cls is not None:  # at the end: under causal attention only the last token has seen the whole image
            x_BTD = torch.cat([x_BTD, self.cls.expand(len(x_BTD), -1, -1)], dim=1)
        return x_BTD if self.positions is None else x_BTD + self.positions  # in fp32, as a language model's own input is

    @torch.no_grad()
    def match_scale(self, inputs: Tensor, target: Tensor) -> float:
        r"""Give the embeddings of ``inputs`` the RMS of ``target`` (trap: tokens 40 times too long wreck a frozen model).

        Positions first get the RMS of the patches that they are added to: at their usual 0.02 the place of a patch is
        a small part of its vector, and a frozen model can hardly tell one place from another. Then the embedder's last
        projection is rescaled, and the positions with it. Returns the factor.

        inputs: (B, \*input_shape); target: (V, D), the text embedding table.

        Raises:
            BadArgument: inputs that are no finite numbers, or whose embeddings are all zero.
        """
        size = float(_rms(self.embedder(inputs)))
        if not 0 < size < math.inf:
            raise BadArgument(
                f"inputs must be finite, and not all 0 in the model's scale; their embeddings have the size {size}"
            )
        if self.positions is not None:
            self.positions.mul_(_rms(self.embedder(inputs)) / _rms(self.positions))
        factor: float = (_rms(target) / _rms(self(inputs))).item()
        last = [m for m in self.embedder.modules() if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d)][-1]
        for parameter in (last.weight, last.bias, self.cls, self.positions):
            if parameter is not None:
                parameter.mul_(factor)
        return factor


@dataclasses.dataclass(frozen=True)
class InputSpec:
    """What goes in and what comes out: enough to prepare a stranger's image and to name the answer."""

    shape: tuple[int, ...]
    """Channels first: (C, H, W) for images, (C, S) for series."""
    classes: tuple[str, ...]
    """Class names, in the order of the scores."""
    mean: tuple[float, ...]
    """Channel means to subtract, on a scale of 0 to 1 for images."""
    std: tuple[float, ...]
    """Channel standard deviations to divide by."""
    white_level: int = DataConfig.white_level
    """The value that is white in images of more than 8 bits."""
    resize: Literal["crop", "squash", "pad"] = DataConfig.resize
    """How an image of another size gets this one."""

    def __post_init__(self) -> None:
        """Raise BadArgument for a value out of its range."""
        sides = all(isinstance(side, Integral) and 0 < int(side) <= 1 << 16 for side in self.shape)
        if not sides or len(self.shape) not in (2, 3) or math.prod(self.shape) > 1 << 28:
            raise BadArgument(f"the input's shape must be channels and sides, whole numbers from 1 to 65536; got {self.shape}")
        if not self.classes or not all(isinstance(name, str) and name for name in self.classes):
            raise BadArgument(f"classes must be names, at least one; got {self.classes}")
        if twins := sorted({name for name in self.classes if self.classes.count(name) > 1}):
            raise BadArgument(f"classes must differ, and '{twins[0]}' stands there twice: give each its own name")
        if not isinstance(self.white_level, Integral) or not 0 < int(self.white_level) < 1 << 31:
            raise BadArgument(f"white_level must be a whole number above 0; got {self.white_level!r}")
        if self.resize not in ("crop", "squash", "pad"):
            raise BadArgument(f"resize must be crop, squash or pad; got {self.resize!r}")
        for name, values, least in (("mean", self.mean, -math.inf), ("std", self.std, 0.0)):
            if len(values) != self.shape[0] or not all(isinstance(v, Real) and least < v < math.inf for v in values):
                above = "finite numbers" if name == "mean" else "numbers above 0"
                raise BadArgument(f"{name} must be {above}, one for each of {self.shape[0]} channels; got {values}")

    def pixels(self, images: Any) -> np.ndarray:
        """Any images as uint8 (B, C, H, W), as training saw them: see ``data.images.decode.to_pixels``, and what it raises."""
        from crossalign.data.images.decode import to_pixels

        return to_pixels(images, self.shape, self.white_level, self.resize)


def check_inputs(inputs: Any, shape: tuple[int, ...]) -> None:
    """Raise BadArgument for what is no batch of a classifier's inputs: nothing is computed for uint8, which training uses."""
    if not isinstance(inputs, Tensor):
        raise BadArgument(f"inputs must be a tensor, a batch of shape (B, {_sizes(shape)}); got a {type(inputs).__name__}")
    if inputs.ndim != len(shape) + 1 or tuple(inputs.shape[1:]) != tuple(shape) or not len(inputs):
        raise BadArgument(f"inputs must be a batch of shape (B, {_sizes(shape)}); got ({_sizes(inputs.shape)})")
    if inputs.dtype == torch.uint8:
        return
    if not inputs.is_floating_point():
        raise BadArgument(f"inputs must be uint8, or floats on a scale of 0 to 1; got {inputs.dtype}")
    is_read = inputs.device.type == "cpu" and not torch.compiler.is_compiling()
    if len(shape) == 3 and is_read:  # a series has any scale
        low, high = (float(value) for value in inputs.detach().aminmax())
        if not (low >= LOWEST and high <= HIGHEST):  # nan is neither
            raise BadArgument(
                f"inputs must be floats on a scale of 0 to 1, not normalised; got {low:g} to {high:g}: give pixels of 0 to 255 "
                "as uint8, or divide by 255"
            )


def _sizes(shape: Iterable[int]) -> str:
    return ", ".join(map(str, shape))


def _rms(x: Tensor) -> Tensor:
    return x.float().pow(2).mean().sqrt()
