"""Pure tensor functions: how far apart two samples lie, and whether an alignment is collapsing."""

from .divergence import OtddTarget, coral, cosine, mmd, mmd_orca, mse, otdd, sinkhorn
from .health import collapse_warning, effective_rank, health, participation_ratio
from .registry import divergence_names, get_divergence, register_divergence

__all__ = [
    "OtddTarget",
    "collapse_warning",
    "coral",
    "cosine",
    "divergence_names",
    "effective_rank",
    "get_divergence",
    "health",
    "mmd",
    "mmd_orca",
    "mse",
    "otdd",
    "participation_ratio",
    "register_divergence",
    "sinkhorn",
]
