"""Two processes with a share of the pairs each give what one process gives with all of them."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from crossalign.alignment import gather_features, get_penalty, get_similarity, similarities
from crossalign.cli import leave_group

NAMES = (*(name for name in similarities.names() if get_similarity(name).differentiable), "koleo")
SHARES = (30, 18)  # unequal: the last batch of an epoch


def _data() -> tuple[nn.Linear, Tensor, Tensor]:
    torch.manual_seed(0)
    layer = nn.Linear(6, 5).double()
    return layer, torch.randn(sum(SHARES), 6, dtype=torch.float64), torch.randn(sum(SHARES), 4, dtype=torch.float64)


def _value(name: str, x: Tensor, y: Tensor) -> Tensor:
    return get_penalty(name)(x) if name == "koleo" else get_similarity(name)(x, y)


def _process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    layer, inputs, target = _data()
    model = DistributedDataParallel(layer)
    mine = slice(0, SHARES[0]) if rank == 0 else slice(SHARES[0], None)
    results: dict[str, tuple[Tensor, Tensor | None]] = {}
    for name in NAMES:
        model.zero_grad()
        value = _value(name, gather_features(model(inputs[mine])), gather_features(target[mine]))
        value.backward()
        assert layer.weight.grad is not None
        results[name] = value.detach(), layer.weight.grad.clone()
    # What is summed and not averaged afterwards holds W times the share of this process.
    features = inputs[mine].clone().requires_grad_()
    gather_features(features).square().sum().backward()
    results["own"] = features.detach(), features.grad
    torch.save(results, f"{folder}/{rank}.pt")
    leave_group(0)


def test_scores_and_gradients_of_gathered_features_are_those_of_one_process(tmp_path: Path) -> None:
    """After DDP's average; a score of each share, or the own share put back after `all_gather`, would be wrong."""
    mp.spawn(_process, args=(str(tmp_path),), nprocs=2)
    assert len(NAMES) == 13
    both = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    layer, inputs, target = _data()
    for name in NAMES:
        layer.zero_grad()
        value = _value(name, layer(inputs), target)
        value.backward()
        for results in both:
            torch.testing.assert_close(results[name], (value.detach(), layer.weight.grad))
    for features, gradient in (results["own"] for results in both):
        torch.testing.assert_close(gradient, 2 * 2 * features)


def test_one_process_gathers_nothing() -> None:
    x = torch.randn(4, 3, requires_grad=True)
    assert gather_features(x) is x
