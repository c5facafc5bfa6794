"""Backbones that are no language model: the two controls ``vit:REF`` and ``none:REF``.

Importing this file registers both with transformers, so that a saved configuration opens again.
"""

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel, ViTConfig
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.vit.modeling_vit import ViTLayer, ViTPreTrainedModel

from crossalign.models.language.families import NONE, VIT


class ViTEncoderConfig(ViTConfig):
    """A ViT's configuration, for an encoder that takes token vectors instead of pixels."""

    model_type = VIT.name


class ViTEncoder(ViTPreTrainedModel):
    """A pre-norm transformer encoder from scratch: transformers' ViT without its patch embedding and class token."""

    config_class = ViTEncoderConfig

    def __init__(self, config: ViTEncoderConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(ViTLayer(config) for _ in range(config.num_hidden_layers))
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    def get_input_embeddings(self) -> None:
        """No token table."""
        return None

    def forward(self, inputs_embeds: torch.Tensor, is_causal: bool = False, **_: Any) -> BaseModelOutput:
        """``inputs_embeds: (B, T, D)`` to ``last_hidden_state: (B, T, D)`` after the final norm."""
        hidden = inputs_embeds
        for layer in self.layers:
            hidden = layer(hidden, None, is_causal=is_causal)
        return BaseModelOutput(last_hidden_state=self.layernorm(hidden))


class NoBackboneConfig(PreTrainedConfig):
    """A width, and nothing else."""

    model_type = NONE.name
    hidden_size: int = 1


class NoBackbone(PreTrainedModel):
    """The identity in the shape of a model: what is left when the language model is taken out."""

    config_class = NoBackboneConfig
    _supports_sdpa = True

    def __init__(self, config: NoBackboneConfig) -> None:
        super().__init__(config)
        self.post_init()

    def get_input_embeddings(self) -> None:
        """No token table."""
        return None

    def forward(self, inputs_embeds: torch.Tensor, **_: Any) -> BaseModelOutput:
        """``inputs_embeds: (B, T, D)`` as it is."""
        return BaseModelOutput(last_hidden_state=inputs_embeds)


for _config, _model in ((ViTEncoderConfig, ViTEncoder), (NoBackboneConfig, NoBackbone)):
    AutoConfig.register(_config.model_type, _config)
    AutoModel.register(_config, _model)


def vit_config_like(config: Any) -> ViTEncoderConfig:
    """A ViT of the same depth, width, heads and MLP width as a language model's configuration."""
    names = ("intermediate_size", "ffn_dim", "hidden_dim", "n_inner")
    inner = next((size for name in names if (size := getattr(config, name, None))), None)
    return ViTEncoderConfig(
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        intermediate_size=inner or 4 * config.hidden_size,  # GPT-2's n_inner = None means 4 times the width
    )
