"""A language model as a map of token vectors: direction, positions and dropout as configured, on every architecture.

Shapes: B batch, T tokens, D width, V vocabulary.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from crossalign.config import BackboneConfig
from crossalign.core.errors import UserError
from crossalign.models.language.families import Family, longest_input
from crossalign.models.language.inner import attend_without_mask, checkpoint_gradients, set_dropout
from crossalign.models.language.model import LanguageModel


class Backbone(nn.Module):
    """``forward``: input vectors (B, T, D) → last hidden states (B, T, D) after the final norm.

    It takes the language model over: hooks and dropout are set on ``language_model.model`` itself.

    Raises:
        UserError: the configuration asks for positions that the architecture does not have.
    """

    def __init__(self, language_model: LanguageModel, config: BackboneConfig) -> None:
        super().__init__()
        self.model: Any = language_model.model
        self.family = language_model.family
        self.kind = language_model.kind
        self.ref = language_model.ref
        self.width = language_model.width
        """D, of both the input and the output vectors."""
        self.attention: Literal["causal", "bidirectional", "none"]
        """Who sees whom: resolved from the configuration and the architecture; "none" without a backbone."""
        natural = config.attention == "auto" or self.family.attention == "none"
        self.attention = self.family.attention if natural else config.attention  # type: ignore[assignment]
        self.uses_backbone_positions, self.uses_new_positions = _resolve_positions(self.family, config.position, self.ref)
        if self.family.positions != "none" and not self.uses_backbone_positions:
            _silence_positions(self.model, self.family)
        self.max_length = longest_input(self.model, self.family)
        """Longest input; None where there is no limit."""
        set_dropout(self.model, config.dropout)
        if self.family.attention != "none":
            attend_without_mask(self.model)
            if config.gradient_checkpointing:
                checkpoint_gradients(self.model)

    def forward(self, inputs_embeds: Tensor) -> Tensor:
        self.check_length(inputs_embeds.shape[1])
        output = self.model(inputs_embeds=inputs_embeds, is_causal=self.attention == "causal", use_cache=False)
        return output.last_hidden_state  # type: ignore[no-any-return]

    def check_length(self, length: int) -> None:
        """Raise UserError if ``length`` tokens are more than the architecture can take."""
        if self.max_length is not None and length > self.max_length:
            raise UserError(
                f"{length} tokens are more than the {self.max_length} that '{self.ref}' can take: use larger patches"
            )

    @property
    def has_text(self) -> bool:
        """Whether there is a table of text embeddings to match and to align to."""
        return self.model.get_input_embeddings() is not None

    @torch.no_grad()
    def text_embedding_table(self) -> Tensor:
        """(V, D): each token's vector as it enters where ``inputs_embeds`` enters, scaled if the model scales it.

        Raises:
            UserError: the control ``none:`` or ``vit:``, which has no text.
        """
        embedding = self.model.get_input_embeddings()
        if embedding is None:
            raise UserError(
                f"'{self.ref}' has no text embeddings: set --align.metric none and --embedder.no-match-scale, "
                "or take another backbone"
            )
        if type(embedding) is nn.Embedding:
            return embedding.weight.detach()
        return embedding(torch.arange(embedding.num_embeddings, device=embedding.weight.device)).detach()  # type: ignore[no-any-return]

    def unused_parameters(self) -> list[str]:
        """Names of parameters that no input vector ever meets: the token table, and a silenced table of positions."""
        unused = []
        embedding = self.model.get_input_embeddings()
        if embedding is not None:
            unused += [id(p) for p in embedding.parameters()]
        if self.family.positions == "learned" and not self.uses_backbone_positions:
            unused += [id(p) for p in self.model.get_submodule(self.family.position_module).parameters()]
        return [name for name, p in self.named_parameters() if id(p) in unused]


def _resolve_positions(family: Family, position: str, ref: str) -> tuple[bool, bool]:
    """Whether the backbone's own positions are used, and whether new ones are (never both by accident)."""
    if family.positions == "none":
        if position in ("backbone", "both"):
            raise UserError(f"'{ref}' has no positions of its own for --backbone.position {position}: use new or none")
        return False, position != "none"
    if position == "auto":
        return family.positions == "rotary", True
    return position in ("backbone", "both"), position in ("new", "both")


def _silence_positions(model: nn.Module, family: Family) -> None:
    """Make a position table add exactly zero, or the rotation exactly the identity.

    The model's position ids stay as they are: equal ones would be taken for packed sequences, each token masked from
    all others under causal attention.
    """
    module = model.get_submodule(family.position_module)
    if family.positions == "learned":
        module.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
    else:
        module.register_forward_pre_hook(_zero_position_ids, with_kwargs=True)


def _zero_position_ids(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Every token at position 0, where the angle is 0. ``position_ids`` is the second argument, by place or by name."""
    if "position_ids" in kwargs:
        return args, {**kwargs, "position_ids": torch.zeros_like(kwargs["position_ids"])}
    return (args[0], torch.zeros_like(args[1]), *args[2:]), kwargs


@torch.no_grad()
def probe(backbone: Backbone, length: int = 8) -> dict[str, Any]:
    """Check by experiment that attention and positions are what the configuration says; cheap, at start-up.

    Tokens are random vectors at the scale of the text embeddings. The last one is replaced by another (a constant shift
    would vanish in the first norm): earlier outputs move if and only if attention is bidirectional. Tokens are permuted,
    seen both ways: the outputs follow the permutation if and only if the backbone adds no positions. Runs in eval mode,
    then restores every module's mode; the global random state is not touched.

    Returns:
        {"attention": "causal" | "bidirectional" | "none", "positions": bool}

    Raises:
        RuntimeError: what was seen is not what was asked for, or nothing can be seen (not finite).
    """
    if backbone.attention == "none":
        return {"attention": "none", "positions": False}
    length = max(3, min(length, 8, backbone.max_length or 8))
    weight = next(backbone.model.parameters())
    scale = backbone.text_embedding_table().float().pow(2).mean().sqrt().item() if backbone.has_text else 1.0
    drawn = torch.randn(1, length + 1, backbone.width, generator=torch.Generator().manual_seed(0)) * scale
    tokens = drawn.to(weight.device, weight.dtype)
    changed = torch.cat([tokens[:, :-2], tokens[:, -1:]], 1)  # the last token is another
    tokens = tokens[:, :-1]

    def outputs(tokens: Tensor) -> Tensor:
        with torch.autocast(tokens.device.type, enabled=False):
            return backbone(tokens).float()  # type: ignore[no-any-return]

    modes = {module: module.training for module in backbone.modules()}
    attention = backbone.attention
    try:
        backbone.eval()
        moves = _differs(outputs(tokens)[:, :-1], outputs(changed)[:, :-1])
        backbone.attention = "bidirectional"
        positions = _differs(outputs(tokens).roll(1, dims=1), outputs(tokens.roll(1, dims=1)))
    finally:
        backbone.attention = attention
        for module, training in modes.items():
            module.training = training
    seen = {"attention": "bidirectional" if moves else "causal", "positions": positions}
    asked = {"attention": attention, "positions": backbone.uses_backbone_positions}
    if seen != asked:
        raise RuntimeError(f"the backbone '{backbone.ref}' was asked for {asked}, but a probe of its outputs shows {seen}")
    return seen


def _differs(x: Tensor, y: Tensor) -> bool:
    """Whether two outputs differ by more than rounding, relative to their scale."""
    if not (x.isfinite().all() and y.isfinite().all()):
        raise RuntimeError("the backbone's outputs are not finite, even for random inputs at the scale of its embeddings")
    return bool((x - y).abs().max() > 1e-5 * x.abs().max())
