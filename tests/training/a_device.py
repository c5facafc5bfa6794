"""A device that is none: its tensors lie in memory and have their values, but count as elsewhere, as a GPU's do.

torch calls it "meta". What the host reads of a tensor there makes it wait, and is noted while ``watched``; so is what it sends
there and waits for. A tensor of the host in an operation with tensors of the device is an error.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

import crossalign

aten = torch.ops.aten
NAME = torch.device("meta")
SOURCE = str(Path(crossalign.__file__).parent)
READS = (  # operators that give the host a value, or a shape that depends on values
    *(aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten._unique, aten._unique2),
    *(aten.unique_dim, aten.unique_consecutive, aten.bincount, aten.is_nonzero),
)
COPIES = (aten._to_copy, aten.copy_)
INDEXING = (aten.index, aten.index_put_, aten.index_put, aten._index_put_impl_)


class There(Tensor):
    """A tensor of the device; ``here`` holds its values."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> There:
        made: There = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, here.shape, strides=here.stride(), storage_offset=here.storage_offset(), dtype=here.dtype, device=NAME
        )
        made.here = here
        return made

    def tolist(self) -> Any:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} outside of the device's mode")


class Device(TorchDispatchMode):
    """The device, while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.watches = self.entered = False
        self.waits: list[str] = []
        """Each wait of the host: the operator, and where in the package."""
        self.seen = 0
        """Operators on tensors of the device while it was watched."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
        asked = kwargs.get("device")
        there = [tensor for tensor in tensors if isinstance(tensor, There)]
        comes = asked is not None and torch.device(asked).type == NAME.type
        if not there and not comes:
            return func(*args, **kwargs)
        self.seen += self.watches
        goes = asked is not None and not comes
        operator = func.overloadpacket
        on_host = [tensor for tensor in tensors if not isinstance(tensor, There) and tensor.ndim]
        if operator in COPIES:
            goes = goes or (operator is aten.copy_ and not isinstance(args[0], There))
            enters = (comes and not there) or (operator is aten.copy_ and isinstance(args[0], There) and bool(on_host))
            blocks = not kwargs.get("non_blocking", args[2] if operator is aten.copy_ and len(args) > 2 else False)
            if goes or (enters and blocks):
                self._note(func)
        elif operator in READS:
            self._note(func)
        elif operator in INDEXING:
            indices = [index for index in args[1] if index is not None]
            by_number = len(args) > 2 and args[2].numel() == 1  # becomes masked_fill
            masks = [index for index in indices if index.dtype in (torch.bool, torch.uint8) and not by_number]
            if masks or any(not isinstance(index, There) for index in indices):
                self._note(func)
        elif on_host:
            raise RuntimeError(f"{func} is given a tensor of the host beside those of the device{_where()}")
        here, here_named = tree_map(lambda value: value.here if isinstance(value, There) else value, (args, kwargs))
        if asked is not None:
            here_named["device"] = torch.device("cpu")
        result = func(*here, **here_named)
        if goes:
            return args[0] if operator is aten.copy_ else result.clone()  # a copy, as from a device
        if operator is aten._to_copy and not there:
            result = result.clone()
        result = tree_map(lambda value: There(value) if isinstance(value, Tensor) else value, result)
        return return_and_correct_aliasing(func, args, kwargs, result)

    def _note(self, func: Any) -> None:
        if self.watches:
            self.waits.append(f"{func}{_where()}")

    @contextmanager
    def watching(self, watches: bool) -> Iterator[None]:
        """Whether waits are noted within."""
        before, self.watches = self.watches, watches
        try:
            yield
        finally:
            self.watches = before

    def inside(self, function: Callable[..., Any], watches: bool) -> Callable[..., Any]:
        """``function``, watched or not."""

        def call(*args: Any, **kwargs: Any) -> Any:
            with self.watching(watches):
                return function(*args, **kwargs)

        return call


def _where() -> str:
    """The lines of the package that led here, innermost first."""
    frame, lines = sys._getframe(2), []
    while frame is not None:
        if frame.f_code.co_filename.startswith(SOURCE):
            lines.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}")
        frame = frame.f_back  # type: ignore[assignment]
    return " in " + " < ".join(lines[:3])


def move(model: nn.Module, *args: Any, plain: Any = nn.Module.to, **kwargs: Any) -> nn.Module:
    """``Module.to``: torch would move no tensor of another class in place; shared parameters stay shared."""
    if args != (NAME,) or kwargs:
        return plain(model, *args, **kwargs)  # type: ignore[no-any-return]
    moved: dict[int, Any] = {}
    for module in model.modules():
        for kept in (module._parameters, module._buffers):
            for name, tensor in kept.items():
                if tensor is None or isinstance(tensor, There) or tensor.device == NAME:
                    continue
                if id(tensor) not in moved:
                    new = tensor.detach().to(NAME)
                    moved[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
                    moved[id(new)] = tensor  # so that no other one gets its id
                kept[name] = moved[id(tensor)]
    return model
