"""Which device computes, what it is called, and how much memory it took."""

import contextlib
import re
import sys
from pathlib import Path

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


def reset_peak_memory(device: str) -> None:
    """Begin a new measurement for :func:`peak_memory_bytes`: several runs may share a process."""
    if device == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError):  # Linux has it
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory_bytes(device: str) -> int:
    """The most memory held so far: by torch's allocator on a CUDA device, else by the whole process."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    # What getrusage reports outlives exec: a small program started by a large one would show the large one's peak.
    status = Path("/proc/self/status")
    if status.exists():
        peak = re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), flags=re.MULTILINE)
        if peak:
            return int(peak.group(1)) * 1024
    import resource  # not on Windows

    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024


def device_name(device: str) -> str:
    """What result.json calls the device that a run was computed on."""
    import torch

    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"cpu ({torch.get_num_threads()} threads)" if device == "cpu" else device
