"""Sets of the Hugging Face hub, by one string."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from crossalign.core.errors import UserError, missing_extra
from crossalign.core.refs import Ref


def load_hub(ref: str) -> Any:
    """The splits of a set as ``datasets`` loads them, rows in a memory map.

    Args:
        ref: hf:ORG/NAME, hf:ORG/NAME:CONFIGURATION for a set that has several, then @REVISION; or hf: and a local folder
            that ``datasets`` understands.

    Raises:
        UserError: the package is missing, or the set cannot be opened.
    """
    parts = Ref(ref, ())
    try:
        import datasets
    except ImportError as error:
        raise missing_extra("datasets", "hub", f"data source {ref}") from error
    path, configuration = str(Path(parts.rest).expanduser()), ""
    is_local = Path(path).exists()
    if not is_local:
        path, _, configuration = parts.name.partition(":")
        path = str(Path(path).expanduser()) if path.startswith(("~", "/", ".")) else path
    try:
        return datasets.load_dataset(path, configuration or None, revision=(not is_local and parts.revision) or None)
    except Exception as error:  # the hub, the network and each set's own files fail in many ways
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"cannot open {ref} ({type(error).__name__}: {reason}); check the name and the network, or give a "
            "local file or folder"
        ) from error


def train_split(ref: str) -> Any:
    """The training split of a set, or its only one.

    Raises:
        UserError: see :func:`load_hub`; or it has several splits, none of them named train.
    """
    loaded = load_hub(ref)
    if "train" not in loaded and len(loaded) > 1:
        raise UserError(f"{ref} has no split named train, only {', '.join(map(str, loaded))}")
    return loaded["train"] if "train" in loaded else next(iter(loaded.values()))
