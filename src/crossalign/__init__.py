"""crossalign: move representations across modalities, both ways, and know whether it really helped.

Public names are importable from here; each is loaded when it is first used, so that importing costs nothing.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from crossalign.alignment import (
        cca,
        cka,
        coral,
        cosine,
        dot_product,
        get_divergence,
        get_penalty,
        get_similarity,
        kernel_alignment,
        koleo,
        l1,
        l2,
        linear_regression,
        mmd,
        mse,
        mutual_knn,
        otdd,
        pwcca,
        register_divergence,
        register_penalty,
        register_similarity,
        sinkhorn,
        soft_mutual_knn,
        svcca,
    )
    from crossalign.config import AdaptConfig, EvaluateConfig, FinetuneConfig, MeasureConfig, PretrainConfig, SearchConfig
    from crossalign.core.errors import UserError
    from crossalign.features.regularizer import AlignmentRegularizer
    from crossalign.models.classifier.model import ImageClassifier
    from crossalign.models.language.model import open_language_model
    from crossalign.models.vision.teacher import open_teacher
    from crossalign.recipes import get_recipe
    from crossalign.studies.tune import tune
    from crossalign.verbs.adapt.job import adapt
    from crossalign.verbs.evaluate.job import evaluate
    from crossalign.verbs.language_model.job import finetune, pretrain
    from crossalign.verbs.measure.job import measure

_WHERE = {
    "adapt": "verbs.adapt.job",
    **dict.fromkeys(
        ("coral", "cosine", "get_divergence", "mmd", "mse", "otdd", "register_divergence", "sinkhorn"), "alignment"
    ),
    **dict.fromkeys(
        ("cca", "cka", "dot_product", "kernel_alignment", "linear_regression", "mutual_knn", "pwcca", "soft_mutual_knn"),
        "alignment",
    ),
    **dict.fromkeys(
        ("get_penalty", "get_similarity", "koleo", "l1", "l2", "register_penalty", "register_similarity", "svcca"),
        "alignment",
    ),
    **dict.fromkeys(
        ("AdaptConfig", "EvaluateConfig", "FinetuneConfig", "MeasureConfig", "PretrainConfig", "SearchConfig"), "config"
    ),
    "evaluate": "verbs.evaluate.job",
    "finetune": "verbs.language_model.job",
    "measure": "verbs.measure.job",
    "pretrain": "verbs.language_model.job",
    "UserError": "core.errors",
    "ImageClassifier": "models.classifier.model",
    "open_language_model": "models.language.model",
    "open_teacher": "models.vision.teacher",
    "get_recipe": "recipes",
    "AlignmentRegularizer": "features.regularizer",
    "tune": "studies.tune",
}
__all__ = [
    "AdaptConfig",
    "AlignmentRegularizer",
    "EvaluateConfig",
    "FinetuneConfig",
    "ImageClassifier",
    "MeasureConfig",
    "PretrainConfig",
    "SearchConfig",
    "UserError",
    "__version__",
    "adapt",
    "cca",
    "cka",
    "coral",
    "cosine",
    "dot_product",
    "evaluate",
    "finetune",
    "get_divergence",
    "get_penalty",
    "get_recipe",
    "get_similarity",
    "kernel_alignment",
    "koleo",
    "l1",
    "l2",
    "linear_regression",
    "measure",
    "mmd",
    "mse",
    "mutual_knn",
    "open_language_model",
    "open_teacher",
    "otdd",
    "pretrain",
    "pwcca",
    "register_divergence",
    "register_penalty",
    "register_similarity",
    "sinkhorn",
    "soft_mutual_knn",
    "svcca",
    "tune",
]


class _Package(ModuleType):
    """Keeps ``crossalign.adapt`` the function: importing the file of that name would else put the module in its place."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _WHERE and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'crossalign' has no attribute '{name}'")
    return getattr(import_module(f"crossalign.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return __all__
