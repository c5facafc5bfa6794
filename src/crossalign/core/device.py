"""Which device computes."""

from __future__ import annotations

from crossalign.core.errors import UserError


def resolve_device(requested: str, option: str = "--loop.device") -> str:
    """``auto`` to the best device at hand.

    Raises:
        UserError: the device asked for is not here.
    """
    import torch

    here = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if requested == "auto":
        return next(name for name in ("cuda", "mps", "cpu") if here[name])
    if not here[requested]:
        raise UserError(f"{option} {requested} is not on this machine; it has {', '.join(n for n in here if here[n])}")
    return requested
