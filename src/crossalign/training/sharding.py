"""FSDP2: parameters, gradients and optimiser state in shares over the processes, for models that one device cannot hold.

torch's ``fully_shard`` is called here and not through accelerate, which shards on accelerators alone: so two processes on
a CPU compute, and test, what many GPUs do.
"""

from typing import Any

import torch
from torch import Tensor, nn

from crossalign.core.errors import UserError
from crossalign.models.taps import block_names


def shard(model: nn.Module, device: torch.device) -> None:
    """Shard ``model`` in place: each block on its own, and the rest at the root, through which it must be called.

    Gradients are averaged over the processes in every backward pass, as DDP does in the last one.

    Raises:
        UserError: a model whose blocks are not known: sharded at its root alone it would be whole on each device in every pass.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    blocks = block_names(model)
    if not blocks:
        raise UserError(
            f"--loop.shard shares a model out block by block, and {type(model).__name__} has no list of as many blocks as its "
            "configuration says: leave --loop.shard out"
        )
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for name in blocks:
        fully_shard(model.get_submodule(name), mesh=mesh)
    fully_shard(model, mesh=mesh)


def reshard(model: Any) -> None:
    """Give up whole parameters that an evaluation left at the root: what is saved, and the optimiser's, are the shares."""
    model.reshard()


def whole(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor, which every process must ask for; others come back as they are."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def put(parameter: Tensor, value: Tensor) -> None:
    """Copy a whole ``value`` into ``parameter``, of which this process may hold a share."""
    if hasattr(parameter, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)  # type: ignore[attr-defined]
    parameter.copy_(value)


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state of a sharded model's optimiser, whole on the first process, to be saved."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return dict(get_optimizer_state_dict(model, _inner(optimizer), options=options))


def load_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Put :func:`optimizer_state` back."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

    set_optimizer_state_dict(model, _inner(optimizer), state, options=StateDictOptions(full_state_dict=True))


def _inner(optimizer: Any) -> torch.optim.Optimizer:
    """The optimiser inside accelerate's."""
    return getattr(optimizer, "optimizer", optimizer)  # type: ignore[no-any-return]
