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
    from crossalign.adapt import adapt
    from crossalign.alignment import coral, cosine, get_divergence, mmd, mse, otdd, register_divergence, sinkhorn
    from crossalign.config import AdaptConfig
    from crossalign.errors import UserError
    from crossalign.models.classifier import ImageClassifier
    from crossalign.models.language import open_language_model
    from crossalign.recipes import get_recipe

_WHERE = {
    "adapt": "adapt",
    **dict.fromkeys(
        ("coral", "cosine", "get_divergence", "mmd", "mse", "otdd", "register_divergence", "sinkhorn"), "alignment"
    ),
    "AdaptConfig": "config",
    "UserError": "errors",
    "ImageClassifier": "models.classifier",
    "open_language_model": "models.language",
    "get_recipe": "recipes",
}
__all__ = [
    "AdaptConfig",
    "ImageClassifier",
    "UserError",
    "__version__",
    "adapt",
    "coral",
    "cosine",
    "get_divergence",
    "get_recipe",
    "mmd",
    "mse",
    "open_language_model",
    "otdd",
    "register_divergence",
    "sinkhorn",
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
