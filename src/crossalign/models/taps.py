"""Taps: what chosen layers of a model give in an ordinary forward pass, with its gradient; only the layers asked for are kept.

``choose_layers`` says which layers a list of indices, words and names of modules means, and ``watching`` keeps them, of any
model. ``Taps`` does both for language models, and pools. There layer i is ``hidden_states[i]`` of transformers: 0 what enters
the first block, i < L what enters block i + 1, and L the output after the final norm. (What leaves a block is, under
reentrant checkpointing, a tensor without gradient; and hooks that are registered after ``torch.compile`` never fire, so the
pass runs on the module that was compiled.)

Shapes: B batch, T tokens, D width, K layers.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from crossalign.core.errors import BadArgument, UserError, unknown
from crossalign.models.language.families import FAMILIES

Pool = Literal["mean", "last"]
Layer = int | str


def block_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the blocks, or stages: the one list of modules that is as long as the configuration says; () without one.

    Of a model that also looks at images those of its language model.
    """
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    depths = getattr(text, "depths", None)
    count: Any = len(depths) if depths else getattr(text, "num_hidden_layers", None)
    part: Any = model
    if text is not config and hasattr(model, "get_decoder"):
        part = part.get_decoder()
    lists = {id(module) for module in part.modules() if isinstance(module, nn.ModuleList) and len(module) == count}
    for name, module in model.named_modules():
        if id(module) in lists:
            return tuple(f"{name}.{i}" for i in range(count))
    return ()


def choose_layers(
    model: nn.Module, layers: Sequence[Layer], blocks: Sequence[str], aliases: Mapping[str, Sequence[Layer]], owner: str
) -> tuple[Layer, ...]:
    """``layers`` as indices from 0 to the number of blocks and names of modules, in the order given, each once.

    Args:
        model: whose layers they are.
        layers: indices (negative ones count from the end), ``aliases``, or names of modules.
        blocks: names of the blocks, none where they are not known.
        aliases: words such as "all", and which layers each means; none, where only blocks would give them.
        owner: of the layers, for messages, such as "the teacher".

    Raises:
        UserError: a layer that the model does not have; those that it has are listed.
    """
    count = len(blocks)
    chosen: list[Layer] = []
    for layer in layers:
        if isinstance(layer, str) and layer.lstrip("-").isdigit():  # from a command line or a file
            layer = int(layer)
        if isinstance(layer, str) and layer not in aliases:
            names = {name for name, _ in model.named_modules() if name}
            if layer not in names:
                # A large model has thousands of modules below its blocks.
                depth = max((name.count(".") for name in blocks), default=1)
                raise unknown("layer", layer, [*aliases, *(name for name in names if name.count(".") <= depth)])
            chosen.append(layer)
        elif isinstance(layer, str) and aliases[layer]:
            chosen += aliases[layer]
        elif isinstance(layer, int) and count and -count - 1 <= layer <= count:
            chosen.append(layer % (count + 1))
        else:
            usable = [alias for alias, meant in aliases.items() if meant]
            if count:
                listed = f"the layers 0 to {count}, {', '.join(usable[:-1])} and {usable[-1]}"
            else:
                listed = f"no blocks to count: {'use ' + ', '.join(usable) + ', or ' if usable else ''}name a module"
            raise UserError(f"there is no layer {layer}: {owner} has {listed}")
    return tuple(dict.fromkeys(chosen))


@contextmanager
def watching(
    places: Mapping[Layer, tuple[nn.Module, bool]], keep: Callable[[Layer, Any], Tensor]
) -> Iterator[dict[Layer, Tensor]]:
    """Hooks for one forward pass, which fill a dictionary; they are gone before a backward pass runs parts of the model again.

    Args:
        places: by layer the module, and whether the layer is what enters it, or else what leaves it.
        keep: the layer and what was seen there → what is kept of it.
    """
    seen: dict[Layer, Tensor] = {}

    def note(layer: Layer, value: Any) -> None:
        seen.setdefault(layer, keep(layer, value))

    with ExitStack() as hooks:
        for layer, (module, enters) in places.items():

            def before(_: nn.Module, args: Any, kwargs: dict[str, Any], layer: Layer = layer) -> None:
                note(layer, args[0] if args else kwargs["hidden_states"])

            def after(_: nn.Module, __: Any, output: Any, layer: Layer = layer) -> None:
                note(layer, output)

            handle = (
                module.register_forward_pre_hook(before, with_kwargs=True) if enters else module.register_forward_hook(after)
            )
            hooks.callback(handle.remove)
        yield seen


class Taps:
    """``taps(model, input_ids, attention_mask)`` → pooled features (B, sum of the layers' widths), layers side by side.

    Args:
        layers: indices (negative ones count from the end), "penultimate" (L - 1), "last" (L), "all" (0 to L), or names of
            modules, whose output is then tapped; one or several.
        pool: "mean" over the real tokens, or "last": the last real token.
    """

    def __init__(self, layers: Layer | Sequence[Layer] = "penultimate", pool: Pool = "mean") -> None:
        several = (layers,) if isinstance(layers, int | str) else layers
        if not isinstance(several, Sequence) or not all(isinstance(layer, int | str) for layer in several):
            raise BadArgument(f"layers must be numbers, words or names of modules, one or several; got {layers!r}")
        self.layers: tuple[Layer, ...] = tuple(several)
        if not self.layers:
            raise BadArgument("no layer to tap: name one, such as penultimate")
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
        blocks = block_names(model)
        stack = blocks[0].rpartition(".")[0] if blocks else ""
        names = (*blocks, stack.rpartition(".")[0])  # what owns the stack gives its output after the final norm
        places: dict[Layer, tuple[nn.Module, bool]] = {}
        for layer in resolve_layers(model, self.layers):
            name = names[layer] if isinstance(layer, int) else layer
            places[layer] = model.get_submodule(name), isinstance(layer, int) and layer < len(blocks)
        with watching(places, lambda _, value: value if isinstance(value, Tensor) else value[0]) as seen:
            _run(model, input_ids, attention_mask)
        for layer in places:
            if layer not in seen:
                raise RuntimeError(f"layer {layer} did not run; a part of the model that was compiled alone cannot be tapped")
        trains = any(p.requires_grad for p in model.parameters())
        if torch.is_grad_enabled() and trains and not any(h.requires_grad for h in seen.values()):
            raise RuntimeError(
                f"layers {', '.join(map(str, places))} have no gradient: tap one above what trains, by its index, or "
                "checkpoint with use_reentrant=False"
            )
        return [seen[layer] for layer in places]


def resolve_layers(model: nn.Module, layers: Sequence[Layer]) -> tuple[Layer, ...]:
    """``layers`` of a language model, see :class:`Taps`, as indices 0 to L and module names, in the order given, each once.

    Raises:
        UserError: a layer that the model does not have; those that it has are listed.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise UserError(
            "the model is an encoder-decoder, which has two stacks of layers: name a decoder, such as GPT-2 or Llama"
        )
    blocks = block_names(model)
    every = range(len(blocks) + 1) if blocks else ()
    aliases = {"penultimate": every[-2:-1], "last": every[-1:], "all": every}
    return choose_layers(model, layers, blocks, aliases, "the model")


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
