"""Pure tensor functions: how alike are two sets of features, how far apart two samples, is an alignment collapsing?"""

from .correlations import cca, linear_regression, pwcca, svcca
from .divergence import coral, cosine, mmd, mmd_orca, mse
from .gather import gather_features
from .health import collapse_warning, effective_rank, health, participation_ratio
from .kernels import cka, kernel_alignment
from .labelled import OtddTarget, otdd
from .neighbours import mutual_knn, soft_mutual_knn
from .penalty import koleo, l1, l2
from .registry import (
    divergences,
    get_divergence,
    get_penalty,
    get_similarity,
    penalties,
    register_divergence,
    register_penalty,
    register_similarity,
    similarities,
)
from .similarity import dot_product
from .transport import sinkhorn

__all__ = [
    "OtddTarget",
    "cca",
    "cka",
    "collapse_warning",
    "coral",
    "cosine",
    "divergences",
    "dot_product",
    "effective_rank",
    "gather_features",
    "get_divergence",
    "get_penalty",
    "get_similarity",
    "health",
    "kernel_alignment",
    "koleo",
    "l1",
    "l2",
    "linear_regression",
    "mmd",
    "mmd_orca",
    "mse",
    "mutual_knn",
    "otdd",
    "participation_ratio",
    "penalties",
    "pwcca",
    "register_divergence",
    "register_penalty",
    "register_similarity",
    "similarities",
    "sinkhorn",
    "soft_mutual_knn",
    "svcca",
]
