"""What a run ran on: versions, hardware, command, commit; nothing that names a person."""

import contextlib
import functools
import os
import platform
import re
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from crossalign.core.reading import without_login

PACKAGES = (
    "accelerate",
    "datasets",
    "lm_eval",
    "mlflow",
    "numpy",
    "peft",
    "pillow",
    "pyarrow",
    "safetensors",
    "scikit-learn",
    "torch",
    "torchvision",
    "transformers",
)
# The instruction sets that decide how fast low precision is; everything else in the list of flags is noise.
CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "asimd", "bf16", "sve")


def environment() -> dict[str, Any]:
    """The machine, the software and the call, as plain values for environment.json.

    Package versions come from installed metadata, with nothing imported; GPUs and threads are asked of torch
    only where it is loaded already.
    """
    commit, changed = git_state()
    return {
        "crossalign": _version("crossalign"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_model(),
        "cpu_features": cpu_features(),
        "cores": usable_cores(),
        "threads": _threads(),
        "processes": world_size(),
        "memory_bytes": _memory_bytes(),
        "gpus": _gpus(),
        "packages": {name: _version(name) for name in PACKAGES if _version(name)},
        "git_commit": commit,
        "git_changed": changed,
        "command": command_line(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def is_main_process() -> bool:
    """True in the one process that writes files and talks to the user; torchrun and accelerate number them in RANK."""
    return os.environ.get("RANK", "0") == "0"


def world_size() -> int:
    """The number of processes of a distributed run, 1 of any other; torchrun and accelerate give it as WORLD_SIZE."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def command_line(argv: list[str] | None = None) -> str:
    """The command that started this process, quoted for a shell; logins in URLs are cut out, the home folder is ~."""
    program, *arguments = argv if argv is not None else sys.argv or [""]
    name = Path(program).name
    if name == "cli.py":  # as `python -m crossalign.cli`
        name = "crossalign"
    if name == "__main__.py":
        name = f"python -m {Path(program).parent.name}"
    home = str(Path.home())
    words = []
    for argument in arguments:
        argument = without_login(argument)
        if len(home) > 1:
            argument = argument.replace(home + os.sep, "~/")
        words.append(argument if re.fullmatch(r"~[\w./-]*", argument) else shlex.quote(argument))
    return " ".join([name, *words])


@functools.cache
def git_state() -> tuple[str | None, bool | None]:
    """Commit of the checkout that this package is imported from, and whether its source differs from it.

    Both are None where the package was installed from a wheel, or git or a first commit is missing.
    """
    root = Path(__file__).resolve().parents[3]
    git = ("git", "-C", str(root))
    # A wheel inside a virtual environment may lie in somebody else's repository: only our own top level counts.
    if _output(*git, "rev-parse", "--show-toplevel") != str(root):
        return None, None
    commit = _output(*git, "rev-parse", "--verify", "--quiet", "HEAD")
    if not commit:
        return None, None
    return commit, bool(_output(*git, "status", "--porcelain", "--", "src", "pyproject.toml"))


def cpu_model() -> str:
    """The processor's name as its maker gives it."""
    name = _cpuinfo("model name")
    if not name and sys.platform == "darwin":
        name = _output("sysctl", "-n", "machdep.cpu.brand_string")
    return name or platform.processor() or platform.machine()


def cpu_features() -> list[str]:
    """Those of ``CPU_FEATURES`` that the processor has; empty where the system does not tell."""
    flags = set((_cpuinfo("flags") or _cpuinfo("Features")).split())
    return [feature for feature in CPU_FEATURES if feature in flags]


def computes_bf16() -> bool | None:
    """Whether the processor has instructions that compute in bf16; None where the system does not tell."""
    features = cpu_features()
    return any(feature.endswith("bf16") for feature in features) if features else None


def usable_cores() -> int:
    """Cores that this process may run on, which a scheduler can set below what the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def usable_threads() -> int:
    """Threads that this process may compute with: as many as cores, or what OMP_NUM_THREADS, SLURM or a container allows."""
    allowed = [usable_cores()]
    for name in ("OMP_NUM_THREADS", "SLURM_CPUS_PER_TASK"):
        allowed += [int(os.environ[name])] if os.environ.get(name, "").isdigit() else []
    with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="utf-8").split()
        allowed.append(-(-int(quota) // int(period)))
    return max(1, min(allowed))


def free_memory() -> int | None:
    """Bytes that can be taken without swapping; where the system does not tell, all of the machine's."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="utf-8")
    except OSError:
        return _memory_bytes()
    match = re.search(r"^MemAvailable:\s*(\d+) kB", text, flags=re.MULTILINE)
    return 1024 * int(match.group(1)) if match else _memory_bytes()


def _threads() -> int | None:
    torch = sys.modules.get("torch")
    if torch is not None:
        return int(torch.get_num_threads())
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdigit() else None


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # Windows has no sysconf
        return None


def _gpus() -> list[dict[str, Any]]:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return []
    devices = (torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count()))
    return [{"name": device.name, "memory_bytes": device.total_memory} for device in devices]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@functools.cache
def _cpuinfo(key: str) -> str:
    """The first value of ``key`` in /proc/cpuinfo, empty where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    match = re.search(rf"^{re.escape(key)}\s*:\s*(.*)$", text, flags=re.MULTILINE)
    return match.group(1).strip() if match else ""


def _output(*command: str) -> str:
    """What ``command`` prints, or nothing where it fails or does not exist."""
    # Inside a git hook, GIT_DIR and its like would send the question to another repository.
    variables = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True, env=variables)
    except (OSError, subprocess.SubprocessError):
        return ""
    return result.stdout.strip()
