"""Taps: pooled hidden states of chosen layers of a language model, with their gradient, from an ordinary forward pass.

Layer i is ``hidden_states[i]`` of transformers: 0 what enters the first block, i < L what enters block i + 1, and L the
output after the final norm. Only the layers asked for are kept.

A tap is a hook on what *enters* a block. What leaves one is, under reentrant checkpointing, a tensor without gradient;
and hooks that are registered after ``torch.compile`` never fire, so the pass runs on the module that was compiled.

Shapes: B batch, T tokens, D width, K layers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from crossalign.core.errors import UserError, unknown
from crossalign.models.language.families import FAMILIES

Pool = Literal["mean", "last"]
Layer = int | str


class Taps:
    """``taps(model, input_ids, attention_mask)`` → pooled features (B, sum of the layers' widths), layers side by side.

    Args:
        layers: indices (negative ones count from the end), "penultimate" (L - 1), "last" (L), "all" (0 to L), or names of
            modules, whose output is then tapped; one or several.
        pool: "mean" over the real tokens, or "last": the last real token.
    """

    def __init__(self, layers: Layer | Sequence[Layer] = "penultimate", pool: Pool = "mean") -> None:
        self.layers: tuple[Layer, ...] = (layers,) if isinstance(layers, int | str) else tuple(layers)
        if not self.layers:
            raise UserError("no layer to tap: name one, such as penultimate")
        if pool not in ("mean", "last"):
            raise unknown("pooling", str(pool), ("mean", "last"))
        self.pool = pool

    def __call__(self, model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Features (B, sum of D) of the texts ``input_ids`` (B, T) whose real tokens ``attention_mask`` (B, T) marks.

        The padding may be on either side. ``model`` may be wrapped by DDP or ``torch.compile``; an FSDP2 model is called
        at its root.

        A text without real tokens gives NaN with pool="mean": the source of the texts refuses empty ones.

        Raises:
            UserError: a layer that the model does not have.
            RuntimeError: a layer that did not run, or that has no gradient where one is due.
        """
        hidden = self.hidden_states(model, input_ids, attention_mask)
        return torch.cat([pooled(h_BTD, attention_mask, self.pool) for h_BTD in hidden], dim=-1)

    def hidden_states(self, model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> list[Tensor]:
        """The tapped layers, each (B, T, D)."""
        model = unwrapped(model)
        places = resolve_layers(model, self.layers)
        with _recording(model, places) as seen:
            _run(model, input_ids, attention_mask)
        for place in places:
            if place not in seen:
                raise RuntimeError(f"layer {place} did not run; a part of the model that was compiled alone cannot be tapped")
        if torch.is_grad_enabled() and not any(h.requires_grad for h in seen.values()) and _trains(model):
            raise RuntimeError(
                f"layers {', '.join(map(str, places))} have no gradient: tap one above what trains, by its index, or "
                "checkpoint with use_reentrant=False"
            )
        return [seen[place] for place in places]


def pooled(h_BTD: Tensor, mask_BT: Tensor, pool: Pool) -> Tensor:
    """(B, D) in fp32 at least: the mean over real tokens, or the last real token, whichever side the padding is on."""
    if h_BTD.dtype not in (torch.float32, torch.float64):
        h_BTD = h_BTD.float()
    if pool == "mean":
        return masked_mean(h_BTD, mask_BT)
    places = torch.arange(mask_BT.shape[1], device=mask_BT.device)
    last = (mask_BT.bool() * places).amax(1)
    return h_BTD[torch.arange(len(h_BTD), device=h_BTD.device), last]


def masked_mean(vectors: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens that are not padding: vectors (n, L, D), mask (n, L) → (n, D)."""
    weights = mask.to(vectors.dtype).unsqueeze(-1)
    return (vectors * weights).sum(1) / weights.sum(1)


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside DDP, ``torch.compile`` and PEFT; parameters are the same."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.parallel.DistributedDataParallel):
            inner = model.module
        peft = getattr(model, "active_peft_config", None)
        if inner is None and peft is not None and not getattr(peft, "is_prompt_learning", False):
            inner = model.get_base_model()  # type: ignore[operator]
        if inner is None:
            return model
        model = inner


def blocks_of(model: nn.Module) -> nn.ModuleList:
    """The stack of blocks: the one list of modules that is as long as the configuration says.

    Raises:
        UserError: the model has no such list.
    """
    config = getattr(model, "config", None)
    count = getattr(config, "num_hidden_layers", None)
    stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not stacks:
        raise UserError(f"{type(model).__name__} has no list of {count} blocks to count layers in; name modules to tap instead")
    return stacks[0]


def resolve_layers(model: nn.Module, layers: Sequence[Layer]) -> tuple[Layer, ...]:
    """``layers`` as indices 0 to L and module names, in the order given, each once.

    Raises:
        UserError: a layer that the model does not have; those that it has are listed.
    """
    found: list[Layer] = []
    names: set[str] = set()
    for layer in layers:
        if isinstance(layer, str) and layer.lstrip("-").isdigit():  # from a command line or a file
            layer = int(layer)
        if isinstance(layer, int) or layer in ("penultimate", "last", "all"):
            found += _indices(layer, len(blocks_of(model)))
            continue
        names = names or {name for name, _ in model.named_modules() if name}
        if layer not in names:
            blocks = sorted(name for name in names if name.count(".") < 3)  # a large model has thousands below
            raise unknown("layer", layer, ["penultimate", "last", "all", *blocks])
        found.append(layer)
    return tuple(dict.fromkeys(found))


def _indices(layer: Layer, count: int) -> list[int]:
    if layer == "all":
        return list(range(count + 1))
    index = {"penultimate": count - 1, "last": count}.get(str(layer), layer)
    assert isinstance(index, int)
    if not -count - 1 <= index <= count:
        raise UserError(f"there is no layer {layer}: the model has the layers 0 to {count}, penultimate, last and all")
    return [index % (count + 1)]


@contextmanager
def _recording(model: nn.Module, places: Sequence[Layer]) -> Iterator[dict[Layer, Tensor]]:
    """Hooks for one forward pass; they are gone before a backward pass runs parts of the model again."""
    seen: dict[Layer, Tensor] = {}

    def entering(place: Layer) -> Callable[..., None]:
        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.setdefault(place, args[0] if args else kwargs["hidden_states"])

        return keep

    def leaving(place: Layer) -> Callable[..., None]:
        def keep(_: nn.Module, __: Any, output: Any) -> None:
            if not isinstance(output, Tensor):
                output = output[0]
            seen.setdefault(place, output)

        return keep

    handles = []
    for place in places:
        if isinstance(place, str):
            handles.append(model.get_submodule(place).register_forward_hook(leaving(place)))
            continue
        blocks = blocks_of(model)
        if place < len(blocks):
            handles.append(blocks[place].register_forward_pre_hook(entering(place), with_kwargs=True))
        else:
            owner = next(m for m in model.modules() if any(child is blocks for child in m.children()))
            handles.append(owner.register_forward_hook(leaving(place)))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _run(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> None:
    """One forward pass, at the root (FSDP2 gathers weights there), with logits of one token only where there is a head."""
    takes = inspect.signature(model.forward).parameters
    options: dict[str, Any] = {}
    if "use_cache" in takes:
        options["use_cache"] = False
    if "logits_to_keep" in takes:
        options["logits_to_keep"] = 1
    family = FAMILIES.get(getattr(getattr(model, "config", None), "model_type", ""))
    if "position_ids" in takes and (family is None or family.attention == "causal"):
        # Counted from the first real token, so that padding on the left changes nothing.
        options["position_ids"] = (attention_mask.long().cumsum(1) - 1).clamp_min(0)
    # A module compiled in place would run without our hooks.
    nn.Module._call_impl(model, input_ids=input_ids, attention_mask=attention_mask, **options)


def _trains(model: nn.Module) -> bool:
    return any(p.requires_grad for p in model.parameters())
