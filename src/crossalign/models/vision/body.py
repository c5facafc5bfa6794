"""The one form that every vision model is brought into.

Shapes: B batch, T tokens, D width, H and W places.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from torch import Tensor, nn

from crossalign.core.files import content_key, files_hash
from crossalign.models.loading import building, built, put_tensors, read_tensors, shuffle_weights

GROUP = "crossalign.teachers"
"""Entry points of plug-ins that register kinds of teachers."""
Kind = Literal["pretrained", "random", "shuffled"]
Pool = Literal["auto", "cls", "mean"]
Preprocess = Callable[[Sequence[Image.Image]], Tensor]
Files = Callable[[], list[Path]]


@dataclass(frozen=True)
class Request:
    """What is asked for, beside the name."""

    ref: str
    """The whole reference, for messages."""
    kind: Kind = "pretrained"
    seed: int = 0
    """Of ``random:`` and ``shuffled:``."""
    weights: bool = True
    """False builds it on the meta device, without memory and without weights at hand."""

    @property
    def loads(self) -> bool:
        """Whether weights are read from files."""
        return self.weights and self.kind != "random"


@dataclass(frozen=True)
class VisionBody:
    """A vision model with what must be known to take features from it."""

    model: nn.Module
    penultimate: Callable[[nn.Module, Tensor, Pool], Tensor]
    """(model, pixels, pool) → what the model's own classifier would be given, (B, D)."""
    blocks: tuple[str, ...]
    """Names of the modules whose outputs are the layers 1, 2, …"""
    prefix: int
    """Class and register tokens before the places; 0 where there are none."""
    auto: Literal["cls", "mean"]
    """How pool=auto reads a layer."""
    preprocess: Preprocess
    transform: Any
    """JSON-able; says what ``preprocess`` does."""
    fingerprint: Callable[[], str]
    """A hash of the content of the weight files, or of the architecture and the seed that made the weights."""


def pool_places(h: Tensor, pool: Literal["cls", "mean"], prefix: int, channels_last: bool = False) -> Tensor:
    """Tokens (B, T, D), maps (B, D, H, W) or, with ``channels_last``, (B, H, W, D) → (B, D) in fp32.

    "cls" is the first token; "mean" is over places, without the ``prefix`` tokens before them. A vector (B, D) stays.
    """
    h = h.float()
    if h.ndim == 4:
        return h.mean((1, 2) if channels_last else (2, 3))
    if h.ndim == 3:
        return h[:, 0] if pool == "cls" else h[:, prefix:].mean(1)
    return h


def finish(
    request: Request,
    build: Callable[[], nn.Module],
    files: Files,
    identity: Any,
    rename: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = dict,
) -> tuple[nn.Module, Callable[[], str]]:
    """The model of a request and what gives its fingerprint.

    Args:
        request: what is asked for.
        build: makes the architecture with its own initial weights.
        files: finds the weight files; asked only when they are needed.
        identity: JSON-able; names the architecture.
        rename: the files' names of tensors → the model's; None where ``build`` has read the files already.
    """
    with building(f"'{request.ref}'"):
        model = built(build, request.seed, meta=not request.weights)
    if request.loads and rename is not None:
        put_tensors(model.state_dict(), rename(read_tensors(files())), f"'{request.ref}'")
    if request.loads and request.kind == "shuffled":
        shuffle_weights(model, request.seed)

    def fingerprint() -> str:
        if request.kind == "random":
            return content_key(random=identity, seed=request.seed)
        content = content_key(weights=files_hash(files()), architecture=identity)  # the same tensors in another are others
        return content if request.kind == "pretrained" else content_key(shuffled=content, seed=request.seed)

    return model, fingerprint
