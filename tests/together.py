"""Processes of one run as ``torchrun`` starts them, forked from one that has imported what is heavy.

What a start costs is the imports of torch, transformers and the trainers, several seconds of each process and of the launcher.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "crossalign.training.loop",
        "peft",
        "transformers.trainer",
        "transformers.models.gpt2.modeling_gpt2",
        "trl",
        "lightning.pytorch",
    ]
)


def together(run: Callable[..., Any], *args: Any, processes: int = 2, timeout: float = 110) -> None:
    """Call ``run(*args)``, which a new process can import, in several processes at once; each must end with 0 or None.

    Raises:
        AssertionError: one did not, or not in time; with what it printed.
    """
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    shared = {**os.environ, "OMP_NUM_THREADS": "1"}
    if processes > 1:
        shared |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "none"}
    with tempfile.TemporaryDirectory() as folder:
        printed = [Path(folder) / str(rank) for rank in range(processes)]
        started = []
        for rank, file in enumerate(printed):
            own = shared | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {})
            started.append(FORKS.Process(target=_begin, args=(own, file, run, args), daemon=True))
            started[-1].start()
        try:
            for process in started:
                process.join(timeout)
            codes = [process.exitcode for process in started]
            assert codes == [0] * processes, (codes, *(file.read_text(errors="replace")[-3000:] for file in printed))
        finally:
            for process in started:
                process.kill()


def _begin(variables: dict[str, str], printed: Path, run: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ.clear()
    os.environ.update(variables)
    with printed.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.exit(run(*args))
