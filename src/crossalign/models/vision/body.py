"""The one form that every vision model is brought into, and how its weights are read.

Shapes: B batch, T tokens, D width, H and W places.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor, nn

from crossalign.core.errors import UserError, first_line
from crossalign.core.files import content_key, files_hash
from crossalign.models.loading import built, shuffle_weights

GROUP = "crossalign.teachers"
"""Entry points of plug-ins that register kinds of teachers."""
Kind = Literal["pretrained", "random", "shuffled"]
Pool = Literal["auto", "cls", "mean"]
Preprocess = Callable[[Sequence[Image.Image]], Tensor]


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
class Body:
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
    files: Callable[[], list[Path]],
    load: Callable[[nn.Module, list[Path]], None],
    identity: Any,
) -> tuple[nn.Module, Callable[[], str]]:
    """The model of a request and what gives its fingerprint.

    Args:
        request: what is asked for.
        build: makes the architecture with its own initial weights.
        files: finds the weight files; asked only when they are needed.
        load: puts the files' weights into the model, strictly.
        identity: JSON-able; names the architecture.
    """
    model = built(build, request.seed, meta=not request.weights)
    if request.loads:
        load(model, files())
        if request.kind == "shuffled":
            shuffle_weights(model, request.seed)

    def fingerprint() -> str:
        if request.kind == "random":
            return content_key(random=identity, seed=request.seed)
        content = content_key(weights=files_hash(files()), architecture=identity)  # the same tensors in another are others
        return content if request.kind == "pretrained" else content_key(shuffled=content, seed=request.seed)

    return model, fingerprint


def read_state(files: list[Path]) -> dict[str, Tensor]:
    """The tensors of safetensors files, or of pickles as far as those hold nothing but tensors.

    Raises:
        UserError: a damaged file, or a pickle with more in it.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    state: dict[str, Tensor] = {}
    for file in files:
        try:
            if file.suffix == ".safetensors":
                state |= load_file(file)
            else:
                state |= torch.load(file, weights_only=True, map_location="cpu")
        except pickle.UnpicklingError as error:
            raise UserError(f"'{file}' holds more than tensors, so it was not opened: save it as safetensors") from error
        except (OSError, RuntimeError, EOFError, SafetensorError) as error:
            raise UserError(f"cannot read the weights in '{file}' ({first_line(error)}): fetch the file again") from error
    return state


def load_strictly(model: nn.Module, state: dict[str, Tensor], ref: str) -> None:
    """Put ``state`` into ``model``: every tensor of one is a tensor of the other, or UserError names some that are not."""
    own = model.state_dict()
    resized = [
        f"{k} {tuple(state[k].shape)}, not {tuple(own[k].shape)}" for k in own if k in state and state[k].shape != own[k].shape
    ]
    for names, fault in (
        (resized, "do not fit its architecture"),
        (sorted(own.keys() - state.keys()), "lack tensors of the model"),
        (sorted(state.keys() - own.keys()), "hold tensors that the model has no place for"),
    ):
        if names:
            some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise UserError(f"the weights of '{ref}' {fault}: {some}")
    model.load_state_dict(state, strict=True)
